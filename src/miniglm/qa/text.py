"""Forms of a text in which two texts are compared. Knows nothing of questions, keys or scores."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any


@functools.cache
def _converter() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


def simplified(text: str) -> str:
    """Traditional to simplified characters, by words (opencc's t2s); for texts to be kept, not compared."""
    return str(_converter().convert(text))


class _Simplified(dict[int, str]):
    """Traditional to simplified for `str.translate`, one character at a time: a piece of a text must become the same
    wherever it stands (given words, opencc keeps 乾 in 乾坤 and makes it 干 elsewhere)."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = str(_converter().convert(char)) if code > 0x33FF and not 0xD800 <= code < 0xE000 else char
        return self[code]


_SIMPLIFIED = _Simplified()


def fold(text: str) -> str:
    """Full width, traditional characters and capitals brought to one form, white space removed."""
    return "".join(unicodedata.normalize("NFKC", text).translate(_SIMPLIFIED).casefold().split())


class _WithoutMarks(dict[int, int | None]):
    """Punctuation, separators and control characters to nothing, for `str.translate`."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PZC" else code
        return self[code]


_WITHOUT_MARKS = _WithoutMarks()


def bare(text: str) -> str:
    """The folded text without punctuation and control characters; what is left where only these differ is equal."""
    return fold(text).translate(_WITHOUT_MARKS)
