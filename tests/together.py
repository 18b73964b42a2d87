"""Several processes that train together: forked ones for a function, torchrun's for the command line. None outlives
its test."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from typing import Any

import psutil
import torch.distributed as dist
from running import ROOT

PRELOAD = ["pytest", "psutil", "miniglm.pipeline", "small_runs", "test_data_parallel", "test_sharding"]
"""Imported once, before the forks."""


def forking() -> ForkServerContext:
    """What forks processes from one in which torch has run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def together(size: int, work: Callable[..., Any], *arguments: Any, seconds: float = 180) -> None:
    """Calls `work(*arguments)` in `size` processes that have met; each must end well. `work` stands in a module."""
    # The parent's store, on a port that the system chose: nobody else can take it in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    context = forking()
    processes = [context.Process(target=_enter, args=(r, size, store.port, work, arguments)) for r in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not late, f"processes {late} did not end within {seconds} s"
    assert [process.exitcode for process in processes] == [0] * size


def _enter(rank: int, size: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    import torch

    from miniglm.distributed import team

    torch.set_num_threads(1)
    team.SILENCE = timedelta(seconds=120)
    team.join()
    work(*arguments)


@contextlib.contextmanager
def torchrun(
    processes: int,
    *arguments: Any,
    restarts: int = 0,
    options: tuple[str, ...] = ("--standalone",),
    within: str | None = None,
    **environment: str,
) -> Iterator[subprocess.Popen[str]]:
    """`torchrun … -m miniglm ARGUMENTS`; at the end of the block nothing of it is left.

    Args:
        within: a network namespace.
    """
    command = ["ip", "netns", "exec", within] if within else []
    command += [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.2", "-m", "miniglm", *map(str, arguments)]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment,
        cwd=ROOT,
    )
    try:
        yield started
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*workers(started), psutil.Process(started.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        started.wait()
        if started.stdout is not None:
            started.stdout.close()


def workers(started: subprocess.Popen[str]) -> list[psutil.Process]:
    """torchrun's processes, in the order of their ranks."""
    return sorted(psutil.Process(started.pid).children(recursive=True), key=lambda p: p.pid)


def wait_for(condition: Callable[[], bool], started: subprocess.Popen[str], seconds: float = 180) -> None:
    """Until the condition holds; fails where torchrun ends before, or it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert started.poll() is None, started.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)
