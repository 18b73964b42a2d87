"""Token arrays on disk and the batches drawn from them. Knows token ids, nothing of text or of the model's inside.

A batch is a pure function of the seed and the step, so a run's data state is its step alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miniglm.errors import MiniGLMError
from miniglm.files import write_whole, written_whole
from miniglm.model import IGNORE

MINIMUM_TARGET_ROOM = 8
"""Tokens that a question leaves for its answer, however long it is."""
OPEN_ROWS = 32
"""Rows that are open at once while pairs are packed: a larger number packs tighter and takes longer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.

    Attributes:
        ids: (rows, context) token ids.
        labels: (rows, context); the token that follows, or `IGNORE` where it is no target.
        positions: (rows, context), anew in each pair; None where they simply count up.
        segments: (rows, context), the number of the pair that a position belongs to; None where rows are whole.
        rows: what was drawn, for the log.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor | None
    segments: Tensor | None
    rows: list[str]

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def mask(self) -> Tensor | None:
        """(rows, 1, context, context), true where a position may look; None for plain causal. Made where the batch
        is: it is as large as all the rest of it a hundred times over."""
        if self.segments is None:
            return None
        length, segments = self.ids.shape[1], self.segments
        causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        # Padding is a segment of its own: it looks at itself, so no row of the softmax is empty.
        return ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]

    def part(self, rows: slice) -> Batch:
        """Some of its rows."""
        positions, segments = (None if t is None else t[rows] for t in (self.positions, self.segments))
        return Batch(self.ids[rows], self.labels[rows], positions, segments, self.rows[rows])

    def without_targets(self) -> Batch:
        """The same batch with nothing to learn in it."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE), rows=[])

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return Batch(self.ids.to(device), self.labels.to(device), move(self.positions), move(self.segments), self.rows)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batch, each array (context,). `segments` numbers the pairs; padding is -1."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]


def write_tokens(path: Path, ids: NDArray[Any]) -> None:
    """Writes token ids as .npy, two bytes each where they fit, whole or not at all."""
    largest = int(ids.max()) if len(ids) else 0
    with written_whole(path) as file:
        np.save(file, ids.astype(np.uint16 if largest < 2**16 else np.uint32, copy=False), allow_pickle=False)


def read_tokens(path: Path) -> NDArray[Any]:
    """Memory-maps what `write_tokens` wrote.

    Raises:
        MiniGLMError: missing, cut short or something else.
    """
    try:
        tokens: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise MiniGLMError(
            f"token 文件缺失或损坏（{error}）", path=path, fix="删去运行目录里的 tokens/ 再运行"
        ) from None
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise MiniGLMError(f"不是 token 文件（{tokens.dtype}，{tokens.ndim} 维）", path=path, fix="删去 tokens/ 再运行")
    return tokens


class TokenShards:
    """Token arrays one after another as if they were one, each memory-mapped: its length and slices of it."""

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, part: slice) -> NDArray[Any]:
        start, stop, _ = part.indices(len(self))
        found = []
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[number + 1]))
            found.append(self.parts[number][start - self.starts[number] : end - self.starts[number]])
            start, number = end, number + 1
        return found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, np.uint16)])


class Pairs:
    """Encoded question-answer pairs: one flat array of ids, one of targets, and where each pair begins."""

    def __init__(self, ids: NDArray[Any], targets: NDArray[Any], offsets: NDArray[Any]) -> None:
        self.ids, self.targets, self.offsets = ids, targets, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.targets[part]


def write_pairs(path: Path, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Writes (ids, 0/1 targets) of each pair as .npz, whole or not at all."""
    lengths = [len(ids) for ids, _ in examples]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=np.fromiter((i for ids, _ in examples for i in ids), np.uint32, sum(lengths)),
        targets=np.fromiter((t for _, targets in examples for t in targets), np.uint8, sum(lengths)),
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
    )
    write_whole(path, buffer.getvalue())


