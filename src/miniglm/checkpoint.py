"""What is saved: the model folder (a Hugging Face folder), the resumable state, the run folder's mark.

safetensors and JSON only, never a pickle. Every file is written under a temporary name and renamed, so a run killed
at any moment leaves each file as it was or as it should be. A safetensors file holds the checksum of itself in its
metadata, so weights and checksum change in the same rename; the state before the last one is kept beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from miniglm import __version__
from miniglm.errors import MiniGLMError
from miniglm.files import (
    CHECKSUM,
    TEMPORARY,
    clean_temporaries,
    file_digest,
    read_json,
    write_json,
    write_whole,
    written_whole,
)
from miniglm.locking import HOLDER, LOCK, REPORT, hold, is_held
from miniglm.model import GLM, ModelConfig
from miniglm.tokenizer import Tokenizer

FORMAT = 1
"""Number of the run folder's and the state's layout; another number is not read."""
MAX_HEADER = 100 * 2**20
"""safetensors' own bound on its header, bytes."""
CHUNK = 2**20
INCOMPLETE = "这个目录不完整，请重新训练或复制完整的目录"
DESCRIBING = ("config.json", "tokenizer.json")
"""Files of a model folder without which its weights mean something else; the weights' metadata has their checksums."""


MAX_SHARD = 5 * 10**9
"""Bytes of a weights file; a larger model is cut into several with an index, as transformers does."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def save_model(
    folder: Path,
    model: GLM,
    tokenizer: Tokenizer,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard: int = MAX_SHARD,
) -> None:
    """Writes a folder that transformers, vLLM and ours open as it is. The weights come last: a folder that has them is
    whole.

    Args:
        weights: the model's, where it does not hold them itself.
        dtype: of the weights in the files.
        max_shard: bytes that one of them may have.

    Raises:
        MiniGLMError: a weight is not finite (nothing is written then), or the folder cannot be written to.
    """
    weights = model.state_dict() if weights is None else weights
    if not all_finite(weights.values()):
        raise MiniGLMError(
            "模型的权重里有 NaN 或无穷大，不保存", path=folder, fix="把学习率减半，换一个 --out 重新训练"
        )
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
        for name, tensor in weights.items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    save_weights(folder, tensors, dtype, max_shard)


def save_weights(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, max_shard: int = MAX_SHARD
) -> None:
    """Writes the weights of a model folder, in one file or in several with an index; the other files are there."""
    described = {name: file_digest(folder / name, text=True) for name in DESCRIBING}
    metadata = {"format": "pt", "files": json.dumps(described)}
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
        write_safetensors(folder / name, on_cpu, metadata)
    if len(shards) > 1:
        owners = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": owners}
        write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")
    # What an earlier model left in the other form would be read in place of this one.
    (folder / (INDEX if len(shards) == 1 else WEIGHTS)).unlink(missing_ok=True)


def has_weights(folder: Path) -> bool:
    """Whether a model folder is whole: its weights, or their index, are written last."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model folder's weights: one, or those that its index names.

    Raises:
        MiniGLMError: the index is broken or names a file outside the folder.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    owners = read_json(folder / INDEX, fix=INCOMPLETE).get("weight_map")
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


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether there is no NaN and no infinity in them. A sum of finite weights is finite; one pass, no array made."""
    return all(bool(torch.isfinite(tensor.detach().float().sum())) for tensor in tensors)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], previous: Path | None = None
) -> None:
    """A safetensors file, whole or not at all, with its own checksum in its metadata.

    Args:
        previous: the name that the file it replaces takes (see `files.written_whole`).
    """
    content = memoryview(safetensors.torch.save(dict(tensors), metadata=dict(metadata)))
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(bytes(content[8 : 8 + length])), content[8 + length :]
    # safetensors writes metadata in any order: the same model gives the same bytes.
    header["__metadata__"] = dict(sorted(metadata.items()))
    header["__metadata__"][CHECKSUM] = _seal(header, [data])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with written_whole(path, previous) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(data)


def _seal(header: Mapping[str, Any], chunks: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of a safetensors header less the checksum in it, and of the data."""
    metadata = {key: value for key, value in header["__metadata__"].items() if key != CHECKSUM}
    found = hashlib.sha256(json.dumps(dict(header) | {"__metadata__": metadata}, sort_keys=True).encode())
    for chunk in chunks:
        found.update(chunk)
    return found.hexdigest()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, its header checked against the file's size before anything is read,
    and all of it against the checksum, if it has one (files of other programs have none).

    Raises:
        MiniGLMError: missing, cut short, changed, or not such a file.
    """
    _, metadata = read_header(path)
    try:
        if CHECKSUM in metadata:
            with path.open("rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
                if metadata[CHECKSUM] != _seal(header, iter(lambda: file.read(CHUNK), b"")):
                    raise MiniGLMError("文件损坏：内容与写好时的校验和不符", path=path, fix=BROKEN)
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
        raise MiniGLMError("缺少这个文件", path=path, fix=INCOMPLETE) from None
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
        return ModelConfig.from_hf(read_json(folder / "config.json", fix=INCOMPLETE))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise MiniGLMError(f"不是能用的 GLM 配置：{error}", path=folder / "config.json") from None


def give_memory(model: nn.Module, device: str) -> None:
    """Brings a model from the meta device to another, its weights still to be read. As `nn.Module.to_empty`, which
    imports sympy on the way."""
    empty = {n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[GLM, Tokenizer]:
    """A model folder's model, ready to run, and its tokenizer.

    Args:
        dtype: of the weights in memory, whatever the file has.

    Raises:
        MiniGLMError: a missing, cut or contradictory file; the text names it.
    """
    if (
        folder.is_dir() and read_json(folder / "config.json", fix=INCOMPLETE).get("model_type") == "gpt2"
    ):  # converted, see there
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
    headers = {file: read_header(file) for file in files}
    found = {name: file for file, (shapes, _) in headers.items() for name in shapes}
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
    for file, (shapes, _) in headers.items():
        for name in shapes.keys() & parameters.keys():
            if shapes[name] != list(parameters[name].shape):
                is_not = f"是 {tuple(shapes[name])}，应为 {tuple(parameters[name].shape)}"
                raise MiniGLMError(f"张量 {name} {is_not}", path=file, fix=mismatch)
    for name, digest in json.loads(headers[files[0]][1].get("files", "{}")).items():
        if name in DESCRIBING and file_digest(folder / name, text=True) != digest:
            raise MiniGLMError("内容与保存模型时的校验和不符", path=folder / name, fix=INCOMPLETE)
    give_memory(model, device)
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
    """One safetensors file that holds everything resuming needs, `meta` as JSON in its metadata. The state that was
    there stays as `previous_state(path)`."""
    flat = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT} | dict(meta))
    write_safetensors(path, flat, {"miniglm": text}, previous_state(path))


def previous_state(path: Path) -> Path:
    """Where the state before the last one is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_last_state(path: Path, warn: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The last state that is whole: the one at `path`, or the one before it; None where there is neither. A damaged
    one is moved aside, so that it does not become the one before the last.

    Args:
        warn: told, in a line, that the last state is damaged and the one before it is used.

    Raises:
        MiniGLMError: what is there is damaged.
    """
    previous = previous_state(path)
    if not path.exists():
        return load_state(previous) if previous.exists() else None
    try:
        return load_state(path)
    except MiniGLMError as error:
        if not previous.exists():
            raise
        found = load_state(previous)
        path.replace(path.with_name(f"{path.stem}.damaged{path.suffix}"))
        warn(f"{error.path}：{error.what}；改用它前面的一个状态（第 {found[1].get('step')} 步）")
        return found


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
    """A folder that holds one run, marked by run.json. Open, it belongs to this process until this object is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def create_or_open(self) -> None:
        """Makes or opens the folder.

        Raises:
            MiniGLMError: something else is there, a run of another version, or another process works on it.
        """
        mark = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise MiniGLMError("这是一个文件，应为运行目录", path=self.path, fix="换一个 --out")
        if not mark.exists():
            ours = (TEMPORARY, LOCK, HOLDER)  # of a process killed before it could write the mark
            if self.path.exists() and any(not p.name.startswith(ours) for p in self.path.iterdir()):
                raise MiniGLMError(
                    "不是 miniGLM 的运行目录（里面有别的文件）", path=self.path, fix="换一个空的或新的 --out"
                )
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise MiniGLMError(f"建不了这个目录（{error.strerror}）", path=self.path, fix="换一个 --out") from None
        else:
            _check_format(mark)  # a run of another version is not touched, not even by a lock
        self.lock = hold(self.path)
        if not mark.exists():
            write_json(mark, {"format": FORMAT, "miniglm": __version__}, indent=None)
        with contextlib.suppress(OSError):
            # An evaluation, which only reads the run, may be writing its report meanwhile.
            clean_temporaries(self.path, but=self.path / "report" if is_held(self.path, REPORT) else None)

    def open_to_evaluate(self) -> None:
        """Opens a run to read it and write its report, whoever else works on the rest of it.

        Raises:
            MiniGLMError: not a run folder, a run of another version, or another process evaluates it.
        """
        _check_format(self.path / "run.json")
        self.lock = hold(self.path, REPORT, what="运行的评测报告", fix="等它结束再评测")
        with contextlib.suppress(OSError):
            clean_temporaries(self.path / "report")


def _check_format(mark: Path) -> None:
    found = read_json(mark, fix="换一个 --out，或从别的运行目录复制这个文件")
    if found.get("format") != FORMAT:
        raise MiniGLMError(
            f"运行目录的格式是 {found.get('format')!r}（miniglm {found.get('miniglm', '?')} 所做），这个版本只认 {FORMAT}",
            path=mark,
            fix="换一个 --out，或用那个版本打开",
        )
