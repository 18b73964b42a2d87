"""Vectors of length 1 on disk, memory-mapped, in lists of neighbours, so that the nearest are found without a look at all
of them (an inverted file; Sivic and Zisserman 2003, Jégou et al. 2011). Up to `SCANNED` vectors all are looked at, and
the search is exact. Knows nothing of what has the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from miniglm.lookup.postings import mapped
from miniglm.lookup.sums import half_products
from miniglm.lookup.text import ranges

if TYPE_CHECKING:
    import torch

SCANNED = 20_000
"""Vectors that a search looks at, the rest of the last list aside."""
LIST = 512
"""Vectors of a list, on average."""
ROUNDS, LEARNT = 6, 48
"""Rounds of k-means, and vectors of each list that it learns from."""
AT_ONCE = 16_384

Floats = NDArray[np.float32]


def write_vectors(vectors: NDArray[np.float16], folder: Path) -> None:
    """Writes vectors.f16 (list after list), rows.npy (which row of `vectors` each is), ends.npy (of each list) and
    centres.npy (a list's mean, scaled to length 1).

    Args:
        vectors: (vectors, dimensions).
    """
    import torch

    folder.mkdir(parents=True)
    size = len(vectors)
    centres = _centres(vectors, max(1, size // LIST)) if size else torch.zeros(1, vectors.shape[1])
    owners = np.concatenate(
        [np.zeros(0, np.int64)]
        + [_nearest(vectors[start : start + AT_ONCE], centres) for start in range(0, size, AT_ONCE)]
    )
    rows = np.argsort(owners, kind="stable")
    np.save(folder / "rows.npy", rows.astype(np.uint32))
    np.save(folder / "ends.npy", np.cumsum(np.bincount(owners, minlength=len(centres))))
    np.save(folder / "centres.npy", centres.numpy())
    with (folder / "vectors.f16").open("wb") as file:
        for start in range(0, size, AT_ONCE):
            vectors[rows[start : start + AT_ONCE]].tofile(file)


def _nearest(vectors: NDArray[np.float16], centres: torch.Tensor) -> NDArray[np.int64]:
    import torch

    found: NDArray[np.int64] = (torch.from_numpy(vectors.astype(np.float32)) @ centres.T).argmax(dim=1).numpy()
    return found


def _centres(vectors: NDArray[np.float16], count: int) -> torch.Tensor:
    """Spherical k-means (Dhillon and Modha 2001) on an even part of the vectors; an empty list keeps its centre."""
    import torch

    chosen = np.linspace(0, len(vectors) - 1, min(len(vectors), LEARNT * count)).astype(np.int64)
    some = torch.from_numpy(vectors[chosen].astype(np.float32))
    centres = some[torch.linspace(0, len(some) - 1, count).long()].clone()
    for _ in range(ROUNDS):
        owners = torch.cat([(part @ centres.T).argmax(dim=1) for part in torch.split(some, AT_ONCE)])
        sums = torch.zeros_like(centres).index_add_(0, owners, some)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, torch.nn.functional.normalize(sums, dim=1), centres)
    return centres


class Vectors:
    """What `write_vectors` wrote."""

    def __init__(self, folder: Path) -> None:
        self.rows, self.ends, self.centres = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
            for name in ("rows", "ends", "centres")
        )
        found = mapped(folder / "vectors.f16", np.float16)
        self.stored = found.reshape(len(self.rows), self.centres.shape[1])
        if len(self.ends) != len(self.centres) or int(self.ends[-1]) != len(self.rows):
            raise ValueError("向量的个数不对")


class Nearest:
    """Searches several of them as one: vectors are numbered through all, by their rows."""

    def __init__(self, parts: Sequence[Vectors]) -> None:
        self._parts = parts
        self._first = np.cumsum([0, *(len(part.rows) for part in parts)])
        none = np.zeros(0, dtype=np.int64)
        self._sizes = np.concatenate([none, *(np.diff(part.ends, prepend=0) for part in parts)])
        self._starts = np.concatenate([none, *(part.ends for part in parts)]) - self._sizes
        self._owner = np.repeat(np.arange(len(parts)), [len(part.ends) for part in parts])

    def search(self, vector: Floats, count: int) -> tuple[NDArray[np.int64], Floats]:
        """Numbers and cosines of the `count` nearest, or all there are, nearest first: of the lists whose centres are
        nearest, until `SCANNED` vectors were looked at."""
        if not len(self._sizes):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        owners, starts, sizes = self._chosen(vector)
        looked_at = [
            self._parts[owner].stored[start : start + size]
            for owner, start, size in zip(owners.tolist(), starts.tolist(), sizes.tolist(), strict=True)
        ]
        flat = half_products(looked_at, vector)
        # Rounded sums choose twice as many as are wanted, full ones choose among these.
        best = (
            np.sort(np.argpartition(-flat, 2 * count)[: 2 * count]) if len(flat) > 2 * count else np.arange(len(flat))
        )
        rows, owners = ranges(starts, sizes)[best], np.repeat(owners, sizes)[best]
        numbers, cosines = np.zeros(len(best), dtype=np.int64), np.zeros(len(best), dtype=np.float32)
        for owner in np.unique(owners).tolist():
            own, part = owners == owner, self._parts[owner]
            numbers[own] = self._first[owner] + part.rows[rows[own]]
            cosines[own] = part.stored[rows[own]].astype(np.float32) @ vector
        order = np.lexsort((numbers, -cosines))[:count]
        return numbers[order], cosines[order]

    def _chosen(self, vector: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The vectors to look at: owner, start and size of the lists' runs, of which neighbouring ones become one."""
        chosen = np.arange(len(self._sizes))
        if self._sizes.sum() > SCANNED:
            near = np.concatenate([part.centres @ vector for part in self._parts])
            order = np.argsort(-near, kind="stable")
            chosen = np.sort(order[: 1 + int(np.searchsorted(np.cumsum(self._sizes[order]), SCANNED))])
        owners = self._owner[chosen]
        first = np.flatnonzero((np.diff(chosen, prepend=-2) > 1) | (np.diff(owners, prepend=-1) > 0))
        return owners[first], self._starts[chosen[first]], np.add.reduceat(self._sizes[chosen], first)
