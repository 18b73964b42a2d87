"""A training step recorded once and played back: CUDA graphs.

A step of a small model is some six hundred kernels of a few microseconds each, and sending them one by one takes a
processor longer than a GPU takes to run them (docs/speed.md). So forward, loss and backward are recorded as one graph,
clipping and the optimizers as another; between the two the loop looks at the loss and decides whether to take the step.
What a recording reads and writes stays where it is in memory; what differs from step to step is copied in.

Where torch's compiler works and the stage is long enough to pay for it, what is recorded is compiled layers and a
compiled loss.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from miniglm.dataset import Batch
from miniglm.distributed.engine import OneProcess
from miniglm.guard import is_out_of_memory
from miniglm.kernels import autocast, losses_and_gradient
from miniglm.model import GLM, Compiled, DecoderLayer

BEFORE = 2
"""Steps that are computed as ever before one is recorded: they make the optimizers' state and the libraries' own."""
ROOMS = 8
"""A recording has room for so many eighths of its positions as targets: the output layer's work is for those alone."""
COMPILING_PAYS, COMPILING_PAYS_AGAIN = 50.0, 20.0
"""Seconds to go from which compiling is worth its while: it takes some fifteen the first time in a process, five for
another shape, and saves a fifth to a third of each step (docs/speed.md)."""
COMPILED_ERROR = 0.05
"""Compiled layers are not used if their gradient is off by more than this share of the plain one's norm. In bfloat16
they differ by 0.01 to 0.03, as the plain one differs from float32's."""


@dataclass(slots=True)
class _Recording:
    """Forward and backward of batches of one shape. `into`: what a batch and its divisor are copied into; `found`: the
    loss and the gradients' norm; `table`: what it reads and the model may exchange for a longer one."""

    graph: torch.cuda.CUDAGraph
    into: list[Tensor]
    found: Tensor
    table: Tensor | None


