"""The engine as the server sees it: requests go to its process (engine.py) from the event loop or any thread, tokens
come back to them.

Knows tokens only: nothing of text, HTTP or pages.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import logging
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from miniglm.errors import MiniGLMError
from miniglm.sampling import SamplingSettings, Token
from miniglm.serving.engine import Add, Drop, News, Order, Ready, run_engine
from miniglm.serving.settings import Limits

if TYPE_CHECKING:
    from miniglm.model import GLM

log = logging.getLogger(__name__)

CONTEXT = multiprocessing.get_context("spawn")  # a fork would take torch's threads along as they happen to be
END_SECONDS = 5.0
"""For the engine's process to end by itself; a step takes a fraction of it."""


class QueueFull(Exception):
    """No slot and no place in the queue."""


class ShuttingDown(Exception):
    """Nothing new is taken any more."""


class Request:
    """A sequence that is being made. Its tokens are read once, by one reader: `async for token in request` in the event
    loop where it was submitted, or `for token in request` in any other thread.

    Attributes:
        finish_reason: None while it runs, then "stop", "length" or "cancelled".
    """

    def __init__(self, worker: Worker, number: int, logprobs: int | None) -> None:
        self.number, self.logprobs = number, logprobs
        self.finish_reason: str | None = None
        self._worker = worker
        self._tokens: deque[Token] = deque()
        self._failure: str | None = None
        self._done = False
        self._arrived = threading.Event()
        self._reader: asyncio.Future[None] | None = None  # waits for what arrives
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None

    def cancel(self) -> None:
        """Nobody waits for it any more: it is dropped before the next step. From any thread; twice is once."""
        self._worker._cancel(self)

    def _take(self) -> list[Token]:
        """All tokens that have arrived."""
        taken: list[Token] = []
        while self._tokens:
            taken.append(self._tokens.popleft())
        return taken

    @property
    def ended(self) -> bool:
        """Its end is known, it did not fail, and all its tokens have been read."""
        return self._done and not self._tokens and self._failure is None

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"generation failed: {self._failure}")

    async def batches(self) -> AsyncIterator[list[Token]]:
        """What arrived since the last look, one token or more: a reader that is slower than the engine is not asked
        to do its work for each token. Leaving early cancels the request."""
        try:
            while True:
                done = self._done  # before the look: what comes between is found next time
                if tokens := self._take():
                    yield tokens
                elif done:
                    self._check()
                    return
                else:  # whoever brings news is in the event loop too, so that none is missed
                    self._reader = asyncio.get_running_loop().create_future()
                    await self._reader
        finally:
            if not self._done:
                self.cancel()

    async def __aiter__(self) -> AsyncIterator[Token]:
        async for tokens in self.batches():
            for token in tokens:
                yield token

    def __iter__(self) -> Iterator[Token]:
        try:
            while True:
                self._arrived.clear()
                done = self._done
                if tokens := self._take():
                    yield from tokens
                elif done:
                    self._check()
                    return
                else:
                    self._arrived.wait()
        finally:
            if not self._done:
                self.cancel()

    def _hear(self, news: News) -> None:
        """On the worker's thread; its reader is woken afterwards."""
        self._tokens.extend(news.tokens)
        if news.last:
            self.finish_reason, self._failure = news.finish_reason, news.failure
            self._done = True  # last: who sees it sees the rest


def _wake(requests: Sequence[Request]) -> None:
    for request in requests:
        reader = request._reader
        if reader is not None and not reader.done():
            reader.set_result(None)


