"""What the encoder learns from: pairs of texts that belong together, out of facts and books, and its training on them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from miniglm.corpus import Paragraph
from miniglm.lookup.encoder import Bag, Encoder, build_vocabulary
from miniglm.lookup.facts import Fact, without
from miniglm.lookup.text import passages, plain, sentences
from miniglm.lookup.training import Batch, train_encoder
from miniglm.lookup.withheld import Withheld

BATCH = 256
FACT_EPOCHS, TEXT_EPOCHS, LEAST_STEPS = 60, 2, 60
"""How often the encoder sees each fact and each sentence at most, whatever time there is: more of it only learns the
phrasings by heart. The larger of the two decides, and `LEAST_STEPS` where there is next to nothing."""
MOST_TEXT = 3_000_000
"""Characters of the books that the encoder learns from at most; all of them are indexed."""


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


def sample_of_book(paragraphs: Sequence[Paragraph], seed: int) -> list[Paragraph]:
    """As many paragraphs as `MOST_TEXT` allows, in their order."""
    size = sum(len(p.text) for p in paragraphs)
    if size <= MOST_TEXT:
        return list(paragraphs)
    generator = random.Random(seed)
    return [p for p in paragraphs if generator.random() < MOST_TEXT / size]


def train(
    paragraphs: Sequence[Paragraph],
    facts: Sequence[Fact],
    withheld: Withheld,
    *,
    more: Sequence[Paragraph] = (),
    encoders: int = 1,
    seconds: float,
    seed: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Encoder:
    """The encoder, from located facts less what is withheld, and from the books' text and `more`: one, or several of
    different seeds, joined, which share the seconds."""
    sample = sample_of_book(paragraphs, seed)
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

    def one(number: int) -> Encoder:
        def tell(share: float) -> None:
            progress((number + share) / encoders)

        pairs.begin(seed + number)
        return train_encoder(vocabulary, pairs, seconds / encoders, seed + number, most_steps=most, progress=tell)

    return Encoder.joined([one(number) for number in range(encoders)])


def _nowhere(fact: Fact) -> Fact:
    return Fact(fact.questions, fact.answer, fact.keys, fact.evidence)
