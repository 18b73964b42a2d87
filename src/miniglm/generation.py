"""The generation engine: key-value cache, many sequences of different length at once, sampling, streaming.

It knows token ids only: nothing of text, chat or questions. docs/generation.md explains the choices.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from miniglm.model import GLM, KVCache


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How one sequence is continued.

    Attributes:
        temperature: 0 takes the most probable token.
        top_k: choose among so many of the most probable only; 0 for all.
        top_p: choose among the most probable that together hold this probability (Holtzman et al. 2019, arXiv:1904.09751).
        repetition_penalty: logits of tokens that the sequence has are divided by it where positive, multiplied where
            negative (Keskar et al. 2019, arXiv:1909.05858).
        seed: of the sequence's own random numbers.
        stop_ids: tokens that end it; they are not part of the result.

    Raises:
        ValueError: a value out of range; the text names it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "应不小于 1"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "应为不小于 0 的数"),
            ("top_k", self.top_k, self.top_k >= 0, "应不小于 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "应大于 0、不大于 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "应为大于 0 的数"),
        )
        for name, value, fits, expected in checks:
            if not fits:
                raise ValueError(f"{name} 是 {value}，{expected}")


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished continuation. `finish_reason` is "stop" at a stop token, "length" at the limit."""

    ids: list[int]
    finish_reason: str


@dataclass(slots=True)
class _Sequence:
    """A sequence at work: what it holds (prompt and continuation, less what slid out of the window)."""

    index: int
    settings: SamplingSettings
    ids: list[int]
    made: int = 0
    rng: random.Random = field(default_factory=random.Random)
    seen: set[int] = field(default_factory=set)


