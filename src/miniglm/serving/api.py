"""The OpenAI-compatible API: checks requests against the limits, runs them, puts the answers into OpenAI's form.

Who may ask, how large a body is and how long it takes to come is guards.py's.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from miniglm.serving import schema
from miniglm.serving.book import BookService, last_question
from miniglm.serving.metrics import Metrics
from miniglm.serving.schema import ApiError, ChatRequest, CompletionRequest, GenerationRequest, to_json
from miniglm.serving.service import Answering, Delta, LocalService, Options, Quoted, ServiceError
from miniglm.serving.settings import Limits

if TYPE_CHECKING:
    from miniglm.conversation import Message
    from miniglm.sampling import Token

log = logging.getLogger(__name__)

CHAT_DEFAULTS = Options()
"""As `miniglm chat` has them."""
COMPLETION_DEFAULTS = Options(temperature=0.8, top_k=100)
"""As `miniglm sample` has them."""
LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON does not have."""
RETRY_SECONDS = {429: 1, 503: 5}
FINISHED = ("stop", "length")
"""Why an answer ended that is whole."""


class _Route(APIRoute):
    """Reads a request's `body` itself where the endpoint takes one: strictly (`parse_json`), and in a third of the time
    of what FastAPI does for any endpoint. What FastAPI describes stays its own."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **more: Any) -> None:
        super().__init__(path, endpoint, **more)
        self.body_model: type[BaseModel] | None = get_type_hints(endpoint).get("body")

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.body_model is None or scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            value = schema.parse_json(await request.body()) if _says_json(request) else None
            body = self.body_model.model_validate(value)
        except ValidationError as error:
            raise schema.validation_error(error.errors()) from None
        except ClientDisconnect:
            raise ApiError(400, "请求没有发完") from None
        response: Response = await self.endpoint(body=body, request=request)
        await response(scope, receive, send)


def _says_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


class _Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return to_json(content)


def _responses(good: type[BaseModel], *refusals: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """What a route answers, for the description."""
    found: dict[int | str, dict[str, Any]] = {status: {"model": schema.ErrorBody} for status in refusals}
    found[200] = {"model": good} | ({"content": {"text/event-stream": {}}} if stream else {})
    return found


def create_router(
    service: LocalService,
    limits: Limits,
    metrics: Metrics,
    *,
    log_prompts: bool = False,
    book: BookService | None = None,
) -> APIRouter:
    """The routes under /v1.

    Args:
        book: answers chats from the book, unless a request wants the model's own answer (`look_up: false`).
    """
    router = APIRouter(prefix="/v1", route_class=_Route, default_response_class=_Json)
    card = schema.ModelCard(id=service.model_id, created=int(time.time()), max_model_len=service.context).model_dump()

    @router.get("/models", responses=_responses(schema.ModelList, 401, 403, 503))
    async def models() -> Response:
        """列出模型：只有一个。"""
        return _Json({"object": "list", "data": [card]})

    @router.get("/models/{id:path}", responses=_responses(schema.ModelCard, 401, 403, 404, 503))
    async def model(id: str) -> Response:
        """一个模型。"""
        _check_model(id, service.model_id)
        return _Json(card)

    refusals = (400, 401, 403, 404, 408, 413, 422, 429, 500, 503)

    @router.post("/chat/completions", responses=_responses(schema.ChatCompletion, *refusals, stream=True))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """回答对话里的最后一个问题。"""
        messages = _check_chat(body, service.model_id, limits)
        options = _options(body, body.max_completion_tokens or body.max_tokens, CHAT_DEFAULTS)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if log_prompts:
            log.info("对话：%s", messages)
        if _looks_up(body, book is not None) and book is not None:
            found = await book.find(messages)
            form = _ChatForm(service, False, beside=schema.found_in_the_book(found))
            quoted = [Quoted(found.text, last_question(messages), service.tokenizer)]
            return await _respond(form, body, quoted, request, limits, metrics)
        answers = await _begin(service.begin_chat(messages, options, logprobs=logprobs, choices=body.n or 1))
        return await _respond(_ChatForm(service, logprobs is not None), body, answers, request, limits, metrics)

    @router.post("/completions", responses=_responses(schema.Completion, *refusals, stream=True))
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """续写一段文字。"""
        prompts = _check_completion(body, service.model_id, limits)
        options = _options(body, body.max_tokens, COMPLETION_DEFAULTS)
        if log_prompts:
            log.info("续写：%s", prompts)
        answers: list[Answering] = []
        try:
            for prompt in prompts:
                begun = service.begin_completion(prompt, options, logprobs=body.logprobs, choices=body.n or 1)
                answers += await _begin(begun)
        except BaseException:
            _cancel(answers)
            raise
        form = _CompletionForm(service, body.logprobs is not None)
        return await _respond(form, body, answers, request, limits, metrics)

    return router


def install_errors(app: FastAPI) -> None:
    """Answers in OpenAI's form to everything that goes wrong."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if not isinstance(error, ApiError):
            message = {404: "没有这个地址", 405: "这个地址不接受这种请求"}.get(error.status_code, str(error.detail))
            error = ApiError(error.status_code, message, headers=error.headers)
        return Response(error.body(), error.status_code, error.headers, "application/json")

    async def failed(request: Request, error: Exception) -> Response:
        return await refused(request, ApiError(500, "服务内部出错，详情见服务端的输出"))

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, failed)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_model(name: str, known: str) -> None:
    if name != known:
        raise ApiError(404, f"没有模型 {name[:80]!r}，这里只有 {known!r}", param="model", code="model_not_found")


