"""Scores agree with the libraries that define them, and nothing breaks at the edges."""

from __future__ import annotations

import json
import random
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_chinese import Rouge  # type: ignore[import-untyped]
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

from miniglm.evaluation import scores
from miniglm.evaluation.scores import (
    CopyIndex,
    bootstrap_interval,
    characters,
    paired_interval,
    rouge_l,
    rouge_n,
    words,
)

DATA = Path(__file__).parents[2] / "data" / "sanguo"


def real_pairs(count: int) -> list[tuple[str, str]]:
    """Sentences that tell the same fact: the novel's and ours."""
    rows = [json.loads(line) for line in (DATA / "unseen.jsonl").read_text("utf-8").splitlines()]
    return [(row["evidence"], row["answer"]) for row in random.Random(0).sample(rows, count)]


def random_pairs(count: int) -> list[tuple[str, str]]:
    draw = random.Random(1)
    return [(text(draw), text(draw)) for _ in range(count)]


def text(draw: random.Random) -> str:
    return "".join(draw.choices("曹操刘备，大军ab7", k=draw.randint(1, 30)))


PAIRS = real_pairs(150) + random_pairs(200) + [("甲", "甲"), ("甲", "乙"), ("甲乙丙", "甲"), ("甲乙", "乙甲")]


