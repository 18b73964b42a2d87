"""What speaks for a candidate: similarities of a question and a fact, or a passage, as numbers for the ranker.

Scores that depend on a question's length are divided by the best that any candidate has, or stand beside their
distance from it, so that one set of weights serves all questions and all books.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniglm.lookup.encoder import UNKNOWN, Bag, Encoder, known_of
from miniglm.lookup.facts import FIELDS, Memory, context_of
from miniglm.lookup.library import Library, Passage
from miniglm.lookup.text import (
    NUMBER,
    PERSON,
    REASON,
    SPEECH,
    Grams,
    Occurrences,
    Plain,
    distinct,
    grams,
    has_numeral,
    kinds,
    pairs,
    plain,
    plain_with_places,
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
    """A question with what is computed from it once.

    Attributes:
        distinct: its characters and pairs; `runs`: these and then its triples, all rising.
        weights: (runs,) what each weighs; a triple nothing.
    """

    def __init__(self, text: str, encoder: Encoder) -> None:
        self.text, self.encoder = text, encoder
        vocabulary = encoder.vocabulary
        self.plain = plain(text)
        self.grams = grams(self.plain)
        self.distinct = distinct(self.grams)
        self.runs = np.concatenate([self.distinct.astype(np.uint64), distinct(triples(self.plain))])
        self.kinds = kinds(text)
        bag = vocabulary.bag(self.plain)
        self.vector = encoder.bag(bag)
        self.weights = np.zeros(len(self.runs), dtype=np.float32)
        self.weights[: len(self.distinct)] = _weights(self.distinct, encoder)
        own = distinct(bag)
        strength = encoder.lengths[own, 0]
        self.directions = encoder.vectors[own] / np.maximum(strength, 1e-6)[:, None]
        self.strength = strength / max(float(strength.sum()), 1e-6)

    def occurrences(self, texts: Sequence[Plain]) -> Occurrences:
        """Where its characters, pairs and triples stand in some texts."""
        return Occurrences(self.runs, texts)

    def cover(self, times: NDArray[np.int64], among: NDArray[np.bool_] | None = None) -> Floats:
        """(texts,) share of the n-grams' weight that each text holds, if it has them `times`."""
        weights = self.weights if among is None else self.weights * among
        found: Floats = (times > 0) @ weights / max(float(weights.sum()), 1e-6)
        return found

    def repeated(self, times: NDArray[np.int64], texts: Sequence[Plain]) -> Floats:
        """(texts,) share of each text's n-grams, with repetitions, that are the question's."""
        sizes = np.array([len(text) for text in texts])
        found: Floats = times[:, : len(self.distinct)].sum(axis=1) / np.maximum(2 * sizes - 1, 1)
        return found

    def triples(self, times: NDArray[np.int64]) -> Floats:
        """(texts,) share of its triples that each text holds."""
        held = times[:, len(self.distinct) :] > 0
        found: Floats = held.sum(axis=1) / max(1, held.shape[1])
        return found

    def dice(self, times: NDArray[np.int64], weights: Floats) -> Floats:
        """(texts,) weighted Dice coefficient of the n-grams of both; `weights`: of all of each text's."""
        dice: Floats = 2 * ((times > 0) @ self.weights) / np.maximum(weights + self.weights.sum(), 1e-6)
        return dice

    def unknown(self) -> float:
        """Share of the pairs that the encoder has never seen twice: high where a question is about something else."""
        known = self.encoder.vocabulary.numbers(self.distinct[pairs(self.distinct)]) != UNKNOWN
        return 1.0 - float(known.mean()) if len(known) else 1.0

    def soft(self, bags: Sequence[Bag]) -> Floats:
        """(bags,) of each of the question's n-grams the best cosine with one of the bag's, weighted by its vector's
        length."""
        every = np.concatenate(bags)
        rows = distinct(every)
        places = np.empty(len(self.encoder.lengths), dtype=np.int64)
        places[rows] = np.arange(len(rows))
        lengths = np.maximum(self.encoder.lengths[rows, 0], 1e-6)
        near = self.directions @ self.encoder.vectors[rows].T / lengths
        best: Floats = self.strength @ np.maximum.reduceat(near.take(places[every], axis=1), _starts(bags), axis=1)
        return best


def _weights(found: Grams, encoder: Encoder) -> Floats:
    """Inverse document frequency of each n-gram; an unknown one is as rare as the rarest."""
    vocabulary = encoder.vocabulary
    numbers = vocabulary.numbers(found)
    weights: Floats = np.where(numbers == UNKNOWN, vocabulary.rarest, vocabulary.idf[numbers])
    return weights


def _together(texts: Sequence[Plain], encoder: Encoder) -> Floats:
    """(texts,) what the distinct n-grams of each weigh together."""
    found = [grams(text) for text in texts]
    owners = np.repeat(np.arange(len(texts), dtype=np.uint64), [len(own) for own in found])
    keys = distinct(owners << 32 | np.concatenate(found))
    weights = _weights(keys.astype(np.uint32), encoder)
    return np.bincount((keys >> 32).astype(np.int64), weights, minlength=len(texts)).astype(np.float32)


