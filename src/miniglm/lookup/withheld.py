"""Questions that are kept from what is trained, to learn the choice on, and what of a look-up is right for them.

Of some facts one phrasing is withheld: the memory holds the fact, the words are new. Of others everything is: only the
book tells them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miniglm.lookup.facts import Fact
from miniglm.lookup.look import Look
from miniglm.qa.keys import holds_keys

WITHHELD, UNTAUGHT = 400, 120
"""Facts of which one phrasing, and of which all, are kept from the encoder to learn the choice on."""


@dataclass(frozen=True, slots=True)
class Withheld:
    """What the encoder does not see: a phrasing of some facts (`reworded`: question and fact), and facts (`untaught`)."""

    reworded: list[tuple[str, Fact]]
    untaught: list[Fact]

    @property
    def questions(self) -> set[str]:
        """All of its questions."""
        return {q for q, _ in self.reworded} | {q for fact in self.untaught for q in fact.questions}


def withhold(facts: Sequence[Fact], seed: int) -> Withheld:
    """Chooses at random, at most a third of the facts for a phrasing and a tenth for all."""
    order = random.Random(seed).sample(list(facts), len(facts))
    untaught = order[: min(UNTAUGHT, len(order) // 10)]
    rest = sorted(order[len(untaught) :], key=lambda fact: -min(len(fact.questions), 3))
    rest = [fact for fact in rest if len(fact.questions) > 1][: min(WITHHELD, len(order) // 3)]
    return Withheld([(fact.questions[-1], fact) for fact in rest], untaught)


def tells(found: Look, fact: Fact) -> NDArray[np.bool_]:
    """Of each candidate passage, whether it is the fact's: it holds the evidence, or is where the fact was located."""
    return np.array(
        [
            fact.evidence in text.text if fact.evidence else int(number) == fact.passage
            for number, text in zip(found.passages.numbers, found.texts, strict=True)
        ],
        dtype=bool,
    )


def answers(text: str, fact: Fact) -> bool:
    """Whether a text is right for a fact: it holds the keys, or where there are none it is the answer or holds the
    evidence."""
    if fact.keys:
        return holds_keys(text, fact.keys)
    return text == fact.answer or (fact.evidence != "" and fact.evidence in text)
