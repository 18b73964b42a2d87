"""What a model is compared with: the answer of the most similar training question. No model, no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from miniglm.qa.formats import Example
from miniglm.qa.text import bare


def terms(text: str) -> list[str]:
    """The text's characters and pairs of neighbouring characters, without punctuation: Chinese has no spaces to split
    words at, and pairs come close to words."""
    units = bare(text)
    return [*units, *(units[i : i + 2] for i in range(len(units) - 1))]


class NearestQuestion:
    """Finds the most similar of many questions by BM25 (Robertson and Zaragoza 2009, in Lucene's form, by bm25s).

    Args:
        examples: what is searched; all their turns count.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.turns = [turn for example in examples for turn in example.turns]
        self._index: Any = None
        corpus = [terms(turn.question) for turn in self.turns]
        if any(corpus):
            import bm25s

            self._index = bm25s.BM25()
            self._index.index(corpus, show_progress=False)

    def find(self, questions: Sequence[str]) -> list[tuple[str, str]]:
        """For each question, the most similar one and its answer; ("", "") where nothing is in common."""
        if self._index is None or not questions:
            return [("", "")] * len(questions)
        known = self._index.vocab_dict
        asked = [[term for term in terms(question) if term in known] for question in questions]
        found = [("", "")] * len(questions)
        numbers = [number for number, query in enumerate(asked) if query]
        if numbers:
            best, _ = self._index.retrieve([asked[n] for n in numbers], k=1, show_progress=False)
            for number, place in zip(numbers, best[:, 0].tolist(), strict=True):
                found[number] = (self.turns[place].question, self.turns[place].answer)
        return found
