"""The one training loop: pretraining, finetuning and continued training differ only in where batches come from.

The loop knows token ids, losses and time; it knows nothing of text, books or questions. A run's data state is its
step (see dataset.Batches), so weights, optimizer, random-number state and step are all that resuming needs, and a
resumed run of a fixed number of steps equals the undisturbed one bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer

from miniglm.checkpoint import optimizer_tensors, restore_optimizers, restore_rng, rng_tensors
from miniglm.dataset import Batches
from miniglm.distributed.choice import engine_for
from miniglm.distributed.engine import OneProcess
from miniglm.distributed.team import on_first
from miniglm.errors import MiniGLMError
from miniglm.files import append_line, write_whole
from miniglm.guard import Guard, is_out_of_memory, memory_explained, release_memory, smaller_micro_batch
from miniglm.kernels import autocast
from miniglm.model import GLM
from miniglm.optimizer import Spread, at_once, build_optimizers, learning_rate_factor, set_learning_rate

SAVE_EVERY_SECONDS, SAVE_AT_LEAST_EVERY_SECONDS = 60.0, 600.0
SAVE_SHARE = 0.04
"""Of the time that saving takes at most between two validations, unless the state is so large that it would then be
saved less often than every ten minutes."""
PACED = (30, 50)
"""Steps of a run between which its pace is taken: the first ones are slower."""
EVALUATIONS = 8
"""Validations of a stage unless the recipe says how often; together they stay near 5 % of the time."""


class Interrupted(Exception):
    """The user asked to stop; the state is saved and the same command goes on from it.

    Args:
        signal: what asked, which makes the exit code.
    """

    def __init__(self, signal: int = signal.SIGINT) -> None:
        super().__init__()
        self.signal = signal


@dataclass(frozen=True, slots=True)
class Stage:
    """How long and how a model is trained. Either `steps` or `minutes` ends it; rates are explained in optimizer.py.
    `precision` is the matrix products': "float32", or "bfloat16" with the weights and all sums still in float32."""

    name: str
    rows: int
    steps: int | None = None
    minutes: float | None = None
    micro_rows: int | None = None
    muon: bool = True
    matrix_lr: float = 0.01
    adam_lr: float = 0.005
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.02
    decay: float = 0.7
    final_lr: float = 0.05
    clip: float = 1.0
    precision: str = "float32"
    evaluate_every: int | None = None
    patience: int | None = None
    seed: int = 1337


@dataclass(slots=True)
class Progress:
    """What the loop tells about itself after each step."""

    step: int
    fraction: float
    loss: float
    elapsed: float
    tokens_per_second: float
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Estimated from the time used so far."""
        return self.elapsed * (1.0 - self.fraction) / self.fraction if self.fraction > 0 else math.inf


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a stage ended."""

    steps: int
    elapsed: float
    tokens: int
    best: dict[str, float]
    stopped_early: bool


def keep_allocations() -> None:
    """Makes glibc keep freed memory: a step frees and asks for the same arrays, and every return to the system costs
    a page fault for each 4 KiB when they come back. No effect elsewhere (macOS, Windows, musl)."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never take an array from mmap
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: give back to the system only past 1 GiB of free top


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], int]]:
    """Turns the first Ctrl-C or SIGTERM into a question to be asked between steps, so that no update is cut in half:
    the signal's number, or 0. The second one does at once what it did before, and so does, when the block has ended
    well, a first one that nobody asked about any more."""
    asked = 0

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        asked = number

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    previous: dict[int, Any] = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, handler)
        yield lambda: asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
    if asked:
        signal.raise_signal(asked)


def optimizers_of(stage: Stage, model: GLM, spread: Spread = at_once, recorded: bool = False) -> list[Optimizer]:
    """The optimizers that a stage asks for, see `build_optimizers`."""
    return build_optimizers(
        model,
        muon=stage.muon,
        matrix_lr=stage.matrix_lr,
        adam_lr=stage.adam_lr,
        weight_decay=stage.weight_decay,
        betas=stage.betas,
        matrix_dtype=torch.bfloat16 if stage.precision == "bfloat16" else torch.float32,
        spread=spread,
        recorded=recorded,
    )


def seconds_between_saves(cost: float) -> float:
    """From one save of the state to the next, where a save takes `cost` seconds."""
    return min(max(SAVE_EVERY_SECONDS, cost / SAVE_SHARE), SAVE_AT_LEAST_EVERY_SECONDS)


def _drop_later_metrics(path: Path, step: int) -> None:
    """A killed run may have written numbers of steps that its last saved state does not know."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, LookupError, TypeError):  # cut short or damaged
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    write_whole(path, b"".join(kept))


