"""Every encoding read as it was written, every wrong one noticed, and EPUBs in reading order."""

from __future__ import annotations

import builtins
import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from epubs import make_epub, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st

from miniglm.corpus import load_books, reading
from miniglm.errors import MiniGLMError

SIMPLIFIED = (
    "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。汉朝自高祖斩白蛇而起义，"
    "一统天下，后来光武中兴，传至献帝，遂分为三国。推其致乱之由，殆始于桓、灵二帝。\n"
    "玄德曰：“我本汉室宗亲，姓刘，名备。今闻黄巾倡乱，有志欲破贼安民，恨力不能，故长叹耳。”\n"
)
TRADITIONAL = (
    "話說天下大勢，分久必合，合久必分。周末七國分爭，並入於秦。及秦滅之後，楚、漢分爭，又並入於漢。漢朝自高祖斬白蛇而起義，"
    "一統天下，後來光武中興，傳至獻帝，遂分為三國。推其致亂之由，殆始於桓、靈二帝。\n"
    "玄德曰：「我本漢室宗親，姓劉，名備。今聞黃巾倡亂，有志欲破賊安民，恨力不能，故長嘆耳。」\n"
)
WRITTEN = [
    (SIMPLIFIED, "utf-8", "utf-8"),
    (SIMPLIFIED, "utf-8-sig", "utf-8"),
    (SIMPLIFIED, "gb18030", "gb18030"),
    (SIMPLIFIED, "gbk", "gb18030"),
    (SIMPLIFIED, "utf-16", "utf-16"),
    (SIMPLIFIED, "utf-16-le", "utf-16-le"),
    (SIMPLIFIED, "utf-16-be", "utf-16-be"),
    (TRADITIONAL, "utf-8", "utf-8"),
    (TRADITIONAL, "big5", "big5"),
    (TRADITIONAL, "gb18030", "gb18030"),
    (TRADITIONAL, "utf-16", "utf-16"),
]


@pytest.mark.parametrize("repeats", [1, 2000])
@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize(("text", "written", "shown"), WRITTEN)
def test_encodings_are_detected(text: str, written: str, shown: str, lines: bool, repeats: int) -> None:
    text = (text if lines else text.replace("\n", "")) * repeats
    assert reading.decode(text.encode(written), path="书.txt") == (text, shown, "")


@pytest.mark.parametrize(("text", "written", "shown"), WRITTEN)
def test_encodings_are_taken_as_given(text: str, written: str, shown: str) -> None:
    assert reading.decode(text.encode(written), path="书.txt", encoding=written).text == text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*SIMPLIFIED[:60], "，", "。", "\n"]), min_size=60, max_size=200),
    st.sampled_from(["utf-8", "utf-8-sig", "gb18030", "utf-16"]),
)
def test_round_trip(characters: list[str], encoding: str) -> None:
    text = "".join(characters)
    if text.strip():
        assert reading.decode(text.encode(encoding), path="书.txt").text == text


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1).filter(lambda text: text.strip("\ufeff\u200b \t\r\n\f\v\u3000")))
def test_given_utf8_gives_back_any_text(text: str) -> None:
    data = text.encode("utf-8-sig")
    try:
        assert reading.decode(data, path="书.txt", encoding="utf-8").text == text
    except MiniGLMError as error:  # only what cannot be a book
        assert "只有空白" in str(error) and not text.strip()


