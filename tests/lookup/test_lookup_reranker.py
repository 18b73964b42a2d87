"""The reranker: what it reads, that numpy computes what was trained, that it learns what no sum of features tells, and
that its questions are unseen."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miniglm.corpus import Paragraph
from miniglm.errors import MiniGLMError
from miniglm.files import TEMPORARY
from miniglm.lookup import build, cross_fitting
from miniglm.lookup.answer import SHOWN, Answerer, quotes
from miniglm.lookup.build import build_index
from miniglm.lookup.cross_fitting import folds
from miniglm.lookup.encoder import Encoder, build_vocabulary
from miniglm.lookup.facts import Fact
from miniglm.lookup.features import Query
from miniglm.lookup.library import Passage
from miniglm.lookup.look import SEVERAL, Scores, likely
from miniglm.lookup.reranker import PARTS, Characters, Reranker, Rerankers, Text, read
from miniglm.lookup.reranker_training import Network, Sample, collate, train_network
from miniglm.lookup.text import plain
from miniglm.qa.formats import Example, Turn
from miniglm.qa.keys import holds_keys

SURNAMES, DIGITS = "赵钱孙李周吴郑王", "一二三四五六七八"
BOOK = [f"{s}将军领兵{d}千人出城，{s}大怒曰。" for s in SURNAMES for d in DIGITS]
CHARACTERS = Characters.build(map(plain, BOOK), 1)
VOCABULARY = build_vocabulary([plain(text) for text in BOOK * 2])
ENCODER = Encoder(VOCABULARY, np.random.default_rng(0).normal(size=(len(VOCABULARY.names) + 1, 8)).astype(np.float32))


def _text(text: str, part: int = 0) -> Text:
    own = plain(text)
    return Text(own, np.full(len(own), part, dtype=np.uint8))


def test_characters_are_like_those_that_stand_in_the_same_places() -> None:
    vectors = CHARACTERS.vectors / np.maximum(np.linalg.norm(CHARACTERS.vectors, axis=1, keepdims=True), 1e-6)

    def likeness(one: str, other: str) -> float:
        a, b = CHARACTERS.numbers(plain(one + other)).tolist()
        return float(vectors[a] @ vectors[b])

    assert min(likeness(SURNAMES[0], s) for s in SURNAMES[1:]) > 0.9
    assert min(likeness(DIGITS[0], d) for d in DIGITS[1:]) > 0.9
    assert max(likeness(s, d) for s in SURNAMES for d in DIGITS) < 0.5
    assert CHARACTERS.numbers(plain("龘")).tolist() == [0] and not CHARACTERS.vectors[0].any()
    again = Characters.build(map(plain, BOOK), 1)
    assert np.array_equal(again.vectors, CHARACTERS.vectors) and np.array_equal(again.names, CHARACTERS.names)


@pytest.mark.parametrize("texts", [[], [""], ["天"]])
def test_of_next_to_no_text_there_are_no_characters(texts: list[str]) -> None:
    found = Characters.build(map(plain, texts), 1)
    assert found.numbers(plain("天地")).tolist() == [0, 0] and not found.vectors.any()


@given(
    st.text(alphabet=SURNAMES + DIGITS + "将军，", min_size=1, max_size=12),
    st.lists(st.text(alphabet=SURNAMES + DIGITS + "将军，", max_size=9), min_size=1, max_size=4),
)
def test_what_is_read_is_what_the_texts_say(question: str, texts: list[str]) -> None:
    query = Query(question, ENCODER)
    found = read(query, [_text(text, number % PARTS) for number, text in enumerate(texts)], CHARACTERS)
    asked = "".join(map(chr, plain(question)))
    pairs = {asked[i : i + 2] for i in range(len(asked) - 1)}
    for number, text in enumerate(texts):
        own = "".join(map(chr, plain(text)))
        assert found.lengths[number] == len(own)
        for place in range(found.letters.shape[1]):
            row = found.known[number, place]
            if place >= len(own):
                assert not row.any() and found.letters[number, place] == 0
                continue
            assert row[0] == (own[place] in asked)
            begins, ends = own[place : place + 2] in pairs, place > 0 and own[place - 1 : place + 1] in pairs
            assert (row[2], row[3]) == (begins, ends)
            assert (row[1] > 0) <= row[0] and (row[4] > 0) <= row[2]
            assert row[5:].tolist() == [float(part == number % PARTS) for part in range(PARTS)]


def _sample(question: str, texts: list[str], right: int, generator: np.random.Generator) -> Sample:
    reading = read(Query(question, ENCODER), [_text(text) for text in texts], CHARACTERS)
    hit = np.arange(len(texts)) == right
    features = generator.normal(size=(len(texts), 3)).astype(np.float32)
    return Sample(reading, features, features[:, 0], hit, np.zeros(reading.letters.shape, dtype=bool))


def _order_of_words(count: int, seed: int) -> list[Sample]:
    """Who came first is asked: all candidates hold the same characters and differ in their order alone."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        one, other, third = generator.choice(list(SURNAMES), 3, replace=False)
        texts = [
            f"{a}大怒曰{b}将军领兵{c}出城"
            for a, b, c in ((one, other, third), (other, one, third), (third, other, one))
        ]
        place = int(generator.integers(3))
        texts[0], texts[place] = texts[place], texts[0]
        made.append(_sample(f"{one}大怒", texts, place, generator))
    return made


