"""Makes a question-answer set for books: passage after passage through an endpoint, into a journal, into the set.

The journal is the truth: a passage is in it with all its accepted and rejected rows, or it is asked (again). The set and
the file of rejected rows are written from it whenever a run ends, however it ends. Knows nothing of the command line.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from miniglm.corpus.cleaning import Book
from miniglm.errors import MiniGLMError
from miniglm.files import clean_temporaries, clean_temporaries_of, file_digest, keep_dated, write_whole
from miniglm.locking import hold
from miniglm.qa.endpoint import Endpoint, Reply, RequestError, StopError
from miniglm.qa.formats import Example, read_examples, to_row, write_jsonl
from miniglm.qa.grounding import Judge, Judged, parse_facts, passed_check
from miniglm.qa.journal import Journal
from miniglm.qa.passages import Passage, cut_passages
from miniglm.qa.prompts import (
    ANSWERS_SCHEMA,
    FACTS_SCHEMA,
    Message,
    check_messages,
    estimated_tokens,
    fact_messages,
    pick_seeds,
)
from miniglm.qa.text import bare
from miniglm.recipe import default_qa

FORMAT = 1
SECOND_TRIES = 2
"""How often a passage is asked whose reply holds not one fact that can be read."""
FAILURES_IN_A_ROW = 8
"""Passages that fail one after another before the run gives up on the endpoint."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What shapes a set: a run that goes on with a set must have the same.

    Attributes:
        passage: characters of a passage at most.
        facts: asked for a passage.
        phrasings: asked for a fact.
        check: ask every question again with only the passage to go by.
    """

    model: str
    passage: int = 1000
    facts: int = 4
    phrasings: int = 3
    check: bool = False


@dataclass(frozen=True, slots=True)
class Price:
    """Money for a million tokens in and out, in whatever currency the user thinks in."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True, slots=True)
class Budget:
    """Where to stop, over all runs that made the set; None: nowhere. `money` needs a price."""

    tokens: int | None = None
    money: float | None = None


@dataclass(slots=True)
class Progress:
    """Where a set stands, over all runs that made it."""

    passages: int
    done: int = 0
    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def count(self, record: dict[str, Any]) -> None:
        """Adds a record of the journal."""
        self.done += 1
        self.accepted += len(record["rows"])
        self.rejected += len(record["rejected"])
        self.prompt_tokens += record["prompt_tokens"]
        self.completion_tokens += record["completion_tokens"]
        self.reasons.update(each["reason"] for each in record["rejected"])


class BudgetReachedError(Exception):
    """The next request might cost more than is left."""


class _Purse:
    """Lets requests begin only while the most that they can cost is still there."""

    def __init__(self, budget: Budget, price: Price | None, progress: Progress) -> None:
        self._budget, self._price = budget, price
        self._spent = [progress.prompt_tokens, progress.completion_tokens]
        self._reserved = [0, 0]
        self._running = 0
        self._changed = asyncio.Event()

    def _fits(self, prompt: int, completion: int) -> bool:
        total = (self._spent[0] + self._reserved[0] + prompt, self._spent[1] + self._reserved[1] + completion)
        if self._budget.tokens is not None and sum(total) > self._budget.tokens:
            return False
        money = self._budget.money
        return money is None or self._price is None or self._price.cost(*total) <= money

    @asynccontextmanager
    async def request(self, prompt: int, completion: int) -> AsyncIterator[Callable[[Reply], None]]:
        """A request of at most so many tokens; the caller hands over the reply, if one comes.

        Raises:
            BudgetReachedError: it does not fit, and no running request can make room any more.
        """
        while not self._fits(prompt, completion):
            if not self._running:
                raise BudgetReachedError
            self._changed.clear()
            await self._changed.wait()
        self._running += 1
        self._reserved[0] += prompt
        self._reserved[1] += completion

        def settle(reply: Reply) -> None:
            self._spent[0] += reply.prompt_tokens
            self._spent[1] += reply.completion_tokens

        try:
            yield settle
        finally:
            self._running -= 1
            self._reserved[0] -= prompt
            self._reserved[1] -= completion
            self._changed.set()


