"""What leaks is found, what does not is left alone, and a split leaks nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniglm.errors import MiniGLMError
from miniglm.qa.formats import Example, Turn, read_examples
from miniglm.qa.leaks import Leak, find_leaks, split_every_tenth, split_groups

DATA = Path(__file__).parents[2] / "data" / "sanguo"


def one(question: str, answer: str, name: str = "") -> Example:
    return Example((Turn(question, answer),), id=name)


TRAIN = [
    one("关羽在哪里温酒斩华雄，斩后酒还温着吗？", "在汜水关前，酒尚温。"),
    one("谁在七星坛借东风？", "诸葛亮在南屏山七星坛借来东风。"),
    Example((Turn("刘备几次拜访诸葛亮？", "三次。"), Turn("后来呢？", "诸葛亮出山，随刘备到新野。"))),
]


@pytest.mark.parametrize(
    ("question", "answer", "kind", "train"),
    [
        ("谁在七星坛借东风？", "孔明。", "question", 1),
        ("誰在七星壇，借東風?", "孔明。", "question", 1),
        ("关羽在哪里温酒斩华雄，斩后酒还温着呢？", "汜水关。", "question", 0),
        ("刘备几次拜访诸葛亮", "三回。", "question", 2),  # not the training example's last turn
        ("拜访了多少回才见到卧龙？", "三次", "answer", 2),
        ("孔明筑坛于何处？", "南屏山七星坛借来东风", "copied", 1),
        ("谁是美髯公？", "关羽。", None, None),
        ("谁没有酒？", "酒尚温", None, None),  # too short to be a copy
    ],
)
def test_each_kind_of_leak(question: str, answer: str, kind: str | None, train: int | None) -> None:
    found = find_leaks(TRAIN, [one("张飞用的什么兵器？", "丈八蛇矛。"), one(question, answer)])
    assert [(leak.kind, leak.evaluation, leak.train) for leak in found.found] == ([(kind, 1, train)] if kind else [])
    assert found.share() == (0.5 if kind else 0) and found.share("copied") == (0.5 if kind == "copied" else 0)


def test_the_similarity_shown_is_jaccard_over_bigrams() -> None:
    [leak] = find_leaks([one("甲乙丙丁戊", "答")], [one("甲乙丙丁己", "另答")], similarity=0.5).found
    assert leak == Leak("question", 0, 0, 3 / 5)
    assert not find_leaks([one("甲乙丙丁戊", "答")], [one("甲乙丙丁己", "另答")], similarity=0.7).found


def test_nothing_to_compare() -> None:
    assert find_leaks([], []).share() == 0
    assert find_leaks(TRAIN, []).found == find_leaks([], TRAIN).found == []
    for similarity in (0, 1.1):
        with pytest.raises(ValueError, match="similarity"):
            find_leaks(TRAIN, TRAIN, similarity=similarity)


def test_nearly_all_near_questions_are_found() -> None:
    """Hashing only proposes; it must not miss what comparing every pair would find."""
    draw = random.Random(0)
    questions = [example.question for example in read_examples(DATA / "train.jsonl").examples[:600]]
    changed = []
    for question in questions:
        at = draw.randrange(len(question))
        changed.append(question[:at] + draw.choice("啊呢吗的") + question[at + 1 :])
    train = [one(question, f"答{n}") for n, question in enumerate(questions)]
    evaluation = [one(question, f"问{n}") for n, question in enumerate(changed)]

    def grams(text: str) -> set[str]:
        plain = "".join(char for char in text if char.isalnum())
        return {plain[i : i + 2] for i in range(len(plain) - 1)}

    pairs = [(grams(a), grams(b)) for a, b in zip(questions, changed, strict=True)]
    near = {n for n, (a, b) in enumerate(pairs) if len(a & b) / len(a | b) >= 0.8}
    found = {leak.evaluation for leak in find_leaks(train, evaluation).found}
    assert len(near) > 300
    assert len(near - found) <= 1


def test_the_shipped_set_leaks_what_it_says() -> None:
    train, val, unseen = (read_examples(DATA / f"{name}.jsonl").examples for name in ("train", "val", "unseen"))
    leaks = find_leaks(train, val)
    assert leaks.share("answer") == 1  # the same facts, asked in new words
    assert find_leaks(train, unseen).found == []


QUESTIONS = st.sampled_from(
    ["谁借东风", "谁借东风？", "诸葛亮在哪里借东风", "关羽字什么", "关羽字什么呢", "张飞字什么", "？？", "a", "ab"]
)
ANSWERS = st.sampled_from(
    ["孔明", "孔明。", "诸葛亮在七星坛借东风", "当时诸葛亮在七星坛借东风的", "云长", "翼德", "！"]
)
SETS = st.lists(
    st.builds(
        lambda turns, name: Example(tuple(Turn(*turn) for turn in turns), id=name),
        st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=2),
        st.sampled_from(["", "", "1", "2"]),
    )
    | st.builds(lambda n: one(f"第{n}个问题{n * 7919}", f"回答{n * 104729}"), st.integers(0, 40)),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(SETS, st.integers(0, 3), st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (1.0, 0.0, 0.0)]))
def test_a_split_loses_nothing_and_leaks_nothing(
    examples: list[Example], seed: int, fractions: tuple[float, float, float]
) -> None:
    try:
        split = split_groups(examples, seed=seed, fractions=fractions)
    except MiniGLMError as error:
        assert "组" in str(error)
        return
    parts = [split.train, split.validation, split.test]
    assert sorted(map(id, sum(parts, []))) == sorted(map(id, examples))  # noqa: RUF017
    assert [bool(part) for part in parts] == [fraction > 0 for fraction in fractions]
    for one_side in parts:
        for other in parts:
            if one_side is not other:
                assert find_leaks(one_side, other).found == []
                assert not {e.id for e in one_side if e.id} & {e.id for e in other}
    assert split == split_groups(examples, seed=seed, fractions=fractions)


def test_a_real_set_is_split_by_fact_in_the_shares_asked_for() -> None:
    examples = read_examples(DATA / "train.jsonl").examples[:900]
    split, other = split_groups(examples, seed=0), split_groups(examples, seed=1)
    assert len(split.train) == pytest.approx(720, abs=5)
    assert len(split.validation) == pytest.approx(90, abs=5)
    assert split != other
    assert [e for e in examples if e in split.test] == split.test  # the file's order


def test_one_large_group_does_not_starve_the_others() -> None:
    large = [one(f"{n}：{'问' * n}", "是") for n in range(10)]
    for seed in range(5):
        split = split_groups([*large, one("谁借东风", "孔明"), one("关羽字什么", "云长")], seed=seed)
        assert sorted(map(len, (split.train, split.validation, split.test))) == [1, 1, 10]
        assert len(split.train) == 10


def test_what_cannot_be_split_says_so() -> None:
    with pytest.raises(MiniGLMError, match=r"2 个问答只成 1 组.*分不成 3 份"):
        split_groups([one("谁借东风", "孔明"), one("谁借东风？", "周瑜")])
    for fractions in ((0.5, 0.5, 0.5), (1.5, -0.5, 0.0)):
        with pytest.raises(ValueError, match="fractions"):
            split_groups(TRAIN, fractions=fractions)


def test_every_tenth_line_is_validation_as_in_the_reference() -> None:
    examples = [one(f"问{n}", f"答{n}") for n in range(25)]
    split = split_every_tenth(examples)
    assert split.validation == [examples[9], examples[19]] and split.test == []
    assert split.train == [e for e in examples if e not in split.validation]
