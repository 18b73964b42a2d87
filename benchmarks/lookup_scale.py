"""Look-up in a text much larger than a novel: what building the index and asking cost, and what is still found.

    python benchmarks/lookup_scale.py RUN --megabytes 20,100,1000     # a run folder with an index, of the default set

Around the novel it lays that much text of the novel's own sentences in random order, a fifth of them changed, but none
that answers a question of unseen.jsonl; so the answers are only where they were, among many times as many passages
about the same people. The encoder, the facts and the choice are those of RUN: only what grows is measured. Building
and asking are processes of their own, on one core. Prints a table and writes benchmarks/results/lookup_scale.json.
Milliseconds are of processor time, and by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from large_corpus import make_text

from miniglm.corpus import large
from miniglm.lookup.answer import Answerer
from miniglm.lookup.encoder import Encoder
from miniglm.lookup.library import Library, build_library, parts_of
from miniglm.lookup.measure import shows_evidence
from miniglm.lookup.texts import text_parts
from miniglm.pipeline import Run, paragraphs_of
from miniglm.qa.formats import Example, read_examples
from miniglm.qa.text import bare

UNSEEN = Path(__file__).parent.parent / "data" / "sanguo" / "unseen.jsonl"


def make(work: Path, megabytes: float, book: str, examples: list[Example]) -> None:
    """The text as `--text` would have it: WORK/texts."""
    told = [bare(str(e.extra["evidence"])) for e in examples]
    (work / "source").mkdir(parents=True)

    def keep(sentence: str) -> bool:
        own = bare(sentence)
        return not any(own in evidence or evidence in own for evidence in told)

    make_text(work / "source", int(megabytes * 1e6), book, keep)
    large.write_shards([str(work / "source")], work / "texts")
    shutil.rmtree(work / "source")


def build(run: Path, work: Path, megabytes: float) -> dict[str, Any]:
    """WORK/index: the run's, with the text beside the novel."""
    for name in ("encoder", "facts"):
        shutil.copytree(run / "index" / name, work / "index" / name)
    for name in ("judge.json", "index.json"):
        shutil.copy(run / "index" / name, work / "index" / name)
    begun, used = time.perf_counter(), time.process_time()
    parts = parts_of(paragraphs_of(Run(run)))
    parts += text_parts(work / "texts") if megabytes else []
    build_library(parts, Encoder.load(work / "index" / "encoder"), "", work / "index" / "books")
    files = [path for path in (work / "index" / "books").rglob("*") if path.is_file()]
    return {
        "build_seconds": time.perf_counter() - begun,
        "build_processor_seconds": time.process_time() - used,
        "build_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "passages": Library(work / "index" / "books").size,
        "index_bytes": sum(path.stat().st_size for path in files),
    }


def ask(work: Path, examples: list[Example]) -> dict[str, Any]:
    """How long the questions take, each asked for the first time, and whether the evidence is shown."""
    answerer = Answerer(work / "index")
    for e in examples[:5]:  # what torch and the files' first pages take to begin
        answerer.answer(f"请问{e.question}")
    used, clock, shown = [], [], []
    for e in examples:
        begun, before = time.perf_counter(), time.process_time()
        answer = answerer.answer(e.question)
        used.append(1e3 * (time.process_time() - before))
        clock.append(1e3 * (time.perf_counter() - begun))
        shown.append(shows_evidence(answer, str(e.extra["evidence"])))
    return {
        "lookup_ms": float(np.median(used)),
        "lookup_ms_95": float(np.quantile(used, 0.95)),
        "clock_ms": float(np.median(clock)),
        "clock_ms_95": float(np.quantile(clock, 0.95)),
        "evidence_in_5": float(np.mean(shown)),
        "shown": shown,
        "ask_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def stage(name: str, given: argparse.Namespace, megabytes: float, work: Path) -> dict[str, Any]:
    """Does one of them in a process of its own."""
    command = [sys.executable, __file__, str(given.run), "--megabytes", str(megabytes), "--work", str(work)]
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--stage", name], check=True, stdout=subprocess.PIPE, text=True, env=one_core)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--megabytes", default="20,100")
    parser.add_argument("--book", default="sanguo")
    parser.add_argument("--work", type=Path, default=Path("runs/lookup-scale"), help="removed at the end")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/lookup_scale.json"))
    parser.add_argument("--stage", choices=("build", "ask"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    examples = read_examples(UNSEEN).examples
    if given.stage:
        torch.set_num_threads(1)
        size = float(given.megabytes)
        print(json.dumps(build(given.run, given.work, size) if given.stage == "build" else ask(given.work, examples)))
        return
    rows: list[dict[str, Any]] = []
    for megabytes in [0.0, *map(float, given.megabytes.split(","))]:
        shutil.rmtree(given.work, ignore_errors=True)
        (given.work / "index").mkdir(parents=True)
        if megabytes:
            make(given.work, megabytes, given.book, examples)
        rows.append({"megabytes": megabytes, **stage("build", given, megabytes, given.work)})
        rows[-1] |= stage("ask", given, megabytes, given.work)
        row, before = rows[-1], rows[0]["shown"]
        kept = [now for now, then in zip(row["shown"], before, strict=True) if then]
        row["kept_of_novel_alone"] = float(np.mean(kept))
        print(
            f"{megabytes:6,.0f} MB more  {row['passages']:9,} passages  built in {row['build_seconds']:6.1f} s "
            f"({row['build_processor_seconds']:.1f} s of the processor, peak {row['build_peak_mib']:,.0f} MiB)  "
            f"{row['index_bytes'] / 1e6:7,.1f} MB on disk  look-up {row['lookup_ms']:.1f} ms, 95 % under "
            f"{row['lookup_ms_95']:.1f} (by the clock {row['clock_ms']:.1f}, {row['clock_ms_95']:.1f}; peak "
            f"{row['ask_peak_mib']:,.0f} MiB)  evidence in five {row['evidence_in_5']:.3f}, of those found in the novel "
            f"alone {row['kept_of_novel_alone']:.3f}",
            flush=True,
        )
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(rows) + "\n", "utf-8")
    shutil.rmtree(given.work)


if __name__ == "__main__":
    main()
