"""The reranker: a small convolutional network that reads a question beside each of the first candidates, character by
character, and orders them anew. An interaction-focused ranker (as PACRR, Hui et al. 2017, and Conv-KNRM, Dai et al.
2018), whose texts are rows of characters: what a character is like, whether the question has it too, and where.

What is here orders candidates, in numpy, so that a question needs no torch; reranker_training.py learns the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from miniglm.files import write_whole
from miniglm.lookup.fault import damaged
from miniglm.lookup.features import FactParts, PassageParts, Query
from miniglm.lookup.text import Plain, neighbours, places_in

Floats = NDArray[np.float32]
LETTERS = 64
"""Dimensions of a character's vector."""
WINDOW = (-2, -1, 1, 2)
"""Where the characters stand that tell what a character is like."""
NEIGHBOURS = 1000
"""The most frequent characters, which are counted beside others."""
RARE = 2
"""Times that a character must come to have a vector."""
QUESTION, LONGEST = 48, 192
"""Characters of a question, and of a candidate, that are read."""
PARTS = 3
"""Of a fact: its phrasings, its answer, its evidence. A passage has but one."""
MATCHES = 5
"""What is known of a character of a candidate: whether the question has it, what it weighs then, whether the question
has the pair that it begins, the one that it ends, what the first weighs."""
CHANNELS = MATCHES + PARTS
"""The same and which part it is of."""
LAYERS = ((3, 1), (5, 2), (5, 4), (5, 12))
"""Width and dilation of each convolution over a candidate."""
READ_FACTS, READ_PASSAGES = 8, 12
"""How many of either are read: the best by the linear ranker."""


class Characters:
    """Vectors of characters by what stands beside them: names are like names, numbers like numbers.

    Args:
        names: characters by their code, rising; the first has number 1, 0 is kept for all others.
        vectors: (characters, LETTERS), that of number 0 first, all zero.
    """

    def __init__(self, names: Plain, vectors: Floats) -> None:
        self.names, self.vectors = names, vectors
        self._numbers = np.zeros(1 << 16, dtype=np.int64)
        self._numbers[names] = np.arange(1, len(names) + 1)

    def numbers(self, text: Plain) -> NDArray[np.int64]:
        """The number of each character."""
        found: NDArray[np.int64] = self._numbers[text]
        return found

    @classmethod
    def build(cls, texts: Iterable[Plain], seed: int) -> Characters:
        """From texts: positive pointwise mutual information with the characters beside them, smoothed by the power 0.75,
        and of that the strongest directions, each by the root of its strength (Levy, Goldberg and Dagan 2015), found by
        random projection (Halko, Martinsson and Tropp 2011)."""
        # Nothing stands between two texts, as far as the window reaches.
        gap = np.zeros(max(WINDOW), dtype=np.uint16)
        text = np.concatenate([gap, *(part for own in texts for part in (own, gap))])
        counts = np.bincount(text, minlength=1 << 16)
        counts[0] = 0
        names = np.flatnonzero(counts >= RARE).astype(np.uint16)
        if not len(names):
            return cls(names, np.zeros((1, LETTERS), dtype=np.float32))
        found = cls(names, np.zeros((len(names) + 1, LETTERS), dtype=np.float32))
        often = names[np.argsort(-counts[names], kind="stable")[:NEIGHBOURS]]
        column = np.full(1 << 16, -1, dtype=np.int64)
        column[often] = np.arange(len(often))
        rows = found.numbers(text)
        together = np.zeros((len(names) + 1, len(WINDOW) * len(often)), dtype=np.float32)
        for place, step in enumerate(WINDOW):
            own = rows[max(0, -step) : len(text) - max(0, step)]
            beside = column[text[max(0, step) : len(text) + min(0, step)]]
            both = (own > 0) & (beside >= 0)
            keys, times = np.unique(own[both] * len(often) + beside[both], return_counts=True)
            together[keys // len(often), place * len(often) + keys % len(often)] = times
        together /= max(float(together.sum()), 1.0)
        own_share, context = together.sum(axis=1, keepdims=True), together.sum(axis=0) ** 0.75
        with np.errstate(divide="ignore", invalid="ignore"):
            together /= own_share
            together /= context / context.sum()
            np.log(together, out=together)
        np.maximum(np.nan_to_num(together, copy=False, nan=0, posinf=0, neginf=0), 0, out=together)
        left, strength = _strongest(together, LETTERS, seed)
        vectors = left * np.sqrt(strength)
        vectors *= np.sqrt(8) / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6)
        vectors[0] = 0
        return cls(names, vectors.astype(np.float32))


