"""The parts of a training step that torch has no single operation for, each as one autograd function.

Every function here has a plain formula in its docstring, and tests/test_kernels.py holds it, forward and backward,
against that formula. What they save are passes over memory and allocations, not arithmetic: docs/speed.md says how
much each is worth. Knows tensors and shapes, nothing of the model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LONGEST = 1024
"""Longest sequence for `RotaryAttention`, which keeps the weights of the attention for the backward pass: their
memory grows with the square of the length, torch's own kernel's does not."""
QUERIES = 64
"""Positions whose queries are worked on at once: keys that lie behind all of them are left out of the product."""


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in `precision`, "float32" or "bfloat16"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def active_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which autocast would multiply this tensor: its own where autocast is off."""
    kind, own = tensor.device.type, tensor.dtype
    found: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
    return found


class RMSNorm(torch.autograd.Function):
    """x · weight / sqrt(mean(x²) + eps) over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: (..., D); weight: (D,)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out: Tensor = (x * inverse).mul_(weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x / norm and g the gradient: (g · weight - n · mean(g · weight · n)) / norm."""
        x, weight, inverse = ctx.saved_tensors
        normal = x * inverse
        product = (grad * normal).view(-1, x.shape[-1])
        mean = (product @ weight).div_(-x.shape[-1]).view(inverse.shape)
        grad_x = (grad * weight).addcmul_(normal, mean).mul_(inverse)
        return grad_x, product.sum(0), None


def _turn(source: Tensor, table: Tensor, out: Tensor) -> None:
    """Writes `source` to `out`, both (..., head_dim), the first dimensions in complex pairs multiplied by `table`."""
    size = 2 * table.shape[-1]
    pairs = [torch.view_as_complex(t[..., :size].view(*t.shape[:-1], -1, 2)) for t in (source, out)]
    torch.mul(pairs[0], table, out=pairs[1])
    out[..., size:] = source[..., size:]


def fits_rotary_attention(x: Tensor) -> bool:
    """Whether `RotaryAttention` is for this input, (batch, seq, D): float32 on a CPU and not too long. Elsewhere, and
    in bfloat16, torch's own kernels are better."""
    return x.device.type == "cpu" and active_dtype(x) == torch.float32 and x.shape[1] <= LONGEST


