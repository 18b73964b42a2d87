"""Two sums that torch makes many times as fast as numpy, and numpy where torch is not loaded: importing it takes longer
than a question from the command line takes with numpy alone (10 milliseconds here, 1,500 there)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def half_products(parts: Sequence[NDArray[np.float16]], query: Floats) -> Floats:
    """(vectors, dimensions) each times (dimensions,), perhaps rounded as float16 is: (vectors of all parts,)."""
    torch = sys.modules.get("torch")
    if torch is None:
        return np.concatenate([part.astype(np.float32) @ query for part in parts])
    half = torch.from_numpy(query).half()
    found: Floats = torch.cat([torch.from_numpy(part) @ half for part in parts]).float().numpy()
    return found


def unit_sums(vectors: Floats, rows: NDArray[np.int64], starts: NDArray[np.int64]) -> Floats:
    """Sums of some of the vectors, scaled to length 1; all zero where nothing is summed.

    Args:
        vectors: (vectors, dimensions).
        rows: numbers of vectors, one sum's after another's; `starts`: where each sum's begin.

    Returns:
        (sums, dimensions)
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        given = (torch.from_numpy(part) for part in (rows, vectors, starts))
        summed = torch.nn.functional.embedding_bag(*given, mode="sum").numpy()
    else:
        ends = np.append(starts, len(rows))[1:]
        summed = np.zeros((len(starts), vectors.shape[1]), dtype=np.float32)
        for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            vectors[rows[start:end]].sum(axis=0, out=summed[number])
    lengths = np.linalg.norm(summed, axis=-1, keepdims=True)
    found: Floats = summed / np.maximum(lengths, np.float32(1e-12))
    return found
