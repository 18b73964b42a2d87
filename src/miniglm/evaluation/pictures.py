"""The report's pictures, drawn from its numbers into PNG files.

Knows nothing of models, nor how a number came about. Labels are English, so that no Chinese font is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from miniglm.files import written_whole

if TYPE_CHECKING:  # matplotlib takes a third of a second to import, and most verbs draw nothing
    from matplotlib.axes import Axes

MODEL, BASELINE, MARK, INK = "#2b6cb0", "#a9b4c2", "#c2410c", "#334155"

_STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e2e8f0",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.edgecolor": "none",
    "legend.fontsize": 9.5,
}
_SPLITS = {
    "validation": "validation: known facts, new wording",
    "unseen": "unseen: facts that only the book tells",
    "train": "training questions",
    "given": "given questions",
}
_MOST_CHAPTERS = 24  # more bars than these are grouped in tens
_LARGEST_PERPLEXITY = 10_000.0


@contextmanager
def picture(path: Path, panels: int, *, size: tuple[float, float], sharex: bool = False) -> Iterator[list[Axes]]:
    """Gives panels, one below the other; what is on them when the block ends is written to `path` as a PNG.

    `size` is the width and height in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        # A Figure of its own, not pyplot's: it is drawn by Agg whatever backend the caller has, and none stays open.
        figure = Figure(figsize=size, layout="constrained")
        yield list(figure.subplots(panels, squeeze=False, sharex=sharex)[:, 0])
        with written_whole(path) as file:
            figure.savefig(file, format="png")


def shown_name(name: str, otherwise: str) -> str:
    """The name, if a font without Chinese can write it."""
    return name if name.isascii() and name.isprintable() else otherwise


def error_bars(interval: Mapping[str, Any]) -> list[list[float]]:
    """How far the bounds are from the mean, in the form that matplotlib's error bars take."""
    return [[max(0.0, interval["mean"] - interval["low"])], [max(0.0, interval["high"] - interval["mean"])]]


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e7 else f"{value:.3g}"


def _histogram(axis: Axes, values: Sequence[float], *, title: str, log: bool, low: float, high: float | None) -> None:
    """Values beyond `high` (by default the largest) are left out, and the title says how many they are."""
    finite = np.asarray([value for value in values if math.isfinite(value)], dtype=np.float64)
    top = max(finite.max(initial=low), low * 1.2, low + 1e-9) if high is None else high
    edges = np.geomspace(low, top, 41) if log else np.linspace(low, top, 41)
    beyond = len(values) - int((finite <= top).sum())
    axis.set_title(f"{title}  ({len(values):,} answers" + (f", {beyond:,} beyond the axis)" if beyond else ")"))
    axis.hist(finite, bins=edges.tolist(), color=MODEL, alpha=0.85, edgecolor="white", linewidth=0.5)
    for value, name, style in ((finite.mean(), "mean", "-"), (np.median(finite), "median", ":")) if finite.size else ():
        # A mean that lies beyond the axis is said, not drawn.
        axis.axvline(value if value <= top else np.nan, color=MARK, linestyle=style, label=f"{name} {_number(value)}")
    if log:
        axis.set_xscale("log")
        if top < 20 * low:  # powers of ten would leave hardly a tick
            from matplotlib.ticker import MaxNLocator

            axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.xaxis.set_minor_formatter(lambda value, _: "")
    axis.set_xlim(low, top)
    axis.set_ylabel("answers")
    if finite.size:
        axis.legend(loc="upper center", bbox_to_anchor=(0.62, 1))  # the tallest bars are most often at the ends


def draw_histogram(
    values: Sequence[float],
    path: Path,
    *,
    title: str,
    xlabel: str,
    log: bool = False,
    low: float = 0.0,
    high: float | None = None,
) -> None:
    """One histogram of scores of answers, mean and median marked.

    Args:
        log: a logarithmic axis; `low` must be above 0.
        low: where the axis begins.
        high: where it ends, by default at the largest value. The title counts what lies beyond, or is not finite.
    """
    with picture(path, 1, size=(7, 3.6)) as axes:
        _histogram(axes[0], values, title=title, log=log, low=low, high=high)
        axes[0].set_xlabel(xlabel)


def _title(split: Mapping[str, Any]) -> str:
    return _SPLITS.get(split["name"], shown_name(split["name"], "questions"))


