"""Finds what training data gives away of evaluation data, and splits a set so that nothing does.

Knows nothing of models and scores; it compares texts only.
"""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from miniglm.errors import MiniGLMError
from miniglm.qa.formats import Example
from miniglm.qa.text import bare, fold

SHORTEST_COPY = 8
"""Characters an answer must have for standing inside of a longer one to mean anything: 关羽 stands in many."""

_PERMUTATIONS = 128

Kind = Literal["question", "answer", "copied"]


@dataclass(frozen=True, slots=True)
class Leak:
    """What gives one evaluation example away.

    Attributes:
        kind: "question": the same or nearly the same question; "answer": the same answer under another question;
            "copied": the answer stands verbatim in a longer training answer.
        evaluation, train: positions in the two lists.
        similarity: of the two questions, by Jaccard over character bigrams, 0 to 1.
    """

    kind: Kind
    evaluation: int
    train: int
    similarity: float


@dataclass(frozen=True, slots=True)
class Leaks:
    """All leaks, at most one an evaluation example: the first of its kinds in the order of `Leak.kind`.

    `evaluation` is the number of examples that were checked.
    """

    found: list[Leak]
    evaluation: int

    def share(self, kind: Kind | None = None) -> float:
        """Share of evaluation examples with a leak of this kind, or of any; 0 where there are no examples."""
        return sum(kind in (None, leak.kind) for leak in self.found) / self.evaluation if self.evaluation else 0.0


@dataclass(frozen=True, slots=True)
class Split:
    """A set in three parts, each in the order of the whole."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def _comparable(text: str) -> str:
    return bare(text) or fold(text)  # 「？？」 is all punctuation


def _bigrams(text: str) -> frozenset[str]:
    return frozenset(text[i : i + 2] for i in range(max(1, len(text) - 1)))


def _jaccard(first: str, second: str) -> float:
    mine, theirs = _bigrams(first), _bigrams(second)
    return len(mine & theirs) / len(mine | theirs)


class _NearQuestions:
    """The texts of a list that are nearly the same as a given one, all comparable forms.

    MinHash with locality-sensitive hashing proposes (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets,
    chapter 3), Jaccard decides. Its bands are chosen to miss little, as proposing too much costs only time.
    """

    def __init__(self, texts: Iterable[str], similarity: float) -> None:
        from datasketch import MinHash, MinHashLSH

        self._new, self._similarity = MinHash, similarity
        self._index = MinHashLSH(threshold=0.75 * similarity, num_perm=_PERMUTATIONS, weights=(0.05, 0.95))
        for text in dict.fromkeys(texts):
            self._index.insert(text, self._hash(text), check_duplication=False)

    def _hash(self, text: str):  # type: ignore[no-untyped-def]  # datasketch has no types
        sketch = self._new(num_perm=_PERMUTATIONS)
        sketch.update_batch([gram.encode("utf-8", "surrogatepass") for gram in sorted(_bigrams(text))])
        return sketch

    def of(self, text: str) -> dict[str, float]:
        """Their similarities, by text."""
        near = ((other, _jaccard(text, other)) for other in self._index.query(self._hash(text)))
        return {other: value for other, value in near if value >= self._similarity}


def near_texts(texts: Sequence[str], similarity: float) -> dict[str, dict[str, float]]:
    """For each of some comparable texts (see `qa.text.bare`) the others that are nearly the same, with how much."""
    index = _NearQuestions(texts, similarity)
    return {text: {other: value for other, value in index.of(text).items() if other != text} for text in texts}


class _Containers:
    """Which of many texts hold a given one."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = list(dict.fromkeys(texts))
        self._starts = [0]
        for text in self._texts:
            self._starts.append(self._starts[-1] + len(text) + 1)
        self._joined = "\n".join(self._texts)  # comparable forms hold no white space

    def of(self, text: str) -> Iterator[str]:
        """Those that are longer than it, each once; none for a text shorter than `SHORTEST_COPY`."""
        at = self._joined.find(text) if len(text) >= SHORTEST_COPY else -1
        while at >= 0:
            number = bisect_right(self._starts, at) - 1
            if self._texts[number] != text:
                yield self._texts[number]
            at = self._joined.find(text, self._starts[number + 1])


def _first_owners(examples: Sequence[Example]) -> tuple[dict[str, int], dict[str, int]]:
    """For each comparable question and answer, of all turns, the first example that has it."""
    questions: dict[str, int] = {}
    answers: dict[str, int] = {}
    for number, example in enumerate(examples):
        for turn in example.turns:
            questions.setdefault(_comparable(turn.question), number)
            answers.setdefault(_comparable(turn.answer), number)
    answers.pop("", None)
    return questions, answers