def test_numpy_computes_what_torch_trained() -> None:
    torch.manual_seed(0)
    network = Network(CHARACTERS.vectors, 3).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}
    samples = _order_of_words(4, 0)
    samples.append(_sample("龘", ["", "钱将军"], 0, np.random.default_rng(1)))
    inputs, there, right, _ = collate(samples)
    scores, _ = network(*inputs)
    reranker = Reranker(CHARACTERS, [weights])
    for sample, row, real, hit in zip(samples, scores.detach().numpy(), there.numpy(), right.numpy(), strict=True):
        own, shares = reranker(sample.reading, sample.features, sample.linear)
        np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(own, row[real], rtol=2e-4, atol=2e-4)
        assert np.array_equal(sample.right, hit[real])


def test_untrained_it_orders_as_the_linear_ranker_does() -> None:
    sample = _order_of_words(1, 0)[0]
    reranker = Reranker(CHARACTERS, [train_network([sample], CHARACTERS, seed=1, epochs=1, seconds=0.0)])
    scores, _ = reranker(sample.reading, sample.features, sample.linear)
    np.testing.assert_allclose(scores, sample.linear, atol=1e-6)


def test_it_learns_what_only_the_order_of_words_tells() -> None:
    told: list[float] = []
    weights = train_network(_order_of_words(400, 1), CHARACTERS, seed=1, epochs=6, seconds=600, progress=told.append)
    reranker = Reranker(CHARACTERS, [weights])
    assert told == sorted(told) and told[-1] == 1
    fresh = _order_of_words(60, 2)
    found = [int(reranker(s.reading, s.features, s.linear)[0].argmax()) == int(s.right.argmax()) for s in fresh]
    by_features = [int(s.linear.argmax()) == int(s.right.argmax()) for s in fresh]
    assert np.mean(found) > 0.9 > 0.6 > np.mean(by_features)


def test_every_fact_is_withheld_once_and_its_words_in_other_folds() -> None:
    facts = [Fact((f"甲{n}？", f"乙{n}？")[: 1 + n % 2], f"答{n}。", (), "") for n in range(41)]
    found = folds(facts, 1)
    assert sorted(f.answer for fold in found for f in fold.untaught) == sorted(f.answer for f in facts)
    for fold in found:
        own = {fact.answer for fact in fold.untaught}
        # Of every other fact: one of them that has fewer phrasings than the rest would be known by that.
        assert [f.answer for _, f in fold.reworded] == list(dict.fromkeys(f.answer for _, f in fold.reworded))
        several = {fact.answer for fact in facts if len(fact.questions) > 1}
        assert {fact.answer for _, fact in fold.reworded} == several - own
        assert all(question in fact.questions for question, fact in fold.reworded)
    assert folds(facts, 1) == found


PLACES = "山河湖海城村桥塔"


def _material(count: int) -> tuple[list[Paragraph], list[Example]]:
    generator = np.random.default_rng(3)
    paragraphs, examples = [], []
    for n in range(count):
        who, where, what = (
            "".join(generator.choice(list(SURNAMES + DIGITS), 3)),
            "".join(generator.choice(list(PLACES), 3)),
            "".join(generator.choice(list(DIGITS), 2)),
        )
        evidence = f"{who}到{where}去，带了{what}匹马。"
        paragraphs.append(Paragraph("书", "第一章", 1, n + 1, f"话说天下大势。{evidence}众人都笑了。"))
        for question in (f"{who}去了哪里？", f"{who}到什么地方去？", f"{who}的去处是何地？"):
            turn = Turn(question, f"{who}去了{where}。")
            examples.append(Example((turn,), id=str(n), keys=((where,),), extra={"evidence": evidence}))
    return paragraphs, examples


@pytest.fixture(scope="module")
def reranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reranked") / "run" / "index"
    paragraphs, examples = _material(320)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FEWEST", 50)
        told: list[float] = []
        build_index(
            paragraphs,
            examples,
            ["股市怎么样？"] * 5,
            folder,
            seconds=2,
            seconds_reranking=8,
            seed=1,
            progress=told.append,
        )
    assert told == sorted(told) and told[-1] == 1
    assert not list(folder.glob(f"{TEMPORARY}*"))
    return folder


def test_an_index_with_rerankers_answers_by_them(reranked: Path) -> None:
    answerer = Answerer(reranked)
    assert answerer.rerankers is not None
    examples = _material(320)[1]
    answers = [answerer.answer(e.turns[0].question) for e in examples[::30]]
    assert np.mean([holds_keys(a.text, e.keys) for e, a in zip(examples[::30], answers, strict=True)]) > 0.8
    found = answerer.look("龘")
    assert answerer.decide(found).text


