"""Scores of a model on validation data: bits per character and key accuracy.

Bits per character of the original text do not depend on the tokenizer, so they compare across runs and projects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from miniglm.dataset import Batch
from miniglm.evaluation.keys import holds_keys
from miniglm.model import GLM
from miniglm.qa.formats import Example


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
        on_device = batch.to(model.device)
        loss, _ = model.loss(on_device.ids, on_device.labels, positions=on_device.positions, mask=on_device.mask)
        nats += loss.item()
    return nats / math.log(2) / characters


def key_accuracy(answers: Sequence[str], examples: Sequence[Example]) -> tuple[float | None, int]:
    """Share of answers that meet every group of their question's keys, and the number of questions that have keys
    (None and 0 where none has)."""
    marked = [(a, e.keys) for a, e in zip(answers, examples, strict=True) if e.keys]
    if not marked:
        return None, 0
    return sum(holds_keys(answer, keys) for answer, keys in marked) / len(marked), len(marked)
