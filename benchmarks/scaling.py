"""How much faster several processes train than one, each on a core of its own.

    python benchmarks/scaling.py [--processes 1 2] [--width 192 --layers 4] [--rows 8] [--steps 20]

The same global batch each time, through torchrun; one process is also measured with all cores as threads. Prints the
median and the shortest step, tokens a second and the speed-up over one process of one thread by the shortest, the
processor time that all processes together spend on a step (which other programs on the machine do not change much), and
the share of a step that passes in summing gradients and exchanging Muon's matrices (waiting for the slowest process
among it), and writes JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

CONTEXT, VOCABULARY = 256, 4096


def worker(given: argparse.Namespace) -> None:
    """One process's part; the first prints what was measured."""
    from miniglm.dataset import Batches, TextRows
    from miniglm.distributed import launch
    from miniglm.distributed.engine import DataParallel
    from miniglm.distributed.sharding import FullySharded, shard
    from miniglm.distributed.team import join, total
    from miniglm.model import GLM
    from miniglm.planning import _config
    from miniglm.training import Progress, Stage, train

    torch.set_num_threads(given.threads)
    join()
    waited = [0.0]

    def timed(name: str, kind: type) -> None:
        plain: Callable[..., Any] = getattr(kind, name)

        def call(self: Any, *arguments: Any) -> Any:
            computing = 0.0
            if name == "orthogonalize":  # what is computed in it is no exchange
                *others, compute = arguments

                def counted(matrices: torch.Tensor) -> Any:
                    nonlocal computing
                    started = time.monotonic()
                    found = compute(matrices)
                    computing += time.monotonic() - started
                    return found

                arguments = (*others, counted)
            begun = time.monotonic()
            found = plain(self, *arguments)
            waited[0] += time.monotonic() - begun - computing
            return found

        setattr(kind, name, call)

    for kind in (DataParallel, FullySharded):
        for name in ("sum_up", "orthogonalize"):
            if name in vars(kind):
                timed(name, kind)
    config = _config(given.width, given.layers, vocab_size=VOCABULARY, context=CONTEXT)
    model = GLM(config).initialize(1)
    if given.shard:
        model = shard(model, torch.device("cpu"))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 2_000_000).astype(np.uint16)
    batches = Batches(TextRows(tokens, CONTEXT, [0, 1], seed=0), None, given.rows)
    ends: list[float] = []
    worked: list[float] = []

    def note(progress: Progress) -> None:
        ends.append(progress.elapsed)
        worked.append(time.process_time())

    stage = Stage("pretrain", rows=given.rows, steps=given.steps, evaluate_every=given.steps)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(given.folder or own)
        train(
            model,
            batches,
            stage,
            folder,
            evaluate=lambda: {"score": 1.0},
            save_best=lambda scores: None,
            on_progress=note,
        )
    steps = [b - a for a, b in itertools.pairwise(ends[1:-1])]  # the first and the last do other things too
    processors = total((worked[-2] - worked[1]) / len(steps))
    if launch.is_first():
        found = {
            "parameters": config.num_parameters,
            "step_seconds": statistics.median(steps),
            "shortest_step_seconds": min(steps),
            "processor_seconds": processors,
            "tokens_per_second": given.rows * CONTEXT / min(steps),
            "exchange_share": waited[0] / ends[-1],
        }
        print(json.dumps(found))


def measure(given: argparse.Namespace, processes: int, threads: int, shard: bool) -> dict[str, Any]:
    """One setting, in processes of its own."""
    own = [__file__, "--worker", f"--threads={threads}", *(["--shard"] if shard else [])]
    own += [f"--{name}={getattr(given, name)}" for name in ("width", "layers", "rows", "steps")]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *launcher, *own, f"--folder={folder}"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"processes": processes, "threads": threads, "shard": shard} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/scaling.json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given)
        return
    settings = [(n, 1, False) for n in given.processes]
    settings += [(1, max(given.processes), False)] if max(given.processes) > 1 else []
    settings += [(n, 1, True) for n in given.processes if n > 1]
    rows = []
    print("processes  threads  sharded   step, s   shortest   tokens/s   speed-up   processors, s   exchange")
    for processes, threads, shard in settings:
        row = measure(given, processes, threads, shard)
        rows.append(row)
        print(
            f"{processes:9}  {threads:7}  {'yes' if shard else 'no':>7}  {row['step_seconds']:8.3f}  "
            f"{row['shortest_step_seconds']:9.3f}  {row['tokens_per_second']:9,.0f}  "
            f"{rows[0]['shortest_step_seconds'] / row['shortest_step_seconds']:9.2f}  "
            f"{row['processor_seconds']:14.3f}  {row['exchange_share']:9.1%}",
            flush=True,
        )
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
