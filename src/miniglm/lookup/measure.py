"""How good an answerer is: keys held, evidence shown, questions refused, with bootstrap intervals. Knows nothing of
models or reports' looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from miniglm.evaluation.scores import bootstrap_interval
from miniglm.evaluation.summary import interval
from miniglm.lookup.answer import Answer, Answerer
from miniglm.qa.formats import Example
from miniglm.qa.keys import holds_keys
from miniglm.qa.text import bare


def answer_all(
    answerer: Answerer, questions: Sequence[str], progress: Callable[[int], None] = lambda done: None
) -> list[Answer]:
    """An answer to each question."""
    found = []
    for number, question in enumerate(questions, 1):
        found.append(answerer.answer(question))
        progress(number)
    return found


def shows_evidence(answer: Answer, evidence: str, *, whole: bool = True) -> bool:
    """Whether one of the citations, or not `whole`, the sentences it is about, holds the evidence, punctuation aside."""
    return any(bare(evidence) in bare(c.text if whole else c.quoted) for c in answer.citations)


def measure(examples: Sequence[Example], answers: Sequence[Answer]) -> dict[str, Any]:
    """Shares with their 95 % intervals, None where there is no such question: `key_accuracy` of questions with keys by
    the answer alone, `key_shown` by the answer with its first two citations; `evidence_shown` among the citations of
    those with evidence, `evidence_quoted` among the sentences that these are about; `refused`, `quoted` (answered by a
    passage), `both` (by facts and a passage), `several_facts` (by more than one, a passage beside them or not) and
    `several_quotes` (facts beside them or not), of all. And the mean of `characters` of the answers not refused.
    """
    pairs = list(zip(examples, answers, strict=True))
    evidence = [(e.extra.get("evidence"), a) for e, a in pairs]
    values: dict[str, list[bool] | list[int]] = {
        "key_accuracy": [holds_keys(a.text, e.keys) for e, a in pairs if e.keys],
        "key_shown": [
            holds_keys("\n".join([a.text, *(c.text for c in a.citations[:2])]), e.keys) for e, a in pairs if e.keys
        ],
        "evidence_shown": [shows_evidence(a, text) for text, a in evidence if isinstance(text, str) and text],
        "evidence_quoted": [
            shows_evidence(a, text, whole=False) for text, a in evidence if isinstance(text, str) and text
        ],
        "refused": [a.refused for a in answers],
        "quoted": [a.kind == "quote" for a in answers],
        "both": [a.kind == "both" for a in answers],
        "several_facts": [sum(not said.verbatim for said in a.statements) > 1 for a in answers],
        "several_quotes": [sum(said.verbatim for said in a.statements) > 1 for a in answers],
        "characters": [len(a.text) for a in answers if not a.refused],
    }
    return {
        name: interval(bootstrap_interval([float(value) for value in found])) if found else None
        for name, found in values.items()
    }
