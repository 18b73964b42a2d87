"""How texts are cut: nothing of a paragraph is lost, passages are short, n-grams are the same however they are written."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from miniglm.corpus import Paragraph
from miniglm.lookup.text import (
    PASSAGE,
    Occurrences,
    Plain,
    bytes_before,
    distinct,
    grams,
    kinds,
    pairs,
    passages,
    plain,
    plain_with_places,
    ranges,
    sentences,
    triples,
)
from miniglm.qa.text import bare

TEXT = st.text(alphabet="曹操刘备关羽张飞，。！？“”…a1 ", max_size=400)


def _paragraph(text: str, chapter: str = "第一回 桃园") -> Paragraph:
    return Paragraph("书", chapter, 1, 1, text)


@settings(deadline=None)
@given(TEXT)
def test_sentences_are_the_whole_paragraph(text: str) -> None:
    cut = sentences(text)
    covered = "".join(text[start:end] for start, end in cut)
    assert covered.replace(" ", "") == text.replace(" ", "")
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(cut))


@settings(deadline=None)
@given(TEXT)
def test_passages_hold_every_sentence_and_are_short(text: str) -> None:
    found = passages([_paragraph(text)])
    cut = sentences(text)
    assert all(any(p.start <= start and end <= p.end for p in found) for start, end in cut)
    longest = max((end - start for start, end in cut), default=0)
    assert all(p.end - p.start <= max(PASSAGE, longest) for p in found)
    assert [p.start for p in found] == sorted({p.start for p in found})


def test_closing_marks_stay_with_their_sentence() -> None:
    text = "玄德曰：“此言甚善！”飞大喜。"
    assert [text[start:end] for start, end in sentences(text)] == ["玄德曰：“此言甚善！”", "飞大喜。"]


def test_headings_are_no_passages() -> None:
    assert passages([_paragraph("第一回 桃园"), _paragraph("话说天下大势。")])[0].paragraph == 1


def test_grams_are_characters_then_pairs_in_one_form() -> None:
    found = grams(plain("曹操！"))
    assert pairs(found).tolist() == [False, False, True]
    assert np.array_equal(found, grams(plain(" 曹 操 ")))
    assert np.array_equal(grams(plain("劉備")), grams(plain("刘备")))
    assert len(set(grams(plain("操曹")).tolist()) & set(found.tolist())) == 2  # the order of a pair counts
    assert len(grams(plain(""))) == 0 and len(triples(plain("曹操"))) == 0 and len(triples(plain("曹孟德"))) == 1


def test_kinds_tell_person_from_number() -> None:
    assert not np.array_equal(kinds("谁杀了他？"), kinds("他活了多少岁？"))


def test_distinct_is_numpys_unique() -> None:
    for numbers in ([], [3], [5, 1, 5, 2, 1]):
        found = np.array(numbers, dtype=np.uint32)
        assert np.array_equal(distinct(found), np.unique(found))


ANY = st.text(
    alphabet=st.one_of(st.characters(), st.sampled_from("曹劉ﬁßÅ①가ᄀ\u1161\u0301か\uff9e𠀀\ud800 　")), max_size=30
)


@settings(deadline=None)
@given(ANY)
def test_characters_are_those_of_the_bare_text(text: str) -> None:
    expected = np.frombuffer(bare(text).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint16)
    assert np.array_equal(plain(text), expected)


@settings(deadline=None)
@given(st.text(alphabet="曹操，。Åé①𠀀 a", max_size=30), st.data())
def test_places_are_those_of_what_stands_before(text: str, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, len(text)), max_size=4)), dtype=np.int64)
    found, before = plain_with_places(text, places)
    assert np.array_equal(found, plain(text))
    assert before.tolist() == [len(plain(text[:place])) for place in places]
    assert bytes_before(text, places).tolist() == [len(text[:place].encode()) for place in places]


def _runs(text: Plain) -> NDArray[np.uint64]:
    return np.concatenate([grams(text).astype(np.uint64), triples(text)])


@settings(deadline=None)
@given(
    st.text(alphabet="曹操刘备𠀀", max_size=6),
    st.lists(st.tuples(st.text(alphabet="曹操刘备关𠀀", max_size=9), st.integers(0, 9), st.integers(0, 9)), min_size=1),
)
def test_occurrences_are_those_of_each_text_and_of_each_part(asked: str, written: list[tuple[str, int, int]]) -> None:
    wanted = distinct(_runs(plain(asked)))
    texts = [plain(text) for text, *_ in written]
    places = [sorted(min(place, len(text)) for place in two) for text, (_, *two) in zip(texts, written, strict=True)]
    found = Occurrences(wanted, texts)
    parts = [text[start:end] for text, (start, end) in zip(texts, places, strict=True)]
    for times, some in ((found.times(), texts), (found.times(np.array(places)), parts)):
        assert times.tolist() == [[int((_runs(text) == name).sum()) for name in wanted] for text in some]


def test_ranges() -> None:
    assert ranges(np.array([5, 0, 7]), np.array([2, 0, 3])).tolist() == [5, 6, 7, 8, 9]
