"""An HTTP server of OpenAI's form that answers as a script tells it, well or badly, for tests and benchmarks.

It reads the passage from the request and makes true facts of its sentences, so what a client makes of good answers is
known exactly; the script says which requests go wrong and how.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from aiohttp import web

GOOD = "good"
Script = Callable[[str, int], str]
"""(passage, how often it has been asked before) to what happens: a name in `ScriptedEndpoint._answer`."""


_NAMES = "江河湖海山石松竹梅兰春夏秋冬金玉日月星辰"


def passage_text(number: int) -> str:
    """A passage of two facts, different for every number."""
    a, b = _NAMES[number % len(_NAMES)], _NAMES[number // len(_NAMES) % len(_NAMES)]
    return (
        f"话说第{number}号客店的店主姓马，单名一个{a}字，平生最爱钓鱼，每逢初一十五便往河边去。"
        f"这一日店里来了{number + 3}位客人，为首的客人名叫石敢当{b}，背着一口宝剑，众人见了都暗暗称奇。"
    )


@functools.cache
def _to_traditional() -> Any:
    from opencc import OpenCC

    return OpenCC("s2t")


def facts_of(passage: str, traditional: bool = False) -> list[dict[str, Any]]:
    """The facts that a good answer holds: two, each with two questions."""
    found = re.search(r"第(\d+)号客店的店主姓马，单名一个(.)字", passage)
    guest = re.search(r"为首的客人名叫(石敢当.)", passage)
    assert found and guest, passage
    number, name = found[1], found[2]
    facts = [
        {
            "evidence": found[0],
            "answer": f"第{number}号客店的店主叫马{name}。",
            "keys": [["马" + name, name]],
            "questions": [f"第{number}号客店的店主叫什么？", f"谁开着第{number}号客店？"],
        },
        {
            "evidence": guest[0],
            "answer": f"到第{number}号客店来的客人，为首的是{guest[1]}。",
            "keys": [[guest[1]]],
            "questions": [f"到第{number}号客店的那伙客人以谁为首？", f"领头住进第{number}号客店的叫什么名字？"],
        },
    ]
    if traditional:
        converted: list[dict[str, Any]] = json.loads(_to_traditional().convert(json.dumps(facts, ensure_ascii=False)))
        return converted
    return facts


class ScriptedEndpoint:
    """Serves in a thread of its own while the context is open.

    Attributes:
        asked: how often each passage has been asked about.
        answered: how often a passage got a good whole answer.
        headers: of every request.
        bodies: of every request.
    """

    def __init__(self, script: Script = lambda passage, before: GOOD, *, key: str = "", delay: float = 0.0) -> None:
        self.script, self.key, self.delay = script, key, delay
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.seed_rows: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()

        async def start() -> None:
            app = web.Application()
            app.router.add_post("/v1/chat/completions", self._complete)
            self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            port = self._runner.addresses[0][1]
            self.base_url = f"http://127.0.0.1:{port}/v1"
            ready.set()

        def serve() -> None:
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except ConnectionResetError:  # the client was killed
            return web.Response(status=400)
        self.headers.append(dict(request.headers))
        self.bodies.append(body)
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return _error(401, "Incorrect API key provided: " + request.headers.get("Authorization", ""))
        text = body["messages"][-1]["content"]
        passage, _, questions = text.partition("段落：\n")[2].partition("\n\n问题：\n")
        if self.delay:
            await asyncio.sleep(self.delay)
        if questions:
            return self._check(passage, questions)
        before = self.asked[passage]
        self.asked[passage] += 1
        return await self._answer(request, body, self.script(passage, before), passage)

    def _check(self, passage: str, questions: str) -> web.Response:
        """Answers every question right, but says it does not know about guests whose script is `doubtful`."""
        owner, guest = (fact["answer"] for fact in facts_of(passage))
        doubtful = self.script(passage, -1) == "doubtful"
        lines = questions.split("\n")
        answers = [("不知道" if doubtful else guest) if "客人" in q or "领头" in q else owner for q in lines]
        return _completion(json.dumps({"answers": answers}, ensure_ascii=False))

    async def _answer(self, request: web.Request, body: dict[str, Any], name: str, passage: str) -> web.StreamResponse:
        good = json.dumps({"facts": facts_of(passage)}, ensure_ascii=False)
        kind = body.get("response_format", {}).get("type", "none")
        if (
            name in ("no schema", "no json")
            and kind in ("json_schema", "json_object")[: 1 if name == "no schema" else 2]
        ):
            return _error(400, f"response_format {kind} is not supported")
        if name == "reasoning model" and "max_tokens" in body:
            return _error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if name == "reasoning model" and "temperature" in body:
            return _error(400, "Unsupported value: 'temperature' does not support 0.7 with this model.")
        if name in (GOOD, "reasoning model", "no schema", "no json", "doubtful"):
            self.answered[passage] += 1
            return _completion(good)
        if name == "ignores the schema":
            self.answered[passage] += 1
            return _completion(f"<think>想一想 {{}}</think>好的，问答如下：\n```json\n{good}\n```\n希望有帮助！")
        if name == "traditional":
            self.answered[passage] += 1
            return _completion(json.dumps({"facts": facts_of(passage, True)}, ensure_ascii=False))
        if name == "malformed":
            return _completion("抱歉，我不能按这个格式回答。")
        if name == "half":
            self.answered[passage] += 1
            return _completion(good[: good.rindex('"questions"') + 20], "length")
        if name == "seeds":
            return _completion(json.dumps({"facts": self._seed_facts(passage)}, ensure_ascii=False))
        if name == "false":
            return _completion(json.dumps({"facts": _false_facts(passage)}, ensure_ascii=False))
        if name == "html":
            return web.Response(text="<html>Bad gateway</html>", content_type="text/html")
        if name == "429":
            return _error(429, "too many requests")
        if name.startswith("429 after "):
            return _error(429, "too many requests", {"Retry-After": name.removeprefix("429 after ")})
        if name == "no money":
            return _error(429, "You exceeded your current quota", code="insufficient_quota")
        if name == "hang":
            await asyncio.sleep(3600)
        if name == "cut":
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            response.enable_chunked_encoding()
            await response.prepare(request)
            await response.write(json.dumps(_body(good)).encode()[:200])
            assert request.transport is not None
            request.transport.abort()
            return response
        return _error(int(name), f"scripted failure, authorization {request.headers.get('Authorization')}")

    def _seed_facts(self, passage: str) -> list[dict[str, Any]]:
        """A seed's question and answer with evidence and keys that would hold."""
        fact = facts_of(passage)[0]
        seed = self.seed_rows[0]
        return [fact | {"questions": [seed["question"]]}, fact | {"answer": seed["answer"], "keys": [["店主"]]}]


