"""Question-answer files as people have them: every format, every way a line can be useless."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniglm.errors import MiniGLMError
from miniglm.qa.formats import Turn, read_examples, write_jsonl
from miniglm.qa.questions import normalize_question

DATA = Path(__file__).parents[2] / "data" / "sanguo"


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


USER = {"role": "user", "content": "谁借东风？"}
SAID = {"role": "assistant", "content": "孔明。"}


@pytest.mark.parametrize(
    ("row", "turns", "system"),
    [
        ({"question": "谁借东风？", "answer": "孔明。"}, [("谁借东风？", "孔明。")], ""),
        ({"Question": "谁借东风？", "Answer": "孔明。"}, [("谁借东风？", "孔明。")], ""),
        ({"instruction": "谁借东风？", "input": "", "output": "孔明。"}, [("谁借东风？", "孔明。")], ""),
        ({"instruction": "改写", "input": "东风", "output": "孔明。"}, [("改写\n东风", "孔明。")], ""),
        ({"messages": [USER, SAID]}, [("谁借东风？", "孔明。")], ""),
        (
            {
                "messages": [
                    {"role": "system", "content": "简短"},
                    USER,
                    SAID,
                    {"role": "user", "content": "然后？"},
                    SAID,
                ]
            },
            [("谁借东风？", "孔明。"), ("然后？", "孔明。")],
            "简短",
        ),
        (
            {"conversations": [{"from": "human", "value": "谁借东风？"}, {"from": "gpt", "value": "孔明。"}]},
            [("谁借东风？", "孔明。")],
            "",
        ),
    ],
)
def test_each_format_is_read_as_lines_and_as_an_array(
    tmp_path: Path, row: dict[str, Any], turns: list[tuple[str, str]], system: str
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([row, row], ensure_ascii=False), "utf-8-sig")
    for path in (lines(tmp_path / "a.jsonl", [row, row]), tmp_path / "a.json"):
        found = read_examples(path)
        assert found.rejected == [] or not found.rejected
        assert len(found.examples) == 2
        assert found.examples[0].turns == tuple(Turn(*turn) for turn in turns)
        assert found.examples[0].system == system


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("header", ["question,answer", "问题,答案"])
def test_csv(tmp_path: Path, encoding: str, header: str) -> None:
    (tmp_path / "a.csv").write_bytes(
        f'{header}\r\n谁借东风？,"孔明，\n在七星坛。"\r\n关羽字什么,云长\r\n'.encode(encoding)
    )
    examples = read_examples(tmp_path / "a.csv").examples
    assert [(e.question, e.answer) for e in examples] == [("谁借东风？", "孔明，\n在七星坛。"), ("关羽字什么", "云长")]


def test_the_shipped_set_is_read_whole_with_its_keys() -> None:
    for name, count in (("train", 4466), ("val", 1587), ("unseen", 504)):
        found = read_examples(DATA / f"{name}.jsonl")
        assert len(found.examples) == count and not found.rejected
        assert all(e.keys and e.id for e in found.examples)


GOOD = {"question": "谁？", "answer": "他。"}


@pytest.mark.parametrize(
    "bad",
    [
        '{"question": "谁？", "answer": ',
        '{"question": "谁？", "answer": ""}',
        '{"question": "  ", "answer": "他"}',
        '{"question": 5, "answer": "他"}',
        '{"question": "谁？"}',
        '{"question": "谁？", "answer": "他", "keys": "他"}',
        "[1, 2]",
        "null",
    ],
)
def test_a_useless_line_is_named_and_counts(tmp_path: Path, bad: str) -> None:
    path = lines(tmp_path / "qa.jsonl", [GOOD] * 50)
    path.write_text(path.read_text("utf-8") + "\n" + bad + "\n", "utf-8")
    with pytest.raises(MiniGLMError, match=r"qa\.jsonl.*52"):
        read_examples(path)
    found = read_examples(path, allow_bad=True)
    assert len(found.examples) == 50
    [rejected] = found.rejected
    assert rejected.line == 52 and rejected.reason
    path = lines(tmp_path / "many.jsonl", [GOOD] * 400)
    path.write_text(path.read_text("utf-8") + bad + "\n", "utf-8")
    assert len(read_examples(path).rejected) == 1  # under one in a hundred goes on by itself


@pytest.mark.parametrize("content", ["", "\n\n", '{"ask": 1}\n', "not json\n"])
def test_nothing_usable_is_an_error_even_when_bad_lines_are_allowed(tmp_path: Path, content: str) -> None:
    (tmp_path / "qa.jsonl").write_text(content, "utf-8")
    with pytest.raises(MiniGLMError, match=r"qa\.jsonl"):
        read_examples(tmp_path / "qa.jsonl", allow_bad=True)
    with pytest.raises(MiniGLMError, match="nowhere"):
        read_examples(tmp_path / "nowhere.jsonl")


def test_questions_alone_are_fine_where_no_answer_is_needed(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("谁借东风\n\n关羽是谁？他怎样？\n", "utf-8")
    assert [e.question for e in read_examples(tmp_path / "q.txt", need_answer=False).examples] == [
        "谁借东风",
        "关羽是谁？他怎样？",
    ]
    path = lines(tmp_path / "q.jsonl", [{"question": "谁？", "note": 3}])
    [example] = read_examples(path, need_answer=False).examples
    assert example.answer == "" and example.extra["note"] == 3


def test_write_jsonl_replaces_whole_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"question": "谁？", "answer": "他。"}])
    write_jsonl(tmp_path / "a.jsonl", [{"question": "谁？", "answer": "她。"}])
    assert [e.answer for e in read_examples(tmp_path / "a.jsonl").examples] == ["她。"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("关羽是谁", "关羽是谁？"),
        ("关羽是谁?", "关羽是谁？"),
        (" 关羽是谁？ ", "关羽是谁？"),
        ("谁？何时？", "谁？何时？"),
        ("谁?何时", "谁？何时？"),
        ("请介绍关羽。", "请介绍关羽。"),
        ("Who is he?", "Who is he?"),
    ],
)
def test_question_marks(question: str, expected: str) -> None:
    assert normalize_question(question) == expected


@given(st.text(max_size=40))
def test_normalizing_twice_changes_nothing(question: str) -> None:
    assert normalize_question(normalize_question(question)) == normalize_question(question)
