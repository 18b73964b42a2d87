"""Builds a run's index: trains the encoder, lays both memories down, learns to choose and when to say nothing.

What is learnt after the encoder is learnt on questions that it has not seen. Of some facts one phrasing is withheld:
the memory holds the fact, the words are new. Of others everything is: only the book tells them. Both go into the
memory afterwards. Validation questions and those that only the book answers are never looked at.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniglm.corpus import Paragraph
from miniglm.files import file_digest, write_whole
from miniglm.lookup.answer import FORMAT
from miniglm.lookup.encoder import Bag, Encoder, build_vocabulary
from miniglm.lookup.facts import Fact, Memory, facts_of, locate, without
from miniglm.lookup.features import Sources
from miniglm.lookup.library import Library, Part, build_library, parts_of
from miniglm.lookup.look import Judge, Look, in_doubt, likely, look, share_of, signals
from miniglm.lookup.ranking import fit_logistic, fit_ranker
from miniglm.lookup.text import passages, plain, sentences
from miniglm.lookup.training import Batch, train_encoder
from miniglm.qa.formats import Example
from miniglm.qa.keys import holds_keys

BATCH = 256
FACT_EPOCHS, TEXT_EPOCHS, LEAST_STEPS = 60, 2, 60
"""How often the encoder sees each fact and each sentence at most, whatever time there is: more of it only learns the
phrasings by heart. The larger of the two decides, and `LEAST_STEPS` where there is next to nothing."""
SEVERAL, SEVERAL_SECONDS = 3, 180.0
"""Encoders, of different seeds, that are joined into one where there are at least that many seconds, which half an hour
of `demo` has: a little better, and three times as long to train and to compare by. docs/lookup.md has how much."""
MOST_TEXT = 3_000_000
"""Characters of the books that the encoder learns from at most; all of them are indexed."""
WITHHELD, UNTAUGHT = 400, 120
"""Facts of which one phrasing, and of which all, are kept from the encoder to learn the choice on."""
FEWEST = 100
"""Withheld questions below which the shipped choice serves, learnt on 《三国演义》."""
REFUSED = 0.02
"""Share of the withheld questions that the threshold refuses: docs/lookup.md has what more and less would do."""


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


class Pairs:
    """Batches for the encoder: phrasings of one fact, question and answer, question and passage; of the text, a passage
    and its neighbours, and a sentence's half and its place."""

    def __init__(self, facts: Sequence[Fact], paragraphs: Sequence[Paragraph], seed: int) -> None:
        self.facts = list(facts)
        self.texts = [p.text[start:end] for p in paragraphs for start, end in sentences(p.text)]
        self.spans = passages(paragraphs)
        first: dict[tuple[int, int], int] = {}
        for number, paragraph in enumerate(paragraphs):
            for start, _ in sentences(paragraph.text):
                first[number, start] = len(first)
        self.sentence_of = [first[span.paragraph, span.start] for span in self.spans]
        self.begin(seed)

    def begin(self, seed: int) -> None:
        """Starts over, for another encoder."""
        self.random, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.steps = 0
        self._near: list[list[int]] = []

    def prepare(self, bag: Callable[[str], Bag]) -> None:
        """Turns all texts into bags once."""
        self.sentences = [bag(text) for text in self.texts]
        self.questions = [[bag(q) for q in fact.questions] for fact in self.facts]
        self.answers = [bag(fact.answer) for fact in self.facts]

    def __call__(self, current: Callable[[], Encoder], share: float) -> Batch:
        """The next batch; from a quarter of the time on, of facts that the encoder takes for each other."""
        self.steps += 1
        kind = self.steps % 3
        if len(self.facts) < 8 or kind == 2:
            return self._text()
        if share > 0.25 and (not self._near or self.steps % 60 == 0):
            some = self.random.sample(range(len(self.facts)), min(4000, len(self.facts)))
            vectors = current().bags([np.concatenate([*self.questions[n], self.answers[n]]) for n in some])
            order = np.argsort(-(vectors @ vectors.T), axis=1)[:, :16]
            self._near = [[some[n] for n in row] for row in order]
        size = min(BATCH, len(self.facts))
        if not self._near:
            chosen = self.random.sample(range(len(self.facts)), size)
        else:
            groups = (n for row in self.random.sample(self._near, len(self._near)) for n in row)
            chosen = list(dict.fromkeys(groups))[:size]
        pairs = [self._phrasings(n) if kind == 0 else self._told(n) for n in chosen]
        return [left for left, _ in pairs], [right for _, right in pairs]

    def _phrasings(self, n: int) -> tuple[Bag, Bag]:
        asked = self.random.randrange(len(self.questions[n]))
        others = [q for i, q in enumerate(self.questions[n]) if i != asked]
        left, draw = self.questions[n][asked], self.random.random()
        if others and draw < 0.5:
            return left, self.random.choice(others)
        return left, self.answers[n] if draw < 0.85 else np.concatenate([*others, self.answers[n]])

    def _told(self, n: int) -> tuple[Bag, Bag]:
        left = self.answers[n] if self.random.random() < 0.2 else self.random.choice(self.questions[n])
        passage = self.facts[n].passage
        if passage < 0:
            return left, self.answers[n]
        first = self.sentence_of[passage]
        last = self.sentence_of[min(passage + 1, len(self.sentence_of) - 1)]
        return left, self._run(first - self.random.randrange(3), max(first, last) + self.random.randrange(1, 4))

    def _run(self, start: int, end: int) -> Bag:
        return np.concatenate(self.sentences[max(0, start) : max(end, 1)] or [self.sentences[-1]])

    def _text(self) -> Batch:
        left, right = [], []
        for n in self.random.sample(range(len(self.sentences)), min(BATCH, len(self.sentences))):
            own, before = self.sentences[n], self.random.randrange(1, 4)
            # The first sentence of all has only those after it, so that no side is empty.
            around = [
                *self.sentences[max(0, n - before) : n],
                *self.sentences[n + 1 : n + 1 + self.random.randrange(1, 3)],
            ]
            if self.random.random() < 0.5:
                hidden = self.numbers.random(len(own)) < 0.5
                around.append(own[~hidden])
                own = own[hidden] if hidden.any() else own
            left.append(own)
            right.append(np.concatenate(around) if around else own)
        return left, right


