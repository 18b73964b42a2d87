"""A model behind another server with an OpenAI-compatible API (vLLM, SGLang, llama.cpp, a second `miniglm serve`), seen
as a `Service`. Knows nothing of the page.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miniglm.conversation import Message, asked
from miniglm.serving.service import Options, Piece, ServiceError

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0
READ_SECONDS = 120.0
"""Longest wait for the next piece: a server with a long queue sends the first one late."""
MAX_EVENT = 1 << 20
"""Bytes of one line; more is no server of this kind."""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class RemoteService:
    """Asks another server.

    Args:
        base_url: up to and including `/v1`.
        api_key: sent as a bearer token, or None.
        model_id: the model's name there; None takes the first that the server lists, at the first request.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, model_id: str | None = None) -> None:
        self.base_url, self.model_id = base_url.rstrip("/"), model_id or ""
        self._looks_up = False
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def chat(self, messages: Sequence[Message], options: Options) -> AsyncIterator[Piece]:
        """See `Service`; a second `miniglm serve` is asked for its model's own answer, as any other server gives."""
        return self._stream("/chat/completions", {"messages": asked(messages)}, options)

    def complete(self, prompt: str, options: Options) -> AsyncIterator[Piece]:
        """See `Service`."""
        return self._stream("/completions", {"prompt": prompt}, options)

    def _client(self) -> httpx.AsyncClient:
        import httpx

        # A proxy from the environment is for the internet; a server on this machine is not behind it.
        outside = not _is_loopback(httpx.URL(self.base_url).host)
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            trust_env=outside,
        )

    async def find_model(self) -> str:
        """The model's name, asked for once.

        Raises:
            ServiceError: the server cannot be reached or lists no model.
        """
        if self.model_id:
            return self.model_id
        async with self._client() as client:
            try:
                answer = await client.get(f"{self.base_url}/models")
                if answer.status_code != 200:
                    raise self._refused(answer.status_code, answer.content)
                card = answer.json()["data"][0]
                self.model_id, self._looks_up = str(card["id"]), card.get("owned_by") == "miniglm"
            except (LookupError, TypeError, ValueError):
                raise ServiceError(
                    f"后端 {self.base_url} 没有列出模型，像是没有 OpenAI 兼容的接口", status=502
                ) from None
            except Exception as error:
                raise self._failed(error) from None
        return self.model_id

    async def _stream(self, path: str, what: Mapping[str, Any], options: Options) -> AsyncIterator[Piece]:
        body = {"model": await self.find_model(), **what, "stream": True, **_wire(options)}
        if self._looks_up and "messages" in what:
            body["look_up"] = False
        tokens = 0
        async with self._client() as client:
            try:
                async with client.stream("POST", self.base_url + path, json=body) as answer:
                    if answer.status_code != 200:
                        raise self._refused(answer.status_code, await answer.aread())
                    async for line in _lines(answer):
                        text, ended = self._event(line)
                        if text:
                            tokens += 1  # a piece is a token, or one with the pieces of a character before it
                            yield Piece(text, tokens)
                        if ended:
                            return
            except Exception as error:
                raise self._failed(error) from None
        # Without its end an answer may be cut anywhere.
        raise ServiceError(f"后端 {self.base_url} 中途断开了，回答不完整", status=502)

    def _event(self, line: str) -> tuple[str, bool]:
        """The text in a line of the event stream, and whether the stream is at its end."""
        name, _, data = line.partition(":")
        if name != "data":
            return "", False
        data = data.strip()
        if data == "[DONE]":
            return "", True
        try:
            event = json.loads(data)
            if "error" in event:
                raise self._refused(0, data.encode())
            if not event["choices"]:  # the last one, with the usage
                return "", False
            choice = event["choices"][0]
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise ServiceError(f"后端 {self.base_url} 的回答不是 OpenAI 的格式：{data[:80]}", status=502) from None
        return text or "", False

    def _refused(self, status: int, body: bytes) -> ServiceError:
        """What the server said when it refused."""
        try:
            said = str(json.loads(body)["error"]["message"])
        except (LookupError, TypeError, ValueError):
            said = ""
        said = f"：{' '.join(said.split())[:200]}" if said else ""
        if status in (401, 403):
            return ServiceError(f"后端 {self.base_url} 不接受这个密钥{said}", status=502)
        if status == 404:
            return ServiceError(f"后端 {self.base_url} 没有这个地址或模型{said or '，地址应到 /v1 为止'}", status=502)
        if status in (429, 503):
            return ServiceError(f"后端现在太忙，请稍后再试{said}", status=status)
        return ServiceError(f"后端 {self.base_url} 拒绝了请求{f'（{status}）' if status else ''}{said}", status=502)

    def _failed(self, error: Exception) -> Exception:
        """The one line for what httpx raises; anything else as it is."""
        import httpx

        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return ServiceError(f"连不上后端 {self.base_url}，请确认它在运行", status=502)
        if isinstance(error, httpx.TimeoutException):
            return ServiceError(f"后端 {self.base_url} 超过 {READ_SECONDS:.0f} 秒没有回答", status=502)
        if isinstance(error, (httpx.HTTPError, httpx.InvalidURL)):
            return ServiceError(
                f"和后端 {self.base_url} 的连接出了错（{type(error).__name__}），请再试一次", status=502
            )
        return error


def _wire(options: Options) -> dict[str, Any]:
    """The options as they are sent; those that OpenAI's own server does not know only where they change something."""
    wire: dict[str, Any] = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }
    if options.top_k:
        wire["top_k"] = options.top_k
    if options.repetition_penalty != 1.0:
        wire["repetition_penalty"] = options.repetition_penalty
    if options.seed is not None:
        wire["seed"] = options.seed
    if options.stop:
        wire["stop"] = list(options.stop)
    return wire


async def _lines(answer: httpx.Response) -> AsyncIterator[str]:
    """The lines of an event stream. They end at line feeds only: httpx's own splitting would also cut a text at U+2028,
    which JSON may hold as it is.

    Raises:
        ServiceError: a line without end.
    """
    held = b""
    async for chunk in answer.aiter_bytes():
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").rstrip("\r")
        if len(held) > MAX_EVENT:
            raise ServiceError("后端发来没有尽头的一行，不是 OpenAI 兼容的接口", status=502)
    if held:
        yield held.decode("utf-8", "replace")
