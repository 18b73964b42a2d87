"""Which weights are moved by which optimizer, how Muon moves them, and the learning rate over a run.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) moves the matrices of the layers, AdamW everything
else: embeddings, output layer, norms and biases, as Muon's author advises. Knows nothing of models or batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

POLAR_EXPRESS = (
    (7.559776, -20.838292, 14.716991),
    (3.170834, -2.292459, 0.458575),
    (2.250624, -1.636519, 0.422446),
)
"""(a, b, c) of each step's a·x + b·x³ + c·x⁵. Their composition takes [0.02, 1] to 1 ± 0.102 (Amsel et al. 2025, The
Polar Express, arXiv:2505.16932, section 3.2; computed with their recipe: each step the minimax polynomial of the
interval that the step before leaves, all but the last taken at x / 1.02: past their interval's end the polynomials
rise steeply, and bfloat16's rounding would go there). Three steps train as well as four (docs/speed.md)."""
GRAM_ASPECT = 1.5
"""From this ratio of the sides on, iterating on X·Xᵀ alone costs less than iterating on X."""


Spread = Callable[[list[Tensor], int, Callable[[Tensor], Tensor]], list[Tensor]]
"""Takes what this process has of each matrix, the rows of a whole one, and what is to be done with (batch, rows,
columns) of whole ones; gives what this process has of each result."""


def at_once(own: list[Tensor], rows: int, compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The `Spread` of a single process: all matrices in one call."""
    return list(compute(torch.stack(own)).unbind())


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that is shared out (a DTensor): the same memory. Of any other: all of it."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def orthogonalize(matrices: Tensor, coefficients: Sequence[tuple[float, float, float]] = POLAR_EXPRESS) -> Tensor:
    """U·Vᵀ of each matrix U·S·Vᵀ, nearly: each singular value s becomes the composed polynomials of s / n, where n is
    the fourth root of the sum of all s⁴: never below the largest s, and nearer to it than the Frobenius norm that
    Muon usually divides by, so fewer steps reach the small ones.

    Args:
        matrices: (batch, m, n). In float32, or in bfloat16 where that is faster and this much precision will do.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT, coefficients).mT
    # The largest entry becomes 1 first: fourth powers of small ones would vanish. What is as good as zero becomes zero.
    peak = matrices.abs().amax(dim=(-2, -1), keepdim=True)
    x = matrices * torch.where(peak > 1e-30, 1 / peak, 0.0).to(matrices.dtype)
    gram = x @ x.mT
    norm = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min_(1e-30)
    gram = gram / norm
    if x.dtype == torch.float32 and x.shape[2] > GRAM_ASPECT * x.shape[1]:
        # All factors are polynomials in X·Xᵀ and so commute: the small square matrix is iterated and X multiplied
        # once. The small eigenvalues need float32: rounded to bfloat16 they turn negative, and the iteration diverges.
        factor: Tensor | None = None
        for step, (a, b, c) in enumerate(coefficients):
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            p.diagonal(dim1=-2, dim2=-1).add_(a)
            factor = p if factor is None else p @ factor
            if step < len(coefficients) - 1:
                gram = p @ (p @ gram)
        return x if factor is None else factor @ x / norm.sqrt()
    x = x / norm.sqrt()
    for step, (a, b, c) in enumerate(coefficients):
        gram = x @ x.mT if step else gram
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(Optimizer):
    """Momentum, orthogonalized. The rule of torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"` and Nesterov's
    momentum, but all matrices of one shape at once, with better polynomials, and in the device's fastest arithmetic
    (torch's is always bfloat16, which a CPU without units for it emulates at a tenth of the speed).

    Args:
        lr: of an update whose root mean square matches AdamW's 0.2 (Liu et al. 2025, arXiv:2502.16982, section 2.2).
            A number, or a tensor that holds it on the matrices' device: a recorded step reads it there.
        dtype: the arithmetic of `orthogonalize`.
        coefficients: its polynomials.
        spread: who orthogonalizes which matrix where several processes train together.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float | Tensor,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        coefficients: Sequence[tuple[float, float, float]] = POLAR_EXPRESS,
        spread: Spread = at_once,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.coefficients = dtype, tuple(coefficients)
        self.spread = spread

    def _orthogonalized(self, matrices: Tensor) -> Tensor:
        return orthogonalize(matrices.to(self.dtype), self.coefficients).to(matrices.dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Moves every matrix that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                gradients = [local(p.grad) for p in parameters if p.grad is not None]
                for p in parameters:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [local(self.state[p]["momentum_buffer"]) for p in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
                updates = self.spread(list(ahead), rows, self._orthogonalized)
                weights = [local(p) for p in parameters]
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                step = 0.2 * math.sqrt(max(rows, columns)) * group["lr"]
                if isinstance(step, Tensor):
                    torch._foreach_add_(weights, torch._foreach_mul(updates, -step))
                else:
                    torch._foreach_add_(weights, updates, alpha=-step)


def build_optimizers(
    model: nn.Module,
    *,
    muon: bool,
    matrix_lr: float,
    adam_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    matrix_dtype: torch.dtype = torch.float32,
    spread: Spread = at_once,
    recorded: bool = False,
) -> list[Optimizer]:
    """The optimizers of a stage. Every group keeps its peak rate under `peak_lr`, for `set_learning_rate`.

    Args:
        muon: Muon for the layers' matrices; otherwise AdamW for all.
        matrix_lr: Muon's peak rate, of an update whose root mean square matches AdamW's 0.2
            (Liu et al. 2025, arXiv:2502.16982, section 2.2), so both rates are of one scale.
        adam_lr: AdamW's peak rate.
        matrix_dtype: Muon's arithmetic.
        spread: who does it, see `Muon`.
        recorded: whether steps may be recorded and played back on a GPU (recording.py): the rates are then tensors
            there.
    """
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # frozen, as all but the adapters of a LoRA are
            continue
        if muon and parameter.ndim == 2 and ".layers." in name:
            matrices.append(parameter)
        elif parameter.ndim == 2:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},  # decaying a gain or a bias only shrinks the signal
    ]
    device = (decayed + plain + matrices)[0].device

    def rate(peak: float) -> float | Tensor:
        return torch.tensor(peak, device=device) if recorded else peak

    optimizers: list[Optimizer] = [
        torch.optim.AdamW(groups, lr=rate(adam_lr), betas=betas, eps=1e-10, fused=True, capturable=recorded)
    ]
    if matrices:
        optimizers.append(
            Muon(matrices, lr=rate(matrix_lr), weight_decay=weight_decay, dtype=matrix_dtype, spread=spread)
        )
    for optimizer, peak in zip(optimizers, (adam_lr, matrix_lr), strict=False):
        for group in optimizer.param_groups:
            group["peak_lr"] = peak
    return optimizers


def learning_rate_factor(progress: float, *, warmup: float, decay: float, final: float) -> float:
    """Share of the peak rate at `progress` (0 to 1): linear warm-up over the first `warmup` of a run, a plateau, then
    a cosine over the last `decay` of it, down to `final` (the trapezoid of Hägele et al. 2024, arXiv:2405.18392)."""
    progress = min(max(progress, 0.0), 1.0)
    if warmup > 0 and progress < warmup:
        return max(progress / warmup, 1e-3)
    if progress < 1.0 - decay or decay <= 0:
        return 1.0
    through = (progress - (1.0 - decay)) / decay
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * through))


def set_learning_rate(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Sets every group to `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["peak_lr"] * factor)
            else:
                group["lr"] = group["peak_lr"] * factor
