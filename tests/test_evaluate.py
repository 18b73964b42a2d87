"""Evaluation as a user runs it: report, comparison, leaks; stopped and resumed; every bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, fails, miniglm

from miniglm import pipeline
from miniglm.checkpoint import load_model, save_model
from miniglm.evaluation import evaluate as evaluation
from miniglm.evaluation.baseline import NearestQuestion
from miniglm.evaluation.summary import LEAKS_SHOWN, Said
from miniglm.qa.formats import Example, Turn
from miniglm.qa.keys import holds_keys

Report = dict[str, Any]


def read(run: Path) -> Report:
    found: Report = json.loads((run / "report" / "report.json").read_text("utf-8"))
    return found


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run without a report, to be spoilt."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report", "state.safetensors"))
    return tmp_path / "run"


def test_the_demo_ends_with_a_report_of_every_split_and_the_baseline(finished: Path) -> None:
    report = read(finished)
    assert [part["name"] for part in report["splits"]] == ["validation", "train"]
    for part in report["splits"]:
        rows = part["rows"]
        assert len(rows) == part["questions"] == part["with_keys"] == 6
        right = [all(any(k in row["answers"][0] for k in group) for group in row["keys"]) for row in rows]
        accuracy = part["scores"]["key_accuracy"]
        assert accuracy["mean"] == pytest.approx(sum(right) / len(rows)) and accuracy["count"] == 6
        for found in (*part["scores"].values(), *part["baseline"].values()):
            assert found["low"] <= found["mean"] + 1e-6 and found["mean"] <= found["high"] + 1e-6 and found["count"] > 0
            assert found["of"] in ("answers", "tokens", "characters")
        assert {
            "rouge_l",
            "rouge_l_words",
            "rouge_1",
            "bleu",
            "corpus_bleu",
            "chrf",
            "repetition",
            "stopped",
            "copied",
        } <= set(part["scores"])
    train = report["splits"][1]
    assert train["baseline"]["key_accuracy"]["mean"] == 1.0  # the question itself is what is found
    assert report["leaks"]["train"] == 54 and report["leaks"]["splits"]["validation"]["examples"] == 6
    assert report["text"]["bits_per_character"]["of"] == "windows"
    assert report["speed"]["questions"] == 12
    page = (finished / "report" / "report.html").read_text("utf-8")
    assert "data:image/png;base64," in page and "http://" not in page.replace("http://www.w3.org", "")
    for name in ("rouge_l.png", "perplexity.png", "losses.png", "splits.png"):
        assert (finished / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert not (finished / "report" / evaluation.JOURNAL).exists()


def test_a_short_run_asks_fewer_questions() -> None:
    assert [pipeline.question_limit(m) for m in (0, 1, 5, 9.5, 10, 60)] == [200, 200, 300, 570, None, None]


def test_what_comes_after_training_is_kept_no_more_time_than_it_takes() -> None:
    """An hour's run left 13 of its minutes unused: its index and its scoring took two and a half."""
    kept = [pipeline.seconds_kept(m, index=True) for m in (2, 10, 30, 60, 600)]
    reranking = [28 + 12 + 20, 72 + 60 + 30, 216 + 180 + 60, 240 + 240 + 60 + 860, 240 + 240 + 60 + 860]
    assert kept == pytest.approx(reranking)
    assert [pipeline.reranking_seconds(m) > 0 for m in (2, 10, 30, 45, 60)] == [False, False, False, True, True]
    assert [pipeline.seconds_kept(m, index=False) for m in (2, 10, 60)] == [28, 72, 240]


