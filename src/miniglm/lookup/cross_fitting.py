"""Teaches the rerankers on all of the training questions, none of which their encoder has seen.

The facts are dealt into folds. For each fold an encoder is trained without its facts, and without a phrasing of each
other one; these are then looked up. So every question is asked once of a book that alone tells it, and most are asked
of a memory that holds their fact in other words, as questions come later (cross-fitting; Wolpert 1992 for stacking).
A phrasing is withheld of every fact, not only of those that are asked about: or the right one would be known by
having one phrasing less.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miniglm.corpus import Paragraph
from miniglm.lookup.encoder import Encoder
from miniglm.lookup.facts import Fact, Memory, without
from miniglm.lookup.features import Candidates, Sources
from miniglm.lookup.library import Library, build_library, parts_of
from miniglm.lookup.look import Look, fact_texts, look, passage_texts
from miniglm.lookup.pairs import sample_of_book, train
from miniglm.lookup.ranking import Linear, fit_ranker
from miniglm.lookup.reranker import READ_FACTS, READ_PASSAGES, Characters, Reranker, Rerankers, Text, read
from miniglm.lookup.reranker_training import Sample, train_network
from miniglm.lookup.text import plain
from miniglm.lookup.withheld import Withheld, tells

Floats = NDArray[np.float32]
Asked = list[tuple[str, Fact]]
"""Questions with their facts."""
FOLDS = 4
FEWEST_FACTS = 200
"""Facts with several phrasings and a place in the book below which a reranker is not worth its training."""
FACT_PASSES, PASSAGE_PASSES = 3, 3
"""Epochs: with more the rerankers learn the questions by heart."""
NETWORKS = 2
"""Networks of different seeds that read facts, whose scores are averaged: of these more is asked, and they are shorter."""
MOST_ASKED = 1250
"""Questions of either kind that a fold looks up at most: a look-up takes some 10 ms, whatever the seconds."""
ENCODING, READING = 0.45, (0.28, 0.28, 0.44)
"""Share of the seconds that goes to the folds' encoders, and of what is left after the look-ups to each network: two of
facts, one of passages."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """What orders candidates: the linear rankers, and the rerankers that correct them."""

    facts: Linear
    passages: Linear
    rerankers: Rerankers


def folds(facts: Sequence[Fact], seed: int) -> list[Withheld]:
    """What each fold withholds: its facts, and a phrasing of all others that have several."""
    generator = random.Random(seed)
    order = generator.sample(list(facts), len(facts))
    groups = [order[number::FOLDS] for number in range(FOLDS)]
    found = []
    for own in groups:
        others = [fact for group in groups if group is not own for fact in group]
        reworded = [(generator.choice(fact.questions), fact) for fact in others if len(fact.questions) > 1]
        found.append(Withheld(reworded, own))
    return found


def learn_rerankers(
    paragraphs: Sequence[Paragraph],
    facts: Sequence[Fact],
    scratch: Path,
    *,
    more: Sequence[Paragraph] = (),
    seconds: float,
    seed: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Ranked | None:
    """Rankers and rerankers from located facts; None where there are too few, or too few with several phrasings.

    Args:
        facts: without what is withheld to learn the choice and the refusal on.
        scratch: a folder for the folds' libraries, which are gone afterwards.
        more: text that the encoders learn from beside the books.
        seconds: for all of it, about.
        progress: is told the share of them that is gone.
    """
    if sum(len(fact.questions) > 1 and fact.passage >= 0 for fact in facts) < FEWEST_FACTS:
        return None
    begun = time.monotonic()
    characters = Characters.build((plain(p.text) for p in sample_of_book(paragraphs, seed)), seed)
    gathered: list[tuple[list[Sample], list[Sample]]] = []
    linear: tuple[Linear, Linear] | None = None
    for number, withheld in enumerate(folds(facts, seed)):

        def tell(share: float, number: int = number) -> None:
            progress(ENCODING * (number + share) / FOLDS)

        scratch.mkdir(parents=True, exist_ok=True)
        # Windows deletes no file that is mapped, and the library's are until the last cycle is collected.
        with tempfile.TemporaryDirectory(prefix=".fold-", dir=scratch, ignore_cleanup_errors=True) as folder:
            known = without(facts, withheld.questions)
            own = seconds * ENCODING / FOLDS
            encoder = train(paragraphs, facts, withheld, more=more, seconds=own, seed=seed + number, progress=tell)
            asked = _some(withheld, seed + number)
            found = _samples(paragraphs, encoder, known, asked, characters, linear, Path(folder))
            if found is None:
                return None
            linear, samples = found
            gathered.append(samples)
            gc.collect()
    assert linear is not None
    left = max(seconds - (time.monotonic() - begun), seconds * (1 - ENCODING) / 2)
    of_facts, of_passages = ([sample for fold in gathered for sample in fold[side]] for side in (0, 1))
    if not of_facts or not of_passages:
        return None
    networks = []
    for number, share_of_left in enumerate(READING):
        before = sum(READING[:number])

        def tell_more(share: float, before: float = before, own: float = share_of_left) -> None:
            progress(ENCODING + (1 - ENCODING) * (before + own * share))

        networks.append(
            train_network(
                of_facts if number < NETWORKS else of_passages,
                characters,
                seed=seed + number,
                epochs=FACT_PASSES if number < NETWORKS else PASSAGE_PASSES,
                seconds=left * share_of_left,
                progress=tell_more,
            )
        )
    on_facts, on_passages = (Reranker(characters, own) for own in (networks[:NETWORKS], networks[NETWORKS:]))
    return Ranked(*linear, Rerankers(on_facts, on_passages))


def _some(withheld: Withheld, seed: int) -> tuple[Asked, Asked]:
    """At most `MOST_ASKED` of the questions whose facts are in the memory, and of the others."""
    generator = random.Random(seed)
    new = [(q, fact) for fact in withheld.untaught for q in fact.questions]
    old, new = (generator.sample(some, min(MOST_ASKED, len(some))) for some in (withheld.reworded, new))
    return old, new


def _samples(
    paragraphs: Sequence[Paragraph],
    encoder: Encoder,
    known: Sequence[Fact],
    asked: tuple[Asked, Asked],
    characters: Characters,
    linear: tuple[Linear, Linear] | None,
    folder: Path,
) -> tuple[tuple[Linear, Linear], tuple[list[Sample], list[Sample]]] | None:
    """Looks a fold's questions up. The first fold's settle the linear rankers, which need few; None where nothing that is
    right was found for them."""
    build_library(parts_of(paragraphs), encoder, "", folder)
    library = Library(folder)
    memory = Memory.build(known, library, encoder)
    sources = Sources(encoder, memory, library)
    old, new = ([(look(q, sources), fact) for q, fact in questions] for questions in asked)
    right = [np.array([memory.facts[n].answer == fact.answer for n in found.facts.numbers]) for found, fact in old]
    told = [tells(found, fact) for found, fact in new]
    if linear is None:
        if not any(hit.any() for hit in right) or not any(hit.any() for hit in told):
            return None
        linear = (
            fit_ranker([(found.facts.features, hit) for (found, _), hit in zip(old, right, strict=True)]),
            fit_ranker(
                [(found.passages.features, hit) for (found, _), hit in zip(new, told, strict=True)], rising=True
            ),
        )
    on_facts = [
        _sample(found, found.facts, hit, linear[0], READ_FACTS, lambda n: fact_texts(n, sources), characters, ())
        for (found, _), hit in zip(old, right, strict=True)
    ]
    on_passages = [
        _sample(
            found,
            found.passages,
            hit,
            linear[1],
            READ_PASSAGES,
            lambda n: passage_texts(n, sources),
            characters,
            fact.keys,
        )
        for (found, fact), hit in zip(new, told, strict=True)
    ]
    return linear, ([s for s in on_facts if s is not None], [s for s in on_passages if s is not None])


def _sample(
    found: Look,
    candidates: Candidates,
    right: NDArray[np.bool_],
    linear: Linear,
    most: int,
    texts_of: Callable[[Sequence[int]], list[Text]],
    characters: Characters,
    keys: Sequence[Sequence[str]],
) -> Sample | None:
    """The best candidates by the linear ranker, the best right one among them; None where none is right."""
    if not right.any():
        return None
    scores = linear(candidates.features)
    order = np.argsort(-scores, kind="stable")
    first = order[:most].copy()
    if not right[first].any():
        first[-1] = order[right[order]][0]
    texts = texts_of(candidates.numbers[first].tolist())
    reading = read(found.query, texts, characters)
    marked = np.zeros(reading.letters.shape, dtype=bool)
    wanted = ["".join(map(chr, plain(text))) for group in keys for text in group]
    for row in np.flatnonzero(right[first]).tolist():
        own = "".join(map(chr, texts[row].plain))
        for text in wanted:
            place = own.find(text) if text else -1
            while place >= 0:
                marked[row, place : place + len(text)] = True
                place = own.find(text, place + 1)
    reading = replace(reading, known=reading.known.astype(np.float16))  # there are many of them
    return Sample(reading, linear.standard(candidates.features[first]), scores[first], right[first], marked)