def _starts(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Where each part begins in all of them one after another."""
    return np.cumsum([0, *(len(part) for part in parts[:-1])])


def _relative(scores: Floats) -> Floats:
    return scores / max(float(scores.max()), 1e-6)


@dataclass(frozen=True, slots=True)
class FactParts:
    """What of a fact does not depend on the question.

    Attributes:
        told: all phrasings and the answer; `bag`: its distinct n-grams.
        context: what surrounds the fact in the book; `evidence`: what its set gives of it.
        asked: each phrasing; `weights`: what the distinct n-grams of each weigh together; `kinds`: (phrasings, kinds).
    """

    told: Plain
    bag: Bag
    context: Plain
    evidence: Plain
    answer: Plain
    asked: tuple[Plain, ...]
    weights: Floats
    kinds: Floats
    numeral: bool


@dataclass(frozen=True, slots=True)
class PassageParts:
    """What of a passage does not depend on the question.

    Attributes:
        context: its characters and those of its neighbours; `place`: where among them it begins and ends itself.
        bag: its own n-grams.
    """

    passage: Passage
    context: Plain
    place: tuple[int, int]
    context_vector: Floats
    bag: Bag
    numeral: bool
    speech: bool

    @property
    def own(self) -> Plain:
        """Its own characters."""
        return self.context[self.place[0] : self.place[1]]


class Sources:
    """Both memories with the encoder, and what is computed from them once for many questions."""

    def __init__(self, encoder: Encoder, memory: Memory, library: Library) -> None:
        self.encoder, self.memory, self.library = encoder, memory, library
        self.fact = functools.lru_cache(KEPT)(self._fact)
        self._passages: dict[int, PassageParts] = {}

    def _fact(self, number: int) -> FactParts:
        fact = self.memory.facts[number]
        # White space stands between them, of which nothing is left.
        ends = np.cumsum([len(text) + 1 for text in (*fact.questions, fact.answer)]) - 1
        told, places = plain_with_places(fact.together, np.append(0, ends))
        *asked, answer = (told[start:end] for start, end in itertools.pairwise(places.tolist()))
        return FactParts(
            told=told,
            bag=known_of(distinct(self.encoder.vocabulary.numbers(grams(told)))),
            context=context_of(fact, self.library),
            evidence=plain(fact.evidence),
            answer=answer,
            asked=tuple(asked),
            weights=_together(asked, self.encoder),
            kinds=np.stack([kinds(q) for q in fact.questions]),
            numeral=has_numeral(fact.answer),
        )

    def passages(self, numbers: Sequence[int]) -> list[PassageParts]:
        """What of some passages does not depend on the question."""
        new = sorted(n for n in numbers if n not in self._passages)
        if new:
            if len(self._passages) > KEPT:
                self._passages = {n: self._passages[n] for n in numbers if n in self._passages}
            contexts = [self.library.context(n) for n in new]
            text = np.concatenate([context for context, *_ in contexts])
            found = self.encoder.vocabulary.numbers(grams(text))
            ends = np.cumsum([len(context) for context, *_ in contexts])
            begins = ends - [len(context) for context, *_ in contexts]
            vectors = self.encoder.parts(found, begins, ends)
            for n, (context, *place), begin, vector in zip(new, contexts, begins.tolist(), vectors, strict=True):
                start, end = begin + place[0], begin + place[1]
                bag = known_of(np.concatenate([found[start:end], found[len(text) + start : len(text) + end - 1]]))
                passage = self.library.passage(n)
                speech = "曰" in passage.text or "道：" in passage.text
                self._passages[n] = PassageParts(
                    passage, context, (place[0], place[1]), vector, bag, has_numeral(passage.text), speech
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
    answers = [fact.answer for fact in facts]
    texts = [f.told for f in facts] + [f.context for f in facts] + answers + [text for f in facts for text in f.asked]
    cuts = np.cumsum([len(facts)] * 3)
    in_told, in_context, in_answer, in_asked = np.split(query.occurrences(texts).times(), cuts)
    # What follows is of all phrasings of all facts, and where those of each fact begin.
    phrasings = _starts([fact.weights for fact in facts])
    dice = query.dice(in_asked, np.concatenate([fact.weights for fact in facts]))
    kinds_asked = np.concatenate([fact.kinds for fact in facts])
    shared = np.maximum.reduceat(kinds_asked @ query.kinds, phrasings) / max(1.0, float(query.kinds.sum()))
    apart = np.minimum.reduceat(np.abs(kinds_asked - query.kinds).sum(axis=1), phrasings)
    person, reason = np.maximum.reduceat(kinds_asked[:, [PERSON, REASON]], phrasings).T
    number = np.array([fact.numeral for fact in facts])
    columns = [
        told[chosen], wide[chosen],
        *(cosines[name][chosen] for name in FIELDS), *(cosines[name][chosen] - tops[name] for name in FIELDS),
        query.cover(in_told), query.cover(in_context), query.cover(in_told + in_context), query.cover(in_answer),
        query.soft([fact.bag for fact in facts]),
        np.maximum.reduceat(dice, phrasings), query.repeated(in_answer, answers),
        shared, -apart,
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
    occurrences = query.occurrences([p.context for p in parts])
    own, near = occurrences.times(np.array([p.place for p in parts])), occurrences.times()
    two = pairs(query.runs)
    cosine = np.array([cos for *_, cos in found])
    columns = [
        [score for _, score, _ in found], cosine, contexts, cosine - cosine.max(), contexts - contexts.max(),
        query.cover(own), query.cover(near), query.cover(own, two), query.cover(near, two),
        query.triples(own), query.triples(near),
        query.soft([p.bag for p in parts]),
        query.kinds[NUMBER] * np.array([p.numeral for p in parts]),
        query.kinds[SPEECH] * np.array([p.speech for p in parts]),
    ]  # fmt: skip
    found_features = np.stack(columns, axis=1).astype(np.float32)
    return Candidates(np.array(numbers), found_features), [p.passage for p in parts]