def test_a_second_report_keeps_the_first(run: Path) -> None:
    assert miniglm("evaluate", run, "--limit", "3").returncode == 0
    first = (run / "report" / "report.json").read_bytes()
    done = miniglm("evaluate", run, "--split", "train", "--limit", "4", "--against", run)
    assert done.returncode == 0, done.stderr
    assert "训练题" in done.stdout and "验证题" not in done.stdout
    kept = [path for path in run.glob("report-*") if path.is_dir()]
    assert len(kept) == 1 and (kept[0] / "report.json").read_bytes() == first
    report = read(run)
    assert report["splits"][0]["questions"] == 4 and report["against"]["name"] == run.name
    # A finished report is not gone on with, it is made anew.
    assert miniglm("evaluate", run, "--resume", "--limit", "2").returncode == 0
    assert len(list(run.glob("report-*"))) == 2


def test_a_stopped_evaluation_goes_on_and_ends_like_an_undisturbed_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "AT_ONCE", 2)
    whole = pipeline.evaluate(run)
    shutil.rmtree(run / "report")

    @contextmanager
    def stops(name: str, total: int) -> Iterator[Callable[[int], None]]:
        def progress(done: int) -> None:
            if done >= 4:
                raise KeyboardInterrupt

        yield progress

    monkeypatch.setattr(pipeline, "count_bar", stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.evaluate(run)
    monkeypatch.undo()
    journal = run / "report" / evaluation.JOURNAL
    lines = journal.read_text("utf-8").splitlines()
    assert sum(len(json.loads(line)["rows"]) for line in lines) == 4
    journal.write_text("\n".join(lines) + '\n{"part": "validation", "seco', "utf-8")  # killed while writing
    fails("evaluate", run, "--resume", "--limit", "1", words=("题目", "--resume"))
    fails("evaluate", run, "--resume", "--samples", "2", words=("设置", "--resume"))
    done = miniglm("evaluate", run, "--resume")
    assert done.returncode == 0, done.stderr
    resumed = read(run)
    for before, after in zip(whole["splits"], resumed["splits"], strict=True):
        assert [row["answers"] for row in before["rows"]] == [row["answers"] for row in after["rows"]]
        assert before["scores"]["key_accuracy"] == after["scores"]["key_accuracy"]
    assert not list(run.glob("report-*"))


def test_the_journal_gives_back_what_was_said_whatever_characters_it_has(tmp_path: Path) -> None:
    said = Said(("一\u2028二\x85三\x0b", '{"a": 1}'), ("stop", "length"), 1.5, 3)
    evaluation._Journal(tmp_path / "journal").add("validation", [4], [said], 0.5)
    assert evaluation._Journal(tmp_path / "journal").said == {("validation", 4): said}


def test_ctrl_c_keeps_what_is_done(run: Path) -> None:
    command = [sys.executable, "-m", "miniglm", "evaluate", str(run), "--samples", "300"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    while process.poll() is None and not (run / "report" / evaluation.REQUEST).exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors, errors
    assert (run / "report" / evaluation.REQUEST).exists() and not (run / "report" / "report.json").exists()


def test_samples_are_scored_each_and_averaged(run: Path) -> None:
    assert miniglm("evaluate", run, "--split", "val", "--samples", "3", "--limit", "4").returncode == 0
    for row in read(run)["splits"][0]["rows"]:
        assert len(row["answers"]) == len(row["finish_reasons"]) == 3
        assert row["right"] == pytest.approx(sum(holds_keys(a, row["keys"]) for a in row["answers"]) / 3)


def test_questions_and_texts_of_ones_own(run: Path, material: Path, tmp_path: Path) -> None:
    # One question, a byte-order mark, no keys.
    one = tmp_path / "one.jsonl"
    one.write_text('\ufeff{"question": "刘备字什么？", "answer": "刘备字玄德。"}\n', "utf-8")
    done = miniglm("evaluate", run, "--qa", one, "--text", material / "书.txt")
    assert done.returncode == 0, done.stderr
    report = read(run)
    assert report["splits"][0]["name"] == "given" and report["splits"][0]["questions"] == 1
    assert "key_accuracy" not in report["splits"][0]["scores"] and "ROUGE-L" in done.stdout
    assert report["text"]["source"] == "书.txt"
    # Questions alone: the answers are listed, nothing is scored.
    (tmp_path / "questions.txt").write_text("刘备字什么？\n关羽是谁\n", "utf-8")
    done = miniglm("evaluate", run, "--qa", tmp_path / "questions.txt", "--split", "unseen")
    assert done.returncode == 0 and "没有要点也没有参考答案" in done.stdout, done.stderr
    assert read(run)["splits"][0]["name"] == "unseen" and "rouge_l" not in read(run)["splits"][0]["scores"]
    # A model folder by itself.
    done = miniglm("evaluate", run / "model", "--qa", one)
    assert done.returncode == 0, done.stderr
    assert read(run / "model")["splits"][0]["baseline"] is None and read(run / "model")["leaks"] is None


def test_a_model_that_answers_nothing_is_scored_as_that(run: Path) -> None:
    model, tokenizer = load_model(run / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(0.1)
        model.model.embed_tokens.weight[tokenizer.end_of_text] = 1.0
    save_model(run / "model", model, tokenizer)
    done = miniglm("evaluate", run)
    assert done.returncode == 0, done.stderr
    scores = read(run)["splits"][0]["scores"]
    assert scores["key_accuracy"]["mean"] == scores["rouge_l"]["mean"] == scores["length_ratio"]["mean"] == 0.0
    assert scores["stopped"]["mean"] == 1.0


def test_what_cannot_be_evaluated_is_said_in_one_line(
    run: Path, finished: Path, tmp_path: Path, material: Path
) -> None:
    fails("evaluate", tmp_path / "nowhere", words=("nowhere",))
    fails("evaluate", run / "model", words=("--qa", "--text"))
    fails("evaluate", run, "--split", "test", words=("test", "unseen"))
    fails("evaluate", run, "--split", "unseen", words=("没教过的题", "--qa"))
    fails("evaluate", run, "--samples", "2", "--temperature", "0", words=("--temperature", "--samples"))
    fails("evaluate", run, "--qa", tmp_path / "no.jsonl", words=("no.jsonl",))
    (tmp_path / "bad.jsonl").write_text('{"ask": "谁？"}\n', "utf-8")
    fails("evaluate", run, "--qa", tmp_path / "bad.jsonl", words=("bad.jsonl",))
    (tmp_path / "one.txt").write_text("谁？\n", "utf-8")
    fails("evaluate", run, "--qa", tmp_path / "one.txt", "--against", finished, words=("--against", finished.name))
    fails("evaluate", run, "--against", material, words=(material.name, "miniglm evaluate"))
    assert not (run / "report").exists()
    (run / "report").mkdir()
    (run / "report" / "report.json").write_text('{"format": 1', "utf-8")
    fails("compare", run, run, words=("report.json", "重新"))
    fails("compare", run, words=("两个",))


def test_two_runs_are_compared_question_by_question(run: Path, tmp_path: Path) -> None:
    assert miniglm("evaluate", run).returncode == 0
    other = tmp_path / "other"
    shutil.copytree(run, other)
    done = miniglm("compare", run, other, "--out", tmp_path / "compare")
    assert done.returncode == 0, done.stderr
    assert "看不出差别" in done.stdout
    assert (tmp_path / "compare" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "compare" / "compare.json").read_text("utf-8"))


def test_the_reference_way_of_evaluating_works(run: Path, tmp_path: Path) -> None:
    questions, labels = tmp_path / "input.txt", tmp_path / "labels.txt"
    questions.write_text("\ufeff刘备字什么？\n关羽字什么？\n", "utf-8")
    fails("sample", run, "--start", f"FILE:{questions}", "--eval", words=("labels.txt",))
    labels.write_text("刘备字玄德。\n", "utf-8")
    fails("sample", run, "--start", f"FILE:{questions}", "--eval", words=("labels.txt", "1 ", "2 "))
    labels.write_text("刘备字玄德。\n关羽字云长。\n", "utf-8")
    fails("sample", run, "--start", "刘备", "--eval", words=("FILE:",))
    fails("sample", run, "--start", f"FILE:{questions}", "--eval", "--top-p", "0.5", words=("--top-p",))
    for _ in range(2):
        done = miniglm("sample", run, "--start", f"FILE:{questions}", "--eval")
        assert done.returncode == 0, done.stderr
    assert "ROUGE-L" in done.stdout and "自困惑度" in done.stdout
    for name in ("rouge_l", "perplexity"):
        assert (run / f"{name}.png").exists() and len(list(run.glob(f"{name}-*.png"))) == 1
    rows = json.loads((run / "sample_eval.json").read_text("utf-8"))["rows"]
    assert [row["reference"] for row in rows] == ["刘备字玄德。", "关羽字云长。"]


def test_leaks_are_found_and_a_split_by_groups_has_none(tmp_path: Path) -> None:
    data = ROOT / "data" / "sanguo"
    done = miniglm(
        "qa", "check", data / "train.jsonl", data / "val.jsonl", data / "unseen.jsonl", "--out", tmp_path / "leaks.json"
    )
    assert done.returncode == 0 and "1,587（100.0%）" in done.stdout, done.stderr
    assert done.stdout.count("问题不同而答案相同") == 1 + LEAKS_SHOWN  # all are in the file
    found = json.loads((tmp_path / "leaks.json").read_text("utf-8"))["splits"]
    assert [
        found[str(data / name)][kind] for name in ("val.jsonl", "unseen.jsonl") for kind in ("question", "answer")
    ] == [0, 1587, 0, 0]
    # The reference's split of the same set leaks; by groups nothing does.
    done = miniglm("qa", "check", data / "train.jsonl", "--out", tmp_path / "tenth.json")
    assert done.returncode == 0 and "每十题留一题" in done.stdout
    tenth = next(iter(json.loads((tmp_path / "tenth.json").read_text("utf-8"))["splits"].values()))
    assert tenth["answer"] > 0.9 * tenth["examples"]
    done = miniglm("qa", "split", data / "train.jsonl", "--out", tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    parts = [tmp_path / "parts" / f"{name}.jsonl" for name in ("train", "validation", "test")]
    assert sum(len(part.read_text("utf-8").splitlines()) for part in parts) == 4466
    done = miniglm("qa", "check", *parts, "--out", tmp_path / "none.json")
    for counts in json.loads((tmp_path / "none.json").read_text("utf-8"))["splits"].values():
        assert counts["question"] == counts["answer"] == counts["copied"] == 0 and counts["examples"] > 400
    fails("qa", "split", data / "train.jsonl", "--out", tmp_path / "parts", words=("train.jsonl", "--out"))
    fails(
        "qa",
        "split",
        data / "train.jsonl",
        "--out",
        tmp_path / "x",
        "--shares",
        "0.5,0.1",
        words=("--shares", "0.8,0.1,0.1"),
    )
    done = miniglm("qa", "split", data / "train.jsonl", "--out", tmp_path / "old", "--every-tenth")
    lines = (data / "train.jsonl").read_text("utf-8").splitlines()
    kept = (tmp_path / "old" / "validation.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in kept] == [json.loads(line) for line in lines[9::10]]


def test_the_baseline_finds_the_most_similar_question() -> None:
    examples = [Example((Turn(q, a),)) for q, a in (("关羽字什么？", "云长"), ("张飞字什么？", "翼德"), ("ABC", "x"))]
    nearest = NearestQuestion(examples)
    assert nearest.find(["請問張飛的字是什麼", "xyz", "？？", "關羽字什麼"]) == [
        ("张飞字什么？", "翼德"),
        ("", ""),
        ("", ""),
        ("关羽字什么？", "云长"),
    ]
    assert NearestQuestion([]).find(["谁？"]) == [("", "")]
    assert NearestQuestion([Example((Turn("？", "x"),))]).find(["谁？"]) == [("", "")]
