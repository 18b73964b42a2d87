"""Two or more evaluations beside each other: differences question by question, as numbers, a picture and a table.

Reads reports only; knows nothing of models. The same question is recognised by its text and its reference answer, so
reports of different files compare on what they share.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniglm.errors import MiniGLMError
from miniglm.evaluation.pictures import BASELINE, INK, MARK, MODEL, error_bars, picture, shown_name
from miniglm.evaluation.scores import paired_interval
from miniglm.evaluation.summary import BY_NAME, interval
from miniglm.files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

COMPARED = ("key_accuracy", "rouge_l", "character_f1", "perplexity_token")
"""Scores that are compared question by question. Of the perplexity it is the logarithm, nats a token: a difference of
perplexities would be that of the few worst answers."""
FORMAT = 1


def _value(row: Mapping[str, Any], score: str) -> float | None:
    """The row's score, in the form in which it is compared; None where it has none."""
    value: float | None = row["right"] if score == "key_accuracy" else row["scores"].get(score)
    if value is None or score != "perplexity_token":
        return value
    return math.log(value) if 0 < value < math.inf else None


def _by_question(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], Mapping[str, Any]]:
    """The rows by question, reference and, for one that a file has several times, which of them it is."""
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for row in rows:
        text = (row["question"], row["reference"])
        found[*text, seen[text]] = row
        seen[text] += 1
    return found


