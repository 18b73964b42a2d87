"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) through PEFT on our own decoder, and merging them into it.

PEFT puts its layers into the model in place; what training, evaluation and generation see is still a `GLM`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from miniglm.checkpoint import load_state, save_state
from miniglm.errors import MiniGLMError
from miniglm.model import GLM

RANK, ALPHA = 16, 32
"""The update of a matrix is ALPHA / RANK · B A, with A of RANK rows; the usual values of PEFT's own examples."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
"""Every matrix of a layer (Dettmers et al. 2023, arXiv:2305.14314, section 4: adapters on all of them are what makes
LoRA match full finetuning)."""


def add_adapters(model: GLM) -> None:
    """Freezes all weights and puts float32 adapters, which do nothing yet, into every layer.

    Raises:
        MiniGLMError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError:
        raise MiniGLMError("--lora 需要 peft，而它没有安装", fix="pip install 'miniglm-chat[lora]'") from None
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:  # an update in bfloat16 is mostly rounded away
            parameter.data = parameter.data.float()


def adapters(model: GLM) -> dict[str, Tensor]:
    """The adapters' weights."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def save_adapters(path: Path, model: GLM) -> None:
    """Writes the adapters alone: megabytes where the model has gigabytes."""
    save_state(path, adapters(model), {})


def load_adapters(path: Path, model: GLM) -> None:
    """Puts back what `save_adapters` wrote.

    Raises:
        MiniGLMError: damaged, or of another model.
    """
    saved, _ = load_state(path)
    own = adapters(model)
    if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in own.items()}:
        raise MiniGLMError("这些 LoRA 权重不是这个模型的", path=path, fix="换一个 --out 目录重新训练")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def merge_adapters(model: GLM) -> None:
    """Adds the adapters to the matrices they belong to and takes them out: a plain model again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            base: nn.Module = module.get_base_layer()
            setattr(model.get_submodule(parent), child, base)
