"""Text to a book of clean paragraphs with their chapters. Everything taken out is counted, with examples.

The contract: the characters of the text, white space aside, are those of the paragraphs plus those that
`Book.removed` reports. Knows nothing of files or encodings.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

LONGEST_PARAGRAPH = 20_000  # characters; nobody writes longer ones: the line ends were lost
PIECE = 2_000  # characters, at most, of the pieces that such a paragraph is cut into
LONGEST_HEADING = 50
LONGEST_ADVERTISEMENT = 120
EXAMPLES = 3
EXAMPLE_LENGTH = 60


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph and where it stands, so that it can be cited.

    Attributes:
        chapter: the heading it stands under ("" before the first); a heading stands under itself.
        chapter_number: the heading's own numeral, else one more than the chapter before; 0 before the first heading.
        number: 1-based number of the paragraph in the book, headings included.
    """

    book: str
    chapter: str
    chapter_number: int
    number: int
    text: str


@dataclass(slots=True)
class Removal:
    """What one rule did to one book: in how many places, the non-space characters it took out, and some of them."""

    count: int = 0
    characters: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Count one removed piece of text."""
        self.count += 1
        self.characters += count_characters(text)
        if len(self.examples) < EXAMPLES:
            self.examples.append(text.strip()[:EXAMPLE_LENGTH])


@dataclass(slots=True)
class Book:
    """A cleaned book.

    Attributes:
        source: what the user gave: a catalogue name, an address or a file.
        encoding: the encoding it was read in, or "epub".
        characters: of all paragraphs together, white space included.
        chapters: the headings, in order.
        removed: by the rule's name (`RULES`, and the names of the steps below it).
    """

    title: str
    source: str
    encoding: str
    characters: int
    paragraphs: list[Paragraph]
    chapters: list[str]
    removed: dict[str, Removal]

    @property
    def excerpt(self) -> str:
        """The beginning of the first paragraph that is not a heading."""
        bodies = (paragraph.text for paragraph in self.paragraphs if paragraph.text != paragraph.chapter)
        return next(bodies, self.paragraphs[0].text if self.paragraphs else "")[:40]


@dataclass(frozen=True, slots=True)
class Rule:
    """Something to take out: every match anywhere (`whole_line` false), or the lines that match from end to end."""

    name: str
    pattern: re.Pattern[str]
    whole_line: bool = True


def _any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE)


_URL = r"(?:https?://|www\.)[\w.\-/?=&%:#~+@]+"
_OPEN, _CLOSE = r"[【（(\[「《*＊\s]*", r"[】）)\]」》*＊。！!~～…\s]*"

# Conservative on purpose: an advertisement left in costs a line, a line of the novel taken out is a fault.
RULES: tuple[Rule, ...] = (
    Rule(
        "零宽字符",  # a joiner inside an emoji is part of it
        re.compile(
            r"[\u00ad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff]|(?<![\u2600-\u27bf\ufe0f\U0001f000-\U0001faff])\u200d"
        ),
        whole_line=False,
    ),
    Rule("控制字符", re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]"), whole_line=False),
    Rule("解不开的字节", re.compile("\ufffd+"), whole_line=False),
    Rule(
        # Sites stamp their address into the middle of a sentence. Told from an address the author wrote by the
        # space that the stamp leaves before a Chinese punctuation mark.
        "行内网址戳",
        re.compile(r"www\.[a-z0-9\-]+(?:\.[a-z]+)+ (?=[，。、；：！？”’…])", re.IGNORECASE),
        whole_line=False,
    ),
    Rule(
        "页码",
        _any_of(
            r"[\-–—~·•\[(（【\s]*[0-9０-９]{1,4}[\-–—~·•\])）】\s]*",
            r"第\s*[0-9０-９]{1,4}\s*页(?:\s*[/／,，共]+\s*[0-9０-９]{1,4}\s*页)?",
            r"(?:page|p\.)\s*[0-9]{1,4}(?:\s*(?:of|/)\s*[0-9]{1,4})?",
            r"[0-9]{1,4}\s*/\s*[0-9]{1,4}",
        ),
    ),
    Rule("分隔线", re.compile(r"(?:[\-=*_~#+|─━═＊－＝＿～☆★◇◆○●□■※]\s*){3,}|[—.·•…]{5,}")),
    Rule("网址", re.compile(rf"(?:[\w《》]{{0,12}}[:：]\s*)?{_OPEN}{_URL}{_CLOSE}", re.IGNORECASE)),
    Rule(
        "网站广告",
        _any_of(
            rf"{_OPEN}本(?:书|文|电子书|小说|作品)由[^，。！？]{{1,40}}(?:整理|制作|上传|收集|扫描|校对|首发|提供下载)[^。！？]{{0,30}}{_CLOSE}",
            rf"{_OPEN}(?:想看|看|阅读|下载)?更多[^。！？]{{0,20}}(?:请|尽在|欢迎)[^。！？]{{0,20}}(?:{_URL}|网|论坛|书屋|书库){_CLOSE}.{{0,20}}",
            r"(?:手机|电脑|平板)(?:用户|阅读|版)[^。！？]{0,8}(?:请|访问|登[录陆]|浏览)[^。！？]{0,40}[。！]?",
            rf"{_OPEN}(?:请|敬请)?(?:大家|各位|书友|务必|您)*(?:记住|牢记|收藏|记下)(?:本站|本书)(?:首发|最新)?(?:域名|网址|地址|网站|[:：，,！!。]|\s).*",
            rf"{_OPEN}(?:请|敬请)?收藏本[站书]{_CLOSE}",
            r"(?:天才)?[一1]秒钟?记住[^。！？]{0,40}(?:本站|网址|域名|小说网|书网|www|为您|免费).*",
            rf"{_OPEN}(?:最新|最快)(?:章节|更新|网址|域名|地址)[^。！？]{{0,20}}(?:请|尽在|就在|访问|[:：])[^。！？]{{0,60}}{_CLOSE}",
            r"[^。！？]{0,40}(?:无弹窗|txt(?:电子书|小说|全集)?下载|txt全集)[^。！？]{0,40}[。！]?",
            r"ps\s*[\d一二三]?\s*[:：，,。].*(?:月票|推荐票|求票|打赏|订阅|求收藏|更新|加更).*",
            rf"{_OPEN}(?:(?:跪|急|各种|继续)?求?(?:月票|推荐票?|收藏|订阅|打赏|红票|鲜花)[、，,！!和~～。…\s]*)+{_CLOSE}",
            rf"[（(【\[]\s*(?:本章完|本章未完|未完待续|待续)[^）)】\]]{{0,60}}[）)】\]]?{_CLOSE}",
            r"本章(?:未完|完|已完)(?:[，,。\s].{0,30})?",
            r"未完待续[^。]{0,10}(?:如果您?喜欢|欢迎|请|起点|手机).*",
            r"(?=.*(?:上一|下一|返回|加入|投推))(?:(?:上一|下一)[章页回]|(?:返回|章节)?目录|返回(?:书页|首页)|加入书[签架]|投推荐票|[|←→/、\s·\-])+",
            r"(?:加入书签|返回目录|返回书页|投推荐票)[^。！？]{0,20}",
            rf"(?:本书|小说|文章|本文)(?:来自|来源于?|转自|首发于?|选自|下载于)[:：]?[^。！？]{{0,20}}(?:{_URL}|网|书屋|书库|论坛){_CLOSE}",
            rf"[^，。！？]{{0,12}}(?:起点中文网|起点读书|晋江文学城|笔趣阁|纵横中文网|红袖添香|潇湘书院|新浪读书)[^。！？]{{0,16}}(?:{_URL}|首发|欢迎|更新|阅读)[^。]{{0,50}}{_CLOSE}",
            r"[^。！？]{0,30}仅供[^。！？]{0,12}(?:交流|学习|试读|预览|试阅)[^！？]{0,40}(?:商业|版权|删除|正版|小时)[^！？]{0,30}",
        ),
    ),
)

# Steps that are not a pattern over a line:
WHITE_SPACE = "空白规整"
BLANK_LINES = "多余空行"
GUTENBERG = "古登堡工程头尾"
UNWRAPPED = "硬换行接回"
CUT = "过长段落切开"

_LINE_END = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_ODD_SPACE = re.compile(r"[^\S\n]{2,}|[^\S\n ]")
_SENTENCE_ENDS = "。！？!?；;…"
_CLOSING = "”’」』）)】》\"'"


def count_characters(text: str) -> int:
    """Characters of a text, white space aside."""
    return len("".join(text.split()))


def clean(text: str, *, title: str, source: str = "", encoding: str = "") -> Book:
    """Turn a text into a book. Its time and memory grow in proportion to the text, however long the lines are."""
    removed: dict[str, Removal] = {}

    def report(name: str) -> Removal:
        return removed.setdefault(name, Removal())

    text = _LINE_END.sub("\n", text)
    for rule in RULES:
        if not rule.whole_line and rule.pattern.search(text):
            for match in rule.pattern.finditer(text):
                report(rule.name).add(match[0])
            text = rule.pattern.sub("", text)
    text, odd = _ODD_SPACE.subn(" ", text)
    if odd:
        report(WHITE_SPACE).count += odd

    lines, boilerplate = _without_gutenberg(text.split("\n"))
    if boilerplate:
        report(GUTENBERG).add("\n".join(boilerplate))
    kept: list[str] = []  # "" for a blank line
    for line in lines:
        stripped = line.strip()
        if stripped and len(stripped) <= LONGEST_ADVERTISEMENT and (name := _matching_rule(stripped)):
            report(name).add(stripped)
        elif stripped or (kept and kept[-1]):
            kept.append(line.rstrip() if stripped else "")
        else:
            report(BLANK_LINES).count += 1
    texts, joins = _unwrapped(kept)
    if joins:
        report(UNWRAPPED).count += joins

    contents = _contents_lines(texts)
    paragraphs: list[Paragraph] = []
    chapters: list[str] = []
    chapter, chapter_number = "", 0
    for index, whole in enumerate(texts):
        # A heading repeated on every page is furniture of the page: kept, but no new chapter.
        if whole != chapter and index not in contents and (heading := parse_heading(whole)):
            chapter, chapter_number = whole, heading.number or chapter_number + 1
            chapters.append(whole)
        pieces = cut(whole)
        if len(pieces) > 1:
            report(CUT).count += len(pieces) - 1
        for piece in pieces:
            paragraphs.append(Paragraph(title, chapter, chapter_number, len(paragraphs) + 1, piece))
    characters = sum(len(paragraph.text) for paragraph in paragraphs)
    return Book(title, source, encoding, characters, paragraphs, chapters, removed)


def _matching_rule(line: str) -> str | None:
    return next((rule.name for rule in RULES if rule.whole_line and rule.pattern.fullmatch(line)), None)


# Project Gutenberg ----------------------------------------------------------------------------------------------------

_PG_START = re.compile(r"\s*\*{3}\s*START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK", re.IGNORECASE)
_PG_END = re.compile(
    r"\s*\*{3}\s*END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK|End of (?:the )?Project Gutenberg's? ", re.IGNORECASE
)
_PG_CREDIT = re.compile(r"\s*(?:(?:This e-?book was )?Produced by|E-?text prepared by) .*", re.IGNORECASE)
_PG_HEADER_LINES = 500


def _without_gutenberg(lines: list[str]) -> tuple[list[str], list[str]]:
    """Split off what stands before a START line, from an END line on, and the transcriber's credit."""
    starts = [number for number, line in enumerate(lines) if _PG_START.match(line)]
    ends = [number for number, line in enumerate(lines) if _PG_END.match(line)]
    if not starts and not ends:
        return lines, []
    kept: list[str] = []
    dropped: list[str] = []
    # Without a START line nearby, what the file begins with is the book.
    dropping = bool(starts) and starts[0] < _PG_HEADER_LINES and (not ends or starts[0] < ends[0])
    since_start = credit_within = 12
    in_marker = False
    for line in lines:
        since_start += 1
        if in_marker:  # a marker with a long title runs over two lines
            dropped.append(line)
            in_marker = "***" not in line and bool(line.strip())
        elif _PG_START.match(line):
            dropped.append(line)
            dropping, since_start = False, 0
            in_marker = line.count("***") < 2
        elif dropping or _PG_END.match(line):
            dropped.append(line)
            dropping = True
        elif since_start < credit_within and _PG_CREDIT.fullmatch(line):
            dropped.append(line)
        else:
            kept.append(line)
    return kept, dropped


