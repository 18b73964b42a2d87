"""The books as passages to search: text, places, inverted index and vectors, on disk and memory-mapped, one folder a
shard.

A shard is a book, or a part of one that is very long, so that adding a book builds that book's shards alone. Building
takes memory for one shard's vectors and for a block of text, whatever the size of all; searching reads what it needs
from disk. Knows nothing of questions with known answers.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniglm.corpus import Paragraph
from miniglm.files import write_whole
from miniglm.lookup.encoder import Encoder
from miniglm.lookup.fault import damaged
from miniglm.lookup.postings import Bm25, Postings, Writer, best, mapped
from miniglm.lookup.text import (
    CONTEXT,
    Grams,
    Plain,
    Span,
    bytes_before,
    grams,
    passages,
    plain_with_places,
    sentences,
)
from miniglm.lookup.vectors import Nearest, Vectors, write_vectors

SHARD = 600_000
"""Passages in a shard at most, or thereabouts."""
STEP = 60
"""Characters after which a new passage begins, on average."""
BLOCK = 2_000_000
"""Characters that are indexed at once."""
AROUND = 1
"""Paragraphs that are shown before and after one."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage of a book and where it stands.

    Attributes:
        chapter: the heading's number, 0 before the first; `chapter_title`: the heading, "" before the first.
        paragraph: 1-based number of the paragraph in the book, headings included; `start`: where in it it begins.
    """

    book: str
    chapter: int
    chapter_title: str
    paragraph: int
    start: int
    text: str


class Shard:
    """One folder of passages; see `build_shard`."""

    def __init__(self, folder: Path) -> None:
        try:
            self.about: dict[str, Any] = json.loads((folder / "shard.json").read_text("utf-8"))
            # Plain arrays over the mapped files: np.memmap's own slicing is slow.
            self._paragraphs, self._passages = (
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
                for name in ("paragraphs", "passages")
            )
            self._plain = mapped(folder / "plain.u16", np.uint16)
            self._text = mapped(folder / "text.txt", np.uint8)
            self.size = len(self._passages)
            self.postings = Postings(folder / "postings")
            self.vectors = Vectors(folder / "vectors")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise damaged(f"检索的索引读不出来（{error}）", folder) from None
        if not len(self.postings.lengths) == len(self.vectors.rows) == self.size:
            raise damaged("检索的索引不完整", folder)

    def _read(self, start: int, end: int) -> str:
        return self._text[start:end].tobytes().decode("utf-8")

    def passage(self, number: int) -> Passage:
        """The passage of that number."""
        row, start, end = self._passages[number, :3].tolist()
        paragraph, chapter, title, begin = self._paragraphs[row].tolist()
        before = len(self._read(begin, start))
        return Passage(
            self.about["book"], chapter, self.about["titles"][title], paragraph, before, self._read(start, end)
        )

    def row(self, paragraph: int) -> int | None:
        """Which row the paragraph of that number has here, if any."""
        numbers = self._paragraphs[:, 0]
        row = int(np.searchsorted(numbers, paragraph))
        return row if row < len(numbers) and numbers[row] == paragraph else None

    def line(self, row: int) -> str:
        """The paragraph of a row."""
        rows = self._paragraphs
        end = int(rows[row + 1, 3]) if row + 1 < len(rows) else len(self._text)
        return self._read(int(rows[row, 3]), end).removesuffix("\n")

    def around(self, row: int) -> tuple[str, list[tuple[int, str]]]:
        """See `Library.around`."""
        rows = self._paragraphs
        near = range(max(0, row - AROUND), min(len(rows), row + AROUND + 1))
        found = [(int(rows[n, 0]), self.line(n)) for n in near if (rows[n, 1:3] == rows[row, 1:3]).all()]
        return self.about["titles"][int(rows[row, 2])], found

    def plains(self, numbers: NDArray[np.int64]) -> list[Plain]:
        """The characters of the passages of those numbers."""
        return [self._plain[start:end] for start, end in self._passages[numbers, 3:].tolist()]

    def context(self, number: int) -> tuple[Plain, int, int]:
        """See `Library.context`."""
        first = max(0, number - CONTEXT)
        around = self._passages[first : number + CONTEXT + 1]
        chapters = self._paragraphs[around[:, 0], 1:3].tolist()
        own = chapters[number - first]
        same = [row[3:] for row, chapter in zip(around.tolist(), chapters, strict=True) if chapter == own]
        begin, (start, end) = same[0][0], around[number - first, 3:].tolist()
        return self._plain[begin : max(last for _, last in same)], start - begin, end - begin


def build_shard(paragraphs: Iterable[Paragraph], encoder: Encoder, folder: Path, fingerprint: str) -> None:
    """Writes the folder of a shard of one book, whole or not at all: text.txt (paragraphs, one a line), paragraphs.npy
    (number, chapter, row of its title, first byte), plain.u16 (`plain` of them all), passages.npy (row in
    paragraphs.npy, first byte, end, first place in plain.u16, end), postings/, vectors/ and shard.json."""
    made = folder.with_name(f".{folder.name}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    titles: dict[str, int] = {}
    rows: list[tuple[int, int, int, int]] = []
    places = [np.zeros((0, 5), np.int64)]
    byte = character = 0
    book = ""
    postings = Writer(made / "postings")
    unsorted = made / "unsorted.f16"
    with contextlib.ExitStack() as stack:
        text_file, plain_file, vector_file = (
            stack.enter_context(path.open("wb")) for path in (made / "text.txt", made / "plain.u16", unsorted)
        )
        for block in _blocks(paragraphs):
            book = block[0].book
            written, plains = [], []
            spans = {n: list(own) for n, own in itertools.groupby(passages(block), key=lambda span: span.paragraph)}
            begun = character
            for n, p in enumerate(block):
                own, found = _places(p.text, spans.get(n, []), len(rows), byte, character)
                rows.append((p.number, p.chapter_number, titles.setdefault(p.chapter, len(titles)), byte))
                places.append(own)
                plains.append(found)
                written.append(f"{p.text}\n".encode())
                byte, character = byte + len(written[-1]), character + len(found)
            text_file.write(b"".join(written))
            flat = np.concatenate(plains)
            flat.tofile(plain_file)
            new = np.concatenate(places[-len(block) :])
            starts, ends = new[:, 3] - begun, new[:, 4] - begun
            postings.add(flat, starts, ends)
            numbers = encoder.vocabulary.numbers(grams(flat))
            encoder.parts(numbers, starts, ends).astype(np.float16).tofile(vector_file)
    postings.finish()
    write_vectors(mapped(unsorted, np.float16).reshape(-1, encoder.vectors.shape[1]), made / "vectors")
    unsorted.unlink()
    np.save(made / "paragraphs.npy", np.array(rows, dtype=np.int64).reshape(-1, 4))
    np.save(made / "passages.npy", np.concatenate(places))
    about = {"book": book, "titles": list(titles), "fingerprint": fingerprint}
    write_whole(made / "shard.json", json.dumps(about, ensure_ascii=False) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)


def _blocks(paragraphs: Iterable[Paragraph]) -> Iterator[list[Paragraph]]:
    block: list[Paragraph] = []
    characters = 0
    for p in paragraphs:
        block.append(p)
        characters += len(p.text)
        if characters >= BLOCK:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _places(text: str, spans: Sequence[Span], row: int, byte: int, character: int) -> tuple[NDArray[np.int64], Plain]:
    """The rows of passages.npy of a paragraph's passages, where it begins at these places, and its characters."""
    edges = np.array([(span.start, span.end) for span in spans], dtype=np.int64).reshape(-1, 2)
    found, plain_edges = plain_with_places(text, edges.ravel())
    numbers = np.full((len(spans), 1), row)
    in_text, in_plain = byte + bytes_before(text, edges.ravel()), character + plain_edges
    return np.concatenate([numbers, in_text.reshape(-1, 2), in_plain.reshape(-1, 2)], axis=1), found


