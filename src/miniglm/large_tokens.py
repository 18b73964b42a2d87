"""Token arrays of text that need not fit into memory (corpus/large.py): one for each shard of text, by several processes.

A shard's tokens depend on its text and the tokenizer alone, so the same bytes come out whatever the number of processes
and whatever was interrupted; what is there and fits is not made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from miniglm.bulk_encoding import BulkEncoder
from miniglm.corpus.large import read_shard, read_shards
from miniglm.dataset import TokenShards, read_tokens, write_tokens
from miniglm.errors import MiniGLMError
from miniglm.files import file_digest, read_json, write_json
from miniglm.tokenizer import Tokenizer

_encoder: BulkEncoder | None = None
_held_out: frozenset[str] = frozenset()


def tokenize_shards(
    texts: Path,
    tokens: Path,
    tokenizer: Path,
    *,
    held_out: Collection[str],
    processes: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Makes the token array of each shard of `texts`, as `tokens/text-NUMBER.npy`.

    Args:
        tokenizer: its folder.
        held_out: lines to be left out, since they are for validation.
        processes: how many work at once; default: one a core.
        progress: told how many shards are done.

    Returns:
        Of each shard: name, tokens, characters, and what it was made from.
    """
    made_from = file_digest(tokenizer / "tokenizer.json")
    found: dict[int, dict[str, Any]] = {}
    left: list[tuple[int, dict[str, Any]]] = []
    for number, shard in enumerate(read_shards(texts)):
        basis = {"text": shard["sha256_of_file"], "tokenizer": made_from}
        known = _known(tokens / f"text-{number:05d}.json")
        if known is not None and known["made_from"] == basis and (tokens / known["name"]).exists():
            found[number] = known
        else:
            left.append((number, {"source": texts / shard["name"], "made_from": basis}))
    progress(len(found))
    processes = min(processes or os.cpu_count() or 1, len(left))
    if processes > 1:
        # Not forked: the tokenizer's threads would be missing in the copies.
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (tokenizer, frozenset(held_out), True))
        with pool:
            waiting = {pool.submit(_encode, job["source"], tokens, n, job["made_from"]): n for n, job in left}
            try:
                for done in as_completed(waiting):
                    found[waiting[done]] = done.result()
                    progress(len(found))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # shards that are begun are finished: they are whole then
                raise
    elif left:
        _begin(tokenizer, frozenset(held_out), False)
        for number, job in left:
            found[number] = _encode(job["source"], tokens, number, job["made_from"])
            progress(len(found))
    return [found[number] for number in sorted(found)]


def _known(mark: Path) -> dict[str, Any] | None:
    try:
        return read_json(mark, fix="") if mark.exists() else None
    except MiniGLMError:  # made again
        return None


def _begin(tokenizer: Path, held_out: frozenset[str], one_core: bool) -> None:
    global _encoder, _held_out
    if one_core:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder, _held_out = BulkEncoder(Tokenizer.load(tokenizer)), held_out


def _encode(source: Path, tokens: Path, number: int, made_from: dict[str, str]) -> dict[str, Any]:
    """One shard: each document behind a closing token, which ends what came before it."""
    assert _encoder is not None
    if file_digest(source) != made_from["text"]:
        raise MiniGLMError(
            "文件损坏：内容与写好时的校验和不符", path=source, fix=f"删去 {source.parent} 再运行，会重新做出来"
        )
    closing = np.array([_encoder.tokenizer.end_of_text], _encoder.dtype).tobytes()
    ids = bytearray()
    characters = 0
    for document in read_shard(source):
        text = "\n".join(line for line in document.split("\n") if line not in _held_out)
        if text:
            ids += closing
            ids += _encoder.encode(text).tobytes()
            characters += len(text)
    name = f"text-{number:05d}.npy"
    found = np.frombuffer(ids, _encoder.dtype)
    write_tokens(tokens / name, found)
    made = {
        "name": name,
        "tokens": len(found),
        "characters": characters,
        "sha256_of_file": file_digest(tokens / name),
        "made_from": made_from,
    }
    write_json(tokens / f"text-{number:05d}.json", made)
    return made


def training_tokens(folder: Path, shards: Sequence[dict[str, Any]]) -> Any:
    """The books' training part, and behind it the shards that a run's `meta.json` names, all memory-mapped.

    Raises:
        MiniGLMError: one is missing or not what was made.
    """
    books = read_tokens(folder / "train.npy")
    if not shards:
        return books
    parts = [books]
    for shard in shards:
        part = read_tokens(folder / shard["name"])
        if len(part) != shard["tokens"]:
            raise MiniGLMError(
                f"有 {len(part):,} 个 token，应有 {shard['tokens']:,} 个",
                path=folder / shard["name"],
                fix="删去运行目录里的 tokens/ 再运行",
            )
        parts.append(part)
    return TokenShards(parts)
