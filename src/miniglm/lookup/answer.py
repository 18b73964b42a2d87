"""Answers with their sources: the answer of a fact that was taught, or the best passage of the book, quoted, or that
the book has none. Knows nothing of models, chat or the command line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from miniglm.errors import MiniGLMError
from miniglm.lookup.encoder import Encoder
from miniglm.lookup.excerpts import Excerpt, cut_up, likeliest
from miniglm.lookup.facts import Memory
from miniglm.lookup.fault import damaged
from miniglm.lookup.features import Sources
from miniglm.lookup.library import Library, Passage
from miniglm.lookup.look import (
    SEVERAL,
    Judge,
    Look,
    Scores,
    in_doubt,
    likely,
    linear_scores,
    look,
    ranked,
    reranked,
    share_of,
    signals,
)
from miniglm.lookup.reranker import Rerankers
from miniglm.lookup.text import PASSAGE

NOT_FOUND = "书中没有找到相关内容"
SHOWN = 5
"""Citations of an answer at most."""
PART = 60
"""Characters that a quote has at most that does not stand alone, a longer sentence aside."""
LEAST_QUOTE = 0.25
"""Of the chance of the first quote, what another's must be to be shown as well. Chosen as `look.DOUBT` was: docs/lookup.md
has what more and less of these would do."""
WINDOW = 250
"""Characters that a citation has at most around the passage it is about, a longer passage aside."""
FORMAT, READABLE = 4, (3, 4)
"""What is written, and what is read: 3 had no rerankers."""
RERANKER = "reranker"
"""Where in an index the rerankers lie, if it has some."""


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that an answer rests on, or that is nearest to a question without one.

    Attributes:
        chapter: the chapter's number, 0 before the first; `chapter_title`: its heading, "" before the first.
        paragraph: 1-based number in the book, headings included; `start`: the character of it where `text` begins.
        text: whole sentences; `quote`: the first and last character in `text` of those that it is about.
        score: how sure it is that this passage answers, 0 to 1; falls from one citation to the next.
    """

    book: str
    chapter: int
    chapter_title: str
    paragraph: int
    start: int
    text: str
    quote: tuple[int, int]
    score: float

    @property
    def quoted(self) -> str:
        """The sentences that it is about."""
        return self.text[self.quote[0] : self.quote[1]]

    @property
    def label(self) -> str:
        """【第四十二回】, or the book's title where it has no chapters."""
        if not self.chapter_title:
            return f"【{self.book}】"
        return f"【{self.chapter_title.split()[0]}】"


