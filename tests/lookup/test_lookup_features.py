"""What speaks for a candidate is what its definition says, counted plainly: by sets of strings and one vector at a time."""

from __future__ import annotations

import numpy as np
import pytest

from miniglm.corpus import Paragraph
from miniglm.lookup.encoder import UNKNOWN, Encoder, build_vocabulary
from miniglm.lookup.facts import Memory, context_of, facts_of, locate
from miniglm.lookup.features import FACT_FEATURES, PASSAGE_FEATURES, Query, Sources, fact_candidates, passage_candidates
from miniglm.lookup.library import Library, build_library, parts_of
from miniglm.lookup.text import grams, plain
from miniglm.qa.formats import Example, Turn
from miniglm.qa.text import bare

SENTENCES = ["从前山中有一座古庙，庙里住着老僧慧远。", "慧远每日敲钟一百零八下。", "山下有个铁匠名叫石勇，打得一手好刀。",
             "石勇的刀卖到了京城。", "渡口的船家姓柳，人称柳老大。", "柳老大有三个女儿，小女儿会唱渔歌。"]  # fmt: skip
BOOK = [Paragraph("山中记", f"第{n // 3}回", n // 3, n + 1, text) for n, text in enumerate(SENTENCES)]
ASKED = [("1", "古庙里住着谁？", "住着老僧慧远。"), ("1", "哪一位僧人住在山中的庙里？", "住着老僧慧远。"),
         ("2", "铁匠叫什么名字？", "铁匠名叫石勇。")]  # fmt: skip
QUESTIONS = ["山中古庙里住着的老僧叫什么名字？", "柳老大的小女儿会唱什么渔歌？", "石勇石勇鼍", "鼍"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("books")
    vocabulary = build_vocabulary(map(plain, [*SENTENCES, *SENTENCES[:4], *(question for _, question, _ in ASKED)]))
    vectors = np.random.default_rng(1).normal(size=(len(vocabulary.idf), 16)).astype(np.float32)
    encoder = Encoder(vocabulary, vectors)
    build_library(parts_of(BOOK), encoder, "", folder)
    library = Library(folder)
    examples = [Example((Turn(question, answer),), id=name) for name, question, answer in ASKED]
    facts = locate(facts_of(examples), [library.passage(n).text for n in range(library.size)])
    return Sources(encoder, Memory.build(facts, library, encoder), library)


def _pieces(text: str, size: int) -> list[str]:
    return [text[n : n + size] for n in range(len(text) - size + 1)]


class Plainly:
    """A question's likeness to a text."""

    def __init__(self, question: str, encoder: Encoder) -> None:
        self.encoder, self.text = encoder, bare(question)
        self.words = {size: set(_pieces(self.text, size)) for size in (1, 2, 3)}
        self.weights = self.weigh(self.text)

    def weigh(self, text: str) -> dict[str, float]:
        vocabulary = self.encoder.vocabulary
        weights = {}
        for piece in {*_pieces(text, 1), *_pieces(text, 2)}:
            number = self.number(piece)
            weights[piece] = vocabulary.rarest if number == UNKNOWN else float(vocabulary.idf[number])
        return weights

    def number(self, piece: str) -> int:
        return int(self.encoder.vocabulary.numbers(grams(plain(piece)))[-1])

    def cover(self, text: str, *sizes: int) -> float:
        own = {piece: weight for piece, weight in self.weights.items() if len(piece) in sizes}
        return sum(weight for piece, weight in own.items() if piece in text) / max(sum(own.values()), 1e-6)

    def triples(self, text: str) -> float:
        return sum(piece in text for piece in self.words[3]) / max(1, len(self.words[3]))

    def soft(self, text: str) -> float:
        own, other = (
            [self.encoder.vectors[n] for n in {self.number(piece) for piece in [*_pieces(t, 1), *_pieces(t, 2)]} - {0}]
            or [self.encoder.vectors[UNKNOWN]]
            for t in (self.text, text)
        )
        best = [max(float(v @ w / np.linalg.norm(v) / np.linalg.norm(w)) for w in other) for v in own]
        return float(np.average(best, weights=[np.linalg.norm(v) for v in own]))

    def dice(self, other: str) -> float:
        weights = self.weigh(other)
        both = sum(weight for piece, weight in self.weights.items() if piece in weights)
        return 2 * both / max(sum(weights.values()) + sum(self.weights.values()), 1e-6)

    def repeated(self, text: str) -> float:
        pieces = [*_pieces(text, 1), *_pieces(text, 2)]
        return sum(piece in self.weights for piece in pieces) / len(pieces)


@pytest.mark.parametrize("question", QUESTIONS)
def test_features_of_passages(sources: Sources, question: str) -> None:
    found, texts = passage_candidates(Query(question, sources.encoder), sources)
    asked = Plainly(question, sources.encoder)
    for number, text, features in zip(found.numbers.tolist(), texts, found.features, strict=True):
        own, near = bare(text.text), "".join(map(chr, sources.library.context(number)[0]))
        assert own in near
        expected = {
            "cover": asked.cover(own, 1, 2), "cover_context": asked.cover(near, 1, 2),
            "cover_pairs": asked.cover(own, 2), "cover_pairs_context": asked.cover(near, 2),
            "triples": asked.triples(own), "triples_context": asked.triples(near),
            "soft": asked.soft(own),
        }  # fmt: skip
        got = dict(zip(PASSAGE_FEATURES, features.tolist(), strict=True))
        assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("question", QUESTIONS)
def test_features_of_facts(sources: Sources, question: str) -> None:
    found = fact_candidates(Query(question, sources.encoder), sources)
    asked = Plainly(question, sources.encoder)
    for number, features in zip(found.numbers.tolist(), found.features, strict=True):
        fact = sources.memory.facts[number]
        told, answer = bare(fact.together), bare(fact.answer)
        context = "".join(map(chr, context_of(fact, sources.library)))
        expected = {
            "cover_told": asked.cover(told, 1, 2), "cover_context": asked.cover(context, 1, 2),
            "cover_either": asked.cover(f"{told} {context}", 1, 2), "cover_answer": asked.cover(answer, 1, 2),
            "soft_told": asked.soft(told),
            "dice_question": max(asked.dice(bare(q)) for q in fact.questions),
            "answer_in_question": asked.repeated(answer),
        }  # fmt: skip
        got = dict(zip(FACT_FEATURES, features.tolist(), strict=True))
        assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-5)
