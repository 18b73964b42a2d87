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
from miniglm.lookup.features import Sources
from miniglm.lookup.look import Look, look
from miniglm.lookup.ranking import Linear, fit_ranker
from miniglm.qa.keys import holds_keys

Asked = list[tuple[str, Fact]]
"""Questions with their facts."""

WITHHELD, UNTAUGHT = 400, 120
"""Facts of which one phrasing, and of which all, are kept from the encoder to learn the choice on."""


@dataclass(frozen=True, slots=True)
class Withheld:
    """What the encoder does not see: a phrasing of some facts (`reworded`: question and fact), and facts (`untaught`)."""

    reworded: Asked
    untaught: list[Fact]

    @property
    def new(self) -> Asked:
        """The questions about facts that are withheld."""
        return [(q, fact) for fact in self.untaught for q in fact.questions]

    @property
    def questions(self) -> set[str]:
        """All of its questions."""
        return {q for q, _ in (*self.reworded, *self.new)}


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


@dataclass(frozen=True, slots=True)
class Looked:
    """What was found for withheld questions whose facts are in the memory (`old`), and for others (`new`).

    Attributes:
        right: of each of the old, which candidate facts are right; `told`: of each of the new, which passages are.
    """

    old: list[tuple[Look, Fact]]
    new: list[tuple[Look, Fact]]
    right: list[NDArray[np.bool_]]
    told: list[NDArray[np.bool_]]

    @classmethod
    def up(cls, old: Asked, new: Asked, sources: Sources) -> Looked:
        """Looks the questions up."""
        found_old, found_new = ([(look(q, sources), fact) for q, fact in asked] for asked in (old, new))
        facts = sources.memory.facts
        right = [np.array([facts[n].answer == fact.answer for n in found.facts.numbers]) for found, fact in found_old]
        return cls(found_old, found_new, right, [tells(found, fact) for found, fact in found_new])

    def rankers(self, *, portable: bool = False) -> tuple[Linear, Linear]:
        """The linear rankers of facts and of passages that put the right ones first.

        Args:
            portable: facts are chosen by features that may only speak for them.

        Raises:
            ValueError: nothing that was found is right.
        """
        old, new = zip(self.old, self.right, strict=True), zip(self.new, self.told, strict=True)
        return (
            fit_ranker([(found.facts.features, hit) for (found, _), hit in old], rising=portable),
            fit_ranker([(found.passages.features, hit) for (found, _), hit in new], rising=True),
        )


def answers(text: str, fact: Fact) -> bool:
    """Whether a text is right for a fact: it holds the keys, or where there are none it is the answer or holds the
    evidence."""
    if fact.keys:
        return holds_keys(text, fact.keys)
    return text == fact.answer or (fact.evidence != "" and fact.evidence in text)
