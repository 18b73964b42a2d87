"""One process at a time on a folder, or on what a folder's lock is named after. Knows nothing of what is in it.

The operating system holds the lock (flock, or msvcrt on Windows, through `filelock`) and frees it when its process
ends, however that ends; a file beside it only says who that is.
"""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from miniglm.errors import MiniGLMError
from miniglm.files import clean_temporaries_of, write_whole

RUN, REPORT = "run", "report"
"""Claims of a run folder: on all of it, and on its evaluation, which only reads the rest."""
LOCK = "run.lock"
HOLDER = "run.lock.json"


def hold(
    folder: Path, name: str = RUN, *, what: str = "运行目录", fix: str = "等它结束，或换一个 --out"
) -> BaseFileLock:
    """Claims `folder` for this process until the result is dropped or the process ends. Claims of one process share it.

    Args:
        name: of the claim: `NAME.lock` and `NAME.lock.json`, which says who has it. Claims of other names are others.
        what: is claimed, for the error.
        fix: what to do where another process has it.

    Raises:
        MiniGLMError: another process has it, which the text names; or the folder cannot be written to.
    """
    # One object for each folder, whatever its spelling: a second claim of our own must not meet the first as a stranger's.
    lock = FileLock(folder.resolve() / f"{name}.lock", is_singleton=True, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise MiniGLMError(f"这个{what}正由{_holder(folder, name)}使用", path=folder, fix=fix) from None
    except OSError as error:
        raise MiniGLMError(f"写不了这个目录（{error.strerror or error}）", path=folder, fix="请检查写权限") from None
    if lock.lock_counter == 1:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        clean_temporaries_of(_note(folder, name))
        write_whole(_note(folder, name), json.dumps(holder) + "\n")
    return lock


def is_held(folder: Path, name: str) -> bool:
    """Whether another process has this claim."""
    if not (folder / f"{name}.lock").exists():
        return False
    lock = FileLock(folder.resolve() / f"{name}.lock", is_singleton=True, thread_local=False)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def _note(folder: Path, name: str) -> Path:
    return folder / f"{name}.lock.json"


def _holder(folder: Path, name: str) -> str:
    """Who has the lock, as far as its note says; the note is written a moment after the lock is taken."""
    try:
        found = json.loads(_note(folder, name).read_text("utf-8"))
        return f"另一个进程（进程号 {found['pid']}，主机 {found['host']}，{found['since']} 起）"
    except (OSError, ValueError, KeyError, TypeError):
        return "另一个进程"