class Worker:
    """Runs a model for many requests at once, first come first served, in a process of its own, which begins at once;
    `ready` waits for it. A process that dies takes its requests with it, and another one follows.

    Args:
        load: makes the model, in the engine's process: something that can be pickled.
        limits: `slots` and `queue` of them are meant here.
    """

    def __init__(self, load: Callable[[], GLM], limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.tokens = 0
        self._load = load
        self._change = threading.Condition()
        self._open: dict[int, Request] = {}
        self._numbers = itertools.count()
        self._closing = False
        self._first: Ready | MiniGLMError | None = None
        self._begin()
        self._thread = threading.Thread(target=self._listen, name="miniglm-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, 0.0)  # before multiprocessing waits for its processes

    def _begin(self) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=run_engine, args=(theirs, self._load, self.limits.slots), daemon=True)
        with _no_interrupts():
            self._process.start()
        theirs.close()

    def ready(self) -> Ready:
        """What the model is like, once it is there.

        Raises:
            MiniGLMError: it could not be loaded.
        """
        with self._change:
            self._change.wait_for(lambda: self._first is not None)
        assert self._first is not None
        if isinstance(self._first, MiniGLMError):
            raise self._first
        return self._first

    @property
    def running(self) -> int:
        """Sequences at work."""
        return min(len(self._open), self.limits.slots)

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return max(0, len(self._open) - self.limits.slots)

    def submit(self, prompt: Sequence[int], settings: SamplingSettings, *, logprobs: int | None = None) -> Request:
        """Puts a sequence into the queue.

        Args:
            logprobs: its tokens come with their log-probability and so many of the most probable ones.

        Raises:
            QueueFull: as many run and wait as the limits allow.
            ShuttingDown: after `close`.
            ValueError: an empty prompt.
        """
        if not prompt:
            raise ValueError("an empty prompt")
        with self._change:
            if self._closing:
                raise ShuttingDown
            if len(self._open) >= self.limits.slots + self.limits.queue:
                raise QueueFull
            request = Request(self, next(self._numbers), logprobs)
            self._open[request.number] = request
            self._send(Add(request.number, prompt, settings, logprobs))
        return request

    def close(self, timeout: float) -> None:
        """Takes nothing new, lets what is there finish for `timeout` seconds, drops the rest, and ends the process."""
        with self._change:
            self._closing = True
            if not self._change.wait_for(lambda: not self._open, timeout):
                for number in self._open:
                    self._send(Drop(number))
                self._change.wait_for(lambda: not self._open, END_SECONDS)
            self._send(None)
            loading = self._first is None
        # Only that thread asks how the process ended: of two that ask at once, one may be told nothing, or nonsense.
        self._thread.join(0.0 if loading else END_SECONDS)
        self._process.kill()
        self._thread.join()
        atexit.unregister(self.close)

    def _cancel(self, request: Request) -> None:
        if request._done:  # most are
            return
        with self._change:
            if request.number in self._open:
                self._send(Drop(request.number))

    def _send(self, order: Order) -> None:
        with contextlib.suppress(OSError):  # it has died: `_listen` sees to that
            self._pipe.send(order)

    # From here on: on the worker's thread.

    def _listen(self) -> None:
        while True:
            try:
                news = self._pipe.recv()
            except (EOFError, OSError):
                if not self._follow():
                    return
                continue
            if isinstance(news, Ready | MiniGLMError):
                if self._first is not None and isinstance(news, MiniGLMError):  # the folder has changed since
                    log.error("%s", news)
                with self._change:
                    self._first = news
                    self._change.notify_all()
            else:
                self._deliver(news)

    def _follow(self) -> bool:
        """After the process has ended: its requests have failed, and another one begins where that makes sense."""
        self._process.join()
        failure = f"the engine's process ended with exit code {self._process.exitcode}"
        with self._change:
            lost = [News(number, [], failure=failure) for number in self._open]
            again = not self._closing and isinstance(self._first, Ready)
            if self._first is None:
                self._first = MiniGLMError("载入模型的进程中途结束了", fix="内存可能不够；关掉别的程序再试")
            self._closing |= not again
            if again:
                log.error("生成的进程意外结束（退出码 %s），正在重新启动", self._process.exitcode)
                self._begin()
            self._change.notify_all()
        self._deliver(lost)
        return again

    def _deliver(self, news: Sequence[News]) -> None:
        told: list[Request] = []
        with self._change:
            for each in news:
                request = self._open[each.number]
                self.tokens += len(each.tokens)
                if each.last:
                    del self._open[each.number]
                request._hear(each)
                told.append(request)
            self._change.notify_all()
        # One call into each event loop, not one for each sequence: the loop is woken through a socket.
        loops: dict[asyncio.AbstractEventLoop, list[Request]] = {}
        for request in told:
            request._arrived.set()
            if request._loop is not None:
                loops.setdefault(request._loop, []).append(request)
        for loop, requests in loops.items():
            try:
                loop.call_soon_threadsafe(_wake, requests)
            except RuntimeError:  # the loop is closed: its readers have gone
                for request in requests:
                    self._cancel(request)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """A process that begins here never sees a Ctrl-C, not even before it can say that it does not want to."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
