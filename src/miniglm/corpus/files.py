"""Writing files whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from miniglm.errors import MiniGLMError


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
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:60]}.", delete=False) as file:
            temporary = Path(file.name)
            yield file  # type: ignore[misc]  # typeshed's wrapper delegates every method of BinaryIO
            file.flush()
            os.fsync(file.fileno())
        if os.name == "posix":  # mkstemp gives 0600; a book is no secret
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise MiniGLMError(
            f"写不进去：{error.strerror or error}", path=path, fix="请检查磁盘空间和文件夹的写权限"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all (see `written_whole`)."""
    with written_whole(path) as file:
        file.write(data)
