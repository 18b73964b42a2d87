"""Files from an http(s) address into the cache, whole or not at all. Knows nothing of books."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from miniglm import __version__
from miniglm.errors import MiniGLMError
from miniglm.files import written_whole

Progress = Callable[[int, int | None], None]
"""Called with the bytes fetched so far and the bytes in all, or None where the server does not say."""

TIMEOUT_SECONDS = 30.0  # for a connection or one read from it, not for a whole file
MAX_BYTES = 1 << 30
CHUNK_BYTES = 1 << 16
BOOK_INSTEAD = "也可以用 --book 文件 指定自己的书"


def cache_folder() -> Path:
    """`MINIGLM_CACHE`, or `miniglm` in the platform's folder for a user's caches. Not created here."""
    if own := os.environ.get("MINIGLM_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "miniglm"


def cached_url(url: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The cached file behind an http(s) address, fetched only if it is not in the cache yet."""
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name)[-80:] or "index"
    # The address's hash is the folder, so that the file keeps its own name, which titles the book.
    path = (cache or cache_folder()) / "url" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    return path if is_good(path, None) else download(url, path, progress=progress)


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Path:
    """Download `url` to `path`, which changes only once all of it is there and matches `sha256` (if given).

    Raises:
        MiniGLMError: no connection, an HTTP error, a body shorter than announced, or a wrong checksum.
    """
    again = f"请检查网络或代理设置后重试；{BOOK_INSTEAD}"
    try:
        request = urllib.request.Request(_quoted(url), headers={"User-Agent": f"miniglm/{__version__}"})
        with urllib.request.urlopen(request, timeout=timeout) as response, written_whole(path) as file:
            announced = response.headers.get("Content-Length")
            total = int(announced) if announced and announced.isdigit() else None
            done, digest = 0, hashlib.sha256()
            while chunk := _read(response, url, again):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if done > MAX_BYTES:
                    raise MiniGLMError(f"已超过 {MAX_BYTES >> 20} MB，不像是一本书", path=url, fix="请检查网址")
                if progress is not None:
                    progress(done, total)
            if total is not None and done != total:
                raise MiniGLMError(f"下载中断：应有 {total} 字节，只收到 {done} 字节", path=url, fix=again)
            if done == 0:
                raise MiniGLMError("下载到的文件是空的", path=url, fix="请检查网址")
            check_digest(digest.hexdigest(), sha256, url)
    except urllib.error.HTTPError as error:
        fix = f"请检查网址；{BOOK_INSTEAD}"
        raise MiniGLMError(f"下载失败：服务器答 {error.code} {error.reason}", path=url, fix=fix) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and time-outs are OSErrors
        raise MiniGLMError(f"下载失败：{getattr(error, 'reason', None) or error}", path=url, fix=again) from error
    return path


def _read(response: http.client.HTTPResponse, url: str, fix: str) -> bytes:
    try:
        return response.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:  # told apart here from a fault of the disk
        raise MiniGLMError(f"下载中断：{error}", path=url, fix=fix) from error


def _quoted(url: str) -> str:
    """The address with everything outside ASCII percent-encoded (Chinese file names are common), idna for the host."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (urllib.parse.quote(part, safe="/%:@!$&'()*+,;=~?") for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


def is_good(path: Path, sha256: str | None) -> bool:
    """Whether a file is there, with this checksum if one is given."""
    if not path.is_file():
        return False
    return sha256 is None or hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def check_digest(found: str, expected: str | None, source: str) -> None:
    """Raise a MiniGLMError if the SHA-256 of what came from `source` is not the one expected."""
    if expected is not None and found != expected:
        raise MiniGLMError(
            f"内容与校验和不符：SHA-256 应为 {expected[:12]}…，实为 {found[:12]}…",
            path=source,
            fix=f"文件可能已损坏或被改过，请重试；{BOOK_INSTEAD}",
        )