def _sample(paragraphs: Sequence[Paragraph], seed: int) -> list[Paragraph]:
    """As many paragraphs as `MOST_TEXT` allows, in their order."""
    size = sum(len(p.text) for p in paragraphs)
    if size <= MOST_TEXT:
        return list(paragraphs)
    generator = random.Random(seed)
    return [p for p in paragraphs if generator.random() < MOST_TEXT / size]


def build_index(
    paragraphs: Sequence[Paragraph],
    examples: Sequence[Example],
    outside: Sequence[str],
    folder: Path,
    *,
    seconds: float,
    seed: int,
    texts: Sequence[Part] = (),
    sample: Sequence[Paragraph] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Writes the index into `folder`: encoder/, books/, facts/, judge.json and, last, index.json.

    Args:
        paragraphs: of all books, each book's in order.
        examples: training questions; may be empty.
        outside: questions that the books do not answer, to set the threshold with; may be empty.
        seconds: for training the encoder.
        texts: more to look up, which need not fit into memory; `sample`: what the encoder learns from of it.
        progress: is told the share of the seconds that is gone.

    Returns:
        What index.json holds: counts, seconds, and how the choice does on the withheld questions.
    """
    begun = time.monotonic()
    facts = locate_all(paragraphs, examples)
    withheld = withhold(facts, seed)
    encoder = train(paragraphs, facts, withheld, more=sample, seconds=seconds, seed=seed, progress=progress)
    trained = time.monotonic()
    encoder.save(folder / "encoder")
    encoder = Encoder.load(folder / "encoder")  # rounded as it will be when questions come
    digest = file_digest(folder / "encoder" / "encoder.safetensors")
    build_library([*parts_of(paragraphs), *texts], encoder, digest, folder / "books")
    library = Library(folder / "books")
    laid = time.monotonic()
    judge, measured = learn(encoder, library, facts, withheld, outside)
    write_whole(folder / "judge.json", json.dumps(judge.to_json(), ensure_ascii=False) + "\n")
    Memory.build(facts, library, encoder).save(folder / "facts")
    about = {
        "format": FORMAT,
        "passages": library.size,
        "facts": len(facts),
        "seconds": {
            "encoder": round(trained - begun, 1),
            "books": round(laid - trained, 1),
            "choice": round(time.monotonic() - laid, 1),
        },
        "withheld": measured,
    }
    write_whole(folder / "index.json", json.dumps(about, ensure_ascii=False, indent=2) + "\n")
    return about


def locate_all(paragraphs: Sequence[Paragraph], examples: Sequence[Example]) -> list[Fact]:
    """The examples' facts with their passages."""
    texts = [paragraphs[span.paragraph].text[span.start : span.end] for span in passages(paragraphs)]
    return locate(facts_of(examples), texts)


def train(
    paragraphs: Sequence[Paragraph],
    facts: Sequence[Fact],
    withheld: Withheld,
    *,
    more: Sequence[Paragraph] = (),
    seconds: float,
    seed: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Encoder:
    """The encoder, from located facts less what is withheld, and from the books' text and `more`: one, or several joined
    (`SEVERAL`)."""
    sample = _sample(paragraphs, seed)
    # Passages are numbered through all paragraphs; where only some are learnt from, a fact's is not among them.
    known = without(facts, withheld.questions)
    known_where = known if len(sample) == len(paragraphs) else [_nowhere(fact) for fact in known]
    pairs = Pairs(known_where, [*sample, *more], seed)
    vocabulary = build_vocabulary(map(plain, [*pairs.texts, *(t for f in known for t in (*f.questions, f.answer))]))
    pairs.prepare(lambda text: vocabulary.bag(plain(text)))
    # Of three batches two are of facts and one is of text.
    most = max(
        FACT_EPOCHS * len(pairs.facts) * 3 // (2 * BATCH), TEXT_EPOCHS * len(pairs.texts) * 3 // BATCH, LEAST_STEPS
    )
    count = SEVERAL if seconds >= SEVERAL_SECONDS else 1

    def one(number: int) -> Encoder:
        def tell(share: float) -> None:
            progress((number + share) / count)

        pairs.begin(seed + number)
        return train_encoder(vocabulary, pairs, seconds / count, seed + number, most_steps=most, progress=tell)

    return Encoder.joined([one(number) for number in range(count)])


def _nowhere(fact: Fact) -> Fact:
    return Fact(fact.questions, fact.answer, fact.keys, fact.evidence)


def shipped_judge() -> Judge:
    """The choice learnt on 《三国演义》, for books without enough questions to learn one on."""
    text = resources.files("miniglm.lookup").joinpath("judge.json").read_text("utf-8")
    return Judge.from_json(json.loads(text))


def _tells(found: Look, fact: Fact) -> NDArray[np.bool_]:
    """Of each candidate passage, whether it is the fact's: it holds the evidence, or is where the fact was located."""
    return np.array(
        [
            fact.evidence in text.text if fact.evidence else int(number) == fact.passage
            for number, text in zip(found.passages.numbers, found.texts, strict=True)
        ],
        dtype=bool,
    )


def learn(
    encoder: Encoder,
    library: Library,
    facts: Sequence[Fact],
    withheld: Withheld,
    outside: Sequence[str],
    *,
    portable: bool = False,
) -> tuple[Judge, dict[str, Any]]:
    """The choice and its confidence, from the withheld questions, and how they do on these; the shipped ones where
    there are too few. Without questions from outside, refusal is the shipped one's with a threshold of its own.

    Args:
        portable: facts are chosen by features that may only speak for them, which does a little worse on this book and
            better on others: for the judge that is shipped.
    """
    untaught = [(q, fact) for fact in withheld.untaught for q in fact.questions]
    if min(len(withheld.reworded), len(untaught)) < FEWEST or not library.size:
        return shipped_judge(), {}
    memory = Memory.build(without(facts, withheld.questions), library, encoder)
    sources = Sources(encoder, memory, library)
    old = [(look(q, sources), fact) for q, fact in withheld.reworded]
    new = [(look(q, sources), fact) for q, fact in untaught]
    none = [look(q, sources) for q in outside]

    right = [np.array([memory.facts[n].answer == fact.answer for n in found.facts.numbers]) for found, fact in old]
    tells = [_tells(found, fact) for found, fact in new]
    fact_ranker = fit_ranker(
        [(found.facts.features, hit) for (found, _), hit in zip(old, right, strict=True)], rising=portable
    )
    passage_ranker = fit_ranker(
        [(found.passages.features, hit) for (found, _), hit in zip(new, tells, strict=True)], rising=True
    )

    every = [found for found, _ in (*old, *new)] + none
    scores = [(fact_ranker(found.facts.features), passage_ranker(found.passages.features)) for found in every]
    rows = [signals(found, *both) for found, both in zip(every, scores, strict=True)]
    full, plain = (np.stack([row[side] for row in rows]) for side in (0, 1))
    best_fact = [memory.facts[found.facts.numbers[s.argmax()]] for found, (s, _) in zip(every, scores, strict=True)]
    best_text = [found.texts[s.argmax()].text for found, (_, s) in zip(every, scores, strict=True)]
    asked = [fact for _, fact in (*old, *new)]
    answered = [_answers(own.answer, fact) for own, fact in zip(best_fact, asked, strict=False)]
    quoted = [_answers(text, fact) for text, fact in zip(best_text, asked, strict=False)]
    nothing = [False] * len(none)
    fact_right = fit_logistic(full, np.array(answered + nothing))
    passage_right = fit_logistic(full, np.array(quoted + nothing))
    known_right, quote_right = np.array(answered), np.array(quoted)
    one = known_right != quote_right
    prefer = fit_logistic(full[: len(asked)][one], known_right[one])
    inside_target = np.array([True] * len(asked) + nothing)
    shipped = shipped_judge() if not none else None
    inside = fit_logistic(full, inside_target) if shipped is None else shipped.inside
    inside_passages = fit_logistic(plain, inside_target) if shipped is None else shipped.inside_passages
    known = slice(0, len(old))
    judge = Judge(
        fact_ranker=fact_ranker,
        passage_ranker=passage_ranker,
        fact_right=fact_right,
        passage_right=passage_right,
        prefer=prefer,
        inside=inside,
        threshold=float(np.quantile(inside(full[known]), REFUSED)),
        inside_passages=inside_passages,
        threshold_passages=float(np.quantile(inside_passages(plain[known]), REFUSED)),
    )
    kept = inside(full) >= judge.threshold
    chances = share_of(prefer(full[: len(asked)]))
    both = in_doubt(chances)
    told = [
        [memory.facts[found.facts.numbers[n]].answer for n in likely(s)]
        for found, (s, _) in zip(every, scores, strict=True)
    ]
    told_right = np.array([any(_answers(text, fact) for text in own) for own, fact in zip(told, asked, strict=False)])
    right_as_given = np.where(both, told_right | quote_right, np.where(chances >= 0.5, told_right, quote_right))
    right_as_given &= kept[: len(asked)]
    measured = {
        "reworded": len(old),
        "reworded_right": float(np.mean(answered[: len(old)])),
        "reworded_right_as_given": float(right_as_given[: len(old)].mean()),
        "reworded_both": float(both[: len(old)].mean()),
        "reworded_two_facts": float(np.mean([len(own) == 2 for own in told[: len(old)]])),
        "untaught": len(new),
        "untaught_quoted": float(np.mean(quoted[len(old) :])),
        "untaught_right_as_given": float(right_as_given[len(old) :].mean()),
        "untaught_both": float(both[len(old) :].mean()),
        "reworded_refused": float(1 - kept[: len(old)].mean()),
        "untaught_refused": float(1 - kept[len(old) : len(asked)].mean()),
        "outside": len(none),
        "outside_refused": float(1 - kept[len(asked) :].mean()) if none else None,
        "threshold": judge.threshold,
    }
    return judge, measured


def _answers(text: str, fact: Fact) -> bool:
    """Whether a text is right for a fact: it holds the keys, or where there are none it is the answer or holds the
    evidence."""
    if fact.keys:
        return holds_keys(text, fact.keys)
    return text == fact.answer or (fact.evidence != "" and fact.evidence in text)
