"""How much an answer should say: right answers against their length, by each setting of that, on training questions.

    python benchmarks/lookup_policy.py RUN              # a run folder of the default set with an index

Asks the questions that were kept from RUN's encoder and rerankers, with the memory that they were kept from: 400 whose
facts it has (`known`), and those of 120 facts that only the book tells (`new`). The judge's few dozen numbers were
learnt on them, so all rows are a little too good alike. Prints a row for each setting, one changed at a time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from miniglm.lookup import answer, look
from miniglm.lookup.answer import Answerer
from miniglm.lookup.facts import Fact, Memory, without
from miniglm.lookup.look import Look, Scores
from miniglm.lookup.withheld import answers, withhold
from miniglm.pipeline import Run

SETTINGS: dict[str, tuple[float, ...]] = {
    "DOUBT": (0.15, 0.2, 0.3, 0.35),
    "SEVERAL": (1, 2, 4),
    "LEAST_FACT": (0.1, 0.33, 0.5),
    "PART": (45, 75, 90),
    "LEAST_QUOTE": (0.15, 0.33, 0.5),
}
"""Names of constants of `look` and `answer`, and other values for each."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A withheld question, what was found for it, and whether the memory has its fact."""

    fact: Fact
    found: Look
    scores: Scores
    known: bool


def asked(answerer: Answerer, seed: int) -> list[Asked]:
    """Looks the withheld questions up as if they were new."""
    withheld = withhold(answerer.memory.facts, seed)
    known_facts = without(answerer.memory.facts, withheld.questions)
    answerer.remember(Memory.build(known_facts, answerer.library, answerer.encoder))
    made = []
    for questions, known in ((withheld.reworded, True), (withheld.new, False)):
        for question, fact in questions:
            found = answerer.look(question)
            made.append(Asked(fact, found, answerer.scores(found), known))
    return made


def row(answerer: Answerer, questions: list[Asked]) -> str:
    """Share of right answers and their mean characters, of both kinds."""
    cells = []
    for known in (True, False):
        own = [q for q in questions if q.known == known]
        given = []
        for q in own:
            with mock.patch.object(answerer, "scores", lambda found, scores=q.scores: scores):
                given.append(answerer.decide(q.found))
        right = [any(answers(text, q.fact) for text in (a.text, *(s.text for s in a.statements)))
                 for q, a in zip(own, given, strict=True)]  # fmt: skip
        cells += [f"{100 * np.mean(right):6.1f} %", f"{np.mean([len(a.text) for a in given]):6.0f}"]
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = Run(parser.parse_args().run)
    answerer = Answerer(run.path / "index")
    questions = asked(answerer, run.recipe.run.seed)
    print(f"{'':24}  known, right and characters; new, right and characters ({len(questions)} questions)")
    print(f"{'as it is':24}  {row(answerer, questions)}", flush=True)
    for name, values in SETTINGS.items():
        for value in values:
            kept = [module for module in (look, answer) if hasattr(module, name)]
            patches = [mock.patch.object(module, name, type(getattr(module, name))(value)) for module in kept]
            for patch in patches:
                patch.start()
            print(f"{f'{name} {value:g}':24}  {row(answerer, questions)}", flush=True)
            for patch in patches:
                patch.stop()


if __name__ == "__main__":
    main()
