"""Answers with their sources: the answer of a fact that was taught, or the best passage of the book, quoted, or that
the book has none. Knows nothing of models, chat or the command line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from miniglm.errors import MiniGLMError
from miniglm.lookup.encoder import Encoder
from miniglm.lookup.facts import Memory
from miniglm.lookup.library import Library, Passage
from miniglm.lookup.look import Judge, Look, look, ranked, signals

NOT_FOUND = "书中没有找到相关内容"
SHOWN = 5
"""Citations of an answer at most."""
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that an answer rests on, or that is nearest to a question without one.

    Attributes:
        chapter: the chapter's number, 0 before the first; `chapter_title`: its heading, "" before the first.
        paragraph: 1-based number in the book, headings included; `start`: the character of it where `text` begins.
        score: how sure it is that this passage answers, 0 to 1; falls from one citation to the next.
    """

    book: str
    chapter: int
    chapter_title: str
    paragraph: int
    start: int
    text: str
    score: float

    @property
    def label(self) -> str:
        """【第四十二回】, or the book's title where it has no chapters."""
        if not self.chapter_title:
            return f"【{self.book}】"
        return f"【{self.chapter_title.split()[0]}】"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it rests on.

    Attributes:
        kind: "fact" (the answer of a taught fact), "quote" (the first citation's text), "refused" (`NOT_FOUND`).
        confidence: how sure it is that the text is right, or of a refusal that the book tells nothing, 0 to 1.
    """

    text: str
    citations: tuple[Citation, ...]
    kind: Literal["fact", "quote", "refused"]
    confidence: float

    @property
    def refused(self) -> bool:
        """Whether nothing is claimed."""
        return self.kind == "refused"


def has_index(folder: Path) -> bool:
    """Whether a whole index lies in the folder."""
    return (folder / "index.json").is_file()


class Answerer:
    """Answers questions from an index.

    Args:
        folder: where `build_index` wrote it.

    Raises:
        MiniGLMError: there is none, it is damaged, or of another version.
    """

    def __init__(self, folder: Path) -> None:
        if not has_index(folder):
            raise MiniGLMError("这里没有检索的索引", path=folder, fix="先运行 miniglm index")
        try:
            form = json.loads((folder / "index.json").read_text("utf-8"))["format"]
            judge = json.loads((folder / "judge.json").read_text("utf-8"))
            if form != FORMAT:
                raise ValueError(f"格式是 {form}，这个版本只认 {FORMAT}")
            self.judge = Judge.from_json(judge)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MiniGLMError(f"检索的索引读不出来（{error}）", path=folder, fix="请重新运行 miniglm index") from None
        self.encoder = Encoder.load(folder / "encoder")
        self.library = Library(folder / "books")
        self.memory = Memory.load(folder / "facts")

    def answer(self, question: str) -> Answer:
        """The answer, refused where the judge holds that the books have none. At most `SHOWN` citations that do not
        overlap, the one it rests on first."""
        return self.decide(self.look(question))

    def look(self, question: str) -> Look:
        """What both memories have for the question."""
        return look(question, self.encoder, self.memory, self.library)

    def decide(self, found: Look) -> Answer:
        """The answer to a question from what was found for it."""
        judge = self.judge
        facts, passages = judge.fact_ranker(found.facts.features), judge.passage_ranker(found.passages.features)
        full, plain = signals(found, facts, passages)
        if len(facts):
            inside, threshold = float(judge.inside(full)), judge.threshold
            sure_fact, sure_quote = _share(float(judge.fact_right(full))), _share(float(judge.passage_right(full)))
        else:
            inside, threshold = float(judge.inside_passages(plain)), judge.threshold_passages
            sure_fact, sure_quote = 0.0, _share(float(judge.inside_passages(plain)))
        order = ranked(passages)
        shares = np.exp(passages[order] - passages[order[0]]) if len(order) else np.zeros(0)
        shares = shares / max(float(shares.sum()), 1e-9)
        shown = [(found.texts[place], float(share) * sure_quote) for place, share in zip(order, shares, strict=True)]
        if inside < threshold or not (len(facts) or len(shown)):
            return Answer(NOT_FOUND, _cite(shown), "refused", 1 - _share(inside - threshold))
        if len(facts) and sure_fact >= sure_quote:
            fact = self.memory.facts[int(found.facts.numbers[ranked(facts)[0]])]
            if fact.passage >= 0:
                shown.insert(0, (self.library.passage(fact.passage), sure_fact))
            return Answer(fact.answer, _cite(shown), "fact", sure_fact)
        return Answer(shown[0][0].text, _cite(shown), "quote", sure_quote)


def _share(log_odds: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(log_odds, -30, 30))))


def _cite(found: list[tuple[Passage, float]]) -> tuple[Citation, ...]:
    """The first passages, without those that share text with one before them."""
    kept: list[Citation] = []
    for p, score in found:
        overlaps = any(
            (c.book, c.paragraph) == (p.book, p.paragraph)
            and c.start < p.start + len(p.text)
            and p.start < c.start + len(c.text)
            for c in kept
        )
        if not overlaps:
            score = min([score, *(c.score for c in kept[-1:])])
            kept.append(Citation(p.book, p.chapter, p.chapter_title, p.paragraph, p.start, p.text, round(score, 4)))
        if len(kept) == SHOWN:
            break
    return tuple(kept)
