"""Who may ask, how much, and for how long: the middlewares before the API and the page, and the connection's clocks.

Pure ASGI: each guard sees a request's bytes as they come, and costs a stream nothing. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import html
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from miniglm.serving.metrics import Metrics
from miniglm.serving.schema import ApiError
from miniglm.serving.settings import Limits

COOKIE = "miniglm"
LOGIN_BODY = 4096
"""Bytes of a login form."""
MAX_HEAD = 65536
"""Bytes of a request's head, more or less; browsers and other servers stop far earlier."""
_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/healthz", "/metrics", "/report", "/login")
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


class State:
    """What the server is doing.

    Attributes:
        draining: it is told to end: what runs finishes, nothing new is taken.
        open: API requests at work.
    """

    def __init__(self) -> None:
        self.draining = False
        self.open = 0


def route_of(path: str) -> str:
    """A path's name in the numbers: one of a few, whatever the client asked for."""
    for route in _ROUTES:
        if path == route or path.startswith(route + "/"):
            return route
    return "other" if path.startswith("/v1") else "page"


def _headers(scope: Scope) -> Mapping[bytes, bytes]:
    return dict(scope["headers"])


async def _refuse(error: ApiError, send: Send) -> None:
    await _answer(send, error.status_code, error.body(), b"application/json", error.headers or {})


async def _answer(send: Send, status: int, body: bytes, kind: bytes, headers: Mapping[str, str]) -> None:
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    raw += [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class Measure:
    """Counts and times every request, and refuses new ones once the server is told to end."""

    def __init__(self, app: ASGIApp, state: State, metrics: Metrics) -> None:
        self.app, self.state, self.metrics = app, state, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = scope.setdefault("state", {})["arrived"] = time.monotonic()
        status = 499  # as others count a client that left before its answer began

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path = scope["path"]
        counted = path.startswith("/v1")
        self.state.open += counted
        try:
            if self.state.draining and path not in ("/healthz", "/metrics"):
                closing = ApiError(503, "服务正在关闭，不再接受新的请求", code="service_unavailable", retry_after=5)
                await _refuse(closing, watched)
            else:
                await self.app(scope, receive, watched)
        except BaseException:
            status = 500
            raise
        finally:
            self.state.open -= counted
            self.metrics.request(route_of(path), status, time.monotonic() - begun)


class Origins:
    """Keeps other web sites out of a browser on the same machine or network.

    A page of another site can send requests here, with the user's address. What it cannot do is forge the headers
    Origin (refused unless it is this server's own or one of `allowed`) and Host (at a loopback address refused unless
    it is a loopback name: another name that resolves to here is DNS rebinding).

    Args:
        allowed: origins as `https://my.site`, or `*`.
        loopback: the server listens on a loopback address.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str], *, loopback: bool) -> None:
        self.app, self.allowed, self.loopback = app, {origin.rstrip("/") for origin in allowed}, loopback

    def _fault(self, scope: Scope) -> str | None:
        headers = _headers(scope)
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
        if self.loopback and _host_name(host) not in _LOOPBACK_HOSTS:
            return f"Host 是 {host[:80]!r}，本服务只在本机上，应为 127.0.0.1 或 localhost"
        if origin and "*" not in self.allowed and origin not in self.allowed and _netloc(origin) != host.lower():
            return f"不接受来自其他网站（{origin[:80]!r}）的请求；启动时用 --cors 可以允许它"
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (fault := self._fault(scope)) is not None:
            await _refuse(ApiError(403, fault, code="forbidden"), send)
        else:
            await self.app(scope, receive, send)


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class Key:
    """Asks for the key: of the API in the Authorization header, of a browser once by a form, which sets a cookie that
    is derived from the key and is not the key."""

    def __init__(self, app: ASGIApp, key: str, limits: Limits) -> None:
        self.app, self.key, self.limits = app, key.encode(), limits
        self.cookie = hmac.new(self.key, b"miniglm page", hashlib.sha256).hexdigest()

    def _known(self, headers: Mapping[bytes, bytes]) -> bool:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        bearer = kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.key)
        try:
            cookie = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(COOKIE)
        except CookieError:
            cookie = None
        value = cookie.value.encode() if cookie is not None else b""
        return hmac.compare_digest(value, self.cookie.encode()) or bearer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/healthz":
            await self.app(scope, receive, send)
            return
        headers = _headers(scope)
        if scope["path"] == "/login":
            await self._login(scope, receive, send)
        elif self._known(headers):
            await self.app(scope, receive, send)
        elif scope["method"] == "GET" and b"text/html" in headers.get(b"accept", b""):
            await _answer(send, 303, b"", b"text/plain", {"Location": "/login"})
        else:
            given = b"authorization" in headers
            message = "API key 不对" if given else "需要 API key：请求头 Authorization: Bearer KEY"
            error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            await _refuse(error, send)

    async def _login(self, scope: Scope, receive: Receive, send: Send) -> None:
        note = ""
        if scope["method"] == "POST":
            body, more = b"", True
            while more and len(body) <= LOGIN_BODY:
                message = await receive()
                if message["type"] != "http.request":
                    return
                body, more = body + message.get("body", b""), message.get("more_body", False)
            fields = parse_qs(body[:LOGIN_BODY].decode("utf-8", "replace"), max_num_fields=8)
            if hmac.compare_digest(fields.get("key", [""])[0].encode(), self.key):
                secure = "; Secure" if scope["scheme"] == "https" else ""
                cookie = f"{COOKIE}={self.cookie}; Path=/; HttpOnly; SameSite=Strict{secure}"
                await _answer(send, 303, b"", b"text/plain", {"Location": "/", "Set-Cookie": cookie})
                return
            note = "API key 不对，再试一次。"
        headers = {"Cache-Control": "no-store"}
        page = _LOGIN.replace("NOTE", html.escape(note)).encode()
        await _answer(send, 401 if note else 200, page, b"text/html; charset=utf-8", headers)


_LOGIN = """<!doctype html>
<html lang="zh-CN">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; form-action 'self'">
<title>miniGLM</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 22rem; margin: 20vh auto; padding: 0 1rem; }
input, button { font: inherit; padding: .5rem .7rem; width: 100%; box-sizing: border-box; margin-top: .5rem; }
</style>
<h1>miniGLM</h1>
<form method="post" action="/login">
<label for="key">这个服务要 API key（This server needs its API key）</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>进入 / Enter</button>
<p role="alert">NOTE</p>
</form>
</html>
"""


class Clients:
    """How many API requests one client, known by its address, may have open at once."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limit = app, limits.per_client
        self.open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            await self.app(scope, receive, send)
            return
        address = scope["client"][0] if scope.get("client") else ""
        if self.open[address] >= self.limit:
            found = f"同一个地址同时打开的请求已有 {self.limit} 个（上限 per_client），请等前面的答完"
            await _refuse(ApiError(429, found, code="too_many_requests", retry_after=1), send)
            return
        self.open[address] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.open[address] -= 1
            if not self.open[address]:
                del self.open[address]