@dataclass(frozen=True, slots=True)
class Statement:
    """One of what an answer says: a sentence that was taught, or, `verbatim`, the book's own words.

    Attributes:
        citation: what it rests on; None where the book was not found to tell it.
    """

    text: str
    citation: Citation | None = None
    verbatim: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it rests on.

    Attributes:
        statements: one, or, where it is not clear whether the fact or the passage answers, both, the likelier first;
            and up to three facts, or quotes, where it is not clear which of them.
        citations: those of the statements first.
        kind: "fact" (the answers of taught facts), "quote" (the book's own words), "both", "refused" (`NOT_FOUND`).
        confidence: how sure it is that the text is right, or of a refusal that the book tells nothing, 0 to 1.
    """

    statements: tuple[Statement, ...]
    citations: tuple[Citation, ...]
    kind: Literal["fact", "quote", "both", "refused"]
    confidence: float

    @property
    def text(self) -> str:
        """The statements, each on its line."""
        return "\n".join(statement.text for statement in self.statements)

    @property
    def refused(self) -> bool:
        """Whether nothing is claimed."""
        return self.kind == "refused"


def with_sources(answer: Answer) -> str:
    """An answer for the terminal: each statement with where the book says so, or what of it is nearest."""
    quotes = [f"{c.label}{c.quoted}" for c in answer.citations]
    if answer.refused:
        return answer.text + ("。最接近的段落：\n" + "\n".join(quotes[:3]) if quotes else "。")
    if answer.kind == "fact" and len(answer.statements) == 1:
        return "\n".join([answer.text, *quotes[:1]])
    lines = []
    for said in answer.statements:
        label = said.citation.label if said.citation else ""
        lines.append(f"{label}{said.text}" if said.verbatim else f"{said.text}{label}")
    return "\n".join(lines)


def has_index(folder: Path) -> bool:
    """Whether a whole index lies in the folder."""
    return (folder / "index.json").is_file()


def _about(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / "index.json").read_text("utf-8"))
    if (form := about["format"]) not in READABLE:
        raise ValueError(f"格式是 {form}，这个版本认 {'、'.join(map(str, READABLE))}")
    return about


def is_current(folder: Path) -> bool:
    """Whether the index in the folder is one that this version reads."""
    try:
        _about(folder)
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def answerer_of(run: Path) -> Answerer | None:
    """What answers from the index of a run folder; None where it has none."""
    return Answerer(run / "index") if has_index(run / "index") else None


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
            about = _about(folder)
            self.judge = Judge.from_json(json.loads((folder / "judge.json").read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(f"检索的索引读不出来（{error}）", folder) from None
        self.encoder = Encoder.load(folder / "encoder")
        self.library = Library(folder / "books")
        self.rerankers = Rerankers.load(folder / RERANKER) if about.get("reranked") else None
        self.remember(Memory.load(folder / "facts"))

    def remember(self, memory: Memory) -> None:
        """Answers by these facts from now on."""
        self.memory = memory
        self._sources = Sources(self.encoder, memory, self.library)

    def answer(self, question: str) -> Answer:
        """The answer, refused where the judge holds that the books have none. At most `SHOWN` citations that do not
        overlap, the one it rests on first."""
        return self.decide(self.look(question))

    def look(self, question: str) -> Look:
        """What both memories have for the question."""
        return look(question, self._sources)

    def scores(self, found: Look) -> Scores:
        """Of what was found, by what the index has: rerankers, or linear rankers alone."""
        rankers = (self.judge.fact_ranker, self.judge.passage_ranker)
        if self.rerankers is None:
            return linear_scores(found, *rankers)
        scores = reranked(found, *rankers, self._sources, self.rerankers)
        return scores.cooled(self.judge.fact_temperature, self.judge.passage_temperature)

    def decide(self, found: Look) -> Answer:
        """The answer to a question from what was found for it."""
        judge = self.judge
        scores = self.scores(found)
        facts, passages = scores.facts, scores.passages
        full, plain = signals(found, scores)
        inside, threshold = (
            (judge.inside(full), judge.threshold)
            if len(facts)
            else (judge.inside_passages(plain), judge.threshold_passages)
        )
        sure_fact = float(share_of(judge.fact_right(full))) if len(facts) else 0.0
        sure_quote = float(share_of(judge.passage_right(full) if len(facts) else inside))
        order = ranked(passages)
        shares = np.exp(passages[order] - passages[order[0]]) if len(order) else np.zeros(0)
        shares = shares / max(float(shares.sum()), 1e-9)
        shares_of = {int(place): float(share) * sure_quote for place, share in zip(order, shares, strict=True)}
        shown = [(found.texts[place], share) for place, share in shares_of.items()]
        if inside < threshold or not (len(facts) or len(shown)):
            cited = self._cite((), shown)
            return Answer((Statement(NOT_FOUND),), cited, "refused", 1 - float(share_of(inside - threshold)))
        chance = share_of(judge.prefer(full)) if len(facts) else np.zeros((), dtype=np.float32)
        unsure = bool(len(facts) and in_doubt(chance))
        said: list[tuple[str, Passage | None, bool]] = []
        first: list[tuple[Passage, float]] = []
        if shown and (unsure or chance < 0.5):
            for quote in quotes(found, scores, alone=not unsure):
                said.append((quote.passage.text, quote.passage, True))
                first.append((quote.passage, quote.chance * sure_quote))
        if not said or unsure:
            told = likely(facts)
            place = 0 if chance >= 0.5 else len(said)
            for number in reversed(told):
                fact = self.memory.facts[int(found.facts.numbers[number])]
                passage = self.library.passage(fact.passage) if fact.passage >= 0 else None
                said.insert(place, (fact.answer, passage, False))
                # Of the second as much less sure as it is less likely.
                sure = sure_fact * math.exp(float(facts[number] - facts[told[0]]))
                first[place:place] = [(passage, sure)] if passage else []
        del said[SHOWN:]
        cited = self._cite(first, shown)
        statements = tuple(
            Statement(text, next((c for c in cited if passage and _share_text(c, passage)), None), verbatim)
            for text, passage, verbatim in said
        )
        verbatims = {verbatim for *_, verbatim in said}
        kind: Literal["fact", "quote", "both"] = (
            "both" if len(verbatims) == 2 else "quote" if True in verbatims else "fact"
        )
        sure = {"fact": sure_fact, "quote": sure_quote, "both": max(sure_fact, sure_quote)}[kind]
        return Answer(statements, cited, kind, sure)

    def _cite(
        self, first: Sequence[tuple[Passage, float]], others: Sequence[tuple[Passage, float]]
    ) -> tuple[Citation, ...]:
        """`first`, those of them that overlap as one, then the best of the others that share no text with one before
        them; each with what is around it, as far as no other one shows that."""
        own: list[tuple[Passage, float]] = []
        for p, score in first:
            place = next((n for n, (known, _) in enumerate(own) if _share_text(known, p)), None)
            if place is None:
                own.append((p, score))
            else:
                own[place] = (self.library.joined(own[place][0], p), max(own[place][1], score))
        kept: list[Citation] = []
        for number, (p, score) in enumerate([*own, *others]):
            if number >= len(own) and any(_share_text(c, p) for c in kept):
                continue
            before, after = self.library.beside(p, WINDOW)
            wide = replace(p, start=p.start - len(before), text=f"{before}{p.text}{after}")
            coming = [known for known, _ in own[number + 1 :]]
            if any(_share_text(c, wide) for c in kept) or any(_share_text(known, wide) for known in coming):
                before, wide = "", p
            score = min([score, *(c.score for c in kept[-1:])])
            place_in_book = (p.book, p.chapter, p.chapter_title, p.paragraph, wide.start)
            quote = (len(before), len(before) + len(p.text))
            kept.append(Citation(*place_in_book, wide.text, quote, round(score, 4)))
            if len(kept) == SHOWN:
                break
        return tuple(kept)


def quotes(found: Look, scores: Scores, *, alone: bool) -> list[Excerpt]:
    """What to quote: where a reranker has read the passages, the sentences that most likely hold the answer, up to
    `SEVERAL` times where it is not clear which, and else the best passage.

    Args:
        alone: nothing else is said. A quote that stands alone has as much around it as a passage.
    """
    if not len(scores.passages):
        return []
    chances = np.exp(scores.passages - scores.passages.max())
    chances /= chances.sum()
    if not scores.answers:
        best = int(chances.argmax())
        return [Excerpt(found.texts[best], float(chances[best]))]
    cut = cut_up(found.texts, chances, scores.answers)
    made = likeliest(cut, PART, SEVERAL, LEAST_QUOTE)
    return likeliest(cut, PASSAGE, 1, 1.0) if alone and len(made) == 1 else made


def _share_text(one: Citation | Passage, other: Citation | Passage) -> bool:
    return (
        (one.book, one.paragraph) == (other.book, other.paragraph)
        and one.start < other.start + len(other.text)
        and other.start < one.start + len(one.text)
    )
