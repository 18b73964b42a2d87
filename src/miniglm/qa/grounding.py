"""What a model wrote about a passage: taken apart with patience, then held against the passage without any.

Every row that is not accepted comes with its reason. Knows nothing of requests.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from miniglm.qa.formats import Example
from miniglm.qa.keys import holds_keys, key_hits
from miniglm.qa.passages import Passage
from miniglm.qa.text import bare, fold, simplified

QUESTION = (4, 120)
ANSWER = (2, 300)
EVIDENCE = (4, 300)
"""Least and most characters."""
SEED_LIKENESS = 90
"""Of 100: how like a seed's question counts as the seed again (rapidfuzz ratio)."""

NO_JSON = "回答不是 JSON"
CUT = "回答写到一半断了"
MALFORMED = "格式不对"
NOT_VERBATIM = "证据不是原文"
UNGROUNDED = "段落里没有要点"
KEYS_MISSING = "答案里没有要点"
GIVEN_AWAY = "问题里已有要点"
SEED_AGAIN = "照抄示例"
REPEATED = "问题重复"
LENGTH = "太长或太短"
LANGUAGE = "语言不对"
NEEDS_PASSAGE = "离开段落就看不懂"
CHECK_FAILED = "复核答不出要点"


@dataclass(slots=True)
class Judged:
    """Rows of one passage, and what was rejected: `{"reason": …, …what it was}`."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)


_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```[a-zA-Z]*\s*\n?|```")
_DECODER = json.JSONDecoder(strict=False)


def parse_json(text: str) -> Any:
    """The JSON value in a reply that may have thoughts before it, fences around it and talk on both sides; None where
    no whole one is."""
    text = _FENCE.sub("", _THOUGHT.sub("", text)).strip()
    for match in re.finditer(r"[{\[]", text):
        try:
            return _DECODER.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            if match.group() == "{" or re.match(r'\[\s*["{\[]', text[match.start() :]):
                return None  # the value itself, not a bracket in the talk before it
    return None


def parse_facts(text: str) -> tuple[list[Any], list[dict[str, Any]]]:
    """The facts of a reply, and what of it could not be read, each with its reason.

    Of a reply that breaks off, or has a fault in one place, every whole fact is kept.
    """
    value = parse_json(text)
    if isinstance(value, dict):
        if isinstance(value.get("facts"), list):
            return value["facts"], []
        if "answer" in value:
            return [value], []
        lists = [each for each in value.values() if isinstance(each, list)]
        return (lists[0], []) if len(lists) == 1 else ([], [{"reason": MALFORMED, "text": text[:500]}])
    if isinstance(value, list):
        return value, []
    facts, faults = [], []
    for found, piece in _whole_objects(_THOUGHT.sub("", text)):
        if found is not None:
            facts.append(found)
        else:
            faults.append({"reason": CUT if piece is None else MALFORMED, "text": (piece or text[-200:])[:500]})
    return (facts, faults) if facts or faults else ([], [{"reason": NO_JSON, "text": text[:500]}])


def _whole_objects(text: str) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """The objects with an answer in a text that is no JSON as a whole: (object, its text), (None, text) for one that
    cannot be read and (None, None) for one that breaks off."""
    at = text.find("[") + 1
    while (start := text.find("{", at)) >= 0:
        try:
            value, at = _DECODER.raw_decode(text, start)
            if isinstance(value, dict):
                yield value, text[start:at]
        except (ValueError, RecursionError):
            end = text.find("}", start)
            next_start = text.find("{", start + 1)
            if end < 0 or 0 <= next_start < end:
                if next_start < 0:
                    yield None, None
                    return
                if '"answer"' in text[start:next_start]:
                    yield None, text[start:next_start]
                at = next_start
            else:
                yield None, text[start : end + 1]
                at = end + 1


_OUTSIDE = re.compile(r"[文段]中|本[段文]|这[段]|上[文述]|该段|段落|材料|原文|摘录|选段")
_HAN = re.compile(r"[\u3400-\u9fff]")
_LETTER = re.compile(r"[^\W\d_]")


def chinese_share(text: str) -> float:
    """Share of Chinese characters among the letters; 1 where there are none."""
    letters = len(_LETTER.findall(text))
    return len(_HAN.findall(text)) / letters if letters else 1.0


@functools.lru_cache(maxsize=8)
def _folded(text: str) -> tuple[str, list[int]]:
    """The text in the form of `fold`, and for each of its characters where it stands in the text."""
    pairs = [(part, index) for index, char in enumerate(text) for part in fold(char)]
    return "".join(part for part, _ in pairs), [index for _, index in pairs]


def find_verbatim(piece: str, text: str) -> str:
    """The part of `text` that `piece` is, but for white space, width, script and the quotation marks around it; ""
    where it is none."""
    wanted = fold(piece).strip("“”\"'「」…")
    folded, places = _folded(text)
    at = folded.find(wanted) if wanted else -1
    return "" if at < 0 else text[places[at] : places[at + len(wanted) - 1] + 1]


def _is_simplified(text: str) -> bool:
    """Whether a text is in simplified characters, a few others aside."""
    return sum(a != b for a, b in zip(text, simplified(text), strict=False)) < 0.05 * len(text)


def _strings(value: Any) -> list[str]:
    """A string or a list of strings as a list of stripped strings that are not empty.

    Raises:
        ValueError: it is something else.
    """
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise ValueError
    return [stripped for each in values if (stripped := each.strip())]


class Judge:
    """Decides on what a model wrote, passage after passage.

    Args:
        seeds: pairs that the model was shown and must not give back.
        asked: comparable forms of the questions that are accepted already; grows.
    """

    def __init__(self, seeds: Sequence[Example], asked: set[str]) -> None:
        self._seeds = [bare(seed.question) for seed in seeds]
        self._seed_answers = {bare(seed.answer) for seed in seeds}
        self._asked = asked

    def judge(self, passage: Passage, facts: Sequence[Any]) -> Judged:
        """Rows for what holds, reasons for what does not: every question of every fact is in one of the two."""
        judged = Judged()
        plain = _is_simplified(passage.text)
        for number, fact in enumerate(facts, 1):
            try:
                if not isinstance(fact, dict):
                    raise ValueError
                # Books in simplified characters get simplified answers, whatever the model prefers.
                texts = json.loads(simplified(json.dumps(fact, ensure_ascii=False))) if plain else fact
                questions = list(dict.fromkeys(_strings(texts.get("questions", texts.get("question")))))
                answer, evidence = (
                    each if isinstance(each, str) else None for each in (texts["answer"], texts["evidence"])
                )
                keys = [group for each in texts["keys"] if (group := _strings(each))]
                if answer is None or evidence is None or not questions or not keys:
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                judged.rejected.append({"reason": MALFORMED, "passage": passage.id, "fact": fact})
                continue
            row = {
                "id": f"{passage.id}-{number:02d}",
                "chapter": passage.chapter_number,
                "question": "",
                "answer": answer.strip(),
                "keys": keys,
                "evidence": find_verbatim(evidence, passage.text) or evidence.strip(),
            }
            fault = self._fault(row, passage)
            for question in questions:
                reason = fault or self._question_fault(question, row)
                if reason:
                    judged.rejected.append({"reason": reason, "passage": passage.id} | row | {"question": question})
                else:
                    self._asked.add(bare(question))
                    judged.rows.append(row | {"question": question})
        return judged

    def forget(self, rows: Sequence[dict[str, Any]]) -> None:
        """These rows were not accepted after all: their questions may come again."""
        self._asked -= {bare(row["question"]) for row in rows}

    def _fault(self, row: dict[str, Any], passage: Passage) -> str:
        """Why a whole fact cannot be used, or ""."""
        answer, evidence, keys = row["answer"], row["evidence"], row["keys"]
        if not find_verbatim(evidence, passage.text):
            return NOT_VERBATIM
        if not ANSWER[0] <= len(answer) <= ANSWER[1] or not EVIDENCE[0] <= len(evidence) <= EVIDENCE[1]:
            return LENGTH
        if chinese_share(passage.text) > 0.5 > chinese_share(answer):
            return LANGUAGE
        if bare(answer) in self._seed_answers:
            return SEED_AGAIN
        if not holds_keys(answer, keys):
            return KEYS_MISSING
        return "" if holds_keys(passage.text, keys) else UNGROUNDED

    def _question_fault(self, question: str, row: dict[str, Any]) -> str:
        """Why a question cannot be used, or ""."""
        from rapidfuzz import fuzz, process

        if not QUESTION[0] <= len(question) <= QUESTION[1]:
            return LENGTH
        if chinese_share(row["answer"]) > 0.5 > chinese_share(question):
            return LANGUAGE
        if all(key_hits(question, row["keys"])):
            return GIVEN_AWAY
        if _OUTSIDE.search(question):
            return NEEDS_PASSAGE
        plain = bare(question)
        if process.extractOne(plain, self._seeds, scorer=fuzz.ratio, score_cutoff=SEED_LIKENESS):
            return SEED_AGAIN
        return REPEATED if plain in self._asked else ""


def passed_check(rows: Sequence[dict[str, Any]], reply: str) -> Judged:
    """Of the rows those whose keys the second reply holds; rows are in the order in which they were asked."""
    value = parse_json(reply)
    answers = value.get("answers") if isinstance(value, dict) else value
    answers = answers if isinstance(answers, list) else []
    judged = Judged()
    for number, row in enumerate(rows):
        answer = answers[number] if number < len(answers) and isinstance(answers[number], str) else ""
        if holds_keys(simplified(answer), row["keys"]):
            judged.rows.append(row)
        else:
            judged.rejected.append(
                {"reason": CHECK_FAILED, "passage": row["id"].rsplit("-", 1)[0]} | row | {"checked": answer}
            )
    return judged