class Recorded(OneProcess):
    """One process with a GPU: the same numbers as `OneProcess`, from recordings.

    Args:
        parameters: what is trained.
        warn: told if nothing can be recorded here, so that each step is computed as ever.
    """

    recorded = True
    compiled_before = False
    """Whether this process has compiled anything yet."""

    def __init__(self, parameters: Sequence[nn.Parameter], warn: Callable[[str], None]) -> None:
        super().__init__(parameters)
        self._warn, self._able, self._computed, self._compiles = warn, True, 0, False
        self._gradients: list[Tensor] = []
        self._scale = torch.ones((), device=self.parameters[0].device)
        self._pool: tuple[int, int] | None = None
        """Recordings are played back one at a time, so they share the memory of what lies between."""
        self.forget()

    def forget(self) -> None:
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._update: torch.cuda.CUDAGraph | None = None
        self._norm: float | None = None
        """Of the gradients that a recording has just left in `_gradients`; None where they are the parameters' own."""

    def expect(self, seconds: float) -> None:
        """Compiles if that pays. Triton comes with torch for Linux alone: without it there is nothing to compile with,
        and nothing to tell."""
        pays = COMPILING_PAYS_AGAIN if Recorded.compiled_before else COMPILING_PAYS
        if seconds >= pays and self._able and importlib.util.find_spec("triton") is not None:
            self._compiles = True
            self.forget()

    def gradients(self, model: GLM, batch: Batch, divisor: int, precision: str, alone: bool) -> Callable[[], float]:
        self._norm = None
        recording = None
        if alone and self._able and not model.checkpointing:
            if self._computed < BEFORE:
                self._computed += 1
            else:
                recording = self._recording(model, batch, precision)
        if recording is None:
            return super().gradients(model, batch, divisor, precision, alone)
        for place, tensor in zip(recording.into, (*_given(batch), torch.tensor(float(divisor))), strict=True):
            place.copy_(tensor, non_blocking=True)
        recording.graph.replay()

        def loss() -> float:
            total, self._norm = recording.found.tolist()
            return float(total)

        return loss

    def clip(self, most: float) -> float:
        if self._norm is None:
            return super().clip(most)
        self._scale.fill_(min(1.0, most / (self._norm + 1e-6)))  # as clip_grad_norm_ does
        return self._norm

    def update(self, optimizers: Sequence[Optimizer]) -> None:
        if self._norm is None:
            return super().update(optimizers)
        if self._update is None:
            graph = torch.cuda.CUDAGraph()
            for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
                parameter.grad = gradient
            with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]  # any pair of numbers is one
                torch._foreach_mul_(self._gradients, self._scale)
                super().update(optimizers)
            self._update = graph
        self._update.replay()

    def _recording(self, model: GLM, batch: Batch, precision: str) -> _Recording | None:
        """The one for batches of this shape and about this many targets; None where nothing can be recorded.

        Raises:
            MemoryError: there is too little memory for it.
        """
        size = batch.labels.numel()
        room = min(-(-max(batch.targets, 1) * ROOMS // size) * -(-size // ROOMS), size)
        key = (room, precision, model.training, *(t.shape for t in _given(batch)))
        if key not in self._recordings:
            try:
                self._recordings[key] = self._record(model, batch, room, precision)
            except RuntimeError as error:
                self.forget()
                self._gradients = []
                if _memory_ran_out(error):
                    raise MemoryError from None
                self._able = False
                self._warn(f"这里录不下训练的一步（{_first_line(error)}），改为逐个算子计算，只是慢一些")
                return None
        return self._recordings[key]

    def _record(self, model: GLM, batch: Batch, room: int, precision: str) -> _Recording:
        """Raises RuntimeError where that cannot be."""
        own, divisor = batch.to(model.device), torch.ones((), device=model.device)
        graph, found = torch.cuda.CUDAGraph(), torch.zeros(2, device=model.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self.parameters]

        def compute() -> tuple[Tensor, tuple[Tensor, ...]]:
            with autocast(model.device, precision):
                loss = model.loss_of_at_most(room, own.ids, own.labels, positions=own.positions, mask=own.mask)
            loss = loss / divisor
            return loss, torch.autograd.grad(loss, self.parameters)

        try:
            model.compiled = self._compiled(model, compute) if self._compiles and not model.dropout else None
            with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]
                loss, gradients = compute()
                torch._foreach_copy_(self._gradients, gradients)
                found.copy_(torch.stack([loss, nn.utils.get_total_norm(gradients)]))
        finally:
            model.compiled = None
        return _Recording(graph, [*_given(own), divisor], found, model._table)

    def _compiled(self, model: GLM, compute: Callable[[], tuple[Tensor, tuple[Tensor, ...]]]) -> Compiled | None:
        """Layers and loss, compiled and held against the plain ones on this batch; None where they differ or there is
        no compiling. Dropout, which draws other numbers there, could not be held against anything."""
        plain = compute()[1]
        try:
            # A layer is compiled once for all of them: its weights are arguments.
            model.compiled = Compiled(
                torch.compile(DecoderLayer.forward, fullgraph=True, dynamic=False),
                torch.compile(losses_and_gradient, fullgraph=True, dynamic=False),
            )
            gradients = compute()[1]
        except (
            Exception
        ) as error:  # a compiler that is missing, too old or has no place to write: each says it otherwise
            if _memory_ran_out(error):
                raise
            reason = _first_line(error)
        else:
            differences = torch._foreach_sub(gradients, plain)
            error_share = float(nn.utils.get_total_norm(differences) / nn.utils.get_total_norm(plain))
            Recorded.compiled_before = True
            if error_share <= COMPILED_ERROR:
                return model.compiled
            reason = f"编译出来的梯度差 {error_share:.0%}"
        self._compiles = False
        self._warn(f"这里不用编译过的层（{reason}），只是慢一些")
        return None


def _given(batch: Batch) -> list[Tensor]:
    """What a batch consists of."""
    return [t for t in (batch.ids, batch.labels, batch.positions, batch.segments) if t is not None]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _memory_ran_out(error: BaseException | None) -> bool:
    """Whether that is behind an error: what ends a recording that failed raises another one."""
    while error is not None:
        if is_out_of_memory(error):
            return True
        error = error.__context__
    return False
