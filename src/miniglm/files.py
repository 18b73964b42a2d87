"""Writing files whole or not at all, the one way for all of the project, and keeping what was there before. Knows
nothing of what is in them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from miniglm.errors import MiniGLMError

TEMPORARY = ".miniglm-tmp-"
"""How the names of files begin that are not yet whole."""


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; it takes the name `path` only if the block ends well.

    Whatever goes wrong, the temporary file is removed and a file already at `path` stays as it was.

    Raises:
        MiniGLMError: the folder cannot be made or written to, or the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The same folder, because os.replace is atomic only within one file system.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=TEMPORARY, delete=False) as file:
            temporary = Path(file.name)
            yield file  # type: ignore[misc]  # typeshed's wrapper delegates every method of BinaryIO
            file.flush()
            os.fsync(file.fileno())
        if os.name == "posix":  # mkstemp gives 0600; none of our files is a secret
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise MiniGLMError(
            f"写不了文件：新内容写不进去（{error.strerror or error}），原来的内容没有动",
            path=path,
            fix="请检查磁盘空间和文件夹的写权限",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`, text as UTF-8, whole or not at all (see `written_whole`)."""
    with written_whole(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def keep_dated(path: Path) -> None:
    """Move the file or folder at `path`, if there is one, to a name with the time it was made, so that something new
    can take its place.

    Raises:
        MiniGLMError: it cannot be moved.
    """
    if not path.exists():
        return
    made = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
    number, dated = 1, path.with_name(f"{path.stem}-{made}{path.suffix}")
    while dated.exists():
        number += 1
        dated = path.with_name(f"{path.stem}-{made}-{number}{path.suffix}")
    try:
        path.rename(dated)
    except OSError as error:
        raise MiniGLMError(f"改不了名（{error.strerror}），没有动它", path=path, fix="请检查文件夹的写权限") from None


def clean_temporaries(folder: Path) -> None:
    """Remove what a killed process left half written, anywhere below `folder`."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)
