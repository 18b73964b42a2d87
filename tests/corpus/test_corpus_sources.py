"""From what a user types to books, and from books to the files of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from miniglm.corpus import (
    CATALOG,
    DEFAULT_BOOK,
    Paragraph,
    Split,
    catalog,
    load_books,
    read_paragraphs,
    split,
    write_corpus,
)
from miniglm.errors import MiniGLMError


def write_book(path: Path, start: int = 0, count: int = 30, encoding: str = "utf-8") -> Path:
    lines = [f"却说第{chr(0x4E00 + start + i)}{chr(0x5000 + start + 7 * i)}将引兵{i}千出城迎敌。" for i in range(count)]
    path.write_text("\n".join(["第一回 出城", *lines]) + "\n", encoding=encoding)
    return path


def test_a_folder_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        write_book(tmp_path / f"卷{number}.txt", start=number * 100)
    write_book(tmp_path / "卷3.TXT", start=3000, encoding="gb18030")
    (tmp_path / "说明.pdf").write_bytes(b"%PDF")
    (tmp_path / ".隐藏.txt").write_text("x", encoding="utf-8")
    books = load_books([str(tmp_path)])
    assert [book.title for book in books] == ["卷1", "卷2", "卷3", "卷10"]
    assert [book.encoding for book in books] == ["utf-8", "utf-8", "gb18030", "utf-8"]
    assert all((len(book.paragraphs), book.chapters) == (31, ["第一回 出城"]) for book in books)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MiniGLMError, match="三国演义（sanguo）"):
        load_books(["三国演"])
    with pytest.raises(MiniGLMError, match="书目里有：三国演义（sanguo）、水浒传（shuihu）"):
        load_books([str(tmp_path / "没有.txt")])
    with pytest.raises(MiniGLMError, match=r"没有 \.txt 或 \.epub"):
        load_books([str(tmp_path)])
    with pytest.raises(MiniGLMError, match="没有指定书"):
        load_books([])


def test_the_same_book_twice(tmp_path: Path) -> None:
    one = write_book(tmp_path / "甲.txt")
    with pytest.raises(MiniGLMError, match="给了两次"):
        load_books([str(one), str(tmp_path)])
    copy = write_book(tmp_path / "乙.txt")
    with pytest.raises(MiniGLMError, match=r"甲\.txt 相同"):
        load_books([str(one), str(copy)])
    (tmp_path / "folder").mkdir()
    namesake = write_book(tmp_path / "folder" / "甲.txt", start=500)
    with pytest.raises(MiniGLMError, match="都叫《甲》"):
        load_books([str(one), str(namesake)])


def test_a_book_of_nothing_but_furniture(tmp_path: Path) -> None:
    path = tmp_path / "空.txt"
    path.write_text("12\n\n----------\n", encoding="utf-8")
    with pytest.raises(MiniGLMError, match="页码、分隔线"):
        load_books([str(path)])


def test_simplification_is_asked_for_or_the_catalogues(tmp_path: Path) -> None:
    path = tmp_path / "水滸.txt"
    path.write_text("話說大宋天子在位，天下太平無事。\n" * 3, encoding="utf-8")
    assert load_books([str(path)])[0].paragraphs[0].text.startswith("話說")
    assert load_books([str(path)], simplify=True)[0].paragraphs[0].text.startswith("话说")
    (tmp_path / "shuihu.txt").write_bytes(path.read_bytes())  # as if it had been downloaded
    (book,) = load_books(["水滸傳"], cache=tmp_path, encoding="gb18030")
    assert (book.title, book.paragraphs[0].text) == ("水浒传", "话说大宋天子在位，天下太平无事。")
    assert load_books(["shuihu"], cache=tmp_path, simplify=False)[0].paragraphs[0].text.startswith("話說")


def test_the_catalogue() -> None:
    assert DEFAULT_BOOK == CATALOG[0].name == "sanguo"
    names = [name for entry in CATALOG for name in (entry.name, entry.title, *entry.aliases)]
    assert len(names) == len(set(names))
    assert {entry.title for entry in CATALOG} >= {"三国演义", "水浒传", "西游记", "红楼梦", "三侠五义", "儒林外史"}
    for name in names:
        found = catalog.find(f"《{name}》")
        assert found is not None and name in (found.name, found.title, *found.aliases)
    assert catalog.find("金瓶梅") is None
    assert catalog.similar("xiyouji") == ["西游记（xiyou）"]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_book(tmp_path / "甲.txt", start=0)
    with (tmp_path / "乙.txt").open("w", encoding="utf-8") as file:
        file.write("本书由某某网整理\n" + "".join(f"第{i}天，曹操又等了{i}个时辰。\n" for i in range(30)))
    books = load_books([str(tmp_path / "甲.txt"), str(tmp_path / "乙.txt")])
    parts = split([paragraph for book in books for paragraph in book.paragraphs])
    run = tmp_path / "run" / "corpus"
    write_corpus(books, parts, run)
    assert read_paragraphs(run / "train.jsonl") == parts.train
    assert read_paragraphs(run / "validation.jsonl") == parts.validation
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert [book["title"] for book in summary["books"]] == ["甲", "乙"]
    assert summary["books"][0]["chapters"] == 1
    assert summary["books"][1]["removed"]["网站广告"] == {"count": 1, "characters": 8, "examples": ["本书由某某网整理"]}
    assert summary["split"]["train"]["paragraphs"] == len(parts.train)
    assert summary["split"]["duplicates_moved"] == parts.duplicates_moved
    assert sorted(path.name for path in run.iterdir()) == ["summary.json", "train.jsonl", "validation.jsonl"]


def test_text_with_odd_line_ends_survives_the_files(tmp_path: Path) -> None:
    odd = [Paragraph("书", "", 0, 1, 'a\u2028b\x85c"\\'), Paragraph("书", "", 0, 2, "😀")]
    write_corpus([], Split(odd, odd[:1], 0), tmp_path)
    assert read_paragraphs(tmp_path / "train.jsonl") == odd


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"book": "书"', "第 2 行"),
        ('{"book": "书"}', "第 2 行"),
        ("[]", "第 2 行"),
        ('{"book": "书", "chapter": "", "chapter_number": "1", "number": 1, "text": "字"}', "第 2 行"),
    ],
)
def test_a_damaged_corpus_file_is_named_with_its_line(tmp_path: Path, line: str, says: str) -> None:
    good = '{"book": "书", "chapter": "", "chapter_number": 1, "number": 1, "text": "字"}'
    path = tmp_path / "train.jsonl"
    path.write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(MiniGLMError, match=says):
        read_paragraphs(path)


def test_a_missing_or_undecodable_corpus_file(tmp_path: Path) -> None:
    with pytest.raises(MiniGLMError, match="miniglm prepare"):
        read_paragraphs(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(MiniGLMError, match="UTF-8"):
        read_paragraphs(tmp_path / "train.jsonl")


def test_importing_is_cheap() -> None:
    code = (
        "import sys, miniglm.corpus\n"
        "heavy = {'numpy', 'opencc', 'datasketch', 'ebooklib', 'charset_normalizer', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
