"""Batches: nothing lost, nothing doubled, nothing seen that should not be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniglm.dataset import (
    Batches,
    PairRows,
    Pairs,
    TextRows,
    read_pairs,
    read_tokens,
    validation_pair_batches,
    validation_text_batches,
    write_pairs,
    write_tokens,
)
from miniglm.errors import MiniGLMError
from miniglm.model import IGNORE

PREFIX = [901, 902]


def made_pairs(shapes: list[tuple[int, int]]) -> Pairs:
    """Pairs of a question and an answer of these lengths; every token of pair i is 1000 + i, answers' last is 2000 + i."""
    ids, targets, offsets = [], [], [0]
    for i, (question, answer) in enumerate(shapes):
        ids += [1000 + i] * question + [1000 + i] * (answer - 1) + [2000 + i]
        targets += [0] * question + [1] * answer
        offsets.append(len(ids))
    return Pairs(np.array(ids, np.uint32), np.array(targets, np.uint8), np.array(offsets))


shapes = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(24, 80), st.integers(0, 5))
def test_every_pair_comes_once_an_epoch_and_every_row_has_a_target(
    lengths: list[tuple[int, int]], context: int, seed: int
) -> None:
    rows = PairRows(made_pairs(lengths), context, seed, pad_id=0)
    index = 0
    for _ in range(2):  # epochs
        members: Counter[int] = Counter()
        while sum(members.values()) < len(lengths):
            row = rows.row(index)
            inside = rows.members(index)
            members.update(inside)
            assert (row.labels != IGNORE).any()
            for segment, pair in enumerate(inside):
                at = row.segments == segment
                assert set(row.ids[at]) <= {1000 + pair}
                assert list(row.positions[at]) == list(range(at.sum()))
                question, answer = lengths[pair]
                if question + answer <= context + 1:
                    labels = row.labels[at]
                    assert (labels == IGNORE).sum() == question - 1
                    assert labels[-1] == 2000 + pair
            assert (row.labels[row.segments == -1] == IGNORE).all()
            index += 1
        assert members == Counter(range(len(lengths)))
    assert rows.truncated == sum(q + a > context + 1 for q, a in lengths)


def test_a_long_pair_keeps_its_question_and_loses_the_end_of_its_answer() -> None:
    row = PairRows(made_pairs([(20, 100)]), 64, 0, pad_id=0).row(0)
    assert (row.labels[:19] == IGNORE).all() and (row.labels[19:] == 1000).all()  # the closing 2000 is cut off
    long_question = PairRows(made_pairs([(200, 10)]), 64, 0, pad_id=0).row(0)
    assert (long_question.labels != IGNORE).sum() == 8


@settings(max_examples=40, deadline=None)
@given(st.integers(60, 900), st.integers(8, 30), st.integers(0, 3))
def test_an_epoch_of_text_has_no_target_twice(size: int, context: int, seed: int) -> None:
    rows = TextRows(np.arange(size, dtype=np.uint16), context, PREFIX, seed)
    for epoch in range(2):
        seen: list[int] = []
        for i in range(rows.rows_per_epoch):
            row = rows.row(epoch * rows.rows_per_epoch + i)
            assert list(row.ids[:2]) == PREFIX
            labels = row.labels[row.labels != IGNORE]
            assert list(row.ids[2:]) == list(labels[:-1])
            seen += list(labels)
        # One run of the corpus without a gap or an overlap; less than a stride is left at its start, and at its end two.
        assert sorted(seen) == list(range(min(seen), min(seen) + len(seen)))
        assert min(seen) < rows.stride and size - 1 - max(seen) < 2 * rows.stride
    again = TextRows(np.arange(size, dtype=np.uint16), context, PREFIX, seed)
    assert (again.row(rows.rows_per_epoch + 1).ids == rows.row(rows.rows_per_epoch + 1).ids).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 500), st.integers(8, 40), st.integers(1, 5))
def test_validation_text_is_whole(size: int, context: int, rows: int) -> None:
    labels = [b.labels[b.labels != IGNORE] for b in validation_text_batches(np.arange(size), context, PREFIX, rows)]
    assert sorted(torch.cat(labels).tolist()) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 500), st.integers(8, 40), st.integers(1, 9))