class Library:
    """All shards of a folder, in the corpus's order, whatever order they were built in: passages have the numbers that
    they have in `passages` of the whole corpus."""

    def __init__(self, folder: Path) -> None:
        try:
            names = json.loads((folder / "order.json").read_text("utf-8"))["books"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise damaged(f"检索的索引读不出来（{error}）", folder) from None
        self.shards = [Shard(folder / name) for name in names]
        self._first = np.cumsum([0, *(shard.size for shard in self.shards)])
        self._begins = self._first[:-1].tolist()
        self._lexical = Bm25([shard.postings for shard in self.shards], self.plains)
        self._nearest = Nearest([shard.vectors for shard in self.shards])

    @property
    def size(self) -> int:
        """Passages in all."""
        return int(self._first[-1])

    def _place(self, number: int) -> tuple[Shard, int]:
        """The shard of a passage that is counted through all, and its number there."""
        shard = bisect.bisect_right(self._begins, number) - 1
        return self.shards[shard], number - self._begins[shard]

    def passage(self, number: int) -> Passage:
        """The passage of that number, counted through all shards."""
        shard, own = self._place(number)
        return shard.passage(own)

    def plains(self, numbers: NDArray[np.int64]) -> list[Plain]:
        """The characters of several passages, whose numbers rise."""
        edges = np.searchsorted(numbers, self._first)
        parts = [numbers[low:high] - first for low, high, first in zip(edges, edges[1:], self._first, strict=False)]
        return [text for shard, own in zip(self.shards, parts, strict=True) for text in shard.plains(own)]

    def context(self, number: int) -> tuple[Plain, int, int]:
        """The characters of the passage of that number with those before and after it in its chapter, and where among
        them it begins and ends itself."""
        shard, own = self._place(number)
        return shard.context(own)

    def around(self, book: str, paragraph: int) -> tuple[str, list[tuple[int, str]]]:
        """The heading of a paragraph's chapter, and that paragraph with `AROUND` before and after it in the chapter,
        (number, text) each.

        Raises:
            LookupError: there is no such book or paragraph.
        """
        shard, row = self._row(book, paragraph)
        return shard.around(row)

    def _row(self, book: str, paragraph: int) -> tuple[Shard, int]:
        for shard in self.shards:
            if shard.about["book"] == book and (row := shard.row(paragraph)) is not None:
                return shard, row
        raise LookupError(f"{book} {paragraph}")

    def _line(self, passage: Passage) -> str:
        """The paragraph that it is in."""
        shard, row = self._row(passage.book, passage.paragraph)
        return shard.line(row)

    def beside(self, passage: Passage, most: int) -> tuple[str, str]:
        """The whole sentences of its paragraph before and after a passage that make up `most` characters with it, as many
        after it as before it, as far as there are some."""
        text = self._line(passage)
        start, end = passage.start, passage.start + len(passage.text)
        first, last = start, end
        cut = sentences(text)
        before, after = [s for s, e in cut if e <= start], [e for s, e in cut if s >= end]
        while before or after:
            # The shorter side goes on; one that would become too long is done.
            side = before if before and (not after or start - first <= last - end) else after
            low, high = (side[-1], last) if side is before else (first, side[0])
            if high - low > most:
                side.clear()
                continue
            side.pop(-1 if side is before else 0)
            first, last = low, high
        return text[first:start], text[end:last]

    def joined(self, one: Passage, other: Passage) -> Passage:
        """Two passages of a paragraph and what is between them as one."""
        text = self._line(one)
        start = min(one.start, other.start)
        end = max(one.start + len(one.text), other.start + len(other.text))
        return replace(one, start=start, text=text[start:end])

    def search(self, question: Grams, vector: NDArray[np.float32], count: int) -> list[tuple[int, float, float]]:
        """The `count` most similar by BM25 and as many by vector: (number, BM25, cosine or NaN), in no order. What is
        exact of it and what is not in a large library: see `Bm25.candidates` and `Nearest.search`."""
        query = self._lexical.query(question)
        near, cosines = self._nearest.search(vector, count)
        cosine = dict(zip(near.tolist(), cosines.tolist(), strict=True))
        numbers = np.union1d(self._lexical.candidates(query, count), near)
        scores = self._lexical.scores(query, numbers)
        top = set(best(numbers, scores, count).tolist()) | cosine.keys()
        return [
            (n, score, cosine.get(n, float("nan")))
            for n, score in zip(numbers.tolist(), scores.tolist(), strict=True)
            if n in top
        ]


@dataclass(frozen=True, slots=True)
class Part:
    """What becomes a shard: paragraphs of one book, read when they are needed, and what they follow from."""

    source: str
    paragraphs: Callable[[], Iterable[Paragraph]]


def build_library(parts: Iterable[Part], encoder: Encoder, digest: str, folder: Path) -> int:
    """Brings the folder's shards up to these parts, building what is new or changed and removing what is gone.

    Args:
        digest: of the encoder; vectors of another one are of no use.

    Returns:
        How many shards were built.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {}
    for path in folder.glob("[0-9]*"):
        try:
            known[json.loads((path / "shard.json").read_text("utf-8"))["fingerprint"]] = path
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path)
    number = 1 + max((int(path.name) for path in known.values()), default=-1)
    built, order = 0, []
    for part in parts:
        fingerprint = hashlib.sha256(f"{digest}\t{part.source}".encode()).hexdigest()
        if fingerprint not in known:
            known[fingerprint] = folder / f"{number:04d}"
            build_shard(part.paragraphs(), encoder, known[fingerprint], fingerprint)
            number, built = number + 1, built + 1
        order.append(known[fingerprint].name)
    write_whole(folder / "order.json", json.dumps({"books": order}) + "\n")
    for path in known.values():
        if path.name not in order:
            shutil.rmtree(path)
    return built


def parts_of(paragraphs: Sequence[Paragraph]) -> list[Part]:
    """The paragraphs of each book, in order; a long book's in parts of some `SHARD` passages."""
    runs: list[list[Paragraph]] = []
    characters = 0
    for p in paragraphs:
        if not runs or runs[-1][-1].book != p.book or characters > SHARD * STEP:
            runs.append([])
            characters = 0
        runs[-1].append(p)
        characters += len(p.text)
    return [Part(_source(run), lambda run=run: run) for run in runs]  # type: ignore[misc]


def _source(paragraphs: Sequence[Paragraph]) -> str:
    digest = hashlib.sha256()
    for p in paragraphs:
        digest.update(f"{p.book}\t{p.chapter_number}\t{p.chapter}\t{p.number}\t{p.text}\n".encode())
    return digest.hexdigest()