def _gradients(
    model: GLM, batches: Batches, step: int, micros: int, precision: str, engine: OneProcess
) -> tuple[float, int]:
    """Adds up the gradients of this process's rows of step `step`, in `micros` parts: their loss and their targets, as
    `OneProcess.sum_up` wants them."""
    parts = [batches.batch(step, *engine.part(micro, micros)) for micro in range(micros)]
    targets = sum(part.targets for part in parts)
    divisor = targets if engine.size == 1 else 1  # how many there are in all, no process knows yet
    losses = [engine.gradients(model, part, divisor, precision, alone=micros == 1) for part in parts]
    if micros == 1 and model.device.type != "cpu":  # while the device computes
        batches.prepare(step + 1, *engine.part(0, 1))
    return sum(loss() for loss in losses), targets


def train(
    model: GLM,
    batches: Batches,
    stage: Stage,
    folder: Path,
    *,
    evaluate: Callable[[], dict[str, float]],
    save_best: Callable[[dict[str, float]], None],
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_evaluation: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Trains until the stage's steps or minutes are over, from where `folder` says it was. Under torchrun all processes
    call it alike; the first one writes.

    Args:
        evaluate: scores of the model as it is; `score` is what is minimised.
        save_best: called when `score` is the lowest so far, by all processes.
        on_evaluation: called by the first process after each validation, with all numbers on disk (to redraw the picture).
        warn: told what the user should know of: a skipped step, a return to a saved state, less memory than wanted.

    Raises:
        Interrupted: the user asked to stop; the state is saved.
        MiniGLMError: losses or gradients stay impossible (see guard.py), a row does not fit into memory, or the
            saved states are damaged.
    """
    if (stage.steps is None) == (stage.minutes is None):
        raise ValueError("a stage ends by steps or by minutes: give exactly one")
    keep_allocations()
    engine = engine_for(model, warn)
    on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    state_path, metrics_path = folder / "state.safetensors", folder / "metrics.jsonl"
    device = model.device
    optimizers = optimizers_of(stage, model, engine.orthogonalize, engine.recorded)
    torch.manual_seed(stage.seed)
    step, elapsed, tokens, evaluations, validated, since_best = 0, 0.0, 0, 0, 0, 0
    best: dict[str, float] = {}
    scores: dict[str, float] = {}
    finished = False
    guard = Guard()

    def restore(tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Weights, optimizers and random numbers as they were saved."""

        def section(prefix: str) -> dict[str, torch.Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        saved = section("model::")
        if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in weights.items()}:
            raise MiniGLMError("训练状态与模型的形状不符", path=state_path, fix="换一个 --out 目录重新训练")
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(saved[name])
        restore_optimizers(optimizers, section("optimizer::"), meta["optimizers"])
        engine.forget()
        restore_rng(section("rng::"))

    last = engine.load(state_path, warn)
    if last is not None:
        restore(*last)
        meta = {"validated": last[1]["step"]} | last[1]  # states of earlier versions do not say
        step, elapsed, tokens = meta["step"], meta["elapsed"], meta["tokens"]
        evaluations, since_best, best, finished = (
            meta["evaluations"],
            meta["since_best"],
            meta["best"],
            meta["finished"],
        )
        scores = meta["scores"]
        validated = meta["validated"]
        guard = Guard(meta.get("guard"))
    on_first(lambda: _drop_later_metrics(metrics_path, step))

    def save(finished: bool = False) -> None:
        tensors, groups = optimizer_tensors(optimizers)
        everything = {f"optimizer::{name}": t for name, t in tensors.items()}
        everything |= {f"model::{name}": t for name, t in model.named_parameters() if t.requires_grad}
        everything |= {f"rng::{name}": t for name, t in rng_tensors().items()}
        meta = {
            "step": step,
            "elapsed": elapsed,
            "tokens": tokens,
            "evaluations": evaluations,
            "validated": validated,
            "since_best": since_best,
            "best": best,
            "scores": scores,
            "finished": finished,
            "optimizers": groups,
            "guard": guard.to_json(),
        }
        engine.save(state_path, everything, meta)

    def log(row: dict[str, Any]) -> None:
        if engine.first:
            append_line(metrics_path, json.dumps(row, ensure_ascii=False))

    def go_back(reason: str, row: dict[str, Any]) -> None:
        """To the weights of the last saved state. The step goes on: the rows that did the harm do not come again."""
        try:
            warn(guard.count_return(reason, metrics_path, stage.name))
        except MiniGLMError:
            log(row)  # the last step's numbers and rows are what the user wants to see now
            raise
        saved = engine.load(state_path, warn)
        if saved is None:  # removed meanwhile
            raise MiniGLMError("缺少这个文件，退不回去", path=state_path, fix="换一个 --out 目录重新训练")
        restore(*saved)

    def fraction() -> float:
        return step / stage.steps if stage.steps is not None else elapsed / (60.0 * (stage.minutes or 1.0))

    def is_due() -> bool:
        """Whether a validation is; a step late where a stop came between."""
        if stage.evaluate_every:
            return step // stage.evaluate_every > validated // stage.evaluate_every
        return int(fraction() * EVALUATIONS + 1e-9) > evaluations

    micro_rows = min(stage.micro_rows or stage.rows, engine.rows(stage.rows))
    early, last_save, save_after = False, time.monotonic(), SAVE_EVERY_SECONDS
    taken, pace = 0, (0.0, 0.0)
    fresh, last = last is None, None  # its tensors would stay in memory for the whole stage
    with stop_signal() as asked_to_stop:
        if fresh:  # something to go back to; and a full disk shows now rather than later
            save()
            save_after = seconds_between_saves(time.monotonic() - last_save)
            last_save = time.monotonic()
        while not finished:
            started = time.monotonic()
            model.train()
            factor = learning_rate_factor(fraction(), warmup=stage.warmup, decay=stage.decay, final=stage.final_lr)
            factor *= guard.rate
            set_learning_rate(optimizers, factor)
            engine.seed(stage.seed, step)
            random = rng_tensors()
            while True:
                loss, targets, failed = 0.0, 0, False
                micros = math.ceil(engine.rows(stage.rows) / micro_rows)
                try:
                    loss, targets = _gradients(model, batches, step, micros, stage.precision, engine)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failed = True
                # Here the exception is gone, and with it the frames that held the arrays of the failed step.
                total = engine.sum_up(loss, targets, failed)
                if total is not None:
                    break
                engine.zero()
                release_memory(device)
                micro_rows = smaller_micro_batch(micro_rows, model.config, device)
                restore_rng(random)
                warn(f"内存不够，改为每次算 {micro_rows} 行、多次累积，结果不变")
            with memory_explained(model.config, device):
                norm = engine.clip(stage.clip)
                fault = guard.fault(total, norm)
                if fault is None:
                    engine.update(optimizers)
            engine.zero()
            step += 1
            tokens += stage.rows * batches.context
            stopping, elapsed, stale = engine.agree(
                asked_to_stop(), elapsed + time.monotonic() - started, time.monotonic() - last_save > save_after
            )
            row: dict[str, Any] = {
                "step": step,
                "tokens": tokens,
                "elapsed": round(elapsed, 3),
                "loss": total if math.isfinite(total) else str(total),
                "gradient_norm": norm if math.isfinite(norm) else str(norm),
                "lr_factor": factor,
            }
            if fault is not None:
                row["skipped"] = fault
                row["skipped_rows"] = batches.names(step - 1)
                warn(f"第 {step} 步跳过：{fault}")
            returned = guard.must_return
            if returned:
                go_back(f"连续 {guard.skipped} 步不能用（{fault}）", row)
            over = fraction() >= 1.0
            due = is_due()
            saving = over or due or bool(stopping) or returned or stale
            if saving and not engine.finite():
                go_back(f"第 {step} 步以后权重里有 NaN 或无穷大", row)
            if over or (due and not stopping):
                begun = time.monotonic()
                evaluations, validated = max(evaluations + 1, int(fraction() * EVALUATIONS + 1e-9)), step
                model.eval()
                with (
                    torch.inference_mode(),
                    autocast(device, stage.precision),
                    memory_explained(model.config, device),
                ):
                    scores = evaluate()
                since_best += 1
                if math.isfinite(scores["score"]) and (not best or scores["score"] < best["score"]):
                    best, since_best = scores | {"step": step}, 0
                    save_best(best)
                elapsed += time.monotonic() - begun
                row |= {"validation": scores}
                early = stage.patience is not None and since_best >= stage.patience
            log(row)
            on_progress(Progress(step, min(fraction(), 1.0), total, elapsed, tokens / max(elapsed, 1e-9), scores))
            finished = over or early
            if saving:
                begun = time.monotonic()
                save(finished)
                last_save = time.monotonic()
                elapsed += last_save - begun
                save_after = seconds_between_saves(last_save - begun)
            if "validation" in row:
                begun = time.monotonic()
                if engine.first:
                    on_evaluation()
                elapsed += time.monotonic() - begun
            taken += 1
            if taken == PACED[0]:
                pace = fraction(), time.monotonic()
            elif taken == PACED[1] and fraction() > pace[0]:
                engine.expect((1.0 - fraction()) / (fraction() - pace[0]) * (time.monotonic() - pace[1]))
            if saving:  # what took each process its own time
                elapsed = engine.clock(elapsed)
            if stopping and not finished:
                raise Interrupted(stopping)
    if not best:
        raise MiniGLMError(
            "没有一次验证的分数是有限数，没有可以保存的模型", path=metrics_path, fix="把学习率改小，换一个 --out"
        )
    return TrainResult(step, elapsed, tokens, best, early)