def test_too_few_facts_are_not_reranked(tmp_path: Path) -> None:
    paragraphs, examples = _material(20)
    build_index(paragraphs, examples, [], tmp_path, seconds=0.5, seconds_reranking=1, seed=1)
    assert Answerer(tmp_path).rerankers is None and not (tmp_path / "reranker").exists()
    assert cross_fitting.FEWEST_FACTS > 20
    paragraphs, examples = _material(260)
    build_index(paragraphs, examples[::3], [], tmp_path, seconds=0.5, seconds_reranking=1, seed=1)  # one phrasing each
    assert Answerer(tmp_path).rerankers is None


def test_facts_are_dealt_twice_where_there_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same questions come twice, the second time in other folds."""
    monkeypatch.setattr(cross_fitting, "DEALT_TWICE", 2.0)
    learnt_from: list[int] = []

    def trained(samples: list[Sample], *_: object, **__: object) -> dict[str, np.ndarray]:
        learnt_from.append(len({sample.reading.asked.tobytes() for sample in samples}))
        learnt_from.append(len(samples))
        return {}

    monkeypatch.setattr(cross_fitting, "train_network", trained)
    paragraphs, examples = _material(260)
    facts = build.locate_all(paragraphs, examples)
    for seconds in (1.0, 2.0):
        assert cross_fitting.learn_rerankers(paragraphs, facts, tmp_path, seconds=seconds, seed=1) is not None
    once, twice = learnt_from[:6], learnt_from[6:]  # of each of three networks
    assert twice[5] > 1.5 * once[5] and twice[4] < 1.2 * once[4]


def test_no_reranker_is_trained_where_there_is_no_choice_to_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts enough for the one and questions too few for the other: its minutes would be for nothing."""

    def trained(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(build, "learn_rerankers", trained)
    paragraphs, examples = _material(260)
    assert cross_fitting.FEWEST_FACTS < 260
    build_index(paragraphs, examples, [], tmp_path, seconds=0.5, seconds_reranking=1, seed=1)
    assert Answerer(tmp_path).rerankers is None


def test_a_damaged_reranker_is_named(reranked: Path, tmp_path: Path) -> None:
    shutil.copytree(reranked, tmp_path / "index")
    path = tmp_path / "index" / "reranker" / "facts.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MiniGLMError, match="重排"):
        Answerer(tmp_path / "index")
    (tmp_path / "index" / "reranker" / "characters.safetensors").unlink()
    with pytest.raises(MiniGLMError, match="重排"):
        Rerankers.load(tmp_path / "index" / "reranker")


def test_several_quotes_are_given_where_it_is_not_clear_which(reranked: Path) -> None:
    answerer = Answerer(reranked)
    found = answerer.look(_material(320)[1][0].turns[0].question)
    assert answerer.scores(found).answers.keys() <= set(range(len(found.texts)))
    facts = np.zeros(len(found.facts.numbers), dtype=np.float32)
    sure = -np.arange(len(found.texts), dtype=np.float32) * 5
    places = {n: np.full(len(plain(t.text)), 1 / len(plain(t.text)), np.float32) for n, t in enumerate(found.texts)}

    def given(passages: np.ndarray, places: dict[int, np.ndarray], *, alone: bool) -> list[Passage]:
        return [quote.passage for quote in quotes(found, Scores(facts, passages, places), alone=alone)]

    (whole,) = given(sure, places, alone=True)
    assert whole.text == found.texts[0].text
    assert 1 < len(given(sure * 0, places, alone=True)) <= SEVERAL
    assert given(sure, {}, alone=False) == given(sure * 0, {}, alone=False) == [found.texts[0]]  # nothing has read them
    assert quotes(found, Scores(facts, sure[:0]), alone=True) == []


def test_an_answer_says_no_more_than_it_cites(reranked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three facts and three quotes would be six; what is said last, the least likely, is left out."""
    answerer = Answerer(reranked)
    found = answerer.look(_material(320)[1][0].turns[0].question)
    places = {n: np.full(len(plain(t.text)), 1 / len(plain(t.text)), np.float32) for n, t in enumerate(found.texts)}
    facts, passages = (np.zeros(count, np.float32) for count in (len(found.facts.numbers), len(found.texts)))
    monkeypatch.setattr(answerer, "scores", lambda _: Scores(facts, passages, places))
    monkeypatch.setattr("miniglm.lookup.answer.in_doubt", lambda _: True)
    assert len(quotes(found, answerer.scores(found), alone=False)) == SEVERAL == len(likely(facts))
    answer = answerer.decide(found)
    assert answer.kind == "both" and len(answer.statements) == SHOWN == len(answer.citations)
    assert all(said.citation in answer.citations for said in answer.statements)