def _strongest(matrix: Floats, count: int, seed: int) -> tuple[Floats, Floats]:
    """Left singular vectors and values of the `count` largest, zeros where there are fewer."""
    generator = np.random.default_rng(seed)
    size = min(count + 8, *matrix.shape)
    basis = matrix @ generator.standard_normal((matrix.shape[1], size), dtype=np.float32)
    for _ in range(4):
        basis = np.linalg.qr(matrix @ (matrix.T @ np.linalg.qr(basis)[0]))[0]
    left, strength, _ = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    size = min(count, size)
    found, values = np.zeros((len(matrix), count), dtype=np.float32), np.zeros(count, dtype=np.float32)
    found[:, :size], values[:size] = (basis @ left)[:, :size], strength[:size]
    return found, values


@dataclass(frozen=True, slots=True)
class Text:
    """A candidate to read: its characters, 0 between its pieces, and which part each is of."""

    plain: Plain
    parts: NDArray[np.uint8]


def text_of_fact(fact: FactParts) -> Text:
    """A fact's phrasings, its answer and its evidence."""
    gap = np.zeros(1, dtype=np.uint16)
    pieces = [*((0, asked) for asked in fact.asked), (1, fact.answer), (2, fact.evidence)]
    plain = np.concatenate([piece for _, own in pieces for piece in (own, gap)])
    parts = np.repeat(np.array([part for part, _ in pieces], dtype=np.uint8), [len(own) + 1 for _, own in pieces])
    return Text(plain[:LONGEST], parts[:LONGEST])


def text_of_passage(passage: PassageParts) -> Text:
    """A passage."""
    own = passage.own[:LONGEST]
    return Text(own, np.zeros(len(own), dtype=np.uint8))


@dataclass(frozen=True, slots=True)
class Reading:
    """A question beside its candidates.

    Attributes:
        asked: (characters,) numbers of the question's characters; `kinds`: what it asks for, as `text.kinds`.
        letters: (candidates, length) numbers of each candidate's characters, 0 after its end; `lengths`: (candidates,).
        known: (candidates, length, CHANNELS).
    """

    asked: NDArray[np.int64]
    kinds: Floats
    letters: NDArray[np.int64]
    lengths: NDArray[np.int64]
    known: Floats


def read(query: Query, texts: Sequence[Text], characters: Characters) -> Reading:
    """Lays a question beside its candidates, of which there is at least one."""
    lengths = np.array([len(text.plain) for text in texts], dtype=np.int64)
    longest = max(int(lengths.max()), 1)
    plain = np.zeros((len(texts), longest), dtype=np.uint16)
    known = np.zeros((len(texts), longest, CHANNELS), dtype=np.float32)
    for number, text in enumerate(texts):
        plain[number, : len(text.plain)] = text.plain
        known[number, np.arange(len(text.parts)), MATCHES + text.parts] = 1
    weights = query.weights[: len(query.distinct)] / query.encoder.vocabulary.rarest
    single = query.distinct < 1 << 16
    letter = np.zeros(1 << 16, dtype=np.float32)
    letter[query.distinct[single]] = weights[single]
    has = np.zeros(1 << 16, dtype=bool)
    has[query.distinct[single]] = True
    known[..., 0], known[..., 1] = has[plain], letter[plain]
    # One row after another; a pair with a zero in it is none of the question's.
    flat = np.append(plain.ravel(), np.uint16(0))
    pairs, place = places_in(query.distinct[~single], neighbours(flat))
    begins = pairs.reshape(plain.shape)
    begins[:, -1] = False
    known[..., 2] = begins
    known[:, 1:, 3] = begins[:, :-1]
    if pairs.any():
        known[..., 4] = (weights[~single][place] * pairs).reshape(plain.shape)
    asked = characters.numbers(query.plain[:QUESTION])
    return Reading(asked, query.kinds, characters.numbers(plain), lengths, known)


class Reranker:
    """One network, or several of different seeds whose scores and shares are averaged.

    Args:
        characters: vectors of characters.
        networks: of each the weights, by the names of reranker_training.Network's parameters.
    """

    def __init__(self, characters: Characters, networks: Sequence[dict[str, Floats]]) -> None:
        self.characters, self.networks = characters, list(networks)

    def __call__(self, reading: Reading, features: Floats, linear: Floats) -> tuple[Floats, Floats]:
        """Scores of the candidates that are read, (candidates,), and where in each its answer would be: the share of
        each of its characters, (candidates, length).

        Args:
            features: (candidates, features) of them, standardized; `linear`: (candidates,) their scores by the linear
                ranker, which these correct.
        """
        made = [_forward(weights, self.characters.vectors, reading, features, linear) for weights in self.networks]
        scores = np.stack([own for own, _ in made]).mean(axis=0)
        shares = np.stack([own for _, own in made]).mean(axis=0)
        return scores, shares

    def tensors(self) -> dict[str, Floats]:
        """All weights, by the number of their network and their names."""
        every = enumerate(self.networks)
        return {f"{number}.{name}": weight for number, weights in every for name, weight in weights.items()}

    @classmethod
    def of(cls, characters: Characters, tensors: dict[str, Floats]) -> Reranker:
        """What `tensors` gave.

        Raises:
            ValueError: it is something else.
        """
        networks: dict[str, dict[str, Floats]] = {}
        for name, weight in tensors.items():
            number, _, own = name.partition(".")
            networks.setdefault(number, {})[own] = weight
        if not networks or not all("score.weight" in weights for weights in networks.values()):
            raise ValueError("缺少权重")
        return cls(characters, [networks[number] for number in sorted(networks)])


