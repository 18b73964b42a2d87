"""What every benchmark here shares: subjects measured in turn, medians of paired ratios, a table and a JSON file.

Others may use the machine too, so nothing is compared that was not measured in the same minute: each round measures
every subject once, and what is reported is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


def parser(doc: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="measurements of each subject")
    made.add_argument("--json", type=Path, help="where the figures go (default: benchmarks/results/NAME.json)")
    return made


def alternate(subjects: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each subject's figure in each round, after one round that only warms up."""
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(rounds + 1):
        for name, measure in subjects.items():
            figure = measure()
            if turn:
                found[name].append(figure)
        print(f"\r第 {turn}/{rounds} 轮", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def median_ratio(ours: Sequence[float], other: Sequence[float]) -> float:
    """Median over the rounds of ours / other."""
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def report(name: str, title: str, rows: Sequence[Mapping[str, Any]], given: argparse.Namespace, **facts: Any) -> None:
    """Prints the rows as a table, whose columns are the keys of the first, and writes them with the machine as JSON."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right")
    for row in rows:
        table.add_row(
            *(
                f"{v:,.3g}"
                if isinstance(v, float) and abs(v) < 1000
                else f"{v:,.0f}"
                if isinstance(v, float)
                else str(v)
                for v in row.values()
            )
        )
    Console().print(table)
    path = given.json or ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "machine": machine(), "rows": list(rows)} | facts
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
    print(path)
