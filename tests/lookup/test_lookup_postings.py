"""BM25 from lists on disk is bm25s's where all lists are read, and a text's own score is right wherever not all are."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from miniglm.lookup import postings
from miniglm.lookup.lexical import Lexical
from miniglm.lookup.postings import Bm25, Postings, Writer
from miniglm.lookup.text import Plain, grams, plain

TEXTS = st.lists(st.text(alphabet="曹操刘备关羽张飞", max_size=12), min_size=1, max_size=12)


def _bm25(folder: Path, texts: list[Plain], parts: int, block: int) -> Bm25:
    """Of the texts in so many indexes, each written in blocks."""
    cut = np.array_split(np.arange(len(texts)), parts)
    for number, own in enumerate(cut):
        writer = Writer(folder / str(number))
        for start in range(0, len(own), block):
            some = [texts[n] for n in own[start : start + block]]
            ends = np.cumsum([len(text) for text in some])
            writer.add(np.concatenate(some), ends - [len(text) for text in some], ends)
        writer.finish()

    def give(numbers: NDArray[np.int64]) -> list[Plain]:
        return [texts[n] for n in numbers.tolist()]

    return Bm25([Postings(folder / str(number)) for number in range(parts)], give)


@settings(deadline=None, max_examples=60)
@given(TEXTS, st.text(alphabet="曹操刘备关羽张飞x", max_size=8), st.integers(1, 3), st.integers(1, 5))
def test_all_lists_read_is_full_scoring(written: list[str], asked: str, parts: int, block: int) -> None:
    texts, question = [plain(text) for text in written], grams(plain(asked))
    full = Lexical.build(texts).scores(question)
    with TemporaryDirectory() as folder:
        bm25 = _bm25(Path(folder), texts, parts, block)
        query = bm25.query(question)
        every = np.arange(len(texts))
        assert np.allclose(bm25.scores(query, every), full, atol=1e-5)
        for count in (1, 3):
            found = bm25.candidates(query, count)
            assert len(set(found.tolist())) == len(found) == min(count, int((full > 0).sum()))
            # Which of several equal ones is as one likes; that none that is better was left out is not.
            assert np.allclose(np.sort(full[found]), np.sort(full)[len(full) - len(found) :], atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(TEXTS, st.text(alphabet="曹操刘备", min_size=1, max_size=6), st.integers(1, 20))
def test_rare_lists_alone_bring_what_holds_the_rarest(written: list[str], asked: str, read: int) -> None:
    texts, question = [plain(text) for text in written], grams(plain(asked))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        bm25 = _bm25(Path(folder), texts, 1, 5)
        query = bm25.query(question)
        patch.setattr(postings, "READ", read)
        found = set(bm25.candidates(query, len(texts)).tolist())
        if len(query.names):
            rarest = query.names[query.held.sum(axis=0).argmin()]
            assert found >= {n for n, text in enumerate(texts) if rarest in grams(text)}
        assert all(np.isin(grams(texts[n]), query.names).any() for n in found)


def test_lists_that_are_too_long_are_counted_but_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [plain(text) for text in ("曹操", "曹丕", "曹植", "刘备")]
    whole = _bm25(tmp_path / "whole", texts, 1, 2)
    monkeypatch.setattr(postings, "LONGEST", 2)
    short = _bm25(tmp_path / "short", texts, 1, 2)
    question = grams(plain("曹操"))
    every = np.arange(4)
    assert np.array_equal(short.scores(short.query(question), every), whole.scores(whole.query(question), every))
    # 曹 is in three texts: those without the other n-grams are not brought, and nothing is said to be exact.
    assert short.candidates(short.query(question), 4).tolist() == [0]
    assert sorted(whole.candidates(whole.query(question), 4).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("merged", [1, 3, 1000])
def test_merging_piece_by_piece_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merged: int) -> None:
    texts = [plain(text) for text in ("曹操见曹操", "刘备关羽", "", "张飞见刘备", "曹操刘备")]
    monkeypatch.setattr(postings, "MERGED", merged)
    _bm25(tmp_path, texts, 1, 2)
    index = Postings(tmp_path / "0")
    for name, place in zip(index.names, range(len(index.names)), strict=True):
        held = [(n, int((grams(text) == name).sum())) for n, text in enumerate(texts) if name in grams(text)]
        assert [(int(p) >> 8, int(p) & 255) for p in index.read(place)] == held
    assert {path.name for path in (tmp_path / "0").iterdir()} == {
        "names.npy", "counts.npy", "ends.npy", "lengths.npy", "postings.u32",
    }  # fmt: skip


def test_a_cut_file_is_noticed(tmp_path: Path) -> None:
    _bm25(tmp_path, [plain("曹操刘备")], 1, 1)
    file = tmp_path / "0" / "postings.u32"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="倒排表"):
        Postings(tmp_path / "0")