def _compare_rows(first: Sequence[Mapping[str, Any]], later: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many questions both have, and of each score both means over them and the difference, later minus first."""
    mine, theirs = _by_question(first), _by_question(later)
    common = [key for key in mine if key in theirs]
    scores = {}
    for score in COMPARED:
        pairs = [(_value(mine[key], score), _value(theirs[key], score)) for key in common]
        if known := [(before, after) for before, after in pairs if before is not None and after is not None]:
            before, after = [one for one, _ in known], [other for _, other in known]
            difference = paired_interval(before, after)
            scores[score] = {
                "first": sum(before) / len(before),
                "later": sum(after) / len(after),
                "difference": interval(difference),
            }
    return {
        "paired": len(common),
        "only_first": len(mine) - len(common),
        "only_later": len(theirs) - len(common),
        "scores": scores,
    }


def compare_reports(reports: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Compares each later run with the first, on every split that all have.

    Args:
        reports: what the runs' report.json hold.
        names: what to call the runs, one each.

    Returns:
        `runs` (name, model, and bits per character of the text: those are not paired, as the texts need not be the
        same) and `splits`, each with one entry for every later run: how many questions pair and how many do not, and
        of each score the two means over the paired questions and the difference with its 95 % interval.

    Raises:
        MiniGLMError: a run has no question in common with the first in any split.
    """
    runs = [
        {"name": name, "made": report["made"], "model": report["model"], "text": report["text"]}
        for name, report in zip(names, reports, strict=True)
    ]
    by_name = [{split["name"]: split for split in report["splits"]} for report in reports]
    splits = [
        {
            "name": name,
            "title": split["title"],
            "runs": [
                {"name": run, **_compare_rows(split["rows"], later[name]["rows"])}
                for run, later in zip(names[1:], by_name[1:], strict=True)
            ],
        }
        for name, split in by_name[0].items()
        if all(name in later for later in by_name[1:])
    ]
    for number, run in enumerate(names[1:]):
        if not any(split["runs"][number]["paired"] for split in splits):
            raise MiniGLMError(
                f"{run} 和 {names[0]} 没有一道相同的题（同一组里问题和参考答案都相同才算），比不了",
                fix="请用同样的问答文件和 --split 评测它们",
            )
    return {"format": FORMAT, "runs": runs, "splits": splits}


def against(report: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The report's part "against": its differences from an earlier report, this one minus the earlier.

    Raises:
        MiniGLMError: as `compare_reports`.
    """
    splits = compare_reports([earlier, report], [earlier["name"], report["name"]])["splits"]
    return {
        "name": earlier["name"],
        "splits": [
            {
                "name": split["name"],
                "count": run["paired"],
                "differences": {name: score["difference"] for name, score in run["scores"].items()},
            }
            for split in splits
            for run in split["runs"]
        ],
    }


def differs(difference: Mapping[str, Any]) -> bool:
    """Whether the interval leaves out 0."""
    return bool(difference["low"] > 0 or difference["high"] < 0)


def _draw(comparison: Mapping[str, Any], path: Path) -> None:
    """One panel a score: every difference with its interval, blue where it is for the better, orange for the worse,
    grey where the interval holds 0."""
    labels = {
        "key_accuracy": "key accuracy (percentage points)",
        "rouge_l": "ROUGE-L F (percentage points)",
        "character_f1": "character F1 (percentage points)",
        "perplexity_token": "log-perplexity (nats per token, lower is better)",
    }
    names = [shown_name(Path(run["name"]).name, f"run {n}") for n, run in enumerate(comparison["runs"], 1)]
    panels = []
    for score, label in labels.items():
        found = [
            (f"{split['name']}: {name}", run["scores"][score]["difference"])
            for split in comparison["splits"]
            for name, run in zip(names[1:], split["runs"], strict=True)
            if score in run["scores"]
        ]
        if found:
            panels.append((score, label, found))
    if not panels:
        return
    lines = max(len(found) for _, _, found in panels)
    with picture(path, len(panels), size=(7.5, len(panels) * (0.95 + 0.3 * lines))) as axes:
        for axis, (score, label, found) in zip(axes, panels, strict=True):
            scale = 100 if BY_NAME[score].unit == "share" else 1
            for place, (_, difference) in enumerate(found):
                scaled = {key: scale * difference[key] for key in ("mean", "low", "high")}
                better = (difference["mean"] > 0) == BY_NAME[score].higher_is_better
                color = BASELINE if not differs(difference) else MODEL if better else MARK
                axis.errorbar(
                    scaled["mean"], place, xerr=error_bars(scaled), fmt="o", color=color, capsize=3, markersize=6
                )
                text = f"{scaled['mean']:+.1f}" if scale == 100 else f"{scaled['mean']:+.3f}"
                axis.annotate(text, (scaled["mean"], place), xytext=(0, 6), textcoords="offset points", ha="center")
            axis.axvline(0, color=INK, linewidth=1)
            axis.set_yticks(range(len(found)), [name for name, _ in found])
            axis.set_ylim(len(found) - 0.5, -0.7)
            axis.margins(x=0.12)
            axis.grid(True, axis="x")
            axis.grid(False, axis="y")
            axis.set_title(f"{label}, minus {names[0]}")
        axes[-1].set_xlabel("blue: better · orange: worse · grey: the 95 % interval holds 0")


def write_comparison(comparison: Mapping[str, Any], folder: Path) -> None:
    """Writes compare.json, and compare.png where the runs share a score, into `folder`."""
    write_whole(folder / "compare.json", json.dumps(comparison, ensure_ascii=False, indent=2) + "\n")
    _draw(comparison, folder / "compare.png")


def _signed(value: float, unit: str) -> str:
    text = f"{100 * value:+.1f}" if unit == "share" else f"{value:+.3f}"
    return text.replace("-", "−")


def _verdict(difference: Mapping[str, Any], higher_is_better: bool | None) -> str:
    if not differs(difference):
        return "看不出差别"
    return "有差别（更好）" if (difference["mean"] > 0) == higher_is_better else "有差别（更差）"


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """The comparison for the terminal: of every split and later run the scores, then the text's bits per character
    side by side. What is paired is said below."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"与 {comparison['runs'][0]['name']} 比"))
    table.add_column("分数", overflow="fold")
    for name in ("它", "差", "95 % 区间"):
        table.add_column(name, justify="right")
    table.add_column("结论", overflow="fold")

    def add(*cells: str) -> None:
        table.add_row(*map(Text, cells))  # Text, because a run's name like [b] is no markup

    notes = []
    for split in comparison["splits"]:
        for run in split["runs"]:
            notes.append(
                f"{split['title']}：{run['name']} 配上 {run['paired']:,} 题；"
                f"没配上的，第一个有 {run['only_first']:,} 题，它有 {run['only_later']:,} 题"
            )
            table.add_section()
            add(f"{split['title']}：{run['name']}")
            for name, found in run["scores"].items():
                score, difference = BY_NAME[name], found["difference"]
                mean, low, high = (_signed(difference[part], score.unit) for part in ("mean", "low", "high"))
                title = "log 困惑度" if name == "perplexity_token" else score.title
                value = f"{found['later']:.1%}" if score.unit == "share" else f"{found['later']:.3f}"
                add(f"  {title}", value, mean, f"{low} ~ {high}", _verdict(difference, score.higher_is_better))
    table.add_section()
    if texts := [(run["name"], run["text"]["bits_per_character"]) for run in comparison["runs"] if run["text"]]:
        add("书的正文，比特/字", "", "", "", "只并列，没有配对")
        for name, found in texts:
            add(f"  {name}", f"{found['mean']:.3f}", "", f"{found['low']:.3f} ~ {found['high']:.3f}")
    notes += [
        "差是逐题相减再平均，百分数的差以百分点计；区间不含 0 才算有差别",
        "log 困惑度是每个 token 的 nats，越低越好",
    ]
    table.caption = Text("\n".join(notes), justify="left")
    return table