def _forward(
    w: dict[str, Floats], vectors: Floats, reading: Reading, features: Floats, linear: Floats
) -> tuple[Floats, Floats]:
    """What a network with the weights `w` says: see `Reranker`."""

    def dense(name: str, x: Floats) -> Floats:
        made: Floats = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        return made

    asked = np.maximum(_convolved(vectors[reading.asked][None], w, "asked", 1)[0], 0)
    there = reading.asked > 0
    asked[~there] = 0
    most = asked.max(axis=0, initial=0.0)
    whole = np.concatenate([most, asked.sum(axis=0) / max(int(there.sum()), 1), reading.kinds])
    question = np.maximum(dense("question", whole), 0)
    scale, shift = np.split(dense("film", question), 2)
    # Nothing stands beyond a text's end, at any layer: how long its neighbours are must not matter.
    inside = np.arange(reading.letters.shape[1]) < reading.lengths[:, None]
    ends = inside[..., None].astype(np.float32)
    x = np.concatenate([dense("letter", vectors[reading.letters]), reading.known], axis=-1) * ends
    x = np.maximum(_convolved(x, w, "layers.0", LAYERS[0][1]) * (1 + scale) + shift, 0) * ends
    for number, (_, dilation) in enumerate(LAYERS[1:], 1):
        x = np.maximum(x + _convolved(x, w, f"layers.{number}", dilation), 0) * ends
    here = dense("here", x)[..., 0] + x @ dense("sought", question) / 8
    here = np.where(inside, here, -1e4)
    shares = np.exp(here - here.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    pooled = np.concatenate([(x * shares[..., None]).sum(axis=1), x.max(axis=1)], axis=1)
    joined = np.concatenate([pooled, features, linear[:, None]], axis=1)
    scores: Floats = dense("score", np.maximum(dense("joined", joined), 0))[:, 0] + w["scale"] * linear
    return scores.astype(np.float32), shares


def _convolved(x: Floats, weights: dict[str, Floats], name: str, dilation: int) -> Floats:
    """(texts, length, channels) by a layer of that name, of as many places as before, zeros beyond the ends."""
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]  # kernel: (to, from, width)
    texts, length, channels = x.shape
    reach = kernel.shape[2] // 2 * dilation
    wide = np.zeros((texts, length + 2 * reach, channels), dtype=np.float32)
    wide[:, reach : reach + length] = x
    made = np.broadcast_to(bias, (texts, length, len(bias))).astype(np.float32)
    for tap in range(kernel.shape[2]):
        made += wide[:, tap * dilation : tap * dilation + length] @ kernel[:, :, tap].T
    return made


@dataclass(frozen=True, slots=True)
class Rerankers:
    """Those of facts and of passages, with one set of characters."""

    facts: Reranker
    passages: Reranker

    def save(self, folder: Path) -> None:
        """Writes both and the characters."""
        folder.mkdir(parents=True, exist_ok=True)
        characters = self.facts.characters
        held: dict[str, NDArray[Any]] = {"names": characters.names.astype(np.int64), "vectors": characters.vectors}
        write_whole(folder / "characters.safetensors", save(held))
        write_whole(folder / "facts.safetensors", save(self.facts.tensors()))
        write_whole(folder / "passages.safetensors", save(self.passages.tensors()))

    @classmethod
    def load(cls, folder: Path) -> Rerankers:
        """Reads what `save` wrote.

        Raises:
            MiniGLMError: a file is missing or damaged.
        """
        try:
            held, facts, passages = (
                load_file(folder / f"{name}.safetensors") for name in ("characters", "facts", "passages")
            )
            characters = Characters(held["names"].astype(np.uint16), held["vectors"])
            return cls(Reranker.of(characters, facts), Reranker.of(characters, passages))
        except (OSError, ValueError, KeyError, IndexError, SafetensorError) as error:
            raise damaged(f"检索的重排读不出来（{error}）", folder) from None
