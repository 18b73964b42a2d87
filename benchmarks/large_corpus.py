"""A corpus larger than memory through `prepare` and `tokenize`: how much memory that takes, over time.

    python benchmarks/large_corpus.py --gigabytes 10 --processes 2

makes that much text from the novel's sentences, no two documents alike, runs both verbs in a process of their own, and
draws the resident memory of all their processes. Prints a table and writes JSON and a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from miniglm.corpus import load_books
from miniglm.corpus.cleaning import sentences
from miniglm.corpus.large import read_shards

SENTENCES = 40
"""In a document."""
CHANGED = 8
"""Of them with a character exchanged for another, so that the same sentence does not come again and again."""
PART = 2**28
"""Bytes of a source file."""
RECIPE = """
[run]
minutes = "none"
[qa]
train = []
validation = []
[pretrain]
steps = 1
"""


def make_text(folder: Path, size: int, book: str, keep: Callable[[str], bool] = lambda sentence: True) -> None:
    """Writes `size` bytes of documents as .jsonl files, of the sentences that are to be kept."""
    found = [s for b in load_books([book]) for p in b.paragraphs for s in sentences(p.text) if keep(s)]
    characters = sorted(set("".join(found)))
    rng = random.Random(0)
    written = number = 0
    while written < size:
        path, filled = folder / f"{number:05d}.jsonl", 0
        with path.open("w", encoding="utf-8") as file:
            while filled < min(PART, size - written):
                chosen = rng.choices(found, k=SENTENCES)
                for i in range(CHANGED):
                    at = rng.randrange(len(chosen[i]))
                    chosen[i] = chosen[i][:at] + rng.choice(characters) + chosen[i][at + 1 :]
                line = json.dumps({"text": "".join(chosen)}, ensure_ascii=False)
                file.write(line + "\n")
                filled += len(line.encode()) + 1
        written, number = written + filled, number + 1


class Watch(threading.Thread):
    """The resident memory of a process and all below it, in MiB, twice a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.begun, self.curve = pid, time.monotonic(), list[tuple[float, float]]()

    def run(self) -> None:
        while psutil.pid_exists(self.pid):
            memory = 0.0
            try:
                own = psutil.Process(self.pid)
                for process in [own, *own.children(recursive=True)]:
                    memory += process.memory_info().rss / 2**20
            except psutil.NoSuchProcess:
                continue
            self.curve.append((round(time.monotonic() - self.begun, 1), round(memory, 1)))
            time.sleep(0.5)


def watched(*arguments: str | Path) -> tuple[list[tuple[float, float]], float, float]:
    """Runs a verb: memory over time, seconds, and seconds of processor time."""
    before = os.times()
    started = subprocess.Popen([sys.executable, "-m", "miniglm", *map(str, arguments)])
    watch = Watch(started.pid)
    watch.start()
    if started.wait() != 0:
        raise SystemExit(f"{arguments[0]} ended with {started.returncode}")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return watch.curve, time.monotonic() - watch.begun, used


def draw(curves: dict[str, list[tuple[float, float]]], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for name, curve in curves.items():
        axes.plot([t / 60 for t, _ in curve], [m for _, m in curve], label=name)
    axes.set(xlabel="minutes", ylabel="resident memory of all processes, MiB", ylim=(0, None), title=title)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of 10^9 bytes")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--book", default="sanguo")
    parser.add_argument("--work", type=Path, default=Path("runs/large-corpus"), help="removed at the end")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/large_corpus.json"))
    given = parser.parse_args()
    source, run = given.work / "source", given.work / "run"
    shutil.rmtree(given.work, ignore_errors=True)
    source.mkdir(parents=True)
    (given.work / "recipe.toml").write_text(RECIPE, "utf-8")
    make_text(source, int(given.gigabytes * 1e9), given.book)
    size = sum(file.stat().st_size for file in source.iterdir())
    common = ["--recipe", given.work / "recipe.toml", "--book", given.book, "--text", source, "--out", run]
    found: dict[str, Any] = {"bytes": size, "processes": given.processes}
    curves = {}
    for verb, more in (("prepare", []), ("tokenize", ["--processes", str(given.processes)])):
        curves[verb], seconds, used = watched(verb, *common, *more)
        found[verb] = {
            "seconds": round(seconds, 1),
            "processor_seconds": round(used, 1),
            "peak_mib": max(memory for _, memory in curves[verb]),
            "curve": curves[verb],
        }
        print(
            f"{verb:8} {seconds:8.1f} s  {used:8.1f} s of processors  {size / used / 1e6:6.1f} MB a second of one  "
            f"peak {found[verb]['peak_mib']:,.0f} MiB"
        )
    meta = json.loads((run / "tokens" / "meta.json").read_text("utf-8"))
    found |= {"shards": len(read_shards(run / "texts")), "tokens": meta["train_tokens"]}
    print(f"{size / 1e9:.2f} GB, {found['shards']} shards, {meta['train_tokens']:,} tokens")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found) + "\n", "utf-8")
    draw(curves, given.json.with_suffix(".png"), f"{size / 1e9:.2f} GB of text, {given.processes} processes")
    shutil.rmtree(given.work)


if __name__ == "__main__":
    main()