# Hard-wrapped lines ---------------------------------------------------------------------------------------------------


def _unwrapped(lines: list[str]) -> tuple[list[str], int]:
    """Non-blank lines without their indentation, those that a fixed width had broken joined again; how many joins.

    A text counts as hard-wrapped if most lines that another follows at once are full, and most of those stop in
    mid-sentence: in a text with one paragraph a line nearly every line ends with a full stop.
    """
    lengths = sorted(len(line) for line in lines if line)
    width = lengths[len(lengths) * 95 // 100] if lengths else 0
    full = 0.8 * width
    followed = [a for a, b in itertools.pairwise(lines) if a and b and not b[0].isspace()]
    filled = [line for line in followed if len(line) >= full]
    open_ended = [line for line in filled if line[-1] not in _SENTENCE_ENDS + _CLOSING]
    wrapped = (
        20 <= width <= 100
        and len(followed) >= 20
        and len(filled) > 0.6 * len(followed)
        and len(open_ended) > 0.5 * len(filled)
    )
    texts: list[list[str]] = []
    joins, previous = 0, ""
    for line in lines:
        continues = (
            wrapped
            and len(previous) >= full
            and bool(line)
            and not line[0].isspace()
            and not parse_heading(line)
            and not parse_heading(previous.strip())
        )
        if continues:
            gap = " " if previous[-1].isascii() and line[0].isascii() else ""
            texts[-1].append(gap + line)
            joins += 1
        elif line:
            texts.append([line.strip()])
        previous = line
    return ["".join(parts) for parts in texts], joins


# Chapters -------------------------------------------------------------------------------------------------------------

_NUMERAL = "[0-9０-９〇零○一二三四五六七八九十百千两兩廿卅壹贰叁肆伍陆柒捌玖拾佰]+"
_NUMBERED = re.compile(
    rf"(?:正文\s*)?第\s*(?P<numeral>{_NUMERAL})\s*"
    # Not headings: 第一回合, 第一部分, 第一部队, 第三节课, 第二集团军, 第三篇文章, 第一章程
    r"(?:回(?!合|头|来|去|事)|章(?!程|鱼)|节(?!课|目|车)|節(?!課|目)|卷(?!烟)|部(?!分|队|隊|门|門|下|电|電)|集(?!团|團|合|体|體|中)|篇(?!幅|文)|折(?!扇)|幕|话(?!题)|話)"
    r"(?P<rest>.*)"
)
_VOLUME = re.compile(rf"卷\s*之?(?P<numeral>{_NUMERAL})(?P<rest>(?:[\s:：].*)?)")
_ENGLISH = re.compile(r"(?:chapter|part|book)\s+(?P<numeral>[0-9]{1,4})(?P<rest>(?:[\s:：.].*)?)", re.IGNORECASE)
_NAMED = re.compile(
    r"(?:楔\s?子|序\s?[章言幕曲]|自序|代序|序|引\s?[子言]|前\s?言|尾\s?[声聲]|后\s?记|後\s?記|跋|终章|終章|大结局|大結局|"
    r"番外[篇一二三四五六七八九十0-9]*|附录[一二三四五六七八九十]?|附錄|缘起|緣起|卷首语|内容简介|內容簡介)"
    r"(?P<rest>(?:[\s:：].*)?)"
)
_SENTENCE_MARKS = re.compile(r"[。；，,;]")


@dataclass(frozen=True, slots=True)
class Heading:
    """A chapter heading; `number` is None where it has no numeral or one that cannot be read."""

    number: int | None


def parse_heading(line: str) -> Heading | None:
    """Tell a chapter heading (第…回, 第…章, 卷…, 楔子, 尾声 …) from a sentence that begins like one (None)."""
    line = line.strip()
    if not line or len(line) > LONGEST_HEADING or line[0] not in "第卷正楔序自代引前尾后後跋终終大番附缘緣内內cCpPbB":
        return None
    match = _NUMBERED.fullmatch(line) or _VOLUME.fullmatch(line) or _ENGLISH.fullmatch(line) or _NAMED.fullmatch(line)
    if match is None:
        return None
    rest = match["rest"]
    if rest.rstrip().endswith(("。", "；", "，", "：", "”", ",")):
        return None
    # Straight after the numeral only a plain title may follow; after a space or colon, any punctuation within it.
    if rest and rest[0] not in " \t\u3000:：、.．·・—-《【（(「" and re.search(r"[。；，,;！？!?：“”]", rest):
        return None
    if rest.strip() and _SENTENCE_MARKS.search(rest) and re.search(r"[。；]", rest):
        return None
    return Heading(read_numeral(match.groupdict().get("numeral") or ""))


_DIGITS = {
    **{digit: value for value, digit in enumerate("零一二三四五六七八九")},
    **{digit: value for value, digit in enumerate("〇壹贰叁肆伍陆柒捌玖")},
    "○": 0,
    "两": 2,
    "兩": 2,
}
_UNITS = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000}


