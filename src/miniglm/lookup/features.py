"""What speaks for a candidate: similarities of a question and a fact, or a passage, as numbers for the ranker.

Scores that depend on a question's length are divided by the best that any candidate has, or stand beside their
distance from it, so that one set of weights serves all questions and all books.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniglm.lookup.encoder import UNKNOWN, Bag, Encoder
from miniglm.lookup.facts import FIELDS, Memory, context_of
from miniglm.lookup.library import Library, Passage
from miniglm.lookup.text import (
    NUMBER,
    PERSON,
    REASON,
    SPEECH,
    Grams,
    distinct,
    grams,
    has_numeral,
    kinds,
    pairs,
    places_in,
    plain,
    triples,
)

Floats = NDArray[np.float32]
FACTS = 20
"""Facts that the ranker chooses among."""
PASSAGES = 40
"""Passages that it chooses among, and how many each of BM25 and vectors brings."""
KEPT = 10_000
"""Facts, and passages, of which what does not depend on the question is kept: some 10 KB each."""
FACT_FEATURES = (
    "bm25_told", "bm25_wide",
    "cos_question", "cos_answer", "cos_together", "cos_context",
    "gap_question", "gap_answer", "gap_together", "gap_context",
    "cover_told", "cover_context", "cover_either", "cover_answer",
    "soft_told",
    "dice_question", "answer_in_question",
    "kind_shared", "kind_nearness", "number", "person", "person_missing", "reason",
)  # fmt: skip
PASSAGE_FEATURES = (
    "bm25", "cos", "cos_context", "gap", "gap_context",
    "cover", "cover_context", "cover_pairs", "cover_pairs_context", "triples", "triples_context",
    "soft",
    "number", "speech",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidates:
    """Numbers of facts or passages and their features, (candidates, features), in the order of the first choice."""

    numbers: NDArray[np.int64]
    features: NDArray[np.float32]


class Query:
    """A question with what is computed from it once."""

    def __init__(self, text: str, encoder: Encoder) -> None:
        self.text, self.encoder = text, encoder
        vocabulary = encoder.vocabulary
        self.plain = plain(text)
        self.grams = grams(self.plain)
        self.distinct = distinct(self.grams)
        self.pairs = pairs(self.distinct)
        self.triples = distinct(triples(self.plain))
        self.kinds = kinds(text)
        bag = vocabulary.bag(self.plain)
        self.vector = encoder.bag(bag)
        self.weights = _weights(self.distinct, encoder)
        own = distinct(bag)
        strength = encoder.lengths[own, 0]
        self.directions = encoder.vectors[own] / np.maximum(strength, 1e-6)[:, None]
        self.strength = strength / max(float(strength.sum()), 1e-6)

    def held(self, texts: Sequence[Grams]) -> NDArray[np.bool_]:
        """(texts, distinct n-grams) whether each text holds each of the question's n-grams."""
        return holds(self.distinct, texts)

    def share(self, texts: Sequence[Grams]) -> Floats:
        """(texts,) share of each text's n-grams that the question has."""
        sizes = [len(text) for text in texts]
        known, _ = places_in(self.distinct, np.concatenate(texts))
        held = np.bincount(np.repeat(np.arange(len(texts)), sizes), weights=known, minlength=len(texts))
        return (held / np.maximum(sizes, 1)).astype(np.float32)

    def cover(self, held: NDArray[np.bool_], among: NDArray[np.bool_] | None = None) -> Floats:
        """(texts,) share of the n-grams' weight that is held."""
        weights = self.weights if among is None else self.weights * among
        found: Floats = held.astype(np.float32) @ weights / max(float(weights.sum()), 1e-6)
        return found

    def unknown(self) -> float:
        """Share of the pairs that the encoder has never seen twice: high where a question is about something else."""
        known = self.encoder.vocabulary.numbers(self.distinct[self.pairs]) != UNKNOWN
        return 1.0 - float(known.mean()) if len(known) else 1.0

    def soft(self, bags: Sequence[Bag]) -> Floats:
        """(bags,) of each of the question's n-grams the best cosine with one of the bag's, weighted by its vector's
        length."""
        every = np.concatenate(bags)
        wanted = np.zeros(len(self.encoder.lengths), dtype=bool)
        wanted[every] = True
        rows = np.flatnonzero(wanted)
        places = (np.cumsum(wanted) - 1)[every]
        vectors, lengths = self.encoder.vectors[rows], self.encoder.lengths[rows]
        near = (vectors @ self.directions.T / np.maximum(lengths, 1e-6))[places]
        best: Floats = np.maximum.reduceat(near, _starts(bags), axis=0) @ self.strength
        return best

    def dice(self, others: Sequence[Grams], weights: Floats) -> Floats:
        """(texts,) weighted Dice coefficient of the n-grams of both; `weights`: of all of each of the others."""
        both = 2 * (self.held(others).astype(np.float32) @ self.weights)
        dice: Floats = both / np.maximum(weights + self.weights.sum(), 1e-6)
        return dice


