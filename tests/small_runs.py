"""Small runs that tests of several processes compare: the same whatever the number of processes, but for the order of
sums."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from miniglm.config import ModelConfig
from miniglm.dataset import Batches, PairRows, Pairs, TextRows
from miniglm.distributed import launch
from miniglm.distributed.choice import whole_weights
from miniglm.distributed.team import share, total
from miniglm.model import GLM
from miniglm.training import Interrupted, Progress, Stage, TrainResult, train

CONTEXT = 24
LOSS = 2e-5
"""How far the losses of twelve steps may be apart: float32 rounds to 6e-8, and each step builds on the one before."""
UNDECIDED = "k_proj.bias"
"""What is added to all keys alike changes no attention, up to rotation: the gradient is rounding, and AdamW makes steps
of full length of it."""


def near(expected: Any) -> Any:
    """What losses may be that are the same but for rounding."""
    return pytest.approx(expected, rel=LOSS)


def model() -> GLM:
    return GLM(ModelConfig(50, 32, 64, 2, 2, 1, 16, CONTEXT)).initialize(1)


def batches(rows: int = 6) -> Batches:
    """Text and pairs of many lengths, so that processes have different numbers of targets."""
    tokens = np.tile(np.arange(2, 50, dtype=np.uint16), 60)
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, CONTEXT, 40)
    ids = rng.integers(2, 50, lengths.sum()).astype(np.uint32)
    targets = np.concatenate([np.arange(n) >= n // 2 for n in lengths]).astype(np.uint8)
    pairs = Pairs(ids, targets, np.cumsum([0, *lengths]))
    text = TextRows(tokens, CONTEXT, [0, 1], seed=0)
    return Batches(text, PairRows(pairs, CONTEXT, seed=1, pad_id=0), rows, text_share=0.5)


def stage(**changes: Any) -> Stage:
    return replace(Stage("pretrain", rows=6, steps=12, evaluate_every=4), **changes)


def run(folder: Path, how: Stage, source: Batches | None = None, made: GLM | None = None, **more: Any) -> TrainResult:
    """A run like any other's; the weights it ends with lie beside it, of each process its own."""
    made = made or model()
    source = source or batches(how.rows)

    def evaluate() -> dict[str, float]:
        parts = [source.batch(10_000, micro, 3) for micro in range(3)]
        losses = [made.loss(b.ids, b.labels, positions=b.positions, mask=b.mask) for b in share(parts)]
        return {"score": total(sum(float(loss) for loss, _ in losses)) / sum(b.targets for b in parts)}

    result = train(made, source, how, folder, evaluate=evaluate, save_best=lambda scores: None, **more)
    weights = {n: t.clone() for n, t in whole_weights(made).items() if n != "lm_head.weight"}
    if weights:
        save_file(weights, folder / f"weights{launch.rank()}.safetensors")
    return result


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def same_run(folder: Path, other: Path) -> None:
    assert losses(folder) == near(losses(other))
    assert [r.get("validation") for r in rows(folder)] == [
        None if r.get("validation") is None else near(r["validation"]) for r in rows(other)
    ]
    theirs = load_file(other / "weights0.safetensors")
    own = [load_file(path) for path in sorted(folder.glob("weights*.safetensors"))]
    for name, tensor in own[0].items():
        if not name.endswith(UNDECIDED):
            torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-4)
        assert all(torch.equal(tensor, process[name]) for process in own)  # one model, bit for bit, in all processes


def stopped(folder: Path, who: int, made: GLM | None = None) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 5 and launch.rank() == who:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        run(folder, stage(), made=made, on_progress=stop)
    assert caught.value.signal == signal.SIGTERM


def same_result(out: Path, other: Path) -> None:
    for name in ("pretrain", "finetune"):
        assert losses(out / name) == near(losses(other / name))
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (out, other))
    for name, tensor in ours.items():
        if not name.endswith(UNDECIDED):
            torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-4)
    assert not [path for path in out.rglob("*") if path.name.startswith(".miniglm-tmp-")]


def reached(path: Path, step: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= step
