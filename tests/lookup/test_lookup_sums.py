"""With torch and without the same sums."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
import torch  # noqa: F401  # loaded, so that both ways can be compared
from hypothesis import given
from hypothesis import strategies as st

from miniglm.lookup.sums import half_products, unit_sums

Result = TypeVar("Result")


def both(work: Callable[[], Result]) -> tuple[Result, Result]:
    """With torch, then without."""
    first = work()
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        return first, work()


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=8))
def test_sums_of_vectors(bags: list[list[int]]) -> None:
    vectors = np.random.default_rng(0).standard_normal((10, 16)).astype(np.float32)
    rows = np.array([n for bag in bags for n in bag], dtype=np.int64)
    starts = np.cumsum([0, *(len(bag) for bag in bags)])[:-1]
    by_torch, by_numpy = both(lambda: unit_sums(vectors, rows, starts))
    assert by_torch.shape == (len(bags), 16) and np.allclose(by_torch, by_numpy, atol=1e-5)
    for bag, found in zip(bags, by_numpy, strict=True):
        wanted = vectors[bag].sum(axis=0) if bag else np.zeros(16)
        assert np.allclose(found, wanted / max(float(np.linalg.norm(wanted)), 1e-12), atol=1e-4)


def test_products_of_halves() -> None:
    generator = np.random.default_rng(1)
    vectors = generator.standard_normal((300, 256)).astype(np.float16) / np.float16(16)
    query = generator.standard_normal(256).astype(np.float32) / np.float32(16)
    by_torch, by_numpy = both(lambda: half_products([vectors[:7], vectors[7:]], query))
    assert np.allclose(by_torch, vectors.astype(np.float64) @ query, atol=5e-3)
    assert np.allclose(by_numpy, vectors.astype(np.float64) @ query, atol=1e-6)
