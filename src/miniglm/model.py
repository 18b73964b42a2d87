"""The decoder of the GLM-4 family, readable top to bottom.

RMSNorm, grouped-query attention with bias on q, k and v, rotary embedding on half of each head in interleaved
pairs, SwiGLU with one fused gate_up projection, tied or untied output: the same mathematics and the same tensor
names as transformers' `GlmForCausalLM`, so that a saved folder opens there as it is (tests/test_model.py).

The model knows nothing of text: token ids in, hidden states, logits or a loss out.
Shapes are written (batch, seq, ...); `V` is the vocabulary, `D` the hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniglm import kernels
from miniglm.config import ModelConfig
from miniglm.kernels import LinearCrossEntropy, RotaryAttention, Rotated, fits_rotary_attention

IGNORE = -100
"""Label of a position that is no target, as in torch's own cross-entropy."""


def rotary_table(config: ModelConfig, length: int, device: torch.device | None = None) -> Tensor:
    """Unit complex numbers exp(i · position · theta^(-2j/rotary_dim)), (length, rotary_dim / 2), complex64.

    Su et al. 2021, RoFormer (arXiv:2104.09864), equation 15; interleaved pairs as in GLM-4.
    """
    exponent = torch.arange(0, config.rotary_dim, 2, device=device, dtype=torch.float32) / config.rotary_dim
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] / config.rope_theta**exponent
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the first dimensions of each head by its position. x: (batch, seq, heads, head_dim);
    table: (batch or 1, seq, 1, rotary_dim / 2), or the same as (…, rotary_dim / 2, 2) real numbers, which torch's
    compiler understands."""
    rotary_dim = 2 * table.shape[-1 if table.is_complex() else -2]
    pairs = x[..., :rotary_dim].float().reshape(*x.shape[:-1], -1, 2)
    if table.is_complex():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * table)
    else:
        (a, b), (cosine, sine) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack((a * cosine - b * sine, b * cosine + a * sine), dim=-1)
    return torch.cat((turned.flatten(-2).type_as(x), x[..., rotary_dim:]), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        bias, size = config.attention_bias, config.hidden_size
        self.q_proj = nn.Linear(size, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, size, bias=False)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        projected, groups = self._projected(x), self.k_proj.out_features // self.head_dim
        if fits_rotary_attention(x) and table.is_complex():
            seen: Tensor = RotaryAttention.apply(projected, table, mask, groups, self.head_dim)  # type: ignore[no-untyped-call]
            return self.o_proj(seen)  # type: ignore[no-any-return]
        batch, seq, _ = x.shape
        turned = projected.shape[-1] // self.head_dim - groups  # all heads but the values'
        in_place = x.device.type == "cuda" and table.is_complex()
        if in_place:
            projected = Rotated.apply(projected, table, turned, self.head_dim)  # type: ignore[no-untyped-call]
        qk, v = projected.view(batch, seq, -1, self.head_dim).split_with_sizes((turned, groups), dim=2)
        q, k = (qk if in_place else rotate(qk, table)).split_with_sizes((turned - groups, groups), dim=2)
        if self.grouped and mask is not None and x.device.type == "cuda":
            # Of torch's kernels for a GPU none takes both a mask and shared keys: it would go through whole matrices
            # of scores.
            k, v = (t.repeat_interleave(q.shape[2] // groups, dim=2) for t in (k, v))
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=k.shape[2] != q.shape[2],
        )
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, seq, -1))
        return out

    def _projected(self, x: Tensor) -> Tensor:
        """All queries, then all keys, then all values, (batch, seq, (heads + 2 · groups) · head_dim)."""
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        if not type(q) is type(k) is type(v) is nn.Linear:  # adapters work by themselves
            return torch.cat((q(x), k(x), v(x)), dim=-1)
        bias = None if q.bias is None else torch.cat((q.bias, k.bias, v.bias))
        return F.linear(x, torch.cat((q.weight, k.weight, v.weight)), bias)  # one product in place of three


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202), gate and up in one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():  # one operation there already
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        out: Tensor = kernels.RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), table, mask)
        x = x + (F.dropout(y, dropout) if dropout else y)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + (F.dropout(y, dropout) if dropout else y)


@dataclass(frozen=True, slots=True)
class Compiled:
    """`DecoderLayer.forward`, which takes the rotations as real numbers then, and `kernels.losses_and_gradient`, both
    compiled."""

    layer: Callable[..., Tensor]
    losses: Callable[..., tuple[Tensor, Tensor]]


class Decoder(nn.Module):
    """Embedding, layers and the last norm; the part that transformers calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Empty, since its weights come later: to draw them on the meta device, torch would import its compiler.
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=empty)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class GLM(nn.Module):
    """A decoder with its output layer.

    Args:
        config: the sizes.
        dropout: share of each residual branch that is zeroed while training.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config, self.dropout = config, dropout
        self.checkpointing = False
        """Whether training keeps only each layer's input and computes its inside again for the gradient."""
        self.compiled: Compiled | None = None
        """What is used while steps are recorded on a GPU (recording.py)."""
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._table: Tensor | None = None

    @torch.no_grad()
    def initialize(self, seed: int) -> GLM:
        """Draws the weights: normal with 0.02 for embeddings, 1/sqrt(fan-in) · 0.5 for matrices, and zero for what
        writes into the residual stream, so that each layer begins as the identity (Zhang et al. 2019, Fixup,
        arXiv:1901.09321). The same on every machine for one seed."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias") or name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            else:
                embedding = name.endswith(("embed_tokens.weight", "lm_head.weight"))
                std = 0.02 if embedding else 0.5 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def rotary(self, positions: Tensor | None, length: int) -> Tensor:
        """The table at `positions` (batch, seq), or at 0 … length for all rows: (batch or 1, seq, 1, rotary_dim / 2)."""
        table = self._table
        if table is None or table.device != self.device or len(table) < length:
            # Positions may run past the trained context; the table grows by doubling.
            size = max(
                length, min(self.config.max_position_embeddings, 4096), 2 * len(table) if table is not None else 0
            )
            table = self._table = rotary_table(self.config, size, self.device)
        return table[None, :length, None] if positions is None else table[positions][:, :, None]

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (batch, seq, D).

        Args:
            ids: token ids, (batch, seq).
            positions: (batch, seq), counted from 0 in each sequence; default 0 … seq.
            mask: who sees whom, boolean, (batch or 1, 1, seq, seq); nobody sees later positions. Default: all earlier.
            length: what all positions lie below. Default: looked up, for which a GPU is waited for.
        """
        if length is None:
            length = ids.shape[1] if positions is None else int(positions.max()) + 1
        table = self.rotary(positions, length)
        dropout = self.dropout if self.training else 0.0
        x = self.embed(ids, positions)
        if mask is not None:  # as what is added to the scores, once and not in each layer
            mask = torch.zeros(mask.shape, device=x.device, dtype=kernels.active_dtype(x)).masked_fill_(
                ~mask, -math.inf
            )
        if self.compiled is not None:
            table = torch.view_as_real(table)
        for layer in self.model.layers:
            if self.compiled is not None:
                x = self.compiled.layer(layer, x, table, mask, dropout)
            elif self.checkpointing and self.training:
                x = checkpoint(layer, x, table, mask, dropout, use_reentrant=False)
            else:
                x = layer(x, table, mask, dropout)
        out: Tensor = self.model.norm(x)
        return out

    def embed(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """What the first layer reads, (batch, seq, D). Positions are for models that add them here."""
        out: Tensor = self.model.embed_tokens(ids)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Unnormalised scores of the next token, (..., V)."""
        out: Tensor = self.lm_head(hidden)
        return out

    def loss(
        self, ids: Tensor, labels: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Summed cross-entropy in nats over the labels that are not `IGNORE`, and their number.

        Only target positions reach the output layer: a batch of questions and answers pays for its answers.
        """
        hidden = self(ids, positions=positions, mask=mask).flatten(0, 1)
        flat = labels.flatten()
        targets = (flat != IGNORE).nonzero().squeeze(1)
        if len(targets) == 0:
            return hidden.sum() * 0.0, 0
        if len(targets) < len(flat):
            hidden, flat = hidden[targets], flat[targets]
        loss: Tensor = LinearCrossEntropy.apply(hidden, self.lm_head.weight, flat)  # type: ignore[no-untyped-call]
        return loss, len(targets)

    def loss_of_at_most(
        self, room: int, ids: Tensor, labels: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The same loss of batches that have at most `room` labels to learn, by steps that do not depend on what is in
        them: every array has the same size whatever the labels, so that a GPU can play a recorded one back and is
        never waited for. Positions are below seq."""
        hidden = self(ids, positions=positions, mask=mask, length=ids.shape[1]).flatten(0, 1)
        flat = labels.flatten()
        if room < len(flat):  # those that are targets first
            chosen = (flat == IGNORE).byte().argsort(stable=True)[:room]
            hidden, flat = hidden.index_select(0, chosen), flat.index_select(0, chosen)
        fused = None if self.compiled is None else self.compiled.losses
        loss: Tensor = LinearCrossEntropy.apply(hidden, self.lm_head.weight, flat, IGNORE, fused)  # type: ignore[no-untyped-call]
        return loss
