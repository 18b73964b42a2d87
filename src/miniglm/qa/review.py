"""A person goes through a set: what has been decided, kept at every decision, and what the set then is.

The set's file is never changed. Decisions are appended to a journal beside it, each with a digest of its row, so they
hold for a set that is read again, also after rows were added. Knows nothing of the page that shows it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miniglm.corpus.cleaning import Book
from miniglm.errors import MiniGLMError
from miniglm.files import file_digest, keep_dated
from miniglm.qa.curation import Criteria, curate
from miniglm.qa.formats import Example, read_examples, to_row, write_jsonl
from miniglm.qa.grounding import find_verbatim
from miniglm.qa.journal import Journal
from miniglm.qa.keys import key_hits
from miniglm.qa.synthesis import work_folder

Verdict = Literal["keep", "edit", "reject"]
AROUND = 300
"""Characters of the book that are shown on either side of the evidence."""
NO_KEYS = "没有要点"
NO_EVIDENCE = "没有证据"
NOT_IN_EVIDENCE = "要点不在证据里"
NO_PASSAGE = "找不到证据在哪里"


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided on a row; the texts are those that the row shall have."""

    verdict: Verdict
    question: str
    answer: str
    keys: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """A row's passage in three parts; the middle one is the evidence. All "" where the place is not known."""

    before: str
    evidence: str
    after: str


