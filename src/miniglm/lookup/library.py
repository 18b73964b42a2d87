"""The books as passages to search: text, places, BM25 and vectors, on disk and memory-mapped, one folder a shard.

A shard is a book, or a part of one that is very long, so that adding a book builds that book's shards alone and
building takes memory for one shard. Vectors are in a usearch index (HNSW; Malkov and Yashunin 2018). Knows nothing of
questions with known answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniglm.corpus import Paragraph
from miniglm.errors import MiniGLMError
from miniglm.files import write_whole
from miniglm.lookup.encoder import Encoder
from miniglm.lookup.lexical import Lexical
from miniglm.lookup.text import CONTEXT, Grams, Plain, passages, plain, sentences

SHARD = 100_000
"""Passages in a shard at most."""
AROUND = 1
"""Paragraphs that are shown before and after one."""
_AGAIN = "删去运行目录里的 index，再运行 miniglm index"


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
        from usearch.index import Index

        try:
            self.about: dict[str, Any] = json.loads((folder / "shard.json").read_text("utf-8"))
            # Plain arrays over the mapped files: np.memmap's own slicing is slow.
            self._paragraphs, self._passages, self._plain = (
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
                for name in ("paragraphs", "passages", "plain")
            )
            self._text = np.memmap(folder / "text.txt", dtype=np.uint8, mode="r").view(np.ndarray)
            self.size = len(self._passages)
            self.lexical = Lexical.load(folder / "lexical", self.size)
            self.vectors: Any = Index.restore(str(folder / "vectors.usearch"), view=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise MiniGLMError(f"检索的索引读不出来（{error}）", path=folder, fix=_AGAIN) from None
        if self.vectors is None or len(self.vectors) != self.size:
            raise MiniGLMError("检索的索引不完整", path=folder, fix=_AGAIN)

    def _read(self, start: int, end: int) -> str:
        return self._text[start:end].tobytes().decode("utf-8")

    def passage(self, number: int) -> Passage:
        """The passage of that number."""
        row, start, end = self._passages[number, :3].tolist()
        paragraph, chapter, begin = self._paragraphs[row].tolist()
        heading = self.about["chapters"][chapter]
        before = len(self._read(begin, start))
        book, title = self.about["book"], heading["title"]
        return Passage(book, heading["number"], title, paragraph, before, self._read(start, end))

    def around(self, paragraph: int) -> tuple[str, list[tuple[int, str]]]:
        """See `Library.around`."""
        rows = self._paragraphs
        row = int(np.searchsorted(rows[:, 0], paragraph))
        if row == len(rows) or rows[row, 0] != paragraph:
            raise LookupError(paragraph)
        chapter = int(rows[row, 1])
        found = []
        for near in range(max(0, row - AROUND), min(len(rows), row + AROUND + 1)):
            end = int(rows[near + 1, 2]) if near + 1 < len(rows) else len(self._text)
            if rows[near, 1] == chapter:
                found.append((int(rows[near, 0]), self._read(int(rows[near, 2]), end).removesuffix("\n")))
        return self.about["chapters"][chapter]["title"], found

    def plain(self, number: int) -> Plain:
        """The passage's characters."""
        start, end = self._passages[number, 3:].tolist()
        found: Plain = self._plain[start:end]
        return found

    def context(self, number: int) -> Plain:
        """The characters of the passage with those before and after it in the chapter."""
        first, last = max(0, number - CONTEXT), min(self.size - 1, number + CONTEXT)
        around = self._passages[first : last + 1]
        chapters = self._paragraphs[around[:, 0], 1]
        same = around[chapters == chapters[number - first]]
        found: Plain = self._plain[int(same[0, 3]) : int(same[:, 4].max())]
        return found