class Body:
    """How large a body may be, by what it says and by what really comes, and how long it may take to come."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    def _too_large(self) -> ApiError:
        return ApiError(413, f"请求体超过 {self.limits.max_body} 字节（上限 max_body）", code="request_too_large")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = _headers(scope).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.limits.max_body:
            await _refuse(self._too_large(), send)
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.header_seconds
        size, whole = 0, False

        async def counted() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):  # `wait_for` would run it as a task of its own
                    message = await receive()
            except TimeoutError:
                found = f"请求体 {self.limits.header_seconds:g} 秒还没有到齐（上限 header_seconds）"
                raise ApiError(408, found, code="timeout", headers={"Connection": "close"}) from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.limits.max_body:
                raise self._too_large()
            return message

        await self.app(scope, counted, send)


def protocol_class(limits: Limits) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with a clock for what it waits for without end: a connection that sends no whole request
    head (or the rest of a body that was refused), and a client that does not read; and with a limit for the head, which
    the parser keeps until it is whole."""

    class Protocol(HttpToolsProtocol):
        _clock: asyncio.TimerHandle | None = None
        _head: int | None = None  # bytes of a head that is not yet whole

        def _wait(self, seconds: float | None) -> None:
            """Ends the connection in so many seconds; None stops the clock."""
            if self._clock is not None:
                self._clock.cancel()
            self._clock = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

        def _at_work(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
            else:
                self._wait(limits.header_seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait(None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._head is not None:
                self._head += len(data)
                if self._head > MAX_HEAD and not self.transport.is_closing():
                    self.send_400_response("Request head too large.")
            if self._at_work() and not self.flow.write_paused:
                self._wait(None)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head = 0

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self._head = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self._at_work():
                unread = self.transport.get_write_buffer_size() > 0
                self._wait(limits.write_seconds if unread else limits.header_seconds)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait(limits.write_seconds)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._wait(None if self._at_work() else limits.header_seconds)

    return Protocol
