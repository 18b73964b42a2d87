"""The benchmarks' own parts run, in miniature, so that they are not dead code where their machine is not at hand."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT

from miniglm.config import ModelConfig

TEXT = "".join(f"却说{a}{b}引兵{c}里，" for a in "曹刘孙袁" for b in "操备权绍" for c in "一二三四五六七八九十") * 4


@pytest.fixture(autouse=True)
def _beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


def test_the_gpu_job_runs_on_a_cpu_in_miniature() -> None:
    from gpu_reference import our_way, their_way
    from reference_model import Sizes

    cpu, stages = torch.device("cpu"), [(30, 4), (20, 8)]
    ours = our_way(TEXT, ModelConfig(320, 32, 64, 1, 2, 1, 16, 32), stages, cpu)
    theirs = their_way(TEXT, Sizes(1, 2, 32, 32, 4), stages, cpu, vocabulary=2048)
    for found in (ours, theirs):
        assert 0 < found["bits"] < 20 and found["seconds"] > 0 and found["gigaflops"] > 0  # 24 before any step
    assert ours["bits"] < theirs["bits"]  # it repeats itself: whoever learns faster is there sooner


def test_the_reference_model_learns_and_samples() -> None:
    from reference_model import ReferenceModel, Sizes, learning_rate

    sizes = Sizes(1, 2, 32, 16, 4)
    torch.manual_seed(0)
    model = ReferenceModel(sizes, vocabulary=11)
    ids = torch.arange(17).remainder(11)[None]
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(11), abs=0.1)
    optimizer = model.optimizer()
    for _ in range(150):
        model.loss(ids[:, :-1], ids[:, 1:]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() < 0.2
    assert model.sample(ids[:, :5], 30, temperature=0.1).shape == (1, 35)
    assert learning_rate(sizes, 99, 1000) == sizes.learning_rate
    assert learning_rate(sizes, 1000, 1000) == pytest.approx(sizes.learning_rate / 10)


def test_rounds_are_paired_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from side_by_side import alternate, median_ratio, parser, report

    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = alternate({"a": lambda: measure("a"), "b": lambda: measure("b")}, rounds=2)
    assert order == ["a", "b"] * 3 and found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 1.0]) == 4.0
    given = parser("x").parse_args(["--json", str(tmp_path / "out.json")])
    report("x", "title", [{"": "one", "speed": 12.5}], given, more=1)
    kept = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert kept["rows"] == [{"": "one", "speed": 12.5}] and kept["more"] == 1 and kept["machine"]["threads"] >= 1
    assert "12.5" in capsys.readouterr().out


def test_made_up_text_is_of_its_size_and_no_document_comes_twice(tmp_path: Path) -> None:
    from large_corpus import make_text

    (tmp_path / "书.txt").write_text(
        "第一回 起\n" + "\n".join(TEXT[i : i + 90] + "。" for i in range(0, 900, 90)), "utf-8"
    )
    (tmp_path / "made").mkdir()
    make_text(tmp_path / "made", 50_000, str(tmp_path / "书.txt"))
    made = (tmp_path / "made" / "00000.jsonl").read_text("utf-8").splitlines()
    assert 50_000 <= sum(len(line.encode()) + 1 for line in made) < 70_000
    assert len(set(made)) == len(made) > 3
    (tmp_path / "some").mkdir()
    make_text(tmp_path / "some", 5_000, str(tmp_path / "书.txt"), keep=lambda sentence: "曹" not in sentence[:3])
    sentences = (tmp_path / "some" / "00000.jsonl").read_text("utf-8").split("。")
    assert sum("曹" in s[:3] for s in sentences) < 0.1 * len(sentences)  # some get it by a changed character


def test_two_processes_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from scaling import measure

    found = measure(argparse.Namespace(width=64, layers=2, rows=2, steps=5), 2, 1, False)
    assert found["processes"] == 2 and 0 < found["exchange_share"] < 1 and found["tokens_per_second"] > 0


def test_the_reference_way_is_timed_by_counted_steps() -> None:
    from reference_model import Sizes
    from time_to_quality import reference_run

    texts = {"train": TEXT, "validation": TEXT[:600]}
    found = reference_run(texts, Sizes(1, 2, 32, 16, 4), 0.5, 1, every=10, step_seconds=1.0, used_only=True)
    assert 1 <= found["steps"] <= 30 and found["vocabulary"] < 1000  # half a minute, less what tokenizing took
    assert found["seconds"] == pytest.approx(30, abs=1) and 0 < found["final"] < 30


def test_sizes_are_timed_and_trained_for_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    import size_rule

    book = tmp_path / "书.txt"
    rng = random.Random(0)
    lines = ("".join(rng.choices("曹刘孙袁操备权绍引兵里却说战城马军将", k=80)) + "。" for _ in range(40))
    book.write_text("第一回 起\n" + "\n".join(lines), "utf-8")
    for name, count in (("train", 30), ("val", 10)):
        rows = [{"question": f"{name}第{n}问？", "answer": f"答{n}。", "keys": [[f"答{n}"]]} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in rows), "utf-8")
    sets = {"qa.train": [str(tmp_path / "train.jsonl")], "qa.validation": [str(tmp_path / "val.jsonl")]}
    small = {"corpus.books": [str(book)], "tokenizer.vocab_size": 400, "model.context": 32}
    monkeypatch.setattr(size_rule, "RECIPE", size_rule.RECIPE | sets | small)
    monkeypatch.setattr(size_rule, "TIMES", tmp_path / "times.json")
    source = size_rule.prepared(tmp_path / "data")
    size_rule.measure_times(["32x1"], 6, 1, source, tmp_path)
    times = json.loads((tmp_path / "times.json").read_text("utf-8"))["32x1"]
    assert all(0 < each < 10 for each in times)
    (tmp_path / "times.json").write_text(json.dumps({"32x1": [0.93, 0.93]}), "utf-8")
    found = size_rule.train_shape("32x1", 1, [5.0, 4.0], False, source, tmp_path / "run")
    assert found["steps"] == "5+4" and 0 <= found["validation %"] <= 100 and found["bits/char, text"] > 0
