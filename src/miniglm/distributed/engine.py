"""What differs between training in one process, in several that each hold the whole model, and in several that hold a
share of it each: where gradients are summed, who orthogonalizes which matrix, who writes. The loop (training.py) asks.

Nothing here depends on how many processes there are but the order of sums, so a run goes on on another number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from miniglm.checkpoint import load_last_state, save_state
from miniglm.dataset import Batch
from miniglm.distributed import launch
from miniglm.distributed.team import connected, on_first, tell
from miniglm.kernels import autocast
from miniglm.model import GLM
from miniglm.optimizer import at_once
from miniglm.weights import all_finite

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and what JSON can hold."""


class OneProcess:
    """Training by one process: everything is as it stands.

    Args:
        parameters: what is trained.
    """

    size, rank, first = 1, 0, True
    recorded = False
    """Whether steps are recorded and played back, see recording.py."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)

    def rows(self, rows: int) -> int:
        """The most rows of a batch of `rows` that one process computes."""
        return -(-rows // self.size)

    def part(self, micro: int, micros: int) -> tuple[int, int]:
        """What this process computes as its part `micro` of `micros`: a part of how many of the whole batch."""
        return self.rank + self.size * micro, self.size * micros

    def seed(self, seed: int, step: int) -> None:
        """Sets the random numbers of a step where those of one process after another would not do."""

    def gradients(self, model: GLM, batch: Batch, divisor: int, precision: str, alone: bool) -> Callable[[], float]:
        """Adds the gradients of a batch's summed loss, divided by `divisor`, to the parameters' own.

        Args:
            alone: whether there is nothing to be added to and nothing to come.

        Returns:
            Gives the loss, divided alike. A GPU is waited for only there.
        """
        part = batch.to(model.device)
        with autocast(model.device, precision):
            loss, _ = model.loss(part.ids, part.labels, positions=part.positions, mask=part.mask)
        (loss / divisor).backward()  # type: ignore[no-untyped-call]
        found = loss.detach()
        return lambda: found.item() / divisor

    def update(self, optimizers: Sequence[Optimizer]) -> None:
        """Takes the step that the gradients say."""
        for optimizer in optimizers:
            optimizer.step()

    def expect(self, seconds: float) -> None:
        """Told once, after some steps, how long the stage will go on: for what takes time and then saves more."""

    def forget(self) -> None:
        """Told when the optimizers' state is another than it was."""

    def sum_up(self, loss: float, targets: int, failed: bool) -> float | None:
        """Makes the gradients those of the whole batch's mean loss.

        Args:
            loss: summed over this process's targets; in one process already divided by them, as the gradients are.
            failed: its memory ran out.

        Returns:
            The mean loss of all targets, or None if any process failed; gradients are then of no use.
        """
        return None if failed else loss

    def clip(self, most: float) -> float:
        """Scales the gradients to a norm of at most `most`; the norm that they had."""
        return float(nn.utils.clip_grad_norm_(self.parameters, most))

    def zero(self) -> None:
        """Drops the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def orthogonalize(self, own: list[Tensor], rows: int, compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Who orthogonalizes which matrix, see `optimizer.Spread`."""
        return at_once(own, rows, compute)

    def agree(self, stop: int, elapsed: float, due: bool) -> tuple[int, float, bool]:
        """After a step: the signal that any process was asked to stop by, or 0; the first one's clock; and whether it
        finds that it is time to save."""
        return stop, elapsed, due

    def clock(self, elapsed: float) -> float:
        """The first process's clock, for all."""
        return elapsed

    def finite(self) -> bool:
        """Whether all weights are finite."""
        return all_finite(self.parameters)

    def save(self, path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Writes a state, see `checkpoint.save_state`."""
        save_state(path, tensors, meta)
        if any(path.parent.glob("state-*")):
            from miniglm.distributed.sharded_state import drop_sharded

            drop_sharded(path)

    def load(self, path: Path, warn: Callable[[str], None]) -> State | None:
        """The last state that is whole: `checkpoint.load_last_state`, or a newer one of a sharded run."""
        last = self._load_last(path, warn)
        if not tell(any(path.parent.glob("state-*"))):
            return last
        from miniglm.distributed.sharded_state import load_sharded  # torch's part for it takes a second to import

        sharded = load_sharded(path, warn, self._empty)
        return sharded if last is None or (sharded is not None and sharded[1]["step"] > last[1]["step"]) else last

    def _load_last(self, path: Path, warn: Callable[[str], None]) -> State | None:
        return load_last_state(path, warn)

    def _empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What a saved tensor is read into."""
        return torch.empty(tuple(shape), dtype=dtype)


class DataParallel(OneProcess):
    """Several processes that each hold the whole model and compute their rows of each batch.

    All gradients lie in one array, which is summed in one call together with the losses, the numbers of targets and
    whether any process ran out of memory: so no process is left waiting for one that failed. Sums are the same bits
    everywhere, and with them all that each process does by itself: clipping, AdamW, the guard's verdicts. The costly
    part of Muon is shared out.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters)
        self.size, self.rank, self.first = launch.size(), launch.rank(), launch.is_first()
        self._collect()

    def _collect(self) -> None:
        """Lays the gradients out in one array."""
        kinds = {(p.dtype, p.device) for p in self.parameters}
        if len(kinds) != 1:
            raise ValueError(f"trained weights of several kinds: {kinds}")
        dtype, device = kinds.pop()
        numbers = sum(p.numel() for p in self.parameters)
        self._all = torch.zeros(numbers + 3, dtype=dtype, device=device)
        self._gradients, self._sums = self._all[:numbers], self._all[numbers:]
        if dtype.itemsize < 4:  # bfloat16 cannot count above 256
            self._all, self._sums = self._gradients, torch.zeros(3, device=device)
        at = 0
        for p in self.parameters:
            p.grad = self._gradients[at : at + p.numel()].view(p.shape)
            at += p.numel()
        with connected():
            for p in self.parameters:  # random weights of one seed are the same anyway, but not on every kind of device
                dist.broadcast(p.detach(), 0)

    def seed(self, seed: int, step: int) -> None:
        """Of seed, step and process: dropout differs between processes, and a resumed run repeats it."""
        torch.manual_seed((seed * 1_000_003 + step) * 65_537 + self.rank)

    def sum_up(self, loss: float, targets: int, failed: bool) -> float | None:
        self._sums.copy_(torch.tensor([0.0, 0.0, 1.0] if failed else [loss, targets, 0.0]))
        with connected():
            dist.all_reduce(self._all)
            if self._all is self._gradients:
                dist.all_reduce(self._sums)
        loss, targets, failures = self._sums.tolist()
        if failures:
            return None
        self._gradients.div_(targets)
        return loss / targets

    def zero(self) -> None:
        self._gradients.zero_()

    def orthogonalize(self, own: list[Tensor], rows: int, compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Each process computes every `size`-th matrix, and gets the others' from them."""
        each, shape = -(-len(own) // self.size), own[0].shape
        done = own[0].new_zeros(each, *shape)
        if mine := own[self.rank :: self.size]:
            done[: len(mine)] = compute(torch.stack(mine))
        found = done.new_empty(self.size * each, *shape)
        with connected():
            dist.all_gather_single(found, done)
        found = found.view(self.size, each, *shape)
        return [found[i % self.size, i // self.size] for i in range(len(own))]

    def agree(self, stop: int, elapsed: float, due: bool) -> tuple[int, float, bool]:
        told = torch.tensor([stop, elapsed * self.first, due and self.first], dtype=torch.float64)
        with connected():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told[0]), float(told[1]), bool(told[2])

    def clock(self, elapsed: float) -> float:
        return float(tell(elapsed))

    def save(self, path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """By the first process: they all have the same, and it is the state that a single process would write."""
        on_first(lambda: OneProcess.save(self, path, tensors, meta))

    def _load_last(self, path: Path, warn: Callable[[str], None]) -> State | None:
        """Read and checked by the first process, told to the others."""
        last = on_first(lambda: load_last_state(path, warn))
        known = last and {
            "meta": last[1],
            "shapes": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in last[0].items()},
        }
        told = tell(known)
        if told is None:
            return None
        tensors = (
            last[0] if last else {n: torch.empty(s, dtype=getattr(torch, d)) for n, (d, s) in told["shapes"].items()}
        )
        with connected():
            for name in told["shapes"]:
                dist.broadcast(tensors[name], 0)
        return tensors, told["meta"]
