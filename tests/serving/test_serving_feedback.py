"""Ratings in a file that `finetune` reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniglm.errors import MiniGLMError
from miniglm.qa.formats import read_examples
from miniglm.serving import feedback
from miniglm.serving.feedback import Rating, add_feedback

QUESTION, ANSWER = "曹操是哪里人？", "沛国谯县人。"


def add(path: Path, rating: Rating, answer: str = ANSWER, question: str = QUESTION) -> None:
    add_feedback(path, question, answer, rating, model="demo")


def learnt(path: Path) -> list[tuple[str, str]]:
    found = read_examples(path)
    assert found.rejected == []
    return [(example.question, example.answer) for example in found.examples]


def test_only_what_is_liked_at_last_is_learnt(tmp_path: Path) -> None:
    path = tmp_path / "run" / "feedback.jsonl"
    add(path, "like")
    add(path, "dislike", "不知道。")
    add(path, "like", "许昌人。")
    add(path, "like", "许昌人。")
    add(path, "dislike", "许昌人。")
    add(path, "like", "谯县。")
    add(path, "none", "谯县。")
    add(path, "dislike", "沛国。")
    add(path, "like", "沛国。")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(rows) == 9 and all(row["model"] == "demo" and row["made"] for row in rows)
    assert learnt(path) == [(QUESTION, ANSWER), (QUESTION, "沛国。")]
    asked = read_examples(path, need_answer=False).examples
    assert len(asked) == 9, "a question is one also where its answer was refused"


def test_a_file_of_dislikes_says_so(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    add(path, "dislike")
    with pytest.raises(MiniGLMError, match="都被踩了"):
        read_examples(path)


def test_a_rating_of_another_kind_means_nothing(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    rows = [{"question": QUESTION, "answer": ANSWER, "rating": rating} for rating in (1, 5, "good", None, ["like"])]
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    assert len(learnt(path)) == 5


def test_a_torn_last_line_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    add(path, "like")
    with path.open("ab") as file:
        file.write(b'{"question": "half')
    add(path, "like", "又一个。")
    assert [e.answer for e in read_examples(path, allow_bad=True).examples] == [ANSWER, "又一个。"]


@given(st.text(), st.text(st.characters(exclude_categories=())))
@settings(deadline=None, max_examples=60)
def test_any_text_is_one_line_that_can_be_read(tmp_path_factory: pytest.TempPathFactory, asked: str, said: str) -> None:
    path = tmp_path_factory.mktemp("rated") / "feedback.jsonl"
    try:
        add(path, "like", said, asked)
    except MiniGLMError:
        assert not path.exists()
        return
    assert path.read_bytes().count(b"\n") == 1
    [(question, answer)] = learnt(path)
    shown = [text.encode("utf-8", "replace").decode().strip() for text in (asked, said)]
    assert [question, answer] == shown


def test_blank_texts_and_a_full_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "feedback.jsonl"
    with pytest.raises(MiniGLMError, match="空的"):
        add(path, "like", " \n")
    add(path, "like")
    before = path.read_bytes()
    monkeypatch.setattr(feedback, "MAX_BYTES", len(before) + 10)
    with pytest.raises(MiniGLMError, match="不再往里写"):
        add(path, "like")
    assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk_is_one_line() -> None:
    with pytest.raises(MiniGLMError, match="写不进去"):
        add(Path("/dev/full"), "like")


def test_several_processes_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    code = (
        "import sys; from pathlib import Path; from miniglm.serving.feedback import add_feedback\n"
        "for n in range(40): add_feedback(Path(sys.argv[1]), f'问{sys.argv[2]}-{n}？', '答' * 3000, 'like', model='m')"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, path, str(n)]) for n in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(set(learnt(path))) == 120
