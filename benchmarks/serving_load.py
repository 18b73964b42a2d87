"""What `miniglm serve` gives to 1, 8, 32 and 128 clients that stream at once, and whether its memory stays flat.

    python benchmarks/serving_load.py RUN [--seconds 20] [--clients 1 8 32 128] [--requests 10000] [--json FILE]

Starts the server on a free loopback port; the clients are this process. Each asks the run's validation questions, one
after another on a new connection each, greedy, with the server's own limit of tokens, so answers are as long as users
get them. They take the server's cores, so they only keep what comes and when; it is read after the measured time, and
the column "own CPU" says how much of a core they took. The row "chat" is what `miniglm chat` does with the same
questions, one after another, in a process of its own before the server starts: one request alone should be as fast. A
refusal with 429 is counted and tried again after what Retry-After says. With `--requests` that many more requests are
made by 32 clients, every tenth left in the middle, while the server's memory is watched.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

WARM_UP = 2.0
"""Seconds before what is measured."""
MEMORY_CLIENTS = 32


class Answer(asyncio.Protocol):
    """What comes on a connection, and when. `ended` is done at the stream's own end, or when the connection ends.

    Args:
        leave: end the connection when the first text has come.
    """

    def __init__(self, request: bytes, leave: bool) -> None:
        self.request, self.leave = request, leave
        self.asked = time.perf_counter()
        self.parts: list[tuple[float, bytes]] = []
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.parts.append((time.perf_counter(), data))
        if b"data: [DONE]" in data or (self.leave and re.search(rb'"content":"[^"]', data)):
            self._end()
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers.

        Raises:
            ValueError, IndexError: no HTTP.
        """
        head, _, _ = b"".join(data for _, data in self.parts).partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        return int(status.split()[1]), {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}

    def events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """When each event was there, and what it says."""
        held = b""
        for moment, data in self.parts:
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield moment, json.loads(line[6:])


@dataclass
class Tally:
    """What the clients saw within the measured time.

    Attributes:
        whole: answers to be read when the time is over.
    """

    begin: float
    end: float
    characters: int = 0
    answers: int = 0
    first: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    whole: list[Answer] = field(default_factory=list)

    def counts(self, moment: float) -> bool:
        return self.begin <= moment < self.end

    def error(self, name: str, moment: float | None = None) -> None:
        if self.counts(time.perf_counter() if moment is None else moment):
            self.errors[name] += 1

    def read(self) -> None:
        """Counts what the answers say."""
        for answer in self.whole:
            first, ended = True, answer.leave
            for moment, event in answer.events():
                counted = self.counts(moment)
                if "error" in event:
                    self.error(event["error"]["message"], moment)
                    ended = True
                    break
                if text := event["choices"][0]["delta"].get("content"):
                    if first and counted:
                        self.first.append(moment - answer.asked)
                    first = False
                    self.characters += counted * len(text)
                if event["choices"][0]["finish_reason"]:
                    ended = True
                    self.answers += counted
            if not ended:
                self.error("an answer without its end", answer.parts[-1][0])
        self.whole.clear()


@contextlib.contextmanager
def serving(run: Path) -> Iterator[tuple[int, psutil.Process]]:
    """The server in a process of its own: its port, and the process."""
    command = [sys.executable, "-m", "miniglm", "serve", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"127\.0\.0\.1:(\d+)/v1", line):
                yield int(found[1]), psutil.Process(process.pid)
                break
        else:
            raise SystemExit("the server did not start")
    finally:
        process.send_signal(signal.SIGTERM)
        if code := process.wait():
            print(f"the server ended with {code}", file=sys.stderr)


def memory_of(server: psutil.Process) -> float:
    """MiB that the server's processes have in memory."""
    return sum(p.memory_info().rss for p in (server, *server.children(recursive=True))) / 2**20


CHAT = """
import json, sys, time
from pathlib import Path
import miniglm.cli  # sets what the command line sets
from miniglm.chat import ChatSession
from miniglm.checkpoint import load_model
from miniglm.locate import find_model
from miniglm.sampling import SamplingSettings

model, tokenizer = load_model(find_model(Path(sys.argv[1])))
session = ChatSession(model, tokenizer, SamplingSettings(stop_ids=tokenizer.stop_ids))
characters, answers, end = 0, 0, None
for question in json.load(sys.stdin):
    for piece in session.reply(question):
        characters += len(piece)
    now = time.perf_counter()
    if end is None and answers == 9:  # those warmed up
        characters, answers, begin, end = 0, -1, now, now + float(sys.argv[2])
    answers += 1
    if end is not None and now > end:
        break
print(json.dumps([characters / (now - begin), answers]))
"""


def chat(run: Path, asked: list[str], seconds: float) -> dict[str, Any]:
    """Characters a second of `miniglm chat` with the questions in the first client's order."""
    order = asked[:]
    random.Random(0).shuffle(order)
    repeated = list(itertools.islice(itertools.cycle(order), 100_000))
    command = [sys.executable, "-c", CHAT, str(run), str(seconds)]
    done = subprocess.run(command, input=json.dumps(repeated), stdout=subprocess.PIPE, text=True, check=True)
    speed, answers = json.loads(done.stdout)
    return {"characters_per_second": speed, "answers": answers}


