"""An inverted index of characters and pairs of characters, on disk and memory-mapped, and BM25 over several of them
(Robertson and Zaragoza 2009, in Lucene's form, as bm25s has it) that reads only the lists of a query's own n-grams.

The rarest n-grams come first. What they bring is all that a query needs of a small book: the lists of all its n-grams
are read, and scores are BM25's. Of a large one they bring the candidates, and these are scored by their text. Knows
nothing of what the texts are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from miniglm.lookup.text import Grams, Occurrences, Plain, firsts, neighbours, places_in, ranges

K1, B = 1.5, 0.75
LONGEST = 65_536
"""Postings of an n-gram in an index at most: a longer list would hardly be read, so only its length is kept."""
READ = 50_000
"""Postings that are read for a query at most, the rarest n-gram's aside."""
SCORED = 3
"""Candidates that are scored by their text, where not all lists were read, for each that is wanted."""
MERGED = 1 << 24
"""Postings that are merged at once."""
_TIMES = 8
"""Bits of a posting that say how often the text holds the n-gram; those above them are the text's number."""
_MOST = (1 << _TIMES) - 1

Floats = NDArray[np.float32]
Texts = Callable[[NDArray[np.int64]], list[Plain]]
"""Gives texts by their numbers."""


Kind = TypeVar("Kind", bound=np.generic)


def mapped(path: Path, kind: type[Kind]) -> NDArray[Kind]:
    """The numbers of a file, memory-mapped; a plain array over it, since np.memmap's own slicing is slow."""
    if not path.stat().st_size:
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="c").view(np.ndarray)


class Writer:
    """Makes an index block by block, in memory for one block.

    Args:
        folder: where it comes to lie; what is not yet merged lies in a folder below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.size = folder, 0
        folder.mkdir(parents=True)
        self._lengths: list[NDArray[np.uint32]] = []
        self._made = tempfile.TemporaryDirectory(dir=folder)
        self._runs: list[tuple[Grams, NDArray[np.int64], Path]] = []

    def add(self, text: Plain, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        """The next texts: those places of `text`, which may overlap."""
        lengths = ends - starts
        several = np.maximum(lengths - 1, 0)
        found = np.concatenate(
            [text.astype(np.uint32)[ranges(starts, lengths)], neighbours(text)[ranges(starts, several)]]
        )
        numbers = np.arange(self.size, self.size + len(starts), dtype=np.uint64)
        owners = np.concatenate([np.repeat(numbers, lengths), np.repeat(numbers, several)])
        keys = np.sort(found.astype(np.uint64) << 32 | owners)
        first = firsts(keys)
        times = np.minimum(np.diff(first, append=len(keys)), _MOST)
        keys = keys[first]
        postings = (keys.astype(np.uint32) << _TIMES) | times.astype(np.uint32)
        names, counts = np.unique((keys >> 32).astype(np.uint32), return_counts=True)
        path = Path(self._made.name) / str(len(self._runs))
        postings.tofile(path)
        self._runs.append((names, counts.astype(np.int64), path))
        self._lengths.append((lengths + several).astype(np.uint32))
        self.size += len(starts)

    def finish(self) -> None:
        """Writes names.npy (the n-grams, rising), counts.npy (texts that hold each), lengths.npy (n-grams of each text),
        postings.u32 (for each n-gram that is not too frequent: number and times of each text, by number) and ends.npy
        (where each list ends)."""
        empty = np.zeros(0, dtype=np.uint32)
        names = np.unique(np.concatenate([empty, *(run for run, *_ in self._runs)]))
        places = [np.searchsorted(names, run) for run, *_ in self._runs]
        counts = np.zeros(len(names), dtype=np.int64)
        for place, (_, own, _) in zip(places, self._runs, strict=True):
            counts[place] += own
        np.save(self.folder / "names.npy", names)
        kept = np.where(counts <= LONGEST, counts, 0)
        ends = np.cumsum(kept)
        np.save(self.folder / "counts.npy", counts.astype(np.uint32))
        np.save(self.folder / "ends.npy", ends)
        np.save(self.folder / "lengths.npy", np.concatenate([empty, *self._lengths]))
        with (self.folder / "postings.u32").open("wb") as file:
            low = 0
            while low < len(names):
                before = int(ends[low - 1]) if low else 0
                high = max(low + 1, int(np.searchsorted(ends, before + MERGED, "right")))
                self._merged(places, kept, low, high).tofile(file)
                low = high
        self._made.cleanup()

    def _merged(
        self, places: Sequence[NDArray[np.int64]], kept: NDArray[np.int64], low: int, high: int
    ) -> NDArray[np.uint32]:
        """The lists of the n-grams number `low` to `high`: of each run after another, so that numbers rise."""
        free = np.cumsum(kept[low:high]) - kept[low:high]
        out = np.zeros(int(kept[low:high].sum()), dtype=np.uint32)
        for place, (_, counts, path) in zip(places, self._runs, strict=True):
            first, last = np.searchsorted(place, [low, high])
            begin, own = int(counts[:first].sum()), counts[first:last]
            found = np.fromfile(path, dtype=np.uint32, count=int(own.sum()), offset=4 * begin)
            stored = kept[place[first:last]] > 0
            to = place[first:last][stored] - low
            found = found[np.repeat(stored, own)]
            out[ranges(free[to], own[stored])] = found
            free[to] += own[stored]
        return out


class Postings:
    """What `Writer` wrote."""

    def __init__(self, folder: Path) -> None:
        self.names, self.counts, self.ends, self.lengths = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
            for name in ("names", "counts", "ends", "lengths")
        )
        self._postings = mapped(folder / "postings.u32", np.uint32)
        if len(self._postings) != int(self.ends[-1] if len(self.ends) else 0):
            raise ValueError("倒排表的长度不对")

    def find(self, grams: Grams) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each n-gram its place, and how many texts hold it."""
        known, places = places_in(self.names, grams)
        held = np.zeros(len(grams), dtype=np.int64)
        held[known] = self.counts[places[known]]
        return places, held

    def read(self, place: int) -> NDArray[np.uint32]:
        """The list of the n-gram at a place, empty for one that is too frequent."""
        found: NDArray[np.uint32] = self._postings[self.ends[place - 1] if place else 0 : self.ends[place]]
        return found


