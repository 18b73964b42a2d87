"""The corpus on disk: `train.jsonl`, `validation.jsonl` (one paragraph a line) and `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from miniglm.corpus.cleaning import Book, Paragraph
from miniglm.corpus.splitting import Split
from miniglm.errors import MiniGLMError
from miniglm.files import file_digests, write_json, written_whole

_FIELDS = {field.name: int if field.name in ("chapter_number", "number") else str for field in fields(Paragraph)}


def write_corpus(books: Sequence[Book], split: Split, folder: Path) -> None:
    """Write both sides and the summary into `folder`, each file whole or not at all, the summary last.

    Raises:
        MiniGLMError: the folder cannot be written to, or the disk is full.
    """
    _write_paragraphs(split.train, folder / "train.jsonl")
    _write_paragraphs(split.validation, folder / "validation.jsonl")
    summary = {
        "books": [
            {
                "title": book.title,
                "source": book.source,
                "encoding": book.encoding,
                "characters": book.characters,
                "paragraphs": len(book.paragraphs),
                "chapters": len(book.chapters),
                "removed": {name: asdict(removal) for name, removal in book.removed.items()},
            }
            for book in books
        ],
        "split": {
            side: {"paragraphs": len(part), "characters": sum(len(paragraph.text) for paragraph in part)}
            for side, part in (("train", split.train), ("validation", split.validation))
        }
        | {"duplicates_moved": split.duplicates_moved, "cut_by_sentence": split.cut_by_sentence},
        "files": file_digests(folder, ("train.jsonl", "validation.jsonl")),
    }
    write_json(folder / "summary.json", summary)


def _write_paragraphs(paragraphs: Iterable[Paragraph], path: Path) -> None:
    with written_whole(path) as file:
        file.writelines((json.dumps(asdict(p), ensure_ascii=False) + "\n").encode() for p in paragraphs)


def read_paragraphs(path: Path) -> list[Paragraph]:
    """Read what `write_corpus` wrote.

    Raises:
        MiniGLMError: the file is missing or not UTF-8, or a line of it is not a paragraph (naming the line).
    """
    again = "请重新运行 miniglm prepare"
    paragraphs = []
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise MiniGLMError(f"不是完整的 JSON：{error.msg}", path=path, line=number, fix=again) from error
                if not isinstance(row, dict) or {k: type(v) for k, v in row.items()} != _FIELDS:
                    raise MiniGLMError(f"应有字段 {'、'.join(_FIELDS)}", path=path, line=number, fix=again)
                paragraphs.append(Paragraph(**row))
    except OSError as error:
        raise MiniGLMError(f"读不出来：{error.strerror or error}", path=path, fix=again) from error
    except UnicodeDecodeError as error:
        raise MiniGLMError("不是 UTF-8 文本", path=path, fix=again) from error
    return paragraphs
