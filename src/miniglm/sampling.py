"""What is asked of the engine and what it says: settings, tokens, ends. Loads nothing, so that who only passes them on
does not either."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


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
            # further out, float32 logits overflow
            (
                "repetition_penalty",
                self.repetition_penalty,
                1e-6 <= self.repetition_penalty <= 1e6,
                "应在 1e-6 与 1e6 之间",
            ),
        )
        for name, value, fits, expected in checks:
            if not fits:
                raise ValueError(f"{name} 是 {value}，{expected}")


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished continuation. `finish_reason` is "stop" at a stop token, "length" at the limit."""

    ids: list[int]
    finish_reason: str


class Token(NamedTuple):
    """A token that was taken. Its log-probability (natural, of the model's own distribution, before temperature and
    the other settings) and the most probable ones with theirs are there only where they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):
    """What a step did to a sequence: a new token, its end, or both. `finish_reason` as in `Generation`."""

    key: int
    token: Token | None
    finish_reason: str | None
