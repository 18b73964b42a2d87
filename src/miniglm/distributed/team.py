"""What processes that train together tell each other: who does what is done once, and what they agree on.

Everything sent is numbers and JSON, never a pickle. Knows nothing of models.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from miniglm.distributed import launch
from miniglm.errors import MiniGLMError

if TYPE_CHECKING:
    from miniglm.dataset import Batch

T = TypeVar("T")

SILENCE = timedelta(minutes=10)
"""So long a process waits for another in the midst of training before it gives up: longer than any step or saving. A
process that dies is noticed at once, by its closed connections."""
PATIENCE = timedelta(days=7)
"""So long the others wait while the first one prepares the corpus."""

_patient: dist.ProcessGroup | None = None


def join() -> None:
    """Meets the other processes that torchrun has started, if there are any. Tensors on CPUs go through gloo, those on
    GPUs through NCCL.

    Raises:
        MiniGLMError: they do not answer.
    """
    global _patient
    if launch.size() == 1 or _patient is not None:
        return
    if torch.cuda.is_available() and launch.local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(launch.local_rank())
    with connected():
        if not dist.is_initialized():  # Ray has done it
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(
                backend, store=_meet(), rank=launch.rank(), world_size=launch.size(), timeout=SILENCE
            )
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    atexit.register(_leave)


def _leave() -> None:
    """Takes the connections down while their threads can still be ended: left to the end of the process, C++ often
    takes a thread away while it runs, and the process ends with SIGABRT though all its work is done."""
    global _patient
    _patient = None
    if dist.is_initialized():  # Ray ends it itself
        dist.destroy_process_group()


def _meet() -> Any:
    """A store of this attempt's own, kept by the first process. torchrun (of torch 2.13) keeps one store over all its
    restarts, and what an earlier attempt's processes left there would be taken for this one's."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _store(int(os.environ["MASTER_PORT"]), is_master=launch.is_first(), timeout=SILENCE)
    kept = _store(int(os.environ["MASTER_PORT"]), timeout=SILENCE)
    if launch.is_first():
        own = _store(0, is_master=True, timeout=SILENCE)
        kept.set("miniglm/port", str(own.port))
        return own
    end = time.monotonic() + SILENCE.total_seconds()
    while time.monotonic() < end:
        port = int(kept.get("miniglm/port"))
        with contextlib.suppress(OSError):  # behind an earlier attempt's port nobody listens any more
            socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=5).close()
            return _store(port, timeout=SILENCE)
        time.sleep(0.1)
    raise RuntimeError("the first process is not there")


def _store(port: int, *, timeout: timedelta, is_master: bool = False) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], port, is_master=is_master, wait_for_workers=False, timeout=timeout
    )


def is_first_to_fail() -> bool:
    """Whether no other process has asked this before, in this attempt of torchrun's."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with contextlib.suppress(RuntimeError):
        store = _store(int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=5))
        return bool(store.add(f"miniglm/failed/{attempt}", 1) == 1)
    return True


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Around what processes do together.

    Raises:
        MiniGLMError: one of them is gone or does not answer.
    """
    try:
        yield
    except RuntimeError as error:  # gloo raises no other
        raise _out_of_touch(error) from None


def lost(error: BaseException) -> MiniGLMError | None:
    """What to tell the user of an error from within torch's own exchanges (FSDP's, in the midst of the model), if it
    says that another process is gone."""
    ours = isinstance(error, (dist.DistError, dist.DistBackendError)) or "gloo/transport" in str(error)
    return _out_of_touch(error) if launch.size() > 1 and ours else None


def _out_of_touch(error: BaseException) -> MiniGLMError:
    reason = str(error).strip().split("\n")[0][:200]
    return MiniGLMError(
        f"与一起训练的其他进程失去联系（{reason}）",
        fix="看看它们的输出；用 torchrun --max-restarts 时会自动从上次保存的状态重来，否则再运行同一条命令",
    )


def tell(value: Any) -> Any:
    """What the first process gives, for all; anything JSON can hold. Alone: the value."""
    if launch.size() == 1:
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor([len(data)])
    with connected():
        dist.broadcast(length, 0, group=_patient)
        if not launch.is_first():
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0, group=_patient)
    return json.loads(bytes(data.tolist()))


def on_first(work: Callable[[], T]) -> T | None:
    """What the first process alone does, while the others wait: its result there, None elsewhere. If it fails, so do
    all: the first with its error, the others silently."""
    if not launch.is_first():
        if not tell(None):
            raise SystemExit(1)
        return None
    try:
        result = work()
    except BaseException:
        with contextlib.suppress(MiniGLMError):
            tell(False)
        raise
    tell(True)
    return result


def total(value: float) -> float:
    """The sum of what each process gives."""
    if launch.size() == 1:
        return value
    summed = torch.tensor([value], dtype=torch.float64)
    with connected():
        dist.all_reduce(summed)
    return float(summed)


def share(batches: Iterable[Batch]) -> Iterator[Batch]:
    """This process's share of the batches. All get equally many, since a sharded model needs them all for each: who
    would have none gets one without targets."""
    group: list[Batch] = []
    size, own = launch.size(), launch.rank()
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group[own]
            group = []
    if group:
        yield group[own] if own < len(group) else group[0].without_targets()