def _false_facts(passage: str) -> list[dict[str, Any]]:
    """Facts of which each fails by one rule, in the order of `FALSE_REASONS`."""
    fact = facts_of(passage)[0]
    name = fact["keys"][0][0]
    return [
        fact | {"evidence": "店主姓牛，单名一个牛字"},
        fact | {"keys": [["钓鱼"]]},
        fact | {"answer": "店主姓张，叫张飞。", "keys": [["张飞"]]},
        fact | {"questions": [f"{name}是谁？"]},
        fact | {"questions": ["文中的店主叫什么名字？"]},
        fact | {"questions": ["What is the name of the innkeeper?"]},
        fact | {"answer": "店" * 400 + name},
        fact | {"keys": []},
        {"question": 7},
    ]


FALSE_REASONS = (
    "证据不是原文",
    "答案里没有要点",
    "段落里没有要点",
    "问题里已有要点",
    "离开段落就看不懂",
    "语言不对",
    "太长或太短",
    "格式不对",
    "格式不对",
)


def _body(text: str, finish: str = "stop") -> dict[str, Any]:
    return {
        "id": "scripted",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
    }


def _completion(text: str, finish: str = "stop") -> web.Response:
    return web.json_response(_body(text, finish))


def _error(status: int, message: str, headers: dict[str, str] | None = None, code: str = "") -> web.Response:
    return web.json_response({"error": {"message": message, "code": code}}, status=status, headers=headers)
