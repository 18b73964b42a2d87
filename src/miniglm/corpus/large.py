"""Text for pretraining that need not fit into memory: from files of any size, or streamed from a Hugging Face data set,
to shards of text on disk, one after another, each whole or not there. A killed run goes on after its last shard.

A shard has a document a line, as a JSON string. Knows nothing of tokens.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from miniglm.corpus.cleaning import RULES
from miniglm.corpus.reading import simplify as to_simplified
from miniglm.errors import MiniGLMError
from miniglm.files import read_json, write_json, written_whole

SHARD = 64 * 2**20
"""Bytes of text in a shard: half a minute of one core's tokenizing."""
LONGEST = 2**20
"""Characters after which a document without an end is cut, at the next line."""
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
FIELD = "text"
"""Where the text of a JSON line, of a Parquet row, of a data set's example is."""
HUB = "hf:"
SUMMARY = "texts.json"

_ODD = [rule.pattern for rule in RULES if not rule.whole_line]
_SPACES = re.compile(r"[^\S\n]+")


def documents(source: str) -> Iterator[str]:
    """The documents of a source, as they are.

    Args:
        source: a .txt (UTF-8; an empty line ends a document), .jsonl, .jsonl.gz or .parquet file, a folder of them, or
            `hf:NAME` or `hf:NAME:CONFIG`, the training part of a data set of the Hugging Face Hub, streamed.

    Raises:
        MiniGLMError: it is not there, or cannot be read.
    """
    if source.startswith(HUB):
        yield from _from_hub(source)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.lower().endswith(SUFFIXES))
        if not files:
            raise MiniGLMError(f"文件夹里没有 {'、'.join(SUFFIXES)} 文件", path=path)
        for file in files:
            yield from documents(str(file))
        return
    name = path.name.lower()
    try:
        if name.endswith(".txt"):
            yield from _blocks(path)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_lines(path)
        elif name.endswith(".parquet"):
            yield from _parquet(path)
        else:
            raise MiniGLMError(f"应为 {'、'.join(SUFFIXES)} 文件、放着它们的文件夹，或 hf:数据集", path=source)
    except FileNotFoundError:
        raise MiniGLMError("没有这个文件", path=path) from None
    except UnicodeDecodeError as error:
        raise MiniGLMError(f"不是 UTF-8 文本（{error.reason}）", path=path, fix="请转成 UTF-8") from None
    except OSError as error:  # gzip's too
        raise MiniGLMError(f"读不出来：{error.strerror or error}", path=path) from None
    except (EOFError, zlib.error) as error:  # a gzip file that is cut short, or damaged within
        raise MiniGLMError(f"读不出来：{error}", path=path, fix="请重新复制或下载完整的文件") from None


def _blocks(path: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    with path.open(encoding="utf-8-sig") as file:
        while line := file.readline(LONGEST):  # a file of a single line is no reason to hold all of it
            if line.strip():
                lines.append(line)
                size += len(line)
            if lines and (not line.strip() or size >= LONGEST):
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def _text_of(row: Any, path: Path | str, line: int | None = None) -> str:
    text = row.get(FIELD) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise MiniGLMError(f"这一条没有文字，应有字段 {FIELD}", path=path, line=line)
    return text


def _json_lines(path: Path) -> Iterator[str]:
    opened: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else Path.open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield _text_of(json.loads(line), path, number)
                except json.JSONDecodeError as error:
                    raise MiniGLMError(f"不是完整的 JSON：{error.msg}", path=path, line=number) from None


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise _missing("读 Parquet", path) from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256, columns=[FIELD]):
            for row in batch.to_pylist():
                yield _text_of(row, path)
    except (ValueError, KeyError) as error:  # pyarrow's own are ValueErrors
        raise MiniGLMError(f"不是能读的 Parquet（{error}）", path=path) from None


def _from_hub(source: str) -> Iterator[str]:
    name, _, config = source.removeprefix(HUB).partition(":")
    try:
        import datasets
    except ImportError:
        raise _missing("读 Hugging Face 数据集", source) from None
    try:
        streamed = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for row in streamed:
            yield _text_of(row, source)
    except (OSError, ValueError, RuntimeError) as error:
        raise MiniGLMError(
            f"读不了这个数据集（{str(error).splitlines()[0][:200]}）", path=source, fix="看看名字对不对、网络通不通"
        ) from None


def _missing(what: str, path: Path | str) -> MiniGLMError:
    return MiniGLMError(f"{what}要用 datasets", path=path, fix='请运行 pip install "miniglm-chat[datasets]"')


def clean_document(text: str) -> str:
    """Its lines, without characters that are none and without white space around them; "" if nothing is left. The
    rules for advertisements (cleaning.py) are about books and would cost more than tokenizing."""
    for pattern in _ODD:
        if pattern.search(text):
            text = pattern.sub("", text)
    lines = (_SPACES.sub(" ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def write_shards(
    sources: Iterable[str],
    folder: Path,
    *,
    simplify: bool = False,
    size: int = SHARD,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Writes the documents of all sources to `folder`, going on after the shards that are there.

    Args:
        size: bytes from which a shard is full.
        progress: told the bytes written.

    Returns:
        Of each shard: name, documents, characters, bytes, sha256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    while (mark := folder / f"{len(shards):05d}.json").exists():
        shards.append(read_json(mark, fix=f"删去 {folder} 再运行，会重新做出来"))
    stream = (document for source in sources for document in documents(source))
    rest = itertools.islice(stream, sum(shard["read"] for shard in shards), None)
    while shard := _write_shard(rest, folder / f"{len(shards):05d}.jsonl", simplify, size):
        write_json(folder / f"{len(shards):05d}.json", shard)
        shards.append(shard)
        progress(sum(known["bytes"] for known in shards), None)
    write_json(folder / SUMMARY, {"shards": shards})
    return shards


def _write_shard(stream: Iterator[str], path: Path, simplify: bool, size: int) -> dict[str, Any] | None:
    """The next shard; None where nothing is left to read."""
    first = next(stream, None)
    if first is None:
        return None
    read = kept = characters = written = 0
    digest = hashlib.sha256()
    with written_whole(path) as file:
        for document in itertools.chain([first], stream):
            read += 1
            if text := clean_document(to_simplified(document) if simplify else document):
                line = json.dumps(text, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
                file.write(line)
                digest.update(line)
                kept, characters, written = kept + 1, characters + len(text), written + len(line)
            if written >= size:
                break
    return {
        "name": path.name,
        "read": read,
        "documents": kept,
        "characters": characters,
        "bytes": written,
        "sha256_of_file": digest.hexdigest(),
    }


def read_shards(folder: Path) -> list[dict[str, Any]]:
    """What `write_shards` gave."""
    shards: list[dict[str, Any]] = read_json(folder / SUMMARY, fix=f"删去 {folder} 再运行，会重新做出来")["shards"]
    return shards


def read_shard(path: Path) -> Iterator[str]:
    """The documents of a shard."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def sample(folder: Path, characters: int) -> Iterator[str]:
    """About so many characters of the shards, from the beginning of each as many."""
    shards = read_shards(folder)
    for shard in shards:
        left = characters // max(1, len(shards))
        for document in read_shard(folder / shard["name"]):
            if left <= 0:
                break
            yield document[:left]
            left -= len(document)
