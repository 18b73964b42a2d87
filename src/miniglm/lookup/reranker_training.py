"""Teaches the reranker: of each question's first candidates the right ones are to come first.

It must learn on questions that the encoder has not seen, or it would trust the encoder's similarities more than they
deserve; cross_fitting.py gathers them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from miniglm.lookup.ranking import share_of_right
from miniglm.lookup.reranker import CHANNELS, LAYERS, LETTERS, Characters, Reading
from miniglm.lookup.text import KINDS

Floats = NDArray[np.float32]
HIDDEN, LETTER = 48, 32
"""Channels of the layers, and of a character as they get it."""
DROPOUT = 0.3
RATE, DECAY = 2e-3, 1e-2
"""AdamW's learning rate, which rises over `WARM` steps and falls to nothing, and weight decay."""
WARM = 50
QUESTIONS = 16
"""Questions in a batch."""
SOUGHT = 0.2
"""What it counts to find the place of the answer in a right candidate, against choosing the candidate."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A question with its first candidates.

    Attributes:
        features: (candidates, features) and `linear` (candidates,), as for `Reranker`.
        right: (candidates,) which are right, of which there is at least one.
        keys: (candidates, length) where the answer's keys stand in the right ones; all False where that is not known.
    """

    reading: Reading
    features: Floats
    linear: Floats
    right: NDArray[np.bool_]
    keys: NDArray[np.bool_]


class Network(nn.Module):
    """The network of `Reranker`, in torch, for training.

    Args:
        vectors: (characters, LETTERS), which stay as they are.
        features: how many a candidate has.
    """

    def __init__(self, vectors: Floats, features: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.from_numpy(vectors), persistent=False)
        self.asked = nn.Conv1d(LETTERS, HIDDEN, 3, padding=1)
        self.question = nn.Linear(2 * HIDDEN + KINDS, HIDDEN)
        self.film = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.letter = nn.Linear(LETTERS, LETTER)
        sizes = [LETTER + CHANNELS, *([HIDDEN] * (len(LAYERS) - 1))]
        self.layers = nn.ModuleList(
            nn.Conv1d(size, HIDDEN, width, padding=width // 2 * dilation, dilation=dilation)
            for size, (width, dilation) in zip(sizes, LAYERS, strict=True)
        )
        self.here, self.sought = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, HIDDEN)
        self.joined, self.score = nn.Linear(2 * HIDDEN + features + 1, HIDDEN), nn.Linear(HIDDEN, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(DROPOUT)
        # At first it orders as the linear ranker does.
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(
        self,
        asked: Tensor,
        kinds: Tensor,
        letters: Tensor,
        lengths: Tensor,
        known: Tensor,
        features: Tensor,
        linear: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Scores (questions, candidates), and of each character how well it is the answer's, (questions, candidates,
        length). The arguments are a `Sample`'s, with a dimension of questions before the others."""
        questions, candidates, length = letters.shape
        vectors: Tensor = self.vectors  # type: ignore[assignment]
        there = (asked > 0)[:, None]
        own = self.asked(vectors[asked].transpose(1, 2)).relu() * there
        mean = own.sum(2) / there.sum(2).clamp(min=1)
        question = self.question(self.drop(torch.cat([own.amax(2), mean, kinds], 1))).relu()
        scale, shift = self.film(question)[:, None, :, None].chunk(2, 2)
        inside = torch.arange(length) < lengths.flatten()[:, None]
        ends = inside[:, None].float()
        x = torch.cat([self.letter(vectors[letters]), known], -1).flatten(0, 1).transpose(1, 2) * ends
        x = self.layers[0](self.drop(x)).view(questions, candidates, HIDDEN, length)
        x = (x * (1 + scale) + shift).relu().flatten(0, 1) * ends
        for layer in self.layers[1:]:
            x = (x + layer(self.drop(x))).relu() * ends
        towards = self.sought(question).repeat_interleave(candidates, 0)[:, None]
        here = (self.here(x.transpose(1, 2))[..., 0] + (towards @ x)[:, 0] / 8).masked_fill(~inside, -1e4)
        pooled = torch.cat([(x * here.softmax(1)[:, None]).sum(2), x.amax(2)], 1)
        pooled = pooled.view(questions, candidates, -1)
        joined = self.joined(self.drop(torch.cat([pooled, features, linear[..., None]], -1))).relu()
        scores = self.score(joined)[..., 0] + self.scale * linear
        return scores, here.view(questions, candidates, length)


def collate(samples: Sequence[Sample]) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """What `Network` takes of some samples; which candidates there are, which are right, and where their keys stand."""
    count = max(len(sample.right) for sample in samples)
    length = max(sample.reading.letters.shape[1] for sample in samples)
    longest = max(1, *(len(sample.reading.asked) for sample in samples))

    def padded(values: Sequence[NDArray[np.generic]], *shape: int) -> Tensor:
        kind = values[0].dtype
        made = np.zeros((len(values), *shape), dtype=np.float32 if kind == np.float16 else kind)
        for row, value in zip(made, values, strict=True):
            row[tuple(slice(0, size) for size in value.shape)] = value
        return torch.from_numpy(made)

    readings = [sample.reading for sample in samples]
    inputs = (
        padded([r.asked for r in readings], longest),
        padded([r.kinds for r in readings], KINDS),
        padded([r.letters for r in readings], count, length),
        padded([r.lengths for r in readings], count),
        padded([r.known for r in readings], count, length, CHANNELS),
        padded([s.features for s in samples], count, samples[0].features.shape[1]),
        padded([s.linear for s in samples], count),
    )
    there = torch.arange(count) < torch.tensor([len(sample.right) for sample in samples])[:, None]
    keys = padded([s.keys for s in samples], count, length)
    return inputs, there, padded([s.right for s in samples], count), keys


def train_network(
    samples: Sequence[Sample],
    characters: Characters,
    *,
    seed: int,
    epochs: int,
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Floats]:
    """The weights of a network: trained for so many epochs, or for `seconds` by the clock if these are over sooner.

    Args:
        progress: is told the share of the time that is gone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _train(samples, characters, np.random.default_rng(seed), epochs, seconds, progress)


def _train(
    samples: Sequence[Sample],
    characters: Characters,
    generator: np.random.Generator,
    epochs: int,
    seconds: float,
    progress: Callable[[float], None],
) -> dict[str, Floats]:
    network = Network(characters.vectors, samples[0].features.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    begun, steps = time.monotonic(), 0
    a_pass = max(1, len(samples) // QUESTIONS)
    order: list[int] = []
    while True:
        share = max((time.monotonic() - begun) / max(seconds, 1e-6), steps / (epochs * a_pass))
        progress(min(share, 1.0))
        if share >= 1:
            break
        if len(order) < min(QUESTIONS, len(samples)):
            order = generator.permutation(len(samples)).tolist()
        some = [samples[order.pop()] for _ in range(min(QUESTIONS, len(order)))]
        inputs, there, right, keys = collate(some)
        scores, here = network(*inputs)
        loss = share_of_right(scores.masked_fill(~there, -torch.inf), right).mean()
        marked = keys.flatten(1).any(1)
        if marked.any():
            loss = loss + SOUGHT * share_of_right(here[marked].flatten(1), keys[marked].flatten(1)).mean()
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (steps + 1) / WARM) * max(0.02, 1 - share)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}
