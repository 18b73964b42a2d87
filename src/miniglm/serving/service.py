"""A model that answers, as the API and the page see it: text in, text out in pieces that are never a broken character.

Knows nothing of HTTP. `LocalService` is a model in this process; a server elsewhere is in backend.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from miniglm.conversation import Message, asked, fit_prompt
from miniglm.sampling import SamplingSettings
from miniglm.serving.worker import QueueFull, Request, ShuttingDown, Worker
from miniglm.tokenizer import StreamingDetokenizer, Tokenizer

if TYPE_CHECKING:
    from miniglm.sampling import Token

SHORT = 2000
"""Characters that are tokenized in less time than another thread takes to begin, a millisecond at most."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an answer is made; see `SamplingSettings` for what each does.

    Attributes:
        seed: None takes a new one each time.
        stop: texts that end the answer; they are not part of it.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is new, and how many tokens have been made so far."""

    text: str
    tokens: int


class ServiceError(Exception):
    """An answer that cannot be given, in one line for the user.

    Args:
        message: what is wrong, in Chinese.
        status: the HTTP status that says the same: 400 the request, 429 too busy, 503 shutting down, 502 the server
            behind this one, 500 else.
    """

    def __init__(self, message: str, *, status: int = 500) -> None:
        super().__init__(message)
        self.message, self.status = message, status


class Service(Protocol):
    """A model that answers. Closing an iterator (`aclose`) drops what it was making.

    Raises (both, from the iteration):
        ServiceError: see there.
    """

    model_id: str

    def chat(self, messages: Sequence[Message], options: Options) -> AsyncIterator[Piece]:
        """The answer to a conversation's last question."""
        ...

    def complete(self, prompt: str, options: Options) -> AsyncIterator[Piece]:
        """What follows a text, without the text itself."""
        ...


class StopScanner:
    """Text up to the first stop text, however it comes in pieces.

    Contract: what `add` and `finish` return, joined, is everything before the stop text that is complete first, or
    everything. Held back is only what may still become the beginning of one.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = [text for text in stop if text]
        self.held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What has become certain with this text; may be empty. Sets `found` once a stop text is there."""
        if not self.stop:
            return text
        self.held += text
        places = [(place + len(stop), place) for stop in self.stop if (place := self.held.find(stop)) >= 0]
        if places:
            self.found = True
            keep = min(places)[1]
            certain, self.held = self.held[:keep], ""
            return certain
        longest = min(len(self.held), max(map(len, self.stop)) - 1)
        unsure = next(
            (n for n in range(longest, 0, -1) if any(stop.startswith(self.held[-n:]) for stop in self.stop)), 0
        )
        certain, self.held = self.held[: len(self.held) - unsure], self.held[len(self.held) - unsure :]
        return certain

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        rest, self.held = self.held, ""
        return rest


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that is new, and the tokens whose text is out with it (a token may come before its text is certain).

    Attributes:
        tokens: only where their log-probabilities were asked for.
        offsets: where each token's text begins in the whole text, in characters.
        finish_reason: in an answer's last delta, and only there: "stop", "length" or "cancelled".
    """

    text: str
    tokens: tuple[Token, ...] = ()
    offsets: tuple[int, ...] = ()
    finish_reason: str | None = None


class Answering(Protocol):
    """An answer as it is made; iterate once.

    Attributes:
        prompt_tokens, tokens: of the question, and made so far.
        finish_reason: None while it runs, then "stop", "length" or "cancelled".
    """

    prompt_tokens: int
    tokens: int
    finish_reason: str | None

    def cancel(self) -> None:
        """Drops it; may be called at any time."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...


class Quoted:
    """An answer that is there already, as `Answering`, in one piece."""

    def __init__(self, text: str, question: str, tokenizer: Tokenizer) -> None:
        self.text = text
        self.prompt_tokens, self.tokens = len(tokenizer.encode(question)), len(tokenizer.encode(text))
        self.finish_reason: str | None = "stop"

    def cancel(self) -> None:
        """Nothing runs."""

    async def __aiter__(self) -> AsyncIterator[Delta]:
        yield Delta(self.text, finish_reason=self.finish_reason)


