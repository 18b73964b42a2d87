"""The pictures: which are made, what is on their axes, and that no text needs a font that is not there."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from report_sample import make_report

from miniglm.evaluation import pictures
from miniglm.evaluation.scores import bootstrap_interval
from miniglm.evaluation.summary import interval


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return make_report()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Axes]]:
    """The panels of every picture as it was saved, by file name."""
    found: dict[str, list[Axes]] = {}
    save = Figure.savefig

    def saving(figure: Figure, file: Any, **options: Any) -> None:
        save(figure, file, **options)
        found[f"picture {len(found)}"] = figure.axes

    monkeypatch.setattr(Figure, "savefig", saving)
    return found


def test_every_picture_is_made_and_shows_something(report: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = pictures.draw_all(report, tmp_path)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 6
    for name in names:
        image = imread(tmp_path / name)
        assert image.shape[1] > 700 and image[..., :3].std() > 0.05


def test_a_picture_with_nothing_to_show_is_not_made(report: dict[str, Any], tmp_path: Path) -> None:
    report = copy.deepcopy(report) | {"losses": {"pretrain": [], "finetune": []}}
    report["splits"] = report["splits"][:1]
    report["splits"][0] |= {"by_chapter": [], "by_length": [], "scores": {}}
    for row in report["splits"][0]["rows"]:
        row["scores"] = {"repetition": 0.0}
    assert pictures.draw_all(report, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_one_stage_and_no_baseline(report: dict[str, Any], tmp_path: Path, drawn: dict[str, list[Axes]]) -> None:
    report = copy.deepcopy(report)
    report["losses"] = {"finetune": [[0.5, 3.0], [1.0, 2.0]], "finetune_validation": []}
    report["splits"] = [report["splits"][0] | {"baseline": None, "rows": [], "by_length": [], "by_chapter": []}]
    assert pictures.draw_all(report, tmp_path) == ["splits.png", "losses.png"]
    splits, losses = drawn.values()
    assert [axis.get_title(loc="left") for axis in losses] == ["finetune"]
    legend = splits[0].get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["model"]


def test_chinese_chapters_need_no_chinese_font(report: dict[str, Any], tmp_path: Path) -> None:
    report = copy.deepcopy(report)
    for place, group in enumerate(report["splits"][0]["by_chapter"]):
        group["chapter"] = f"第{place}回"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "by_chapter.png" in pictures.draw_all(report, tmp_path)


@pytest.mark.parametrize("log", [False, True])
def test_values_beyond_the_axis_are_counted(tmp_path: Path, drawn: dict[str, list[Axes]], log: bool) -> None:
    values = [1.5, 2.0, 3.0, 50.0, float("inf"), float("nan")]
    pictures.draw_histogram(values, tmp_path / "h.png", title="one", xlabel="x", log=log, low=1.0, high=10.0)
    (axis,) = drawn["picture 0"]
    assert axis.get_title(loc="left") == "one  (6 answers, 3 beyond the axis)"
    assert sum(bar.get_height() for bar in axis.patches if isinstance(bar, Rectangle)) == 3
    assert axis.get_xlim() == (1.0, 10.0)
    legend = axis.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["mean 14.1", "median 2.5"]


@pytest.mark.parametrize("values", [[], [0.0], [1.0] * 9, [1e300, 1.0], [float("nan")]])
def test_any_values_make_a_histogram(values: list[float], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.draw_histogram(values, tmp_path / "h.png", title="any", xlabel="x")
    assert imread(tmp_path / "h.png").size


def test_a_long_book_is_drawn_in_tens_of_chapters() -> None:
    random = np.random.default_rng(0)
    values = {chapter: random.binomial(1, 0.4, 13).astype(float).tolist() for chapter in range(1, 121)}
    groups = [{"chapter": chapter, "model": interval(bootstrap_interval(v))} for chapter, v in values.items()]
    found = pictures._chapters(groups)
    assert [name for name, _ in found] == [f"{first}–{first + 9}" for first in range(1, 121, 10)]
    together = bootstrap_interval([value for chapter in range(1, 11) for value in values[chapter]])
    pooled = found[0][1]["model"]
    assert pooled["count"] == 130 and pooled["mean"] == pytest.approx(together.mean, abs=1e-6)
    assert pooled["low"] == pytest.approx(together.low, abs=0.02)
    assert pooled["high"] == pytest.approx(together.high, abs=0.02)
    assert found[0][1]["baseline"] is None


def test_a_mean_outside_of_its_bounds_is_drawn(tmp_path: Path, report: dict[str, Any]) -> None:
    """Rounding can put the mean a hair below the lower bound; matplotlib refuses negative error bars."""
    report = copy.deepcopy(report)
    report["splits"][0]["scores"]["key_accuracy"] |= {"mean": 0.3, "low": 0.3000004, "high": 0.3000004}
    assert "splits.png" in pictures.draw_all(report, tmp_path)
