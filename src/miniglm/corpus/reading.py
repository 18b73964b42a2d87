"""Bytes to text: encodings detected or given and checked for plausibility, EPUB in reading order, simplification.

Knows nothing of paragraphs, chapters or advertisements: that is cleaning.py.
"""

from __future__ import annotations

import codecs
import posixpath
import re
import unicodedata
import zipfile
from collections import Counter
from functools import cache
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from miniglm.errors import MiniGLMError

MAX_EPUB_BYTES = 200 * 1024 * 1024  # unpacked; the longest novels with their pictures stay far below
MAX_EPUB_MEMBERS = 20_000
MAX_DOCUMENT_BYTES = 16 * 1024 * 1024  # of one document of an EPUB: as a tree it takes ten to fifty times as much
MAX_XML_BYTES = 4 * 1024 * 1024  # of its lists of contents: 20,000 entries take about 3 MB
PLAUSIBLE = 0.75  # share of common characters: a novel had 0.99 read right, at most 0.45 as another Chinese encoding
MAX_BROKEN = 0.001  # share of U+FFFD that is taken for a damaged byte or two and not for a wrong encoding
ENCODING_HINT = "utf-8、gb18030、big5 或 utf-16"

_SAMPLE_BYTES = 1 << 16
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CHINESE_ENCODINGS = ("utf-8", "gb18030", "big5hkscs", "utf-16-le", "utf-16-be")
_MAGIC = (
    (b"%PDF", "PDF"),
    (b"\x89PNG", "PNG 图片"),
    (b"\xff\xd8\xff", "JPEG 图片"),
    (b"GIF8", "GIF 图片"),
    (b"PK\x03\x04", "ZIP 压缩包（或 Word 文档）"),
    (b"Rar!", "RAR 压缩包"),
    (b"7z\xbc\xaf\x27\x1c", "7z 压缩包"),
    (b"\x1f\x8b", "gzip 压缩包"),
    (b"\xd0\xcf\x11\xe0", "旧版 Word 文档"),
    (b"\x7fELF", "程序"),
    (b"SQLite format 3", "数据库"),
)


class Reading(NamedTuple):
    """A file as text.

    Attributes:
        text: with U+FFFD for the few bytes that could not be decoded, if any.
        encoding: the name of the encoding it was read in, or "epub".
        title: the title that the file itself names (EPUB), or "".
    """

    text: str
    encoding: str
    title: str = ""


def read_text(path: Path, encoding: str | None = None) -> Reading:
    """Read a text file or an EPUB (told by its content, not its name).

    Args:
        encoding: the encoding of a text file; detected if None. Of no meaning for an EPUB.

    Raises:
        MiniGLMError: the file cannot be read, is empty, binary or damaged, or is not in `encoding`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MiniGLMError(f"读不出来：{error.strerror or error}", path=path) from error
    if data.startswith(b"PK\x03\x04") and _is_epub(data):
        return read_epub(data, path=path)
    if path.suffix.lower() == ".epub":
        raise MiniGLMError("不是完好的 EPUB 文件", path=path, fix="请换一份，或用 Calibre 重新转换成 EPUB")
    return decode(data, path=path, encoding=encoding)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped.

    Raises:
        MiniGLMError: as `read_text`.
    """
    return [line.strip() for line in read_text(path)[0].splitlines() if line.strip()]


def decode(data: bytes, *, path: str | Path, encoding: str | None = None) -> Reading:
    """Turn bytes into text; `path` is only for messages.

    Raises:
        MiniGLMError: empty, blank or binary data, an unknown `encoding`, or text that is implausible in it.
    """
    if not data:
        raise MiniGLMError("文件是空的", path=path, fix="请换一个有内容的文本文件")
    _refuse_binary(data, path)
    reading = _decode_given(data, path, encoding) if encoding else _decode_detected(data, path)
    if not reading.text.strip("\ufeff\u200b \t\r\n\f\v\u3000"):
        raise MiniGLMError("文件里只有空白", path=path, fix="请换一个有内容的文本文件")
    return reading


def simplify(text: str) -> str:
    """Traditional to simplified Chinese characters, by OpenCC's phrase-aware `t2s` conversion."""
    from opencc import OpenCC

    return str(OpenCC("t2s").convert(text))


# Encodings ------------------------------------------------------------------------------------------------------------


