"""The nearest vectors: exactly, as long as all are looked at, and nearly so where only the nearest lists are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from miniglm.lookup import vectors
from miniglm.lookup.vectors import Nearest, Vectors, write_vectors


def _unit(size: int, seed: int, near: int = 1) -> NDArray[np.float16]:
    """Vectors in `near` bunches."""
    generator = np.random.default_rng(seed)
    middles = generator.normal(size=(near, 16))
    made = middles[generator.integers(near, size=size)] + generator.normal(size=(size, 16)) / 3
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), dtype=np.float16)


def _nearest(folder: Path, parts: list[NDArray[np.float16]]) -> Nearest:
    for number, part in enumerate(parts):
        write_vectors(part, folder / str(number))
    return Nearest([Vectors(folder / str(number)) for number in range(len(parts))])


@pytest.mark.parametrize("sizes", [[1], [0, 3], [700], [1500, 0, 40]])
def test_small_ones_are_searched_exactly(tmp_path: Path, sizes: list[int]) -> None:
    parts = [_unit(size, seed, 4) for seed, size in enumerate(sizes)]
    every, query = np.concatenate(parts).astype(np.float32), _unit(1, 9)[0].astype(np.float32)
    numbers, cosines = _nearest(tmp_path, parts).search(query, 5)
    full = every @ query
    assert np.allclose(cosines, np.sort(full)[::-1][:5], atol=1e-6)
    assert np.allclose(full[numbers], cosines, atol=1e-6)


def test_of_many_the_near_lists_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "LIST", 64)
    monkeypatch.setattr(vectors, "SCANNED", 1000)
    parts = [_unit(3000, 1, 20), _unit(3000, 2, 20)]
    nearest = _nearest(tmp_path, parts)
    every, hits = np.concatenate(parts).astype(np.float32), 0
    for query in every[::600]:
        numbers, cosines = nearest.search(query, 10)
        full = every @ query
        assert np.allclose(full[numbers], cosines, atol=1e-6)
        hits += len(set(numbers.tolist()) & set(np.argsort(-full)[:10].tolist()))
    assert hits >= 0.9 * 100


def test_a_missing_list_is_noticed(tmp_path: Path) -> None:
    write_vectors(_unit(20, 1), tmp_path / "0")
    np.save(tmp_path / "0" / "ends.npy", np.array([19]))
    with pytest.raises(ValueError, match="向量"):
        Vectors(tmp_path / "0")