class Review:
    """A set under review.

    Args:
        file: the set, of any format.
        books: where the evidence is looked up; without them, in the passages that synthesis left beside the set.

    Raises:
        MiniGLMError: as `read_examples`, or the journal of decisions is damaged.
    """

    def __init__(self, file: Path, books: Sequence[Book] = ()) -> None:
        self.file = file
        found = read_examples(file)
        self.examples = list(found.examples)
        self._rows = [found.row(e) for e in self.examples]
        seen: Counter[str] = Counter()
        self._names = []
        for row in self._rows:
            digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
            self._names.append(f"{digest}-{seen[digest]}")  # equal rows are told apart by their order
            seen[digest] += 1
        self._book = "\n".join(p.text for book in books for p in book.paragraphs)
        self._passages = {} if self._book else _passages(file)
        self.doubts = self._doubts()
        self._journal = Journal(decisions_file(file))
        self._written = {str(record["written"]) for record in self._journal.records if "written" in record}
        numbers = {name: number for number, name in enumerate(self._names)}
        self.decisions: dict[int, Decision] = {}
        for line, record in enumerate(self._journal.records, 1):
            if record.get("row") in numbers:
                self.decisions[numbers[record["row"]]] = _decision(record, self._journal.path, line)

    def _doubts(self) -> list[list[str]]:
        """For each row why it may be wrong; a reason to look, not to reject."""
        faults = curate(self.examples, Criteria(), self._book or None)
        found = []
        for number, example in enumerate(self.examples):
            doubts = [faults[number].reason] if number in faults else []
            evidence = self.evidence(number)
            if not example.keys:
                doubts.append(NO_KEYS)
            if not evidence:
                doubts.append(NO_EVIDENCE)
            else:
                if example.keys and not any(key_hits(evidence, example.keys)):
                    doubts.append(NOT_IN_EVIDENCE)
                if (self._book or self._passages) and not self.shown(number).evidence:
                    doubts.append(NO_PASSAGE)
            found.append(list(dict.fromkeys(doubts)))
        return found

    def evidence(self, number: int) -> str:
        """A row's evidence, or ""."""
        evidence = self.examples[number].extra.get("evidence")
        return evidence if isinstance(evidence, str) else ""

    def shown(self, number: int) -> Shown:
        """Where a row's evidence stands."""
        text = self._book or self._passages.get(str(self.examples[number].extra.get("passage", "")), "")
        found = find_verbatim(self.evidence(number), text)
        if not found:
            return Shown(text if not self._book else "", "", "")
        at = text.find(found)
        begin, end = max(0, at - AROUND), at + len(found) + AROUND
        return Shown(text[begin:at], found, text[at + len(found) : end])

    def chapters(self) -> list[str]:
        """The chapters of the set, in order."""
        return list(dict.fromkeys(str(e.extra["chapter"]) for e in self.examples if "chapter" in e.extra))

    def visible(self, chapter: str = "", doubt: str = "") -> list[int]:
        """Rows of a chapter with a doubt; "" is any, and "*" any doubt at all."""
        return [
            number
            for number, example in enumerate(self.examples)
            if chapter in ("", str(example.extra.get("chapter", "")))
            and (not doubt or (doubt == "*" and self.doubts[number]) or doubt in self.doubts[number])
        ]

    def current(self, number: int) -> Decision:
        """What is decided on a row, or would be by keeping it as it is."""
        example = self.examples[number]
        return self.decisions.get(number) or Decision("keep", example.question, example.answer, example.keys)

    def decide(self, number: int, keep: bool, question: str, answer: str, keys: tuple[tuple[str, ...], ...]) -> None:
        """Keeps a row, with these texts, or rejects it; on the disk when this returns.

        Raises:
            MiniGLMError: it shall be kept without a question or an answer, or cannot be written down.
        """
        question, answer = question.strip(), answer.strip()
        if keep and not (question and answer):
            raise MiniGLMError(f"第 {number + 1} 条的问题或答案是空的", fix="写上再保留，或者弃掉")
        example = self.examples[number]
        same = (question, answer, keys) == (example.question, example.answer, example.keys)
        verdict: Verdict = "reject" if not keep else "keep" if same else "edit"
        decision = Decision(verdict, question, answer, keys)
        self._journal.append(
            {"row": self._names[number], "verdict": verdict, "question": question, "answer": answer, "keys": keys}
        )
        self.decisions[number] = decision

    def counts(self) -> Counter[str]:
        """How many rows were kept, edited and rejected."""
        return Counter(decision.verdict for decision in self.decisions.values())

    def write(self, out: Path) -> int:
        """Writes the set without the rejected rows and with the edits; rows that nobody has looked at are in it. What
        stands there is kept under a name with its date, unless this review has written it. Returns the number of
        rows."""
        if out.exists() and file_digest(out) not in self._written:
            keep_dated(out)
        rows = []
        for number, row in enumerate(self._rows):
            decision = self.decisions.get(number)
            if decision is None or decision.verdict == "keep":
                rows.append(row)
            elif decision.verdict == "edit":
                rows.append(self._edited(number, decision))
        write_jsonl(out, rows)
        written = file_digest(out)
        self._written.add(written)
        self._journal.append({"written": written})
        return len(rows)

    def _edited(self, number: int, decision: Decision) -> dict[str, Any]:
        row = self._rows[number]
        keys = {"keys": [list(group) for group in decision.keys]} if decision.keys or "keys" in row else {}
        if "question" in row and "answer" in row:
            return row | {"question": decision.question, "answer": decision.answer} | keys
        example = self.examples[number]
        turn = type(example.turns[-1])(decision.question, decision.answer)
        made = Example((*example.turns[:-1], turn), example.system, decision.keys, example.id, example.extra)
        return to_row(made)

    def close(self) -> None:
        self._journal.__exit__(None, None, None)


def decisions_file(file: Path) -> Path:
    """Where the decisions on a set lie."""
    return file.with_name(f"{file.stem}.review.jsonl")


def _decision(record: dict[str, Any], path: Path, line: int) -> Decision:
    try:
        keys = tuple(tuple(str(key) for key in group) for group in record["keys"])
        if record["verdict"] not in ("keep", "edit", "reject"):
            raise ValueError
        return Decision(record["verdict"], str(record["question"]), str(record["answer"]), keys)
    except (KeyError, TypeError, ValueError):
        raise MiniGLMError("这一行不是完整的决定", path=path, line=line, fix="删掉这一行，再看一次那条问答") from None


def _passages(file: Path) -> dict[str, str]:
    """The passages that synthesis left beside a set it made, by id."""
    path = work_folder(file) / "passages.jsonl"
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    return {row["id"]: row["text"] for row in rows}


def keys_text(keys: Sequence[Sequence[str]]) -> str:
    """Keys as a person edits them: a group a line, its alternatives between strokes."""
    return "\n".join(" / ".join(group) for group in keys)


def parse_keys(text: str) -> tuple[tuple[str, ...], ...]:
    """The other way round."""
    groups = (tuple(part.strip() for part in line.split("/") if part.strip()) for line in text.splitlines())
    return tuple(group for group in groups if group)
