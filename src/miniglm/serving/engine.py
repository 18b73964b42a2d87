"""The engine in a process of its own: it gets requests through a pipe, makes their tokens, and sends these back.

In the server's own process the two would take turns: a step of a small model is some hundred short calls, and while one
thread of Python makes them, no other can answer a connection.

Knows tokens only: nothing of text, HTTP or pages. The other end of the pipe is worker.py's: the server's process imports
this module too, to begin it, so torch is loaded only where it runs (160 MB, two seconds).
"""

from __future__ import annotations

import gc
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from miniglm.errors import MiniGLMError
from miniglm.sampling import Event, SamplingSettings, Token

if TYPE_CHECKING:
    from miniglm.generation import ContinuousBatch
    from miniglm.model import GLM

PREFILL_TOKENS = 1024
"""Prompt tokens read in one step: what runs waits for them, a few hundredths of a second on a laptop."""

PIECES_PER_SECOND = 1000
"""How often readers are told of new tokens, all together: with 32 running sequences about 30 times a second each.
Sending a piece costs about as much as a small model's token, however long the piece is."""

PIECES_EACH = 250
"""And how often each of them at most: no eye tells it from more."""


class Add(NamedTuple):
    """Make this sequence; `logprobs` as `ContinuousBatch.add` has it."""

    number: int
    prompt: Sequence[int]
    settings: SamplingSettings
    logprobs: int | None


class Drop(NamedTuple):
    """Nobody waits for this sequence any more."""

    number: int


Order = Add | Drop | None
"""What the engine is told; None ends it."""


class Ready(NamedTuple):
    """The first that the engine sends, unless it is a `MiniGLMError`: what is to be known of the model."""

    context: int
    vocabulary: int


class News(NamedTuple):
    """What became of a sequence since the last news: new tokens, its end ("stop", "length", "cancelled"), or how it
    failed, a traceback."""

    number: int
    tokens: list[Token]
    finish_reason: str | None = None
    failure: str | None = None

    @property
    def last(self) -> bool:
        """Whether no more comes."""
        return self.finish_reason is not None or self.failure is not None


def load_served(folder: Path, device: str | None) -> GLM:
    """A model folder's model, where it is to run.

    Raises:
        MiniGLMError: as `load_model`, or there is no such device.
    """
    import torch

    from miniglm.checkpoint import load_model
    from miniglm.locate import pick_device

    # A core is left to the connections: each product waits for the last of its threads.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    return load_model(folder, device=str(pick_device(device or "auto")))[0]


def run_engine(pipe: Connection, load: Callable[[], GLM], slots: int) -> None:
    """What the engine's process does: sends `Ready` (or a `MiniGLMError`, and ends), then takes an `Order` at a time and
    sends lists of `News`, until it is told to end or nobody is there any more.

    Args:
        slots: sequences that run at once; the others wait, first come first served.
    """
    # A terminal's Ctrl-C and a service manager's SIGTERM reach this process too; the server says when it is time.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):  # the server has gone
        try:
            model = load()
        except MiniGLMError as error:
            pipe.send(error)
            return
        gc.freeze()  # torch's hundreds of thousands of objects stay: looking through them would hold up answers
        pipe.send(Ready(model.config.max_position_embeddings, model.config.vocab_size))
        _Engine(pipe, model, slots).run()


class _Engine:
    def __init__(self, pipe: Connection, model: GLM, slots: int) -> None:
        self.pipe, self.model, self.slots = pipe, model, slots
        self.batch = self._new_batch()
        self.orders: SimpleQueue[Order] = SimpleQueue()
        self.waiting: deque[Add] = deque()
        self.running: dict[int, int] = {}  # the batch's key: our number
        self.news: dict[int, News] = {}  # that was not sent yet, in the order in which it began
        self.heard: set[int] = set()  # of whose tokens was told
        self.told = 0.0
        threading.Thread(target=self._receive, daemon=True).start()

    def _new_batch(self) -> ContinuousBatch:
        from miniglm.generation import ContinuousBatch

        return ContinuousBatch(self.model, self.slots)

    def _receive(self) -> None:
        """Orders lie ready between two steps: asking a pipe whether it has any takes longer than asking a queue."""
        with suppress(EOFError, OSError):
            while (order := self.pipe.recv()) is not None:
                self.orders.put(order)
        self.orders.put(None)

    def run(self) -> None:
        while self._take_orders():
            try:
                self._admit()
                events = self.batch.step()
            except Exception:  # whatever it is: those who wait must hear of it, and the next must be served
                failure = traceback.format_exc()
                for number in self.running.values():
                    self._end(number, failure=failure)
                self.running.clear()
                self.batch, events = self._new_batch(), []
            for event in events:
                self._note(event)
            self._tell()

    def _take_orders(self) -> bool:
        """Waits until there is something to do; False to end."""
        while not self.orders.empty() or not (self.waiting or self.running or self.news):
            order = self.orders.get()
            if order is None:
                return False
            if isinstance(order, Add):
                self.waiting.append(order)
            else:
                self._drop(order.number)
        return True

    def _drop(self, number: int) -> None:
        key = next((key for key, running in self.running.items() if running == number), None)
        if key is not None:
            self.batch.remove(key)
            del self.running[key]
        elif any(add.number == number for add in self.waiting):
            self.waiting = deque(add for add in self.waiting if add.number != number)
        else:  # it has ended meanwhile
            return
        self._end(number, "cancelled")

    def _admit(self) -> None:
        room = PREFILL_TOKENS
        while self.waiting and self.batch.free and room > 0:
            add = self.waiting.popleft()
            try:
                key = self.batch.add(add.prompt, add.settings, logprobs=add.logprobs)
            except Exception:  # what it asks for cannot be begun: its own fault, not the others'
                self._end(add.number, failure=traceback.format_exc())
                continue
            self.running[key] = add.number
            room -= min(len(add.prompt), self.batch.context)

    def _note(self, event: Event) -> None:
        number = self.running[event.key]
        if event.token is not None:
            self.news.setdefault(number, News(number, [])).tokens.append(event.token)
        if event.finish_reason is not None:
            del self.running[event.key]
            self._end(number, event.finish_reason)

    def _end(self, number: int, finish_reason: str | None = None, *, failure: str | None = None) -> None:
        tokens = self.news[number].tokens if number in self.news else []
        self.news[number] = News(number, tokens, finish_reason, failure)

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self.told >= max(1 / PIECES_EACH, len(self.running) / PIECES_PER_SECOND):
            self.told = now
            due = list(self.news.values())
        else:  # a first token and an end are not kept waiting
            due = [news for news in self.news.values() if news.last or news.number not in self.heard]
        if not due:
            return
        for news in due:
            del self.news[news.number]
            if news.last:
                self.heard.discard(news.number)
            else:
                self.heard.add(news.number)
        self.pipe.send(due)
