"""No paragraph stands on both sides, exactly or nearly, and none is lost."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniglm.corpus.cleaning import Paragraph, count_characters
from miniglm.corpus.splitting import Split, split
from miniglm.errors import MiniGLMError


def numbered(texts: list[str]) -> list[Paragraph]:
    return [Paragraph("书", "", 0, number, text) for number, text in enumerate(texts, 1)]


def jaccard(a: str, b: str) -> float:
    """Independent of the code under test: sets of strings."""
    first, second = ({text[i : i + 3] for i in range(len(text) - 2)} for text in (a, b))
    return len(first & second) / len(first | second)


def random_text(rng: random.Random, length: int) -> str:
    return "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(length))


def changed(rng: random.Random, text: str, edits: int) -> str:
    characters = list(text)
    for _ in range(edits):
        characters[rng.randrange(len(characters))] = chr(rng.randrange(0x4E00, 0x5E00))
    return "".join(characters)


def assert_apart(parts: Split, similarity: float) -> None:
    exact = {paragraph.text for paragraph in parts.train}
    for held_out in parts.validation:
        assert held_out.text not in exact
        if len(held_out.text) >= 10:
            assert all(jaccard(held_out.text, p.text) < similarity for p in parts.train if len(p.text) >= 10)


def test_every_tenth_paragraph_is_validation() -> None:
    rng = random.Random(1)
    paragraphs = numbered([random_text(rng, 40) for _ in range(35)])
    parts = split(paragraphs)
    assert parts.validation == [paragraphs[9], paragraphs[19], paragraphs[29]]
    assert parts.train == [paragraph for paragraph in paragraphs if paragraph not in parts.validation]
    assert (parts.duplicates_moved, parts.cut_by_sentence) == (0, False)
    assert split(paragraphs, every=5).validation == paragraphs[4::5]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(30, 120), st.integers(1, 8))
def test_no_near_duplicate_on_both_sides(seed: int, count: int, originals: int) -> None:
    rng = random.Random(seed)
    pool = [random_text(rng, rng.randrange(5, 80)) for _ in range(originals)]
    texts = [
        changed(rng, text, rng.randrange(0, 3))
        if rng.random() < 0.5 and (text := rng.choice(pool))
        else random_text(rng, rng.randrange(4, 80))
        for _ in range(count)
    ]
    texts[9] = random_text(rng, 80)  # so that there is something to validate with
    paragraphs = numbered(texts)
    parts = split(paragraphs)
    assert_apart(parts, 0.8)
    assert not parts.cut_by_sentence
    assert sorted(parts.train + parts.validation, key=lambda p: p.number) == paragraphs
    assert len(parts.validation) + parts.duplicates_moved == count // 10
    assert parts == split(paragraphs)


def test_what_moves_takes_its_own_duplicates_along() -> None:
    rng = random.Random(3)
    texts = [random_text(rng, 60) for _ in range(40)]
    texts[9] = texts[0][:57] + random_text(rng, 3)  # near the training paragraph 0
    texts[19] = texts[9][3:] + random_text(rng, 3)  # near 9, but not near 0
    assert jaccard(texts[9], texts[0]) >= 0.8 and jaccard(texts[19], texts[9]) >= 0.8
    assert jaccard(texts[19], texts[0]) < 0.85
    parts = split(numbered(texts), similarity=0.85)
    assert jaccard(texts[9], texts[0]) >= 0.85
    assert parts.duplicates_moved == 2
    assert [p.number for p in parts.validation] == [30, 40]


def test_short_paragraphs_count_only_if_they_are_the_same() -> None:
    rng = random.Random(4)
    texts = [random_text(rng, 60) for _ in range(30)]
    texts[0], texts[9], texts[19] = "正是：", "正是：", "正是。"
    parts = split(numbered(texts))
    assert [p.number for p in parts.validation] == [20, 30]


def test_similarity_is_the_dial() -> None:
    rng = random.Random(5)
    texts = [random_text(rng, 80) for _ in range(20)]
    texts[9] = changed(rng, texts[3], 6)
    assert 0.5 < jaccard(texts[9], texts[3]) < 0.8
    assert split(numbered(texts)).duplicates_moved == 0
    assert split(numbered(texts), similarity=0.5).duplicates_moved == 1


def test_few_paragraphs_are_cut_at_a_sentence() -> None:
    rng = random.Random(6)
    texts = ["。".join(random_text(rng, 20) for _ in range(20)) + "。" for _ in range(3)]
    parts = split(numbered(texts))
    assert parts.cut_by_sentence
    assert "".join(p.text for p in parts.train + parts.validation) == "".join(texts)
    assert 0.1 <= sum(len(p.text) for p in parts.validation) / sum(map(len, texts)) < 0.2
    assert parts.validation[0].number == 3
    one = split(numbered([random_text(rng, 500)]))  # not one full stop
    assert [len(p.text) for p in one.train + one.validation] == [450, 50]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="天地玄黄宇宙洪荒日月盈昃。！", min_size=1, max_size=300), min_size=1, max_size=9))
def test_small_corpora_give_two_sides_or_a_reason(texts: list[str]) -> None:
    try:
        parts = split(numbered(texts))
    except MiniGLMError as error:
        assert ("太少" in str(error)) == (sum(map(count_characters, texts)) < 200)
        return
    assert parts.train and parts.validation
    assert_apart(parts, 0.8)
    kept = sum(count_characters(p.text) for p in parts.train + parts.validation)
    assert kept == sum(map(count_characters, texts))


def test_a_tail_that_is_repeated_is_not_the_end() -> None:
    rng = random.Random(8)
    texts = [random_text(rng, 60) for _ in range(6)]
    parts = split(numbered([*texts, texts[0], texts[1]]))
    assert parts.cut_by_sentence and parts.duplicates_moved == 2
    assert_apart(parts, 0.8)


def test_too_little_and_too_repetitive() -> None:
    with pytest.raises(MiniGLMError, match="199 字"):
        split(numbered(["字" * 199]))
    with pytest.raises(MiniGLMError, match="太少"):
        split([])
    with pytest.raises(MiniGLMError, match="重复"):
        split(numbered(["天下大势，分久必合，合久必分。"] * 500))


def test_a_novel_and_a_novel_of_duplicates_are_split_whole() -> None:
    rng = random.Random(7)
    texts = [random_text(rng, 380) for _ in range(1500)]
    for doubled in (texts, texts[:750] * 2):
        parts = split(numbered(doubled))
        assert len(parts.train) + len(parts.validation) == 1500
