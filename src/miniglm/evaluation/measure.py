"""What a model finds likely: nats of given tokens, bits per character of a text.

Bits per character of the original text do not depend on the tokenizer, so they compare across runs and projects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from miniglm.dataset import Batch
from miniglm.guard import is_out_of_memory, release_memory
from miniglm.model import GLM

TARGETS_AT_ONCE = 1024
"""Rows of logits that exist at once: 20 MiB of them for a vocabulary of 5,000, 600 MiB for GLM-4's 150,000."""


@torch.inference_mode()
def bits_per_character(model: GLM, batches: Iterable[Batch], characters: int) -> float:
    """Cross-entropy of all targets in bits, over the characters of the text they stand for. The model's mode
    (dropout or not) is the caller's business.

    Raises:
        ValueError: no characters.
    """
    if characters <= 0:
        raise ValueError("no characters to divide by")
    nats = 0.0
    for batch in batches:
        nats += _summed_loss(model, batch)
    return nats / math.log(2) / characters


def _summed_loss(model: GLM, batch: Batch) -> float:
    """Of all rows at once, or of one half after the other where they do not fit into memory."""
    try:
        part = batch.to(model.device)
        return float(model.loss(part.ids, part.labels, positions=part.positions, mask=part.mask)[0])
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(batch.ids) == 1:
            raise
    del part
    release_memory(model.device)
    half = len(batch.ids) // 2
    return _summed_loss(model, batch.part(slice(half))) + _summed_loss(model, batch.part(slice(half, None)))


@torch.inference_mode()
def sequence_nats(
    model: GLM,
    sequences: Sequence[tuple[Sequence[int], int]],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    rows: int = 32,
) -> list[float]:
    """Of each sequence, the summed -log p in nats of its tokens from position `first` on.

    Args:
        sequences: (token ids, first); `first` is at least 1, and a sequence fits the model's context and one more.
        temperature, top_k: p is that of the distribution sampling draws from; by default the model's own.
        rows: sequences in a batch, those of like length together.
    """
    found = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    for start in range(0, len(order), rows):
        part = [i for i in order[start : start + rows] if len(sequences[i][0]) > sequences[i][1]]
        if not part:
            continue
        longest = max(len(sequences[i][0]) for i in part) - 1
        # Right of a shorter sequence stands what no target sees: attention is causal.
        ids = torch.zeros(len(part), longest, dtype=torch.int64)
        owners: list[int] = []
        places: list[int] = []
        labels: list[int] = []
        for row, i in enumerate(part):
            tokens, first = sequences[i]
            ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            owners += [row] * (len(tokens) - first)
            places += range(row * longest + first - 1, row * longest + len(tokens) - 1)
            labels += tokens[first:]
        hidden = model(ids.to(model.device)).flatten(0, 1)[torch.tensor(places, device=model.device)]
        target = torch.tensor(labels, device=model.device)
        nats = torch.empty(len(target))
        for at in range(0, len(target), TARGETS_AT_ONCE):
            block = slice(at, at + TARGETS_AT_ONCE)
            likely = _log_probabilities(model.logits(hidden[block]), temperature, top_k)
            nats[block] = -likely.gather(1, target[block, None]).squeeze(1).cpu()
        sums = torch.zeros(len(part), dtype=torch.float64).index_add_(0, torch.tensor(owners), nats.double())
        for row, i in enumerate(part):
            found[i] = float(sums[row])
    return found


def _log_probabilities(logits: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.log_softmax(dim=-1)
