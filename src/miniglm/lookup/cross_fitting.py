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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miniglm.corpus import Paragraph
from miniglm.files import temporary_folder
from miniglm.lookup.encoder import Encoder
from miniglm.lookup.facts import Fact, Memory, without
from miniglm.lookup.features import Candidates, Sources
from miniglm.lookup.library import Library, build_library, parts_of
from miniglm.lookup.look import Look, fact_texts, passage_texts, ranked
from miniglm.lookup.pairs import sample_of_book, train
from miniglm.lookup.ranking import Linear
from miniglm.lookup.reranker import READ_FACTS, READ_PASSAGES, Characters, Reranker, Rerankers, Text, read
from miniglm.lookup.reranker_training import Sample, train_network
from miniglm.lookup.text import plain
from miniglm.lookup.withheld import Asked, Looked, Withheld

Floats = NDArray[np.float32]
FOLDS = 4
FEWEST_FACTS = 200
"""Facts with several phrasings and a place in the book below which a reranker is not worth its training."""
DEALT_TWICE = 800.0
"""Seconds from which on the facts are dealt a second time, into other folds: the same questions beside what encoders
that have learnt other facts find, which is worth half a point (docs/lookup.md)."""
EPOCHS = (3, 2)
"""Of facts that are dealt once, and twice. With more the rerankers learn the questions by heart."""
MOST_ASKED = 1250
"""Questions of either kind that a fold looks up at most: a look-up takes some 10 ms, whatever the seconds."""
ENCODING = 0.45
"""Share of the seconds that goes to the folds' encoders."""
READ_BY_FACTS, READ_BY_PASSAGES = (0.28, 0.28), (0.44,)
"""Of what is left after the look-ups, the share of each network that reads facts, and passages."""


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
    of_facts: list[Sample] = []
    of_passages: list[Sample] = []
    linear: tuple[Linear, Linear] | None = None
    deals = 2 if seconds >= DEALT_TWICE else 1
    dealt = [withheld for deal in range(deals) for withheld in folds(facts, seed + deal * FOLDS)]
    for number, withheld in enumerate(dealt):

        def tell(share: float, number: int = number) -> None:
            progress(ENCODING * (number + share) / len(dealt))

        with temporary_folder(scratch) as folder:
            known = without(facts, withheld.questions)
            own = seconds * ENCODING / len(dealt)
            encoder = train(paragraphs, facts, withheld, more=more, seconds=own, seed=seed + number, progress=tell)
            asked = _some(withheld, seed + number)
            found = _samples(paragraphs, encoder, known, asked, characters, linear, folder)
            if found is None:
                return None
            linear, facts_read, passages_read = found
            of_facts += facts_read
            of_passages += passages_read
            gc.collect()  # Windows deletes no file that is mapped, and the library's are until their last cycle goes
    assert linear is not None
    left = max(seconds - (time.monotonic() - begun), seconds * (1 - ENCODING) / 2)
    networks = []
    gone = 0.0
    given = [(of_facts, own) for own in READ_BY_FACTS] + [(of_passages, own) for own in READ_BY_PASSAGES]
    for number, (samples, own) in enumerate(given):

        def tell_more(share: float, before: float = gone, own: float = own) -> None:
            progress(ENCODING + (1 - ENCODING) * (before + own * share))

        networks.append(
            train_network(
                samples,
                characters,
                seed=seed + number,
                epochs=EPOCHS[deals - 1],
                seconds=left * own,
                progress=tell_more,
            )
        )
        gone += own
    count = len(READ_BY_FACTS)
    on_facts, on_passages = (Reranker(characters, own) for own in (networks[:count], networks[count:]))
    return Ranked(*linear, Rerankers(on_facts, on_passages))


def _some(withheld: Withheld, seed: int) -> tuple[Asked, Asked]:
    """At most `MOST_ASKED` of the questions whose facts are in the memory, and of the others."""
    generator = random.Random(seed)
    old, new = (generator.sample(some, min(MOST_ASKED, len(some))) for some in (withheld.reworded, withheld.new))
    return old, new


def _samples(
    paragraphs: Sequence[Paragraph],
    encoder: Encoder,
    known: Sequence[Fact],
    asked: tuple[Asked, Asked],
    characters: Characters,
    linear: tuple[Linear, Linear] | None,
    folder: Path,
) -> tuple[tuple[Linear, Linear], list[Sample], list[Sample]] | None:
    """Looks a fold's questions up: samples of facts, and of passages. The first fold's settle the linear rankers, which
    need few; None where nothing that is right was found for them."""
    build_library(parts_of(paragraphs), encoder, "", folder)
    library = Library(folder)
    sources = Sources(encoder, Memory.build(known, library, encoder), library)
    looked = Looked.up(*asked, sources)
    if linear is None:
        if not all(any(hit.any() for hit in hits) for hits in (looked.right, looked.told)):
            return None
        linear = looked.rankers()
    of_facts, of_passages = partial(fact_texts, sources), partial(passage_texts, sources)
    on_facts = [
        _sample(found, found.facts, hit, linear[0], READ_FACTS, of_facts, characters, ())
        for (found, _), hit in zip(looked.old, looked.right, strict=True)
        if hit.any()
    ]
    on_passages = [
        _sample(found, found.passages, hit, linear[1], READ_PASSAGES, of_passages, characters, fact.keys)
        for (found, fact), hit in zip(looked.new, looked.told, strict=True)
        if hit.any()
    ]
    return linear, on_facts, on_passages


def _sample(
    found: Look,
    candidates: Candidates,
    right: NDArray[np.bool_],
    linear: Linear,
    most: int,
    texts_of: Callable[[Sequence[int]], list[Text]],
    characters: Characters,
    keys: Sequence[Sequence[str]],
) -> Sample:
    """The best candidates by the linear ranker, the best right one among them."""
    scores = linear(candidates.features)
    order = ranked(scores)
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
