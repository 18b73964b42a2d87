"""One chat completion at a time from an endpoint of OpenAI's form, through the `openai` client.

Retries what may go better the next time, honours Retry-After, steps down from JSON schema to JSON object to plain text
where the endpoint refuses, and tells apart what only this request (`RequestError`) and what every request (`StopError`)
will fail with. The key is read from the environment or a file and never shown. Knows nothing of books or facts.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from miniglm.errors import MiniGLMError
from miniglm.qa.prompts import Message, estimated_tokens

if TYPE_CHECKING:
    from openai import APIStatusError
    from tenacity import RetryCallState

Structure = Literal["json_schema", "json_object", "none"]
_STEPS: tuple[Structure, ...] = ("json_schema", "json_object", "none")
LONGEST_WAIT = 600.0
"""Seconds: an endpoint that asks to wait longer is left for another day."""


@dataclass(frozen=True, slots=True)
class Preset:
    """What an endpoint is known to need. `key_variable` is "" where none is; `structure` is what to try first."""

    title: str
    base_url: str
    key_variable: str
    structure: Structure


PRESETS = {
    "zhipu": Preset("智谱 GLM", "https://open.bigmodel.cn/api/paas/v4", "ZHIPUAI_API_KEY", "json_object"),
    "deepseek": Preset("DeepSeek", "https://api.deepseek.com", "DEEPSEEK_API_KEY", "json_object"),
    "qwen": Preset("通义千问", "https://dashscope.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY", "json_object"),
    "moonshot": Preset("Moonshot", "https://api.moonshot.cn/v1", "MOONSHOT_API_KEY", "json_object"),
    "openai": Preset("OpenAI", "https://api.openai.com/v1", "OPENAI_API_KEY", "json_schema"),
    "ollama": Preset("Ollama", "http://localhost:11434/v1", "", "json_schema"),
    "vllm": Preset("vLLM", "http://localhost:8000/v1", "", "json_schema"),
    "llamacpp": Preset("llama.cpp", "http://localhost:8080/v1", "", "json_schema"),
    "miniglm": Preset("miniglm serve", "http://localhost:7860/v1", "", "none"),
}
"""By the name that `--provider` takes."""
OWN = Preset("自定的接口", "", "MINIGLM_API_KEY", "json_schema")
"""For `--base-url` without `--provider`."""


class RequestError(Exception):
    """This request failed, also after retries; others may not. The text is for the user, without the key."""


class StopError(Exception):
    """No request will succeed: a bad key, no money, no such model. The text is for the user, without the key."""


def read_key(preset: Preset, file: Path | None) -> str:
    """The key from the file, or from the preset's environment variable; "" where none is needed.

    Raises:
        MiniGLMError: the file cannot be read or holds no single line, or a needed key is nowhere.
    """
    if file is not None:
        try:
            lines = file.read_text("utf-8-sig").split()
        except (OSError, UnicodeDecodeError):
            raise MiniGLMError("读不了密钥文件", path=file, fix="应是一个文本文件，里面只有密钥") from None
        if len(lines) != 1:
            raise MiniGLMError(f"密钥文件里有 {len(lines)} 段文字，应只有密钥本身", path=file)
        return lines[0]
    key = os.environ.get(preset.key_variable, "").strip() if preset.key_variable else ""
    if not key and preset.key_variable and preset is not OWN:
        raise MiniGLMError(
            f"没有 {preset.title} 的密钥",
            fix=f"把它放进环境变量 {preset.key_variable}，或写进文件再用 --key-file 指出；没有密钥可以用 --offline",
        )
    return key


@dataclass(frozen=True, slots=True)
class _Form:
    """What a request says besides its messages; an endpoint that refuses some of it gets less."""

    structure: Structure
    temperature: float | None
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    def parameters(self, schema: dict[str, Any], max_tokens: int) -> dict[str, Any]:
        """As the API names them."""
        found: dict[str, Any] = {self.limit: max_tokens}
        if self.temperature is not None:
            found["temperature"] = self.temperature
        if self.structure == "json_schema":
            form = {"name": "reply", "strict": True, "schema": schema}
            found["response_format"] = {"type": "json_schema", "json_schema": form}
        elif self.structure == "json_object":
            found["response_format"] = {"type": "json_object"}
        return found

    def without(self, error: APIStatusError) -> _Form | None:
        """The form without what a refusal is about; None where it is about something else.

        OpenAI's reasoning models refuse max_tokens and a temperature by name. Where the text names nothing,
        response_format is what an endpoint is most likely not to know.
        """
        text = str(error.message).casefold()
        if self.limit == "max_tokens" and "max_completion_tokens" in text:
            return replace(self, limit="max_completion_tokens")
        if self.temperature is not None and "temperature" in text:
            return replace(self, temperature=None)
        about_another = _NOT_THE_FORM.search(text) or (
            error.status_code == 404 and "response_format" not in text and "json" not in text  # no such model
        )
        if self.structure == "none" or about_another:
            return None
        return replace(self, structure=_STEPS[_STEPS.index(self.structure) + 1])


_NOT_THE_FORM = re.compile(r"context|maximum|too long|max_tokens|content.?filter|sensitive|敏感|长度|model.{0,20}not")


@dataclass(frozen=True, slots=True)
class Reply:
    """A completion. The token counts are the endpoint's, or estimates where it gives none."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Endpoint:
    """An endpoint with a model.

    Args:
        timeout: seconds that one try may take.
        tries: how often a request is sent before it counts as failed.
        first_wait: seconds before the second try where the endpoint names none; doubles with every further one.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str,
        *,
        structure: Structure = "json_schema",
        temperature: float = 0.7,
        timeout: float = 180.0,
        tries: int = 5,
        first_wait: float = 2.0,
    ) -> None:
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise MiniGLMError("出题要用 openai 和 tenacity", fix='请运行 pip install "miniglm-chat[synth]"') from None
        self.base_url, self.model = base_url, model
        self.retries = 0
        self._key, self._form = key, _Form(structure, temperature)
        self._tries, self._first_wait = tries, first_wait
        try:
            # The client would take these from OPENAI_… variables, which are meant for OpenAI and not for this endpoint.
            self._client = AsyncOpenAI(
                base_url=base_url,
                api_key=key or "none",
                organization="",
                project="",
                max_retries=0,
                timeout=timeout,
            )
        except Exception as error:
            raise MiniGLMError(f"--base-url 是 {base_url!r}，不是能用的网址：{self._safe(error)}") from None

    async def close(self) -> None:
        await self._client.close()

    def _safe(self, error: object) -> str:
        """An error's text in one short line without the key, also where a provider repeats part of it."""
        text = " ".join(str(error).split())
        if self._key:
            text = text.replace(self._key, "***")
        return re.sub(r"(?i)\b(sk-|bearer\s+)[\w*.\-]+", r"\1***", text)[:300]

    async def complete(self, messages: Sequence[Message], schema: dict[str, Any], max_tokens: int) -> Reply:
        """One completion, in the form of the schema as far as the endpoint supports that.

        Raises:
            RequestError: it failed after all tries, or the endpoint refuses this request.
            StopError: no request will succeed.
        """
        import openai
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

        retrying = AsyncRetrying(
            retry=retry_if_exception(_may_go_better),
            wait=self._wait,
            stop=stop_after_attempt(self._tries),
            before_sleep=self._count,
            reraise=True,
        )
        while True:
            form = self._form
            try:
                return await retrying(self._once, messages, form.parameters(schema, max_tokens))
            except openai.APIStatusError as error:
                if error.status_code in (400, 404, 415, 422, 501):
                    if self._form is form:  # another request may have learnt it meanwhile
                        self._form = form.without(error) or form
                    if self._form is not form:
                        continue
                raise self._explained(error) from None
            except openai.APITimeoutError:
                raise RequestError("超时，没有等到回答") from None
            except openai.APIConnectionError as error:
                raise RequestError(f"连不上或连接中断：{self._safe(error.__cause__ or error)}") from None
            except openai.OpenAIError as error:
                raise RequestError(f"接口出错：{self._safe(error)}") from None

    async def _once(self, messages: Sequence[Message], parameters: dict[str, Any]) -> Reply:
        import openai

        try:
            done = await self._client.chat.completions.create(
                model=self.model, messages=cast(Any, messages), **parameters
            )
            text = done.choices[0].message.content or ""
        except openai.OpenAIError:
            raise
        except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            # A body that is no completion: some gateways answer 200 with a page of theirs.
            raise _NoCompletionError(f"回答不是 OpenAI 的形式：{self._safe(error)}") from None
        usage = done.usage
        return Reply(
            text,
            usage.prompt_tokens if usage else estimated_tokens(messages),
            usage.completion_tokens if usage else len(text),
        )

    def _wait(self, state: RetryCallState) -> float:
        """Seconds to the next try: what the endpoint asks for, else exponential backoff with jitter."""
        error = state.outcome.exception() if state.outcome else None
        asked = _retry_after(error)
        if asked is not None:
            return asked
        longest = min(60.0, self._first_wait * 2.0 ** (state.attempt_number - 1))
        return float(longest * random.uniform(0.5, 1.0))

    def _count(self, state: RetryCallState) -> None:
        self.retries += 1

    def _explained(self, error: APIStatusError) -> Exception:
        status, text = error.status_code, self._safe(error.message)
        hopeless = {
            401: "密钥无效或已过期",
            402: "余额不足",
            403: "密钥没有权限",
            404: f"没有这个接口或模型（{self.model}）",
        }
        if status in hopeless:
            return StopError(f"{hopeless[status]}（HTTP {status}：{text}）")
        if _out_of_money(error):
            return StopError(f"余额或额度用完了（HTTP {status}：{text}）")
        asked = _retry_after(error)
        if asked is not None and asked > LONGEST_WAIT:
            return StopError(f"接口要求等 {asked:.0f} 秒再来（HTTP {status}）")
        return RequestError(f"HTTP {status}：{text}")


class _NoCompletionError(RequestError):
    """A reply of another form; may be different the next time."""


def _may_go_better(error: BaseException) -> bool:
    import openai

    if isinstance(error, openai.APIStatusError):
        transient = error.status_code in (408, 409, 425, 429) or error.status_code >= 500
        return transient and error.status_code != 501 and not _out_of_money(error) and not _too_long(error)
    return isinstance(error, (openai.APIConnectionError, openai.APIResponseValidationError, _NoCompletionError))


def _out_of_money(error: APIStatusError) -> bool:
    """A 429 that waiting does not cure: OpenAI's insufficient_quota, Zhipu's 1113, and those that say so in words."""
    text = f"{error.code} {error.message}".casefold()
    return error.status_code == 429 and bool(re.search(r"insufficient|\b1113\b|余额|欠费|arrear|billing", text))


def _too_long(error: APIStatusError) -> bool:
    asked = _retry_after(error)
    return asked is not None and asked > LONGEST_WAIT


def _retry_after(error: BaseException | None) -> float | None:
    """Seconds that a response's Retry-After asks for (RFC 9110, 10.2.3: seconds or a date), if it has one."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    text = str(headers.get("retry-after", "")).strip()
    if not text:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
