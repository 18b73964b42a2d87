"""Whether an answer holds its keys. Knows nothing of models or prompts.

Both sides are brought to one form first: full and half width, simplified and traditional, letters' case, white space,
Arabic and Chinese numerals. In that form a numeral is `#value#`, so that 三 is found in 三国 and in 统一三国 but not in
十三, and a plain substring search does the rest.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from decimal import Decimal

from miniglm.qa.text import fold

_DIGITS = {char: value for value, char in enumerate("零一二三四五六七八九")} | {"两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_D, _ARABIC = "一二三四五六七八九", r"[0-9]+(?:\.[0-9]+)?"
_SMALL = f"(?:[{_D}两]?千)?零?(?:[{_D}两]?百)?零?(?:[{_D}两]?十)?零?[{_D}两]?"  # below 10,000; may be empty

# A stretch of numeral characters, to be taken apart by _NUMBER. 数 and 几 belong to it before a unit (数十万 is not
# 十万), 余 and 多 inside of it (三十余万 is not 三十), 两 only where it counts (五百两 is money). The capital forms
# 壹贰叁肆伍陆 do not: 陆逊 and 队伍 are no numbers.
_RUN = re.compile(
    rf"(?:{_ARABIC}|[零{_D}十百千万亿]|[数几](?=[十百千万亿])|(?<=[0-9十百千万亿])[余多](?=[百千万亿])"
    rf"|两(?=[百千万亿])|(?<![0-9零{_D}十百千万亿])两)+"
)
# One number: read digit by digit where it can only be that (二〇八, 〇八), else with units (105, 2万5千, 一百零五, 百五十).
_AMOUNT = f"(?:{_ARABIC}[百千]?|{_SMALL})"
_NUMBER = re.compile(rf"[零{_D}]{{3,}}(?![十百千万亿])|零[{_D}]|(?=.)(?:{_AMOUNT}[万亿]{{1,2}})*{_AMOUNT}")
_ESTIMATE = re.compile("|".join(map("".join, itertools.pairwise(_D))) + "|[数几余多]")


def _below_ten_thousand(numeral: str) -> Decimal:
    if arabic := re.match(_ARABIC, numeral):
        return Decimal(arabic[0]) * _UNITS.get(numeral[arabic.end() :], 1)
    pairs = re.findall(f"([{_D}两]?)([十百千]?)", numeral)
    return Decimal(sum(_DIGITS.get(digit, 1) * _UNITS.get(unit, 1) for digit, unit in pairs if digit or unit))


def _value(numeral: str) -> str:
    """The number that a match of `_NUMBER` says, in Arabic digits."""
    if all(char in _DIGITS for char in numeral):
        # Never int(): a model that repeats itself makes numerals of thousands of digits, which int() refuses.
        return "".join(str(_DIGITS[char]) for char in numeral).lstrip("0") or "0"
    if numeral.isdigit() and numeral.isascii():
        return numeral.lstrip("0") or "0"
    total, before = Decimal(0), Decimal(0)
    for amount, units in re.findall("([^万亿]*)([万亿]*)", numeral)[:-1]:
        unit = Decimal(1)
        for char in units:
            unit *= _UNITS[char]
        value = _below_ten_thousand(amount) if amount else Decimal(1)
        total = total + value * unit if unit < before else (total + value) * unit
        before = unit
    if spoken := re.search(f"[{_D}两]([百千万亿])([{_D}])$", numeral):  # 一万二 is 12,000
        total += _DIGITS[spoken[2]] * (_UNITS[spoken[1]] // 10 - 1)
    return f"{total.normalize():f}"


@functools.lru_cache(maxsize=4096)
def _marks(run: str) -> str:
    """A run of numeral characters as `#value#` marks: one a number, since 统一三国 holds 一 and 三, and 七七四十九 holds 49.

    An estimate (二三十, 数十万, 二十余万) is one mark, equal to itself alone.
    """
    if _ESTIMATE.search(run) and not re.fullmatch(f"[零{_D}]{{3,}}", run):
        parts = re.split("([数几余多])", run)
        return "#" + "".join(_value(part) if _NUMBER.fullmatch(part) else part for part in parts) + "#"
    return _NUMBER.sub(lambda match: f"#{_value(match[0])}#" if match[0] else "", run)


@functools.lru_cache(maxsize=16384)
def normalize(text: str) -> str:
    """The form in which answers and keys are compared. Numerals become `#value#`: one never matches inside another."""
    return _RUN.sub(lambda match: _marks(match[0]), fold(text).replace("〇", "零"))


def key_hits(answer: str, keys: Sequence[Sequence[str]]) -> list[bool]:
    """Of each group of keys, whether the answer holds at least one of its alternatives."""
    held = normalize(answer)
    return [any(normalize(key) in held for key in group) for group in keys]


def holds_keys(answer: str, keys: Sequence[Sequence[str]]) -> bool:
    """Whether every group is met. True where there are no groups."""
    return all(key_hits(answer, keys))
