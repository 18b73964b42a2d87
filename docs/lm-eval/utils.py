"""What the task file miniglm_qa.yaml needs: the questions, and the two scores, which are miniGLM's own functions.

The questions are the shipped validation set, or the question-answer file that MINIGLM_QA names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from miniglm.evaluation.scores import characters, rouge_l
from miniglm.qa.formats import read_examples
from miniglm.qa.keys import holds_keys
from miniglm.qa.questions import normalize_question
from miniglm.recipe import default_qa


def load(**_: Any) -> dict[str, Any]:
    """The dataset: one split of questions in the form that miniGLM itself asks them in."""
    import datasets

    examples = read_examples(Path(os.environ.get("MINIGLM_QA") or default_qa()["validation"])).examples
    rows = [
        {"question": normalize_question(e.question), "answer": e.answer, "keys": [list(group) for group in e.keys]}
        for e in examples
        if e.keys
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer holds its keys, and its overlap with the reference answer."""
    answer = results[0].strip()
    return {
        "key_accuracy": float(holds_keys(answer, doc["keys"])),
        "rouge_l": rouge_l(characters(answer), characters(doc["answer"])).f1,
    }