class RotaryAttention(torch.autograd.Function):
    """Rotary embedding of queries and keys, then grouped-query attention: softmax(q · kᵀ / sqrt(head_dim)) · v.

    Queries, keys and values are laid out once, rotated on the way, so that every product is one batched call over
    (batch · groups) and the heads of a group share their keys as further rows. Nobody sees later positions, so each
    block of queries meets only the keys up to its end.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, table: Tensor, bias: Tensor | None, groups: int, head_dim: int) -> Tensor:
        """Args:
            projected: (batch, seq, (heads + 2 · groups) · head_dim): all queries, then all keys, then all values.
            table: complex, (batch or 1, seq, 1, rotary_dim / 2), see model.rotary_table.
            bias: added to the scores: 0 where a position may look, -inf where not, (batch or 1, 1, seq, seq); nothing
                after the diagonal is read. None for plain causal.

        Returns:
            (batch, seq, heads · head_dim).
        """
        batch, seq, width = projected.shape
        heads = width // head_dim - 2 * groups
        each = heads // groups
        q, k, v = projected.view(batch, seq, -1, head_dim).split_with_sizes((heads, groups, groups), dim=2)
        queries = projected.new_empty(batch, groups, seq, each, head_dim)
        keys, values = (projected.new_empty(batch, groups, seq, head_dim) for _ in range(2))
        _turn(q.view(batch, seq, groups, each, head_dim).transpose(1, 2), table[:, None], queries)
        _turn(k.transpose(1, 2), table.transpose(1, 2), keys)
        values.copy_(v.transpose(1, 2))
        queries, keys, values = queries.flatten(2, 3).flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
        if bias is None:
            bias = torch.full((seq, seq), -math.inf).triu_(1)[None, None]
        out = torch.empty_like(queries)
        weights: list[Tensor] = []
        for start in range(0, seq, QUERIES):
            end = min(start + QUERIES, seq)
            rows = slice(start * each, end * each)
            scores = projected.new_empty(batch, groups, end - start, each, end)
            scores.copy_(bias[:, :, start:end, None, :end])
            scores = scores.view(batch * groups, -1, end)
            scores.baddbmm_(queries[:, rows], keys[:, :end].mT, alpha=1 / math.sqrt(head_dim))
            weights.append(torch.softmax(scores, dim=-1))
            out[:, rows] = weights[-1] @ values[:, :end]
        ctx.save_for_backward(queries, keys, values, table, *weights)
        ctx.shape = (batch, seq, groups, each, head_dim)
        return out.view(batch, groups, seq, each, head_dim).transpose(1, 2).reshape(batch, seq, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        queries, keys, values, table, *weights = ctx.saved_tensors
        batch, seq, groups, each, head_dim = ctx.shape
        grad = grad.view(batch, seq, groups, each, head_dim).transpose(1, 2).reshape(queries.shape)
        grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        scale = 1 / math.sqrt(head_dim)
        for start, p in zip(range(0, seq, QUERIES), weights, strict=True):
            end = min(start + QUERIES, seq)
            rows = slice(start * each, end * each)
            grad_v[:, :end].baddbmm_(p.mT, grad[:, rows])
            grad_p = grad[:, rows] @ values[:, :end].mT
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, rows] = grad_scores @ keys[:, :end]
            grad_k[:, :end].baddbmm_(grad_scores.mT, queries[:, rows], alpha=scale)
        grad_q.mul_(scale)
        projected = grad.new_empty(batch, seq, groups * (each + 2), head_dim)
        q, k, v = projected.split_with_sizes((groups * each, groups, groups), dim=2)
        back = table.conj().resolve_conj()  # turned the other way round
        by_group = grad_q.view(batch, groups, seq, each, head_dim).transpose(1, 2)
        _turn(by_group, back[:, :, None], q.view(batch, seq, groups, each, head_dim))
        _turn(grad_k.view(batch, groups, seq, head_dim).transpose(1, 2), back, k)
        v.copy_(grad_v.view(batch, groups, seq, head_dim).transpose(1, 2))
        return projected.flatten(2), None, None, None, None


class Rotated(torch.autograd.Function):
    """Rotary embedding in place, of the first of several heads: for a GPU, where queries, keys and values come from
    one product and stay in its memory."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, table: Tensor, turned: int, head_dim: int) -> Tensor:
        """Overwrites `projected` and gives it back.

        Args:
            projected: (batch, seq, heads · head_dim), of which the first `turned` heads are rotated.
            table: complex, (batch or 1, seq, 1, rotary_dim / 2), see model.rotary_table.
        """
        ctx.mark_dirty(projected)
        ctx.save_for_backward(table)
        ctx.shape = (turned, head_dim)
        return _turn_in_place(projected, table, turned, head_dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (table,) = ctx.saved_tensors
        back = table.conj().resolve_conj()  # turned the other way round
        return _turn_in_place(grad.clone(), back, *ctx.shape), None, None, None


def _turn_in_place(projected: Tensor, table: Tensor, turned: int, head_dim: int) -> Tensor:
    """What `Rotated` does, in either direction."""
    heads = projected.view(*projected.shape[:2], -1, head_dim)
    part = heads[:, :, :turned, : 2 * table.shape[-1]]
    pairs = torch.view_as_complex(part.float().reshape(*part.shape[:-1], -1, 2))
    part.copy_(torch.view_as_real(pairs * table).flatten(-2))
    return projected


def losses_and_gradient(logits: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies of `logits`, (n, V), and its gradient: softmax minus one-hot. In a form that
    torch's compiler makes one pass of; by itself it is slower than what `LinearCrossEntropy` does.

    Args:
        labels: (n, 1); rows that have `ignored` there count for nothing.
    """
    wanted, scores = labels != ignored, logits.float()
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels
    normaliser = scores.logsumexp(1, keepdim=True)
    loss = (normaliser - torch.where(is_label, scores, 0.0).sum(1, keepdim=True)) * wanted
    gradient = ((scores - normaliser).exp() - is_label.float()) * wanted
    return loss.sum(), gradient.to(logits.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Output layer and cross-entropy in one, in blocks of rows that stay in the cache.

    The logits of a small vocabulary are by far the largest array of a step (4,096 tokens × 4,096 entries are
    64 MiB), and the plain form writes, reads and allocates them six times. Here a block is made, turned into its
    own gradient (softmax minus one-hot) and used up before the next: three matrix products and one softmax.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignored: int | None = None,
        compiled: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Args:
            hidden: (n, D).
            weight: (V, D).
            labels: (n,).
            ignored: the label of rows that are as if they were not there, if any may be.
            compiled: `losses_and_gradient`, compiled; with `ignored` only.

        Returns:
            The sum of the losses in float32. A single one is at most 87, where float32 probabilities end.
        """
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]  # a frozen output layer needs none
        # Larger blocks would leave the cache, but fewer rows than these do too little for each pass over the weights
        # and their gradient (docs/speed.md); a GPU wants few launches instead.
        rows = max(256, 2**21 // weight.shape[0]) if hidden.device.type == "cpu" else 4096
        compute = active_dtype(weight)
        matrix = weight.to(compute)
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, device=weight.device, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(hidden), rows):
            h = hidden[start : start + rows].to(compute)
            y = labels[start : start + rows, None]
            wanted = None
            if compiled is not None:
                loss, p = compiled(h @ matrix.T, y, ignored)
                total += loss
            else:
                if ignored is not None:  # hidden states of zero have no part in the gradient of the weights
                    wanted = y != ignored
                    h, y = h * wanted, y * wanted
                p = torch.softmax(h @ matrix.T, dim=1, dtype=torch.float32)
                losses = p.gather(1, y).clamp_min_(torch.finfo(torch.float32).tiny).log_()
                total -= (losses if wanted is None else losses * wanted).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                p.scatter_add_(1, y, torch.full_like(y, -1.0, dtype=p.dtype))
                p = p.to(compute)
            if grad_hidden is not None:
                grad = p @ matrix
                grad_hidden[start : start + rows] = grad if wanted is None else grad * wanted
            if grad_weight is not None and compute == torch.float32:
                grad_weight.addmm_(p.T, h)
            elif grad_weight is not None:
                grad_weight += p.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad,
            None if grad_weight is None else grad_weight * grad,
            None,
            None,
            None,
        )
