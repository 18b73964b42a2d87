"""A book cut into passages that one request can hold, each with a name that follows from its text.

Knows nothing of requests or models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from miniglm.corpus.cleaning import Book, sentences

SHORTEST = 60
"""Characters under which a passage has nothing to ask about."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Some paragraphs of one chapter, joined by line ends. Equal texts of one book have equal ids."""

    id: str
    book: str
    chapter: str
    chapter_number: int
    text: str


def _pieces(text: str, longest: int) -> Iterator[str]:
    """A paragraph in pieces of at most `longest` characters that end with sentences where they can."""
    piece = ""
    for sentence in sentences(text):
        for part in (sentence[i : i + longest] for i in range(0, len(sentence), longest)):
            if piece and len(piece) + len(part) > longest:
                yield piece
                piece = ""
            piece += part
    if piece:
        yield piece


def cut_passages(books: Sequence[Book], longest: int) -> list[Passage]:
    """Passages of at most `longest` characters, whole paragraphs wherever they fit, in order and each once.

    A passage never spans two chapters; the headings are not part of it, and what is left of a chapter with fewer than
    `SHORTEST` characters is dropped.
    """
    found: dict[str, Passage] = {}
    for book in books:
        for (chapter, number), group in groupby(book.paragraphs, key=lambda p: (p.chapter, p.chapter_number)):
            for text in _filled([p.text for p in group if p.text != chapter], longest):
                name = hashlib.sha256(f"{book.title}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
                found.setdefault(name, Passage(name, book.title, chapter, number, text))
    return list(found.values())


def _filled(paragraphs: Sequence[str], longest: int) -> Iterator[str]:
    """Paragraphs joined up to the length, without what is too short."""
    held = ""
    for piece in (piece for paragraph in paragraphs for piece in _pieces(paragraph, longest)):
        if held and len(held) + 1 + len(piece) > longest:
            if len(held) >= SHORTEST:
                yield held
            held = ""
        held = f"{held}\n{piece}" if held else piece
    if len(held) >= SHORTEST:
        yield held