def build_shard(paragraphs: Sequence[Paragraph], encoder: Encoder, folder: Path, fingerprint: str) -> None:
    """Writes the folder of a shard, whole or not at all: text.txt (paragraphs, one a line), paragraphs.npy (number,
    chapter, first byte), plain.npy (`plain` of them all), passages.npy (row in paragraphs.npy, first byte,
    end, first place in plain.npy, end), lexical/, vectors.usearch and
    shard.json."""
    from usearch.index import Index

    made = folder.with_name(f".{folder.name}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    chapters: dict[tuple[int, str], int] = {}
    rows, begins, place, plain_place = [], [], 0, 0
    every = []
    for p in paragraphs:
        rows.append((p.number, chapters.setdefault((p.chapter_number, p.chapter), len(chapters)), place))
        begins.append((place, plain_place))
        every.append(plain(p.text))
        place += len(p.text.encode()) + 1
        plain_place += len(every[-1])
    places, texts = [], []
    for span in passages(paragraphs):
        text, (begin, plain_begin) = paragraphs[span.paragraph].text, begins[span.paragraph]
        start, plain_start = begin + len(text[: span.start].encode()), plain_begin + len(plain(text[: span.start]))
        texts.append(plain(text[span.start : span.end]))
        end = start + len(text[span.start : span.end].encode())
        places.append((span.paragraph, start, end, plain_start, plain_start + len(texts[-1])))
    write_whole(made / "text.txt", "".join(p.text + "\n" for p in paragraphs))
    np.save(made / "paragraphs.npy", np.array(rows, dtype=np.int64).reshape(-1, 3))
    np.save(made / "passages.npy", np.array(places, dtype=np.int64).reshape(-1, 5))
    np.save(made / "plain.npy", np.concatenate(every))
    Lexical.build(texts).save(made / "lexical")
    index = Index(ndim=encoder.vectors.shape[1], metric="cos", dtype="f16")
    if texts:
        index.add(
            np.arange(len(texts), dtype=np.uint64), encoder.bags([encoder.vocabulary.bag(text) for text in texts])
        )
    index.save(str(made / "vectors.usearch"))
    about = {
        "book": paragraphs[0].book,
        "chapters": [{"number": number, "title": title} for number, title in chapters],
        "fingerprint": fingerprint,
    }
    write_whole(made / "shard.json", json.dumps(about, ensure_ascii=False) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)


def fingerprint(paragraphs: Sequence[Paragraph], encoder_digest: str) -> str:
    """What a shard's content follows from."""
    digest = hashlib.sha256(encoder_digest.encode())
    for p in paragraphs:
        digest.update(f"{p.book}\t{p.chapter_number}\t{p.chapter}\t{p.number}\t{p.text}\n".encode())
    return digest.hexdigest()


class Library:
    """All shards of a folder, in the corpus's order, whatever order they were built in: passages have the numbers that
    they have in `passages` of the whole corpus."""

    def __init__(self, folder: Path) -> None:
        try:
            names = json.loads((folder / "order.json").read_text("utf-8"))["books"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise MiniGLMError(f"检索的索引读不出来（{error}）", path=folder, fix=_AGAIN) from None
        self.shards = [Shard(folder / name) for name in names]
        self._first = np.cumsum([0, *(shard.size for shard in self.shards)])

    @property
    def size(self) -> int:
        """Passages in all."""
        return int(self._first[-1])

    def passage(self, number: int) -> Passage:
        """The passage of that number, counted through all shards."""
        shard = int(np.searchsorted(self._first, number, "right")) - 1
        return self.shards[shard].passage(number - int(self._first[shard]))

    def plain(self, number: int) -> Plain:
        """The characters of the passage of that number."""
        shard = int(np.searchsorted(self._first, number, "right")) - 1
        return self.shards[shard].plain(number - int(self._first[shard]))

    def context(self, number: int) -> Plain:
        """The characters of the passage of that number with those before and after it in its chapter."""
        shard = int(np.searchsorted(self._first, number, "right")) - 1
        return self.shards[shard].context(number - int(self._first[shard]))

    def around(self, book: str, paragraph: int) -> tuple[str, list[tuple[int, str]]]:
        """The heading of a paragraph's chapter, and that paragraph with `AROUND` before and after it in the chapter,
        (number, text) each.

        Raises:
            LookupError: there is no such book or paragraph.
        """
        for shard in self.shards:
            if shard.about["book"] == book:
                with contextlib.suppress(LookupError):
                    return shard.around(paragraph)
        raise LookupError(f"{book} {paragraph}")

    def beside(self, passage: Passage, most: int) -> tuple[str, str]:
        """The whole sentences of its paragraph before and after a passage that make up `most` characters with it, as many
        after it as before it, as far as there are some."""
        text = dict(self.around(passage.book, passage.paragraph)[1])[passage.paragraph]
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
        text = dict(self.around(one.book, one.paragraph)[1])[one.paragraph]
        start = min(one.start, other.start)
        end = max(one.start + len(one.text), other.start + len(other.text))
        return replace(one, start=start, text=text[start:end])

    def search(self, question: Grams, vector: NDArray[np.float32], count: int) -> list[tuple[int, float, float]]:
        """The `count` most similar by BM25 and as many by vector: (number, BM25, cosine or NaN), in no order."""
        lexical: dict[int, float] = {}
        dense: dict[int, float] = {}
        for shard, first in zip(self.shards, self._first, strict=False):
            if not shard.size:
                continue
            scores = shard.lexical.scores(question)
            best = np.argpartition(-scores, min(count, shard.size - 1))[:count]
            lexical |= {int(first + n): float(scores[n]) for n in best}
            near = shard.vectors.search(vector, count)
            for key, distance in zip(near.keys, near.distances, strict=True):
                dense[int(first + key)] = 1.0 - float(distance)
                lexical.setdefault(int(first + key), float(scores[int(key)]))
        top = sorted(lexical, key=lambda n: -lexical[n])[:count] + sorted(dense, key=lambda n: -dense[n])[:count]
        return [(n, lexical[n], dense.get(n, float("nan"))) for n in dict.fromkeys(top)]


def build_library(paragraphs: Sequence[Paragraph], encoder: Encoder, digest: str, folder: Path) -> int:
    """Brings the folder's shards up to these paragraphs, building what is new or changed and removing what is gone.

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
    for part in _parts(paragraphs):
        print_of_part = fingerprint(part, digest)
        if print_of_part not in known:
            known[print_of_part] = folder / f"{number:04d}"
            build_shard(part, encoder, known[print_of_part], print_of_part)
            number, built = number + 1, built + 1
        order.append(known[print_of_part].name)
    write_whole(folder / "order.json", json.dumps({"books": order}) + "\n")
    for path in known.values():
        if path.name not in order:
            shutil.rmtree(path)
    return built


def _parts(paragraphs: Sequence[Paragraph]) -> list[list[Paragraph]]:
    """The paragraphs of each book, in order; a long book's in parts of some `SHARD` passages."""
    parts: list[list[Paragraph]] = []
    characters = 0
    for p in paragraphs:
        # A new passage begins every 60 characters or so.
        if not parts or parts[-1][-1].book != p.book or characters > SHARD * 60:
            parts.append([])
            characters = 0
        parts[-1].append(p)
        characters += len(p.text)
    return parts
