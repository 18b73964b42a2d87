"""The API beyond what the official client shows: stop texts, prompts of every length, limits, curl, disconnects."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import MODEL, Running, Start, slow, until

from miniglm.chat import answer_questions
from miniglm.conversation import Message, fit_prompt
from miniglm.generation import Engine
from miniglm.model import GLM
from miniglm.qa.questions import normalize_question
from miniglm.sampling import SamplingSettings
from miniglm.serving.engine import load_served
from miniglm.serving.service import Options, Piece, ServiceError, StopScanner
from miniglm.serving.settings import Limits
from miniglm.tokenizer import Tokenizer

ASKED = [{"role": "user", "content": "长江在哪"}]
ENDLESS: dict[str, Any] = {"messages": ASKED, "max_tokens": 10**6}
"""Greedy, the model runs into a loop, never into an end."""


def post(running: Running, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 4} | body
    return httpx.post(running.url + path, json=given, timeout=120)


def refused(answer: httpx.Response, status: int, param: str | None, *words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]


@given(
    text=st.text("ab甲", max_size=12),
    stop=st.lists(st.text("ab甲", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
@settings(deadline=None)
def test_what_is_before_a_stop_text_hangs_not_on_the_pieces(text: str, stop: list[str], cuts: list[int]) -> None:
    ends = [(place + len(s), place) for s in stop for place in [text.find(s)] if place >= 0]
    expected = text[: min(ends)[1]] if ends else text
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    scanner = StopScanner(stop)
    said = ""
    for begin, end in pairwise(edges):
        said += scanner.add(text[begin:end])
        assert expected.startswith(said)
        if scanner.found:
            break
    said += "" if scanner.found else scanner.finish()
    assert said == expected and scanner.found == bool(ends)


def test_every_chunk_of_a_stream_is_whole_characters(server: Running, parts: tuple[GLM, Tokenizer]) -> None:
    """The model says many bytes that are no characters: U+FFFD comes only where the whole answer has it."""
    for seed in range(4):
        body: dict[str, Any] = {"messages": ASKED, "temperature": 1.0, "seed": seed, "max_tokens": 60}
        whole = post(server, **body).json()["choices"][0]["message"]["content"]
        answer = post(server, stream=True, **body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole
        assert "usage" not in chunks[0]


@pytest.mark.parametrize("length", [1, 30, 400])
def test_a_long_conversation_loses_its_oldest_turns(server: Running, parts: tuple[GLM, Tokenizer], length: int) -> None:
    model, tokenizer = parts
    turns: list[Message] = [{"role": "system", "content": "你是渔樵"}]
    for number in range(12):
        turns.append({"role": "user", "content": f"英雄{number}" * length})
        turns.append({"role": "assistant", "content": "浪花" * length})
    turns.append({"role": "user", "content": "长江在哪"})
    chosen = SamplingSettings(max_new_tokens=20, stop_ids=tokenizer.stop_ids)
    answer = post(server, messages=turns, max_tokens=20).json()
    assert answer["choices"][0]["message"]["content"].strip() == answer_questions(model, tokenizer, [turns], chosen)[0]
    asked = [{**m, "content": normalize_question(m["content"])} if m["role"] == "user" else m for m in turns]
    assert answer["usage"]["prompt_tokens"] == len(fit_prompt(tokenizer, asked, 128, 20))


def test_a_prompt_and_an_answer_longer_than_the_context_slide(server: Running, parts: tuple[GLM, Tokenizer]) -> None:
    model, tokenizer = parts
    prompt = "滚滚长江东逝水，浪花淘尽英雄。" * 60
    [expected] = Engine(model).generate(
        [tokenizer.prefix + tokenizer.encode(prompt)], SamplingSettings(max_new_tokens=300)
    )
    answer = post(server, "/v1/completions", prompt=prompt, max_tokens=300, temperature=0).json()
    said = tokenizer.decode(expected.ids)
    text = answer["choices"][0]["text"]
    assert said.startswith(text) and (answer["choices"][0]["finish_reason"] == "stop" or said == text)


def test_content_in_parts_and_the_other_roles(server: Running) -> None:
    parted = [{"role": "user", "content": [{"type": "text", "text": "长江"}, {"type": "text", "text": "在哪"}]}]
    plain = [{"role": "user", "content": "长江\n在哪"}]
    said = [post(server, messages=m).json()["choices"][0]["message"]["content"] for m in (parted, plain)]
    assert said[0] == said[1]
    for role, same in (("developer", "system"), ("tool", "observation")):
        said = [
            post(server, messages=[{"role": r, "content": "老"}, *ASKED], max_tokens=12).json()["choices"]
            for r in (role, same)
        ]
        assert said[0] == said[1]
    refused(
        post(server, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        422,
        "messages[0].content[0]",
        "image_url",
    )
    refused(post(server, messages=[{"role": "robot", "content": "a"}]), 400, "messages[0].role", "robot", "user")
    refused(post(server, messages=[{"role": "user"}]), 400, "messages[0].content", "缺少")


def test_a_body_says_that_it_is_json(server: Running) -> None:
    """A page of another site can send a form's types or plain text without asking first."""
    body = json.dumps({"model": MODEL, "messages": ASKED, "max_tokens": 1})

    def send(kind: str) -> httpx.Response:
        headers = {"Content-Type": kind} if kind else {}
        return httpx.post(server.url + "/v1/chat/completions", content=body, headers=headers, timeout=120)

    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "text/application+json"):
        refused(send(kind), 400, None, "application/json")
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
        assert send(kind).status_code == 200
    refused(httpx.post(server.url + "/v1/chat/completions", content=b""), 400, None, "application/json")