def _refuse_binary(data: bytes, path: str | Path) -> None:
    kind = next((kind for magic, kind in _MAGIC if data.startswith(magic)), None)
    if data[60:68] in (b"BOOKMOBI", b"TEXtREAd"):
        kind = "MOBI 电子书"
    if kind:
        raise MiniGLMError(f"这是{kind}，不是文本文件", path=path, fix="请先转成 .txt 或 .epub")


def _decode_given(data: bytes, path: str | Path, encoding: str) -> Reading:
    try:
        name = codecs.lookup(encoding).name
        "".encode(name)  # refuses codecs that are not text encodings (base64, zlib)
    except LookupError:
        raise MiniGLMError(f"没有叫 {encoding} 的编码", path=path, fix=f"--encoding 可用 {ENCODING_HINT}") from None
    # GB 2312 and GBK are subsets, and files that claim them use more; so it is with Big5.
    name = {"gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "utf-8": "utf-8-sig"}.get(name, name)
    if name == "utf-16" and not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = max(("utf-16-le", "utf-16-be"), key=lambda each: _score(_sample(data, each), each))
    text = _decoded(data, name)
    share = 0.0 if text is None else _score(_pieces(text), name)
    # Every sequence of bytes that decodes as UTF-8 was meant as UTF-8; the others decode almost anything.
    if text is None or (share < PLAUSIBLE and not name.startswith("utf-8")):
        better = _best(data)
        found = (
            f"有解不开的字节（第 {_first_bad_byte(data, name)} 字节起）"
            if text is None
            else f"解出来每百字有 {round(100 * (1 - share))} 个生僻或无意义的字，如“{_excerpt(text)}”"
        )
        advice = f"请用 --encoding {better}" if better and better != _shown(name) else f"请改用 {ENCODING_HINT}"
        raise MiniGLMError(f"编码不是 {encoding}：{found}", path=path, fix=f"{advice}，或不写 --encoding 自动识别")
    return Reading(text, _shown(name))


def _decode_detected(data: bytes, path: str | Path) -> Reading:
    for mark, name in _BOMS:
        if data.startswith(mark):
            text = _decoded(data, name)
            if text is None:
                where = _first_bad_byte(data, name)
                raise MiniGLMError(
                    f"文件开头标明是 {_shown(name)}，内容却解不开（第 {where} 字节起）",
                    path=path,
                    fix="文件可能已损坏，请换一份",
                )
            _check_unicode(text, path)
            return Reading(text, _shown(name))
    nul = b"\0" in data
    # Valid UTF-8 with anything beyond ASCII in it is UTF-8: other encodings do not form it by chance.
    if not nul and (text := _decoded(data, "utf-8")) is not None:
        _check_unicode(text, path)
        return Reading(text, "utf-8")
    for _, name in _ranking(data):
        if (text := _decoded(data, name)) is not None and _score(_pieces(text), name) >= PLAUSIBLE:
            return Reading(text, _shown(name))
    if nul:
        raise MiniGLMError("这是二进制文件，不是文本", path=path, fix="请先转成 .txt 或 .epub")
    raise MiniGLMError(
        "认不出文字编码：按哪种中文编码解出来都多是生僻或无意义的字",
        path=path,
        fix=f"若知道编码，请用 --encoding 指定（{ENCODING_HINT}），否则请换一份文件",
    )


def _decoded(data: bytes, name: str) -> str | None:
    """All of the data as text, or None if more than a damaged byte or two does not decode."""
    try:
        return data.decode(name)
    except UnicodeDecodeError:
        text = data.decode(name, errors="replace")
    return text if text.count("\ufffd") <= MAX_BROKEN * len(text) else None


def _first_bad_byte(data: bytes, name: str) -> int:
    try:
        data.decode(name)
    except UnicodeDecodeError as error:
        return error.start + 1
    return 1


def _shown(name: str) -> str:
    """The name to print and to pass to --encoding."""
    return {"utf-8-sig": "utf-8", "big5hkscs": "big5"}.get(name, name)


def _best(data: bytes) -> str | None:
    """The encoding under which the data looks like Chinese, if there is one."""
    score, name = _ranking(data)[0]
    return _shown(name) if score >= PLAUSIBLE else None


def _ranking(data: bytes) -> list[tuple[float, str]]:
    """Encodings by plausibility, best first; charset-normalizer's guess breaks ties."""
    from charset_normalizer import from_bytes

    guess = from_bytes(_sample_bytes(data, 0), steps=5, chunk_size=512).best()
    names = dict.fromkeys([*([guess.encoding.replace("_", "-")] if guess else []), *_CHINESE_ENCODINGS])
    scored = [(_score(_sample(data, name), name), name) for name in names]
    return sorted(scored, key=lambda pair: -pair[0])  # stable: the guess comes first


def _sample_bytes(data: bytes, start: int) -> bytes:
    """Some of the data from just after a line end, to just before another if there is one."""
    if start:
        start = data.find(b"\n", start, start + _SAMPLE_BYTES) + 1
        if not start:
            return b""
    piece = data[start : start + _SAMPLE_BYTES]
    return piece[: piece.rfind(b"\n") + 1] or piece


def _sample(data: bytes, name: str) -> list[str]:
    """Decoded samples of the head and of three places further on (one line: the head, where characters begin)."""
    if name.startswith("utf-16"):  # any even offset is between two code units
        pieces = [data[start : start + _SAMPLE_BYTES] for start in (len(data) * k // 4 & ~1 for k in range(4))]
    else:
        pieces = [_sample_bytes(data, len(data) * k // 4) for k in range(4)]
    # A character may be cut at the end of a piece.
    return [piece.decode(name, errors="replace").rstrip("\ufffd") for piece in pieces]


def _pieces(text: str, size: int = 20_000) -> list[str]:
    """Four evenly spaced pieces of a long text."""
    if len(text) <= 4 * size:
        return [text]
    return [text[start : start + size] for start in (len(text) * k // 4 for k in range(4))]


# Plausibility ---------------------------------------------------------------------------------------------------------


@cache
def _common_han() -> frozenset[str]:
    """The first levels of GB 2312 and Big5: the characters that their authors counted as common."""

    def level(name: str, leads: range, trails: range) -> str:
        return b"".join(bytes((lead, trail)) for lead in leads for trail in trails).decode(name, errors="ignore")

    big5 = range(0xA4, 0xC7)
    simplified = level("gb2312", range(0xB0, 0xD8), range(0xA1, 0xFF))
    traditional = level("big5", big5, range(0x40, 0x7F)) + level("big5", big5, range(0xA1, 0xFF))
    return frozenset(simplified + traditional)


# Punctuation, currency, arrows, circled numbers, boxes and shapes, CJK and full-width punctuation, emoji. Not among
# them on purpose: Greek, Cyrillic, kana and half-width katakana, which is what a wrong Chinese encoding looks like.
_COMMON_RANGES = (
    (0x2010, 0x205E),
    (0x20A0, 0x20BF),
    (0x2150, 0x218B),
    (0x2190, 0x21FF),
    (0x2460, 0x27BF),
    (0x3000, 0x3029),
    (0x3200, 0x33FF),
    (0xFF01, 0xFF5E),
    (0x1F300, 0x1FAFF),
)
_COMMON_OTHERS = frozenset("\u200b\ufeff·×÷°§±\xa0")
_SCRIPTS = {"kana": (0x3040, 0x30FF), "hangul": (0xAC00, 0xD7A3)}


def _score(pieces: list[str], name: str) -> float:
    """The share, from 0 to 1, of common characters among those beyond ASCII (and the control characters)."""
    counts = Counter("".join(pieces))
    letters = sum(n for c, n in counts.items() if c.isascii() and c.isalpha())
    weighed = {c: n for c, n in counts.items() if ord(c) >= 0x80 or not (c.isprintable() or c in "\t\n\r\f")}
    total = sum(weighed.values())
    if not total:
        return 1.0 if counts else 0.0
    ranges = list(_COMMON_RANGES)
    if letters > 2 * total:  # accents in a European text; in anything else they are mojibake
        ranges.append((0xA1, 0x24F))
    if "jis" in name or "jp" in name or name == "cp932":
        ranges.append(_SCRIPTS["kana"])
    if "kr" in name or name in ("cp949", "johab"):
        ranges.append(_SCRIPTS["hangul"])
    common = sum(
        n
        for c, n in weighed.items()
        if c in _common_han() or c in _COMMON_OTHERS or any(low <= ord(c) <= high for low, high in ranges)
    )
    return common / total


def _check_unicode(text: str, path: str | Path) -> None:
    """Refuse Unicode whose characters were already wrong when it was saved.

    Lenient: only what no book of any language looks like.
    """
    counts = Counter("".join(_pieces(text)))
    total = sum(n for c, n in counts.items() if not c.isspace())
    if not total:
        return
    damage = "文件本身已损坏，请换一份，或回到原文件用 --encoding 指定它的编码"
    lost = text.count("\ufffd") + 2 * text.count("锟斤拷")  # U+FFFD, or two of them saved as UTF-8 and read as GBK
    if lost > MAX_BROKEN * len(text):
        raise MiniGLMError(f"文字在存成文件之前就已丢失：有 {lost} 处替换符", path=path, fix=damage)
    accents = sum(n for c, n in counts.items() if 0x80 <= ord(c) <= 0xFF)
    if accents > 0.3 * total:
        raise MiniGLMError(f"是乱码：中文被当成西文存过，如“{_excerpt(text)}”", path=path, fix=damage)
    control = sum(n for c, n in counts.items() if unicodedata.category(c) == "Cc" and not c.isspace())
    if control > 0.01 * total:
        raise MiniGLMError(f"像是二进制文件：每百字有 {round(100 * control / total)} 个控制字符", path=path, fix=damage)
    strange = sum(n for c, n in counts.items() if unicodedata.category(c) in ("Co", "Cn"))
    if strange > 0.05 * total:
        raise MiniGLMError(f"每百字有 {round(100 * strange / total)} 个私用区或未定义的字", path=path, fix=damage)
    han = {c: n for c, n in counts.items() if 0x3400 <= ord(c) <= 0x9FFF or 0x20000 <= ord(c) <= 0x3FFFF}
    rare = sum(n for c, n in han.items() if c not in _common_han())
    if sum(han.values()) >= 100 and rare > 0.5 * sum(han.values()):
        raise MiniGLMError(
            f"多半是用错编码存下的：一半以上是生僻字，如“{_excerpt(text)}”",
            path=path,
            fix=f"{damage}；若本来如此，请用 --encoding utf-8",
        )


def _excerpt(text: str) -> str:
    return "".join(c for c in text[:2000] if ord(c) >= 0x80 and c.isprintable())[:12]


# EPUB -----------------------------------------------------------------------------------------------------------------


def _is_epub(data: bytes) -> bool:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            return "META-INF/container.xml" in archive.namelist()
    except zipfile.BadZipFile:
        return False


def read_epub(data: bytes, *, path: str | Path) -> Reading:
    """The text of an EPUB, its documents in reading order (the spine), headings on lines of their own.

    Raises:
        MiniGLMError: too large unpacked, with XML entities of its own, locked, damaged, or ebooklib is missing.
    """
    damaged = "请换一份，或用 Calibre 重新转换成 EPUB"
    try:
        from ebooklib import epub
    except ImportError:
        raise MiniGLMError("读 EPUB 要用 ebooklib", path=path, fix='请运行 pip install "miniglm-chat[epub]"') from None
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            _refuse_bomb(archive, path)
        book = epub.read_epub(BytesIO(data), options={"ignore_ncx": True})
    except MiniGLMError:
        raise
    except Exception as error:  # ebooklib lets through whatever lxml, zipfile and its own look-ups raise
        raise MiniGLMError(f"EPUB 结构有误：{error!s:.120}", path=path, fix=damaged) from error
    texts = []
    for name, _linear in book.spine:
        item = book.get_item_with_id(name)
        if item is None:
            raise MiniGLMError(f"EPUB 的阅读顺序里有不存在的一项 {name}", path=path, fix=damaged)
        if item.content:
            texts.append(html_to_text(decode(item.content, path=f"{path} 里的 {item.file_name}").text))
    text = "\n".join(texts)
    if not text.strip():
        raise MiniGLMError("EPUB 里没有文字", path=path, fix="它可能全是图片，请换一份文字版")
    return Reading(text, "epub", title=str(book.title or "").strip())


def _refuse_bomb(archive: zipfile.ZipFile, path: str | Path) -> None:
    members = archive.infolist()
    size = sum(member.file_size for member in members)  # zipfile reads no more than a member declares here
    if size > MAX_EPUB_BYTES or len(members) > MAX_EPUB_MEMBERS:
        raise MiniGLMError(
            f"EPUB 解开后有 {size / 2**20:.0f} MB、{len(members)} 个文件，"
            f"上限是 {MAX_EPUB_BYTES >> 20} MB、{MAX_EPUB_MEMBERS} 个",
            path=path,
            fix="请换一份不带大图的版本",
        )
    for member in members:
        kind = member.filename.rpartition(".")[2].lower()
        most = MAX_XML_BYTES if kind in ("xml", "opf", "ncx") else MAX_DOCUMENT_BYTES
        if member.file_size > most and kind not in _MEDIA:
            raise _too_large(member.filename, member.file_size, most, path)
    if "META-INF/encryption.xml" in archive.namelist() and b"html" in archive.read("META-INF/encryption.xml"):
        raise MiniGLMError("EPUB 有加密（DRM），读不出正文", path=path, fix="请换一份没有加密的")
    # The list of contents may have any name; the container says which.
    container = _xml_text(archive, "META-INF/container.xml", path)
    listed = {unescape(name) for name in re.findall(r"""full-path\s*=\s*["']([^"']*)""", container)}
    sizes = {member.filename: member.file_size for member in members}
    read = 0
    for name, length in sizes.items():
        if name not in listed and not name.lower().endswith((".xml", ".opf", ".ncx")):
            continue  # documents go through html.parser, which knows no entities of a file's own
        if length > MAX_XML_BYTES:
            raise _too_large(name, length, MAX_XML_BYTES, path)
        text = _xml_text(archive, name, path)
        if "<!ENTITY" in text:
            raise MiniGLMError(f"EPUB 的 {name} 自定义了 XML 实体，不安全", path=path, fix="请换一份")
        if name in listed:  # each entry is read into memory, however often it names the same document
            for href in re.findall(r"""href\s*=\s*["']([^"'#]*)""", text):
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(unescape(href))))
                read += sizes.get(target, 0)
    if read > MAX_EPUB_BYTES:
        raise _too_large("全部条目", read, MAX_EPUB_BYTES, path)


def _xml_text(archive: zipfile.ZipFile, name: str, path: str | Path) -> str:
    """An XML member as the XML parser will see it, for looking through.

    Raises:
        MiniGLMError: it is in an encoding that would hide from a reader what the parser finds.
    """
    data = archive.read(name)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", "replace")
    else:
        text = data.decode("utf-8-sig", "replace")
    declared = re.match(r"""\s*<\?xml[^>]*encoding\s*=\s*["']([^"']*)""", text)
    if not text.lstrip().startswith("<") or "\0" in text or (declared and declared[1].lower() not in _XML_ENCODINGS):
        raise MiniGLMError(
            f"EPUB 的 {name} 不是 UTF-8 或 UTF-16 的 XML", path=path, fix="请换一份，或用 Calibre 重新转换成 EPUB"
        )
    return text


def _too_large(name: str, size: int, most: int, path: str | Path) -> MiniGLMError:
    found = f"EPUB 里的 {name} 解开后有 {size / 2**20:.0f} MB，上限是 {most >> 20} MB"
    return MiniGLMError(found, path=path, fix="请换一份，或用 Calibre 重新转换成 EPUB")


_XML_ENCODINGS = ("utf-8", "utf8", "utf-16", "us-ascii", "ascii", "iso-8859-1", "gb2312", "gbk", "gb18030", "big5")
_MEDIA = frozenset(
    [
        "jpg",
        "jpeg",
        "png",
        "gif",
        "webp",
        "svg",
        "bmp",
        "tif",
        "tiff",
        "mp3",
        "m4a",
        "mp4",
        "ogg",
        "otf",
        "ttf",
        "woff",
        "woff2",
        "bin",
    ]
)
_BLOCKS = frozenset(
    [
        *("address", "article", "aside", "blockquote", "body", "br", "caption", "center", "dd", "div", "dl", "dt"),
        *("figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "li"),
        *("main", "ol", "p", "pre", "section", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul"),
    ]
)
MAX_NESTING = 100  # of what is left out; each end tag looks through them
_SKIPPED = frozenset(["head", "script", "style", "nav", "rt", "rp"])
_SOURCE_SPACE = re.compile(r"[ \t\r\n\f]+")
_SPACE_IN_CHINESE = re.compile(r"(?<=[^\x00-\xff])\n(?=[^\x00-\xff])")


class _TextOf(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED and len(self.skipping) < MAX_NESTING:
            self.skipping.append(tag)
        elif tag == "body":
            self.skipping.clear()  # whatever was left open in the head
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.skipping:
            del self.skipping[self.skipping.index(tag) :]
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            # A line end in the source means a space, and between two Chinese characters nothing.
            data = _SOURCE_SPACE.sub(lambda match: "\n" if "\n" in match[0] else " ", data)
            self.parts.append(_SPACE_IN_CHINESE.sub("", data).replace("\n", " "))


def html_to_text(html: str) -> str:
    """Text of an HTML document: one line a block element; head, scripts, styles, navigation, ruby readings left out."""
    parser = _TextOf()
    parser.feed(html)
    parser.close()
    lines = (line.strip(" ") for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)