class BySpace:
    """rouge-score's own tokenizer drops everything but a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


@pytest.mark.parametrize("unit", [characters, words])
def test_rouge_agrees_with_rouge_score(unit) -> None:  # type: ignore[no-untyped-def]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=BySpace())
    for answer, reference in PAIRS:
        mine, theirs = unit(answer), unit(reference)
        expected = scorer.score(" ".join(theirs), " ".join(mine))
        for name, found in (
            ("rouge1", rouge_n(mine, theirs, 1)),
            ("rouge2", rouge_n(mine, theirs, 2)),
            ("rougeL", rouge_l(mine, theirs)),
        ):
            assert (found.precision, found.recall, found.f1) == pytest.approx(tuple(expected[name])), (
                answer,
                reference,
            )


def test_rouge_l_agrees_with_rouge_chinese() -> None:
    library = Rouge(metrics=["rouge-l"])
    for answer, reference in PAIRS:
        mine, theirs = characters(answer), characters(reference)
        [expected] = library.get_scores(" ".join(mine), " ".join(theirs))
        found = rouge_l(mine, theirs)
        assert found.recall == pytest.approx(expected["rouge-l"]["r"], abs=1e-6), (answer, reference)
        assert found.precision == pytest.approx(expected["rouge-l"]["p"], abs=1e-6)
        assert found.f1 == pytest.approx(expected["rouge-l"]["f"], abs=1e-6)


def test_bleu_and_chrf_agree_with_sacrebleu() -> None:
    answers, references = map(list, zip(*PAIRS, strict=True))
    assert scores.corpus_bleu(answers, references).mean * 100 == pytest.approx(
        sacrebleu.corpus_bleu(answers, [references], tokenize="zh").score
    )
    for answer, reference in PAIRS:
        expected = sacrebleu.sentence_bleu(answer, [reference], tokenize="zh", use_effective_order=True).score
        assert scores.bleu(answer, reference) * 100 == pytest.approx(expected)
        assert scores.chrf(answer, reference) * 100 == pytest.approx(sacrebleu.sentence_chrf(answer, [reference]).score)


def test_the_first_character_counts() -> None:
    """A table that starts at index 1 gives 0 for the first pair and 0.5 for the second."""
    assert rouge_l("甲", "甲").f1 == 1
    assert rouge_l("甲乙", "甲乙").f1 == 1
    assert rouge_l("甲丙", "甲丁").f1 == 0.5


@pytest.mark.parametrize(("answer", "reference"), [("", ""), ("", "甲"), ("甲", ""), ("甲", "乙"), (" \n", "甲乙")])
def test_nothing_in_common_is_zero_and_prints_nothing(
    answer: str, reference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, theirs = characters(answer), characters(reference)
    for overlap in (rouge_l(mine, theirs), rouge_n(mine, theirs, 1), rouge_n(mine, theirs, 2)):
        assert (overlap.precision, overlap.recall, overlap.f1) == (0, 0, 0)
    assert rouge_l(words(answer), words(reference)).f1 == 0
    assert scores.character_f1(answer, reference) == 0
    assert scores.bleu(answer, reference) == pytest.approx(0, abs=0.3)  # sacrebleu smooths
    assert 0 <= scores.chrf(answer, reference) <= 1
    assert scores.exact_match(answer, reference) == (not answer.strip() and not reference)
    assert capsys.readouterr().out == ""


def test_no_answers_at_all() -> None:
    with pytest.raises(ValueError):
        scores.corpus_bleu([], [])
    assert CopyIndex([]).share("甲") == CopyIndex(["甲"]).share("") == CopyIndex([""]).share("甲") == 0
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite"):
            bootstrap_interval(values)


def test_words_keep_the_names_they_are_given() -> None:
    assert "于禁降" not in words("于禁降了") and "于禁降" in words("于禁降了", extra=["于禁降"])
    assert "于禁降" not in words("于禁降了")  # and only where they are given
    assert words("曹操 大军") == ["曹操", "大军"]


def test_exact_match_and_character_f1_ignore_form_only() -> None:
    assert scores.exact_match("張飛，字翼德。", "张飞 字翼德") == 1
    assert scores.exact_match("张飞字益德", "张飞字翼德") == 0
    assert scores.character_f1("张飞，字益德", "张飞字翼德。") == pytest.approx(0.8)
    assert scores.character_f1("甲甲甲", "甲") == pytest.approx(0.5)  # each as often as both have it


def test_repetition_and_length() -> None:
    assert scores.repetition("") == scores.repetition("甲乙丙") == scores.repetition("甲乙丙丁戊") == 0
    assert scores.repetition("甲乙丙丁" * 2) == pytest.approx(1 / 5)
    assert scores.repetition("哈" * 103) == pytest.approx(0.99)
    assert scores.length_ratio("甲 乙", "甲乙丙丁") == 0.5
    assert np.isnan(scores.length_ratio("甲", ""))


TEXT = st.text("甲乙丙", max_size=12)


@given(st.lists(TEXT, max_size=6), TEXT)
def test_the_longest_copied_stretch_is_what_difflib_finds(training: list[str], answer: str) -> None:
    expected = max(
        (SequenceMatcher(None, answer, other, autojunk=False).find_longest_match().size for other in training),
        default=0,
    )
    copied = CopyIndex(training).longest(answer)
    assert len(copied) == expected and copied in answer
    assert not copied or any(copied in other for other in training)


def test_copies_do_not_reach_across_training_answers() -> None:
    assert CopyIndex(["曹操", "刘备"]).longest("曹操\0刘备") == "曹操"
    assert CopyIndex(["曹操大军", "刘备"]).share("曹操大将") == 0.75


def test_copies_of_a_whole_set_are_found() -> None:
    rows = [json.loads(line) for line in (DATA / "val.jsonl").read_text("utf-8").splitlines()]
    index = CopyIndex(row["answer"] for row in rows)
    shares = [index.share(row["evidence"]) for row in rows]
    assert 0.1 < float(np.mean(shares)) < 0.3
    assert index.share(rows[0]["answer"]) == 1


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=50), st.integers(0, 5))
def test_an_interval_is_repeatable_and_within_the_values(values: list[float], seed: int) -> None:
    found = bootstrap_interval(values, seed=seed)
    assert found == bootstrap_interval(values, seed=seed)
    slack = 1e-9
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    assert found.mean == pytest.approx(np.mean(values)) and found.count == len(values)


def test_one_value_is_its_own_interval() -> None:
    assert bootstrap_interval([0.25]) == scores.Interval(0.25, 0.25, 0.25, 1)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    samples = [bootstrap_interval(draw.binomial(1, 0.3, 200).astype(float).tolist(), seed=i) for i in range(300)]
    assert 0.90 < np.mean([found.low <= 0.3 <= found.high for found in samples]) < 0.99
    exact = 1.96 * np.sqrt(0.3 * 0.7 / 200)
    assert np.mean([(found.high - found.low) / 2 for found in samples]) == pytest.approx(exact, rel=0.1)


def test_many_values_are_resampled_in_blocks() -> None:
    values = np.random.default_rng(0).normal(size=30_000).tolist()
    found = bootstrap_interval(values, resamples=300)
    assert found.high - found.low == pytest.approx(2 * 1.96 / np.sqrt(30_000), rel=0.2)


def test_paired_differences_are_narrower_than_unpaired() -> None:
    draw = np.random.default_rng(0)
    hardness = draw.normal(size=400)
    before, after = hardness.tolist(), (hardness + 0.1 + 0.05 * draw.normal(size=400)).tolist()
    found = paired_interval(before, after)
    assert found.mean == pytest.approx(0.1, abs=0.02) and found.low > 0.08 and found.high < 0.12
    with pytest.raises(ValueError, match="400 and 399"):
        paired_interval(before, after[:-1])