def test_control_tokens_in_a_question_are_text(server: Running, parts: tuple[GLM, Tokenizer]) -> None:
    _, tokenizer = parts
    text = "<|assistant|>\n<|endoftext|>[gMASK]<sop>"
    answer = post(server, "/v1/completions", prompt=text).json()
    assert answer["usage"]["prompt_tokens"] == 2 + len(tokenizer.encode(text)) > 20
    assert post(server, messages=[{"role": "user", "content": text}]).status_code == 200


def test_what_is_unknown_is_ignored_and_what_would_matter_is_refused(server: Running) -> None:
    harmless: dict[str, Any] = {
        "user": "u",
        "store": True,
        "metadata": {},
        "presence_penalty": 0,
        "logit_bias": {},
        "tools": [],
    }
    assert post(server, messages=ASKED, **harmless, response_format={"type": "text"}).status_code == 200
    refusals: dict[str, Any] = {
        "presence_penalty": 1.5,
        "logit_bias": {"5": 10},
        "response_format": {"type": "json_object"},
        "functions": [{"name": "f"}],
    }
    for name, value in refusals.items():
        refused(post(server, messages=ASKED, **{name: value}), 422, name)
    refusals = {"echo": True, "suffix": "a", "best_of": 3}
    for name, value in refusals.items():
        refused(post(server, "/v1/completions", prompt="a", **{name: value}), 422, name)
    refused(post(server, "/v1/completions", prompt=[1, 10**6]), 422, "prompt", "1000000")


def test_every_limit_is_named(start: Start) -> None:
    limits = Limits(
        max_tokens=5, max_choices=2, max_prompt_characters=10, max_messages=3, max_stop=1, max_stop_characters=3
    )
    with start(limits) as small:
        refused(post(small, messages=ASKED, max_tokens=6), 400, "max_tokens", "max_tokens", "5")
        refused(post(small, messages=ASKED, max_completion_tokens=6), 400, "max_completion_tokens", "max_tokens")
        refused(post(small, messages=ASKED, n=3), 400, "n", "max_choices", "2")
        refused(
            post(small, messages=[{"role": "user", "content": "长" * 11}]), 400, "messages", "max_prompt_char", "11"
        )
        refused(post(small, messages=ASKED * 4), 400, "messages", "max_messages", "3")
        refused(post(small, messages=ASKED, stop=["a", "b"]), 400, "stop", "max_stop")
        refused(post(small, messages=ASKED, stop="abcd"), 400, "stop", "max_stop_characters")
        refused(post(small, messages=ASKED, logprobs=True, top_logprobs=21), 400, "top_logprobs", "max_logprobs")
        refused(post(small, "/v1/completions", prompt=["a"] * 3), 400, "prompt", "max_choices")
        refused(post(small, "/v1/completions", prompt=list(range(11))), 400, "prompt", "max_prompt_characters")
        refused(post(small, messages=ASKED, stream_options={"include_usage": True}), 400, "stream_options")
        assert post(small, messages=ASKED, max_tokens=5).status_code == 200


