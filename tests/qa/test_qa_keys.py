"""Key accuracy: every shipped answer holds its own keys, and look-alikes do not count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miniglm.evaluation.summary import Said, split_report
from miniglm.qa.formats import Example, Turn
from miniglm.qa.keys import holds_keys, key_hits

DATA = Path(__file__).parents[2] / "data" / "sanguo"


@pytest.mark.parametrize("name", ["train", "val", "unseen"])
def test_every_shipped_answer_holds_its_own_keys(name: str) -> None:
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) > 500
    assert [row["answer"] for row in rows if not holds_keys(row["answer"], row["keys"])] == []


@pytest.mark.parametrize(
    ("answer", "key", "held"),
    [
        ("共十三人", "三", False),
        ("共三人", "三", True),
        ("十日之内", "10日", True),
        ("１０日之内", "十日", True),
        ("十天之内", "十日", False),
        ("一百零五人", "105", True),
        ("二十万大军", "20万", True),
        ("20000人", "两万", True),
        ("張飛", "张飞", True),
        ("七七四十九颗", "49", True),
        ("张三是谁", "张三", True),
        ("他叫李四", "张三", False),
        ("三国鼎立", "三国", True),
        ("一百二十", "百二", False),
        ("", "曹操", False),
        ("ＡＢＣ", "abc", True),
        ("曹 操", "曹操", True),
    ],
)
def test_one_key(answer: str, key: str, held: bool) -> None:
    assert holds_keys(answer, [[key]]) is held


def test_every_group_must_be_met_by_one_alternative() -> None:
    keys = [["曹操", "孟德"], ["关羽", "云长"]]
    assert key_hits("孟德与云长", keys) == [True, True]
    assert key_hits("曹操与孟德", keys) == [True, False]
    assert not holds_keys("曹操与孟德", keys)


def test_accuracy_counts_marked_questions_only() -> None:
    examples = [
        Example((Turn("谁？", "曹操"),), keys=(("曹操",),)),
        Example((Turn("谁？", "他"),)),
        Example((Turn("谁？", "x"),), keys=(("刘备",),)),
    ]
    said = [Said((answer,), ("stop",)) for answer in ("是曹操", "？", "是孙权")]
    found = split_report(examples, said, None, None)
    assert found["scores"]["key_accuracy"]["mean"] == 0.5 and found["scores"]["key_accuracy"]["count"] == 2
    assert "key_accuracy" not in split_report(examples[1:2], said[1:2], None, None)["scores"]
