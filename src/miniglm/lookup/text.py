"""How texts are cut and compared for look-up: sentences, passages, n-grams, kinds of question. Knows nothing of files,
vectors or scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

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


def plain(text: str) -> Plain:
    """The text's characters without punctuation, in one form."""
    return np.frombuffer(bare(text).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint16)


def grams(text: Plain) -> Grams:
    """The text's characters, then the pairs of neighbours, with repetitions."""
    units = text.astype(np.uint32)
    return np.concatenate([units, (units[:-1] + 1 << 16) | units[1:]])


Numbers = TypeVar("Numbers", bound=np.generic)


def distinct(found: NDArray[Numbers]) -> NDArray[Numbers]:
    """The distinct ones, rising: `np.unique`, which takes three times as long for a few hundred numbers."""
    rising = np.sort(found)
    kept: NDArray[Numbers] = rising[np.concatenate([rising[:1] == rising[:1], rising[1:] != rising[:-1]])]
    return kept


def pairs(found: Grams) -> NDArray[np.bool_]:
    """Which of them are pairs."""
    return found >= 1 << 16


def triples(text: Plain) -> NDArray[np.uint64]:
    """The distinct runs of three characters, by number."""
    units = text.astype(np.uint64)
    return distinct(np.asarray(units[:-2] << 32 | units[1:-1] << 16 | units[2:], dtype=np.uint64))


def kinds(question: str) -> NDArray[np.float32]:
    """Which of the kinds of question the words of a question speak of, 0 or 1 each."""
    return np.array([pattern.search(question) is not None for pattern in _KIND_PATTERNS], dtype=np.float32)


PERSON, NUMBER, REASON, SPEECH = 0, 1, 4, 6
"""Places of some kinds in what `kinds` gives."""


def has_numeral(text: str) -> bool:
    """Whether there is an Arabic or Chinese numeral in it."""
    return _NUMERAL.search(text) is not None
