"""The whole line as a user runs it: real processes, a small real book, every bad input of theirs."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from running import demo, fails, miniglm

from miniglm.cli import LOCAL
from miniglm.qa.formats import read_examples


def test_the_demo_leaves_a_model_numbers_and_a_picture(finished: Path) -> None:
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((finished / "results.json").read_text("utf-8"))
    assert results["text_bits_per_character"] > 0 and results["validation_questions"] == 6
    assert {"prepare", "tokenize", "pretrain", "finetune", "evaluate"} <= set(results["seconds"])
    for stage in ("pretrain", "finetune"):
        assert len((finished / stage / "metrics.jsonl").read_text("utf-8").splitlines()) == 12
    transformers = pytest.importorskip("transformers")
    assert type(transformers.AutoModelForCausalLM.from_pretrained(finished / "model")).__name__ == "GlmForCausalLM"
    assert not list(finished.rglob(".miniglm-tmp-*"))


def test_a_second_demo_trains_nothing(material: Path, finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    done = miniglm(*demo(material, finished))
    assert done.returncode == 0 and "微调已完成，跳过" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}


def test_more_minutes_for_a_finished_run_are_said_to_change_nothing(
    material: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    plan = (tmp_path / "run" / "plan.json").read_bytes()
    for _ in range(2):
        done = miniglm(*demo(material, tmp_path / "run"), "--minutes", "30")
        assert done.returncode == 0
        assert done.stderr.count("不会因为改了时长再训练（run.minutes：没有设 → 30）") == 1 and "--out" in done.stderr
        assert (tmp_path / "run" / "plan.json").read_bytes() == plan


def test_the_finished_run_answers_and_continues(finished: Path, material: Path, tmp_path: Path) -> None:
    assert miniglm("ask", finished, "刘备字什么").returncode == 0
    done = miniglm("sample", finished, "--start", "却说曹操", "--max-new-tokens", "20", "--num-samples", "2")
    assert done.returncode == 0 and done.stdout.count("—— 却说曹操 ——") == 2
    (tmp_path / "p.txt").write_text("却说\n次日\n", "utf-8")
    done = miniglm("sample", finished, "--start", f"FILE:{tmp_path / 'p.txt'}", "--max-new-tokens", "5")
    assert done.returncode == 0 and "—— 次日 ——" in done.stdout
    (tmp_path / "q.csv").write_text("question,note\n谁借了东风？,a\n关羽是谁,b\n", "utf-8-sig")
    done = miniglm("ask", finished, "--file", tmp_path / "q.csv", "--out", tmp_path / "a.jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    assert [row["note"] for row in rows] == ["a", "b"] and all("prediction" in row for row in rows)


def test_a_stopped_demo_goes_on_and_ends_like_an_undisturbed_one(
    material: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-m", "miniglm", *map(str, demo(material, out))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    while process.poll() is None and not (out / "pretrain" / "metrics.jsonl").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "接着做" in errors and "Traceback" not in errors
    assert not (out / "pretrain" / "done.json").exists()
    assert miniglm(*demo(material, out)).returncode == 0
    for name in ("pretrain/model", "model"):
        assert (out / name / "model.safetensors").read_bytes() == (finished / name / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("书.txt", "空")),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 50, ("书.txt",)),
        (bytes(range(256)) * 200, ("书.txt",)),
        ("短".encode(), ("200",)),
    ],
)
def test_bad_books(tmp_path: Path, material: Path, content: bytes, words: tuple[str, ...]) -> None:
    (tmp_path / "书.txt").write_bytes(content)
    fails("prepare", "--book", tmp_path / "书.txt", "--out", tmp_path / "run", words=words)


def test_a_book_read_in_the_wrong_encoding_says_which_to_pass(tmp_path: Path) -> None:
    text = "却说玄德引关、张来见太守。太守大喜，遂命三人为前部，起兵进发。次日，三人引军至，与贼相对。" * 30
    (tmp_path / "书.txt").write_bytes(text.encode("gb18030"))
    for wrong in ("utf-8", "big5"):
        fails("corpus", "inspect", tmp_path / "书.txt", "--encoding", wrong, words=("书.txt", wrong, "gb18030"))
    assert miniglm("corpus", "inspect", tmp_path / "书.txt").returncode == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "谁？", "answer": ', ("qa.jsonl", "11")),
        ('{"question": "谁？", "answer": ""}', ("qa.jsonl", "11")),
        ('{"ask": "谁？", "reply": "他"}', ("qa.jsonl", "11")),
    ],
)
def test_bad_lines_of_questions_are_named_and_may_be_allowed(
    tmp_path: Path, material: Path, line: str, words: tuple[str, ...]
) -> None:
    good = "".join((material / "qa.jsonl").read_text("utf-8").splitlines(keepends=True)[:10])
    (tmp_path / "qa.jsonl").write_text(good + line + "\n", "utf-8")
    arguments = ("prepare", "--book", material / "书.txt", "--qa", tmp_path / "qa.jsonl", "--out", tmp_path / "run")
    fails(*arguments, words=words)
    done = miniglm(*arguments, "--allow-bad-lines")
    assert done.returncode == 0 and "11" in done.stderr


def test_bad_settings_are_one_line(tmp_path: Path, material: Path, finished: Path) -> None:
    fails("demo", "--minutes", "0", "--out", tmp_path / "a", words=("--minutes", "大于 0"))
    assert not (tmp_path / "a").exists()
    fails("chat", tmp_path / "nowhere", words=("nowhere",))
    fails("chat", material, words=("没有训练好的模型",))
    fails("finetune", "--out", material, words=("不是 miniGLM 的运行目录",))
    fails("ask", finished, words=("问题",))
    fails("ask", finished, "谁", "--closed-book", "--temperature", "-1", words=("temperature",))
    fails("prepare", "--book", "三国演艺", "--out", tmp_path / "b", words=("三国演艺", "三国演义"))
    fails("ask", finished, "谁", "--closed-book", "--device", "tpu", words=("tpu", "cpu"))


def test_what_does_not_fit_the_corpus_is_said(tmp_path: Path, material: Path, finished: Path) -> None:
    book = ("--book", material / "书.txt", "--qa", material / "qa.jsonl")
    text = (material / "recipe.toml").read_text("utf-8")
    (tmp_path / "long.toml").write_text(text.replace("context = 96", "context = 90000"), "utf-8")
    fails("pretrain", "--recipe", tmp_path / "long.toml", *book, "--out", tmp_path / "a", words=("90000", "context"))
    (tmp_path / "wide.toml").write_text(text.replace("vocab_size = 700", "vocab_size = 500000"), "utf-8")
    fails(
        "tokenize", "--recipe", tmp_path / "wide.toml", *book, "--out", tmp_path / "b", words=("500000", "vocab_size")
    )
    (tmp_path / "other.toml").write_text(text.replace("vocab_size = 700", "vocab_size = 600"), "utf-8")
    fails("pretrain", "--recipe", tmp_path / "other.toml", *book, "--out", finished, words=("vocab_size", "700", "600"))
    (tmp_path / "typo.toml").write_text(text.replace("context", "contxt"), "utf-8")
    fails("pretrain", "--recipe", tmp_path / "typo.toml", "--out", tmp_path / "c", words=("typo.toml", "contxt"))


def test_damaged_model_folders_are_named(tmp_path: Path, finished: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        folder = tmp_path / name
        shutil.copytree(finished / "model", folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
        fails("ask", folder, "谁？", "--closed-book", words=(name,))
    folder = tmp_path / "missing"
    shutil.copytree(finished / "model", folder)
    (folder / "model.safetensors").unlink()
    fails("ask", folder, "谁？", "--closed-book", words=("model.safetensors",))


def test_a_run_of_another_version_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 99, "miniglm": "9.0"}', "utf-8")
    fails("chat", tmp_path, words=("没有训练好的模型",))
    fails("pretrain", "--out", tmp_path, words=("99", "9.0"))
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_the_demo_ends_in_the_page(material: Path, finished: Path) -> None:
    arguments = [str(part) for part in demo(material, finished) if part != "--no-chat"]
    process = subprocess.Popen(
        [sys.executable, "-m", "miniglm", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stderr is not None
    said, found = "", None
    while found is None and (line := process.stderr.readline()):
        said += line
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found is not None, said
    with urllib.request.urlopen(found[0]) as page:
        assert "text/html" in page.headers["Content-Type"]
    process.send_signal(signal.SIGTERM)
    said += process.stderr.read()
    assert process.wait() == 0 and "Traceback" not in said


def test_without_network_the_demo_says_what_to_do(tmp_path: Path) -> None:
    fails(
        "demo",
        "--no-chat",
        "--out",
        tmp_path / "run",
        words=("默认小说", "--book"),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
        MINIGLM_CACHE=str(tmp_path / "cache"),
    )
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_table_is_split_into_rows_that_can_be_read(tmp_path: Path) -> None:
    keys = [["孔明", "诸葛亮"]]
    cell = json.dumps(keys, ensure_ascii=False).replace('"', '""')
    rows = [f'第{n}阵风是谁借的？,孔明借了第{n}阵,"{cell}"' for n in range(20)]
    (tmp_path / "a.csv").write_text("\n".join(["question,answer,keys", *rows]), "utf-8")
    done = miniglm("qa", "split", tmp_path / "a.csv", "--every-tenth", "--out", tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    found = [
        e for name in ("train", "validation") for e in read_examples(tmp_path / "parts" / f"{name}.jsonl").examples
    ]
    assert len(found) == 20 and all(e.keys == (("孔明", "诸葛亮"),) for e in found)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("http://localhost:7860/v1", True),
        ("http://127.0.0.1", True),
        ("http://[::1]:8000/v1", True),
        ("http://127.example.com/v1", False),
        ("http://localhost.example.com/v1", False),
        ("http://localhost:x@example.com/v1", False),
    ],
)
def test_which_addresses_are_on_this_machine(address: str, local: bool) -> None:
    assert bool(re.match(LOCAL, address)) == local


def test_help_is_quick_and_chinese() -> None:
    done = miniglm("--help")
    assert done.returncode == 0
    for verb in ("corpus", "prepare", "tokenize", "pretrain", "finetune", "sample", "ask", "chat", "serve", "demo"):
        assert verb in done.stdout
        assert miniglm(verb, "--help").returncode == 0
    code = "import sys; sys.argv = ['miniglm', '--help']\ntry:\n    from miniglm.cli import main; main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_no_verb_loads_what_only_pictures_need() -> None:
    code = "import sys, miniglm.pipeline, miniglm.chat; assert 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_without_questions_continues_text(tmp_path: Path, material: Path) -> None:
    out = tmp_path / "run"
    done = miniglm(
        "demo", "--no-chat", "--recipe", material / "recipe.toml", "--book", material / "书.txt", "--out", out
    )
    assert done.returncode == 0, done.stderr
    assert miniglm("sample", out, "--start", "却说", "--max-new-tokens", "5").returncode == 0


def test_a_tokenizer_of_ones_own_is_taken(tmp_path: Path, material: Path, finished: Path) -> None:
    given = finished / "tokenizer" / "tokenizer.json"
    text = f"tokenizer = '{given}'\n" + (material / "recipe.toml").read_text("utf-8").replace(
        "[tokenizer]\nvocab_size = 700\n", ""
    )
    (tmp_path / "recipe.toml").write_text(text, "utf-8")
    done = miniglm(
        "tokenize", "--recipe", tmp_path / "recipe.toml", "--book", material / "书.txt", "--out", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "run/tokenizer/tokenizer.json").read_text("utf-8"))["model"]
        == json.loads(given.read_text("utf-8"))["model"]
    )
