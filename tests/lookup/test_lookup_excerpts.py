"""Which sentences are quoted: whole ones, by how likely they hold the answer, with what every passage gives them."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from miniglm.corpus import Paragraph
from miniglm.lookup.excerpts import Excerpt, cut_up, likeliest
from miniglm.lookup.library import Passage
from miniglm.lookup.text import passages, plain

story = st.lists(
    st.lists(st.text(alphabet="天地，玄黄宇宙", min_size=1, max_size=50), min_size=1, max_size=8).map(
        lambda pieces: "".join(f"{piece}。" for piece in pieces)
    ),
    min_size=1,
    max_size=3,
)


def _read(texts: list[str], seed: int) -> tuple[list[Passage], np.ndarray, dict[int, np.ndarray]]:
    """All passages of a book of these paragraphs, chances of theirs, and where a reranker would see the answer."""
    generator = np.random.default_rng(seed)
    paragraphs = [Paragraph("书", "第一章", 1, number, text) for number, text in enumerate(texts, 1)]
    found = [
        Passage("书", 1, "第一章", span.paragraph + 1, span.start, texts[span.paragraph][span.start : span.end])
        for span in passages(paragraphs)
    ]
    chances = generator.dirichlet(np.ones(len(found))).astype(np.float32)
    places = {
        n: generator.dirichlet(np.ones(size)).astype(np.float32)
        for n, passage in enumerate(found)
        if (size := len(plain(passage.text)))
    }
    return found, chances, places


@given(story, st.integers(0, 10**6))
def test_sentences_have_what_their_passages_give_them(texts: list[str], seed: int) -> None:
    found, chances, places = _read(texts, seed)
    cut = cut_up(found, chances, places)
    assert np.isclose(sum(own.chance for own in cut), sum(chances[n] for n in places), atol=1e-4)
    for own in cut:
        p = own.passage
        assert texts[p.paragraph - 1][p.start :].startswith(p.text) and p.text.count("。") == 1
    order = [(own.passage.paragraph, own.passage.start) for own in cut]
    assert order == sorted(set(order))


@given(story, st.integers(0, 10**6), st.integers(10, 130), st.integers(1, 4))
def test_runs_are_whole_sentences_that_share_none(texts: list[str], seed: int, most: int, count: int) -> None:
    cut = cut_up(*_read(texts, seed))
    found = likeliest(cut, most, count, 1 / 3)
    assert len(found) <= count and bool(found) == bool(cut)
    spans = sorted(
        (own.passage.paragraph, own.passage.start, own.passage.start + len(own.passage.text)) for own in found
    )
    assert all(one[0] != after[0] or one[2] < after[1] for one, after in itertools.pairwise(spans))
    for own in found:
        p = own.passage
        text = texts[p.paragraph - 1]
        assert text[p.start :].startswith(p.text)
        ends = {0, *(n + 1 for n, character in enumerate(text) if character == "。")}
        assert {p.start, p.start + len(p.text)} <= ends
        inside = [
            one
            for one in cut
            if one.passage.paragraph == p.paragraph and 0 <= one.passage.start - p.start < len(p.text)
        ]
        assert np.isclose(own.chance, sum(one.chance for one in inside))
        assert count > 1 or len(p.text) <= most or p.text.count("。") == 1
    if found:
        best = max(one.chance for one in cut)
        assert max(own.chance for own in found) >= round(best, 3) - 1e-3


def _sentence(start: int, text: str, chance: float, paragraph: int = 1) -> Excerpt:
    return Excerpt(Passage("书", 1, "第一章", paragraph, start, text), chance)


def test_runs_that_touch_are_one_quote() -> None:
    cut = [
        _sentence(0, "一一。", 0.3),
        _sentence(3, "二二。", 0.2),
        _sentence(6, "三三。", 0.25),
        _sentence(0, "甲。", 0.22, 2),
    ]
    assert [own.passage.text for own in likeliest(cut, 3, 1, 0.5)] == ["一一。"]
    assert [own.passage.text for own in likeliest(cut, 3, 3, 0.5)] == ["一一。", "三三。", "甲。"]
    joined, other = likeliest(cut, 3, 4, 0.5)
    assert (joined.passage.text, joined.chance) == ("一一。二二。三三。", 0.75) and other.passage.text == "甲。"
    assert [own.passage.text for own in likeliest(cut, 3, 4, 0.9)] == ["一一。"]
    assert likeliest(cut, 6, 1, 0.5)[0].passage.text == "一一。二二。"
    assert likeliest([], 6, 1, 0.5) == []


def test_what_no_passage_was_read_for_has_no_chance() -> None:
    text = Passage("书", 1, "第一章", 1, 0, "一二。三四。")
    shares = np.array([0, 0, 0.25, 0.75], dtype=np.float32)
    cut = cut_up([text, text], np.array([0.9, 0.1], dtype=np.float32), {0: shares})
    assert [(own.passage.text, round(own.chance, 3)) for own in cut] == [("一二。", 0.0), ("三四。", 0.9)]
    twice = cut_up([text, text], np.array([0.9, 0.1], dtype=np.float32), {0: shares, 1: shares})
    assert [round(own.chance, 3) for own in twice] == [0.0, 1.0]
