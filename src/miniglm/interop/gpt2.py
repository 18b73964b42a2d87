"""The reference's own checkpoints: a ckpt.pt of its GPT-2-form model, converted once to a folder that transformers opens
too (`GPT2LMHeadModel`), and that folder as a model which samples, answers and is evaluated like ours.

Radford et al. 2019: learned positions, LayerNorm before each branch, GELU. It cannot be trained or exported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniglm.config import ModelConfig
from miniglm.errors import MiniGLMError
from miniglm.files import write_whole
from miniglm.model import GLM
from miniglm.tokenizer import Tokenizer, load_gpt2_tokenizer
from miniglm.weights import give_memory, read_safetensors, save_weights, weight_files

EPS = 1e-5
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The reference's form: the answer follows the question with nothing between."""
BRANCHES = {
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
"""Parts of a layer: our name and GPT-2's."""


@dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """GPT-2's sizes under our names."""

    @property
    def num_parameters(self) -> int:
        """All weights, biases and positions included."""
        wide, size = self.intermediate_size, self.hidden_size
        layer = 4 * size * size + 2 * size * wide + 4 * size + wide + 5 * size
        return self.num_hidden_layers * layer + (self.vocab_size + self.max_position_embeddings + 2) * size


class MLP(nn.Module):
    """Two matrices and GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415) between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.gelu(self.up_proj(x)))
        return out


class GPT2(GLM):
    """GPT-2 as a `GLM` whose parts are exchanged and whose heads are turned by nothing, so that the cache and all that
    generates or evaluates works as it is."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        empty = torch.empty(config.max_position_embeddings, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size, _weight=empty)
        for layer in self.model.layers:
            layer.input_layernorm = nn.LayerNorm(config.hidden_size, EPS)
            layer.post_attention_layernorm = nn.LayerNorm(config.hidden_size, EPS)
            layer.self_attn.o_proj = nn.Linear(config.hidden_size, config.hidden_size)  # type: ignore[union-attr]
            layer.mlp = MLP(config)
        self.model.norm = nn.LayerNorm(config.hidden_size, EPS)  # type: ignore[assignment]

    def rotary(self, positions: Tensor | None, length: int) -> Tensor:
        return torch.ones(1, 1, 1, 1, dtype=torch.complex64, device=self.device)

    def embed(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        out: Tensor = self.model.embed_tokens(ids) + self.positions(positions)
        return out


def _config(sizes: Mapping[str, Any], path: Path) -> GPT2Config:
    """Sizes from a GPT-2 config.json."""
    try:
        size, heads = sizes["n_embd"], sizes["n_head"]
        if size % heads:
            raise ValueError(f"n_embd = {size} 不是 n_head = {heads} 的倍数")
        return GPT2Config(
            vocab_size=sizes["vocab_size"],
            hidden_size=size,
            intermediate_size=4 * size,
            num_hidden_layers=sizes["n_layer"],
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=size // heads,
            max_position_embeddings=sizes["n_positions"],
            partial_rotary_factor=1.0,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise MiniGLMError(f"不是能用的 GPT-2 尺寸：{error!s}", path=path) from None


def load_gpt2(folder: Path, device: str, dtype: torch.dtype) -> tuple[GPT2, Tokenizer]:
    """A converted folder's model, ready to run, and its tokenizer.

    Raises:
        MiniGLMError: a missing, cut or contradictory file; the text names it.
    """
    sizes = json.loads((folder / "config.json").read_text("utf-8"))
    if sizes.get("activation_function") != "gelu" or sizes.get("layer_norm_epsilon", EPS) != EPS:
        raise MiniGLMError(
            f"activation_function 是 {sizes.get('activation_function')!r}，只认 miniglm convert 写的 GPT-2 目录",
            path=folder / "config.json",
        )
    config = _config(sizes, folder / "config.json")
    weights = weight_files(folder)[0]
    tensors, _ = read_safetensors(weights)
    tokenizer = Tokenizer.load(folder)
    found = {"model.embed_tokens.weight": "transformer.wte.weight", "positions.weight": "transformer.wpe.weight"}
    if config.num_hidden_layers > len(tensors):
        raise MiniGLMError(
            f"config.json 有 {config.num_hidden_layers} 层，这里只有 {len(tensors)} 个张量", path=weights
        )
    ours: dict[str, Tensor] = {}
    try:
        for name, theirs in found.items():
            ours[name] = tensors[theirs]
        for part in ("weight", "bias"):
            ours[f"model.norm.{part}"] = tensors[f"transformer.ln_f.{part}"]
            for layer in range(config.num_hidden_layers):
                for name, theirs in BRANCHES.items():
                    tensor = tensors[f"transformer.h.{layer}.{theirs}.{part}"]
                    ours[f"model.layers.{layer}.{name}.{part}"] = tensor.t()  # GPT-2's matrices lie the other way round
                qkv = tensors[f"transformer.h.{layer}.attn.c_attn.{part}"].t()
                for name, tensor in zip("qkv", qkv.chunk(3, dim=0), strict=True):
                    ours[f"model.layers.{layer}.self_attn.{name}_proj.{part}"] = tensor
        with torch.device("meta"):
            model = GPT2(config).to(dtype)
        give_memory(model, device)
        model.lm_head.weight = model.model.embed_tokens.weight
        model.load_state_dict(ours | {"lm_head.weight": ours["model.embed_tokens.weight"]})
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MiniGLMError(f"权重与 config.json 不符（{reason}）", path=weights) from None
    if tokenizer.vocab_size > config.vocab_size:
        raise MiniGLMError(f"分词器有 {tokenizer.vocab_size} 个 token，模型只有 {config.vocab_size} 个", path=folder)
    tokenizer.allow_unused(config.vocab_size)
    return model.eval(), tokenizer


def convert_checkpoint(path: Path, out: Path, tokenizer: Tokenizer | None = None) -> GPT2Config:
    """Writes the model of the reference's ckpt.pt as a Hugging Face folder.

    The file is a pickle: only tensors and plain values are read from it (`weights_only`), anything that would run code
    is refused.

    Args:
        tokenizer: what the model was trained with; default GPT-2's, as the reference has it.

    Raises:
        MiniGLMError: not such a file, a pickle that would run code, or something is at `out` already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MiniGLMError("这里已有别的东西，不会覆盖", path=out, fix="换一个空的或新的 --out")
    again = "应为参考作业 train.py 存的 ckpt.pt"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MiniGLMError("没有这个文件", path=path) from None
    except Exception as error:  # a broken archive fails in whatever part of torch meets it first
        if type(error).__name__ == "UnpicklingError":
            found = "拒绝打开：这个 pickle 里不只有张量和数，打开它会运行里面的代码，或者它已损坏"
            raise MiniGLMError(found, path=path, fix=again) from None
        raise MiniGLMError(f"读不了（{type(error).__name__}）", path=path, fix=again) from None
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in ("model", "model_args")):
        raise MiniGLMError("里面没有 model 和 model_args", path=path, fix=again)
    given = content["model_args"]
    sizes = {key: given.get(key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    sizes["n_positions"] = given.get("block_size")
    config = _config(sizes, path)
    tensors = _checked(content["model"], config, path)
    tokenizer = tokenizer or load_gpt2_tokenizer()
    if tokenizer.vocab_size > config.vocab_size:
        raise MiniGLMError(f"分词器有 {tokenizer.vocab_size} 个 token，模型只有 {config.vocab_size} 个", path=path)
    end = tokenizer.end_of_text
    about = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **sizes,
        "activation_function": "gelu",
        "layer_norm_epsilon": EPS,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }
    tokenizer.save(out, model_max_length=config.max_position_embeddings)
    settings = out / "tokenizer_config.json"
    form = json.loads(settings.read_text("utf-8")) | {"chat_template": TEMPLATE}
    generation = {"eos_token_id": end, "pad_token_id": end, "do_sample": False}
    for name, values in (
        ("tokenizer_config.json", form),
        ("config.json", about),
        ("generation_config.json", generation),
    ):
        write_whole(out / name, json.dumps(values, ensure_ascii=False, indent=2) + "\n")
    save_weights(out, tensors)
    return config


def _checked(model: Mapping[str, Any], config: GPT2Config, path: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors in transformers' form: matrices transposed, zeros for the biases it lacks."""
    size, wide = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config.vocab_size, size),
        "transformer.wpe.weight": (config.max_position_embeddings, size),
        "transformer.ln_f.weight": (size,),
        "transformer.ln_f.bias": (size,),
    }
    given = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in model.items()}
    if config.num_hidden_layers > len(given):
        raise MiniGLMError(f"n_layer = {config.num_hidden_layers}，而这里只有 {len(given)} 个张量", path=path)
    for layer in range(config.num_hidden_layers):
        at = f"transformer.h.{layer}."
        shapes |= {f"{at}ln_{n}.{part}": (size,) for n in (1, 2) for part in ("weight", "bias")}
        for name, rows, columns in (
            ("attn.c_attn", 3 * size, size),
            ("attn.c_proj", size, size),
            ("mlp.c_fc", wide, size),
            ("mlp.c_proj", size, wide),
        ):
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = given.pop(name, torch.zeros(shape) if name.endswith(".bias") else None)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or not tensor.is_floating_point():
            seen = tuple(tensor.shape) if isinstance(tensor, Tensor) else "没有"
            raise MiniGLMError(f"张量 {name} 是 {seen}，应为 {shape}", path=path, fix="model 与 model_args 不符")
        matrix = len(shape) == 2 and ".h." in name
        found[name] = tensor.T.contiguous() if matrix else tensor
    given.pop("lm_head.weight", None)  # tied
    # The causal mask, which older versions of torch made the reference keep as a buffer.
    if extra := [name for name in given if not name.endswith(".attn.bias")]:
        raise MiniGLMError(f"多出张量 {extra[0]} 等 {len(extra)} 个", path=path, fix="model 与 model_args 不符")
    return found
