"""What speaks for a candidate: similarities of a question and a fact, or a passage, as numbers for the ranker.

Scores that depend on a question's length are divided by the best that any candidate has, or stand beside their
distance from it, so that one set of weights serves all questions and all books.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miniglm.lookup.encoder import Encoder
from miniglm.lookup.facts import Memory
from miniglm.lookup.library import Library, Passage
from miniglm.lookup.text import NUMBER, PERSON, REASON, grams, has_numeral, kinds
from miniglm.qa.text import bare

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
    "kind_shared", "kind_distance", "number", "person", "person_no", "reason",
)  # fmt: skip
PASSAGE_FEATURES = (
    "bm25", "cos", "cos_context", "gap", "gap_context",
    "cover", "cover_context", "cover_pairs", "cover_pairs_context", "triples", "triples_context",
    "soft", "best_sentence",
    "number", "speech", "fact_context",
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
        self.bag = np.unique(encoder.vocabulary.bag(text))
        self.vector: NDArray[np.float32] = encoder.texts([text])[0]
        self.grams = sorted(set(grams(text)))
        known = encoder.vocabulary.numbers
        rarest = float(encoder.vocabulary.idf.max())
        self.weights = np.array(
            [float(encoder.vocabulary.idf[known[g]]) if g in known else rarest for g in self.grams], dtype=np.float32
        )
        self.pairs = np.array([len(g) == 2 for g in self.grams], dtype=bool)
        plain = bare(text)
        self.triples = sorted({plain[i : i + 3] for i in range(len(plain) - 2)})
        self.kinds = kinds(text)
        strength = encoder.vectors[self.bag].norm(dim=-1).numpy()
        self.strength = strength / max(float(strength.sum()), 1e-6)
        self.directions = _directions(encoder, self.bag)

    def held(self, plain: str) -> NDArray[np.bool_]:
        """Of each n-gram, whether a text in `bare` form holds it."""
        return np.array([g in plain for g in self.grams], dtype=bool)

    def cover(self, held: NDArray[np.bool_], among: NDArray[np.bool_] | None = None) -> float:
        """Share of the n-grams' weight that is held."""
        weights = self.weights if among is None else self.weights * among
        return float((weights * held).sum() / max(float(weights.sum()), 1e-6))

    def unknown(self) -> float:
        """Share of the pairs that the encoder has never seen twice: high where a question is about something else."""
        known = self.encoder.vocabulary.numbers
        pairs = [g for g in self.grams if len(g) == 2]
        return sum(g not in known for g in pairs) / max(1, len(pairs))

    def soft(self, bag: NDArray[np.int64]) -> float:
        """Of each of the question's n-grams the best cosine with one of the bag's, weighted by its vector's length."""
        near = (self.directions @ _directions(self.encoder, bag).T).max(axis=1)
        return float((near * self.strength).sum())


def _directions(encoder: Encoder, bag: NDArray[np.int64]) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = encoder.vectors[bag].numpy()
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def _relative(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    return scores / max(float(scores.max()), 1e-6)


def fact_candidates(query: Query, memory: Memory) -> Candidates:
    """The first choice among the facts and its features."""
    if not len(memory):
        return Candidates(np.zeros(0, dtype=np.int64), np.zeros((0, len(FACT_FEATURES)), dtype=np.float32))
    told, wide = memory.told.scores(query.text), memory.wide.scores(query.text)
    told, wide = _relative(told), _relative(wide)
    cosines = {name: np.asarray(memory.vectors[name] @ query.vector) for name in memory.vectors}
    phrased = np.full(len(memory), -1.0, dtype=np.float32)
    np.maximum.at(phrased, memory.owners, cosines["questions"])
    cosines["questions"] = phrased
    first = (phrased + cosines["answers"]) / 2 + cosines["together"] + told + 0.3 * cosines["contexts"] + 0.5 * wide
    chosen = np.argsort(-first, kind="stable")[:FACTS]
    tops = {name: float(values.max()) for name, values in cosines.items()}
    rows = []
    for n in chosen:
        fact = memory.facts[n]
        plain_answer = bare(fact.answer)
        in_told, in_context = query.held(bare(fact.together)), query.held(bare(memory.contexts[n]))
        in_answer = query.held(plain_answer)
        asked = np.stack([kinds(q) for q in fact.questions])
        four = [float(cosines[name][n]) for name in ("questions", "answers", "together", "contexts")]
        gaps = [
            value - tops[name]
            for value, name in zip(four, ("questions", "answers", "together", "contexts"), strict=True)
        ]
        answer_grams = set(grams(fact.answer))
        person = float(asked[:, PERSON].max())
        rows.append(
            [
                float(told[n]), float(wide[n]), *four, *gaps,
                query.cover(in_told), query.cover(in_context), query.cover(in_told | in_context),
                query.cover(in_answer),
                query.soft(np.unique(query.encoder.vocabulary.bag(fact.together))),
                max(_dice(query, q) for q in fact.questions),
                len(answer_grams.intersection(query.grams)) / max(1, len(answer_grams)),
                float((asked @ query.kinds).max() / max(1.0, float(query.kinds.sum()))),
                float(np.abs(asked - query.kinds).sum(axis=1).min()),
                float(query.kinds[NUMBER]) * has_numeral(fact.answer),
                float(query.kinds[PERSON]) * person, float(query.kinds[PERSON]) * (1 - person),
                float(query.kinds[REASON]) * float(asked[:, REASON].max()),
            ]
        )  # fmt: skip
    return Candidates(chosen, np.array(rows, dtype=np.float32))


def _dice(query: Query, question: str) -> float:
    other = set(grams(question))
    held = query.held(bare(question))
    rarest = float(query.encoder.vocabulary.idf.max())
    numbers, idf = query.encoder.vocabulary.numbers, query.encoder.vocabulary.idf
    whole = float(query.weights.sum()) + sum(float(idf[numbers[g]]) if g in numbers else rarest for g in other)
    return 2 * float((query.weights * held).sum()) / max(whole, 1e-6)


def passage_candidates(
    query: Query, library: Library, facts: Sequence[int] = ()
) -> tuple[Candidates, list[Passage]]:
    """The first choice among the passages, its features, and the passages themselves.

    Args:
        facts: passages of the facts that were found for the question, the likeliest first.
    """
    found = library.search(query.text, query.vector, PASSAGES) if library.size else []
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
    contexts = query.encoder.texts([p.context for p in texts]) @ query.vector
    top, top_context = max(cos for *_, cos in found), float(contexts.max())
    rows = []
    for (number, score, cos), passage, context in zip(found, texts, contexts, strict=True):
        plain, wide = bare(passage.text), bare(passage.context)
        held, near = query.held(plain), query.held(wide)
        triples = max(1, len(query.triples))
        bag = vocabulary.bag(passage.text)
        rows.append(
            [
                score, cos, float(context), cos - top, float(context) - top_context,
                query.cover(held), query.cover(near), query.cover(held, query.pairs), query.cover(near, query.pairs),
                sum(t in plain for t in query.triples) / triples, sum(t in wide for t in query.triples) / triples,
                query.soft(np.unique(bag)), 0.0,
                float(query.kinds[NUMBER]) * has_numeral(passage.text),
                float(query.kinds[6]) * ("曰" in passage.text or "道：" in passage.text),
                1.0 / (1 + facts.index(number)) if number in facts else 0.0,
            ]
        )  # fmt: skip
    return Candidates(np.array([n for n, *_ in found], dtype=np.int64), np.array(rows, dtype=np.float32)), texts