def test_an_answer_that_takes_too_long_is_stopped(start: Start) -> None:
    with start(Limits(max_tokens=10**6, request_seconds=0.3)) as hasty:
        answer = post(hasty, n=2, **ENDLESS)
        refused(answer, 503, None, "request_seconds", "0.3")
        assert "retry-after" in answer.headers
        events = post(hasty, stream=True, n=2, **ENDLESS).text.strip().split("\n\n")
        assert "request_seconds" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
        until(lambda: hasty.service.worker.running == 0, "what was stopped leaves the batch")
        assert post(hasty, messages=ASKED).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_stops_its_answer(start: Start, stream: bool) -> None:
    with start(Limits(max_tokens=10**6)) as running:
        worker = running.service.worker
        body = {"model": MODEL, "n": 3, "stream": stream} | ENDLESS

        async def ask_and_leave() -> None:
            async with httpx.AsyncClient() as client:
                request = client.build_request("POST", running.url + "/v1/chat/completions", json=body)
                sent = asyncio.create_task(client.send(request, stream=True))
                while worker.running < 3:
                    await asyncio.sleep(0.01)
                if stream:
                    async for _ in (await sent).aiter_bytes():
                        break
                sent.cancel()

        asyncio.run(ask_and_leave())
        until(lambda: worker.running == 0, "the answers of a client that has gone stop")
        made = worker.tokens
        assert post(running, messages=ASKED).status_code == 200
        assert worker.tokens - made <= 4


def test_closing_the_connection_ends_it_within_two_steps(model_folder: Path, start: Start, tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    steps.touch()
    with start(
        Limits(max_tokens=10**6), load=partial(slow, partial(load_served, model_folder, "cpu"), steps)
    ) as running:
        body = json.dumps({"model": MODEL, "stream": True} | ENDLESS).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            until(lambda: steps.stat().st_size >= 2, "the answer is under way")
            begun = steps.stat().st_size
        until(lambda: running.service.worker.running == 0, "the answer is dropped")
        assert steps.stat().st_size - begun <= 2


def test_curl_sees_what_the_documentation_shows(server: Running) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl here")
    body = json.dumps({"model": MODEL, "messages": ASKED, "max_tokens": 6, "stream": True}, ensure_ascii=False)
    arguments = [curl, "-sN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    said = subprocess.run(arguments, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    assert said.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in said
    assert re.search(r'"content":"[^"]', said)


def test_the_description_names_every_route_and_parameter(server: Running) -> None:
    found = httpx.get(server.url + "/openapi.json").json()
    assert set(found["paths"]) == {"/v1/models", "/v1/models/{id}", "/v1/chat/completions", "/v1/completions"}
    assert {"messages", "temperature", "stop", "logprobs"} <= set(
        found["components"]["schemas"]["ChatRequest"]["properties"]
    )


def test_the_numbers_count_what_was_done(start: Start) -> None:
    with start() as running:
        made = post(running, messages=ASKED, max_tokens=7).json()["usage"]["completion_tokens"]
        post(running, messages=[])
        httpx.get(running.url + "/v1/%00odd")
        text = httpx.get(running.url + "/metrics").text
        assert f"miniglm_tokens_generated_total {made}.0" in text
        assert 'miniglm_http_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
        assert 'miniglm_http_requests_total{route="/v1/chat/completions",status="400"} 1.0' in text
        assert "odd" not in text and "miniglm_first_text_seconds_count 1.0" in text
        assert "miniglm_sequences_running 0.0" in text


def test_the_service_that_the_page_uses(start: Start, parts: tuple[GLM, Tokenizer]) -> None:
    model, tokenizer = parts

    async def said(service: Any, messages: Sequence[Message], options: Options) -> tuple[str, list[Piece]]:
        pieces = [piece async for piece in service.chat(messages, options)]
        return "".join(piece.text for piece in pieces), pieces

    with start(Limits(max_tokens=10**6, slots=1, queue=0)) as running:
        service = running.service
        text, pieces = asyncio.run(said(service, ASKED, Options(max_tokens=30)))
        chosen = SamplingSettings(max_new_tokens=30, stop_ids=tokenizer.stop_ids)
        assert text.strip() == answer_questions(model, tokenizer, [ASKED], chosen)[0]
        assert [piece.tokens for piece in pieces] == sorted(piece.tokens for piece in pieces)

        async def leave_in_the_middle() -> None:
            answer = service.chat(ASKED, Options(max_tokens=10**6))
            await anext(answer)
            with pytest.raises(ServiceError) as busy:
                await anext(service.complete("滚滚", Options()))
            assert busy.value.status == 429
            await answer.aclose()  # type: ignore[attr-defined]

        asyncio.run(leave_in_the_middle())
        until(lambda: service.worker.running == 0, "a closed iterator stops the answer")
        service.close(0)
        with pytest.raises(ServiceError) as closing:
            asyncio.run(said(service, ASKED, Options()))
        assert closing.value.status == 503
