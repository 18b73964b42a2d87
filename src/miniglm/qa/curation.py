"""Goes through a question-answer set and says of every row that should go why. Deletes nothing.

Knows nothing of models; what it needs of a book is its text.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from miniglm.qa.formats import Example
from miniglm.qa.grounding import (
    ANSWER,
    GIVEN_AWAY,
    KEYS_MISSING,
    LANGUAGE,
    LENGTH,
    NOT_VERBATIM,
    QUESTION,
    chinese_share,
)
from miniglm.qa.keys import holds_keys, normalize
from miniglm.qa.leaks import near_texts
from miniglm.qa.spread import spread
from miniglm.qa.text import bare, fold

SAME = "完全重复"
SAME_QUESTION = "问题重复"
NEAR_QUESTION = "问题几乎相同"
NEAR_PAIR = "问答几乎相同"
CONTRADICTION = "几乎相同的问题，答案矛盾"
TOO_SIMILAR = "不够新（ROUGE-L）"
CROWDED = "本章已够多"
_NUMBER = re.compile("#[^#]*#")
CONTRADICTION_SIMILARITY = 0.95
"""Questions closer than this that have different answers contradict each other; further apart they may ask for
different things in the same words (which differ in a name, say)."""


@dataclass(frozen=True, slots=True)
class Criteria:
    """What is looked for.

    Attributes:
        similarity: Jaccard similarity of character bigrams from which questions, or pairs, are nearly the same.
        per_chapter: rows of a chapter at most; None: no limit.
        novelty: greatest ROUGE-L with a question that is kept, of another fact; None: not looked at.
    """

    similarity: float = 0.8
    per_chapter: int | None = None
    novelty: float | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row should go. `other` is the row (0-based) that it repeats or contradicts, if it is about one."""

    reason: str
    other: int | None = None


