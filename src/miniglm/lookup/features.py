"""What speaks for a candidate: similarities of a question and a fact, or a passage, as numbers for the ranker.

Scores that depend on a question's length are divided by the best that any candidate has, or stand beside their
distance from it, so that one set of weights serves all questions and all books.
"""

from __future__ import annotations

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
    grams,
    has_numeral,
    kinds,
    pairs,
    plain,
    triples,
)

Floats = NDArray[np.float32]
FACTS = 20
"""Facts that the ranker chooses among."""
PASSAGES = 40
"""Passages that it chooses among, and how many each of BM25 and vectors brings."""
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
        self.distinct = np.unique(self.grams)
        self.pairs = pairs(self.distinct)
        self.triples = triples(self.plain)
        self.kinds = kinds(text)
        bag = vocabulary.bag(self.plain)
        self.vector: NDArray[np.float32] = encoder.bags([bag])[0]
        numbers = vocabulary.numbers(self.distinct)
        self.weights = np.where(numbers == UNKNOWN, vocabulary.rarest, vocabulary.idf[numbers])
        own = np.unique(bag)
        self.directions = _directions(encoder, own)
        strength = encoder.lengths[own, 0].numpy()
        self.strength = strength / max(float(strength.sum()), 1e-6)

    def held(self, texts: Sequence[Grams]) -> NDArray[np.bool_]:
        """(texts, distinct n-grams) whether each text holds each of the question's n-grams."""
        return _holds(self.distinct, texts)

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
        """(texts,) of each of the question's n-grams the best cosine with one of the text's, weighted by its vector's
        length."""
        rows, places = np.unique(np.concatenate(bags), return_inverse=True)
        near = (_directions(self.encoder, rows) @ self.directions.T)[places]
        best: Floats = np.maximum.reduceat(near, _starts(bags), axis=0) @ self.strength
        return best

    def dice(self, others: Sequence[Grams]) -> Floats:
        """(texts,) weighted Dice coefficient of the n-grams of both."""
        vocabulary = self.encoder.vocabulary
        each = [np.unique(found) for found in others]
        numbers = vocabulary.numbers(np.concatenate(each))
        weights = np.where(numbers == UNKNOWN, vocabulary.rarest, vocabulary.idf[numbers])
        sums = np.array([part.sum() for part in np.split(weights, _starts(each)[1:])])
        both = 2 * (self.held(each).astype(np.float32) @ self.weights)
        dice: Floats = both / np.maximum(sums + self.weights.sum(), 1e-6)
        return dice


def _starts(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Where each part begins in all of them one after another."""
    return np.cumsum([0, *(len(part) for part in parts[:-1])])


def _holds(wanted: NDArray[Any], texts: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """(texts, wanted) whether each text has each of the wanted numbers, which rise."""
    table = np.zeros((len(texts), len(wanted)), dtype=bool)
    if len(wanted):
        flat = np.concatenate(texts)
        owners = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        places = np.minimum(np.searchsorted(wanted, flat), len(wanted) - 1)
        hit = wanted[places] == flat
        table[owners[hit], places[hit]] = True
    return table


def _directions(encoder: Encoder, bag: Bag) -> Floats:
    found: Floats = (encoder.vectors[bag] / encoder.lengths[bag].clamp_min(1e-6)).numpy()
    return found


def _relative(scores: Floats) -> Floats:
    return scores / max(float(scores.max()), 1e-6)


def fact_candidates(query: Query, memory: Memory, library: Library) -> Candidates:
    """The first choice among the facts and its features."""
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
    facts = [memory.facts[n] for n in chosen]
    told_texts, answers = [plain(fact.together) for fact in facts], [grams(plain(fact.answer)) for fact in facts]
    in_told = query.held([grams(text) for text in told_texts])
    in_context = query.held([grams(context_of(fact, library)) for fact in facts])
    soft = query.soft([query.encoder.vocabulary.bag(text) for text in told_texts])
    firsts = np.cumsum([0, *(len(fact.questions) for fact in facts[:-1])])
    dice = np.maximum.reduceat(query.dice([grams(plain(q)) for fact in facts for q in fact.questions]), firsts)
    # Of the answer's n-grams, with repetitions, the share that the question has said already.
    repeated = [float(np.isin(answer, query.distinct).mean()) if len(answer) else 0.0 for answer in answers]
    asked = [np.stack([kinds(q) for q in fact.questions]) for fact in facts]
    person = np.array([own[:, PERSON].max() for own in asked])
    reason = np.array([own[:, REASON].max() for own in asked])
    number = np.array([has_numeral(fact.answer) for fact in facts])
    columns = [
        told[chosen], wide[chosen],
        *(cosines[name][chosen] for name in FIELDS), *(cosines[name][chosen] - tops[name] for name in FIELDS),
        query.cover(in_told), query.cover(in_context), query.cover(in_told | in_context),
        query.cover(query.held(answers)), soft, dice, repeated,
        [(own @ query.kinds).max() / max(1.0, float(query.kinds.sum())) for own in asked],
        [-np.abs(own - query.kinds).sum(axis=1).min() for own in asked],
        query.kinds[NUMBER] * number,
        query.kinds[PERSON] * person, query.kinds[PERSON] * (person - 1),
        query.kinds[REASON] * reason,
    ]  # fmt: skip
    return Candidates(chosen, np.stack(columns, axis=1).astype(np.float32))


def passage_candidates(query: Query, library: Library) -> tuple[Candidates, list[Passage]]:
    """The first choice among the passages, its features, and the passages themselves."""
    found = library.search(query.grams, query.vector, PASSAGES) if library.size else []
    if not found:
        return Candidates(np.zeros(0, dtype=np.int64), np.zeros((0, len(PASSAGE_FEATURES)), dtype=np.float32)), []
    most = max(max(score for _, score, _ in found), 1e-6)
    # One that vectors did not bring is at most as near as the last that they did.
    floor = np.nanmin([cos for *_, cos in found])
    found = [(n, score / most, floor if np.isnan(cos) else cos) for n, score, cos in found]
    found.sort(key=lambda hit: -(hit[1] + hit[2]))
    found = found[:PASSAGES]
    texts = [library.passage(n) for n, *_ in found]
    vocabulary = query.encoder.vocabulary
    around = [library.context(n) for n, *_ in found]
    contexts = query.encoder.bags([vocabulary.bag(text) for text in around]) @ query.vector
    own = [library.plain(n) for n, *_ in found]
    held = query.held([grams(text) for text in own])
    near = query.held([grams(text) for text in around])
    runs = max(1, len(query.triples))
    cosine = np.array([cos for *_, cos in found])
    columns = [
        [score for _, score, _ in found], cosine, contexts, cosine - cosine.max(), contexts - contexts.max(),
        query.cover(held), query.cover(near), query.cover(held, query.pairs), query.cover(near, query.pairs),
        _holds(query.triples, [triples(text) for text in own]).sum(axis=1) / runs,
        _holds(query.triples, [triples(text) for text in around]).sum(axis=1) / runs,
        query.soft([vocabulary.bag(text) for text in own]),
        query.kinds[NUMBER] * np.array([has_numeral(p.text) for p in texts]),
        query.kinds[SPEECH] * np.array(["曰" in p.text or "道：" in p.text for p in texts]),
    ]  # fmt: skip
    return Candidates(np.array([n for n, *_ in found]), np.stack(columns, axis=1).astype(np.float32)), texts