def questions(run: Path) -> list[str]:
    file = run / "qa" / "validation.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    found = [str(row["question"]) for row in rows if row.get("question")]
    return found or ["曹操是谁？", "谁借了东风？", "关羽字什么？"]


async def ask(port: int, model: str, question: str, tally: Tally, *, leave: bool = False, **more: Any) -> float:
    """One streamed answer; seconds to wait before the next request."""
    messages = [{"role": "user", "content": question}]
    # The model is measured, not what is looked up.
    body = json.dumps({"model": model, "messages": messages, "stream": True, "look_up": False} | more).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    answer = Answer(head.encode() + body, leave)
    await asyncio.get_running_loop().create_connection(lambda: answer, "127.0.0.1", port)
    await answer.ended
    status, headers = answer.head()
    if status != 200:
        tally.error(str(status))
        return float(headers.get("retry-after", 1))
    tally.whole.append(answer)
    return 0.0


async def client(port: int, model: str, asked: list[str], tally: Tally, seed: int) -> None:
    order = asked[:]
    random.Random(seed).shuffle(order)
    for question in itertools.cycle(order):
        if time.perf_counter() >= tally.end:
            return
        try:
            wait = await ask(port, model, question, tally)
        except (OSError, ValueError, IndexError) as error:
            tally.error(type(error).__name__)
            wait = 0.1
        if wait:
            await asyncio.sleep(wait)


async def load(port: int, model: str, asked: list[str], clients: int, seconds: float) -> dict[str, Any]:
    """So many clients for so long."""
    begin = time.perf_counter() + WARM_UP
    tally = Tally(begin, begin + seconds)
    running = asyncio.gather(*(client(port, model, asked, tally, seed) for seed in range(clients)))
    await asyncio.sleep(begin - time.perf_counter())
    used = time.process_time()
    await asyncio.sleep(tally.end - time.perf_counter())
    used = time.process_time() - used
    await running
    tally.read()
    first = sorted(tally.first)
    return {
        "clients": clients,
        "characters_per_second": tally.characters / seconds,
        "answers": tally.answers,
        "first_median": statistics.median(first) if first else None,
        "first_p95": first[math.ceil(0.95 * len(first)) - 1] if first else None,
        "clients_core": used / seconds,
        "errors": dict(tally.errors),
    }


async def flood(
    port: int, model: str, asked: list[str], requests: int, server: psutil.Process
) -> list[tuple[int, float]]:
    """Memory in MiB after the first requests and at each tenth of the rest."""
    memory: list[tuple[int, float]] = []
    tally = Tally(0, float("inf"))
    numbers = iter(range(requests))
    marks = {requests // 20, *(requests * tenth // 10 - 1 for tenth in range(1, 11))}

    async def one() -> None:
        for number in numbers:
            question = asked[number % len(asked)]
            wait = await ask(port, model, question, tally, leave=number % 10 == 9, max_tokens=32)
            tally.read()
            if number in marks:
                memory.append((number + 1, memory_of(server)))
            await asyncio.sleep(wait)

    await asyncio.gather(*(one() for _ in range(MEMORY_CLIENTS)))
    if tally.errors:
        print(f"errors: {dict(tally.errors)}")
    return sorted(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of clients")
    parser.add_argument("--requests", type=int, default=0, help="then so many requests, watching memory")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    asked = questions(given.run)
    alone = chat(given.run, asked, given.seconds)
    with serving(given.run) as (port, server):
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
            model = json.load(answer)["data"][0]["id"]
        rows = []
        print(
            f"{'clients':>7}  {'char/s':>8}  {'to one':>6}  {'answers':>7}  {'first, median':>13}  {'p95':>7}  {'own CPU':>7}  errors"
        )
        print(f"{'chat':>7}  {alone['characters_per_second']:>8,.0f}  {'':>6}  {alone['answers']:>7}")
        for clients in given.clients:
            row = asyncio.run(load(port, model, asked, clients, given.seconds))
            rows.append(row)
            row["ratio"] = row["characters_per_second"] / max(rows[0]["characters_per_second"], 1e-9)
            first, p95 = (f"{1000 * (row[name] or 0):,.0f} ms" for name in ("first_median", "first_p95"))
            print(
                f"{clients:>7}  {row['characters_per_second']:>8,.0f}  {row['ratio']:>6.1f}  {row['answers']:>7}"
                f"  {first:>13}  {p95:>7}  {row['clients_core']:>7.0%}  {row['errors'] or 'none'}",
                flush=True,
            )
        memory: list[tuple[int, float]] = []
        if given.requests:
            memory = asyncio.run(flood(port, model, asked, given.requests, server))
            for number, mebibytes in memory:
                print(f"after {number:>6,} requests {mebibytes:>8,.1f} MiB")
        rss = memory_of(server)
    print(f"server's memory at the end {rss:,.1f} MiB; {os.cpu_count()} cores")
    if given.json:
        found = {"chat": alone, "load": rows, "memory_mib": memory, "final_mib": rss, "cores": os.cpu_count()}
        given.json.write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
