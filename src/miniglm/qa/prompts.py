"""What a model is asked when it makes questions and answers, and in what form it shall answer.

Knows nothing of endpoints: it makes messages and JSON schemas.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from miniglm.qa.formats import Example
from miniglm.qa.passages import Passage

Message = dict[str, str]

_TEXTS = {"type": "array", "items": {"type": "string"}}
FACTS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "facts": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "evidence": {"type": "string"},
                    "answer": {"type": "string"},
                    "keys": {"type": "array", "items": _TEXTS},
                    "questions": _TEXTS,
                },
                "required": ["evidence", "answer", "keys", "questions"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["facts"],
    "additionalProperties": False,
}
"""Evidence first, so that the model has it before it writes the answer and the questions."""

ANSWERS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"answers": _TEXTS},
    "required": ["answers"],
    "additionalProperties": False,
}

_RULES = """你根据小说的一个段落出问答题，用来训练一个只读过这本书的小模型。

请从段落里找出 {facts} 个最值得问的具体事实（人物、地点、数目、原因、经过、原话），只输出一个 JSON 对象：
{{"facts": [{{"evidence": "…", "answer": "…", "keys": [["…", "…"], ["…"]], "questions": ["…", "…"]}}]}}

- evidence：一字不差地抄自段落的一小段（8 到 80 字），单凭它就能回答问题；
- answer：一个完整的句子，读者不看问题也明白；用现代汉语，简体字；
- keys：判断回答对错的要点，每一组是同一要点的几种说法（包括段落里的原词），答案里必须出现每一组中的至少一种；
- questions：同一个事实的 {phrasings} 种问法，语气各不相同（书面的、口头的、从别的角度问的）；不看段落也要能懂，写明人物的全名，
  不说“文中”“本段”“他”；不能把要点写进问题里，每个问题只有一个答案。
- 只写段落里明说的事，不用书外的知识；找不到那么多就少写，没有就写 {{"facts": []}}。"""

_CHECK = """你只根据给出的段落回答问题。每个问题用一个完整的简短句子回答；段落里没有说的，回答“不知道”。
只输出一个 JSON 对象：{"answers": ["第一题的回答", "第二题的回答", …]}，回答的个数和次序与问题相同。"""


def pick_seeds(seeds: Sequence[Example], passage: Passage, count: int = 3) -> list[Example]:
    """Seed pairs for one request: other ones for other passages, always the same ones for the same."""
    start = int(hashlib.sha256(passage.id.encode()).hexdigest(), 16)
    step = max(1, len(seeds) // max(1, count))
    return [seeds[(start + i * step) % len(seeds)] for i in range(min(count, len(seeds)))]


def fact_messages(passage: Passage, seeds: Sequence[Example], *, facts: int, phrasings: int) -> list[Message]:
    """The request for the facts of a passage."""
    rules = _RULES.format(facts=facts, phrasings=phrasings)
    shown = [_shown(seed) for seed in seeds]
    if shown:
        rules += "\n\n下面是另外一些段落的问答，只作样子，不要照抄：\n" + "\n".join(shown)
    place = f"《{passage.book}》{passage.chapter}".strip()
    return [
        {"role": "system", "content": rules},
        {"role": "user", "content": f"{place}\n\n段落：\n{passage.text}"},
    ]


def _shown(seed: Example) -> str:
    row: dict[str, Any] = {"evidence": seed.extra["evidence"]} if seed.extra.get("evidence") else {}
    row |= {"answer": seed.answer}
    row |= {"keys": [list(group) for group in seed.keys]} if seed.keys else {}
    return json.dumps(row | {"questions": [seed.question]}, ensure_ascii=False)


def check_messages(passage: Passage, questions: Sequence[str]) -> list[Message]:
    """The request that asks the questions again, with nothing but the passage to go by."""
    numbered = "\n".join(f"{number}. {question}" for number, question in enumerate(questions, 1))
    return [
        {"role": "system", "content": _CHECK},
        {"role": "user", "content": f"段落：\n{passage.text}\n\n问题：\n{numbered}"},
    ]


def estimated_tokens(messages: Sequence[Message]) -> int:
    """Tokens of a request, roughly: one a Chinese character (today's tokenizers take 0.6 to 0.9), a few for the form."""
    return sum(len(message["content"]) + 8 for message in messages)
