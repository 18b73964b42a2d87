"""Numerals in keys: equal as numbers, whole or not at all, and no trouble for names made of numeral characters."""

from __future__ import annotations

import json
from pathlib import Path

import opencc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniglm.qa.keys import holds_keys, key_hits, normalize

DATA = Path(__file__).parents[2] / "data" / "sanguo"


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("零", "0"),
        ("十", "10"),
        ("一十", "10"),
        ("二十一", "21"),
        ("百五十", "150"),
        ("二百五", "250"),
        ("一百零五", "105"),
        ("一千〇一", "1001"),
        ("三千六百", "3600"),
        ("两千", "2000"),
        ("一万二", "12000"),
        ("二万五千", "25000"),
        ("2万5千", "25000"),
        ("1.5万", "15000"),
        ("百五十万", "1500000"),
        ("83万", "830000"),
        ("一亿二千万", "120000000"),
        ("一万亿", "1000000000000"),
        ("二〇八", "208"),
        ("一九八四", "1984"),
        ("００７", "7"),
        ("兩萬", "20000"),
    ],
)
def test_numerals_are_equal_as_numbers(said: str, number: str) -> None:
    assert normalize(said) == f"#{number}#"


@pytest.mark.parametrize(
    ("answer", "key", "held"),
    [
        # A numeral is whole.
        ("率军二十三万", "三万", False),
        ("建安十三年", "三年", False),
        ("二十三人", "二十", False),
        ("数十万大军", "十万", False),
        ("三十余万人马", "三十", False),
        ("二三十人", "三十人", False),
        ("八九十岁", "八九十", True),
        ("１５、６万", "十五、六万", True),
        # Money is no number.
        ("赏银五百两", "500两", True),
        ("赏银五百两", "五百二", False),
        # Names with numeral characters, also beside a numeral of the sentence.
        ("张三一箭射中", "张三", True),
        ("统一三国", "三国", True),
        ("这是唯一一个", "一个", True),
        ("关羽、张飞等五虎将", "五虎将", True),
        ("庞统非百里之才", "百里", True),
        ("他修了万里长城", "万里长城", True),
        ("关云长千里走单骑", "千里走单骑", True),
        ("董卓是千里草", "千里草", True),
        ("陆逊火烧连营", "六逊", False),
        ("天无二日，民无二王", "民无二王", True),
        # Context must not matter: 乾 alone is 干 to opencc, in 乾坤 it is not.
        ("扭轉乾坤", "乾", True),
        ("餘萬人", "余万人", True),
    ],
)
def test_one_key(answer: str, key: str, held: bool) -> None:
    assert holds_keys(answer, [[key]]) is held


def test_the_shipped_answers_hold_their_keys_in_traditional_characters_and_wide_digits() -> None:
    traditional = opencc.OpenCC("s2t")
    wide = str.maketrans("0123456789", "０１２３４５６７８９")
    rows = [json.loads(line) for line in (DATA / "val.jsonl").read_text("utf-8").splitlines()]
    missed = [r for r in rows if not holds_keys(traditional.convert(r["answer"]).translate(wide), r["keys"])]
    assert missed == []
    answers = [row["answer"] for row in rows]
    others = answers[800:] + answers[:800]  # of far chapters
    assert sum(holds_keys(other, row["keys"]) for other, row in zip(others, rows, strict=True)) < 0.02 * len(rows)


@pytest.mark.parametrize("piece", ["一", "亿", "一亿", "9", "十", "零", "数十", "二三", "两", "1.", "万一"])
def test_a_model_that_repeats_numerals_for_ever_is_scored(piece: str) -> None:
    assert key_hits(piece * 6000, [["曹操"]]) == [False]


NUMERALS = st.text("零〇一二三两九十百千万亿数几余多05.、人国 ", max_size=12)


@given(NUMERALS)
def test_every_text_holds_itself(text: str) -> None:
    assert holds_keys(text, [[text]])


@given(st.integers(1, 10**9))
def test_arabic_and_spoken_numbers_agree(number: int) -> None:
    assert normalize(f"共{spoken(number)}人") == f"共#{number}#人"


def spoken(number: int) -> str:
    """A number as it is written out in Chinese, from its definition."""

    def below(value: int) -> str:
        text, zero = "", False
        for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
            digit, value = divmod(value, unit)
            if digit:
                text += ("零" if zero and text else "") + "零一二三四五六七八九"[digit] + name
            zero = not digit
        return text

    text = ""
    for unit, name in ((10**8, "亿"), (10**4, "万"), (1, "")):
        section, number = divmod(number, unit)
        if section:
            text += ("零" if text and section < 1000 else "") + below(section) + name
    return text