class Answer:
    """One sequence as it is made; iterate once.

    Attributes:
        prompt_tokens: tokens of the prompt, as the model reads it.
        tokens: tokens made so far, those of a stop text included.
        finish_reason: None while it runs, then "stop", "length" or "cancelled".
    """

    def __init__(self, request: Request, prompt_tokens: int, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.prompt_tokens, self.tokens = prompt_tokens, 0
        self.finish_reason: str | None = None
        self._request, self._detokenizer = request, StreamingDetokenizer(tokenizer)
        self._scanner = StopScanner(stop)
        self._pending: list[tuple[int, Token]] = []  # where each token's text begins in the whole text
        self._read = self._sent = 0  # characters

    def cancel(self) -> None:
        """Drops it at the next step; may be called at any time."""
        self._request.cancel()

    def _due(self, text: str) -> Delta:
        """`text` with the tokens that are out with it."""
        if self._request.logprobs is None:
            return Delta(text, finish_reason=self.finish_reason)
        self._sent += len(text)
        whole = self._sent == self._read and not self._scanner.found
        cut = len(self._pending)
        if not whole:
            cut = sum(begin < self._sent for begin, _ in self._pending)
            if not self._scanner.found and cut:  # the last of these may go on in what is held back
                cut -= 1
        due = self._pending[:cut]
        del self._pending[:cut]
        tokens, offsets = tuple(token for _, token in due), tuple(begin for begin, _ in due)
        return Delta(text, tokens, offsets, self.finish_reason)

    def _text(self, tokens: Sequence[Token]) -> str:
        """What has become certain with these tokens."""
        text = ""
        for token in tokens:
            self.tokens += 1
            if self._request.logprobs is not None:
                self._pending.append((self._read, token))
            try:
                piece = self._detokenizer.add(token.id)
            except ValueError:  # a row of the embedding that no token has
                continue
            self._read += len(piece)
            text += self._scanner.add(piece)
            if self._scanner.found:
                self.finish_reason = "stop"
                break
        return text

    def _rest(self) -> str:
        """What was held back, once no more tokens come."""
        rest = self._detokenizer.finish()
        self._read += len(rest)
        text = self._scanner.add(rest)
        if self._scanner.found:
            self.finish_reason = "stop"
            return text
        self.finish_reason = self._request.finish_reason
        return text + self._scanner.finish()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            async for tokens in self._request.batches():
                text = self._text(tokens)
                if self.finish_reason is None and self._request.ended:
                    text += self._rest()
                if text or self.finish_reason is not None:
                    yield self._due(text)
                if self._scanner.found:
                    return
            if self.finish_reason is None:  # the end came alone
                yield self._due(self._rest())
        except Exception as error:  # whatever made the engine fail: its traceback goes along as the cause
            raise ServiceError("生成时出错，详情见服务端的输出") from error
        finally:
            self._request.cancel()


class LocalService:
    """A model on this machine. Waits until it is there.

    Args:
        model_id: the name it has in the API.
        tokenizer: learns which rows of the model's vocabulary no token has.

    Raises:
        MiniGLMError: the model could not be loaded, or it is not one of this tokenizer's.
    """

    def __init__(self, model_id: str, tokenizer: Tokenizer, worker: Worker) -> None:
        self.model_id, self.tokenizer, self.worker, self.limits = model_id, tokenizer, worker, worker.limits
        model = worker.ready()
        self.context = model.context
        tokenizer.allow_unused(model.vocabulary)

    def close(self, timeout: float) -> None:
        """Refuses what is new, lets what runs finish within `timeout` seconds."""
        self.worker.close(timeout)

    def _chat_prompt(self, messages: Sequence[Message], options: Options) -> list[int]:
        room = min(options.max_tokens, self.context // 2)
        return fit_prompt(self.tokenizer, asked(messages), self.context, room)

    def _submit(
        self, prompt: Sequence[int], options: Options, logprobs: int | None = None, choices: int = 1
    ) -> list[Answer]:
        seed = random.getrandbits(32) if options.seed is None else options.seed
        answers: list[Answer] = []
        try:
            for number in range(choices):
                settings = SamplingSettings(
                    max_new_tokens=options.max_tokens,
                    temperature=options.temperature,
                    top_k=options.top_k,
                    top_p=options.top_p,
                    repetition_penalty=options.repetition_penalty,
                    seed=seed + number,
                    stop_ids=self.tokenizer.stop_ids,
                )
                request = self.worker.submit(prompt, settings, logprobs=logprobs)
                answers.append(Answer(request, len(prompt), self.tokenizer, options.stop))
        except (QueueFull, ShuttingDown, ValueError) as error:
            for answer in answers:
                answer.cancel()
            if isinstance(error, QueueFull):
                waiting = f"等着的请求已有 {self.limits.queue} 个（上限 queue）"
                raise ServiceError(f"现在太忙：{waiting}，请稍后再试", status=429) from None
            if isinstance(error, ShuttingDown):
                raise ServiceError("服务正在关闭，不再接受新的请求", status=503) from None
            raise ServiceError(f"采样设置不对：{error}", status=400) from None
        return answers

    async def begin_chat(
        self, messages: Sequence[Message], options: Options, *, logprobs: int | None = None, choices: int = 1
    ) -> list[Answer]:
        """Puts the conversation's last question to the model, `choices` times with seed, seed + 1, ….

        Raises:
            ServiceError: too busy, shutting down, or settings out of range.
        """
        size = sum(len(message["content"]) for message in messages)
        prompt = await _aside(size, lambda: self._chat_prompt(messages, options))
        return self._submit(prompt, options, logprobs, choices)

    async def begin_completion(
        self, prompt: str | Sequence[int], options: Options, *, logprobs: int | None = None, choices: int = 1
    ) -> list[Answer]:
        """Continues a text, or token ids as they are; otherwise as `begin_chat`.

        Raises:
            ServiceError: as `begin_chat`, or an id that no token has.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.prefix + await _aside(len(prompt), lambda: self.tokenizer.encode(prompt))
        else:
            ids = list(prompt)
            try:
                for id in ids:
                    self.tokenizer.token_bytes(id)
            except ValueError:
                found = f"没有编号是 {id} 的 token，词表有 {self.tokenizer.vocab_size} 个"
                raise ServiceError(found, status=422) from None
        return self._submit(ids, options, logprobs, choices)

    def chat(self, messages: Sequence[Message], options: Options) -> AsyncIterator[Piece]:
        """See `Service`."""
        return _pieces(lambda: self.begin_chat(messages, options))

    def complete(self, prompt: str, options: Options) -> AsyncIterator[Piece]:
        """See `Service`."""
        return _pieces(lambda: self.begin_completion(prompt, options))


async def _aside(size: int, encode: Callable[[], list[int]]) -> list[int]:
    """Tokenizes so many characters: few here, many in another thread, so that nobody waits for them."""
    return encode() if size < SHORT else await asyncio.to_thread(encode)


async def _pieces(begin: Callable[[], Awaitable[list[Answer]]]) -> AsyncIterator[Piece]:
    [answer] = await begin()
    try:
        async for delta in answer:
            if delta.text:
                yield Piece(delta.text, answer.tokens)
    finally:
        answer.cancel()
