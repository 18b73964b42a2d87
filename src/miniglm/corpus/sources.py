"""What a user calls a book (a catalogue name, an address, a file, a folder) to cleaned books."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from miniglm.corpus import catalog
from miniglm.corpus.cleaning import Book, clean
from miniglm.corpus.download import Progress, cached_url
from miniglm.corpus.reading import read_text
from miniglm.corpus.reading import simplify as to_simplified
from miniglm.errors import MiniGLMError

FOLDER_SUFFIXES = (".txt", ".epub")


def load_books(
    sources: Sequence[str],
    *,
    encoding: str | None = None,
    simplify: bool | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Book]:
    """Read and clean books, in the order given.

    Args:
        sources: each a catalogue key or title, an http(s) address, a text or EPUB file, or a folder, of which every
            .txt and .epub is taken, in natural order of their names, not those in folders within it. A catalogue
            name wins over a file of the same name; write `./sanguo` for the file.
        encoding: of the text files; detected if None.
        simplify: turn traditional characters into simplified ones; None leaves it to the catalogue, and for other
            books means no.
        cache: where downloads are kept; None for the user's cache folder.
        progress: called while downloading, see `download.Progress`.

    Raises:
        MiniGLMError: a source does not exist, cannot be fetched or read, holds no text, or is given twice.
    """
    if not sources:
        raise MiniGLMError("没有指定书", fix="请给出文件、文件夹、网址或书目里的名字（miniglm corpus list）")
    books: list[Book] = []
    origins: dict[str, str] = {}  # resolved place → what the user called it
    titles: dict[str, str] = {}
    contents: dict[int, str] = {}
    for source in sources:
        for name, entry in _expand(source):
            path, origin = _fetch(name, entry, cache, progress)
            if origin in origins:
                raise MiniGLMError("同一本书给了两次", path=name, fix=f"它与 {origins[origin]} 相同，请去掉一个")
            origins[origin] = name
            book = _load(path, name, entry, encoding, simplify)
            if (other := titles.setdefault(book.title, name)) != name:
                raise MiniGLMError(
                    f"有两本书都叫《{book.title}》", path=name, fix=f"另一本是 {other}；若不是同一本书，请给文件改名"
                )
            content = hash(tuple(paragraph.text for paragraph in book.paragraphs))
            if (other := contents.setdefault(content, name)) != name:
                raise MiniGLMError("同一本书给了两次", path=name, fix=f"它的内容与 {other} 相同，请去掉一个")
            books.append(book)
    return books


def _expand(source: str) -> list[tuple[str, catalog.CatalogEntry | None]]:
    """The books behind a source: one, or those of a folder."""
    if entry := catalog.find(source):
        return [(source, entry)]
    if _is_url(source):
        return [(source, None)]
    path = Path(source).expanduser()
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in FOLDER_SUFFIXES and file.is_file()]
        files = [file for file in files if not file.name.startswith(".")]
        if not files:
            raise MiniGLMError("文件夹里没有 .txt 或 .epub 文件", path=source, fix="请把书放进去，或直接给出文件")
        return [(str(file), None) for file in sorted(files, key=_natural)]
    if path.is_file():
        return [(str(path), None)]
    near = catalog.similar(source)
    known = "、".join(near or [f"{entry.title}（{entry.name}）" for entry in catalog.CATALOG])
    raise MiniGLMError(
        "没有这个文件或文件夹，也不是书目里的名字",
        path=source,
        fix=f"{'是不是' if near else '书目里有'}：{known}{'？' if near else ''}",
    )


def _is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key by which 第2章 comes before 第10章."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name.lower())]


def _fetch(
    name: str, entry: catalog.CatalogEntry | None, cache: Path | None, progress: Progress | None
) -> tuple[Path, str]:
    """The local file of a book, and what tells it from other books."""
    if entry is not None:
        return catalog.fetch(entry, cache, progress), f"catalog:{entry.name}"
    if _is_url(name):
        return cached_url(name, cache=cache, progress=progress), name
    return Path(name), str(Path(name).resolve())


def _load(
    path: Path, name: str, entry: catalog.CatalogEntry | None, encoding: str | None, simplify: bool | None
) -> Book:
    # What the catalogue serves is UTF-8; a user's --encoding is about the user's own files.
    reading = read_text(path, None if entry else encoding)
    text = reading.text
    if simplify if simplify is not None else entry is not None and entry.simplify:
        text = to_simplified(text)
    title = entry.title if entry else reading.title or path.stem.strip("《》 ") or path.name
    book = clean(text, title=title, source=name, encoding=reading.encoding)
    if not book.paragraphs:
        rules = "、".join(rule for rule, removal in book.removed.items() if removal.characters)
        raise MiniGLMError(f"清理之后没有正文（去掉的是：{rules or '空白'}）", path=name, fix="请检查文件内容")
    return book
