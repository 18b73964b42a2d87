"""Text beyond memory (corpus/large.py) as parts of a library: a document is a chapter without a heading, its lines are the
paragraphs, and all of it is one book. Knows nothing of indexes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from miniglm.corpus import Paragraph, large
from miniglm.lookup.library import Part

TITLE = "补充文字"
FILES = 2
"""Files of the corpus that become a shard."""


def text_parts(folder: Path) -> list[Part]:
    """What `write_shards` wrote, in order. Each file is read once here, to number what follows it."""
    parts = []
    document = paragraph = 1
    files = large.read_shards(folder)
    for start in range(0, len(files), FILES):
        some = files[start : start + FILES]
        paths = [folder / file["name"] for file in some]
        source = "\t".join(["texts", f"{document} {paragraph}", *(file["sha256_of_file"] for file in some)])
        parts.append(Part(source, lambda p=paths, d=document, n=paragraph: _paragraphs(p, d, n)))  # type: ignore[misc]
        for text in itertools.chain.from_iterable(map(large.read_shard, paths)):
            document, paragraph = document + 1, paragraph + text.count("\n") + 1
    return parts


def _paragraphs(paths: Sequence[Path], document: int, paragraph: int) -> Iterator[Paragraph]:
    for text in itertools.chain.from_iterable(map(large.read_shard, paths)):
        for line in text.split("\n"):
            yield Paragraph(TITLE, "", document, paragraph, line)
            paragraph += 1
        document += 1


def text_sample(folder: Path, characters: int) -> list[Paragraph]:
    """About so many characters of it, for the encoder to learn from."""
    return [
        Paragraph(TITLE, "", document, 0, line)
        for document, text in enumerate(large.sample(folder, characters), 1)
        for line in text.split("\n")
    ]
