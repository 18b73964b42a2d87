"""What size of model a time is best spent on: the measurements behind planning.PARAMETERS_PER_ROOT_FLOP.

    python benchmarks/size_rule.py time [--shapes 96x2 128x3 192x4] [--steps 10] [--rounds 2]
    python benchmarks/size_rule.py train [--shapes 128x3] [--seeds 1] [--seconds 197 240] [--pretrain-only]
    python benchmarks/size_rule.py table

`time` measures a step of either stage for each shape (width x layers) and needs the machine for itself, a minute or
two. `train` then trains each shape for as many steps as fit into the seconds by these times, so that it may run beside
other programs, and asks the validation and training questions without the book; the questions never taught stay out of
it. `table` prints what `train` found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import ROOT, parser, report

from miniglm.checkpoint import load_model
from miniglm.evaluation.evaluate import Settings
from miniglm.pipeline import Run, evaluate, finetune, make_plan, pretrain, text_bits, tokenize
from miniglm.recipe import load_recipe

TIMES, FOUND = (ROOT / "benchmarks" / "results" / name for name in ("size_rule_times.json", "size_rule.jsonl"))
STAGES = ("pretrain", "finetune")
RECIPE: dict[str, Any] = {"run.minutes": None}
"""What all runs have in common; the rest of the default recipe goes with it."""
TRAINING_SHARE = 0.93
"""Of a stage's time that its steps take; the rest goes into validations and saving (docs/how-minutes-work.md)."""


def prepared(folder: Path) -> Path:
    """A folder whose data stages are done, to copy from."""
    tokenize(Run(folder, load_recipe(None, RECIPE | {f"{name}.steps": 1 for name in STAGES})))
    return folder


def run_of(shape: str, steps: tuple[int, int], seed: int, source: Path, folder: Path, **more: Any) -> Run:
    """A run of a given shape and length on the data of `source`; `more` goes into both stages."""
    width, layers = map(int, shape.split("x"))
    sizes = {"model.hidden_size": width, "model.num_hidden_layers": layers}
    lengths = {f"{name}.steps": count for name, count in zip(STAGES, steps, strict=True)}
    stages = {f"{name}.{key}": value for name in STAGES for key, value in more.items()}
    run = Run(folder, load_recipe(None, RECIPE | {"run.seed": seed} | sizes | lengths | stages))
    for name in ("corpus", "qa", "tokenizer", "tokens"):
        if not (folder / name).exists():
            shutil.copytree(source / name, folder / name)
    return run


def step_seconds(run: Run) -> list[float]:
    """Of either stage: the median over its steps but the first two."""
    finetune(run)
    found = []
    for name in STAGES:
        lines = (run.path / name / "metrics.jsonl").read_text("utf-8").splitlines()
        ends = [json.loads(line)["elapsed"] for line in lines][1:-1]  # the last one's has the validation in it
        found.append(statistics.median(b - a for a, b in itertools.pairwise(ends)))
    return found


def measure_times(shapes: list[str], steps: int, rounds: int, source: Path, scratch: Path) -> None:
    """Writes `TIMES`: seconds of a step for each shape and stage, the best of the rounds."""
    found: dict[str, list[list[float]]] = {shape: [] for shape in shapes}
    for turn in range(rounds):
        for shape in shapes:
            run = run_of(shape, (steps, steps), 1, source, scratch / f"{shape}-{turn}", evaluate_every=1000)
            found[shape].append(step_seconds(run))
    known = json.loads(TIMES.read_text("utf-8")) if TIMES.exists() else {}
    known |= {shape: [min(each) for each in zip(*rows, strict=True)] for shape, rows in found.items()}
    TIMES.parent.mkdir(parents=True, exist_ok=True)
    TIMES.write_text(json.dumps(known, indent=2) + "\n", "utf-8")
    print(json.dumps(known, indent=2))


def train_shape(shape: str, seed: int, seconds: list[float], only: bool, source: Path, folder: Path) -> dict[str, Any]:
    """Bits a character of the text after either stage, and how many questions are answered without the book."""
    times = json.loads(TIMES.read_text("utf-8"))[shape]
    first, second = (round(s * TRAINING_SHARE / each) for s, each in zip(seconds, times, strict=True))
    run = run_of(shape, (first, second), seed, source, folder)
    pretrain(run)
    made = make_plan(run)
    model, tokenizer = load_model(folder / "pretrain" / "model")
    found: dict[str, Any] = {
        "shape": shape,
        "M weights": made.model.num_parameters / 1e6,
        "seed": seed,
        "seconds": "+".join(f"{s:.0f}" for s in seconds),
        "steps": f"{first}+{second}",
        "bits/char, text": text_bits(run, model, tokenizer, made),
    }
    if only:
        return found | dict.fromkeys(("after questions", "validation %", "training %", "answers' bits/char"), "")
    finetune(run)
    got = evaluate(folder, splits=["validation", "train"], settings=Settings(limit=1587))
    parts = {part["name"]: part["scores"] for part in got["splits"]}
    return found | {
        "after questions": got["text"]["bits_per_character"]["mean"],
        "validation %": 100 * parts["validation"]["key_accuracy"]["mean"],
        "training %": 100 * parts["train"]["key_accuracy"]["mean"],
        "answers' bits/char": parts["validation"]["bits_per_character"]["mean"],
    }


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__, rounds=2)
    options.add_argument("what", choices=("time", "train", "table"))
    options.add_argument("--shapes", nargs="+", default=["96x2", "128x3", "192x4"])
    options.add_argument("--steps", type=int, default=10, help="of a measurement")
    options.add_argument("--seeds", type=int, nargs="+", default=[1])
    options.add_argument("--seconds", type=float, nargs=2, default=[197.0, 240.0], help="of either stage")
    options.add_argument("--pretrain-only", action="store_true")
    options.add_argument("--data", type=Path, help="a folder with the data stages done; made if it is not there")
    options.add_argument(
        "--runs", type=Path, help="keep the runs there: what was stopped goes on with the same command"
    )
    given = options.parse_args()
    if given.what == "table":
        rows = [json.loads(line) for line in FOUND.read_text("utf-8").splitlines()]
        report("size_rule_table", "Size of the model, by time", rows, given, times=json.loads(TIMES.read_text("utf-8")))
        return
    with tempfile.TemporaryDirectory() as name:
        scratch = given.runs or Path(name)
        source = prepared(given.data or scratch / "data")
        if given.what == "time":
            measure_times(given.shapes, given.steps, given.rounds, source, scratch)
            return
        for seed in given.seeds:
            for shape in given.shapes:
                folder = scratch / f"{shape}-{seed}"
                found = train_shape(shape, seed, given.seconds, given.pretrain_only, source, folder)
                print(json.dumps(found), flush=True)
                with FOUND.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
