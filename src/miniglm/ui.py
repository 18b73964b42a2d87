"""What the long steps show: lines, progress bars with the time left, and the curves of their losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from miniglm.distributed import launch

if TYPE_CHECKING:  # a line on the screen needs no torch
    from miniglm.training import Progress as TrainingProgress

console = Console(stderr=True, highlight=False, quiet=not launch.is_first())
"""Everything that is not a result goes to stderr, so that results can be piped. Of processes that train together, one
speaks."""


def say(text: str) -> None:
    """One line about what is going on."""
    console.print(text, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as a reader takes them in: 45 秒, 3 分 05 秒, 2 小时 10 分."""
    if seconds == float("inf"):
        return "未知"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} 秒"
    if whole < 3600:
        return f"{whole // 60} 分 {whole % 60:02d} 秒"
    return f"{whole // 3600} 小时 {whole % 3600 // 60:02d} 分"


@contextmanager
def download_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar for bytes; gives the callback (done, total or None)."""
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:  # nothing to see where the cache has it
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def count_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for `total` things; gives the callback (done)."""
    with Progress(
        TextColumn(name),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def described_bar(total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar for `total` things with a text that changes; gives the callback (done, text). Where there is no terminal,
    a line at every tenth instead."""
    if not console.is_terminal:
        said = 0

        def line(done: int, text: str) -> None:
            nonlocal said
            if done * 10 // max(1, total) > said or done == total:
                said = done * 10 // max(1, total)
                say(f"{done}/{total} · {text}")

        yield line
        return
    columns = (BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total} · {task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=text)


@contextmanager
def training_bar(name: str, characters_per_token: float) -> Iterator[Callable[[TrainingProgress], None]]:
    """The line of a training stage; where there is no terminal, a line at each validation instead."""
    last_scores: dict[str, float] = {}

    def describe(p: TrainingProgress) -> str:
        score = f"{p.scores['score']:.3f}" if p.scores else "—"
        speed = p.tokens_per_second * characters_per_token
        return (
            f"{name} 第 {p.step} 步 · 损失 {p.loss:.3f} · 验证 {score} 比特/字"
            f" · {speed:,.0f} 字/秒 · 剩余 {duration(p.seconds_left)}"
        )

    if not console.is_terminal:

        def line(p: TrainingProgress) -> None:
            nonlocal last_scores
            if p.scores != last_scores:
                last_scores = p.scores
                say(describe(p))

        yield line
        return
    with Progress(TextColumn("{task.description}"), BarColumn(bar_width=20), console=console) as bar:
        task = bar.add_task(name, total=1.0)
        yield lambda p: bar.update(task, completed=p.fraction, description=describe(p))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or none where there is no such file; a damaged line is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and {"step", "elapsed", "loss"} <= row.keys():
                rows.append(row)
    return rows


def stage_curves(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Of both stages, (minutes, training loss in nats a token) and, as `STAGE_validation`, (minutes, bits a
    character); empty lists where nothing was trained."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name in ("pretrain", "finetune"):
        rows = read_metrics(run / name / "metrics.jsonl")
        curves[name] = [(r["elapsed"] / 60, r["loss"]) for r in rows if isinstance(r["loss"], float)]
        curves[f"{name}_validation"] = [
            (r["elapsed"] / 60, r["validation"]["score"]) for r in rows if "validation" in r
        ]
    return curves
