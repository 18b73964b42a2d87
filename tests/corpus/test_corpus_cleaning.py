"""Cleaning loses nothing that it does not report, knows headings from sentences and advertisements from novels."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniglm.corpus.cleaning import (
    CUT,
    GUTENBERG,
    LONGEST_PARAGRAPH,
    PIECE,
    RULES,
    UNWRAPPED,
    Book,
    clean,
    count_characters,
    cut,
    parse_heading,
    read_numeral,
    sentences,
)

ADVERTISEMENTS = [
    "本书由某某电子书论坛整理制作",
    "【本书由TXT小说网网友上传，版权归作者所有】",
    "更多精彩小说，请访问 www.example.com",
    "更多好书尽在某某书屋",
    "手机用户请浏览 m.example.com 阅读，更优质的体验。",
    "请记住本站域名 www.example.com",
    "请记住本书首发域名：example.com。",
    "天才一秒记住本站地址：example.com",
    "一秒记住某某小说网，为您提供精彩小说阅读。",
    "最新章节请到某某网",
    "全文字无弹窗，txt下载请到本站",
    "PS：求月票，求推荐票！",
    "求收藏！求推荐！",
    "（本章完）",
    "(未完待续。如果您喜欢这部作品，欢迎您来投推荐票)",
    "上一章 ← 章节目录 → 下一章",
    "加入书签，方便阅读",
    "小说来自某某书库",
    "本电子书仅供个人学习交流，请于下载后24小时内删除，不得用于商业用途",
]
FURNITURE = [
    *("12", "- 12 -", "第 12 页", "第12页 共300页", "Page 3 of 20", "12/300"),
    *("----------", "* * *", "********", "======", "☆☆☆☆☆", "———————"),
    *("http://www.example.com/book/1.html", "来源：www.example.com", "（www.example.com）"),
]
NOVEL_LINES = [
    "请记住我的话。",
    "“请记住本王今日之言！”",
    "本书由此得名。",
    "更多的人涌进城来。",
    "手机用户越来越多了。",
    "他在一秒之内记住了所有的字。",
    "求求你，放过他吧！",
    "收藏家叹道：好物！",
    "下一回，且看孔明如何用计。",
    "他打开www.example.com看了一眼。",
    "PS：母亲问你好。",
    "……",
    "——他没有说完。",
    "一",
    "目录",
    "正是：",
    "一九八四年",
    "来自东海的客人说：“天罗地网。”",
    "最新的消息请他过目。",
]


@pytest.mark.parametrize("line", [*ADVERTISEMENTS, *FURNITURE])
def test_a_line_that_is_not_the_book_is_taken_out_and_reported(line: str) -> None:
    book = clean(f"却说曹操大怒。\n{line}\n玄德大惊。", title="书")
    assert [paragraph.text for paragraph in book.paragraphs] == ["却说曹操大怒。", "玄德大惊。"]
    (removal,) = (removal for removal in book.removed.values() if removal.characters)
    assert (removal.count, removal.examples) == (1, [line])
    assert removal.characters == count_characters(line)


@pytest.mark.parametrize("line", NOVEL_LINES)
def test_a_line_of_a_novel_stays(line: str) -> None:
    book = clean(f"却说曹操大怒。\n{line}\n玄德大惊。", title="书")
    assert [paragraph.text for paragraph in book.paragraphs] == ["却说曹操大怒。", line, "玄德大惊。"]
    assert not any(removal.characters for removal in book.removed.values())


def test_a_stamp_in_a_sentence_is_taken_out() -> None:
    book = clean("二军远来www.example.com ，只宜坚守。\n他写道：www.example.com，收到。", title="书")
    assert [p.text for p in book.paragraphs] == ["二军远来，只宜坚守。", "他写道：www.example.com，收到。"]
    assert book.removed["行内网址戳"].count == 1


def kept_and_reported(book: Book) -> int:
    kept = sum(count_characters(paragraph.text) for paragraph in book.paragraphs)
    return kept + sum(removal.characters for removal in book.removed.values())


LINES = st.one_of(
    st.text(max_size=60),
    st.sampled_from(ADVERTISEMENTS + FURNITURE + NOVEL_LINES),
    st.sampled_from(
        [
            *(
                "",
                "　　",
                "第一回 甲",
                "第二回 乙",
                "第三章",
                "楔子",
                "a\u200bb",
                "\ufffd",
                "\x00",
                "👨\u200d👩\u200d👧",
                "\ufeff字",
            ),
            "*** START OF THE PROJECT GUTENBERG EBOOK 甲 ***",
            "*** END OF THE PROJECT GUTENBERG EBOOK 甲 ***",
            *("Produced by Somebody", "x" * 70, "长" * 30, "长" * 29 + "。", "　　长句" * 6, "二军www.a.com ，退。"),
        ]
    ),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(LINES, max_size=80), st.sampled_from(["\n", "\r\n", "\r", "\u2028", "\n\n"]))
def test_nothing_is_lost_without_a_report(lines: list[str], line_end: str) -> None:
    text = line_end.join(lines)
    book = clean(text, title="书")
    assert kept_and_reported(book) == count_characters(text)
    assert [paragraph.number for paragraph in book.paragraphs] == list(range(1, len(book.paragraphs) + 1))
    assert all(p.text == p.text.strip() and p.text and "\n" not in p.text for p in book.paragraphs)
    assert book.characters == sum(len(paragraph.text) for paragraph in book.paragraphs)


def test_white_space_and_blank_lines() -> None:
    book = clean("\ufeff　　却说　曹操\t大怒。\r\n\r\n\r\n\r\n\u00a0玄德\u200b大惊。  \n", title="书")
    assert [paragraph.text for paragraph in book.paragraphs] == ["却说 曹操 大怒。", "玄德大惊。"]
    assert book.removed["零宽字符"].count == 2
    assert book.removed["多余空行"].count >= 2
    assert clean("👨\u200d👩\u200d👧好", title="书").paragraphs[0].text == "👨\u200d👩\u200d👧好"


GUTENBERG_TEXT = """The Project Gutenberg eBook of 儒林外史