def _histograms(report: Mapping[str, Any], path: Path, score: str, xlabel: str, *, log: bool) -> bool:
    """One panel a split, one above the other on the same axis, so that they compare."""
    found = [(s, [r["scores"][score] for r in s["rows"] if score in r["scores"]]) for s in report["splits"]]
    panels = [(split, values) for split, values in found if values]
    if not panels:
        return False
    largest = max((value for _, values in panels for value in values if math.isfinite(value)), default=1.0)
    low, high = (1.0, min(max(largest, 2.0), _LARGEST_PERPLEXITY)) if log else (0.0, 1.0)
    with picture(path, len(panels), size=(7, 0.7 + 2.2 * len(panels)), sharex=True) as axes:
        for axis, (split, values) in zip(axes, panels, strict=True):
            _histogram(axis, values, title=_title(split), log=log, low=low, high=high)
        axes[-1].set_xlabel(xlabel)
    return True


def _rouge_l(report: Mapping[str, Any], path: Path) -> bool:
    return _histograms(report, path, "rouge_l", "ROUGE-L F over characters (1 = the reference answer)", log=False)


def _perplexity(report: Mapping[str, Any], path: Path) -> bool:
    label = "perplexity of the reference answer, per token (log axis, lower is better)"
    return _histograms(report, path, "perplexity_token", label, log=True)


def draw_losses(losses: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> bool:
    """Training loss and validation of both stages over the minutes, from `ui.stage_curves` or a report's `losses`.
    Returns whether there was anything to draw."""
    stages = [
        (stage, losses.get(stage) or [], losses.get(f"{stage}_validation") or []) for stage in ("pretrain", "finetune")
    ]
    stages = [stage for stage in stages if stage[1] or stage[2]]
    if not stages:
        return False
    with picture(path, len(stages), size=(7, 0.4 + 2.7 * len(stages))) as axes:
        for axis, (name, points, checks) in zip(axes, stages, strict=True):
            axis.set(title=name, xlabel="minutes", ylabel="training loss\n(nats per token)")
            if points:
                axis.plot(*zip(*points, strict=True), color=BASELINE, linewidth=0.8)
            if checks:
                right = axis.twinx()
                right.grid(False)
                right.plot(*zip(*checks, strict=True), "o-", color=MARK, markersize=3.5)
                right.set_ylabel("validation\n(bits per character)", color=MARK)
                right.annotate(
                    f"{checks[-1][1]:.2f}",
                    checks[-1],
                    textcoords="offset points",
                    xytext=(0, 7),
                    ha="right",
                    color=MARK,
                )
                right.margins(y=0.15)
    return True


def _losses(report: Mapping[str, Any], path: Path) -> bool:
    return draw_losses(report["losses"], path)


def _pair_of_bars(axis: Axes, labels: Sequence[str], pairs: Sequence[Mapping[str, Any]], *, values: bool) -> None:
    """The model's bar and beside it the baseline's, each a share with its interval; `values` writes them above."""
    both = (("model", "model", MODEL), ("baseline", "BM25 baseline", BASELINE))
    sides = [one for one in both if any(pair.get(one[0]) for pair in pairs)]
    for side, name, color in sides:
        shift = 0.0 if len(sides) == 1 else -0.2 if side == "model" else 0.2
        found = [(number + shift, pair[side]) for number, pair in enumerate(pairs) if pair.get(side)]
        places, means = [place for place, _ in found], [interval["mean"] for _, interval in found]
        bars = np.hstack([error_bars(interval) for _, interval in found])
        errors = {"ecolor": INK, "capsize": 2.5, "elinewidth": 1}
        axis.bar(places, means, 0.38, yerr=bars, color=color, label=name, error_kw=errors)
        for place, interval in found if values else ():
            at = (place, max(interval["high"], interval["mean"]))
            text = f"{interval['mean']:.1%}"
            axis.annotate(text, at, xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9.5)
    axis.set_xticks(range(len(labels)), labels)
    room = max(0.6, (3 - len(labels)) / 2)  # a single bar is not to fill the picture
    axis.set_xlim(-room, len(labels) - 1 + room)
    axis.set_ylim(0, None if axis.get_ylim()[1] < 1 else 1.09)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _legend(axis: Axes) -> None:
    """Above the panel at the right, where no bar can be."""
    axis.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, borderpad=0.2)