def read_numeral(numeral: str) -> int | None:
    """The value of an Arabic (half or full width) or Chinese (一百二十, 一二〇, 廿三) numeral, or None."""
    numeral = unicodedata.normalize("NFKC", numeral).replace("廿", "二十").replace("卅", "三十")
    if numeral.isdecimal() and numeral.isascii():
        return int(numeral)
    if not numeral or any(c not in _DIGITS and c not in _UNITS for c in numeral):
        return None
    if not any(c in _UNITS for c in numeral):  # positional: 八三 is 83
        return int("".join(str(_DIGITS[c]) for c in numeral))
    total, digit = 0, None
    for c in numeral:
        if c in _UNITS:
            total += _UNITS[c] * (1 if digit is None else digit)
            digit = None
        else:
            digit = _DIGITS[c] or None  # the 零 in 一百零三 only fills a gap
    return total + (digit or 0)


def _contents_lines(texts: list[str]) -> set[int]:
    """Indices of headings that belong to a table of contents: nothing under them, and the same heading comes later."""
    headings = [index for index, text in enumerate(texts) if parse_heading(text)]
    left = Counter(texts[index] for index in headings)
    contents = set()
    for position, index in enumerate(headings):
        left[texts[index]] -= 1
        bare = position + 1 < len(headings) and headings[position + 1] == index + 1
        if bare and left[texts[index]]:
            contents.add(index)
    return contents


# Long paragraphs ------------------------------------------------------------------------------------------------------


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, each with its closing quotation marks; joined they are the text."""
    start = 0
    for match in re.finditer(rf"[{_SENTENCE_ENDS}]+[{re.escape(_CLOSING)}]*", text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def cut(text: str) -> list[str]:
    """A paragraph over `LONGEST_PARAGRAPH` as pieces of at most `PIECE` characters that end with sentences."""
    if len(text) <= LONGEST_PARAGRAPH:
        return [text]
    pieces: list[str] = []
    parts: list[str] = []
    length = 0
    for sentence in sentences(text):
        # A "sentence" without any mark for pages on end is cut where it stands.
        for part in (sentence[i : i + PIECE] for i in range(0, len(sentence), PIECE)):
            if length + len(part) > PIECE:
                pieces.append("".join(parts).strip())
                parts, length = [], 0
            parts.append(part)
            length += len(part)
    pieces.append("".join(parts).strip())
    return [piece for piece in pieces if piece]