def find_leaks(train: Sequence[Example], evaluation: Sequence[Example], *, similarity: float = 0.8) -> Leaks:
    """What the training examples (every turn) give away of the evaluation examples (the last turn).

    Texts are compared without punctuation, white space and differences of width and script. `similarity` is the least
    Jaccard similarity over character bigrams at which two questions count as nearly the same.

    Raises:
        ValueError: `similarity` is not in (0, 1].
    """
    _check_similarity(similarity)
    questions, answers = _first_owners(train)
    near, containers = _NearQuestions(questions, similarity), _Containers(answers)
    found = []
    for number, example in enumerate(evaluation):
        question, answer = _comparable(example.question), _comparable(example.answer)
        kind: Kind
        if question in questions:
            kind, owner = "question", questions[question]
        elif similar := near.of(question):
            kind, owner = "question", questions[max(similar, key=lambda text: (similar[text], text))]
        elif answer in answers:
            kind, owner = "answer", answers[answer]
        elif container := next(containers.of(answer), None):
            kind, owner = "copied", answers[container]
        else:
            continue
        shown = max(_jaccard(question, _comparable(turn.question)) for turn in train[owner].turns)
        found.append(Leak(kind, number, owner, shown))
    return Leaks(found, len(evaluation))


def _groups(examples: Sequence[Example], similarity: float) -> list[list[int]]:
    """Positions of examples that must stay together: near-duplicate questions, equal ids, equal or contained answers."""
    parent = list(range(len(examples)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    def join(first: int, second: int) -> None:
        parent[root(first)] = root(second)

    ids: dict[str, int] = {}
    questions, answers = _first_owners(examples)
    for number, example in enumerate(examples):
        if example.id:
            join(number, ids.setdefault(example.id, number))
        for turn in example.turns:
            join(number, questions[_comparable(turn.question)])
            if answer := _comparable(turn.answer):
                join(number, answers[answer])
    near, containers = _NearQuestions(questions, similarity), _Containers(answers)
    for question, number in questions.items():
        for other in near.of(question):
            join(number, questions[other])
    for answer, number in answers.items():
        for other in containers.of(answer):
            join(number, answers[other])
    groups = defaultdict(list)
    for number in range(len(examples)):
        groups[root(number)].append(number)
    return sorted(groups.values())


def split_groups(
    examples: Sequence[Example],
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    similarity: float = 0.8,
) -> Split:
    """Splits into train, validation and test so that `find_leaks` finds nothing between any two of them.

    Examples stay together that share an id, an answer (also as part of a longer one) or nearly a question. Groups are
    taken in a random order; the parts come as close to the fractions as the groups' sizes let them, and none that is
    asked for stays empty.

    Raises:
        MiniGLMError: there are fewer groups than parts asked for.
        ValueError: fractions are negative or do not add up to 1, or `similarity` is not in (0, 1].
    """
    _check_similarity(similarity)
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"fractions must be three shares that add up to 1, got {fractions}")
    groups = _groups(examples, similarity)
    wanted = [part for part in range(3) if fractions[part] > 0]
    if len(groups) < len(wanted):
        raise MiniGLMError(
            f"{len(examples)} 个问答只成 {len(groups)} 组（问题相近、id 或答案相同的算一组），分不成 {len(wanted)} 份",
            fix="请增加互不重复的问答，或少分几份",
        )
    random.Random(seed).shuffle(groups)
    targets = [max(1.0, fraction * len(examples)) for fraction in fractions]
    parts: list[list[list[int]]] = [[], [], []]
    sizes = [0, 0, 0]
    for group in groups:
        room = [part for part in wanted if sizes[part] + len(group) <= targets[part]]
        if room:
            part = min(room, key=lambda part: sizes[part] / targets[part])
        else:
            part = max(wanted, key=lambda part: targets[part] - sizes[part])
        parts[part].append(group)
        sizes[part] += len(group)
    for part in wanted:
        if not parts[part]:
            donor = max(parts, key=len)
            smallest = min(donor, key=len)
            donor.remove(smallest)
            parts[part].append(smallest)
    return Split(*([examples[number] for number in sorted(itertools.chain(*part))] for part in parts))


def split_every_tenth(examples: Sequence[Example]) -> Split:
    """The reference's split: of every ten lines in a row the last is validation. It leaks; there to compare with it."""
    validation = list(examples[9::10])
    return Split([example for number, example in enumerate(examples) if number % 10 != 9], validation, [])


def _check_similarity(similarity: float) -> None:
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity must be above 0 and at most 1, got {similarity}")
