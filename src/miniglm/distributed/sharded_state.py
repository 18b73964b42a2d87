"""The state of a sharded run, through torch.distributed.checkpoint: each process writes its share, and any number of
processes reads it, one too.

A folder `state-STEP` with safetensors files (torch's pickled format is not used) and, written last, `state.json`: what
is no tensor, and the files' checksums. The folder gets its name when it is whole, and the one before it stays.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from miniglm.checkpoint import FORMAT, previous_state
from miniglm.distributed.team import connected, on_first, tell
from miniglm.errors import MiniGLMError
from miniglm.files import TEMPORARY, check_digests, file_digests, read_json, write_json

MANIFEST = "state.json"
KEPT = 2
"""Sharded states that stay: the last, and the one before it."""

Make = Callable[[str, Sequence[int], torch.dtype], Tensor]
"""An empty tensor for a saved one's name, shape and type."""


def save_sharded(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes a state, each process its share. What is not shared out is written once.

    Args:
        path: where `checkpoint.save_state` would write it; the folder gets its name beside that.

    Raises:
        MiniGLMError: it cannot be written; the states that were there stay.
    """
    name = f"state-{meta['step']:08d}"
    folder, temporary = path.with_name(name), path.with_name(TEMPORARY + name)
    on_first(lambda: shutil.rmtree(temporary, ignore_errors=True))
    try:
        with connected():
            save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    except CheckpointException as error:  # of any process, told to all
        reason = "；".join(str(failure[0]) for failure in error.failures.values())
        on_first(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise MiniGLMError(
            f"写不了训练状态（{reason}），原来的没有动", path=path.parent, fix="请检查磁盘空间和文件夹的写权限"
        ) from None

    def finish() -> None:
        digests = file_digests(temporary, sorted(file.name for file in temporary.glob("*.safetensors")))
        write_json(temporary / MANIFEST, {"format": FORMAT, "meta": meta, "files": digests})
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        for old in list(_folders(path))[KEPT:]:
            shutil.rmtree(old)
        for old in (path, previous_state(path)):  # of a time when the model was not sharded
            old.unlink(missing_ok=True)

    on_first(finish)


def _folders(path: Path) -> Iterator[Path]:
    """The sharded states beside `path`, the last first."""
    found = [folder for folder in path.parent.glob("state-*") if re.fullmatch(r"state-\d{8}", folder.name)]
    yield from sorted(found, key=lambda folder: folder.name, reverse=True)


def drop_sharded(path: Path) -> None:
    """Removes sharded states, once there is a newer one of another kind."""
    for folder in _folders(path):
        shutil.rmtree(folder)


def load_sharded(
    path: Path, warn: Callable[[str], None], make: Make | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The last sharded state beside `path` that is whole; None where there is none. A damaged one is moved aside.

    Args:
        make: what to read a tensor into; it may be shared out otherwise than it was saved. Default: all of it.

    Raises:
        MiniGLMError: what is there is damaged.
    """
    found = tell(on_first(lambda: _last_whole(path, warn)))
    if found is None:
        return None
    folder, meta = path.with_name(found["name"]), found["meta"]
    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    make = make or (lambda name, shape, dtype: torch.empty(tuple(shape), dtype=dtype))
    tensors = {
        name: make(name, known.size, known.properties.dtype)
        for name, known in sorted(saved.items())
        if isinstance(known, TensorStorageMetadata)
    }
    with connected(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads alone
        load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return tensors, meta


def _last_whole(path: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    fix = "换一个 --out 目录重新训练"
    folders = list(_folders(path))
    for number, folder in enumerate(folders):
        try:
            manifest = read_json(folder / MANIFEST, fix=fix)
            check_digests(folder, manifest.get("files", {}), fix=fix)
            if manifest.get("format") != FORMAT:
                raise MiniGLMError(f"训练状态的格式是 {manifest.get('format')}，这个版本只认 {FORMAT}", path=folder)
            return {"name": folder.name, "meta": manifest["meta"]}
        except MiniGLMError as error:
            if number == len(folders) - 1:
                raise
            folder.rename(folder.with_name(f"damaged-{folder.name}"))
            warn(f"{error.path}：{error.what}；改用它前面的一个状态（{folders[number + 1].name}）")
    return None
