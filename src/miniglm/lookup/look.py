"""One look-up: candidates of both memories, ranked, and how sure the judge is of each. Knows nothing of how the judge
was learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniglm.lookup.features import (
    FACT_FEATURES,
    PASSAGE_FEATURES,
    Candidates,
    Query,
    Sources,
    fact_candidates,
    passage_candidates,
)
from miniglm.lookup.library import Passage
from miniglm.lookup.ranking import Linear
from miniglm.lookup.reranker import (
    READ_FACTS,
    READ_PASSAGES,
    Reranker,
    Rerankers,
    Text,
    read,
    text_of_fact,
    text_of_passage,
)

Floats = NDArray[np.float32]
DOUBT = 0.25
"""How far from one half the chance of the fact against the passage must be for one alone to be shown. This and what is
below: chosen on facts held out from the training questions, see docs/lookup.md."""
SEVERAL = 3
"""Facts, and quotes, that an answer has at most."""
LEAST_FACT = 0.2
"""Of the chance of the first fact, what another's must be to be shown as well."""
_FACT_SIGNALS = ("cos_question", "cos_answer", "cos_together", "cover_told", "cover_either", "soft_told", "dice_question",
                 "answer_in_question", "kind_nearness")  # fmt: skip
_PASSAGE_SIGNALS = ("cos", "cos_context", "cover", "cover_context", "cover_pairs", "cover_pairs_context",
                    "triples_context", "soft")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Judge:
    """All that is learnt beside the encoder.

    Attributes:
        fact_ranker, passage_ranker: choose among candidates.
        fact_temperature, passage_temperature: what the scores of rerankers are divided by, to be log odds.
        fact_right, passage_right: log odds that the first fact's answer is right, that the first passage tells it.
        prefer: log odds of the fact against the passage, where only one of them is right.
        inside: log odds that the books answer the question at all; `threshold`: below it, it is refused.
        inside_passages, threshold_passages: the same without facts.
    """

    fact_ranker: Linear
    passage_ranker: Linear
    fact_temperature: float
    passage_temperature: float
    fact_right: Linear
    passage_right: Linear
    prefer: Linear
    inside: Linear
    threshold: float
    inside_passages: Linear
    threshold_passages: float

    def to_json(self) -> dict[str, Any]:
        """Numbers, and the names of the features that they belong to."""
        found: dict[str, Any] = {"fact_features": FACT_FEATURES, "passage_features": PASSAGE_FEATURES}
        for name in self.__slots__:
            value = getattr(self, name)
            found[name] = value.to_json() if isinstance(value, Linear) else value
        return found

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Judge:
        """What `to_json` gave.

        Raises:
            KeyError, ValueError, TypeError: it is something else, or of another version's features.
        """
        if (tuple(data["fact_features"]), tuple(data["passage_features"])) != (FACT_FEATURES, PASSAGE_FEATURES):
            raise ValueError("features of another version")
        parts: dict[str, Any] = {
            name: float(data[name]) if name.startswith("threshold") else Linear.from_json(data[name])
            for name in cls.__slots__
            if not name.endswith("temperature")
        }
        parts |= {name: float(data.get(name, 1.0)) for name in cls.__slots__ if name.endswith("temperature")}
        return cls(**parts)


@dataclass(frozen=True, slots=True)
class Look:
    """What was found for a question, in the order of the first choice."""

    query: Query
    facts: Candidates
    passages: Candidates
    texts: list[Passage]


def look(question: str, sources: Sources) -> Look:
    """The candidates of both memories with their features."""
    query = Query(question, sources.encoder)
    facts = fact_candidates(query, sources)
    passages, texts = passage_candidates(query, sources)
    return Look(query, facts, passages, texts)


def fact_texts(sources: Sources, numbers: Sequence[int]) -> list[Text]:
    """What a reranker reads of these facts."""
    return [text_of_fact(sources.fact(number)) for number in numbers]


def passage_texts(sources: Sources, numbers: Sequence[int]) -> list[Text]:
    """What a reranker reads of these passages."""
    return [text_of_passage(passage) for passage in sources.passages(numbers)]