class Bm25:
    """Scores by several indexes as if they were one: texts are numbered through all of them.

    Args:
        texts: gives the texts that were indexed.
    """

    def __init__(self, indexes: Sequence[Postings], texts: Texts) -> None:
        self._indexes, self._texts = indexes, texts
        self._first = np.cumsum([0, *(len(index.lengths) for index in indexes)])
        self.size = int(self._first[-1])
        self._mean = sum(float(index.lengths.sum(dtype=np.int64)) for index in indexes) / max(1, self.size)

    def query(self, grams: Grams) -> Query:
        """A query's n-grams, repetitions counting, with what they weigh."""
        names, times = np.unique(grams, return_counts=True)
        found = [index.find(names) for index in self._indexes]
        held = np.stack([count for _, count in found]) if found else np.zeros((1, len(names)), dtype=np.int64)
        everywhere = held.sum(axis=0)
        known = everywhere > 0
        idf = np.log(1 + (self.size - everywhere + 0.5) / (everywhere + 0.5))
        places = [place[known] for place, _ in found]
        return Query(names[known], (idf * times)[known].astype(np.float32), places, held[:, known])

    def candidates(self, query: Query, count: int) -> NDArray[np.int64]:
        """Numbers of texts, in no order: the `count` best, or as many as hold any of the n-grams, where no more than
        `READ` postings hold the query's n-grams; else `SCORED` times as many, the best by the rarest n-grams alone."""
        held = query.held.sum(axis=0)
        order = np.argsort(held, kind="stable")
        total = np.cumsum(held[order])
        whole = not len(order) or (int(total[-1]) <= READ and int(query.held.max()) <= LONGEST)
        numbers, scores = self._sums(query, order[: max(1, int(np.searchsorted(total, READ, "right")))])
        return best(numbers, scores, count if whole else SCORED * count)

    def _sums(self, query: Query, read: NDArray[np.int64]) -> tuple[NDArray[np.int64], Floats]:
        """The texts that hold any of some n-grams and what these bring them."""
        lists, parts = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
        for index, first, places, held in zip(self._indexes, self._first, query.places, query.held, strict=False):
            own = read[held[read] > 0]
            found = [index.read(place) for place in places[own].tolist()]
            if not found:
                continue
            postings = np.concatenate(found)
            numbers, times = postings >> _TIMES, (postings & _MOST).astype(np.float32)
            weights = np.repeat(query.weights[own], [len(some) for some in found])
            lists.append(numbers + first)
            parts.append(weights * _saturated(times, index.lengths[numbers], self._mean))
        return _summed(np.concatenate(lists), np.concatenate(parts))

    def scores(self, query: Query, numbers: NDArray[np.int64]) -> Floats:
        """(numbers,) BM25 of some texts."""
        if not len(numbers) or not len(query.names):
            return np.zeros(len(numbers), dtype=np.float32)
        texts = self._texts(numbers)
        sizes = np.array([len(text) for text in texts])
        found = Occurrences(query.names.astype(np.uint64), texts).times()
        times = np.minimum(found, _MOST).astype(np.float32)
        lengths = sizes + np.maximum(sizes - 1, 0)
        scores: Floats = _saturated(times, lengths[:, None], self._mean) @ query.weights
        return scores


class Query:
    """N-grams that some text holds: names, rising, what each weighs (inverse document frequency times repetitions), its
    place in each index, and how many texts of each index hold it, (indexes, n-grams)."""

    def __init__(self, names: Grams, weights: Floats, places: list[NDArray[np.int64]], held: NDArray[np.int64]) -> None:
        self.names, self.weights, self.places, self.held = names, weights, places, held


def _saturated(times: Floats, lengths: NDArray[np.integer], mean: float) -> Floats:
    """Lucene's form of the frequency: times / (times + k1 · (1 − b + b · length / mean length))."""
    rest = K1 * (1 - B) + np.float32(K1 * B / max(mean, 1e-6)) * lengths.astype(np.float32)
    return (times / (times + rest)).astype(np.float32)


def _summed(numbers: NDArray[np.int64], parts: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Each number once, rising, and the sum of its parts."""
    if not len(numbers):
        return numbers, parts
    # Sorted with the bits of their parts behind them, which saves a gather.
    keys = np.sort(numbers.astype(np.uint64) << 32 | parts.view(np.uint32))
    owners = (keys >> 32).astype(np.int64)
    first = firsts(owners)
    return owners[first], np.add.reduceat(keys.astype(np.uint32).view(np.float32), first)


def best(numbers: NDArray[np.int64], scores: Floats, count: int) -> NDArray[np.int64]:
    """Those of the `count` highest scores, in no order."""
    if len(numbers) <= count:
        return numbers
    return numbers[np.argpartition(-scores, count)[:count]]
