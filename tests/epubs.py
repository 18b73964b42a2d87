"""Small EPUBs, good ones and changed ones."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from ebooklib import epub


def make_epub(path: Path) -> None:
    book = epub.EpubBook()
    book.set_identifier("x")
    book.set_title("某某演义")
    pages = {}
    for name, body in {
        "z_first": "<h1>第一章 开端</h1><p>他说：\n“走吧。”</p><p>两人<b>上</b>路<br/>了。</p><script>var 甲;</script>",
        "a_second": "<h2>第二章 结局</h2><p>后来&amp;后来。</p><style>p{}</style><p><ruby>汉<rt>hàn</rt></ruby>字</p>",
        "m_third": "<p>尾声在此。</p><nav><a href='x'>目录在此</a></nav>",
    }.items():
        page = epub.EpubHtml(title=name, file_name=f"{name}.xhtml", lang="zh")
        page.content = f"<html><head><title>标题不要</title></head><body>{body}</body></html>"
        pages[name] = page
    for name in sorted(pages):  # the order of the files is not the order of reading
        book.add_item(pages[name])
    book.add_item(epub.EpubNcx())
    book.add_item(epub.EpubNav())
    book.spine = ["nav", pages["z_first"], pages["a_second"], pages["m_third"]]
    epub.write_epub(str(path), book)


def rewritten(path: Path, changes: dict[str, Any], *, drop: str = "") -> Path:
    """A copy of an EPUB with members replaced, added or left out."""
    target = path.with_name("changed.epub")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in source.namelist():
            if name not in changes and not (drop and drop in name):
                copy.writestr(name, source.read(name))
        for name, data in changes.items():
            copy.writestr(name, data)
    return target
