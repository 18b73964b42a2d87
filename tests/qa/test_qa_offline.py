"""Questions by rules: what they say holds in the book, and the demo runs on them without a key or a network."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from running import RECIPE
from typer.testing import CliRunner

from miniglm.cli import app
from miniglm.corpus import Book, load_books
from miniglm.errors import MiniGLMError
from miniglm.qa.formats import read_examples
from miniglm.qa.keys import holds_keys
from miniglm.qa.leaks import find_leaks
from miniglm.qa.offline import find_facts, offline_sets

PEOPLE = ("孙悟净", "林月如", "赵灵儿", "李逍遥")
DEEDS = ("到河边放了一盏灯", "把门前的雪扫干净", "在灯下读完一卷书", "牵着马走过石板桥", "替老人挑了两担水")


def make_book(folder: Path, chapters: int = 12) -> Path:
    """A novel in which it is known who says what: each speaks, acts, and ends the chapter with a couplet."""
    text = []
    for n in range(chapters):
        a, b = PEOPLE[n % 4], PEOPLE[(n + 1) % 4]
        text += [
            f"第{n + 1}回　{'甲乙丙丁戊己庚辛壬癸子丑'[n]}地初逢旧友　{'金木水火土日月星辰风雷电'[n]}亭再遇故人",
            f"话说那年第{n + 1}场雪后，{a}{DEEDS[n % 5]}，回来时天已经大亮。众人都说好。",
            f"{a}道：“第{n + 1}件事我已经记在心里了，你不必再提。”{b}笑道：“这第{n + 2}封信总要有人去送才是。”",
            f"{b}听了这话，心里想着第{n + 3}间屋子的旧事。{b}道：“天色不早了，我们走第{n + 4}条路回去罢。”",
            f"{a}便答应了。众人道：“这是没有名字的人说的话，不能拿来问。”",
            f"正是：{'春夏秋冬东南西北上下左右'[n]}风吹过千山雪，明月照回{'梅兰竹菊松柏桃李杏梨荷桂'[n]}树花。",
        ]
    path = folder / "新书.txt"
    path.write_text("\n".join(text), "utf-8")
    return path


@pytest.fixture
def books(tmp_path: Path) -> list[Book]:
    return load_books([str(make_book(tmp_path))])


def test_what_the_rules_say_holds(books: list[Book]) -> None:
    facts = find_facts(books[0])
    text = "\n".join(p.text for p in books[0].paragraphs)
    assert all(fact.evidence in text for fact in facts)
    spoken = {fact.given: fact.key for fact in facts if fact.rule == "speaker"}
    for n in range(12):
        assert spoken[f"第{n + 1}件事我已经记在心里了，你不必再提"] == PEOPLE[n % 4]
        assert spoken[f"这第{n + 2}封信总要有人去送才是"] == PEOPLE[(n + 1) % 4]  # 笑道 is not part of a name
    assert len(spoken) == 36 and set(spoken.values()) == set(PEOPLE)  # 众人 is nobody
    verses = {fact.given: fact.key for fact in facts if fact.rule == "verse"}
    assert verses["春风吹过千山雪"] == "明月照回梅树花"
    assert verses["甲地初逢旧友"] == "金亭再遇故人"
    assert len(verses) == 24
    chapters = {fact.given: fact.key for fact in facts if fact.rule == "chapter"}
    assert chapters["癸地初逢旧友"] == chapters["风亭再遇故人"] == "第10回"
    names = [fact for fact in facts if fact.rule == "name"]
    assert names and all(fact.given.replace("＿＿", fact.key) in text and fact.key not in fact.given for fact in names)


def test_the_sets_are_labelled_and_give_nothing_away(books: list[Book], tmp_path: Path) -> None:
    sets = offline_sets(books)
    assert sets == offline_sets(books)
    rows = [row for part in sets.values() for row in part]
    assert all(row["source"] == "offline" for row in rows)
    assert all(holds_keys(row["answer"], row["keys"]) and not holds_keys(row["question"], row["keys"]) for row in rows)
    assert len({row["question"] for row in rows}) == len(rows)
    facts = {name: {row["id"] for row in part} for name, part in sets.items()}
    assert facts["validation"] == facts["train"] and not facts["unseen"] & facts["train"]
    assert Counter(Counter(row["id"] for row in sets["train"]).values()) == {3: len(facts["train"])}
    files = {}
    for name, part in sets.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), "utf-8")
    read = {name: read_examples(file).examples for name, file in files.items()}
    assert find_leaks(read["train"], read["unseen"], similarity=0.95).share("answer") == 0


def test_a_book_without_anything_to_ask(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("天地玄黄，宇宙洪荒，日月盈昃，辰宿列张。" * 50, "utf-8")
    with pytest.raises(MiniGLMError, match="规则只在书里找到 0 个"):
        offline_sets(load_books([str(tmp_path / "b.txt")]))


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_synthesize_offline_writes_one_set(tmp_path: Path) -> None:
    out = tmp_path / "set.jsonl"
    result = invoke("qa", "synthesize", make_book(tmp_path), "--offline", "--out", out)
    assert result.exit_code == 0, result.output
    assert len(read_examples(out).examples) >= 4 * 80
    again = invoke("qa", "synthesize", tmp_path / "新书.txt", "--offline", "--out", out)
    assert isinstance(again.exception, MiniGLMError)


def test_demo_offline_trains_on_them_and_a_rerun_takes_them_again(tmp_path: Path) -> None:
    book, out = make_book(tmp_path, 6), tmp_path / "run"
    (tmp_path / "recipe.toml").write_text(RECIPE, "utf-8")
    begin = ("demo", "--no-chat", "--recipe", tmp_path / "recipe.toml", "--out", out)
    assert isinstance(invoke(*begin, "--book", book, "--offline", "--qa", "x.jsonl").exception, MiniGLMError)
    (tmp_path / "空.txt").write_text("天地玄黄，宇宙洪荒，日月盈昃，辰宿列张。" * 50, "utf-8")
    assert isinstance(invoke(*begin, "--book", tmp_path / "空.txt", "--offline").exception, MiniGLMError)
    assert not out.exists()
    done = invoke(*begin, "--book", book, "--offline")
    assert done.exit_code == 0, done.output
    assert "没教过的题" in done.stdout and "用规则从书里出了题" in done.stderr
    made = {path.name: path.stat().st_mtime_ns for path in (out / "offline").iterdir()}
    assert set(made) == {"train.jsonl", "validation.jsonl", "unseen.jsonl"}
    assert '"source": "offline"' in (out / "qa" / "train.jsonl").read_text("utf-8")
    again = invoke(*begin, "--book", book, "--offline")
    assert again.exit_code == 0 and "微调已完成，跳过" in again.stderr
    assert made == {path.name: path.stat().st_mtime_ns for path in (out / "offline").iterdir()}
