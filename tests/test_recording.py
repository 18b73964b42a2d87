"""Recorded steps: what they need of the model holds on a CPU; the recordings themselves are tried where there is a GPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import batches, losses, model, stage
from torch import Tensor

from miniglm import training
from miniglm.distributed.engine import OneProcess
from miniglm.kernels import losses_and_gradient
from miniglm.model import GLM, IGNORE, Compiled, DecoderLayer
from miniglm.optimizer import Muon
from miniglm.recording import Recorded
from miniglm.training import Interrupted, Progress, Stage, train

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def whole(made: GLM) -> GLM:
    """With weights everywhere: fresh layers are the identity, and much would have no gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * 0.05)
    return made.train()


def gradients(made: GLM, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(made.parameters())))


@pytest.mark.parametrize("missing", [0.0, 0.4, 0.9])
def test_a_loss_with_room_is_the_loss(missing: float) -> None:
    made, batch = whole(model()), batches(6).batch(0)
    labels = batch.labels.clone()
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < missing] = IGNORE
    plain, count = made.loss(batch.ids, labels, positions=batch.positions, mask=batch.mask)
    for room in (count, count + 7, labels.numel()):
        found = made.loss_of_at_most(
            min(room, labels.numel()), batch.ids, labels, positions=batch.positions, mask=batch.mask
        )
        torch.testing.assert_close(found, plain, atol=1e-3, rtol=1e-5)
        for mine, other in zip(gradients(made, found), gradients(made, plain), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)
        plain, _ = made.loss(batch.ids, labels, positions=batch.positions, mask=batch.mask)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_layers_have_the_same_gradients_and_are_compiled_once(packed: bool) -> None:
    made, batch = whole(model()), batches(6).batch(0)
    given: dict[str, Any] = {"positions": batch.positions, "mask": batch.mask} if packed else {}
    room = batch.labels.numel()
    plain = made.loss_of_at_most(room, batch.ids, batch.labels, **given)
    expected, compiled = gradients(made, plain), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    made.compiled = Compiled(
        torch.compile(DecoderLayer.forward, fullgraph=True, dynamic=False, backend=backend), losses_and_gradient
    )
    found = made.loss_of_at_most(room, batch.ids, batch.labels, **given)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-5)
    for mine, other in zip(gradients(made, found), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)
    assert len(made.model.layers) > 1 and len(compiled) == 1


def test_muon_with_a_rate_that_lies_in_a_tensor() -> None:
    def moved(lr: float | Tensor) -> Tensor:
        weight = torch.nn.Parameter(torch.ones(4, 6))
        weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
        Muon([weight], lr=lr, weight_decay=0.1).step()
        return weight.detach()

    torch.testing.assert_close(moved(torch.tensor(0.3)), moved(0.3))


def test_a_batch_drawn_ahead_is_the_batch() -> None:
    ahead, plain = batches(6), batches(6)
    ahead.prepare(1)
    for step in (0, 1, 2, 1):
        assert torch.equal(ahead.batch(step).ids, plain.batch(step).ids)
    assert torch.equal(ahead.batch(1, 0, 2).ids, plain.batch(1, 0, 2).ids)


def run(
    folder: Path,
    how: Stage,
    device: str,
    recorded: bool,
    warned: list[str] | None = None,
    made: GLM | None = None,
    **more: Any,
) -> GLM:
    """A run on `device`, with recordings of compiled layers or without."""
    made = made or whole(model()).to(device)
    told = [] if warned is None else warned
    engine = Recorded(list(made.parameters()), told.append) if recorded else OneProcess(list(made.parameters()))
    engine.expect(3600.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "engine_for", lambda made, warn: engine)
        train(
            made,
            batches(how.rows),
            how,
            folder,
            evaluate=lambda: {"score": 1.0},
            save_best=lambda scores: None,
            warn=told.append,
            **more,
        )
    return made


def test_an_engine_is_told_once_how_long_the_stage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = model(), list[float]()
    engine = OneProcess(list(made.parameters()))
    monkeypatch.setattr(engine, "expect", told.append)
    monkeypatch.setattr(training, "engine_for", lambda made, warn: engine)
    begun = time.monotonic()
    train(made, batches(6), stage(steps=80), tmp_path, evaluate=lambda: {"score": 1.0}, save_best=lambda scores: None)
    assert len(told) == 1 and 0 < told[0] < 10 * (time.monotonic() - begun)


def test_where_nothing_can_be_recorded_training_goes_on_and_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("something can be recorded here")
    warned: list[str] = []
    run(tmp_path / "a", stage(), "cpu", recorded=True, warned=warned)
    run(tmp_path / "b", stage(), "cpu", recorded=False)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)
    assert len(warned) == 1 and "录不下训练的一步" in warned[0]


@GPU
@pytest.mark.parametrize("rows", [6, 7])
def test_recorded_steps_are_the_steps(tmp_path: Path, rows: int) -> None:
    warned: list[str] = []
    how = stage(steps=30, rows=rows, adam_lr=0.001, matrix_lr=0.002)
    a = run(tmp_path / "a", how, "cuda", recorded=True, warned=warned)
    b = run(tmp_path / "b", how, "cuda", recorded=False)
    assert warned == []
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-3)
    # Single weights may differ: AdamW makes as large a step of a gradient that is nothing but rounding.
    mine, other = (torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in (a, b))
    assert float((mine - other).norm() / other.norm()) < 0.02


@GPU
def test_a_recorded_run_is_stopped_and_resumed(tmp_path: Path) -> None:
    how = stage(steps=30, adam_lr=0.001, matrix_lr=0.002)
    run(tmp_path / "a", how, "cuda", recorded=True)

    def stop(progress: Progress) -> None:
        if progress.step == 14:
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tmp_path / "b", how, "cuda", recorded=True, on_progress=stop)
    run(tmp_path / "b", how, "cuda", recorded=True)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-3)


@GPU
def test_a_recorded_run_goes_back_to_its_saved_state(tmp_path: Path) -> None:
    """Its optimizers' state lies elsewhere in memory afterwards."""
    made, warned = whole(model()).to("cuda"), list[str]()

    def poison(progress: Progress) -> None:
        if progress.step == 11:
            with torch.no_grad():
                next(made.parameters()).fill_(torch.nan)

    how = stage(steps=40, evaluate_every=8, adam_lr=0.001, matrix_lr=0.002)
    run(tmp_path, how, "cuda", recorded=True, warned=warned, made=made, on_progress=poison)
    assert any("退回" in line for line in warned)
    assert all(torch.isfinite(p).all() for p in made.parameters())
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


@GPU
def test_compiled_layers_that_are_wrong_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(function: Any, **options: Any) -> Any:
        return lambda layer, x, table, mask, dropout: x * 1.5

    monkeypatch.setattr(torch, "compile", wrong)
    warned: list[str] = []
    run(tmp_path / "a", stage(), "cuda", recorded=True, warned=warned)
    run(tmp_path / "b", stage(), "cuda", recorded=False)
    assert len(warned) == 1 and "不用编译过的层" in warned[0]
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-3)


@GPU
def test_out_of_memory_while_recording_halves_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Recorded, "_record", fail)
    warned: list[str] = []
    run(tmp_path, stage(rows=6), "cuda", recorded=True, warned=warned)
    assert len(losses(tmp_path)) == 12 and "每次算 3 行" in warned[0]
