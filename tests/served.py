"""Servers at a real port, on a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from miniglm.generation import ContinuousBatch
from miniglm.model import GLM
from miniglm.sampling import Event
from miniglm.serving.app import create_app
from miniglm.serving.book import BookService
from miniglm.serving.engine import load_served
from miniglm.serving.guards import State
from miniglm.serving.server import bind, uvicorn_server
from miniglm.serving.service import LocalService
from miniglm.serving.settings import Limits
from miniglm.serving.worker import Worker
from miniglm.tokenizer import Tokenizer

MODEL = "small"


@dataclass
class Running:
    """A server at work."""

    url: str
    port: int
    service: LocalService
    state: State


Start = Callable[..., contextlib.AbstractContextManager[Running]]


def local_service(folder: Path, limits: Limits, load: Callable[[], GLM] | None = None) -> LocalService:
    """A model folder's model, its engine at work; to be closed."""
    worker = Worker(load or partial(load_served, folder, "cpu"), limits)
    return LocalService(MODEL, Tokenizer.load(folder), worker)


def slow(load: Callable[[], GLM], steps: Path) -> GLM:
    """A model, in a process that has nothing else to do, whose steps are slow, so that they can be counted whatever else
    the machine does; each leaves a byte in `steps`."""
    step = ContinuousBatch.step

    def slow_step(batch: ContinuousBatch) -> list[Event]:
        time.sleep(0.4)
        with steps.open("ab") as file:
            file.write(b".")
        return step(batch)

    ContinuousBatch.step = slow_step  # type: ignore[assignment]
    return load()


@contextlib.contextmanager
def serving(
    folder: Path,
    limits: Limits | None = None,
    *,
    api_key: str | None = None,
    cors: tuple[str, ...] = (),
    book: BookService | None = None,
    load: Callable[[], GLM] | None = None,
) -> Iterator[Running]:
    """The server as `miniglm serve` runs it, less the page, on a thread of this process; its engine has a process of its
    own.

    Args:
        load: makes the model there, in place of reading the folder's.
    """
    limits, state = limits or Limits(), State()
    service = local_service(folder, limits, load)
    sock = bind("127.0.0.1", 0)
    app = create_app(service, limits, state, api_key=api_key, cors=cors, page=False, book=book)
    ready = threading.Event()

    async def drain() -> None: ...

    server = uvicorn_server(app, limits, state, ready.set, drain)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    thread.start()
    assert ready.wait(60)
    port = sock.getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", port, service, state)
    finally:
        server.should_exit = True
        thread.join()
        service.close(0)


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for something that happens soon; a minute is for a machine that is busy with other things."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"never: {what}")
