"""Two runs are compared question by question, whatever the order and however many of them they share."""

from __future__ import annotations

import copy
import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from report_sample import make_report
from rich.console import Console

from miniglm.errors import MiniGLMError
from miniglm.evaluation.compare import COMPARED, against, compare_reports, comparison_table, write_comparison


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    return make_report("before", right_every=8, nats=4.0)


@pytest.fixture(scope="module")
def after() -> dict[str, Any]:
    return make_report("after", right_every=2, nats=3.0)


def printed(comparison: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(comparison_table(comparison))
    return console.export_text()


def test_differences_are_those_of_the_same_questions(before: dict[str, Any], after: dict[str, Any]) -> None:
    shuffled = copy.deepcopy(after)
    random.Random(0).shuffle(shuffled["splits"][0]["rows"])
    split = compare_reports([before, shuffled], ["a", "b"])["splits"][0]
    (run,) = split["runs"]
    assert (run["name"], run["paired"], run["only_first"], run["only_later"]) == ("b", 40, 0, 0)
    assert set(run["scores"]) == set(COMPARED)
    rights = [[row["right"] for row in report["splits"][0]["rows"]] for report in (before, after)]
    difference = run["scores"]["key_accuracy"]["difference"]
    assert difference["mean"] == pytest.approx(np.mean(rights[1]) - np.mean(rights[0]), abs=1e-6)
    assert 0 < difference["low"] < difference["mean"] < difference["high"] and difference["count"] == 40
    same = compare_reports([before, after], ["a", "b"])["splits"][0]["runs"][0]["scores"]
    assert same["key_accuracy"]["difference"]["mean"] == difference["mean"]


def test_perplexities_are_compared_by_their_logarithm(before: dict[str, Any], after: dict[str, Any]) -> None:
    """In the sample a token costs 4 nats over 20 tokens before and 3 after, times 1 to 7."""
    found = compare_reports([before, after], ["a", "b"])["splits"][0]["runs"][0]["scores"]["perplexity_token"]
    expected = np.mean([(1 + number % 7) / 20 for number in range(40)])
    assert found["difference"]["mean"] == pytest.approx(-expected, abs=1e-3)
    assert found["first"] == pytest.approx(4 * expected, abs=1e-3)


def test_a_run_does_not_differ_from_itself(before: dict[str, Any]) -> None:
    comparison = compare_reports([before, before], ["a", "a"])
    for split in comparison["splits"]:
        for score in split["runs"][0]["scores"].values():
            assert (score["difference"]["low"], score["difference"]["high"]) == (0, 0)
    text = printed(comparison)
    assert text.count("看不出差别") == 3 * len(COMPARED) and "有差别（" not in text


def test_questions_that_do_not_pair_are_counted(before: dict[str, Any], after: dict[str, Any]) -> None:
    first, later = copy.deepcopy(before), copy.deepcopy(after)
    later["splits"][0]["rows"] = later["splits"][0]["rows"][:30]
    later["splits"][0]["rows"][0]["reference"] = "另一个参考答案"
    first["splits"][1]["rows"] = first["splits"][1]["rows"][:5]
    del first["splits"][2]
    splits = compare_reports([first, later], ["a", "b"])["splits"]
    counts = [(s["name"], *(s["runs"][0][n] for n in ("paired", "only_first", "only_later"))) for s in splits]
    assert counts == [("validation", 29, 11, 1), ("unseen", 5, 0, 7)]


def test_a_question_asked_twice_pairs_in_order(before: dict[str, Any]) -> None:
    first = copy.deepcopy(before)
    row = first["splits"][0]["rows"][0]
    first["splits"] = [first["splits"][0] | {"rows": [row | {"right": 1.0}, row | {"right": 0.0}]}]
    later = copy.deepcopy(first)
    later["splits"][0]["rows"].append(row | {"right": 0.0})
    run = compare_reports([first, later], ["a", "b"])["splits"][0]["runs"][0]
    assert (run["paired"], run["only_later"]) == (2, 1)
    difference = run["scores"]["key_accuracy"]["difference"]
    assert (difference["low"], difference["high"]) == (0, 0)


def test_a_score_that_one_side_lacks_or_that_is_infinite_is_left_out(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    later = copy.deepcopy(after)
    for row in later["splits"][0]["rows"]:
        row["right"] = None
    later["splits"][0]["rows"][3]["scores"]["perplexity_token"] = math.inf
    scores = compare_reports([before, later], ["a", "b"])["splits"][0]["runs"][0]["scores"]
    assert "key_accuracy" not in scores and scores["perplexity_token"]["difference"]["count"] == 39


@pytest.mark.parametrize("change", ["other questions", "other splits"])
def test_nothing_in_common_is_an_error(before: dict[str, Any], after: dict[str, Any], change: str) -> None:
    later = copy.deepcopy(after)
    for split in later["splits"]:
        if change == "other splits":
            split["name"] = "given"
        for row in split["rows"]:
            row["question"] += "" if change == "other splits" else "？"
    with pytest.raises(MiniGLMError, match="runs/b 和 runs/a 没有一道相同的题"):
        compare_reports([before, later], ["runs/a", "runs/b"])


def test_three_runs_as_files_a_picture_and_a_table(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    comparison = compare_reports([before, after, before], ["runs/first", "runs/第二", "[red]"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a name in Chinese would warn of missing glyphs
        write_comparison(comparison, tmp_path)
    assert json.loads((tmp_path / "compare.json").read_text("utf-8")) == comparison
    assert imread(tmp_path / "compare.png").size
    text = printed(comparison, width=120)
    assert "有差别（更好）" in text and "[red]" in text and "runs/第二 配上 40 题" in text
    assert text.count("6.400") == 3  # each run's bits per character of the text


def test_lower_perplexity_is_better_and_fewer_right_answers_worse(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    lines = printed(compare_reports([after, before], ["a", "b"]), width=120).splitlines()
    first = {name: next(line for line in lines if name in line) for name in ("要点全中", "log 困惑度")}
    assert all("有差别（更差）" in line for line in first.values())
    assert "−" in first["要点全中"] and "+" in first["log 困惑度"]


def test_reports_without_a_shared_score_make_no_picture(before: dict[str, Any], tmp_path: Path) -> None:
    bare = copy.deepcopy(before)
    for split in bare["splits"]:
        for row in split["rows"]:
            row |= {"right": None, "scores": {}}
    write_comparison(compare_reports([bare, bare], ["a", "b"]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]


def test_against_is_this_report_minus_the_earlier(before: dict[str, Any], after: dict[str, Any]) -> None:
    found = against(after, before)
    assert found["name"] == "before"
    assert [(split["name"], split["count"]) for split in found["splits"]] == [
        ("validation", 40),
        ("unseen", 12),
        ("train", 9),
    ]
    assert found["splits"][0]["differences"]["key_accuracy"]["low"] > 0
    assert found["splits"][0]["differences"]["perplexity_token"]["high"] < 0