def _weights(found: Grams, encoder: Encoder) -> Floats:
    """Inverse document frequency of each n-gram; an unknown one is as rare as the rarest."""
    vocabulary = encoder.vocabulary
    numbers = vocabulary.numbers(found)
    weights: Floats = np.where(numbers == UNKNOWN, vocabulary.rarest, vocabulary.idf[numbers])
    return weights


def _starts(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Where each part begins in all of them one after another."""
    return np.cumsum([0, *(len(part) for part in parts[:-1])])


def holds(wanted: NDArray[Any], texts: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """(texts, wanted) whether each text has each of the wanted numbers, which rise."""
    table = np.zeros((len(texts), len(wanted)), dtype=bool)
    known, places = places_in(wanted, np.concatenate(texts))
    table[np.repeat(np.arange(len(texts)), [len(text) for text in texts])[known], places[known]] = True
    return table


def _relative(scores: Floats) -> Floats:
    return scores / max(float(scores.max()), 1e-6)


@dataclass(frozen=True, slots=True)
class FactParts:
    """What of a fact does not depend on the question. N-grams are distinct ones.

    Attributes:
        told, bag: of all phrasings and the answer; `context`: of what surrounds the fact in the book.
        answer: of the answer; `answer_all`: with repetitions.
        asked, asked_weights: of each phrasing, and what they weigh together; `kinds`: (phrasings, kinds).
    """

    told: Grams
    bag: Bag
    context: Grams
    answer: Grams
    answer_all: Grams
    asked: tuple[Grams, ...]
    asked_weights: Floats
    kinds: Floats
    numeral: bool


@dataclass(frozen=True, slots=True)
class PassageParts:
    """What of a passage does not depend on the question; `context` is with its neighbours."""

    passage: Passage
    own: Grams
    context: Grams
    triples: NDArray[np.uint64]
    context_triples: NDArray[np.uint64]
    bag: Bag
    context_vector: Floats
    numeral: bool
    speech: bool


class Sources:
    """Both memories with the encoder, and what is computed from them once for many questions."""

    def __init__(self, encoder: Encoder, memory: Memory, library: Library) -> None:
        self.encoder, self.memory, self.library = encoder, memory, library
        self.fact = functools.lru_cache(KEPT)(self._fact)
        self._passages: dict[int, PassageParts] = {}

    def _fact(self, number: int) -> FactParts:
        fact = self.memory.facts[number]
        told, answer = plain(fact.together), grams(plain(fact.answer))
        asked = tuple(distinct(grams(plain(q))) for q in fact.questions)
        return FactParts(
            told=distinct(grams(told)),
            bag=distinct(self.encoder.vocabulary.bag(told)),
            context=distinct(grams(context_of(fact, self.library))),
            answer=distinct(answer),
            answer_all=answer,
            asked=asked,
            asked_weights=np.array([_weights(found, self.encoder).sum() for found in asked], dtype=np.float32),
            kinds=np.stack([kinds(q) for q in fact.questions]),
            numeral=has_numeral(fact.answer),
        )

    def passages(self, numbers: Sequence[int]) -> list[PassageParts]:
        """What of some passages does not depend on the question."""
        new = sorted(n for n in numbers if n not in self._passages)
        if new:
            if len(self._passages) > KEPT:
                self._passages = {n: self._passages[n] for n in numbers if n in self._passages}
            library, encoder = self.library, self.encoder
            own, around = library.plains(np.array(new)), [library.context(n) for n in new]
            own_grams = [grams(text) for text in own]
            ends = np.cumsum([len(text) for text in around])
            vectors = encoder.parts(np.concatenate(around), ends - [len(text) for text in around], ends)
            for n, text, near, found, bag, vector in zip(
                new, own, around, own_grams, encoder.vocabulary.bags(own_grams), vectors, strict=True
            ):
                passage = library.passage(n)
                speech = "曰" in passage.text or "道：" in passage.text
                runs, near_runs = triples(text), triples(near)
                self._passages[n] = PassageParts(
                    passage, found, grams(near), runs, near_runs, bag, vector, has_numeral(passage.text), speech
                )
        return [self._passages[n] for n in numbers]


def fact_candidates(query: Query, sources: Sources) -> Candidates:
    """The first choice among the facts and its features."""
    memory = sources.memory
    if not len(memory):
        return Candidates(np.zeros(0, dtype=np.int64), np.zeros((0, len(FACT_FEATURES)), dtype=np.float32))
    told, wide = (_relative(index.scores(query.grams)) for index in (memory.told, memory.wide))
    cosines = {name: np.asarray(memory.vectors[name] @ query.vector) for name in FIELDS}
    phrased = np.full(len(memory), -1.0, dtype=np.float32)
    np.maximum.at(phrased, memory.owners, cosines["questions"])
    cosines["questions"] = phrased
    first = (phrased + cosines["answers"]) / 2 + cosines["together"] + told + 0.3 * cosines["contexts"] + 0.5 * wide
    chosen = np.argsort(-first, kind="stable")[:FACTS]
    tops = {name: float(values.max()) for name, values in cosines.items()}
    facts = [sources.fact(n) for n in chosen.tolist()]
    in_told = query.held([fact.told for fact in facts])
    in_context = query.held([fact.context for fact in facts])
    phrasings = _starts([fact.asked_weights for fact in facts])
    dice = query.dice([a for fact in facts for a in fact.asked], np.concatenate([f.asked_weights for f in facts]))
    # Of the answer's n-grams, with repetitions, the share that the question has said already.
    repeated = query.share([fact.answer_all for fact in facts])
    person = np.array([fact.kinds[:, PERSON].max() for fact in facts])
    reason = np.array([fact.kinds[:, REASON].max() for fact in facts])
    number = np.array([fact.numeral for fact in facts])
    columns = [
        told[chosen], wide[chosen],
        *(cosines[name][chosen] for name in FIELDS), *(cosines[name][chosen] - tops[name] for name in FIELDS),
        query.cover(in_told), query.cover(in_context), query.cover(in_told | in_context),
        query.cover(query.held([fact.answer for fact in facts])), query.soft([fact.bag for fact in facts]),
        np.maximum.reduceat(dice, phrasings), repeated,
        [(fact.kinds @ query.kinds).max() / max(1.0, float(query.kinds.sum())) for fact in facts],
        [-np.abs(fact.kinds - query.kinds).sum(axis=1).min() for fact in facts],
        query.kinds[NUMBER] * number,
        query.kinds[PERSON] * person, query.kinds[PERSON] * (person - 1),
        query.kinds[REASON] * reason,
    ]  # fmt: skip
    return Candidates(chosen, np.stack(columns, axis=1).astype(np.float32))


def passage_candidates(query: Query, sources: Sources) -> tuple[Candidates, list[Passage]]:
    """The first choice among the passages, its features, and the passages themselves."""
    library = sources.library
    found = library.search(query.grams, query.vector, PASSAGES) if library.size else []
    if not found:
        return Candidates(np.zeros(0, dtype=np.int64), np.zeros((0, len(PASSAGE_FEATURES)), dtype=np.float32)), []
    most = max(max(score for _, score, _ in found), 1e-6)
    # One that vectors did not bring is at most as near as the last that they did.
    floor = np.nanmin([cos for *_, cos in found])
    found = [(n, score / most, floor if np.isnan(cos) else cos) for n, score, cos in found]
    found.sort(key=lambda hit: -(hit[1] + hit[2]))
    found = found[:PASSAGES]
    numbers = [n for n, *_ in found]
    parts = sources.passages(numbers)
    contexts = np.stack([p.context_vector for p in parts]) @ query.vector
    held, near = query.held([p.own for p in parts]), query.held([p.context for p in parts])
    runs = max(1, len(query.triples))
    cosine = np.array([cos for *_, cos in found])
    columns = [
        [score for _, score, _ in found], cosine, contexts, cosine - cosine.max(), contexts - contexts.max(),
        query.cover(held), query.cover(near), query.cover(held, query.pairs), query.cover(near, query.pairs),
        holds(query.triples, [p.triples for p in parts]).sum(axis=1) / runs,
        holds(query.triples, [p.context_triples for p in parts]).sum(axis=1) / runs,
        query.soft([p.bag for p in parts]),
        query.kinds[NUMBER] * np.array([p.numeral for p in parts]),
        query.kinds[SPEECH] * np.array([p.speech for p in parts]),
    ]  # fmt: skip
    found_features = np.stack(columns, axis=1).astype(np.float32)
    return Candidates(np.array(numbers), found_features), [p.passage for p in parts]
