"""Whatever is sent: an answer or a refusal in OpenAI's form, and the next request is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance
from served import MODEL, Running, until

GOOD: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "长江在哪"}], "max_tokens": 2}
few = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Content-Type": "application/json"}, timeout=120) as made:
        yield made


def test_the_description_is_true(server: Running) -> None:
    # Not checked is that what the description permits is accepted: the limits are the server's, not the description's.
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in description.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) == 4
    for operation in operations:
        modes = [GenerationMode.POSITIVE]
        if operation.body:  # there is something to get wrong
            modes.append(GenerationMode.NEGATIVE)
        for mode in modes:

            @settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def holds(case: Any) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = MODEL
                    case.body.setdefault("max_tokens", 2)
                case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=120)

            holds()


def check(client: httpx.Client, body: bytes, path: str = "/v1/chat/completions") -> httpx.Response:
    answer = client.post(path, content=body)
    assert answer.status_code in (200, 400, 404, 422), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and "\n" not in error["message"]
    return answer


@few
@given(body=st.binary(max_size=200))
@example(b"\xff\xfe")
@example(b'{"model": "\xe9\x95"}')
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 200_000)
@example(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
@example(b"1" * 100_000)
@example(b'{"model": NaN}')
@example(b'{"messages": -Infinity}')
@example(b"null")
@example(b"")
def test_bytes_that_are_no_request(client: httpx.Client, body: bytes) -> None:
    assert check(client, body).status_code == 400
    assert check(client, json.dumps(GOOD).encode()).status_code == 200


NUMBERS = (
    st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from([-1, 0, 2**31, 2**63 - 1, 2**63, -(2**63), 10**4000, 1e308, 1e-320, -0.0])
)
NAMES = (
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
    "n",
    "top_logprobs",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stream",
    "logprobs",
)


@few
@given(name=st.sampled_from(NAMES), value=NUMBERS | st.none() | st.booleans() | st.text(max_size=3) | st.just([]))
@example("temperature", float("nan"))
@example("max_tokens", -1)
@example("temperature", 1e-320)
@example("repetition_penalty", 1e308)
@example("repetition_penalty", 1e-320)
@example("seed", -(2**63))
def test_a_parameter_of_any_value(client: httpx.Client, name: str, value: Any) -> None:
    answer = check(client, json.dumps(GOOD | {name: value}).encode())
    if answer.status_code == 400 and value == value and abs(value if isinstance(value, (int, float)) else 0) < 1e300:
        assert answer.json()["error"]["param"] == name


JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@few
@given(messages=JSON, more=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JSON, max_size=2))
def test_messages_of_any_form(client: httpx.Client, messages: Any, more: dict[str, Any]) -> None:
    check(client, json.dumps(more | GOOD | {"messages": messages}).encode())


CONTROL = st.sampled_from(
    ["<|user|>", "<|endoftext|>", "[gMASK]", "<sop>", "\x00", "\ud800", "\udc00", "\u2028", "🙂", "长"]
)


@few
@given(text=st.lists(CONTROL | st.text(max_size=4), max_size=12).map("".join), role=st.sampled_from(["system", "user"]))
@example("，" * 99_000, "user")
@example(" " * 99_000, "user")
@example("a" * 99_000, "user")
@example("?" * 99_000, "user")
def test_text_of_any_kind(client: httpx.Client, text: str, role: str) -> None:
    body = json.dumps(GOOD | {"messages": [{"role": role, "content": text}]}).encode()
    assert check(client, body).status_code == 200
    body = json.dumps({"model": MODEL, "prompt": text, "max_tokens": 2}).encode()
    assert check(client, body, "/v1/completions").status_code == 200


def test_after_all_this_nothing_is_left_behind(server: Running, client: httpx.Client) -> None:
    assert check(client, json.dumps(GOOD).encode()).status_code == 200
    worker = server.service.worker
    until(lambda: worker.running == worker.waiting == server.state.open == 0, "nothing is at work")
