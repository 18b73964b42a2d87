"""Curation: every kind of row that should go goes for its reason, and nothing is deleted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import _score_lcs  # type: ignore[import-untyped]
from running import ROOT
from typer.testing import CliRunner

from miniglm.cli import app
from miniglm.errors import MiniGLMError
from miniglm.qa.curation import Criteria, curate
from miniglm.qa.formats import Example, Turn, read_examples


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer} | more


BOOK = (
    "第一回 甲\n刘备字玄德，是涿郡人，与关羽、张飞在桃园里结为兄弟，从此同生共死。曹操字孟德，小字阿瞒，少年时喜欢游猎歌舞。\n"
    * 3
)
KEPT = [
    row("刘备的表字是什么？", "刘备字玄德。", keys=[["玄德"]], evidence="刘备字玄德", id="1", chapter=1),
    row("玄德是谁的表字？", "玄德是刘备的表字。", keys=[["刘备"]], evidence="刘备字玄德", id="2", chapter=1),
    row(
        "桃园里和刘备结义的有哪两个人？",
        "关羽和张飞。",
        keys=[["关羽"], ["张飞"]],
        evidence="与关羽、张飞在桃园里",
        id="3",
        chapter=1,
    ),
    row(
        "跟刘备拜把子的是哪两位？",
        "关羽和张飞。",
        keys=[["关羽"], ["张飞"]],
        evidence="与关羽、张飞在桃园里",
        id="3",
        chapter=1,
    ),
    row("曹操的小名叫什么？", "曹操小字阿瞒。", keys=[["阿瞒"]], evidence="小字阿瞒", id="4", chapter=1),
    row(
        "曹操年少的时候喜欢做些什么事情来消遣？",
        "喜欢游猎歌舞。",
        keys=[["游猎"]],
        evidence="喜欢游猎歌舞",
        id="5",
        chapter=1,
    ),
]
BAD = {
    "太长或太短": [row("谁？", "刘备。"), row("刘备是哪里人呢？", "涿" * 400)],
    "语言不对": [row("What was the style name of Liu Bei?", "Xuande it was."), row("刘备的老家在哪里？", "In Zhuo county.")],
    "答案里没有要点": [row("关羽的兄弟是谁？", "是赵云。", keys=[["张飞"]], evidence="与关羽、张飞")],
    "问题里已有要点": [row("玄德就是刘备吗？", "玄德是刘备。", keys=[["玄德"]], evidence="刘备字玄德")],
    "证据不是原文": [row("诸葛亮的表字是什么？", "诸葛亮字孔明。", keys=[["孔明"]], evidence="诸葛亮字孔明"), row("孙权的表字是什么？", "孙权字仲谋。")],
    "完全重复": [KEPT[0] | {"question": "刘备的表字是什么"}],
    "问题重复": [KEPT[4] | {"answer": "曹操的小名是阿瞒。"}],
    "问题几乎相同": [KEPT[5] | {"question": "曹操年少的时候喜欢做些什么事情来消遣呢？"}],
    "几乎相同的问题，答案矛盾": [
        row("桃园结义是在谁的庄子后面？", "在张飞的庄后。", keys=[["张飞"]], evidence="与关羽、张飞在桃园里", id="8"),
        row("桃园结义是在谁的庄子后面？", "在关羽的庄后。", keys=[["关羽"]], evidence="与关羽、张飞在桃园里", id="9"),
    ],
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "书.txt").write_text(BOOK, "utf-8")
    rows = KEPT + [each for rows in BAD.values() for each in rows]
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
    (tmp_path / "set.jsonl").write_text(text + "{坏\n", "utf-8")
    return tmp_path / "set.jsonl", tmp_path / "书.txt"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_every_reason_and_nothing_deleted(files: tuple[Path, Path], tmp_path: Path) -> None:
    file, book = files
    out = tmp_path / "kept.jsonl"
    result = invoke("qa", "curate", file, "--out", out, "--book", book)
    assert result.exit_code == 0, result.output
    rejected = lines(tmp_path / "kept.rejected.jsonl")
    assert lines(out) == KEPT
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for each in rejected:
        by_reason.setdefault(each.pop("reason"), []).append({k: v for k, v in each.items() if k != "other"})
    assert [bad["line"] for bad in by_reason.pop("读不出来")] == [len(lines_of(file))]
    assert by_reason == BAD
    for reason in BAD:
        assert reason in result.output
    # A second time the result would be in the way.
    again = invoke("qa", "curate", file, "--out", out)
    assert isinstance(again.exception, MiniGLMError) and "不会覆盖" in str(again.exception)


def lines_of(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def test_a_set_written_with_care_stays_whole() -> None:
    examples = read_examples(ROOT / "data/sanguo/train.jsonl").examples[:400]
    assert curate(examples, Criteria()) == {}


def test_pairs_of_different_facts_that_are_nearly_the_same() -> None:
    long = "因为他在长坂坡单枪匹马冲进曹军之中，来回冲杀，把幼主阿斗抱在怀里救了出来，刘备见了他们，把孩子掷在地上，说为了这小儿几乎折了一员大将。"
    rows = [
        Example((Turn("赵云为何有名？", long),), id="1"),
        Example((Turn("人们为什么敬重赵云？", long + "真的。"),), id="2"),
    ]
    assert {n: (f.reason, f.other) for n, f in curate(rows, Criteria()).items()} == {1: ("问答几乎相同", 0)}
    same_fact = [Example(row.turns, id="1") for row in rows]
    assert curate(same_fact, Criteria()) == {}


def test_questions_that_differ_in_a_number_are_different() -> None:
    answers = {"第三回": "吕布。", "第五回": "吕布。", "第十二回": "典韦。"}
    rows = [
        Example((Turn(f"在{where}的故事里，是哪一位武艺高强的将军第一个冲到阵前叫骂挑战的呢？", answer),), id=where)
        for where, answer in answers.items()
    ]
    assert curate(rows, Criteria()) == {}


def test_a_chapter_keeps_whole_facts_from_all_over_it() -> None:
    rows = [
        Example(
            (Turn(f"第{n}个人的名字{'叫什么' if k else '是哪几个字'}？", f"他叫第{n}号。"),),
            id=str(n),
            extra={"chapter": n // 20},
        )
        for n in range(30)
        for k in range(2)
    ]
    found = curate(rows, Criteria(per_chapter=10, similarity=1.0))
    assert {fault.reason for fault in found.values()} == {"本章已够多"}
    kept = [row for number, row in enumerate(rows) if number not in found]
    assert Counter(row.extra["chapter"] for row in kept) == {0: 10, 1: 10}
    assert set(Counter(row.id for row in kept).values()) == {2}
    assert [row.id for row in kept][::2] == [*map(str, range(0, 20, 4)), *map(str, range(20, 30, 2))]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(alphabet="甲乙丙丁戊", min_size=4, max_size=12), min_size=2, max_size=8))
def test_novelty_is_rouge_l(questions: list[str]) -> None:
    """Against rouge-score's own longest common subsequence, over characters."""
    examples = [Example((Turn(q, f"答案是第{n}个。"),), id=str(n)) for n, q in enumerate(questions)]
    found = curate(examples, Criteria(similarity=1.0, novelty=0.7))
    kept: list[str] = []
    for number, question in enumerate(questions):
        if number in found and found[number].reason != "不够新（ROUGE-L）":
            continue
        close = any(_score_lcs(list(old), list(question)).fmeasure >= 0.7 for old in kept)
        assert (number in found) == close
        if not close:
            kept.append(question)
