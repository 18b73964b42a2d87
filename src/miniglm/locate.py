"""Which model folder and which device a user means: what every verb that only runs a model needs, and no more, so
that asking a question does not load what reads books, trains and draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from miniglm.distributed import launch
from miniglm.errors import MiniGLMError

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Processes that train together have a GPU each.

    Raises:
        MiniGLMError: a device that this machine or this build of torch does not have, or too few for the processes.
    """
    import torch  # who only looks for a folder does without

    found = _named(name)
    if found.type != "cpu" and launch.size() > 1:
        have = torch.cuda.device_count() if found.type == "cuda" else 0
        if launch.local_rank() >= have:
            raise MiniGLMError(
                f"这台机器上的进程 {launch.local_rank()} 没有自己的 GPU（能用的有 {have} 块）",
                fix="把 torchrun 的 --nproc-per-node 减到 GPU 的块数，或加 --device cpu",
            )
        return torch.device("cuda", launch.local_rank())
    return found


def _named(name: str) -> torch.device:
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = name.split(":")[0]
    if not available.get(kind, False):
        have = "、".join(n for n, yes in available.items() if yes)
        raise MiniGLMError(f"设备 {name!r} 在这台机器上不可用，可用的有 {have}", fix="改用 --device auto")
    return torch.device(name)


def find_model(path: Path, *, pretrained: bool = False) -> Path:
    """The model folder that a user means by a run folder or by a model folder.

    Args:
        pretrained: prefer the model as it was before finetuning (to continue text).

    Raises:
        MiniGLMError: neither.
    """
    if (path / "config.json").exists():
        return path
    order = ("pretrain/model", "model") if pretrained else ("model", "finetune/model", "pretrain/model")
    for name in order:
        if (path / name / "config.json").exists():
            return path / name
    if not path.exists():
        raise MiniGLMError("没有这个目录", path=path, fix="先运行 miniglm demo，或给出一个运行目录或模型目录")
    raise MiniGLMError(
        "这里没有训练好的模型", path=path, fix="给出运行目录（里面有 model/）或模型目录（里面有 config.json）"
    )
