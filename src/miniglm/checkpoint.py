"""What is saved: the model folder (a Hugging Face folder), the resumable state, the run folder's mark.

safetensors (weights.py) and JSON only, never a pickle. Every file is written under a temporary name and renamed, so a
run killed at any moment leaves each file as it was or as it should be, weights and checksum in the same rename; the state
before the last one is kept beside it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from miniglm import __version__
from miniglm.config import INCOMPLETE, read_config
from miniglm.errors import MiniGLMError
from miniglm.files import (
    TEMPORARY,
    clean_temporaries,
    file_digest,
    read_json,
    write_json,
    write_whole,
)
from miniglm.locking import HOLDER, LOCK, REPORT, hold, is_held
from miniglm.model import GLM
from miniglm.tokenizer import Tokenizer
from miniglm.weights import (
    DESCRIBING,
    MAX_SHARD,
    all_finite,
    give_memory,
    read_header,
    read_safetensors,
    save_weights,
    weight_files,
    write_safetensors,
)

FORMAT = 1
"""Number of the run folder's and the state's layout; another number is not read."""
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
