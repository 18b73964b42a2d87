"""Which weights are moved by which optimizer, and the learning rate over a run.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) moves the matrices of the layers, AdamW everything
else: embeddings, output layer, norms and biases, as Muon's author advises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer


def build_optimizers(
    model: nn.Module, *, muon: bool, matrix_lr: float, adam_lr: float, weight_decay: float, betas: tuple[float, float]
) -> list[Optimizer]:
    """The optimizers of a stage. Every group keeps its peak rate under `peak_lr`, for `set_learning_rate`.

    Args:
        muon: Muon for the layers' matrices; otherwise AdamW for all.
        matrix_lr: Muon's peak rate, of an update whose root mean square matches AdamW's 0.2
            (Liu et al. 2025, arXiv:2502.16982, section 2.2), so both rates are of one scale.
        adam_lr: AdamW's peak rate.
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
    on_gpu = next(model.parameters()).device.type == "cuda"
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},  # decaying a gain or a bias only shrinks the signal
    ]
    optimizers: list[Optimizer] = [
        torch.optim.AdamW(groups, lr=adam_lr, betas=betas, eps=1e-10, fused=on_gpu or None, foreach=None)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=matrix_lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
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
            group["lr"] = group["peak_lr"] * factor
