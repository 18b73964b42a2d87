"""Which sentences of the book to quote: how likely each holds the answer, by all passages with it that a reranker read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from miniglm.lookup.library import Passage
from miniglm.lookup.text import plain_with_places, sentences

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Sentences of the book that follow each other, and the chance that they hold the answer, if the book tells it."""

    passage: Passage
    chance: float


def cut_up(texts: Sequence[Passage], chances: Floats, places: Mapping[int, Floats]) -> list[Excerpt]:
    """The sentences of passages, in the book's order, each with its chance. Passages overlap: a sentence has what all of
    them give it.

    Args:
        chances: (passages,) that it is the one with the answer.
        places: of those of them that were read, by number, the share of each of its characters in where the answer is.
    """
    found: dict[tuple[str, int, int], Excerpt] = {}
    for number, shares in places.items():
        text = texts[number]
        cut = sentences(text.text)
        bounds = np.array([start for start, _ in cut] + [len(text.text)], dtype=np.int64)
        _, ends = plain_with_places(text.text, bounds)
        sums = np.concatenate([[0.0], np.cumsum(shares)])[np.minimum(ends, len(shares))]
        for (start, end), share in zip(cut, np.diff(sums).tolist(), strict=True):
            own = replace(text, start=text.start + start, text=text.text[start:end])
            key = (own.book, own.paragraph, own.start)
            before = found[key].chance if key in found else 0.0
            found[key] = Excerpt(own, before + float(chances[number]) * share)
    return [found[key] for key in sorted(found)]


def likeliest(cut: Sequence[Excerpt], most: int, count: int, least: float) -> list[Excerpt]:
    """The likeliest runs of sentences that share none, the likeliest first; those that touch are joined to one.

    Args:
        cut: sentences, as `cut_up` gives them.
        most: characters of a run, a longer sentence aside. Of equally likely runs it is the longer one.
        count: runs at most.
        least: of the chance of the first, what another's must be.
    """
    left = list(cut)
    found: list[Excerpt] = []
    while left and len(found) < count:
        _, _, first, last = max(_runs(left, most))
        best = _joined(left[first:last])
        if found and best.chance < least * found[0].chance:
            break
        del left[first:last]
        found.append(best)
    return _together(found)


def _runs(cut: Sequence[Excerpt], most: int) -> Iterator[tuple[float, int, int, int]]:
    """Runs of sentences of at most so many characters: their chances, as far as these tell them apart, and characters,
    and where they begin and end."""
    lengths = [len(own.passage.text) for own in cut]
    touch = [_touch(one.passage, after.passage) for one, after in itertools.pairwise(cut)]
    for first in range(len(cut)):
        chance, length = 0.0, 0
        for last in range(first, len(cut)):
            length += lengths[last]
            if last > first and (length > most or not touch[last - 1]):
                break
            chance += cut[last].chance
            yield round(chance, 3), length, first, last + 1


def _touch(one: Passage, after: Passage) -> bool:
    return (one.book, one.paragraph, one.start + len(one.text)) == (after.book, after.paragraph, after.start)


def _joined(run: Sequence[Excerpt]) -> Excerpt:
    passage = replace(run[0].passage, text="".join(own.passage.text for own in run))
    return Excerpt(passage, sum(own.chance for own in run))


def _together(found: Sequence[Excerpt]) -> list[Excerpt]:
    """Those that touch joined, in the place of the likelier one."""
    made: list[Excerpt] = []
    for own in found:
        before = next((n for n, known in enumerate(made) if _touch(known.passage, own.passage)), None)
        after = next((n for n, known in enumerate(made) if _touch(own.passage, known.passage)), None)
        run = [*(made[n] for n in (before,) if n is not None), own, *(made[n] for n in (after,) if n is not None)]
        places = [n for n in (before, after) if n is not None]
        if not places:
            made.append(own)
            continue
        made[min(places)] = _joined(run)
        if len(places) == 2:
            del made[max(places)]
    return made
