"""How texts are cut and compared for look-up: sentences, passages, n-grams, kinds of question. Knows nothing of files,
vectors or scores."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from miniglm.corpus import Paragraph
from miniglm.qa.text import bare

PASSAGE = 120
"""Characters that a passage has at most, a longer sentence aside: what a reader takes in at a glance."""
CONTEXT = 2
"""Passages before and after that count as a passage's context."""

_SENTENCE = re.compile(r"[^。！？!?]*(?:[。！？!?]+[”’」』）)》\"]*|$)")

_KINDS = (
    "谁|何人|哪位|哪个人|哪一位|什么人|哪一个|哪员|哪将|姓名|名叫什么|叫什么|何名|哪名|名字",
    "几|多少|多大|多长|多久|多远|多高|多重|数目|年纪|岁数",
    "哪里|哪儿|何处|什么地方|何地|哪座|哪个地方|哪条|哪郡|哪州|哪城|地点",
    "何时|什么时候|哪年|哪一年|哪天|哪日|年号|哪月|哪一天|时辰",
    "为什么|为何|何故|原因|理由|缘故|怎么会|何以|为啥|咋",
    "怎样|怎么|如何|什么办法|什么方法|计策|什么计|何计",
    "什么话|哪句|说了|怎么说|何言|感叹|答道|评价",
    "何物|什么|啥|何",
    "表字|字什么|封号|官职|官|爵|号",
)
_KIND_PATTERNS = tuple(re.compile(kind) for kind in _KINDS)
"""What a question asks for: person, number, place, time, reason, manner, words, thing, style or title."""
KINDS = len(_KINDS)
_NUMERAL = re.compile("[0-9一二三四五六七八九十百千万两]")


def sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a paragraph begin and end; closing marks belong to the sentence before them."""
    return [match.span() for match in _SENTENCE.finditer(text) if match[0].strip()]


@dataclass(frozen=True, slots=True)
class Span:
    """A passage: `start` and `end` in the text of paragraph number `paragraph` of a list."""

    paragraph: int
    start: int
    end: int


def passages(paragraphs: Sequence[Paragraph]) -> list[Span]:
    """Runs of whole sentences of at most `PASSAGE` characters, each beginning in the second half of the one before.

    Headings are no passages. A sentence longer than that is a passage of its own.
    """
    found = []
    for number, paragraph in enumerate(paragraphs):
        if paragraph.text == paragraph.chapter:
            continue
        cut = sentences(paragraph.text)
        first = 0
        while first < len(cut):
            start, last = cut[first][0], first
            while last + 1 < len(cut) and cut[last + 1][1] - start <= PASSAGE:
                last += 1
            end = cut[last][1]
            found.append(Span(number, start, end))
            if last + 1 == len(cut):
                break
            middle = start + (end - start) / 2
            first = max(first + 1, next(n for n in range(first + 1, last + 2) if n > last or cut[n][0] >= middle))
    return found


Plain = NDArray[np.uint16]
"""A text's characters without punctuation, in one form, by their code. Those beyond the basic plane, which no common
word needs, share codes."""
Grams = NDArray[np.uint32]
"""Characters and pairs of neighbouring characters by number: a pair's is 65,536 or more."""


_NEW, _ODD = 0xFFFF, 0xFFFE
"""Marks of characters that were not met yet, and of those that become several or depend on their neighbours. Neither is
a character, so neither is the form of one."""
_FORMS = np.full(1 << 16, _NEW, dtype=np.uint16)
"""What each character of the basic plane becomes in `plain`, 0 for nothing: looked up when it is first met."""
_JAMO = re.compile("[\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff]")


def _form(code: int) -> int:
    whole = unicodedata.normalize("NFKC", chr(code))
    # Marks and jamo are what normalization joins to the character before them.
    if any(unicodedata.category(c)[0] == "M" for c in whole) or _JAMO.search(whole) or 0xD800 <= code < 0xE000:
        return _ODD
    form = bare(chr(code))
    return ord(form or "\0") if len(form) < 2 and form < "\U00010000" else _ODD


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _forms(codes: NDArray[np.uint32]) -> Plain | None:
    """What each character becomes by itself, 0 for nothing; None where one of them does not stand by itself."""
    if not len(codes):
        return codes.astype(np.uint16)
    if codes.max() > 0xFFFF:
        return None
    found: Plain = _FORMS[codes]
    highest = found.max()
    if highest == _NEW:
        for code in np.unique(codes[found == _NEW]).tolist():
            _FORMS[code] = _form(code)
        found = _FORMS[codes]
        highest = found.max()
    return None if highest == _ODD else found


def plain(text: str) -> Plain:
    """The text's characters without punctuation, in one form."""
    forms = _forms(_codes(text))
    return _codes(bare(text)).astype(np.uint16) if forms is None else forms[forms != 0]