def test_a_part_of_the_validation_text_is_rows_of_it(size: int, context: int, every: int) -> None:
    def rows(every: int) -> list[str]:
        return [name for b in validation_text_batches(np.arange(size), context, PREFIX, 3, every) for name in b.rows]

    assert rows(every) == rows(1)[::every] != []


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 9))
def test_a_part_of_the_validation_pairs_is_rows_of_them(lengths: list[tuple[int, int]], every: int) -> None:
    def rows(every: int) -> list[list[int]]:
        return [row.tolist() for b in validation_pair_batches(made_pairs(lengths), 200, 0, 3, every) for row in b.ids]

    assert rows(every) == rows(1)[::every] != []


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_validation_pairs_are_whole(lengths: list[tuple[int, int]]) -> None:
    pairs = made_pairs(lengths)
    batches = list(validation_pair_batches(pairs, 200, 0, 3))
    assert sum(b.targets for b in batches) == sum(a for _, a in lengths)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(24, 80), st.integers(0, 5))
def test_masks_are_causal_and_join_exactly_the_tokens_of_one_pair(
    lengths: list[tuple[int, int]], context: int, seed: int
) -> None:
    batch = Batches(None, PairRows(made_pairs(lengths), context, seed, pad_id=0), rows=3).batch(0)
    assert batch.mask is not None and batch.positions is not None
    ids, mask = batch.ids.numpy(), batch.mask.numpy()  # inputs of pair i are all 1000 + i, padding is 0
    past = np.tril(np.ones((context, context), bool))
    assert (mask[:, 0] == ((ids[:, :, None] == ids[:, None, :]) & past)).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), st.integers(40, 80), st.data())
def test_a_label_is_the_token_that_follows(sizes: list[int], context: int, data: st.DataObject) -> None:
    offsets = np.cumsum([0, *sizes])
    targets = np.concatenate([[0] * (cut := data.draw(st.integers(1, n - 1))) + [1] * (n - cut) for n in sizes])
    rows = PairRows(Pairs(np.arange(1, offsets[-1] + 1), targets, offsets), context, 0, pad_id=0)  # no token twice
    learnt: list[int] = []
    for index in range(rows.rows_per_epoch):
        row = rows.row(index)
        is_target = row.labels != IGNORE
        assert (row.labels[is_target] == row.ids[is_target] + 1).all()
        learnt += row.labels[is_target].tolist()
    assert sorted(learnt) == (np.flatnonzero(targets) + 1).tolist()


def test_micro_batches_make_up_the_batch() -> None:
    text = TextRows(np.arange(2000, dtype=np.uint16), 20, PREFIX, 0)
    pairs = PairRows(made_pairs([(5, 6)] * 30), 20, 0, pad_id=0)
    batches = Batches(text, pairs, rows=6, text_share=0.34)
    whole = batches.batch(3)
    parts = [batches.batch(3, m, 4) for m in range(4)]
    assert sorted(whole.rows) == sorted(name for part in parts for name in part.rows)
    assert sum(name.startswith("text:") for name in whole.rows) == 2
    assert sum(part.targets for part in parts) == whole.targets


def test_arrays_come_back_and_damage_is_named(tmp_path: Path) -> None:
    for largest, dtype in ((60000, np.uint16), (70000, np.uint32)):
        write_tokens(tmp_path / "t.npy", np.array([1, largest]))
        assert read_tokens(tmp_path / "t.npy").tolist() == [1, largest]
        assert read_tokens(tmp_path / "t.npy").dtype == dtype
    write_pairs(tmp_path / "p.npz", [([1, 2, 3], [0, 1, 1]), ([4, 70000], [0, 1])])
    pairs = read_pairs(tmp_path / "p.npz")
    assert [(a.tolist(), b.tolist()) for a, b in (pairs[0], pairs[1])] == [([1, 2, 3], [0, 1, 1]), ([4, 70000], [0, 1])]
    for name, read in (("t.npy", read_tokens), ("p.npz", read_pairs)):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) - 5])
        with pytest.raises(MiniGLMError, match=name):
            read(tmp_path / name)
        with pytest.raises(MiniGLMError, match="missing"):
            read(tmp_path / "missing")
    for offsets in ([], [0, 3, 2], [1, 2], [0, 9, 2]):
        np.savez(tmp_path / "p.npz", ids=np.zeros(2), targets=np.zeros(2), offsets=np.array(offsets, np.int64))
        with pytest.raises(MiniGLMError, match="前后不符"):
            read_pairs(tmp_path / "p.npz")


def test_a_context_longer_than_the_corpus_is_explained() -> None:
    with pytest.raises(MiniGLMError, match=r"上下文 256 .* 100 个 token"):
        TextRows(np.arange(100), 256, PREFIX, 0)
