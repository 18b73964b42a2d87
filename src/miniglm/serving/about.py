"""What a run folder tells about its model, for the page: books, size, scores, questions to begin with. Knows nothing of
Gradio or of how it is put into words (page_text.py)."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miniglm.config import read_config
from miniglm.errors import MiniGLMError
from miniglm.locate import find_model
from miniglm.qa.formats import read_examples

EXAMPLES = 6
"""Example questions that are shown."""


@dataclass(frozen=True, slots=True)
class SplitScore:
    """The share of a split's questions that are answered right, with its 95 % interval; `book` is the share of those
    that are answered from the book, where there is an index."""

    split: str
    mean: float
    low: float
    high: float
    questions: int
    book: float | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What the page says about the model.

    Attributes:
        name: the run's or the model's name.
        books: titles, without brackets.
        context: tokens.
        examples: questions to begin with.
        scores: by the report.
        has_report: whether /report is there.
        looks_up: whether answers are looked up in the book unless the reader says otherwise.
    """

    name: str
    books: tuple[str, ...] = ()
    parameters: int | None = None
    layers: int | None = None
    context: int | None = None
    examples: tuple[str, ...] = ()
    scores: tuple[SplitScore, ...] = ()
    has_report: bool = False
    looks_up: bool = False


def facts_of(run: Path | None, *, name: str) -> Facts:
    """What a run folder tells, as far as it is there; a file that cannot be read tells nothing.

    Args:
        run: a run folder, a model folder, or None for a model elsewhere.
    """
    if run is None:
        return Facts(name)
    facts = Facts(name, examples=_examples(run / "qa" / "validation.jsonl"))
    books = _json(run / "corpus" / "summary.json").get("books")
    if isinstance(books, list):
        facts = replace(facts, books=tuple(str(b["title"]) for b in books if isinstance(b, dict) and b.get("title")))
    with suppress(MiniGLMError):
        known = read_config(find_model(run))
        facts = replace(
            facts,
            parameters=known.num_parameters,
            layers=known.num_hidden_layers,
            context=known.max_position_embeddings,
        )
    report = run / "report"
    scores = _scores(_json(report / "report.json"))
    return replace(facts, scores=scores, has_report=(report / "report.html").is_file())


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _examples(path: Path) -> tuple[str, ...]:
    """A few questions from all over a set, short ones, so that they fit a phone."""
    try:
        asked = [e.question for e in read_examples(path, allow_bad=True, need_answer=False).examples]
    except MiniGLMError:
        return ()
    short = [question for question in dict.fromkeys(asked) if len(question) <= 24] or asked
    step = max(1, len(short) // EXAMPLES)
    return tuple(short[step // 2 :: step][:EXAMPLES])


def _scores(report: dict[str, Any]) -> tuple[SplitScore, ...]:
    found = []
    for split in report.get("splits") or ():
        try:
            score = split["scores"]["key_accuracy"]
            book = ((split.get("with_book") or {}).get("key_accuracy") or {}).get("mean")
            if split["name"] != "train" and math.isfinite(score["mean"]):
                found.append(
                    SplitScore(split["name"], score["mean"], score["low"], score["high"], split["with_keys"], book)
                )
        except (LookupError, TypeError):
            continue
    return tuple(found)
