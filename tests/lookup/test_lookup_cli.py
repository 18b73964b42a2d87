"""Asking from the command line: from the book by default, from the weights alone if told so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from running import fails, miniglm

from miniglm.pipeline import report_lines

QUESTION = "张角得到的天书叫什么名字？"


def test_ask_says_where_the_answer_is_from(finished: Path) -> None:
    done = miniglm("ask", finished, QUESTION)
    assert done.returncode == 0 and "【第" in done.stdout and "回】" in done.stdout
    closed = miniglm("ask", finished, QUESTION, "--closed-book")
    assert closed.returncode == 0 and "【第" not in closed.stdout


def test_ask_answers_from_the_book_without_torch(finished: Path) -> None:
    """Importing it takes longer than all the rest."""
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))\n"
    code += f"sys.argv = ['miniglm', 'ask', {str(finished)!r}, {QUESTION!r}]\nfrom miniglm.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1].startswith("False")
    assert done.stdout.splitlines()[:-1] == miniglm("ask", finished, QUESTION).stdout.splitlines()


def test_options_that_only_the_model_has_use_for_are_named(finished: Path) -> None:
    done = miniglm("ask", finished, QUESTION, "--temperature", "0.5", "--top-k", "0")
    [line] = [line for line in done.stderr.splitlines() if "--closed-book" in line]
    assert done.returncode == 0 and "--temperature、--top-k" in line and "--seed" not in line
    for more in ((), ("--closed-book", "--temperature", "0.5")):
        assert "--closed-book" not in miniglm("ask", finished, QUESTION, *more).stderr


def test_file_of_questions_keeps_citations(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text(f"{QUESTION}\n今天股市怎么样？\n", "utf-8")
    assert miniglm("ask", finished, "--file", tmp_path / "q.txt", "--out", tmp_path / "a.jsonl").returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    assert [row["question"] for row in rows] == [QUESTION, "今天股市怎么样？"]
    names = {"book", "chapter", "chapter_title", "paragraph", "start", "text", "quote", "score"}
    assert set(rows[0]["citations"][0]) == names
    assert rows[0]["prediction"] and rows[0]["refused"] is False


def test_index_alone_answers_from_a_book_without_questions(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made = miniglm("index", "--out", out, "--book", material / "书.txt", "--minutes", "0.5")
    assert made.returncode == 0, made.stderr
    assert "查找完成" in made.stderr and not (out / "model").exists()
    done = miniglm("ask", out, QUESTION)
    assert done.returncode == 0 and done.stdout.startswith(("【第", "书中没有"))
    again = miniglm("index", "--out", out)
    assert "查找已完成，跳过" in again.stderr
    about = out / "index" / "index.json"
    about.write_text(about.read_text("utf-8").replace('"format": ', '"format": 9'), "utf-8")
    fails("ask", out, QUESTION, words=("index", "格式", "miniglm index --out"))
    anew = miniglm("index", "--out", out)
    assert "重新建" in anew.stderr and "查找完成" in anew.stderr
    assert miniglm("ask", out, QUESTION).stdout.startswith(("【第", "书中没有"))
    fails("ask", out, QUESTION, "--closed-book", words=("没有训练好的模型",))


def test_evaluation_reports_both(finished: Path) -> None:
    report = json.loads((finished / "report" / "report.json").read_text("utf-8"))
    validation = report["splits"][0]
    assert validation["name"] == "validation" and 0 <= validation["with_book"]["key_accuracy"]["mean"] <= 1
    assert all(row["with_book"]["answer"] for row in validation["rows"])
    assert report["outside"] is None  # the shipped ones are about another book


def test_the_demo_shows_answers_from_the_book_beside_the_model_s_own(finished: Path) -> None:
    report = json.loads((finished / "report" / "report.json").read_text("utf-8"))
    text = "\n".join(report_lines(report))
    asked = [line.removeprefix("问：") for line in text.splitlines() if line.startswith("问：")]
    assert len(asked) == text.count("\n模型自己的回答：") == 5 and "\n答：" not in text
    said = miniglm("ask", finished, asked[0]).stdout.strip()
    assert f"问：{asked[0]}\n查书的回答：{said}\n模型自己的回答：" in text
    for row in report["splits"][0]["rows"]:  # as of a run without an index
        row.pop("with_book")
    assert "\n".join(report_lines(report)).count("\n答：") == 5
