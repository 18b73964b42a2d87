"""The loop: it learns, it resumes bit for bit, it stops when asked, it survives a bad batch."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miniglm import training
from miniglm.checkpoint import load_state, save_state
from miniglm.config import ModelConfig
from miniglm.dataset import Batch, Batches, TextRows
from miniglm.errors import MiniGLMError
from miniglm.model import GLM
from miniglm.optimizer import learning_rate_factor
from miniglm.training import Interrupted, Progress, Stage, TrainResult, seconds_between_saves, train

CONTEXT = 24


def model() -> GLM:
    # Dropout draws random numbers in each step: a resumed run must go on with the same ones.
    return GLM(ModelConfig(50, 32, 64, 2, 2, 1, 16, CONTEXT), dropout=0.1).initialize(1)


def batches() -> Batches:
    tokens = np.tile(np.arange(2, 50, dtype=np.uint16), 60)
    return Batches(TextRows(tokens, CONTEXT, [0, 1], seed=0), None, rows=4)


def stage(**changes: Any) -> Stage:
    return replace(Stage("pretrain", rows=4, steps=12, evaluate_every=4), **changes)


def run(folder: Path, made: GLM, how: Stage, source: Batches | None = None, **more: Any) -> TrainResult:
    def evaluate() -> dict[str, float]:
        loss, count = made.loss(*(lambda b: (b.ids, b.labels))(batches().batch(10_000)))
        return {"score": loss.item() / count}

    more = {"save_best": lambda scores: None} | more
    return train(made, source or batches(), how, folder, evaluate=evaluate, **more)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("muon", [True, False])
def test_it_learns_and_keeps_the_best(tmp_path: Path, muon: bool) -> None:
    made = model()
    best: list[dict[str, float]] = []
    result = run(tmp_path, made, stage(steps=60, evaluate_every=15, muon=muon), save_best=best.append)
    assert losses(tmp_path)[0] > 3.5 and losses(tmp_path)[-1] < 1.0
    assert result.best["score"] == min(scores["score"] for scores in best) == best[-1]["score"]


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("micro_rows", [4, 1])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, muon: bool, micro_rows: int) -> None:
    how = stage(muon=muon, micro_rows=micro_rows)
    whole = model()
    run(tmp_path / "whole", whole, how)

    def stop(progress: Progress) -> None:
        if progress.step == 6:  # between two validations
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tmp_path / "cut", model(), how, on_progress=stop)
    assert len(losses(tmp_path / "cut")) == 7  # the signal came within step 7's bookkeeping: that step is whole
    resumed = model()
    run(tmp_path / "cut", resumed, how)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_stop_when_a_validation_is_due_only_delays_it(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tmp_path, model(), stage(), on_progress=stop)  # after step 4, at which a validation is due
    run(tmp_path, model(), stage())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows if "validation" in row] == [5, 8, 12]


def test_how_often_is_validated_may_change(tmp_path: Path) -> None:
    run(tmp_path, model(), stage(steps=8, evaluate_every=2))
    state = tmp_path / "state.safetensors"
    tensors, meta = load_state(state)
    save_state(state, tensors, meta | {"finished": False})
    run(tmp_path, model(), stage(steps=16, evaluate_every=3))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows if "validation" in row] == [2, 4, 6, 8, 9, 12, 15, 16]


def test_a_killed_run_forgets_numbers_past_its_state(tmp_path: Path) -> None:
    run(tmp_path, model(), stage(steps=4))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 9.0, "elapsed": 1.0}\n{"step": 6, "lo')
    state = tmp_path / "state.safetensors"
    tensors, meta = load_state(state)
    save_state(state, tensors, meta | {"finished": False})
    run(tmp_path, model(), stage(steps=8))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()] == list(
        range(1, 9)
    )


def test_a_state_that_is_slow_to_save_is_saved_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [seconds_between_saves(cost) for cost in (0.01, 2.0, 4.0, 20.0, 100.0)] == [60, 60, 100, 500, 600]
    saved: list[int] = []

    def slow(path: Path, tensors: Any, meta: Any) -> None:
        saved.append(meta["step"])
        time.sleep(0.1)
        save_state(path, tensors, meta)

    monkeypatch.setattr("miniglm.distributed.engine.save_state", slow)
    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    run(tmp_path / "often", model(), stage(steps=6, evaluate_every=6))
    monkeypatch.setattr(training, "SAVE_SHARE", 1e9)
    often, saved = len(saved), []
    run(tmp_path / "always", model(), stage(steps=6, evaluate_every=6))
    assert saved == [0, 1, 2, 3, 4, 5, 6] and often == 2


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    one, four = model(), model()
    one.dropout = four.dropout = 0.0
    run(tmp_path / "1", one, stage(steps=5))
    run(tmp_path / "4", four, stage(steps=5, micro_rows=1))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=1e-3)


def test_minutes_end_a_stage_and_the_schedule_knows(tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = run(tmp_path, model(), stage(steps=None, minutes=0.02, evaluate_every=None), on_progress=seen.append)
    assert result.elapsed >= 1.2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert rows[-1]["lr_factor"] < 0.2 and max(row["lr_factor"] for row in rows) > 0.9
    assert seen[-1].fraction == 1.0
    assert 4 <= sum("validation" in row for row in rows) <= 9


def test_patience_stops(tmp_path: Path) -> None:
    how = stage(steps=200, evaluate_every=1, patience=3, matrix_lr=1e-9, adam_lr=1e-9, weight_decay=0.0)
    made = model()
    made.dropout = 0.0
    calls = iter([3.0, 2.0, 2.5, 2.5, 2.5, 1.0])
    result = train(made, batches(), how, tmp_path, evaluate=lambda: {"score": next(calls)}, save_best=lambda s: None)
    assert result.steps == 5 and result.stopped_early and result.best["score"] == 2.0


class Poisoned(Batches):
    """Labels that point outside of the vocabulary's meaning: a hidden state becomes NaN for some steps."""

    def __init__(self, model: GLM, steps: set[int]) -> None:
        super().__init__(batches().text, None, rows=4)
        self.model, self.steps = model, steps

    def batch(self, step: int, micro: int = 0, micros: int = 1) -> Batch:
        self.model.dropout = float("nan") if step in self.steps else 0.0
        return super().batch(step, micro, micros)