@pytest.mark.parametrize(
    ("text", "written", "given_as", "advice"),
    [
        (SIMPLIFIED, "gb18030", "utf-8", "--encoding gb18030"),
        (SIMPLIFIED, "gb18030", "big5", "--encoding gb18030"),
        (SIMPLIFIED, "utf-8", "gb18030", "--encoding utf-8"),
        (SIMPLIFIED, "utf-8", "big5", "--encoding utf-8"),
        (SIMPLIFIED, "gb18030", "latin-1", "--encoding gb18030"),
        (SIMPLIFIED, "gb18030", "shift_jis", "--encoding gb18030"),
        (SIMPLIFIED, "gb18030", "cp949", "--encoding gb18030"),
        (SIMPLIFIED, "gb18030", "utf-16", "--encoding gb18030"),
        (TRADITIONAL, "big5", "gb18030", "--encoding big5"),
        (TRADITIONAL, "big5", "utf-8", "--encoding big5"),
        (TRADITIONAL, "big5", "cp1252", "--encoding big5"),
    ],
)
def test_a_wrong_encoding_is_noticed_and_the_right_one_named(
    tmp_path: Path, text: str, written: str, given_as: str, advice: str
) -> None:
    path = tmp_path / "书.txt"
    path.write_bytes((text * 20).encode(written))
    with pytest.raises(MiniGLMError) as caught:
        load_books([str(path)], encoding=given_as)
    message = str(caught.value)
    assert "书.txt" in message and advice in message and given_as in message


@pytest.mark.parametrize(
    "text",
    [
        (SIMPLIFIED * 3).encode().decode("latin-1"),
        (SIMPLIFIED * 3).encode("gb18030").decode("latin-1"),
        (SIMPLIFIED * 3).encode("gb18030").decode("utf-8", errors="replace"),
        "锟斤拷" * 100 + SIMPLIFIED,
        (TRADITIONAL * 9).encode("big5").decode("gb18030", errors="replace"),
        "\ue000\ue123\uf456" * 100,
    ],
)
def test_text_that_was_wrong_when_saved_is_noticed(text: str) -> None:
    with pytest.raises(MiniGLMError):
        reading.decode(text.encode(), path="书.txt")


def test_other_languages_in_utf8_are_left_alone() -> None:
    for text in (
        "Où était-il passé, l'élève zélé ? Là-bas, près de l'église.",
        "吾輩は猫である。名前はまだ無い。",
        "Война и мир",
    ):
        assert reading.decode((text * 20).encode(), path="书.txt").text == text * 20


