"""Models that do not fit one device: torch's FSDP2, with each weight, gradient and optimizer state shared out by rows.

Muon works here too: each matrix is put together on one process, which orthogonalizes it and sends back the rows. For
that a process sends its own share of the matrices twice a step, little beside FSDP's gathering of all weights, twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty

from miniglm.distributed.engine import DataParallel, State
from miniglm.distributed.sharded_state import save_sharded
from miniglm.distributed.team import connected
from miniglm.errors import MiniGLMError
from miniglm.model import GLM
from miniglm.optimizer import local


def shard(model: GLM, device: torch.device) -> GLM:
    """Shares a model, of which each process holds all on its CPU, out over their devices, layer by layer."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in [*model.model.layers, model]:
        module: Any = fully_shard(part, mesh=mesh)
        # The loop divides by the targets of all processes; gloo has sums and no averages.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "loss")  # what training calls
    return model


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shared out tensors put together, one after another, on the first process's CPU; elsewhere empty. All call it."""
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            found[name] = full.detach().cpu()
    return found


class FullySharded(DataParallel):
    """Several processes that hold a share of the model each."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters)
        first = self.parameters[0]
        assert isinstance(first, DTensor)
        self.mesh = first.device_mesh

    def _collect(self) -> None:
        """FSDP sums the gradients itself."""

    def _gradients_of(self) -> list[Tensor]:
        return [local(p.grad) for p in self.parameters if p.grad is not None]

    def sum_up(self, loss: float, targets: int, failed: bool) -> float | None:
        if failed:  # the others wait for what this process would gather in the midst of the model
            raise MiniGLMError(
                f"进程 {self.rank} 内存不够；--shard 时各进程等着彼此的权重，不能自动减半",
                fix="把配方里的 micro_rows 改小，或用更多的进程",
            )
        summed = torch.tensor([loss, targets], dtype=torch.float64)
        with connected():
            dist.all_reduce(summed)
        loss, targets = summed.tolist()
        torch._foreach_div_(self._gradients_of(), targets)
        return loss / targets

    def clip(self, most: float) -> float:
        """As torch.nn.utils.clip_grad_norm_, with one sum over the processes."""
        gradients = self._gradients_of()
        squares = torch.stack([g.double().square().sum() for g in gradients]).sum()
        with connected():
            dist.all_reduce(squares)
        norm = math.sqrt(squares.item())
        if math.isfinite(norm) and norm > most:
            torch._foreach_mul_(gradients, most / (norm + 1e-6))
        return norm

    def zero(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def orthogonalize(self, own: list[Tensor], rows: int, compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """In rounds of one matrix a process, so that no more than that is ever whole."""
        each, columns = -(-rows // self.size), own[0].shape[1]
        done: list[Tensor] = []
        for start in range(0, len(own), self.size):
            sent = own[0].new_zeros(self.size, each, columns)
            for i, part in enumerate(own[start : start + self.size]):
                sent[i, : len(part)] = part
            matrix = torch.empty_like(sent)
            with connected():
                dist.all_to_all_single(matrix, sent)
            if start + self.rank < len(own):
                matrix.view(-1, columns)[:rows] = compute(matrix.view(1, -1, columns)[:, :rows])[0]
            with connected():
                dist.all_to_all_single(sent, matrix)
            done += [sent[i, : len(part)] for i, part in enumerate(own[start : start + self.size])]
        return done

    def finite(self) -> bool:
        bad = torch.tensor(float(not all(bool(torch.isfinite(local(p.detach()).sum())) for p in self.parameters)))
        with connected():
            dist.all_reduce(bad)
        return not bad

    def save(self, path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Each process writes its share, see `sharded_state.save_sharded`."""
        save_sharded(path, tensors, meta)

    def load(self, path: Path, warn: Callable[[str], None]) -> State | None:
        """A sharded state, written by any number of processes, or a newer one of a model that was whole."""
        found = super().load(path, warn)
        return found and ({name: self._share(name, tensor) for name, tensor in found[0].items()}, found[1])

    def _placed(self, name: str, dimensions: int) -> bool:
        return dimensions > 0 and not name.startswith("rng::")

    def _empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if not self._placed(name, len(shape)):
            return torch.empty(tuple(shape), dtype=dtype)
        return empty(*shape, dtype=dtype, device_mesh=self.mesh, placements=[Shard(0)])

    def _share(self, name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor) or not self._placed(name, tensor.ndim):
            return tensor
        return distribute_tensor(tensor.to(self.mesh.device_type), self.mesh, [Shard(0)], src_data_rank=None)
