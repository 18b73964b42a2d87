"""Trains the encoder: contrastive, with in-batch negatives in both directions (InfoNCE; van den Oord et al. 2018;
Henderson et al. 2017 for the in-batch form). Vectors are updated by Adam on the rows of a batch alone, with one second
moment a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from miniglm.lookup.encoder import DIMENSIONS, Bag, Encoder, Vocabulary

RATE = 1e-2
TEMPERATURE = 0.05

Batch = tuple[list[Bag], list[Bag]]
"""Texts and what each of them belongs to: the other rows of the second list are the negatives."""


def train_encoder(
    vocabulary: Vocabulary,
    batches: Callable[[Callable[[], Encoder], float], Batch],
    seconds: float,
    seed: int,
    *,
    most_steps: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Encoder:
    """Trains for `seconds` by the clock, the learning rate falling to nothing.

    Args:
        batches: gives a batch; gets what gives the encoder as it is (to find hard negatives), and the share of the
            time that is gone.
        most_steps: where training ends even if there is time left.
        progress: is told the share of the time that is gone.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(vocabulary.idf)
    vectors = torch.randn(size, DIMENSIONS, generator=generator) / math.sqrt(DIMENSIONS)
    weights = torch.from_numpy(vocabulary.idf / max(float(vocabulary.idf.mean()), 1e-6))[:, None].clone()
    parts = (vectors, weights)
    first = [torch.zeros_like(part) for part in parts]
    second = [torch.zeros(size, 1) for _ in parts]
    begun, steps = time.monotonic(), 0

    def current() -> Encoder:
        return Encoder(vocabulary, (vectors * weights).numpy())

    while True:
        share = max((time.monotonic() - begun) / max(seconds, 1e-6), steps / most_steps)
        progress(min(share, 1.0))
        if share >= 1:
            break
        left, right = batches(current, share)
        rows, places = np.unique(np.concatenate(left + right), return_inverse=True)
        at = torch.from_numpy(rows)
        own = [part[at].requires_grad_(True) for part in parts]
        weighted, where = own[0] * own[1], torch.from_numpy(places)
        half = sum(map(len, left))
        scores = _unit_sums(left, weighted, where[:half]) @ _unit_sums(right, weighted, where[half:]).T / TEMPERATURE
        target = torch.arange(len(left))
        loss = torch.nn.functional.cross_entropy(scores, target) + torch.nn.functional.cross_entropy(scores.T, target)
        for part, mean, square, row, gradient in zip(
            parts, first, second, own, torch.autograd.grad(loss / 2, own), strict=True
        ):
            moved = mean[at].mul_(0.9).add_(gradient, alpha=0.1)
            spread = square[at].mul_(0.99).add_(gradient.pow(2).mean(1, keepdim=True), alpha=0.01)
            mean[at], square[at] = moved, spread
            part[at] = row.detach() - RATE * max(0.02, 1 - share) * moved / (spread.sqrt() + 1e-8)
        steps += 1
    return current()


def _unit_sums(bags: Sequence[Bag], vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sums of each bag's vectors, scaled to length 1; `rows`: the bags' n-grams, one after another, among the vectors."""
    starts = torch.from_numpy(np.cumsum([0, *(len(bag) for bag in bags[:-1])]))
    summed = torch.nn.functional.embedding_bag(rows, vectors, starts, mode="sum")
    return torch.nn.functional.normalize(summed, dim=-1)