@dataclass(frozen=True, slots=True)
class Scores:
    """How likely what was found is, as log odds against each other.

    Attributes:
        facts, passages: (candidates,) each.
        answers: of the passages that a reranker read, by their places among the candidates, where the answer would be: the
            share of each of its characters.
    """

    facts: Floats
    passages: Floats
    answers: dict[int, Floats] = field(default_factory=dict)

    def cooled(self, facts: float, passages: float) -> Scores:
        """The same divided by these temperatures."""
        return replace(self, facts=self.facts / facts, passages=self.passages / passages)


def linear_scores(found: Look, fact_ranker: Linear, passage_ranker: Linear) -> Scores:
    """By the linear rankers alone."""
    return Scores(fact_ranker(found.facts.features), passage_ranker(found.passages.features))


def reranked(
    found: Look, fact_ranker: Linear, passage_ranker: Linear, sources: Sources, rerankers: Rerankers
) -> Scores:
    """By the rerankers, of those that these read; all others come after them."""
    linear = linear_scores(found, fact_ranker, passage_ranker)
    facts, _, _ = _reread(
        found, found.facts, linear.facts, fact_ranker, rerankers.facts, READ_FACTS, partial(fact_texts, sources)
    )
    passages, first, shares = _reread(
        found,
        found.passages,
        linear.passages,
        passage_ranker,
        rerankers.passages,
        READ_PASSAGES,
        partial(passage_texts, sources),
    )
    return Scores(facts, passages, dict(zip(first, shares, strict=True)))


def _reread(
    found: Look,
    candidates: Candidates,
    linear: Floats,
    ranker: Linear,
    reranker: Reranker,
    most: int,
    texts_of: Callable[[Sequence[int]], list[Text]],
) -> tuple[Floats, list[int], Sequence[Floats]]:
    """New scores, which candidates were read, and where in each its answer would be."""
    if not len(linear):
        return linear, [], ()
    first = ranked(linear)[:most]
    reading = read(found.query, texts_of(candidates.numbers[first].tolist()), reranker.characters)
    scores, shares = reranker(reading, ranker.standard(candidates.features[first]), linear[first])
    # By the distance that the linear ranker saw between them and the last of those that are read.
    whole = linear - linear[first].min() + scores.min()
    whole[first] = scores
    lengths = reading.lengths.tolist()
    return whole, first.tolist(), [row[:length] for row, length in zip(shares, lengths, strict=True)]


def share_of(log_odds: Floats) -> Floats:
    """Probabilities of log odds."""
    return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -30, 30))), dtype=np.float32)


def in_doubt(chances: Floats) -> NDArray[np.bool_]:
    """Where neither of two is so much likelier that the other need not be shown."""
    return np.asarray(np.abs(chances - 0.5) < DOUBT)


def ranked(scores: Floats) -> NDArray[np.int64]:
    """Places by falling score."""
    return np.argsort(-scores, kind="stable")


def likely(scores: Floats) -> list[int]:
    """Places of the best candidate and, up to `SEVERAL`, of those that are not so much less likely that they need not be
    shown: the ranker learns the log odds of one against another. None where there are no candidates."""
    order = ranked(scores)[:SEVERAL]
    return [int(n) for n in order if scores[n] - scores[order[0]] >= np.log(LEAST_FACT)]


def signals(found: Look, scores: Scores) -> tuple[Floats, Floats]:
    """What confidence is judged by: of facts, then passages, then the question; and the same without the facts."""
    passage = _of_best(found.passages, scores.passages, PASSAGE_FEATURES, _PASSAGE_SIGNALS)
    question = [found.query.unknown(), len(found.query.distinct) / 50]
    fact = _of_best(found.facts, scores.facts, FACT_FEATURES, _FACT_SIGNALS)
    return (
        np.array([*fact, *passage, *question], dtype=np.float32),
        np.array([*passage, *question], dtype=np.float32),
    )


def _of_best(found: Candidates, scores: Floats, names: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """The best candidate's score, its share of all, its lead on the next, and some of its features."""
    if not len(scores):
        return [0.0] * (3 + len(wanted))
    order = ranked(scores)
    best = float(scores[order[0]])
    share = 1.0 / float(np.exp(np.clip(scores - best, -50, 0)).sum())
    lead = best - float(scores[order[1]]) if len(order) > 1 else 0.0
    features = found.features[order[0]]
    return [best, share, lead, *(float(features[names.index(name)]) for name in wanted)]