def plain_with_places(text: str, places: NDArray[np.int64]) -> tuple[Plain, NDArray[np.int64]]:
    """`plain` of the text, and how many of its characters come from what stands before each of these places."""
    forms = _forms(_codes(text))
    if forms is None:
        return plain(text), np.array([len(plain(text[:place])) for place in places.tolist()], dtype=np.int64)
    kept = forms != 0
    return forms[kept], np.concatenate([[0], np.cumsum(kept)])[places]


def bytes_before(text: str, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many bytes of UTF-8 stand before each of these places."""
    codes = _codes(text)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    found: NDArray[np.int64] = np.concatenate([[0], np.cumsum(widths)])[places]
    return found


def grams(text: Plain) -> Grams:
    """The text's characters, then the pairs of neighbours, with repetitions."""
    return np.concatenate([text.astype(np.uint32), neighbours(text)])


def neighbours(text: Plain) -> Grams:
    """Its pairs of neighbouring characters, one fewer than characters."""
    units = text.astype(np.uint32)
    return np.asarray((units[:-1] + 1 << 16) | units[1:], dtype=np.uint32)


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers start, start + 1, … of each range, `lengths` of them, one range after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def places_in(names: NDArray[np.integer], found: NDArray[np.integer]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of the numbers found are among `names`, which rise, and where each of these stands there."""
    if not len(names):
        return np.zeros(len(found), dtype=bool), np.zeros(len(found), dtype=np.int64)
    places = np.minimum(np.searchsorted(names, found), len(names) - 1)
    return np.asarray(names[places] == found), places


Numbers = TypeVar("Numbers", bound=np.generic)


def firsts(rising: NDArray[Any]) -> NDArray[np.int64]:
    """Where each number of them, which rise, comes first."""
    return np.flatnonzero(np.concatenate([rising[:1] == rising[:1], rising[1:] != rising[:-1]]))


def distinct(found: NDArray[Numbers]) -> NDArray[Numbers]:
    """The distinct ones, rising: `np.unique`, which takes three times as long for a few hundred numbers."""
    rising = np.sort(found)
    kept: NDArray[Numbers] = rising[firsts(rising)]
    return kept


def pairs(found: NDArray[np.unsignedinteger]) -> NDArray[np.bool_]:
    """Which of them are pairs, or triples."""
    return found >= 1 << 16


Runs = NDArray[np.uint64]
"""Characters, pairs and triples of neighbouring characters by number: a triple's is 2 to the 32nd or more."""


def triples(text: Plain) -> Runs:
    """The runs of three characters, by number, with repetitions."""
    units = text.astype(np.uint64)
    return np.asarray((units[:-2] + 1 << 32) | units[1:-1] << 16 | units[2:], dtype=np.uint64)


class Occurrences:
    """Where some characters, pairs and triples stand in some texts.

    Args:
        wanted: their numbers, rising; with a pair and a triple also the characters that it is of.
    """

    def __init__(self, wanted: Runs, texts: Sequence[Plain]) -> None:
        self._shape = len(texts), len(wanted)
        sizes = np.array([len(text) for text in texts], dtype=np.int64)
        text, owners = np.concatenate(texts), np.repeat(np.arange(len(texts)), sizes)
        characters = np.zeros(1 << 16, dtype=bool)
        characters[wanted[wanted < 1 << 16]] = True
        # Only few of a text's characters are wanted: what is longer is looked for among these.
        at = np.flatnonzero(characters[text])
        units, owners = text[at].astype(np.uint64), owners[at]
        two = np.flatnonzero((at[1:] - at[:-1] == 1) & (owners[1:] == owners[:-1]))
        three = two[:-1][two[1:] - two[:-1] == 1]
        keys = (
            units,
            (units[two] + 1 << 16) | units[two + 1],
            (units[three] + 1 << 32) | units[three + 1] << 16 | units[three + 2],
        )
        known, places = places_in(wanted, np.concatenate(keys))
        first = np.concatenate([np.arange(len(at)), two, three])[known]
        self._owners, self._places = owners[first], places[known]
        self._starts = at[first] - (np.cumsum(sizes) - sizes)[self._owners]
        self._ends = self._starts + np.repeat([1, 2, 3], [len(some) for some in keys])[known]

    def times(self, within: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """(texts, wanted) how often each text has each; between two places of each text, (texts, 2), if these are given."""
        owners, places = self._owners, self._places
        if within is not None:
            first, last = within[owners].T
            inside = (self._starts >= first) & (self._ends <= last)
            owners, places = owners[inside], places[inside]
        texts, wanted = self._shape
        return np.bincount(owners * wanted + places, minlength=texts * wanted).reshape(self._shape)


def kinds(question: str) -> NDArray[np.float32]:
    """Which of the kinds of question the words of a question speak of, 0 or 1 each."""
    return np.array([pattern.search(question) is not None for pattern in _KIND_PATTERNS], dtype=np.float32)


PERSON, NUMBER, REASON, SPEECH = 0, 1, 4, 6
"""Places of some kinds in what `kinds` gives."""


def has_numeral(text: str) -> bool:
    """Whether there is an Arabic or Chinese numeral in it."""
    return _NUMERAL.search(text) is not None