class Engine:
    """Continues token sequences with a model.

    Args:
        prefix_length: tokens at the beginning that stay when the window slides.
    """

    def __init__(self, model: GLM, *, prefix_length: int = 2) -> None:
        self.model, self.prefix_length = model, prefix_length
        self.context = model.config.max_position_embeddings

    def _window(self, ids: list[int]) -> list[int]:
        """What the model reads of a sequence: all of it, or prefix and last half if it is longer than the context."""
        if len(ids) <= self.context:
            return ids
        half = max(1, self.context // 2)
        return ids[: min(self.prefix_length, self.context - half)] + ids[len(ids) - half :]

    def _prefill(self, cache: KVCache, rows: Sequence[int], sequences: Sequence[_Sequence]) -> Tensor:
        """Reads whole sequences into their rows of the cache; logits after the last token of each, (batch, V)."""
        device = self.model.device
        lengths = torch.tensor([len(s.ids) for s in sequences], device=device)
        longest = int(lengths.max())
        ids = torch.tensor([s.ids + [0] * (longest - len(s.ids)) for s in sequences], device=device)
        # What stands right of a shorter sequence is never seen: later tokens overwrite it before they look there.
        hidden = self.model(ids, cache=cache, rows=torch.tensor(rows, device=device))
        last = hidden[torch.arange(len(sequences), device=device), lengths - 1]
        return self.model.logits(last)

    @torch.inference_mode()
    def stream(
        self, prompts: Sequence[Sequence[int]], settings: SamplingSettings | Sequence[SamplingSettings]
    ) -> Iterator[list[tuple[int, int]]]:
        """Yields after each step the (prompt's index, new token) of every sequence that goes on.

        Raises:
            ValueError: an empty prompt.
        """
        each = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else list(settings)
        if any(not prompt for prompt in prompts):
            raise ValueError("an empty prompt")
        live = [
            _Sequence(i, s, self._window(list(p)), rng=random.Random(s.seed), seen=set(p))
            for i, (p, s) in enumerate(zip(prompts, each, strict=True))
        ]
        if not live:
            return
        device = self.model.device
        longest = max(len(s.ids) + s.settings.max_new_tokens for s in live)
        dtype = self.model.model.embed_tokens.weight.dtype
        cache = KVCache(self.model.config, len(live), min(longest, self.context), device, dtype)
        logits = self._prefill(cache, range(len(live)), live)
        while True:
            tokens = sample(logits, live)
            step: list[tuple[int, int]] = []
            kept: list[int] = []
            for row, (sequence, token) in enumerate(zip(live, tokens, strict=True)):
                if token in sequence.settings.stop_ids:
                    continue
                sequence.ids.append(token)
                sequence.seen.add(token)
                sequence.made += 1
                step.append((sequence.index, token))
                if sequence.made < sequence.settings.max_new_tokens:
                    kept.append(row)
            if step:
                yield step
            if not kept:
                return
            if len(kept) < len(live):
                live = [live[row] for row in kept]
                cache.keep(torch.tensor(kept, device=device))
            full = [row for row, s in enumerate(live) if len(s.ids) > self.context]
            positions = torch.tensor([[len(s.ids) - 1] for s in live], device=device)
            if full:
                for row in full:
                    live[row].ids = self._window(live[row].ids)
                refilled = self._prefill(cache, full, [live[row] for row in full])
                rest = [row for row in range(len(live)) if row not in set(full)]
                logits = torch.empty(len(live), refilled.shape[-1], device=device, dtype=refilled.dtype)
                logits[full] = refilled
                if rest:
                    index = torch.tensor(rest, device=device)
                    ids = torch.tensor([[live[row].ids[-1]] for row in rest], device=device)
                    hidden = self.model(ids, positions=positions[index], cache=cache, rows=index)
                    logits[index] = self.model.logits(hidden[:, -1])
                continue
            ids = torch.tensor([[s.ids[-1]] for s in live], device=device)
            logits = self.model.logits(self.model(ids, positions=positions, cache=cache)[:, -1])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        *,
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Continues all prompts, `batch_size` at a time, prompts of like length together. `progress` gets the number
        of finished prompts."""
        each = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else list(settings)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        results: dict[int, list[int]] = {i: [] for i in order}
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            for step in self.stream([prompts[i] for i in part], [each[i] for i in part]):
                for row, token in step:
                    results[part[row]].append(token)
            if progress:
                progress(min(start + batch_size, len(order)))
        return [
            Generation(results[i], "length" if len(results[i]) >= each[i].max_new_tokens else "stop")
            for i in range(len(prompts))
        ]


def sample(logits: Tensor, sequences: Sequence[_Sequence]) -> list[int]:
    """The next token of each sequence from its row of `logits`, (batch, V)."""
    logits = logits.float()
    if logits.device.type == "mps":
        logits = logits.cpu()  # Apple's GPU has no float64, which drawing needs
    for row, sequence in enumerate(sequences):
        penalty = sequence.settings.repetition_penalty
        if penalty != 1.0:
            seen = torch.tensor(sorted(sequence.seen), device=logits.device)
            values = logits[row, seen]
            logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [row for row, s in enumerate(sequences) if s.settings.temperature > 0]
    if drawn:
        settings = [sequences[row].settings for row in drawn]
        # float64: a row's result must not hang on how the sums of a batch are rounded
        temperature, top_p, uniform = (
            torch.tensor(values, device=logits.device, dtype=torch.float64)[:, None]
            for values in (
                [s.temperature for s in settings],
                [s.top_p for s in settings],
                [sequences[row].rng.random() for row in drawn],
            )
        )
        top_k = torch.tensor([s.top_k or logits.shape[-1] for s in settings], device=logits.device)
        ordered, order = logits[drawn].sort(dim=-1, descending=True, stable=True)
        # The peak goes off first, so that no temperature, however small, overflows.
        scaled = (ordered.double() - ordered[:, :1]) / temperature
        scaled[torch.arange(logits.shape[-1], device=logits.device) >= top_k[:, None]] = -torch.inf
        probabilities = scaled.softmax(dim=-1)
        # A token stays if those before it do not yet hold top_p: the first always stays.
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0.0
        cumulative = probabilities.cumsum(-1)
        places = (cumulative <= uniform * cumulative[:, -1:]).sum(-1)
        # Rounding may point past the last token that has any probability.
        places = places.minimum((probabilities > 0).sum(-1) - 1)
        for row, token in zip(drawn, order.gather(1, places[:, None]).squeeze(1).tolist(), strict=True):
            tokens[row] = token
    return tokens
