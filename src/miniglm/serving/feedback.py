"""What readers think of answers: one line of JSON each, added to a file that `finetune` reads.

A line is a question with its answer and a `rating`: "like", "dislike", or "none" for one taken back. The file only
grows; of several lines about one answer the last counts, and only what is liked is trained on (see qa.formats). Knows
nothing of the page.
"""

from __future__ import annotations

import json
import os
import threading
from datetime import datetime
from pathlib import Path
from typing import Literal

from miniglm.errors import MiniGLMError

Rating = Literal["like", "dislike", "none"]

MAX_BYTES = 64 << 20
"""The file's size from which on nothing is added: whoever reaches the page can click as often as they like."""

_lock = threading.Lock()


def add_feedback(path: Path, question: str, answer: str, rating: Rating, *, model: str) -> None:
    """Adds one whole line, or nothing.

    Raises:
        MiniGLMError: texts in which nothing can be seen, which no set may hold; the file is full or cannot be written to.
    """
    if not all(any(char.isprintable() and not char.isspace() for char in text) for text in (question, answer)):
        raise MiniGLMError("空的问题或回答不能评价")
    made = datetime.now().astimezone().isoformat(timespec="seconds")
    row = {"question": question, "answer": answer, "rating": rating, "model": model, "made": made}
    # A lone surrogate has no bytes in UTF-8 and would make the line unusable.
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    try:
        with _lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            _append(path, line)
    except OSError as error:
        raise MiniGLMError(f"写不进去（{error.strerror or error}）", path=path, fix="请检查磁盘空间和写权限") from None


def _append(path: Path, line: bytes) -> None:
    """One write at the file's end, wherever other processes have moved it meanwhile."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    file = os.open(path, flags, 0o666)
    try:
        size = os.fstat(file).st_size
        if size + len(line) > MAX_BYTES:
            raise MiniGLMError(f"已有 {MAX_BYTES >> 20} MiB，不再往里写", path=path, fix="请把它移到别处")
        if size:  # the last line may lack its end: an editor's doing, or a machine that went down
            os.lseek(file, -1, os.SEEK_END)
            if os.read(file, 1) != b"\n":
                line = b"\n" + line
        if os.write(file, line) != len(line):  # the disk filled up in the middle
            os.ftruncate(file, size)
            raise OSError(0, "磁盘已满")
        os.fsync(file)
    finally:
        os.close(file)
