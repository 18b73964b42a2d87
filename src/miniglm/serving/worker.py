"""The engine on a thread of its own: requests come from the event loop or any thread, tokens go back to them.

Knows tokens only: nothing of text, HTTP or pages.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence

from miniglm.generation import ContinuousBatch, Event, SamplingSettings, Token
from miniglm.model import GLM
from miniglm.serving.settings import Limits

PREFILL_TOKENS = 1024
"""Prompt tokens read in one step: what runs waits for them, a few hundredths of a second on a laptop."""

PIECES_PER_SECOND = 1000
"""How often readers in an event loop are woken, all together: with 32 running sequences about 30 times a second each.
Sending a piece costs about as much as a small model's token, however long the piece is."""

PIECES_EACH = 250
"""And how often each of them at most: no eye tells it from more."""


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

    def __init__(self, worker: Worker, prompt: Sequence[int], settings: SamplingSettings, logprobs: int | None) -> None:
        self.prompt, self.settings, self.logprobs = prompt, settings, logprobs
        self.finish_reason: str | None = None
        self._worker = worker
        self._tokens: deque[Token] = deque()
        self._error: BaseException | None = None
        self._done = False
        self._cancelled = False
        self._heard = False  # its reader knows of a token
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
        return self._done and not self._tokens and self._error is None

    def _check(self) -> None:
        if self._error is not None:
            raise RuntimeError("generation failed") from self._error

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

    # From here on: called on the engine's thread.

    def _finish(self, reason: str | None, error: BaseException | None = None) -> None:
        self.finish_reason, self._error, self._done = reason, error, True


def _wake(requests: Sequence[Request]) -> None:
    for request in requests:
        reader = request._reader
        if reader is not None and not reader.done():
            reader.set_result(None)


class Worker:
    """Runs a model for many requests at once, first come first served.

    Args:
        limits: `slots` and `queue` of them are meant here.
    """

    def __init__(self, model: GLM, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.context = model.config.max_position_embeddings
        self.tokens = 0
        self._model = model
        self._change = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._gone: list[Request] = []
        self._news: dict[Request, None] = {}  # whose readers are to be woken, in the order of the news
        self._woken = 0.0
        self._closing = False
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="miniglm-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Sequences at work."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

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
        request = Request(self, prompt, settings, logprobs)
        with self._change:
            if self._closing:
                raise ShuttingDown
            if len(self._waiting) + len(self._running) >= self.limits.slots + self.limits.queue:
                raise QueueFull
            self._waiting.append(request)
            self._change.notify()
        return request

    def close(self, timeout: float) -> None:
        """Takes nothing new, lets what is there finish for `timeout` seconds, drops the rest, and ends the thread."""
        with self._change:
            self._closing = True
            self._deadline = time.monotonic() + timeout
            self._change.notify()
        self._thread.join()

    def _cancel(self, request: Request) -> None:
        if request._done:  # most are, and the engine need not be waited for
            return
        with self._change:
            if not request._done and not request._cancelled:
                request._cancelled = True
                self._gone.append(request)
                self._change.notify()

    def _run(self) -> None:
        batch = self._new_batch()
        while self._wait():
            finished = self._drop(batch)
            try:
                self._admit(batch, finished)
                events = batch.step()
            except Exception as error:  # whatever it is: those who wait must hear of it, and the next must be served
                for request in self._running.values():
                    request._finish(None, error)
                    finished.append(request)
                self._running.clear()
                events, batch = [], self._new_batch()
            self._deliver(events, finished)

    def _new_batch(self) -> ContinuousBatch:
        return ContinuousBatch(self._model, self.limits.slots)

    def _wait(self) -> bool:
        """Until there is something to do; False when all is done and closed."""
        with self._change:
            while not (self._waiting or self._running or self._gone):
                if self._closing:
                    return False
                self._change.wait()
            if time.monotonic() > self._deadline:
                self._gone += [*self._running.values(), *self._waiting]
            return True

    def _drop(self, batch: ContinuousBatch) -> list[Request]:
        """Takes out those whose client has gone."""
        if not self._gone:
            return []
        with self._change:
            gone, self._gone = self._gone, []
            dropped = {id(request) for request in gone if not request._done}
            self._waiting = deque(request for request in self._waiting if id(request) not in dropped)
        for key in [key for key, request in self._running.items() if id(request) in dropped]:
            batch.remove(key)
            del self._running[key]
        finished = [request for request in gone if id(request) in dropped]
        for request in finished:
            request._finish("cancelled")
        return finished

    def _admit(self, batch: ContinuousBatch, finished: list[Request]) -> None:
        room = PREFILL_TOKENS
        while self._waiting and batch.free and room > 0:
            with self._change:
                request = self._waiting.popleft()
                try:
                    key = batch.add(request.prompt, request.settings, logprobs=request.logprobs)
                except Exception as error:  # what it asks for cannot be begun: its own fault, not the others'
                    request._finish(None, error)
                    finished.append(request)
                    continue
                self._running[key] = request
            room -= min(len(request.prompt), self.context)

    def _deliver(self, events: Sequence[Event], finished: Sequence[Request]) -> None:
        for request in finished:
            self._tell(request)
        for key, token, reason in events:
            request = self._running[key]
            if token is not None:
                request._tokens.append(token)
                self.tokens += 1
            if reason is not None:
                request._finish(reason)
                del self._running[key]
            self._tell(request)
        now = time.monotonic()
        if now - self._woken >= max(1 / PIECES_EACH, len(self._running) / PIECES_PER_SECOND):
            self._woken = now
            due = list(self._news)
        else:  # a first token and an end are not kept waiting
            due = [request for request in self._news if request._done or not request._heard]
        # One call into each event loop a step, not one for each sequence: the loop is woken through a socket.
        loops: dict[asyncio.AbstractEventLoop, list[Request]] = {}
        for request in due:
            del self._news[request]
            request._heard = True
            if request._loop is not None:
                loops.setdefault(request._loop, []).append(request)
        for loop, requests in loops.items():
            try:
                loop.call_soon_threadsafe(_wake, requests)
            except RuntimeError:  # the loop is closed: its readers have gone
                for request in requests:
                    self._cancel(request)

    def _tell(self, request: Request) -> None:
        if not request._arrived.is_set():
            request._arrived.set()
        self._news[request] = None