def _at_most(name: str, value: int | None, limit: int, limit_name: str) -> None:
    if value is not None and value > limit:
        found = f"{name} 是 {str(value)[:40]}，最多 {limit}（上限 {limit_name}）"
        raise ApiError(400, found, param=name, code="invalid_value")


def _check_common(body: GenerationRequest, model_id: str, limits: Limits) -> None:
    _check_model(body.model, model_id)
    if name := body.unsupported():
        raise ApiError(422, f"本服务没有 {name} 这个功能", param=name, code="unsupported_parameter")
    _at_most("max_tokens", body.max_tokens, limits.max_tokens, "max_tokens")
    _at_most("n", body.n, limits.max_choices, "max_choices")
    if isinstance(body.stop, list):
        _at_most("stop", len(body.stop), limits.max_stop, "max_stop")
    for text in _stop(body):
        if len(text) > limits.max_stop_characters:
            found = f"stop 里有一个 {len(text)} 字，最多 {limits.max_stop_characters}（上限 max_stop_characters）"
            raise ApiError(400, found, param="stop", code="invalid_value")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options 只在 stream 是 true 时有用", param="stream_options", code="invalid_value")


def _check_length(name: str, length: int, limits: Limits) -> None:
    if length > limits.max_prompt_characters:
        found = f"{name} 共 {length} 字，最多 {limits.max_prompt_characters}（上限 max_prompt_characters）"
        raise ApiError(400, found, param=name, code="context_length_exceeded")


def _check_chat(body: ChatRequest, model_id: str, limits: Limits) -> list[Message]:
    """The conversation as `chat.fit_prompt` takes it."""
    _check_common(body, model_id, limits)
    _at_most("max_completion_tokens", body.max_completion_tokens, limits.max_tokens, "max_tokens")
    _at_most("top_logprobs", body.top_logprobs, limits.max_logprobs, "max_logprobs")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs 要和 logprobs: true 一起用", param="top_logprobs", code="invalid_value")
    if len(body.messages) > limits.max_messages:
        found = f"messages 有 {len(body.messages)} 条，最多 {limits.max_messages}（上限 max_messages）"
        raise ApiError(400, found, param="messages", code="invalid_value")
    messages = []
    for number, message in enumerate(body.messages):
        content = message.content
        if isinstance(content, list):
            for place, part in enumerate(content):
                name = f"messages[{number}].content[{place}]"
                if part.type != "text":
                    found = f"{name} 是 {part.type[:40]!r}，本服务只读文字"
                    raise ApiError(422, found, param=name, code="unsupported_parameter")
                if part.text is None:
                    raise ApiError(400, f"缺少参数 {name}.text", param=name, code="missing_required_parameter")
            content = "\n".join(part.text or "" for part in content)
        if content is None and message.role != "assistant":
            name = f"messages[{number}].content"
            raise ApiError(400, f"缺少参数 {name}", param=name, code="missing_required_parameter")
        role = {"developer": "system", "tool": "observation"}.get(message.role, message.role)
        messages.append({"role": role, "content": content or ""})
    _check_length("messages", sum(len(m["content"]) for m in messages), limits)
    return messages