def curate(
    examples: Sequence[Example],
    criteria: Criteria,
    book_text: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[int, Fault]:
    """The rows that should go, by position, each with the first reason of the list below that holds.

    Every row by itself: too long or too short, another language than most of the set, keys that the answer does not
    hold or the question gives away, evidence that is not in the book. Then against the others: contradictions (both
    sides go), exact and near duplicates (the later one goes), novelty; then what is more than a chapter may have.

    Args:
        book_text: where all evidence must be; None: not looked at.
        progress: called with the number of rows done.
    """
    folded_book = None if book_text is None else fold(book_text)
    mostly_chinese = _mostly_chinese(examples)
    found: dict[int, Fault] = {}
    for number, example in enumerate(examples):
        if reason := _own_fault(example, folded_book, mostly_chinese):
            found[number] = Fault(reason)
    _against_others(examples, criteria.similarity, found)
    if criteria.novelty is not None:
        _not_novel(examples, criteria.novelty, found, progress)
    if criteria.per_chapter is not None:
        _crowded(examples, criteria.per_chapter, found)
    return found


def _mostly_chinese(examples: Sequence[Example]) -> bool:
    return 2 * sum(chinese_share(e.question + e.answer) > 0.5 for e in examples) > len(examples)


def _own_fault(example: Example, folded_book: str | None, mostly_chinese: bool) -> str:
    for text, (least, most) in ((example.question, QUESTION), (example.answer, ANSWER)):
        if not least <= len(text) <= most:
            return LENGTH
        if (chinese_share(text) > 0.5) != mostly_chinese:
            return LANGUAGE
    if example.keys and not holds_keys(example.answer, example.keys):
        return KEYS_MISSING
    if example.keys and holds_keys(example.question, example.keys):
        return GIVEN_AWAY
    evidence = example.extra.get("evidence")
    if folded_book is not None and (not isinstance(evidence, str) or fold(evidence) not in folded_book):
        return NOT_VERBATIM
    return ""


def _fact(example: Example) -> str:
    """What tells facts apart: the id, else the answer."""
    return example.id or bare(example.answer)


def _agree(first: Example, second: Example) -> bool:
    """Whether two answers to nearly the same question can both be right."""
    if _fact(first) == _fact(second) or bare(first.answer) == bare(second.answer):
        return True
    if first.keys and second.keys:
        return holds_keys(first.answer, second.keys) or holds_keys(second.answer, first.keys)
    from rapidfuzz import fuzz

    return fuzz.partial_ratio(bare(first.answer), bare(second.answer)) >= 60


def _same_numbers(first: str, second: str) -> bool:
    """Whether two questions name the same numbers: 第三回 and 第五回 are all but the same to the eye of a bigram."""
    return _NUMBER.findall(normalize(first)) == _NUMBER.findall(normalize(second))


def _against_others(examples: Sequence[Example], similarity: float, found: dict[int, Fault]) -> None:
    rows = [number for number in range(len(examples)) if number not in found]
    questions = {number: bare(examples[number].question) or fold(examples[number].question) for number in rows}
    same: dict[str, list[int]] = defaultdict(list)
    for number in rows:
        same[questions[number]].append(number)
    near = {
        text: {other: value for other, value in found_near.items() if _same_numbers(text, other)}
        for text, found_near in near_texts(list(same), similarity).items()
    }

    for number in rows:  # first, as both sides of a contradiction go, whichever comes first
        for other in same[questions[number]]:
            if other != number and not _agree(examples[number], examples[other]):
                found.setdefault(number, Fault(CONTRADICTION, other))
        for text, value in near[questions[number]].items():
            for other in same[text]:
                if value >= CONTRADICTION_SIMILARITY and not _agree(examples[number], examples[other]):
                    found.setdefault(number, Fault(CONTRADICTION, other))
    kept: dict[str, int] = {}
    for number in rows:
        if number in found:
            continue
        example, question = examples[number], questions[number]
        first = kept.get(question)
        if first is not None:
            whole = bare(examples[first].answer) == bare(example.answer)
            found[number] = Fault(SAME if whole else SAME_QUESTION, first)
            continue
        close = [kept[text] for text in near[question] if text in kept]
        if (twin := next((n for n in close if _agree(examples[n], example)), None)) is not None:
            found[number] = Fault(NEAR_QUESTION, twin)
            continue
        kept[question] = number
    # Question with answer: phrasings of one fact share the answer and are meant to; those of different facts are not.
    rows = [number for number in rows if number not in found]
    pairs = {number: questions[number] + "\n" + bare(examples[number].answer) for number in rows}
    near = near_texts(list(dict.fromkeys(pairs.values())), similarity)
    owners: dict[str, int] = {}
    for number in rows:
        close = [owners[text] for text in near[pairs[number]] if text in owners]
        others = [n for n in close if _fact(examples[n]) != _fact(examples[number])]
        others = [n for n in others if _same_numbers(questions[n], questions[number])]
        twin = next((n for n in others if _agree(examples[n], examples[number])), None)
        if twin is not None:
            found[number] = Fault(NEAR_PAIR, twin)
        else:
            owners[pairs[number]] = number


def _not_novel(
    examples: Sequence[Example], most: float, found: dict[int, Fault], progress: Callable[[int], None]
) -> None:
    """Self-instruct (Wang et al. 2023, arXiv:2212.10560, section 2.2): a new instruction must have a ROUGE-L under 0.7
    with all that are there. Here over characters, and phrasings of one fact are not compared.

    The F1 of ROUGE-L, 2 LCS / (m + n), is rapidfuzz's normalized Indel similarity.
    """
    from rapidfuzz.distance import Indel
    from rapidfuzz.process import extract

    kept: dict[int, str] = {}
    for number, example in enumerate(examples):
        progress(number + 1)
        if number in found:
            continue
        question = bare(example.question)
        hits = extract(question, kept, scorer=Indel.normalized_similarity, score_cutoff=most, limit=20)
        other = next((n for _, _, n in hits if _fact(examples[n]) != _fact(example)), None)
        if other is None:
            kept[number] = question
        else:
            found[number] = Fault(TOO_SIMILAR, other)


def _crowded(examples: Sequence[Example], most: int, found: dict[int, Fault]) -> None:
    """Keeps an even choice of every chapter's facts, with all their phrasings."""
    chapters: dict[object, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, example in enumerate(examples):
        if number not in found and (chapter := example.extra.get("chapter")) is not None:
            chapters[str(chapter)][_fact(example)].append(number)
    for facts in chapters.values():
        size = sum(map(len, facts.values()))
        if size <= most:
            continue
        wanted = max(1, most * len(facts) // size)
        kept = {n for fact in spread(list(facts), wanted) for n in facts[fact]}
        numbers = [n for rows in facts.values() for n in rows]
        left = sorted(kept)[:most]  # the facts of the choice may have more phrasings than others
        found |= {n: Fault(CROWDED) for n in numbers if n not in left}


def chapter_counts(examples: Sequence[Example]) -> Counter[str]:
    """Rows by chapter, as the set has them; rows without one under ""."""
    return Counter(str(example.extra.get("chapter", "")) for example in examples)
