"""The questions a run was taught, with their answers, as a memory to search: one fact, its phrasings, its answer and
where the book tells it. Knows nothing of how facts are chosen among."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miniglm.files import write_whole
from miniglm.lookup.encoder import Encoder
from miniglm.lookup.fault import damaged
from miniglm.lookup.lexical import Lexical
from miniglm.lookup.library import Library
from miniglm.lookup.text import Plain, grams, plain
from miniglm.qa.formats import Example

FIELDS = ("questions", "answers", "together", "contexts")
"""What of a fact has vectors: each phrasing, the answer, all of them together, the passage's context."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact. `passage` is the number of the passage that tells it, -1 where the library has none."""

    questions: tuple[str, ...]
    answer: str
    keys: tuple[tuple[str, ...], ...]
    evidence: str
    passage: int = -1

    @property
    def together(self) -> str:
        """All phrasings and the answer in one text."""
        return " ".join((*self.questions, self.answer))


def context_of(fact: Fact, library: Library) -> Plain:
    """What surrounds the fact in the book, or the evidence that its set gives."""
    return library.context(fact.passage)[0] if fact.passage >= 0 else plain(fact.evidence)


def facts_of(examples: Sequence[Example]) -> list[Fact]:
    """Examples that share id and answer become one fact. Of a conversation the first turn counts, the only one that
    stands by itself."""
    found: dict[tuple[str, str], Fact] = {}
    for example in examples:
        turn = example.turns[0]
        if not turn.question or not turn.answer:
            continue
        evidence = example.extra.get("evidence") if example.extra else None
        new = Fact((turn.question,), turn.answer, example.keys, evidence if isinstance(evidence, str) else "")
        place = (example.id, turn.answer)
        known = found.get(place)
        found[place] = new if known is None else replace(known, questions=(*known.questions, turn.question))
    return list(found.values())


def locate(facts: Sequence[Fact], texts: Sequence[str]) -> list[Fact]:
    """The facts with the passage that tells each: the one that holds the evidence, if the set gives it, else the one
    that is most like evidence, questions and answer by BM25.

    Args:
        texts: the passages of the library, in its order.
    """
    if not texts:
        return list(facts)
    index: Lexical | None = None
    located = []
    # One search through all of them: a search a passage takes long where there are many. No text has a line feed in it.
    together, ends = "\n".join(texts), list(itertools.accumulate(len(text) + 1 for text in texts))
    for fact in facts:
        found = together.find(fact.evidence) if fact.evidence and "\n" not in fact.evidence else -1
        place = bisect.bisect_right(ends, found)
        if found < 0:
            index = index or Lexical.build(map(plain, texts))
            place = int(index.scores(grams(plain(f"{fact.evidence} {fact.together}"))).argmax())
        located.append(replace(fact, passage=place))
    return located


class Memory:
    """Facts to search.

    Args:
        vectors: by the names of `FIELDS`; those of questions have a row a phrasing, the others a row a fact.
        told: BM25 over all phrasings and the answer of each; `wide`: with its context.
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        vectors: dict[str, NDArray[np.float32]],
        told: Lexical,
        wide: Lexical,
    ) -> None:
        self.facts, self.vectors, self.told, self.wide = facts, vectors, told, wide
        self.owners = np.array([n for n, fact in enumerate(facts) for _ in fact.questions], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.facts)

    @classmethod
    def build(cls, facts: Sequence[Fact], library: Library, encoder: Encoder) -> Memory:
        """Vectors and BM25 of located facts."""
        together = [plain(fact.together) for fact in facts]
        contexts = [context_of(fact, library) for fact in facts]
        texts = {
            "questions": [plain(q) for fact in facts for q in fact.questions],
            "answers": [plain(fact.answer) for fact in facts],
            "together": together,
            "contexts": contexts,
        }
        wide = [np.concatenate(both) for both in zip(together, contexts, strict=True)]
        vectors = {name: encoder.bags([encoder.vocabulary.bag(text) for text in texts[name]]) for name in FIELDS}
        return cls(facts, vectors, Lexical.build(together), Lexical.build(wide))

    def save(self, folder: Path) -> None:
        """Writes facts.jsonl, vectors as .npy and both BM25 indexes."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in self.facts]
        write_whole(folder / "facts.jsonl", "".join(lines))
        for name, vectors in self.vectors.items():
            np.save(folder / f"{name}.npy", vectors)
        self.told.save(folder / "told")
        self.wide.save(folder / "wide")

    @classmethod
    def load(cls, folder: Path) -> Memory:
        """Reads what `save` wrote.

        Raises:
            MiniGLMError: a file is missing or damaged.
        """
        try:
            facts = []
            for line in (folder / "facts.jsonl").read_bytes().split(b"\n")[:-1]:
                row = json.loads(line)
                row |= {"questions": tuple(row["questions"]), "keys": tuple(map(tuple, row["keys"]))}
                facts.append(Fact(**row))
            vectors = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FIELDS}
            if len(facts) != len(vectors["answers"]):
                raise ValueError(f"有 {len(facts)} 个事实，向量有 {len(vectors['answers'])} 行")
            lexical = [Lexical.load(folder / name, len(facts)) for name in ("told", "wide")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(f"检索的问答读不出来（{error}）", folder) from None
        return cls(facts, vectors, *lexical)


def without(facts: Sequence[Fact], phrasings: Collection[str]) -> list[Fact]:
    """The facts without these phrasings; one that has no other is left out."""
    kept = [replace(f, questions=tuple(q for q in f.questions if q not in phrasings)) for f in facts]
    return [fact for fact in kept if fact.questions]