def read_pairs(path: Path) -> Pairs:
    """Reads what `write_pairs` wrote.

    Raises:
        MiniGLMError: missing, cut short or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            pairs = Pairs(data["ids"], data["targets"], data["offsets"])
    except Exception as error:  # zipfile, zlib, numpy and the system each raise their own
        raise MiniGLMError(f"问答的 token 文件缺失或损坏（{error}）", path=path, fix="删去 tokens/ 再运行") from None
    offsets = pairs.offsets
    whole = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == len(pairs.ids) == len(pairs.targets)
    if not whole or (np.diff(offsets) < 0).any():
        raise MiniGLMError("问答的 token 文件前后不符", path=path, fix="删去 tokens/ 再运行")
    return pairs


class TextRows:
    """Rows of running text: a prefix that is never a target, then a window. Every epoch cuts the corpus anew, at
    another offset, and reads the windows in another order; within an epoch no token is a target twice."""

    def __init__(self, tokens: NDArray[Any] | TokenShards, context: int, prefix: Sequence[int], seed: int) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        self.prefix = np.asarray(prefix, dtype=np.int64)
        self.stride = context - len(prefix) + 1
        """Targets of a row: the window's tokens, the first of which follows the prefix."""
        if self.stride < 1 or len(tokens) < 2 * self.stride:
            raise MiniGLMError(
                f"上下文 {context} 太长：训练部分只有 {len(tokens)} 个 token，至少要 {2 * self.stride} 个",
                fix=f"把配方里 model.context 设为不超过 {max(16, len(tokens) // 4)}，或给出更长的书",
            )
        # One stride is kept for the offset, so that every epoch has the same number of rows.
        self.rows_per_epoch = len(tokens) // self.stride - 1
        self._epoch, self._order, self._offset = -1, np.empty(0, np.int64), 0

    def row(self, index: int) -> Row:
        """Row `index` of an endless sequence of epochs."""
        epoch, within = divmod(index, self.rows_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._offset = int(rng.integers(self.stride))
            self._order = rng.permutation(self.rows_per_epoch)
            self._epoch = epoch
        start = self._offset + int(self._order[within]) * self.stride
        return text_row(self.tokens[start : start + self.stride], self.prefix, self.context)


def text_row(window: NDArray[Any], prefix: NDArray[np.int64], context: int) -> Row:
    """A row of the prefix and a window of at most context - len(prefix) + 1 tokens, padded at its end."""
    sequence = np.concatenate((prefix, np.asarray(window, dtype=np.int64)))
    ids = np.zeros(context, np.int64)
    labels = np.full(context, IGNORE, np.int64)
    segments = np.full(context, -1, np.int64)
    size = len(sequence) - 1
    ids[:size] = sequence[:-1]
    labels[len(prefix) - 1 : size] = sequence[len(prefix) :]
    segments[:size] = 0
    return Row(ids, labels, np.arange(context), segments)


def fit_pair(ids: NDArray[Any], targets: NDArray[Any], context: int) -> tuple[NDArray[Any], NDArray[Any], bool]:
    """A pair cut to `context` + 1 tokens: the end of its answer goes first. Where the question alone leaves less than
    `MINIMUM_TARGET_ROOM`, its beginning goes too, so that something to learn remains. The flag says whether it was cut."""
    limit = context + 1
    if len(ids) <= limit:
        return ids, targets, False
    first = int(np.argmax(targets > 0))
    start = max(0, first - (limit - MINIMUM_TARGET_ROOM))
    return ids[start : start + limit], targets[start : start + limit], True


def pack(lengths: Sequence[int], context: int) -> list[list[int]]:
    """Indices of the pairs of each row: each goes into the fullest open row that has room (best fit)."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, list[int]]] = []  # (room left, pairs)
    for index, length in enumerate(lengths):
        best = min((r for r in open_rows if r[0] >= length), key=lambda r: r[0], default=None)
        if best is None:
            open_rows.append((context - length, [index]))
            if len(open_rows) > OPEN_ROWS:
                fullest = min(open_rows, key=lambda r: r[0])
                open_rows.remove(fullest)
                rows.append(fullest[1])
        else:
            open_rows.remove(best)
            best[1].append(index)
            open_rows.append((best[0] - length, best[1]))
    return rows + [pairs for _, pairs in open_rows]


class PairRows:
    """Rows of packed question-answer pairs. Every epoch shuffles and packs anew; within one each pair comes once."""

    def __init__(self, pairs: Pairs, context: int, seed: int, pad_id: int) -> None:
        self.context, self.seed, self.pad_id = context, seed, pad_id
        fitted = [fit_pair(*pairs[i], context) for i in range(len(pairs))]
        self.pairs = [(ids.astype(np.int64), targets) for ids, targets, _ in fitted]
        self.truncated = sum(cut for _, _, cut in fitted)
        """Pairs longer than the context, which lost the end of their answer."""
        if not self.pairs:
            raise ValueError("no pairs")
        self._starts = [0]
        self._packed: dict[int, list[list[int]]] = {}
        self.rows_per_epoch = len(self._epoch(0))

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._packed:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.pairs))
            packed = pack([len(self.pairs[i][0]) - 1 for i in order], self.context)
            shuffled = np.random.default_rng((self.seed, epoch, 1)).permutation(len(packed))
            self._packed = {epoch: [[int(order[i]) for i in packed[r]] for r in shuffled]}
        return self._packed[epoch]

    def members(self, index: int) -> list[int]:
        """Which pairs row `index` of the endless sequence of epochs holds."""
        while self._starts[-1] <= index:  # epochs differ in length: count them up once
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._epoch(epoch)[index - self._starts[epoch]]

    def row(self, index: int) -> Row:
        """Row `index`: its pairs one after another, each at positions from 0, padded at the end."""
        return pair_row([self.pairs[i] for i in self.members(index)], self.context, self.pad_id)


def pair_row(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]], context: int, pad_id: int) -> Row:
    """A row of pairs that do not see each other."""
    ids = np.full(context, pad_id, np.int64)
    labels = np.full(context, IGNORE, np.int64)
    positions = np.zeros(context, np.int64)
    segments = np.full(context, -1, np.int64)
    at = 0
    for number, (pair, targets) in enumerate(pairs):
        sequence = pair.astype(np.int64)  # unsigned ids cannot take IGNORE
        size = len(sequence) - 1
        part = slice(at, at + size)
        ids[part] = sequence[:-1]
        labels[part] = np.where(targets[1:] > 0, sequence[1:], IGNORE)
        positions[part] = np.arange(size)
        segments[part] = number
        at += size
    return Row(ids, labels, positions, segments)


def collate(rows: Sequence[Row], names: list[str], *, packed: bool) -> Batch:
    """Stacks rows. `packed` says that some hold several sequences, so positions and segments are needed."""
    ids = torch.from_numpy(np.stack([r.ids for r in rows]))
    labels = torch.from_numpy(np.stack([r.labels for r in rows]))
    if not packed:
        return Batch(ids, labels, None, None, names)
    positions = torch.from_numpy(np.stack([r.positions for r in rows]))
    segments = torch.from_numpy(np.stack([r.segments for r in rows]))
    return Batch(ids, labels, positions, segments, names)


class Batches:
    """Batches of text rows, of pair rows, or of both.

    Args:
        rows: of a whole batch.
        text_share: share of them that is text where both are given.
    """

    def __init__(self, text: TextRows | None, pairs: PairRows | None, rows: int, text_share: float = 1.0) -> None:
        if text is None and pairs is None:
            raise ValueError("neither text nor pairs")
        self.text, self.pairs, self.rows = text, pairs, rows
        self.context = pairs.context if text is None and pairs is not None else text.context  # type: ignore[union-attr]
        if pairs is None:
            self.text_rows = rows
        elif text is None:
            self.text_rows = 0
        else:  # at least one row of each, if there is room
            self.text_rows = min(max(round(rows * text_share), 1), rows - 1) if rows > 1 else 0
        self._ahead: tuple[tuple[int, int, int], Batch] | None = None

    def names(self, step: int) -> list[str]:
        """The rows of the whole batch of `step`, as `Batch.rows` calls them."""
        pair_rows = self.rows - self.text_rows
        pairs = [f"pairs:{step * pair_rows + place}" for place in range(pair_rows)]
        return pairs + [f"text:{step * self.text_rows + place}" for place in range(self.text_rows)]

    def batch(self, step: int, micro: int = 0, micros: int = 1) -> Batch:
        """Part `micro` of `micros` of the batch of `step`; the parts make up the same rows whatever their number. Of
        more parts than rows, each of those left over is a row without targets."""
        if self._ahead is not None and self._ahead[0] == (step, micro, micros):
            return self._ahead[1]
        return self._draw(step, micro, micros)

    def prepare(self, step: int, micro: int = 0, micros: int = 1) -> None:
        """Draws the part that `batch` will be asked for next, while a GPU computes the one before."""
        self._ahead = ((step, micro, micros), self._draw(step, micro, micros))

    def _draw(self, step: int, micro: int, micros: int) -> Batch:
        drawn: list[Row] = []
        names: list[str] = []
        pair_rows = self.rows - self.text_rows
        for place in range(micro, self.rows, micros) or range(1):
            if place < pair_rows and self.pairs is not None:
                index = step * pair_rows + place
                drawn.append(self.pairs.row(index))
                names.append(f"pairs:{index}")
            elif self.text is not None:
                index = step * self.text_rows + place - pair_rows
                drawn.append(self.text.row(index))
                names.append(f"text:{index}")
        found = collate(drawn, names, packed=self.pairs is not None)
        return found if micro < self.rows else found.without_targets()


def validation_text_batches(
    tokens: NDArray[Any], context: int, prefix: Sequence[int], rows: int, every: int = 1
) -> Iterator[Batch]:
    """The whole text, every token a target exactly once; or every so-manieth row of that."""
    start_ids = np.asarray(prefix, dtype=np.int64)
    stride = context - len(prefix) + 1
    starts = range(0, len(tokens), stride)[::every]
    for first in range(0, len(starts), rows):
        part = starts[first : first + rows]
        yield collate(
            [text_row(tokens[s : s + stride], start_ids, context) for s in part],
            [f"text:{s}" for s in part],
            packed=False,
        )


def validation_pair_batches(pairs: Pairs, context: int, pad_id: int, rows: int, every: int = 1) -> Iterator[Batch]:
    """All pairs, each once, packed in order of length; or every so-manieth row of that."""
    fitted = [fit_pair(*pairs[i], context)[:2] for i in range(len(pairs))]
    order = sorted(range(len(fitted)), key=lambda i: -len(fitted[i][0]))
    packed = pack([len(fitted[i][0]) - 1 for i in order], context)[::every]
    for first in range(0, len(packed), rows):
        part = packed[first : first + rows]
        made = [pair_row([fitted[order[i]] for i in members], context, pad_id) for members in part]
        yield collate(made, [f"pairs:{first + i}" for i in range(len(part))], packed=True)