def _grouped(report: Mapping[str, Any], path: Path, part: str, xlabel: str, prepare: Callable[[Any], Any]) -> bool:
    """One panel a split of `by_length` or `by_chapter`, the number of answers below each pair of bars."""
    splits = [split for split in report["splits"] if split[part]]
    if not splits:
        return False
    with picture(path, len(splits), size=(7, 0.6 + 2.5 * len(splits))) as axes:
        for axis, split in zip(axes, splits, strict=True):
            named = prepare(split[part])
            labels = [f"{name}\nn={pair['model']['count']:,}" for name, pair in named]
            _pair_of_bars(axis, labels, [pair for _, pair in named], values=False)
            axis.tick_params(axis="x", labelsize=8.5 if len(named) <= 10 else 7 if len(named) <= 16 else 6)
            axis.set(title=_title(split), ylabel="key accuracy" if split["with_keys"] else "ROUGE-L")
        axes[-1].set_xlabel(xlabel)
        _legend(axes[0])
    return True


def _by_length(report: Mapping[str, Any], path: Path) -> bool:
    def named(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
        return [(f"{g['from']}–{g['to'] - 1}" if g["to"] else f"{g['from']}+", g) for g in groups]

    return _grouped(report, path, "by_length", "length of the reference answer (characters)", named)


def _pooled(intervals: Sequence[Mapping[str, Any] | None]) -> dict[str, float] | None:
    """One interval of several over different questions: being independent, their half widths add in squares."""
    found = [(interval, interval["count"]) for interval in intervals if interval]
    total = sum(count for _, count in found)
    if not total:
        return None
    mean = sum(count * interval["mean"] for interval, count in found) / total
    below, above = (
        math.sqrt(sum((count * (interval[bound] - interval["mean"])) ** 2 for interval, count in found)) / total
        for bound in ("low", "high")
    )
    return {"mean": mean, "low": mean - below, "high": mean + above, "count": total}


def _chapters(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Chapters with what to call them; a book of many in groups of ten. A Chinese name gives way to its position."""
    if len(groups) <= _MOST_CHAPTERS:
        return [(shown_name(str(group["chapter"]), f"#{n}"), group) for n, group in enumerate(groups, 1)]
    tens: dict[int, list[Mapping[str, Any]]] = {}
    for position, group in enumerate(groups, 1):
        number = group["chapter"] if isinstance(group["chapter"], int) else position
        tens.setdefault((number - 1) // 10, []).append(group)
    return [
        (
            f"{10 * ten + 1}–{10 * ten + 10}",
            {side: _pooled([g.get(side) for g in ten_of]) for side in ("model", "baseline")},
        )
        for ten, ten_of in sorted(tens.items())
    ]


def _by_chapter(report: Mapping[str, Any], path: Path) -> bool:
    return _grouped(report, path, "by_chapter", "chapter", _chapters)


def _splits(report: Mapping[str, Any], path: Path) -> bool:
    names = {"key_accuracy": "key accuracy", "rouge_l": "ROUGE-L F over characters"}
    scores = [score for score in names if any(score in split["scores"] for split in report["splits"])]
    if not scores:
        return False
    with picture(path, len(scores), size=(7, 0.5 + 2.8 * len(scores))) as axes:
        for axis, score in zip(axes, scores, strict=True):
            splits = [split for split in report["splits"] if score in split["scores"]]
            pairs = [{"model": s["scores"][score], "baseline": (s["baseline"] or {}).get(score)} for s in splits]
            labels = [f"{s['name']}\nn={s['scores'][score]['count']:,}" for s in splits]
            _pair_of_bars(axis, labels, pairs, values=True)
            axis.set_title(names[score])
        _legend(axes[0])
    return True


def draw_all(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Draws every picture that the report has numbers for into `folder`.

    Returns:
        The names of the files written, in the order in which a reader takes them.
    """
    drawn = {
        "splits.png": _splits,
        "rouge_l.png": _rouge_l,
        "perplexity.png": _perplexity,
        "by_length.png": _by_length,
        "by_chapter.png": _by_chapter,
        "losses.png": _losses,
    }
    return [name for name, draw in drawn.items() if draw(report, folder / name)]