def test_a_bad_batch_is_skipped_and_logged_and_many_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.nn.functional as F

    plain = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p: x * float("nan") if p != p else plain(x, p))
    made = model()
    run(tmp_path / "one", made, stage(), source=Poisoned(made, {3}))
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert rows[3]["loss"] == "nan" and rows[3]["skipped_rows"] == [f"text:{i}" for i in range(12, 16)]
    assert all(torch.isfinite(t).all() for t in made.state_dict().values())
    made = model()
    with pytest.raises(MiniGLMError, match="不是有限数"):
        run(tmp_path / "many", made, stage(steps=30), source=Poisoned(made, set(range(5, 30))))
    assert all(torch.isfinite(t).all() for t in made.state_dict().values())


def test_the_schedule() -> None:
    factor = [learning_rate_factor(p / 100, warmup=0.1, decay=0.5, final=0.1) for p in range(101)]
    assert factor[5] == pytest.approx(0.5) and factor[10] == factor[50] == 1.0
    assert factor[75] == pytest.approx(0.55) and factor[100] == pytest.approx(0.1)
    assert factor[50:] == sorted(factor[50:], reverse=True)


def test_bfloat16_learns_as_float32_does(tmp_path: Path) -> None:
    one, other = model(), model()
    run(tmp_path / "float32", one, stage(steps=40))
    run(tmp_path / "bfloat16", other, stage(steps=40, precision="bfloat16"))
    assert all(p.dtype == torch.float32 for p in other.parameters())
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "float32")
    assert losses(tmp_path / "bfloat16")[-1] == pytest.approx(losses(tmp_path / "float32")[-1], abs=0.2)
    assert losses(tmp_path / "bfloat16")[-1] < 2.0