def test_a_damaged_byte_in_a_long_book_is_kept_visible() -> None:
    for encoding in ("utf-8", "gb18030"):
        data = (SIMPLIFIED * 100).encode(encoding)
        cut = data[:3000] + b"\xff" + data[3000:]
        found = reading.decode(cut, path="书.txt")
        assert found.encoding == encoding
        assert 1 <= found.text.count("\ufffd") <= 10  # GB 18030 needs until the line's end to find its feet


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "空的"),
        (b" \n\r\n\t ", "空白"),
        ("\u3000\n\u3000".encode(), "空白"),
        (b"\xef\xbb\xbf", "空白"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8, "PNG"),
        (b"%PDF-1.7 abc", "PDF"),
        (b"PK\x03\x04" + bytes(200), "ZIP"),
        (bytes(60) + b"BOOKMOBI" + bytes(100), "MOBI"),
        (bytes(1000), "二进制"),
        (bytes(range(256)) * 40, "二进制"),
        (bytes((i * i * 7 + i // 3) % 251 + 1 for i in range(5000)), "认不出"),
        (bytes([1, 2, 3, 4, 65]) * 500, "二进制"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "书.txt"
    path.write_bytes(data)
    with pytest.raises(MiniGLMError, match=says) as caught:
        reading.read_text(path)
    assert str(path) in str(caught.value)


def test_an_unknown_encoding_is_named() -> None:
    for encoding in ("utf-9", "base64"):
        with pytest.raises(MiniGLMError, match=encoding):
            reading.decode(b"abc", path="书.txt", encoding=encoding)


def test_simplify_goes_by_phrases() -> None:
    assert reading.simplify(TRADITIONAL).startswith("话说天下大势，分久必合")
    assert reading.simplify("乾隆皇帝的頭髮") == "乾隆皇帝的头发"


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_50_megabytes_on_one_line(tmp_path: Path, encoding: str) -> None:
    line = SIMPLIFIED.replace("\n", "")
    size = 50_000_000 // len(line.encode(encoding))
    path = tmp_path / "长.txt"
    path.write_bytes((line * size).encode(encoding))
    (book,) = load_books([str(path)])
    assert book.encoding == encoding
    assert book.characters == len(line) * size
    assert max(len(paragraph.text) for paragraph in book.paragraphs) <= 2000


# EPUB -----------------------------------------------------------------------------------------------------------------


def test_an_epub_is_read_in_the_order_of_its_spine(tmp_path: Path) -> None:
    make_epub(tmp_path / "书.epub")
    (book,) = load_books([str(tmp_path / "书.epub")])
    assert (book.title, book.encoding) == ("某某演义", "epub")
    assert [paragraph.text for paragraph in book.paragraphs] == [
        *("第一章 开端", "他说：“走吧。”", "两人上路", "了。"),
        *("第二章 结局", "后来&后来。", "汉字", "尾声在此。"),
    ]
    assert book.chapters == ["第一章 开端", "第二章 结局"]


def test_hostile_epubs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tmp_path / "书.epub"
    make_epub(good)
    with zipfile.ZipFile(good) as archive:
        opf = archive.read("EPUB/content.opf").decode()

    bomb = rewritten(good, {"EPUB/zeros.bin": bytes(1 << 20)})
    with monkeypatch.context() as patch:
        patch.setattr(reading, "MAX_EPUB_BYTES", 1 << 20)
        with pytest.raises(MiniGLMError, match="上限"):
            reading.read_text(bomb)

    laughs = '<!DOCTYPE a [<!ENTITY a "哈哈"><!ENTITY b "&a;&a;">]>'
    head, body = opf.split("\n", 1)
    with pytest.raises(MiniGLMError, match="实体"):
        reading.read_text(rewritten(good, {"EPUB/content.opf": f"{head}\n{laughs}\n{body}"}))

    outside = rewritten(good, {"EPUB/content.opf": opf.replace("z_first.xhtml", "../../../secret.xhtml")})
    (tmp_path.parent / "secret.xhtml").write_text("<p>秘密</p>", encoding="utf-8")
    with pytest.raises(MiniGLMError, match="结构有误"):
        reading.read_text(outside)

    with pytest.raises(MiniGLMError, match="结构有误"):
        reading.read_text(rewritten(good, {}, drop="a_second"))
    with pytest.raises(MiniGLMError, match="加密"):
        reading.read_text(rewritten(good, {"META-INF/encryption.xml": "<x URI='EPUB/z_first.xhtml'/>"}))
    with pytest.raises(MiniGLMError, match="不存在"):
        reading.read_text(rewritten(good, {"EPUB/content.opf": opf.replace('idref="chapter_0"', 'idref="gone"')}))


def test_a_true_zip_bomb_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bomb.epub"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("META-INF/container.xml", "<container/>")
        with archive.open("EPUB/zeros.opf", "w", force_zip64=True) as member:
            for _ in range(210):
                member.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(MiniGLMError, match="上限"):
            reading.read_text(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22  # of its 210 MiB hardly any is unpacked
    finally:
        tracemalloc.stop()


def test_a_broken_epub_and_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tmp_path / "书.epub"
    make_epub(good)
    cut = tmp_path / "cut.epub"
    cut.write_bytes(good.read_bytes()[:1000])
    with pytest.raises(MiniGLMError, match="不是完好的 EPUB"):
        reading.read_text(cut)

    real = builtins.__import__

    def without_ebooklib(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("ebooklib"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_ebooklib)
    with pytest.raises(MiniGLMError, match=r"miniglm-chat\[epub\]"):
        reading.read_text(good)


def test_html_forgives_what_is_not_closed() -> None:
    assert reading.html_to_text("<head><title/><style/>x<body><p>甲<p>乙<br>丙<div>丁") == "甲\n乙\n丙\n丁"
    assert io.StringIO(reading.html_to_text("<p>a\n b</p>")).readline() == "a b"
