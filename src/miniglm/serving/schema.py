"""What goes over the wire: requests, answers and errors in OpenAI's form. Knows nothing of models or limits.

Parameters of OpenAI's that are not listed here are accepted and ignored. Those are listed that would change the answer
and that this server does not have: they are refused unless they have a value that changes nothing.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from miniglm.lookup import Answer

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
}


class ApiError(HTTPException):
    """A refusal in OpenAI's form.

    Args:
        status: HTTP status.
        message: what was found and what was expected, in Chinese.
        param: the parameter's name, as `messages[0].content`.
        code: OpenAI's short name for it, where it has one.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        more = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, {**(headers or {}), **more})
        self.param, self.code = param, code

    def body(self) -> bytes:
        """The answer's body, JSON."""
        error = {
            "message": self.detail,
            "type": TYPES.get(self.status_code, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return to_json({"error": error})


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def to_json(value: Any) -> bytes:
    """JSON as it is sent: UTF-8, no spaces."""
    # A lone surrogate cannot come out of the tokenizer, but a request may hold one that an error quotes.
    return _ENCODER.encode(value).encode("utf-8", "backslashreplace")


def _no_constant(name: str) -> float:
    raise ApiError(400, f"请求里有 {name}，JSON 没有这样的数")


def parse_json(body: bytes) -> Any:
    """The value of a request's body.

    Raises:
        ApiError: it is not JSON (NaN and Infinity are not), not UTF-8, too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"请求体的第 {error.start + 1} 个字节起不是 UTF-8") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"请求体不是 JSON：第 {error.lineno} 行第 {error.colno} 个字符处，{error.msg}") from None
    except RecursionError:
        raise ApiError(400, "请求体的 JSON 嵌套得太深") from None
    except ValueError:  # Python's own limit on digits
        raise ApiError(400, "请求体里有一个几千位的数") from None


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Wire):
    include_usage: bool | None = Field(None, description="最后多发一块，里面是用量")


Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopText = Annotated[str, Field(min_length=1)]


class GenerationRequest(_Wire):
    """What chat and completion requests share."""

    model: str = Field(description="模型名，见 /v1/models")
    max_tokens: int | None = Field(None, ge=1, description="最多生成多少个 token；不给是 256")
    temperature: float | None = Field(None, ge=0, le=2, description="温度；0 是每步取最可能的")
    top_p: float | None = Field(None, gt=0, le=1, description="只从概率之和到 p 为止的里选")
    top_k: int | None = Field(None, ge=0, description="只从最可能的 k 个里选；0 不限")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10, description="重复惩罚；1 是没有")
    stop: StopText | list[StopText] | None = Field(None, description="出现其中一个就停，它自己不算答案")
    seed: Seed | None = Field(None, description="随机种子；第 i 个答案用 seed + i")
    n: int | None = Field(None, ge=1, description="几个答案")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = Field(None, description="没有这个功能，只能是 0")
    frequency_penalty: Penalty | None = Field(None, description="没有这个功能，只能是 0")
    logit_bias: dict[str, Any] | None = Field(None, description="没有这个功能，只能是空的")

    def unsupported(self) -> str | None:
        """The name of a parameter that asks for what this server does not have."""
        names = ("presence_penalty", "frequency_penalty", "logit_bias")
        return next((name for name in names if getattr(self, name)), None)


class Part(_Wire):
    type: str
    text: str | None = None


class ChatMessage(_Wire):
    role: Literal["system", "developer", "user", "assistant", "observation", "tool"]
    content: str | list[Part] | None = None


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="max_tokens 的新名字")
    logprobs: bool | None = Field(None, description="带上每个 token 的对数概率")
    top_logprobs: int | None = Field(None, ge=0, description="再带上每步最可能的这么多个；要 logprobs")
    tools: list[Any] | None = Field(None, description="没有这个功能，只能是空的")
    tool_choice: Any = None
    functions: list[Any] | None = Field(None, description="没有这个功能，只能是空的")
    response_format: dict[str, Any] | None = Field(None, description='只能是 {"type": "text"}')
    modalities: list[str] | None = Field(None, description='只能是 ["text"]')
    look_up: bool | None = Field(None, description="到书里查；有索引时不给就是 true，false 由模型自己回答")

    def unsupported(self) -> str | None:
        """See `GenerationRequest`."""
        if self.tools and self.tool_choice != "none":
            return "tools"
        if self.functions:
            return "functions"
        if self.response_format and self.response_format.get("type") != "text":
            return "response_format"
        if self.modalities and self.modalities != ["text"]:
            return "modalities"
        return super().unsupported()


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, description="带上每个 token 的对数概率，和每步最可能的这么多个")
    echo: bool | None = Field(None, description="没有这个功能，只能是 false")
    suffix: str | None = Field(None, description="没有这个功能，只能是空的")
    best_of: int | None = Field(None, description="没有这个功能，只能和 n 一样")

    def unsupported(self) -> str | None:
        """See `GenerationRequest`."""
        if self.echo:
            return "echo"
        if self.suffix:
            return "suffix"
        if self.best_of is not None and self.best_of != (self.n or 1):
            return "best_of"
        return super().unsupported()

    def prompts(self) -> list[str | list[int]]:
        """Each text or list of token ids to continue."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length"]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class Citation(BaseModel):
    book: str
    chapter: int = Field(description="第几章；0 是第一章之前")
    chapter_title: str
    paragraph: int = Field(description="书里的第几段，标题也算，从 1 数起")
    start: int = Field(description="text 从段里第几个字开始，从 0 数起")
    text: str = Field(description="整句，依据和它的前后文")
    quote: tuple[int, int] = Field(description="依据在 text 里从第几个字到第几个字，从 0 数起")
    score: float = Field(description="这一段有答案的把握，0 到 1")


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    citations: list[Citation] | None = Field(None, description="查书的回答才有：出处，第一个是答案的依据")
    refused: bool | None = Field(None, description="查书的回答才有：书里没有找到")


def found_in_the_book(found: Answer) -> dict[str, Any]:
    """What an answer from the book has beside the standard fields."""
    names = Citation.model_fields
    citations = [{name: getattr(citation, name) for name in names} for citation in found.citations]
    return {"citations": citations, "refused": found.refused}


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["miniglm"] = "miniglm"
    max_model_len: int = Field(description="上下文，token")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Error


def _names(model: type[BaseModel]) -> set[str]:
    """The names of a model's fields, those of the models in it as well."""
    found: set[str] = set()
    waiting: list[Any] = [model]
    while waiting:
        kind = waiting.pop()
        if get_origin(kind) in (list, dict, Union, types.UnionType, Annotated):
            waiting += get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= set(kind.model_fields)
            waiting += [field.annotation for field in kind.model_fields.values()]
    return found


_NAMES = _names(ChatRequest) | _names(CompletionRequest)

_EXPECTED = {
    "string_type": "应为字符串",
    "string_unicode": "不是合法的 Unicode 文字",
    "int_type": "应为整数",
    "int_from_float": "应为整数",
    "float_type": "应为数",
    "bool_type": "应为 true 或 false",
    "list_type": "应为列表",
    "dict_type": "应为对象",
    "model_type": "应为对象",
    "model_attributes_type": "应为对象",
    "finite_number": "应为有限的数",
    "greater_than": "应大于 {gt}",
    "greater_than_equal": "应不小于 {ge}",
    "less_than": "应小于 {lt}",
    "less_than_equal": "应不大于 {le}",
    "literal_error": "应为 {expected} 之一",
    "too_short": "至少要有 {min_length} 项",
    "string_too_short": "不能是空的",
}


def _place(location: Sequence[Any]) -> tuple[str, int]:
    """A parameter's name as OpenAI writes it, and how deep it is, of where pydantic found an error: the latter also
    names the members of a union that it tried."""
    name, depth = "", 0
    for part in location:
        if isinstance(part, int):
            name, depth = f"{name}[{part}]", depth + 1
        elif part in _NAMES:
            name, depth = f"{name}.{part}" if name else part, depth + 1
    return name, depth


def _expected(error: Any) -> str:
    """What one of pydantic's errors asks for."""
    known = {name: f"{value:g}" if isinstance(value, float) else value for name, value in error.get("ctx", {}).items()}
    if isinstance(known.get("expected"), str):
        known["expected"] = known["expected"].replace("' or '", "', '")
    pattern: str = _EXPECTED.get(error["type"], error["msg"])
    return str(pattern.format(**known))


def validation_error(errors: Sequence[Any]) -> ApiError:
    """pydantic's errors about a body as one refusal, of the parameter that was followed deepest."""
    placed = [(*_place(error["loc"]), error) for error in errors]
    deepest = max(depth for _, depth, _ in placed)
    param = next(name for name, depth, _ in placed if depth == deepest)
    if not param:
        return ApiError(400, "请求体应为 JSON 对象，Content-Type 应为 application/json")
    chosen = [error for name, depth, error in placed if name == param]
    if chosen[0]["type"] == "missing":
        return ApiError(400, f"缺少参数 {param}", param=param, code="missing_required_parameter")
    expected = "，或".join(dict.fromkeys(_expected(error) for error in chosen))
    value = chosen[0].get("input")
    quoted = json.dumps(value, ensure_ascii=False)[:40] if isinstance(value, (bool, int, float, str)) else ""
    found = f" 是 {quoted}" if quoted else ""
    return ApiError(400, f"{param}{found}，{expected}", param=param, code="invalid_value")