def _looks_up(body: ChatRequest, has_book: bool) -> bool:
    """Whether the book answers. What only the model can do is refused there rather than left out in silence."""
    if body.look_up and not has_book:
        found = "look_up 是 true，但这里没有索引：先运行 miniglm index，再重新启动服务"
        raise ApiError(400, found, param="look_up", code="invalid_value")
    if not has_book or body.look_up is False:
        return False
    for name, wanted in (("logprobs", body.logprobs), ("n", (body.n or 1) > 1), ("stop", body.stop)):
        if wanted:
            found = f"查书的回答是书里现成的文字，没有 {name}；要模型自己回答，加上 look_up: false"
            raise ApiError(400, found, param=name, code="invalid_value")
    return True


def _check_completion(body: CompletionRequest, model_id: str, limits: Limits) -> list[str | list[int]]:
    """The texts and lists of token ids to continue."""
    _check_common(body, model_id, limits)
    _at_most("logprobs", body.logprobs, limits.max_logprobs, "max_logprobs")
    prompts = body.prompts()
    if len(prompts) > limits.max_choices:
        found = f"prompt 有 {len(prompts)} 个，最多 {limits.max_choices}（上限 max_choices）"
        raise ApiError(400, found, param="prompt", code="invalid_value")
    _check_length("prompt", sum(map(len, prompts)), limits)
    return prompts


def _stop(body: GenerationRequest) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _options(body: GenerationRequest, max_tokens: int | None, defaults: Options) -> Options:
    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return Options(
        max_tokens=given(max_tokens, defaults.max_tokens),
        temperature=given(body.temperature, defaults.temperature),
        top_p=given(body.top_p, defaults.top_p),
        top_k=given(body.top_k, defaults.top_k),
        repetition_penalty=given(body.repetition_penalty, defaults.repetition_penalty),
        seed=body.seed,
        stop=_stop(body),
    )


# ---- answers -------------------------------------------------------------------------------------------------------


def _refusal(error: ServiceError) -> ApiError:
    code = {429: "too_many_requests", 503: "service_unavailable"}.get(error.status)
    return ApiError(error.status, error.message, code=code, retry_after=RETRY_SECONDS.get(error.status))


async def _begin(begun: Awaitable[Sequence[Answering]]) -> Sequence[Answering]:
    try:
        return await begun
    except ServiceError as error:
        if error.status == 422:  # only token ids can be that
            raise ApiError(422, error.message, param="prompt", code="invalid_value") from None
        raise _refusal(error) from None


def _cancel(answers: Iterable[Answering]) -> None:
    for answer in answers:
        answer.cancel()


