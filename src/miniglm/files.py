"""Writing files whole or not at all, the one way for all of the project, keeping what was there before, and checksums
that tell a damaged file. Knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from miniglm.errors import MiniGLMError

TEMPORARY = ".miniglm-tmp-"
"""How the names of files begin that are not yet whole."""


CHECKSUM = "sha256"
"""The key under which a JSON object of ours holds the checksum of everything else in it."""


@contextmanager
def written_whole(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; it takes the name `path` only if the block ends well.

    Whatever goes wrong, the temporary file is removed and a file already at `path` stays as it was.

    Args:
        previous: the name that a file already at `path` takes once the new one is whole. A process killed between
            the two renames leaves nothing at `path`, and the old file here.

    Raises:
        MiniGLMError: the folder cannot be made or written to, or the disk is full.
    """
    # The name is known before the file is there, so that Ctrl-C between the two leaves nothing behind. It lies in the
    # same folder, because os.replace is atomic only within one file system.
    temporary = path.with_name(_temporary(path) + secrets.token_hex(8))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
        _keep_names(path.parent)
    except OSError as error:
        if previous is not None and previous.exists() and not path.exists():
            with contextlib.suppress(OSError):
                previous.replace(path)
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # there may be nothing, and no folder either
            temporary.unlink()


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder that is gone after the block; what a killed process leaves of it, `clean_temporaries` removes.

    Raises:
        MiniGLMError: it cannot be made.
    """
    folder = parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise _cannot_write(parent, error) from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # Windows removes no file that is still mapped


def write_whole(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`, text as UTF-8, whole or not at all (see `written_whole`)."""
    with written_whole(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def append_line(path: Path, line: str) -> None:
    """Add a line at the end of a file, for good as far as this process is concerned. Killed meanwhile, it may leave
    the beginning of the line: whoever reads such a file passes over a last line without an end.

    Raises:
        MiniGLMError: the file cannot be written to, or the disk is full.
    """
    try:
        with path.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> MiniGLMError:
    return MiniGLMError(
        f"写不了文件：新内容写不进去（{error.strerror or error}），原来的内容没有动",
        path=path,
        fix="请检查磁盘空间和文件夹的写权限",
    )


def _keep_names(folder: Path) -> None:
    """After a power cut a renamed file may have its old name unless its folder was flushed as well (POSIX)."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some file systems do not do it; the file itself is whole either way
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON makes of `content`, with a checksum of it under `CHECKSUM`."""
    plain: dict[str, Any] = json.loads(json.dumps(content))  # tuples become lists, keys become text
    return plain | {CHECKSUM: _digest(plain)}


def unsealed(content: Any) -> dict[str, Any]:
    """What `sealed` was given. An object without a checksum is passed on as it is: older versions wrote none.

    Raises:
        ValueError: not an object, or it is not what the checksum is of.
    """
    if not isinstance(content, dict):
        raise ValueError("应为一个 JSON 对象")
    if CHECKSUM in content and content[CHECKSUM] != _digest(content):
        raise ValueError("校验和不符，内容在写好以后变了")
    return {key: value for key, value in content.items() if key != CHECKSUM}


def write_json(path: Path, content: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write a JSON object with its checksum, whole or not at all."""
    write_whole(path, json.dumps(sealed(content), ensure_ascii=False, indent=indent) + "\n")


def read_json(path: Path, *, fix: str) -> dict[str, Any]:
    """Read what `write_json` wrote, or any other JSON object.

    Args:
        fix: how the user comes by a good file.

    Raises:
        MiniGLMError: missing, not a JSON object, or not what its checksum is of.
    """
    try:
        return unsealed(json.loads(path.read_text("utf-8-sig")))
    except FileNotFoundError:
        raise MiniGLMError("缺少这个文件", path=path, fix=fix) from None
    except (OSError, ValueError, RecursionError) as error:
        raise MiniGLMError(f"文件损坏，应为完好的 JSON（{error}）", path=path, fix=fix) from None


def file_digest(path: Path, *, text: bool = False) -> str:
    """SHA-256 of a file in hexadecimal.

    Args:
        text: count CR LF as LF, which is what git may make of a text file on Windows.
    """
    if text:
        return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """`file_digest` of some files of a folder, for its last file to hold."""
    return {name: file_digest(folder / name) for name in names}


def check_digests(folder: Path, digests: Mapping[str, str], *, fix: str) -> None:
    """Compare files with what `file_digests` found.

    Raises:
        MiniGLMError: one is missing or has changed since.
    """
    for name, expected in digests.items():
        path = folder / name
        try:
            found = file_digest(path)
        except FileNotFoundError:
            raise MiniGLMError("缺少这个文件", path=path, fix=fix) from None
        except OSError as error:
            raise MiniGLMError(f"读不出来：{error.strerror or error}", path=path, fix=fix) from None
        if found != expected:
            raise MiniGLMError("文件损坏：内容与写好时的校验和不符", path=path, fix=fix)


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


def _temporary(path: Path) -> str:
    """How the name of the file begins that becomes `path`. A digest, since names may be as long as a name can be."""
    return f"{TEMPORARY}{hashlib.sha256(path.name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}-"


def clean_temporaries(folder: Path, but: Path | None = None) -> None:
    """Remove what a killed process left half written, anywhere below `folder`.

    Args:
        but: a folder below it that is left alone.
    """
    for path in list(folder.rglob(f"{TEMPORARY}*")):
        if but is not None and but in path.parents:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def clean_temporaries_of(path: Path) -> None:
    """Remove what a killed process left of the file `path`, half written beside it; other files' stay."""
    for temporary in path.parent.glob(f"{_temporary(path)}*"):
        temporary.unlink(missing_ok=True)