class Synthesis:
    """A set in the making: its passages, its files and how far it is.

    Files: `OUT` (the set) and `OUT.rejected.jsonl`, both written anew from the journal; in the folder `OUT.synthesis`
    `journal.jsonl`, `request.json` (the settings) and `passages.jsonl`.

    Args:
        out: where the set shall be; what is there already must be of the same settings.
        seeds: pairs that are shown as examples.

    Raises:
        MiniGLMError: something else is at `out`, another process works on it, it was made with other settings, or its
            journal is damaged.
    """

    def __init__(self, books: Sequence[Book], seeds: Sequence[Example], settings: Settings, out: Path) -> None:
        self.settings, self.seeds, self.out = settings, seeds, out
        self.folder = work_folder(out)
        self.passages = cut_passages(books, settings.passage)
        if not self.passages:
            raise MiniGLMError("书里没有够长的段落可以出题", path="、".join(book.source for book in books))
        seeds_text = json.dumps([to_row(seed) for seed in seeds], ensure_ascii=False)
        request = asdict(settings) | {
            "format": FORMAT,
            "books": "、".join(f"{book.title}（{book.characters} 字）" for book in books),
            "passages": _digest("\n".join(p.id for p in self.passages)),
            "seeds": _digest(seeds_text),
        }
        self._open(request)
        known = {passage.id for passage in self.passages}
        self.records: dict[str, dict[str, Any]] = {}
        with Journal(self._journal) as journal:
            for number, record in enumerate(journal.records, 1):
                if missing_keys := _RECORD - record.keys():
                    missing = "、".join(sorted(missing_keys))
                    raise MiniGLMError(
                        f"这一行缺少 {missing}", path=self._journal, line=number, fix="删掉这一行，它会重做"
                    )
                if record["passage"] in known:
                    self.records.setdefault(record["passage"], record)
        self.progress = Progress(len(self.passages))
        for record in self.records.values():
            self.progress.count(record)

    @property
    def _journal(self) -> Path:
        return self.folder / "journal.jsonl"

    def _open(self, request: dict[str, Any]) -> None:
        path = self.folder / "request.json"
        if self.out.exists() and not path.exists():
            raise MiniGLMError("这个文件已经有了，不会覆盖", path=self.out, fix="换一个 --out")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MiniGLMError(f"建不了这个目录（{error.strerror}）", path=self.folder, fix="换一个 --out") from None
        self._lock = hold(self.folder, "synthesis", what="问答集")
        clean_temporaries(self.folder)
        for file in (self.out, rejected_file(self.out)):
            clean_temporaries_of(file)
        if not path.exists():
            rows = ({"id": p.id, "book": p.book, "chapter": p.chapter, "text": p.text} for p in self.passages)
            write_jsonl(self.folder / "passages.jsonl", rows)
            write_whole(path, json.dumps(request, ensure_ascii=False, indent=2) + "\n")
            return
        try:
            before = json.loads(path.read_text("utf-8"))
            changed = [
                f"{_SETTING_NAMES.get(key, key)} {before.get(key)!r} → {request[key]!r}"
                for key in request
                if before.get(key) != request[key]
            ]
        except (OSError, ValueError, AttributeError):
            raise MiniGLMError("不是完整的设置文件", path=path, fix="换一个 --out 重新开始") from None
        if changed:
            raise MiniGLMError(
                f"这个问答集是用别的设置做到一半的：{'；'.join(changed)}",
                path=path,
                fix="改回原来的设置，或换一个 --out",
            )

    def todo(self) -> list[Passage]:
        """Passages that are not in the journal."""
        return [passage for passage in self.passages if passage.id not in self.records]

    def estimate(self) -> tuple[int, int]:
        """Tokens that the passages still to be done will take, in and out, roughly."""
        prompt = completion = 0
        for passage in self.todo():
            messages = self._messages(passage)
            prompt += estimated_tokens(messages)
            completion += self._completion()
            if self.settings.check:
                prompt += len(passage.text) + 200 + 30 * self._questions()
                completion += 25 * self._questions()
        return prompt, completion

    def _questions(self) -> int:
        return self.settings.facts * self.settings.phrasings

    def _completion(self) -> int:
        """Tokens of a reply: per fact about 110 for answer, evidence, keys and form, 30 a question."""
        return self.settings.facts * (110 + 30 * self.settings.phrasings)

    def _messages(self, passage: Passage) -> list[Message]:
        seeds = pick_seeds(self.seeds, passage)
        return fact_messages(passage, seeds, facts=self.settings.facts, phrasings=self.settings.phrasings)

    async def run(
        self,
        endpoint: Endpoint,
        *,
        at_once: int = 8,
        budget: Budget | None = None,
        price: Price | None = None,
        progress: Callable[[Progress], None] = lambda progress: None,
    ) -> str:
        """Asks for what is missing, `at_once` passages at a time, and writes the set, also when it is cancelled.

        Returns:
            "" when nothing is left to do or to try, else why it stopped, for the user.
        """
        todo = deque(self.todo())
        rows = (row for record in self.records.values() for row in record["rows"])
        judge = Judge(self.seeds, {bare(row["question"]) for row in rows})
        purse = _Purse(budget or Budget(), price, self.progress)
        stopped, in_a_row = "", 0

        async def work(journal: Journal) -> None:
            nonlocal stopped, in_a_row
            while todo and not stopped:
                passage = todo.popleft()
                try:
                    record = await self._ask(endpoint, passage, judge, purse)
                except BudgetReachedError:
                    stopped = stopped or "预算用完了"
                    return
                except StopError as error:
                    stopped = stopped or str(error)
                    return
                except RequestError as error:
                    self.progress.failed += 1
                    self.progress.failures[str(error)] += 1
                    in_a_row += 1
                    if in_a_row >= FAILURES_IN_A_ROW:
                        stopped = stopped or f"连续 {in_a_row} 个段落失败，最后一次：{error}"
                else:
                    in_a_row = 0
                    journal.append(record)
                    self.records[passage.id] = record
                    self.progress.count(record)
                progress(self.progress)

        try:
            with Journal(self._journal) as journal:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(at_once, len(todo))):
                        group.create_task(work(journal))
        except BaseExceptionGroup as group_error:  # the disk is full: one line, as from anywhere else
            raise next(iter(group_error.exceptions)) from None
        finally:
            self.write()
        return stopped

    async def _ask(self, endpoint: Endpoint, passage: Passage, judge: Judge, purse: _Purse) -> dict[str, Any]:
        """The journal's record of a passage."""
        spent = [0, 0]

        async def complete(messages: list[Message], schema: dict[str, Any], max_tokens: int) -> Reply:
            async with purse.request(estimated_tokens(messages), max_tokens) as settle:
                reply = await endpoint.complete(messages, schema, max_tokens)
                settle(reply)
            spent[0] += reply.prompt_tokens
            spent[1] += reply.completion_tokens
            return reply

        most = 3 * self._completion() + 200
        unread: list[dict[str, Any]] = []
        facts: list[Any] = []
        for _ in range(SECOND_TRIES):
            reply = await complete(self._messages(passage), FACTS_SCHEMA, most)
            facts, faults = parse_facts(reply.text)
            unread += [fault | {"passage": passage.id} for fault in faults]
            if facts or not faults:
                break
        judged = judge.judge(passage, facts)
        if self.settings.check and judged.rows:
            try:
                messages = check_messages(passage, [row["question"] for row in judged.rows])
                reply = await complete(messages, ANSWERS_SCHEMA, 60 * len(judged.rows) + 200)
            except BaseException:
                judge.forget(judged.rows)
                raise
            checked = passed_check(judged.rows, reply.text)
            judge.forget(checked.rejected)
            judged = Judged(checked.rows, judged.rejected + checked.rejected)
        return {
            "passage": passage.id,
            "rows": [row | {"source": self.settings.model, "passage": passage.id} for row in judged.rows],
            "rejected": unread + judged.rejected,
            "prompt_tokens": spent[0],
            "completion_tokens": spent[1],
        }

    def write(self) -> None:
        """Writes the set and the rejected rows from the journal, in the order of the book. A set that the user has
        changed since it was written keeps its content under a name with its date."""
        records = [self.records[p.id] for p in self.passages if p.id in self.records]
        rows = [row for record in records for row in record["rows"]]
        mark = self.folder / "written.txt"
        if self.out.exists():
            last = mark.read_text("utf-8").strip() if mark.exists() else ""
            if file_digest(self.out)[:16] != last:
                keep_dated(self.out)
        write_jsonl(self.out, rows)
        write_whole(mark, file_digest(self.out)[:16] + "\n")
        write_jsonl(rejected_file(self.out), (row for record in records for row in record["rejected"]))


_RECORD = {"passage", "rows", "rejected", "prompt_tokens", "completion_tokens"}
_SETTING_NAMES = {
    "model": "模型",
    "passage": "--passage",
    "facts": "--facts",
    "phrasings": "--phrasings",
    "check": "--check",
    "books": "书",
    "passages": "书的内容",
    "seeds": "示例",
    "format": "格式",
}


def read_seeds(file: Path | None) -> list[Example]:
    """The user's own pairs, or those that come with the program, one a fact.

    Raises:
        MiniGLMError: as `read_examples`.
    """
    found = read_examples(file or default_qa()["train"]).examples
    facts = {example.id or str(number): example for number, example in enumerate(found)}
    return list(facts.values())


def work_folder(out: Path) -> Path:
    """Where the journal of a set lies."""
    return out.with_name(f"{out.stem}.synthesis")


def rejected_file(out: Path) -> Path:
    """Where the rows lie that did not get into a set."""
    return out.with_name(f"{out.stem}.rejected.jsonl")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