Title: 儒林外史

*** START OF THE PROJECT GUTENBERG EBOOK 儒林外史 ***

Produced by Somebody

第一回　說楔子敷陳大義　借名流隱括全文

人生南北多歧路。

*** END OF THE PROJECT GUTENBERG EBOOK 儒林外史 ***

Updated editions will replace the previous one.
"""


def test_project_gutenbergs_header_and_footer() -> None:
    book = clean(GUTENBERG_TEXT, title="儒林外史")
    assert [p.text for p in book.paragraphs] == ["第一回 說楔子敷陳大義 借名流隱括全文", "人生南北多歧路。"]
    assert book.removed[GUTENBERG].count == 1
    assert kept_and_reported(book) == count_characters(GUTENBERG_TEXT)
    twice = clean(GUTENBERG_TEXT + GUTENBERG_TEXT.replace("第一", "第二"), title="两本")
    assert [p.text for p in twice.paragraphs][::2] == twice.chapters and len(twice.paragraphs) == 4


def test_hard_wrapped_lines_are_joined() -> None:
    sentence = "話說天下大勢分久必合合久必分周末七國分爭並入於秦及秦滅之後楚漢分爭又並入於漢"
    paragraph = (sentence * 5)[:175] + "。"
    wrapped = "\n".join(("　　" if i == 0 else "") + paragraph[i : i + 35] for i in range(0, len(paragraph), 35))
    text = "\n".join(["第一回 甲乙", *[wrapped] * 6, "", "詩曰：", "床前明月光，", "疑是地上霜。", ""])
    book = clean(text, title="书")
    assert [p.text for p in book.paragraphs] == [
        "第一回 甲乙",
        *[paragraph] * 6,
        "詩曰：",
        "床前明月光，",
        "疑是地上霜。",
    ]
    assert book.removed[UNWRAPPED].count == 6 * 5
    plain = "\n".join(["他说了一句不长不短也没有别的意思的话就走了。"] * 60)
    assert len(clean(plain, title="书").paragraphs) == 60


HEADINGS = [
    ("第一回 宴桃园豪杰三结义 斩黄巾英雄首立功", 1),
    ("第一回宴桃园豪杰三结义", 1),
    ("第一百二十回 荐杜预老将献新谋", 120),
    ("第一二○回　甄士隱詳說太虛情", 120),
    ("第八三回     心猿識得丹頭", 83),
    ("第12章 重逢", 12),
    ("第１２章　重逢", 12),
    ("第 3 章", 3),
    ("第廿三节", 23),
    ("第十卷 风云", 10),
    ("卷三 风云", 3),
    ("卷二十", 20),
    ("第二部", 2),
    ("正文 第一章 你是谁？", 1),
    ("第五章：谁，在敲门", 5),
    ("第两百零五章", 205),
    ("Chapter 7 Home", 7),
    *((name, None) for name in ("楔子", "序", "序章", "引子", "尾声", "尾聲 萬里", "后记", "番外一", "自序", "大结局")),
]
SENTENCES = [
    "第一回合，关羽便斩了华雄。",
    "第一回合",
    "第一回见到他时，他还是个孩子。",
    "第二回来的时候他哭了",
    "第一次世界大战",
    "第三章里写道：人生如梦。",
    "第一部分",
    "第一部队",
    "第三节课",
    "第二集团军",
    "第三章讲的是什么，他忘了",
    "尾声渐渐远去。",
    "序言写得很好",
    "卷三尺布",
    "楔子一样钉在那里",
    "“第一章 开端”",
    "他翻到第一章",
    "第" + "一" * 60 + "章",
]


@pytest.mark.parametrize(("line", "number"), HEADINGS)
def test_headings(line: str, number: int | None) -> None:
    heading = parse_heading(line)
    assert heading is not None and heading.number == number


@pytest.mark.parametrize("line", SENTENCES)
def test_sentences_that_begin_like_headings(line: str) -> None:
    assert parse_heading(line) is None


@given(st.integers(1, 9999))
def test_numerals(value: int) -> None:
    digits = "零一二三四五六七八九"
    text, gap = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = value // unit % 10
        gap = gap or (digit == 0 and bool(text))
        if digit:
            text += ("零" if gap and text else "") + digits[digit] + name
            gap = False
    assert read_numeral(text) == value
    assert read_numeral("".join(digits[int(digit)] for digit in str(value))) == value
    assert read_numeral(str(value)) == value


def test_paragraphs_know_their_chapter() -> None:
    book = clean("题记。\n楔子\n甲。\n第一章 开端\n乙。\n第一章 开端\n丙。\n第三章\n丁。\n尾声\n戊。", title="书")
    assert [(p.text, p.chapter, p.chapter_number, p.number) for p in book.paragraphs] == [
        ("题记。", "", 0, 1),
        ("楔子", "楔子", 1, 2),
        ("甲。", "楔子", 1, 3),
        ("第一章 开端", "第一章 开端", 1, 4),
        ("乙。", "第一章 开端", 1, 5),
        ("第一章 开端", "第一章 开端", 1, 6),
        ("丙。", "第一章 开端", 1, 7),
        ("第三章", "第三章", 3, 8),
        ("丁。", "第三章", 3, 9),
        ("尾声", "尾声", 4, 10),
        ("戊。", "尾声", 4, 11),
    ]
    assert book.chapters == ["楔子", "第一章 开端", "第三章", "尾声"]


def test_a_table_of_contents_is_no_chapter() -> None:
    names = [f"第{number}章 题目{number}" for number in range(1, 6)]
    body = "\n".join(f"{name}\n正文在此。" for name in names)
    book = clean("目录\n" + "\n".join(names) + "\n" + body, title="书")
    assert book.chapters == names
    assert len(book.paragraphs) == 1 + 5 + 10
    assert {p.chapter for p in book.paragraphs[:6]} == {""}


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="甲乙丙。！？”…, a", min_size=1, max_size=50), st.integers(1, 3000))
def test_sentences_and_pieces_are_the_text(part: str, repeats: int) -> None:
    text = (part * repeats).strip()
    assert "".join(sentences(text)) == text
    pieces = cut(text)
    assert count_characters("".join(pieces)) == count_characters(text)
    if len(text) > LONGEST_PARAGRAPH:
        assert all(0 < len(piece) <= PIECE for piece in pieces)
    elif text:
        assert pieces == [text]


def test_a_long_paragraph_is_cut_at_sentences_and_counted() -> None:
    sentence = "他说：“天下大势，分久必合。”"
    book = clean(sentence * 2000, title="书")
    assert all(paragraph.text.endswith("。”") for paragraph in book.paragraphs)
    assert book.removed[CUT].count == len(book.paragraphs) - 1 > 10


def test_rules_have_names_of_their_own() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
