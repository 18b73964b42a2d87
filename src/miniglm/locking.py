"""One process at a time on a run folder. Knows nothing of what is in it.

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
from miniglm.files import write_whole

LOCK = "run.lock"
HOLDER = "run.lock.json"


def hold(folder: Path) -> BaseFileLock:
    """Claims `folder` for this process until the result is dropped or the process ends. Claims of one process share it.

    Raises:
        MiniGLMError: another process has it, which the text names; or the folder cannot be written to.
    """
    # One object for each folder, whatever its spelling: a second claim of our own must not meet the first as a stranger's.
    lock = FileLock(folder.resolve() / LOCK, is_singleton=True, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise MiniGLMError(
            f"这个运行目录正由{_holder(folder)}使用", path=folder, fix="等它结束，或换一个 --out"
        ) from None
    except OSError as error:
        raise MiniGLMError(f"写不了这个目录（{error.strerror or error}）", path=folder, fix="请检查写权限") from None
    if lock.lock_counter == 1:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        write_whole(folder / HOLDER, json.dumps(holder) + "\n")
    return lock


def _holder(folder: Path) -> str:
    """Who has the lock, as far as its note says; the note is written a moment after the lock is taken."""
    try:
        found = json.loads((folder / HOLDER).read_text("utf-8"))
        return f"另一个进程（进程号 {found['pid']}，主机 {found['host']}，{found['since']} 起）"
    except (OSError, ValueError, KeyError, TypeError):
        return "另一个进程"
