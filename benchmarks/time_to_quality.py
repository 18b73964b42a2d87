"""Time from nothing to a quality: 9.2, 7.0 and 6.0 bits a character on the validation part of 三国演义.

    python benchmarks/time_to_quality.py [--seeds 1 2 3] [--minutes 0.05 0.8 2.7] [--baseline-minutes 10] [--log]
    python benchmarks/time_to_quality.py --steps 800 --shape 128x3 --step-seconds 0.2 --before 6 ...
    python benchmarks/time_to_quality.py --baseline-step-seconds 0.5 [--used-tokens-only] ...

Ours is the command line's own way (corpus, tokenizer, plan, pretraining, with validations and saving), once for each
goal with a schedule of so many minutes, since a schedule that ends later is behind one that ends now. The clock runs from
the start of each run. The baseline is the reference's way (reference_model.py), its tokenizing on the clock too but not
its search for a stand-in vocabulary. `--log` adds a row to benchmarks/speedrun.md.

Where other programs disturb the clock, steps are counted instead, at so many seconds each as measured on the quiet
machine: ours with their share of validations and saving, the baseline's without any. With `--used-tokens-only` the
baseline's softmax is over the tokens that the text has, not over GPT-2's 50,304: the same model for a fifth of the
processor time, spared learning which tokens never come, so it is sooner in steps than the real one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reference_model import VOCABULARY, ReferenceModel, Sizes, learning_rate, random_windows, reference_tokenizer
from side_by_side import ROOT, machine, parser, report

from miniglm.corpus import read_paragraphs
from miniglm.pipeline import Run, prepare, pretrain
from miniglm.recipe import load_recipe

GOALS = (9.2, 7.0, 6.0)
LOG = ROOT / "benchmarks" / "speedrun.md"


@dataclass(frozen=True, slots=True)
class Paced:
    """A run of `steps` whose time is counted: `before` seconds, then `step_seconds` for each; `shape` is width x layers,
    since the speed measured beside other programs must not choose it."""

    steps: int
    shape: str
    step_seconds: float
    before: float


def our_run(folder: Path, minutes: float, seed: int, book: str, paced: Paced | None = None) -> dict[str, Any]:
    """When each goal was reached, in seconds from the start; what was not reached is left out."""
    overrides = {"run.minutes": minutes, "run.seed": seed, "corpus.books": [book], "qa.train": [], "qa.validation": []}
    if paced is not None:
        width, layers = map(int, paced.shape.split("x"))
        sizes = {"model.hidden_size": width, "model.num_hidden_layers": layers}
        overrides |= sizes | {"pretrain.steps": paced.steps}
    recipe = load_recipe(None, overrides)
    begun = time.perf_counter()
    run = Run(folder, recipe)
    pretrain(run, seconds=60 * minutes)
    whole = time.perf_counter() - begun
    rows = [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text("utf-8").splitlines()]
    before = whole - rows[-1]["elapsed"] if paced is None else paced.before
    reached: dict[str, Any] = {"final": min(r["validation"]["score"] for r in rows if "validation" in r)}
    for goal in GOALS:
        hits = [r for r in rows if "validation" in r and r["validation"]["score"] <= goal]
        if hits:
            took = hits[0]["elapsed"] if paced is None else hits[0]["step"] * paced.step_seconds
            reached[str(goal)] = before + took
    return reached | {"before": before, "steps": rows[-1]["step"], "seconds": whole}


@torch.no_grad()
def reference_bits(model: ReferenceModel, tokens: NDArray[Any], characters: int, rows: int = 32) -> float:
    """Bits a character over at most 200 windows, one beside the other, without dropout."""
    model.eval()
    size = model.sizes.context
    starts = np.linspace(0, len(tokens) - size - 1, min(200, (len(tokens) - 1) // size)).astype(int)
    nats = []
    for first in range(0, len(starts), rows):
        windows = np.stack([tokens[s : s + size + 1] for s in starts[first : first + rows]]).astype(np.int64)
        both = torch.from_numpy(windows)
        nats.append(model.loss(both[:, :-1], both[:, 1:]).item() * len(windows))
    model.train()
    return sum(nats) / len(starts) * len(tokens) / characters / math.log(2)


def reference_run(
    texts: dict[str, str],
    sizes: Sizes,
    minutes: float,
    seed: int,
    *,
    every: int = 50,
    step_seconds: float | None = None,
    used_only: bool = False,
) -> dict[str, Any]:
    """The same for the reference's way, until the last goal or so many minutes.

    Args:
        every: steps from one validation to the next.
        step_seconds: count these for a step in place of the clock.
        used_only: the softmax is over the tokens of the texts alone.
    """
    tokenizer, which = reference_tokenizer(texts["train"])
    begun = time.perf_counter()
    train, validation = (np.asarray(tokenizer.encode(texts[part])) for part in ("train", "validation"))
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vocabulary = int(max(train.max(), validation.max())) + 1 if used_only else VOCABULARY
    model = ReferenceModel(sizes, vocabulary)
    optimizer = model.optimizer()
    reached: dict[str, Any] = {"tokenizer": which, "sizes": asdict(sizes), "vocabulary": vocabulary}
    steps, step, encoded = 2000, 0, time.perf_counter() - begun

    def clock() -> float:
        return time.perf_counter() - begun if step_seconds is None else encoded + step * step_seconds

    while clock() < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(sizes, step, steps)
        ids, targets = random_windows(train, sizes, rng)
        model.loss(ids, targets).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % every == 0:
            bits = reference_bits(model, validation, len(texts["validation"]))
            for goal in GOALS:
                if bits <= goal:
                    reached.setdefault(str(goal), clock())
            reached["final"] = bits
            if bits <= min(GOALS):
                break
    return reached | {"seconds": clock(), "steps": step}


def log(times: list[float]) -> None:
    """Adds a row to the record table."""
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h %s"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    facts = machine()
    row = (
        facts["date"].split()[0],
        commit.stdout.strip().replace("|", "/"),
        f"{facts['cpu']}, {facts['threads']} threads, {facts['instructions']}",
        " / ".join(f"{t:.0f} s" for t in times),
        f"{statistics.median(times):.0f} s",
    )
    with LOG.open("a", encoding="utf-8") as file:
        file.write("| " + " | ".join(row) + " |\n")


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--minutes", type=float, nargs="+", default=[0.05, 0.8, 2.7], help="schedule for each goal")
    options.add_argument("--steps", type=int, help="of one run a seed, in place of --minutes; needs the next three")
    options.add_argument("--shape", default="128x3", help="width x layers of a run of --steps")
    options.add_argument("--step-seconds", type=float, help="counted for each step of it")
    options.add_argument("--before", type=float, help="seconds of corpus and tokenizer, counted once")
    options.add_argument("--book", default="sanguo")
    options.add_argument("--baseline-minutes", type=float, default=10.0, help="0: without the baseline")
    options.add_argument("--baseline-step-seconds", type=float, help="counted for each of its steps")
    options.add_argument("--baseline-size", type=json.loads, default={}, help='e.g. {"width": 256, "rows": 32}')
    options.add_argument("--used-tokens-only", action="store_true", help="see above")
    options.add_argument("--log", action="store_true")
    given = options.parse_args()
    paced = None
    if given.steps is not None:
        if given.step_seconds is None or given.before is None:
            options.error("--steps needs --step-seconds and --before")
        paced = Paced(given.steps, given.shape, given.step_seconds, given.before)
    ours: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in given.seeds:
            for number, minutes in enumerate(given.minutes[:1] if paced else given.minutes):
                found = our_run(Path(scratch) / f"{seed}-{number}", minutes, seed, given.book, paced)
                ours.append({"seed": seed, "minutes": minutes} | found)
        run = Run(Path(scratch) / f"{given.seeds[0]}-0")
        prepare(run)
        corpus = Run(Path(scratch) / f"{given.seeds[0]}-0").path / "corpus"
        texts = {
            part: "\n".join(p.text for p in read_paragraphs(corpus / f"{part}.jsonl"))
            for part in ("train", "validation")
        }
        baseline = {}
        if given.baseline_minutes:
            baseline = reference_run(
                texts,
                replace(Sizes(), **given.baseline_size),
                given.baseline_minutes,
                given.seeds[0],
                step_seconds=given.baseline_step_seconds,
                used_only=given.used_tokens_only,
            )
    rows = []
    for goal in map(str, GOALS):
        best = [
            min((r[goal] for r in ours if r["seed"] == seed and goal in r), default=math.inf) for seed in given.seeds
        ]
        median, other = statistics.median(best), baseline.get(goal, math.inf)
        rows.append(
            {
                "bits a character": goal,
                "miniGLM s": median,
                "the reference's way s": other,
                "sooner": other / median if math.isfinite(other) and math.isfinite(median) else math.nan,
            }
        )
        if given.log and goal == str(GOALS[-1]):
            log(best)
    report("time_to_quality", "From nothing, tokenizer included", rows, given, ours=ours, baseline=baseline)


if __name__ == "__main__":
    main()
