"""EPUBs made to do harm end with an error or a book, within a limit of memory, and touch no file but their own."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from epubs import make_epub, rewritten

from miniglm.corpus import reading
from miniglm.errors import MiniGLMError

LIMIT_MIB = 768
"""What a process may map beyond what it maps with everything imported."""
READ = f"""
import resource, sys
from pathlib import Path
from ebooklib import epub
from lxml import html
from miniglm.corpus.reading import read_text
from miniglm.errors import MiniGLMError
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + {LIMIT_MIB} * 2**20,) * 2)
for path in sys.argv[1:]:
    try:
        print(Path(path).name, "READ", len(read_text(Path(path)).text))
    except MiniGLMError as error:
        print(Path(path).name, "ERROR", error)
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("epub") / "书.epub"
    make_epub(path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux only")
def test_bombs_end_within_a_limit_of_memory(good: Path) -> None:
    with zipfile.ZipFile(good) as archive:
        opf = archive.read("EPUB/content.opf").decode()
        container = archive.read("META-INF/container.xml").decode()
    head, body = opf.split("\n", 1)
    levels = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    laughs = f'{head}\n<!DOCTYPE a [<!ENTITY a0 "哈哈">{levels}]>\n{body.replace("某某演义", "&a11;")}'
    item = '<item id="i" href="z_first.xhtml" media-type="application/xhtml+xml"/>'
    items = item * (reading.MAX_XML_BYTES // len(item) - 50)
    manifest = opf.replace("</manifest>", items + "</manifest>")
    long = f"<p>{'某' * (reading.MAX_DOCUMENT_BYTES // 3 - 10)}</p>"
    deep = "<div>" * (reading.MAX_DOCUMENT_BYTES // 5 - 100)
    made: dict[str, dict[str, Any]] = {
        "laughs": {"EPUB/content.opf": laughs},
        "laughs16": {"EPUB/content.opf": laughs.replace("utf-8", "utf-16").encode("utf-16")},
        "renamed": {
            "META-INF/container.xml": container.replace("content.opf", "content.&#120;html"),
            "EPUB/content.xhtml": laughs,
        },
        "manifest": {"EPUB/content.opf": manifest},
        "manifest2": {"EPUB/content.opf": opf.replace("</manifest>", 2 * items + "</manifest>")},
        "renamed2": {
            "META-INF/container.xml": container.replace("content.opf", "content.xhtml"),
            "EPUB/content.xhtml": opf.replace("</manifest>", 2 * items + "</manifest>"),
        },
        "repeated": {
            "EPUB/content.opf": opf.replace("</manifest>", 40 * item + "</manifest>"),
            "EPUB/z_first.xhtml": long,
        },
        "ebcdic": {"EPUB/content.opf": laughs.replace("utf-8", "cp037").encode("cp037", "replace")},
        "utf7": {"EPUB/content.opf": opf.replace("utf-8", "utf-7")},
        "long": {"EPUB/z_first.xhtml": long},
        "deep": {"EPUB/z_first.xhtml": deep, "EPUB/nav.xhtml": deep},
        "ruby": {"EPUB/z_first.xhtml": "<rt>" * 500_000 + "</nav>" * 500_000},
    }
    paths = [rewritten(good, changes).rename(good.with_name(f"{name}.epub")) for name, changes in made.items()]
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, paths)], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    said = {line.split(" ")[0].removesuffix(".epub"): line for line in done.stdout.splitlines()}
    for name in ("laughs", "laughs16", "renamed"):
        assert "ERROR" in said[name] and "实体" in said[name], done.stdout
    for name in ("manifest2", "renamed2"):
        assert "ERROR" in said[name] and "上限是 4 MB" in said[name], done.stdout
    assert "ERROR" in said["repeated"] and "上限是 200 MB" in said["repeated"], done.stdout
    for name in ("ebcdic", "utf7"):
        assert "ERROR" in said[name] and "不是 UTF-8" in said[name], done.stdout
    assert "READ" in said["long"], done.stdout
    for name in ("manifest", "deep", "ruby"):  # within the bounds: an error or a book, and not an out-of-memory
        print(said[name], said["PEAK"])
        assert "allocate" not in said[name] and "MemoryError" not in said[name], done.stdout


def test_members_with_paths_that_lead_out_write_nothing(good: Path) -> None:
    """Nothing of an archive is ever unpacked: names such as these are only names."""
    names = ["../outside.xhtml", "/tmp/absolute.xhtml", "..\\windows.xhtml", "C:\\drive.xhtml", "EPUB/../../up.xhtml"]
    path = rewritten(good, dict.fromkeys(names, "<p>外面</p>"))
    before = {p for p in good.parent.parent.rglob("*") if p != path}
    assert reading.read_text(path).encoding == "epub"
    assert {p for p in good.parent.parent.rglob("*") if p != path} == before
    assert not Path("/tmp/absolute.xhtml").exists()


def test_a_member_that_unpacks_to_more_than_it_says_is_an_error(good: Path) -> None:
    content = good.read_bytes()
    with zipfile.ZipFile(good) as archive:
        info = archive.getinfo("EPUB/z_first.xhtml")
    size = info.file_size.to_bytes(4, "little")
    lying = good.with_name("lying.epub")
    at = content.rindex(b"EPUB/z_first.xhtml") - 46 + 24  # the central directory's field for it
    assert content[at : at + 4] == size
    lying.write_bytes(content[:at] + (10).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(MiniGLMError, match="EPUB"):
        reading.read_text(lying)
