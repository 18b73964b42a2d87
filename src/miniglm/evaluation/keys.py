"""Whether an answer holds its keys. Knows nothing of models or prompts.

Both sides are brought to one form first: full and half width, simplified and traditional, letters' case, white space,
Arabic and Chinese numerals.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_NUMERAL = re.compile("[零〇一二三四五六七八九十百千万亿两]+|[0-9]+(?:[百千万亿]+)?")


@functools.cache
def _converter() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


def _value(numeral: str) -> int | None:
    """The number that a numeral says; None where it is no well-formed one (a name such as 张万亿)."""
    if match := re.fullmatch(r"([0-9]+)([百千万亿]*)", numeral):
        value = int(match[1])
        for unit in match[2]:
            value *= {"百": 100, "千": 1000, "万": 10**4, "亿": 10**8}[unit]
        return value
    if len(numeral) > 1 and all(c in _DIGITS and c != "两" for c in numeral):
        return int("".join(str(_DIGITS[c]) for c in numeral))
    total, section, digit, last_unit = 0, 0, -1, 10**9
    for character in numeral:
        if character in _DIGITS:
            if digit > 0:
                return None  # 二三十: about twenty or thirty
            digit = _DIGITS[character]
        elif character in _UNITS:
            unit = _UNITS[character]
            if unit >= last_unit or digit == 0:
                return None
            section += (digit if digit > 0 else 1) * unit
            digit, last_unit = -1, unit
        else:
            section += max(digit, 0)
            if section == 0:
                return None
            total = (total + section) * (10**4 if character == "万" else 10**8)
            section, digit, last_unit = 0, -1, 10**9
    return total + section + max(digit, 0)


def _number(match: re.Match[str]) -> str:
    numeral = match.group()
    for start in range(len(numeral)):  # 七七四十九 is no number, 四十九 at its end is
        if (value := _value(numeral[start:])) is not None:
            return f"{numeral[:start]}#{value}#"
    return numeral


@functools.lru_cache(maxsize=65536)
def normalize(text: str) -> str:
    """The form in which answers and keys are compared. Numerals become `#value#`: one never matches inside another."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\s+", "", _converter().convert(text)).casefold()
    return _NUMERAL.sub(_number, text)


@functools.lru_cache(maxsize=65536)
def _plain(text: str) -> str:
    """The same without numbers being read: for names with numerals beside a numeral of the sentence."""
    text = unicodedata.normalize("NFKC", text)
    plain: str = re.sub(r"\s+", "", _converter().convert(text)).casefold()
    return plain


def _holds(answer: str, key: str) -> bool:
    normal = normalize(key)
    if not normal:
        return True
    if normal in normalize(answer):
        return True
    # A key that is no numeral by itself and neither begins nor ends with one may also be met letter by letter.
    bounded = _NUMERAL.match(_plain(key)) or re.search(_NUMERAL.pattern + "$", _plain(key))
    return not bounded and _plain(key) in _plain(answer)


def key_hits(answer: str, keys: Sequence[Sequence[str]]) -> list[bool]:
    """Of each group of keys, whether the answer holds at least one of its alternatives."""
    return [any(_holds(answer, alternative) for alternative in group) for group in keys]


def holds_keys(answer: str, keys: Sequence[Sequence[str]]) -> bool:
    """Whether every group is met. True where there are no groups."""
    return all(key_hits(answer, keys))
