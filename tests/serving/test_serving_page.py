"""The chat page in a real browser, over a service whose answers are known."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from miniglm.chat import Message
from miniglm.serving.page import Facts, SplitScore, mount_page
from miniglm.serving.service import Options, Piece, ServiceError

HTML = (
    "<script>document.title='坏'</script><img src=https://example.com/a.png onerror=\"document.title='坏'\">"
    "![图](https://example.com/b.png) [链接](https://example.com) **粗** $$x^2$$ &lt;b&gt; <!-- 注释 --> <b>粗</b>"
)
ANSWER = "曹操是沛国谯县人，字孟德，小字阿瞒。"


class Scripted:
    """Says what a question asks it to, character by character."""

    model_id = "miniglm"

    def __init__(self) -> None:
        self.pause = 0.02
        self.asked: list[tuple[list[Message], Options]] = []
        self.closed = 0

    async def _say(self, text: str) -> AsyncIterator[Piece]:
        try:
            for number, character in enumerate(text, 1):
                await asyncio.sleep(self.pause)
                yield Piece(character, number)
        finally:
            self.closed += 1

    def chat(self, messages: Sequence[Message], options: Options) -> AsyncIterator[Piece]:
        self.asked.append((list(messages), options))
        question = messages[-1]["content"]
        if "忙" in question:
            return self._busy()
        if "坏" in question:
            return self._broken()
        if "无" in question:
            return self._say("")
        if "代码" in question:
            return self._say(HTML)
        return self._say("慢" * 400 if "慢" in question else ANSWER)

    def complete(self, prompt: str, options: Options) -> AsyncIterator[Piece]:
        self.asked.append(([{"role": "user", "content": prompt}], options))
        return self._say("，投南而走。操引军追之。\n却说玄德闻之，大惊。" * 4)

    async def _busy(self) -> AsyncIterator[Piece]:
        raise ServiceError("现在太忙：等着的请求已有 128 个（上限 queue），请稍后再试", status=429)
        yield

    async def _broken(self) -> AsyncIterator[Piece]:
        yield Piece("刚说", 1)
        raise RuntimeError("secret detail")


FACTS = Facts(
    "demo",
    books=("三国演义",),
    parameters=4_100_000,
    layers=4,
    context=256,
    examples=("曹操是哪里人？", "谁在长坂坡救出阿斗？", "诸葛亮第一次北伐失了哪里？", "温酒斩华雄的是谁？", "孙策死后谁继位？", "<b>谁</b>斩了颜良？"),
    scores=(SplitScore("validation", 0.264, 0.241, 0.285, 1587), SplitScore("unseen", 0.028, 0.014, 0.044, 504)),
    has_report=True,
)


class Site:
    """The page on a free port, in a thread."""

    def __init__(self, feedback: Path | None, facts: Facts = FACTS) -> None:
        self.service, self.feedback = Scripted(), feedback
        app = FastAPI()
        mount_page(app, self.service, facts, feedback=feedback)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