class _Form:
    """What chat and completion answers differ in."""

    object = ""
    id_prefix = ""

    def __init__(self, service: LocalService, logprobs: bool, beside: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.logprobs = service.tokenizer, logprobs
        self.beside = dict(beside or {})
        """Stands beside the standard fields in a whole answer and in the chunk that closes one."""
        self.head = {
            "id": self.id_prefix + uuid.uuid4().hex,
            "object": self.object,
            "created": int(time.time()),
            "model": service.model_id,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        """The choice of a chunk that is sent before any text, or None for no such chunk."""
        return None

    def delta(self, index: int, delta: Delta) -> dict[str, Any]:
        """The choice of a chunk with new text."""
        raise NotImplementedError

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """The choice of the chunk that closes an answer."""
        raise NotImplementedError

    def whole(self, index: int, delta: Delta, reason: str) -> dict[str, Any]:
        """The choice of an answer that is sent in one piece."""
        raise NotImplementedError

    def name(self, id: int) -> str:
        """A token as text; parts of characters become U+FFFD."""
        try:
            return self.tokenizer.decode([id], skip_control=False)
        except ValueError:  # a row of the embedding that no token has
            return ""

    def bytes_of(self, id: int) -> list[int]:
        """A token's bytes."""
        try:
            return list(self.tokenizer.token_bytes(id))
        except ValueError:
            return []


class _ChatForm(_Form):
    object = "chat.completion"
    id_prefix = "chatcmpl-"

    def first(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def delta(self, index: int, delta: Delta) -> dict[str, Any]:
        return self._chunk(index, {"content": delta.text}, None) | {"logprobs": self._logprobs(delta.tokens)}

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return self._chunk(index, {}, reason)

    def whole(self, index: int, delta: Delta, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(delta.tokens),
            "finish_reason": reason,
        }

    def _chunk(self, index: int, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _entry(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.name(id), "logprob": _finite(logprob), "bytes": self.bytes_of(id)}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "content": [
                self._entry(token.id, token.logprob) | {"top_logprobs": [self._entry(*best) for best in token.top]}
                for token in tokens
            ]
        }


class _CompletionForm(_Form):
    object = "text_completion"
    id_prefix = "cmpl-"

    def delta(self, index: int, delta: Delta) -> dict[str, Any]:
        return {"index": index, "text": delta.text, "logprobs": self._logprobs(delta), "finish_reason": None}

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def whole(self, index: int, delta: Delta, reason: str) -> dict[str, Any]:
        return self.delta(index, delta) | {"finish_reason": reason}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "tokens": [self.name(token.id) for token in delta.tokens],
            "token_logprobs": [_finite(token.logprob) for token in delta.tokens],
            "top_logprobs": [self._best(token) for token in delta.tokens],
            "text_offset": list(delta.offsets),
        }

    def _best(self, token: Token) -> dict[str, float]:
        best: dict[str, float] = {}
        for id, logprob in (*token.top, (token.id, token.logprob)):
            best.setdefault(self.name(id), _finite(logprob))
        return best


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)


class _Deadline:
    """Cancels answers that take too long."""

    def __init__(self, answers: Sequence[Answering], seconds: float) -> None:
        self.passed = False
        self.seconds = seconds
        self.timer = asyncio.get_running_loop().call_later(seconds, self._pass, answers)

    def _pass(self, answers: Sequence[Answering]) -> None:
        self.passed = True
        _cancel(answers)

    def error(self) -> ApiError:
        """Why an answer that was cancelled was."""
        if self.passed:
            found = f"回答超过了 {self.seconds:g} 秒（上限 request_seconds），已停止"
            return ApiError(503, found, code="timeout", retry_after=RETRY_SECONDS[503])
        return ApiError(503, "服务正在关闭，回答没有做完", code="service_unavailable", retry_after=RETRY_SECONDS[503])


def _usage(answers: Sequence[Answering], choices: int) -> dict[str, int]:
    prompt = sum(answer.prompt_tokens for answer in answers[::choices])  # a prompt counts once, whatever n
    made = sum(answer.tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


async def _respond(
    form: _Form,
    body: GenerationRequest,
    answers: Sequence[Answering],
    request: Request,
    limits: Limits,
    metrics: Metrics,
) -> Response:
    deadline = _Deadline(answers, limits.request_seconds)
    arrived: float = request.state.arrived

    waiting = True

    def heard(delta: Delta) -> None:
        nonlocal waiting
        if waiting and delta.text:
            waiting = False
            metrics.first_text(time.monotonic() - arrived)

    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return _EventStream(_events(form, answers, body.n or 1, usage, deadline, heard), answers, deadline)
    watch = asyncio.create_task(_cancel_when_gone(request.receive, answers))
    try:
        choices = []
        for index, answer in enumerate(answers):
            parts: list[Delta] = []
            async for part in answer:
                heard(part)
                parts.append(part)
            if answer.finish_reason not in FINISHED:
                raise deadline.error()
            tokens = tuple(token for part in parts for token in part.tokens)
            offsets = tuple(offset for part in parts for offset in part.offsets)
            whole = Delta("".join(part.text for part in parts), tokens, offsets)
            choices.append(form.whole(index, whole, answer.finish_reason))
        return _Json(form.head | {"choices": choices, "usage": _usage(answers, body.n or 1)} | form.beside)
    except ServiceError as error:
        raise _refusal(error) from error
    finally:
        deadline.timer.cancel()
        watch.cancel()
        _cancel(answers)


async def _cancel_when_gone(receive: Receive, answers: Sequence[Answering]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    _cancel(answers)


class _EventStream(Response):
    """Server-sent events; drops the answers when the client goes, or for whatever other reason it ends."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[tuple[bytes, bool]], answers: Sequence[Answering], deadline: _Deadline
    ) -> None:
        # Proxies that collect an answer before they pass it on leave one with this header alone (nginx).
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self.events, self.answers, self.deadline = events, answers, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(_cancel_when_gone(receive, self.answers))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for events, more in self.events:
                await send({"type": "http.response.body", "body": events, "more_body": more})
        finally:
            self.deadline.timer.cancel()
            watch.cancel()
            _cancel(self.answers)


class _Chunks:
    """The chunks of a stream, each an event.

    Args:
        beside: stands in every chunk.
    """

    MARK = "\0"  # in no name of a model, and the other names are ours

    def __init__(self, form: _Form, choices: int, beside: Mapping[str, Any]) -> None:
        object = form.head["object"]
        name = {"object": f"{object}.chunk"} if object == "chat.completion" else {}
        self.form, self.head, self.beside = form, form.head | name, beside
        # What is around a text is the same in each chunk: only the text is put into JSON's form each time.
        marked = [self._event(form.delta(index, Delta(self.MARK))) for index in range(choices)]
        self.around = [event.split(to_json(self.MARK)) for event in marked]

    def _event(self, choice: dict[str, Any] | None, **more: Any) -> bytes:
        choices = [] if choice is None else [choice]
        return b"data: " + to_json({**self.head, "choices": choices, **self.beside, **more}) + b"\n\n"

    def first(self) -> bytes:
        """What is sent before any text."""
        found = (self.form.first(index) for index in range(len(self.around)))
        return b"".join(self._event(choice) for choice in found if choice is not None)

    def delta(self, index: int, delta: Delta) -> bytes:
        """New text; its end too if the delta has it."""
        events = b""
        if delta.tokens:
            events = self._event(self.form.delta(index, delta))
        elif delta.text:
            before, after = self.around[index]
            events = before + to_json(delta.text) + after
        if delta.finish_reason in FINISHED:
            events += self._event(self.form.last(index, delta.finish_reason), **self.form.beside)
        return events

    def usage(self, usage: dict[str, int]) -> bytes:
        """What was used, with no choice."""
        return self._event(None, usage=usage)


async def _events(
    form: _Form,
    answers: Sequence[Answering],
    choices: int,
    include_usage: bool,
    deadline: _Deadline,
    heard: Callable[[Delta], None],
) -> AsyncIterator[tuple[bytes, bool]]:
    """What is sent at a time, and whether more comes. A piece costs as much as a small model's token, however long it
    is, so what is there together goes together."""
    chunks = _Chunks(form, len(answers), {"usage": None} if include_usage else {})
    events, left = chunks.first(), len(answers)
    try:
        async for index, delta in _merged(answers):
            heard(delta)
            events += chunks.delta(index, delta)
            if delta.finish_reason not in (None, *FINISHED):
                raise deadline.error()
            left -= delta.finish_reason is not None
            if left:
                yield events, True
                events = b""
        if include_usage:
            events += chunks.usage(_usage(answers, choices))
        events += b"data: [DONE]\n\n"
    except ServiceError as error:
        log.exception("生成出错")
        events += b"data: " + _refusal(error).body() + b"\n\n"
    except ApiError as error:
        events += b"data: " + error.body() + b"\n\n"
    yield events, False


async def _merged(answers: Sequence[Answering]) -> AsyncIterator[tuple[int, Delta]]:
    """What the answers give as it comes, with each one's index."""
    if len(answers) == 1:
        async for delta in answers[0]:
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta | ServiceError]] = asyncio.Queue()

    async def pump(index: int, answer: Answering) -> None:
        try:
            async for delta in answer:
                arrived.put_nowait((index, delta))
        except ServiceError as error:
            arrived.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, answer)) for index, answer in enumerate(answers)]
    try:
        left = len(answers)
        while left:
            index, found = await arrived.get()
            if isinstance(found, ServiceError):
                raise found
            left -= found.finish_reason is not None
            yield index, found
    finally:
        for task in tasks:
            task.cancel()
