"""Weights as files: safetensors, each with the checksum of itself in its metadata, and a model folder's weights in one
of them or in several with an index. Knows nothing of what the tensors are.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from miniglm.config import INCOMPLETE
from miniglm.errors import MiniGLMError
from miniglm.files import CHECKSUM, file_digest, read_json, write_whole, written_whole

MAX_HEADER = 100 * 2**20
"""safetensors' own bound on its header, bytes."""
CHUNK = 2**20
DESCRIBING = ("config.json", "tokenizer.json")
"""Files of a model folder without which its weights mean something else; the weights' metadata has their checksums."""
MAX_SHARD = 5 * 10**9
"""Bytes of a weights file; a larger model is cut into several with an index, as transformers does."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


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


def give_memory(model: nn.Module, device: str) -> None:
    """Brings a model from the meta device to another, its weights still to be read. As `nn.Module.to_empty`, which
    imports sympy on the way."""
    empty = {n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)
