"""The generation engine: key-value cache, many sequences of different length at once, sampling, streaming.

It knows token ids only: nothing of text, chat or questions. docs/generation.md explains the choices.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from miniglm.decoding import CachedDecoder
from miniglm.model import GLM
from miniglm.packed import Packed, pack
from miniglm.sampling import Event, Generation, SamplingSettings, Token


@dataclass(slots=True)
class _Sequence:
    """A sequence at work: what it holds (prompt and continuation, less what slid out of the window)."""

    key: int
    settings: SamplingSettings
    ids: list[int]
    made: int = 0
    rng: random.Random = field(default_factory=random.Random)
    seen: set[int] = field(default_factory=set)
    logprobs: int | None = None


class ContinuousBatch:
    """Sequences that join and leave at every step, each with its own settings (Yu et al. 2022, Orca, OSDI '22).

    What is made of a sequence does not depend on the others, up to the rounding of matrix products of other shape.

    Args:
        model: must not change as long as this is used.
        slots: sequences at once.
        capacity: tokens that a sequence may hold; default and at most the model's context. Where one becomes longer,
            its window slides (docs/generation.md).
        prefix_length: tokens at the beginning that stay when the window slides.
        packed: what `pack` made of the model, where that is there already.
    """

    def __init__(
        self,
        model: GLM,
        slots: int,
        *,
        capacity: int | None = None,
        prefix_length: int = 2,
        packed: Packed | None = None,
    ) -> None:
        self.slots, self.prefix_length = slots, prefix_length
        self.context = model.config.max_position_embeddings
        self.decoder = CachedDecoder(model, slots, min(capacity or self.context, self.context), packed)
        self.live: list[_Sequence] = []  # in the order of the decoder's slots; read up to their last token
        self.joining: list[_Sequence] = []
        self._keys = 0

    @property
    def free(self) -> int:
        """How many sequences may still be added."""
        return self.slots - len(self.live) - len(self.joining)

    def add(self, prompt: Sequence[int], settings: SamplingSettings, *, logprobs: int | None = None) -> int:
        """Takes in a sequence; it makes its first token in the next step.

        Args:
            logprobs: each token of it comes with its log-probability and so many of the most probable ones.

        Returns:
            The key under which `step` reports on it.

        Raises:
            ValueError: an empty prompt, or no slot is free.
        """
        if not prompt:
            raise ValueError("an empty prompt")
        if self.free <= 0:
            raise ValueError(f"all {self.slots} slots are taken")
        self._keys += 1
        self.joining.append(
            _Sequence(
                key=self._keys,
                settings=settings,
                ids=self._window(list(prompt)),
                rng=random.Random(settings.seed),
                seen=set(prompt),
                logprobs=logprobs,
            )
        )
        return self._keys

    def remove(self, key: int) -> None:
        """Drops a sequence that nobody waits for any more; a key that has ended already is no error."""
        self.joining = [s for s in self.joining if s.key != key]
        for slot, sequence in enumerate(self.live):
            if sequence.key == key:
                self._free(slot)
                return

    def _free(self, slot: int) -> None:
        last = self.live.pop()
        if slot < len(self.live):  # the last one fills the hole
            self.decoder.move(len(self.live), slot, len(last.ids))
            self.live[slot] = last

    def _window(self, ids: list[int]) -> list[int]:
        """What the model reads of a sequence: all of it, or prefix and last half if it is longer than the context."""
        if len(ids) <= self.context:
            return ids
        half = max(1, self.context // 2)
        return ids[: min(self.prefix_length, self.context - half)] + ids[len(ids) - half :]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Makes one token of every sequence; what ended is gone from the batch afterwards."""
        live, joining = self.live, self.joining
        self.live, self.joining = [*live, *joining], []
        if not self.live:
            return []
        over = [slot for slot, s in enumerate(live) if len(s.ids) > self.context]
        for slot in over:  # its positions change, so all of it is read anew
            live[slot].ids = self._window(live[slot].ids)
        whole = [*over, *range(len(live), len(self.live))]
        scores = self.decoder.step(
            [s.ids[-1] for s in live],
            [len(s.ids) - 1 for s in live],
            [(slot, self.live[slot].ids) for slot in whole],
        )
        if over:  # what was read anew counts, not the row at the old position
            row_of = dict(zip(whole, range(len(live), len(scores)), strict=True))
            scores = scores[[row_of.get(slot, slot) for slot in range(len(self.live))]]
        raw = scores.clone() if any(s.logprobs is not None for s in self.live) else None
        events: list[Event] = []
        ended: list[int] = []
        for slot, (sequence, token) in enumerate(zip(self.live, sample(scores, self.live), strict=True)):
            if token in sequence.settings.stop_ids:
                events.append(Event(sequence.key, None, "stop"))
                ended.append(slot)
                continue
            sequence.ids.append(token)
            sequence.seen.add(token)
            sequence.made += 1
            taken = Token(token)
            if raw is not None and sequence.logprobs is not None:
                taken = _with_logprobs(token, raw[slot], sequence.logprobs)
            done = sequence.made >= sequence.settings.max_new_tokens
            events.append(Event(sequence.key, taken, "length" if done else None))
            if done:
                ended.append(slot)
        for slot in reversed(ended):
            self._free(slot)
        return events


def _with_logprobs(token: int, logits: Tensor, count: int) -> Token:
    """logits: (V,)."""
    logprobs = logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return Token(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


class Engine:
    """Continues token sequences with a model.

    Args:
        model: must not change as long as this is used.
        prefix_length: tokens at the beginning that stay when the window slides.
    """

    def __init__(self, model: GLM, *, prefix_length: int = 2) -> None:
        self.model, self.prefix_length = model, prefix_length
        self.context = model.config.max_position_embeddings
        self.packed = pack(model)  # once, not for each question of a chat

    def _run(
        self, prompts: Sequence[Sequence[int]], each: Sequence[SamplingSettings], order: Sequence[int], slots: int
    ) -> Iterator[list[tuple[int, Token | None, str | None]]]:
        """Keeps at most `slots` of the prompts running, taken in this order: (prompt's index, token, finish reason)."""
        if any(not prompt for prompt in prompts):
            raise ValueError("an empty prompt")
        if not prompts:
            return
        longest = max(len(p) + s.max_new_tokens for p, s in zip(prompts, each, strict=True))
        batch = ContinuousBatch(
            self.model,
            min(slots, len(prompts)),
            capacity=longest,
            prefix_length=self.prefix_length,
            packed=self.packed,
        )
        index: dict[int, int] = {}
        waiting = iter(order)
        while True:
            for i in islice(waiting, batch.free):
                index[batch.add(prompts[i], each[i])] = i
            events = batch.step()
            if not events:
                return
            yield [(index[key], token, reason) for key, token, reason in events]

    def stream(
        self, prompts: Sequence[Sequence[int]], settings: SamplingSettings | Sequence[SamplingSettings]
    ) -> Iterator[list[tuple[int, int]]]:
        """Yields after each step the (prompt's index, new token) of every sequence that goes on.

        Raises:
            ValueError: an empty prompt.
        """
        each = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else list(settings)
        for events in self._run(prompts, each, range(len(prompts)), len(prompts)):
            if step := [(i, token.id) for i, token, _ in events if token is not None]:
                yield step

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
        made: list[list[int]] = [[] for _ in prompts]
        reasons: dict[int, str] = {}
        for events in self._run(prompts, each, order, batch_size):
            before = len(reasons)
            for i, token, reason in events:
                if token is not None:
                    made[i].append(token.id)
                if reason is not None:
                    reasons[i] = reason
            if progress and len(reasons) > before:
                progress(len(reasons))
        return [Generation(ids, reasons[i]) for i, ids in enumerate(made)]


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
    tokens = _most_probable(logits)
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


def _most_probable(logits: Tensor) -> list[int]:
    """The place of the largest in each row. numpy's search takes a tenth of the time of torch's on a CPU."""
    tokens: list[int] = (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()
    return tokens
