"""What is saved: the model folder (a Hugging Face folder), the resumable state, the run folder's mark.

safetensors and JSON only, never a pickle. Every file is written under a temporary name and renamed, so a run killed
at any moment leaves each file as it was or as it should be.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

from miniglm import __version__
from miniglm.errors import MiniGLMError
from miniglm.files import TEMPORARY, clean_temporaries, write_whole
from miniglm.model import GLM, ModelConfig
from miniglm.tokenizer import Tokenizer

FORMAT = 1
"""Number of the run folder's and the state's layout; another number is not read."""
MAX_HEADER = 100 * 2**20
"""safetensors' own bound on its header, bytes."""


MAX_SHARD = 5 * 10**9
"""Bytes of a weights file; a larger model is cut into several with an index, as transformers does."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def save_model(
    folder: Path,
    model: GLM,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard: int = MAX_SHARD,
) -> None:
    """Writes a folder that transformers, vLLM and ours open as it is. The weights come last: a folder that has them is
    whole.

    Args:
        dtype: of the weights in the files.
        max_shard: bytes that one of them may have.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MiniGLMError(f"建不了这个目录（{error.strerror}）", path=folder) from None
    stops = sorted(tokenizer.stop_ids)
    config = model.config.to_hf() | {
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": stops,
        "pad_token_id": tokenizer.end_of_text,
        "bos_token_id": None,
    }
    generation = {"eos_token_id": stops, "pad_token_id": tokenizer.end_of_text, "do_sample": False}
    tokenizer.save(folder, model_max_length=model.config.max_position_embeddings)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        write_whole(folder / name, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    tensors = {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    save_weights(folder, tensors, dtype, max_shard)


def save_weights(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, max_shard: int = MAX_SHARD
) -> None:
    """Writes the weights of a model folder, in one file or in several with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and filled + size > max_shard:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
        total += size
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        on_cpu = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in shard.items()}
        write_whole(folder / name, safetensors.torch.save(on_cpu, metadata={"format": "pt"}))
    if len(shards) > 1:
        owners = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": owners}
        write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")
    # What an earlier model left in the other form would be read in place of this one.
    (folder / (INDEX if len(shards) == 1 else WEIGHTS)).unlink(missing_ok=True)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model folder's weights: one, or those that its index names.

    Raises:
        MiniGLMError: the index is broken or names a file outside the folder.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    owners = _read_json(folder / INDEX).get("weight_map")
    names = (
        set(owners.values()) if isinstance(owners, dict) and all(isinstance(v, str) for v in owners.values()) else ()
    )
    if not names:
        raise MiniGLMError("没有 weight_map，不是权重的索引", path=folder / INDEX, fix="请重新复制或下载完整的目录")
    for name in names:
        # A name from the net must not lead out of the folder.
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise MiniGLMError(f"索引里的文件名是 {name!r}，应为本目录里的 .safetensors 文件", path=folder / INDEX)
    return [folder / name for name in sorted(names)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise MiniGLMError("缺少这个文件", path=path, fix="这个目录不完整，请重新训练或复制完整的目录") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MiniGLMError(
            f"读不了，应为 JSON（{error}）", path=path, fix="文件损坏，请重新训练或复制完整的目录"
        ) from None
    if not isinstance(content, dict):
        raise MiniGLMError("应为一个 JSON 对象", path=path, fix="文件损坏，请重新训练或复制完整的目录")
    return content


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, its header checked against the file's size before anything is read.

    Raises:
        MiniGLMError: missing, cut short, or not such a file.
    """
    _, metadata = read_header(path)
    try:
        return safetensors.torch.load_file(path), metadata
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise MiniGLMError(f"不是有效的 safetensors 文件（{error}）", path=path, fix=BROKEN) from None


BROKEN = "文件损坏或没有写完，请重新训练或复制完整的文件"


def read_header(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The shape of each tensor of a safetensors file, and its metadata; the header is checked against the file's size.

    Raises:
        MiniGLMError: missing, cut short, or not such a file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < length <= min(MAX_HEADER, size - 8):
                raise MiniGLMError(f"不是完整的 safetensors 文件（{size} 字节）", path=path, fix=BROKEN)
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        if max(ends, default=0) != size - 8 - length:
            raise MiniGLMError(
                f"应有 {8 + length + max(ends, default=0):,} 字节，实有 {size:,} 字节", path=path, fix=BROKEN
            )
        return {name: list(entry["shape"]) for name, entry in header.items()}, metadata
    except FileNotFoundError:
        raise MiniGLMError("缺少这个文件", path=path, fix="这个目录不完整，请重新训练或复制完整的目录") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise MiniGLMError(f"不是有效的 safetensors 文件（{error}）", path=path, fix=BROKEN) from None


def read_config(folder: Path) -> ModelConfig:
    """A model folder's sizes.

    Raises:
        MiniGLMError: there is no such folder, or its config.json is not one of a GLM.
    """
    if not folder.is_dir():
        raise MiniGLMError("没有这个模型目录", path=folder)
    try:
        return ModelConfig.from_hf(_read_json(folder / "config.json"))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise MiniGLMError(f"不是能用的 GLM 配置：{error}", path=folder / "config.json") from None


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[GLM, Tokenizer]:
    """A model folder's model, ready to run, and its tokenizer.

    Args:
        dtype: of the weights in memory, whatever the file has.

    Raises:
        MiniGLMError: a missing, cut or contradictory file; the text names it.
    """
    if folder.is_dir() and _read_json(folder / "config.json").get("model_type") == "gpt2":  # converted, see there
        from miniglm.interop.gpt2 import load_gpt2

        return load_gpt2(folder, device, dtype)
    config = read_config(folder)
    files = weight_files(folder)
    mismatch = "权重与 config.json 不符"
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise MiniGLMError(
            f"分词器有 {tokenizer.vocab_size} 个 token，模型只有 {config.vocab_size} 个",
            path=folder,
            fix="两者不是一套",
        )
    found = {name: file for file in files for name in read_header(file)[0]}
    if config.num_hidden_layers > len(found):  # before millions of layers are built only to be compared
        what = f"缺少张量：config.json 有 {config.num_hidden_layers} 层，这里只有 {len(found)} 个张量"
        raise MiniGLMError(what, path=files[0], fix=mismatch)
    with torch.device("meta"):
        model = GLM(config).to(dtype)
    parameters = dict(model.state_dict())
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
        del parameters["lm_head.weight"]
    for name, expected in parameters.items():
        if name not in found:
            raise MiniGLMError(f"缺少张量 {name}，应为 {tuple(expected.shape)}", path=files[0], fix=mismatch)
    if extra := sorted(set(found) - set(parameters)):
        raise MiniGLMError(f"多出张量 {extra[0]} 等 {len(extra)} 个", path=found[extra[0]], fix=mismatch)
    for file in files:
        shapes = read_header(file)[0]
        for name in shapes.keys() & parameters.keys():
            if shapes[name] != list(parameters[name].shape):
                is_not = f"是 {tuple(shapes[name])}，应为 {tuple(parameters[name].shape)}"
                raise MiniGLMError(f"张量 {name} {is_not}", path=file, fix=mismatch)
    model = model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    parameters = dict(model.state_dict())
    for file in files:  # one at a time: what a large model needs in memory is itself and one file
        for name, tensor in read_safetensors(file)[0].items():
            if tensor.dtype not in FLOATS:
                raise MiniGLMError(
                    f"张量 {name} 的类型是 {tensor.dtype}，应为 float32、bfloat16 或 float16",
                    path=file,
                    fix="用没有量化过的权重",
                )
            if name in found:
                parameters[name].copy_(tensor)
    tokenizer.allow_unused(config.vocab_size)
    return model.eval(), tokenizer


def save_state(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """One safetensors file that holds everything resuming needs, `meta` as JSON in its metadata."""
    flat = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT} | dict(meta))
    write_whole(path, safetensors.torch.save(flat, metadata={"miniglm": text}))


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote.

    Raises:
        MiniGLMError: damaged, or of another format.
    """
    tensors, metadata = read_safetensors(path)
    try:
        meta: dict[str, Any] = json.loads(metadata["miniglm"])
        found = meta["format"]
    except (KeyError, ValueError, TypeError):
        raise MiniGLMError("不是 miniGLM 的训练状态", path=path, fix="换一个 --out 目录") from None
    if found != FORMAT:
        raise MiniGLMError(
            f"训练状态的格式是 {found}，这个版本只认 {FORMAT}", path=path, fix="换一个 --out 目录重新训练"
        )
    return tensors, meta


def optimizer_tensors(optimizers: Sequence[Optimizer]) -> tuple[dict[str, Tensor], list[Any]]:
    """The optimizers' state: tensors under `optimizer/parameter/name`, and the other values."""
    tensors: dict[str, Tensor] = {}
    others: list[Any] = []
    for number, optimizer in enumerate(optimizers):
        values: dict[str, Any] = {}
        for parameter, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{number}/{parameter}/{name}"] = value
                else:
                    values[f"{parameter}/{name}"] = value
        others.append(values)
    return tensors, others


def restore_optimizers(optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor], others: Sequence[Any]) -> None:
    """Puts back what `optimizer_tensors` took. Rates and other settings stay as the optimizers were built with.

    Raises:
        MiniGLMError: it is the state of other optimizers.
    """
    sizes = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in optimizers]
    if len(others) != len(sizes) or any(int(key.split("/")[1]) >= sizes[int(key.split("/")[0])] for key in tensors):
        raise MiniGLMError(
            f"训练状态里的优化器（{len(others)} 个）与现在的（{len(sizes)} 个）不符", fix="换一个 --out 目录重新训练"
        )
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            owner, parameter, name = key.split("/")
            if int(owner) == number:
                state.setdefault(int(parameter), {})[name] = tensor
        for key, value in others[number].items():
            parameter, name = key.split("/")
            state.setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_tensors() -> dict[str, Tensor]:
    """The state of torch's random numbers, on the CPU and on every GPU."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `rng_tensors` took; GPUs that are no longer there are passed over."""
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)


class RunFolder:
    """A folder that holds one run, marked by run.json."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def create_or_open(self) -> None:
        """Makes or opens the folder.

        Raises:
            MiniGLMError: something else is there, or a run of another version.
        """
        mark = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise MiniGLMError("这是一个文件，应为运行目录", path=self.path, fix="换一个 --out")
        if not mark.exists():
            if self.path.exists() and any(not p.name.startswith(TEMPORARY) for p in self.path.iterdir()):
                raise MiniGLMError(
                    "不是 miniGLM 的运行目录（里面有别的文件）", path=self.path, fix="换一个空的或新的 --out"
                )
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise MiniGLMError(f"建不了这个目录（{error.strerror}）", path=self.path, fix="换一个 --out") from None
            write_whole(mark, json.dumps({"format": FORMAT, "miniglm": __version__}) + "\n")
        found = _read_json(mark)
        if found.get("format") != FORMAT:
            raise MiniGLMError(
                f"运行目录的格式是 {found.get('format')!r}（miniglm {found.get('miniglm', '?')} 所做），这个版本只认 {FORMAT}",
                path=mark,
                fix="换一个 --out，或用那个版本打开",
            )
        with contextlib.suppress(OSError):
            clean_temporaries(self.path)
