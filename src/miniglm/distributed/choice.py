"""How a model is trained by as many processes as there are: what the loop and the stages ask for, without importing what
only a sharded model needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from miniglm.distributed import launch
from miniglm.distributed.engine import DataParallel, OneProcess
from miniglm.errors import MiniGLMError
from miniglm.model import GLM
from miniglm.recording import Recorded


def engine_for(model: nn.Module, warn: Callable[[str], None] = lambda line: None) -> OneProcess:
    """How a model is trained by as many processes as there are.

    Args:
        warn: told what makes it slower than it could be.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if launch.size() == 1:
        return Recorded(parameters, warn) if parameters[0].device.type == "cuda" else OneProcess(parameters)
    if hasattr(parameters[0], "to_local"):  # see sharding.shard
        from miniglm.distributed.sharding import FullySharded

        return FullySharded(parameters)
    return DataParallel(parameters)


def sharded_if(wanted: bool, model: GLM, device: torch.device) -> GLM:
    """The model on its device, or if so wanted its share of it there.

    Raises:
        MiniGLMError: there is only one process.
    """
    if not wanted:
        return model.to(device)
    if launch.size() == 1:
        raise MiniGLMError(
            "--shard 要几个进程一起训练", fix="用 torchrun --nproc-per-node 2 -m miniglm …，或去掉 --shard"
        )
    from miniglm.distributed.sharding import shard

    return shard(model, device)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights; of a sharded one put together on the first process, elsewhere none. All processes call it."""
    weights: dict[str, Tensor] = model.state_dict()
    if not any(hasattr(tensor, "to_local") for tensor in weights.values()):
        return weights
    from miniglm.distributed.sharding import whole

    return whole(weights)
