"""What each stage costs as the corpus grows, and a training step as the context grows: a table and a picture.

    python benchmarks/growth.py [--megabytes 1 10 100 1000] [--through texts] [--contexts 256 512 1024 2048 4096]

The corpus is the novel's paragraphs in random order, each with its number, so that none is a duplicate: a book of that
size, or, through `texts`, text beside the novel (corpus/large.py), as is meant for a large corpus. Every size runs in a
process of its own, for its peak of memory. Training is measured by the step, which must not depend on the corpus.
Seconds are the processor's, of all threads, so that other programs on the machine matter little. Of sizes or contexts
that are not asked for, the picture has those that were measured last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import ROOT, parser, report
from tokenizing import novel

DOCUMENT = 20
"""Paragraphs of a document."""


def peak() -> float:
    """The largest resident size so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_corpus_of(book: str, megabytes: float, path: Path) -> None:
    """A text file of so many MB, an empty line after every `DOCUMENT` paragraphs."""
    paragraphs, rng, left, number = novel(book), random.Random(0), megabytes * 1e6, 0
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            number += 1
            line = f"{rng.choice(paragraphs)}（{number}）\n" + "\n" * (number % DOCUMENT == 0)
            left -= len(line.encode())
            file.write(line)


def corpus_size(book: str, megabytes: float, through: str) -> dict[str, Any]:
    """Seconds and memory of each stage for one size, in this process."""
    from miniglm.pipeline import Run, prepare, pretrain, tokenize
    from miniglm.recipe import load_recipe

    found: dict[str, Any] = {"MB": megabytes}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "书.txt"
        write_corpus_of(book, megabytes, path)
        texts = {"corpus.books": [book], "corpus.texts": [str(path)]}
        overrides = {
            **(texts if through == "texts" else {"corpus.books": [str(path)]}),
            **{"qa.train": [], "qa.validation": [], "run.minutes": None},
            **{"tokenizer.vocab_size": 4096, "model.hidden_size": 128, "model.num_hidden_layers": 2},
            **{"pretrain.steps": 20, "pretrain.evaluate_every": 1000, "finetune.steps": 1},
        }
        run = Run(Path(scratch) / "run", load_recipe(None, overrides))
        for name, stage in (
            ("prepare", prepare),
            ("tokenize", partial(tokenize, processes=1)),  # in this process, where its memory is seen
            ("pretrain", pretrain),
        ):
            begun = time.process_time()
            stage(run)
            found |= {f"{name} s": time.process_time() - begun, f"{name} MiB": peak()}
    return found


def context_size(context: int, rounds: int) -> dict[str, Any]:
    """Seconds and memory of a step of 4,096 tokens in rows of `context`, default model."""
    from dataclasses import replace

    from training_speed import MODELS, our_step

    from miniglm.training import keep_allocations

    keep_allocations()
    config = replace(MODELS["default"], max_position_embeddings=context)
    ids = torch.randint(2, config.vocab_size, (4096 // context, context))
    step = our_step(config, ids, ids.roll(-1, 1), "float32", muon=True)
    step()
    begun = time.process_time()
    for _ in range(rounds):
        step()
    return {"context": context, "step s": (time.process_time() - begun) / rounds, "MiB": peak()}


def draw(sizes: list[dict[str, Any]], contexts: list[dict[str, Any]], path: Path) -> None:
    """Both tables as curves."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name in ("prepare", "tokenize", "pretrain"):
        left.loglog([r["MB"] for r in sizes], [r[f"{name} s"] for r in sizes], "o-", label=f"{name} s")
    left.loglog([r["MB"] for r in sizes], [r["pretrain MiB"] for r in sizes], "s--", label="peak MiB")
    left.set_xlabel("corpus, MB")
    right.loglog([r["context"] for r in contexts], [r["step s"] for r in contexts], "o-", label="step s")
    right.loglog([r["context"] for r in contexts], [r["MiB"] for r in contexts], "s--", label="peak MiB")
    right.set_xlabel("context, tokens")
    for axes, values in ((left, [r["MB"] for r in sizes]), (right, [r["context"] for r in contexts])):
        axes.set_xticks(values, [f"{value:,.0f}" for value in values])
        axes.minorticks_off()
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def last(name: str) -> list[dict[str, Any]]:
    """The rows that a benchmark wrote when it last ran."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__, rounds=3)
    options.add_argument("--megabytes", type=float, nargs="*", default=[1, 10, 100, 1000])
    options.add_argument("--contexts", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096])
    options.add_argument("--book", default="sanguo")
    options.add_argument(
        "--through", choices=("books", "texts"), default="texts", help="what the grown text is to the run"
    )
    options.add_argument("--alone", choices=("corpus", "context"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.alone == "corpus":
        print(json.dumps(corpus_size(given.book, given.megabytes[0], given.through)))
        return
    if given.alone == "context":
        print(json.dumps(context_size(given.contexts[0], given.rounds)))
        return

    def alone(kind: str, option: str, value: float) -> dict[str, Any]:
        settings = ["--alone", kind, option, str(value), "--book", given.book, "--rounds", str(given.rounds)]
        command = [sys.executable, __file__, *settings, "--through", given.through]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ)
        result: dict[str, Any] = json.loads(done.stdout)
        print(result, file=sys.stderr, flush=True)
        return result

    sizes = [alone("corpus", "--megabytes", value) for value in given.megabytes]
    contexts = [alone("context", "--contexts", value) for value in given.contexts]
    if sizes:
        report(f"growth_{given.through}", f"Growth of the corpus, as {given.through}", sizes, given)
    if contexts:
        report("growth_context", "Growth of the context, 4,096 tokens a step", contexts, given)
    picture = (given.json or ROOT / "benchmarks" / "results" / "growth.json").with_suffix(".png")
    draw(sizes or last(f"growth_{given.through}"), contexts or last("growth_context"), picture)
    print(picture)


if __name__ == "__main__":
    main()
