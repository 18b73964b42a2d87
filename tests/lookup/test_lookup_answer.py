"""A small book from text to cited answers: with questions, without, with a second book, with damaged files."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import ROOT

from miniglm.corpus import Paragraph
from miniglm.errors import MiniGLMError
from miniglm.lookup import NOT_FOUND, Answerer, build
from miniglm.lookup.answer import with_sources
from miniglm.lookup.build import build_index
from miniglm.lookup.encoder import DIMENSIONS, Encoder
from miniglm.lookup.facts import facts_of, locate
from miniglm.lookup.library import Library, build_library, parts_of
from miniglm.lookup.look import likely
from miniglm.lookup.text import plain
from miniglm.lookup.withheld import withhold
from miniglm.qa.formats import Example, Turn, read_examples

STORY = [
    ("第一回 山中", "从前山中有一座古庙，庙里住着老僧慧远。慧远每日敲钟一百零八下。"),
    ("第一回 山中", "山下有个铁匠名叫石勇，打得一手好刀。石勇的刀卖到了京城。"),
    ("第二回 渡口", "渡口的船家姓柳，人称柳老大。柳老大有三个女儿，小女儿会唱渔歌。"),
    ("第二回 渡口", "一日大雨，石勇背着刀箱过河，船到江心翻了。柳家小女儿跳下水把他救起。"),
    ("第三回 京城", "石勇到了京城，把宝刀献给将军韩烈。韩烈赏他白银五百两。"),
]


def _book(title: str, story: list[tuple[str, str]]) -> list[Paragraph]:
    found: list[Paragraph] = []
    before, chapter = "", 0
    for heading, text in story:
        if heading != before:
            before, chapter = heading, chapter + 1
            found.append(Paragraph(title, heading, chapter, len(found) + 1, heading))
        found.append(Paragraph(title, heading, chapter, len(found) + 1, text))
    return found


def _example(question: str, answer: str, evidence: str, name: str) -> Example:
    return Example((Turn(question, answer),), id=name, keys=((answer[:2],),), extra={"evidence": evidence})


EXAMPLES = [
    _example("古庙里住着谁？", "住着老僧慧远。", "庙里住着老僧慧远", "1"),
    _example("哪一位僧人住在山中的庙里？", "住着老僧慧远。", "庙里住着老僧慧远", "1"),
    _example("铁匠叫什么名字？", "铁匠名叫石勇。", "山下有个铁匠名叫石勇", "2"),
]
BOOK = _book("山中记", STORY)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    build_index(BOOK, EXAMPLES, [], folder, seconds=600, seed=1)
    return folder


@pytest.fixture(scope="module")
def told() -> list[list[Example]]:
    """The phrasings of 240 facts of the shipped set."""
    facts: dict[str, list[Example]] = {}
    for example in read_examples(ROOT / "data" / "sanguo" / "train.jsonl").examples:
        facts.setdefault(example.id, []).append(example)
    return list(facts.values())[:240]


@pytest.fixture(scope="module")
def sanguo(told: list[list[Example]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of their evidence, and the index of it with all phrasings but the last of the first 160."""
    story = [(f"第{fact[0].extra['chapter']}回 测试", str(fact[0].extra["evidence"]) + "。") for fact in told]
    folder = tmp_path_factory.mktemp("sanguo")
    taught = [example for fact in told[:160] for example in fact[:-1]]
    build_index(_book("三国", story), taught, [], folder, seconds=600, seed=1)
    return folder


def test_new_wordings_of_taught_facts_are_answered_with_their_source(told: list[list[Example]], sanguo: Path) -> None:
    answerer = Answerer(sanguo)
    asked = [fact[-1] for fact in told[:160:4]]
    answers = [answerer.answer(example.question) for example in asked]
    stated = [next((s for s in a.statements if s.text == e.answer), None) for e, a in zip(asked, answers, strict=True)]
    right = [(e, said.citation) for e, said in zip(asked, stated, strict=True) if said and said.citation]
    assert len(right) >= 0.5 * len(asked)
    assert all(str(e.extra["evidence"]) in citation.text for e, citation in right)
    assert all(f"第{e.extra['chapter']}回" in citation.label for e, citation in right)


def test_what_only_the_book_tells_is_quoted(told: list[list[Example]], sanguo: Path) -> None:
    answerer = Answerer(sanguo)
    asked = [fact[-1] for fact in told[160::2]]
    answers = [answerer.answer(example.question) for example in asked]
    found = [
        e for e, a in zip(asked, answers, strict=True) if any(str(e.extra["evidence"]) in c.text for c in a.citations)
    ]
    assert len(found) >= 0.5 * len(asked)
    quoted = [a for a in answers if a.kind == "quote"]
    assert len(quoted) >= 0.3 * len(asked) and all(a.text == a.citations[0].text for a in quoted)


def test_citation_is_where_it_says(index: Path) -> None:
    for first in Answerer(index).answer("古庙里住着的人是谁？").citations:
        assert BOOK[first.paragraph - 1].text[first.start :].startswith(first.text)
        assert first.quoted and first.quoted in first.text
        assert (first.chapter_title, first.book) == (BOOK[first.paragraph - 1].chapter, "山中记")


def test_statements_rest_on_what_is_cited(told: list[list[Example]], sanguo: Path) -> None:
    """Both are given where it is not clear which one answers; the book's words stand in their citation."""
    answerer = Answerer(sanguo)
    answers = [answerer.answer(fact[-1].question) for fact in told[::3]]
    kinds = {kind: [a for a in answers if a.kind == kind] for kind in ("fact", "quote", "both")}
    assert all(kinds.values())
    for kind, verbatim in (("fact", {False}), ("quote", {True}), ("both", {False, True})):
        assert all({said.verbatim for said in a.statements} == verbatim for a in kinds[kind])
    for a in answers:
        for said in a.statements:
            assert a.refused or said.citation in a.citations
            assert not said.verbatim or (said.citation is not None and said.text in said.citation.quoted)
        assert a.text.splitlines() == [said.text for said in a.statements]


def test_several_facts_are_given_where_it_is_not_clear_which(told: list[list[Example]], sanguo: Path) -> None:
    answerer = Answerer(sanguo)
    given: list[int] = []
    for question in (fact[-1].question for fact in told[::3]):
        found = answerer.look(question)
        answer = answerer.decide(found)
        facts = [said for said in answer.statements if not said.verbatim and not answer.refused]
        if facts:
            best = likely(answerer.judge.fact_ranker(found.facts.features))
            assert [said.text for said in facts] == [answerer.memory.facts[found.facts.numbers[n]].answer for n in best]
            given.append(len(facts))
        if len(facts) > 1:  # each says where it is from
            lines = with_sources(answer).splitlines()
            assert all(s.citation and f"{s.text}{s.citation.label}" in lines for s in facts)
    assert set(given) == {1, 2, 3}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([], []), ([1.0], [0]), ([0.0, 3.0, 2.5], [1, 2]), ([0.0, 3.0, 1.3], [1]), ([2.0, 3.0, 1.5, 2.0, 1.9], [1, 0, 3])],
)
def test_other_facts_are_likely_where_the_first_is_not_five_times_as_likely(
    scores: list[float], expected: list[int]
) -> None:
    assert likely(np.array(scores, dtype=np.float32)) == expected


def test_a_citation_is_whole_sentences_around_what_it_is_about(sanguo: Path) -> None:
    library = Library(sanguo / "books")
    text = "一二三。四五六七。八九。"
    folder = sanguo.parent / "wide"
    build_library(parts_of(_book("宽", [("第一回", text)])), Encoder.load(sanguo / "encoder"), "a", folder)
    library = Library(folder)
    passage = replace(library.passage(0), start=4, text="四五六七。")
    assert library.beside(passage, 3) == ("", "")
    assert library.beside(passage, 8) == ("", "八九。")
    assert library.beside(passage, 9) == ("一二三。", "")
    assert library.beside(passage, 12) == ("一二三。", "八九。")
    assert library.joined(passage, replace(passage, start=9, text="八九。")).text == "四五六七。八九。"


def test_a_paragraph_is_found_with_its_neighbours(index: Path) -> None:
    library = Library(index / "books")
    heading, around = library.around("山中记", 2)
    assert heading == "第一回 山中" and around == [(n, BOOK[n - 1].text) for n in (1, 2, 3)]
    assert [n for n, _ in library.around("山中记", 3)[1]] == [2, 3]  # what follows is another chapter's
    for book, number in (("山中记", 0), ("山中记", 99), ("别记", 2)):
        with pytest.raises(LookupError):
            library.around(book, number)


def test_book_without_questions_is_quoted(tmp_path: Path) -> None:
    build_index(BOOK, [], [], tmp_path, seconds=600, seed=1)
    answer = Answerer(tmp_path).answer("柳老大有三个女儿，小女儿会唱什么歌？")
    assert answer.kind == "quote" and answer.citations[0].text == answer.text


def test_with_time_several_encoders_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(build, "SEVERAL_SECONDS", 1.5)
    build_index(BOOK, EXAMPLES, [], tmp_path, seconds=1.5, seed=1, progress=told.append)
    assert told == sorted(told) and told[-1] == 1
    vectors = np.split(Encoder.load(tmp_path / "encoder").vectors, build.SEVERAL, axis=1)
    assert {part.shape[1] for part in vectors} == {DIMENSIONS}
    assert not any(np.allclose(one, other) for one, other in itertools.pairwise(vectors))
    assert "慧远" in Answerer(tmp_path).answer("古庙里住着的人是谁？").text


def test_another_subject_is_refused(index: Path) -> None:
    answer = Answerer(index).answer("how much is 2+2 in PyTorch?")
    assert answer.refused and answer.text == NOT_FOUND


@pytest.mark.parametrize("question", ["", "？", "\u2028", "龘" * 3000, "\ud800"])
def test_odd_questions_are_answered_somehow(index: Path, question: str) -> None:
    assert Answerer(index).answer(question).text


def test_citations_do_not_overlap_and_fall(index: Path) -> None:
    cited = Answerer(index).answer("石勇把刀献给了谁？").citations
    assert 1 <= len(cited) <= 5
    assert [c.score for c in cited] == sorted((c.score for c in cited), reverse=True)
    for i, one in enumerate(cited):
        for other in cited[:i]:
            apart = one.start >= other.start + len(other.text) or other.start >= one.start + len(one.text)
            assert one.paragraph != other.paragraph or apart


def test_index_holds_no_pickle(index: Path) -> None:
    names = {path.suffix for path in index.rglob("*") if path.is_file()}
    assert names <= {".json", ".jsonl", ".npy", ".safetensors", ".txt", ".u16", ".u32", ".f16"}


def test_second_book_builds_its_own_shard_alone(index: Path, tmp_path: Path) -> None:
    encoder, books = Encoder.load(index / "encoder"), tmp_path / "books"
    other = _book("别记", [("第一章", "海上有岛，岛上有塔。")])
    assert build_library(parts_of(BOOK), encoder, "a", books) == 1
    assert build_library(parts_of([*other, *BOOK]), encoder, "a", books) == 1
    library = Library(books)
    assert library.passage(0).book == "别记"  # the corpus's order, not that of building
    assert build_library(parts_of(other), encoder, "a", books) == 0
    assert Library(books).size == 1
    assert build_library(parts_of(other), encoder, "b", books) == 1  # vectors of another encoder are of no use


def test_context_stays_in_the_chapter(index: Path) -> None:
    library = Library(index / "books")
    texts = [library.passage(n).text for n in range(library.size)]
    last_of_first = max(n for n in range(library.size) if library.passage(n).chapter == 1)
    context, start, end = library.context(last_of_first)
    found = "".join(map(chr, context))
    assert "石勇的刀卖到了京城" in found and "柳老大" not in found and len(texts) == library.size
    assert np.array_equal(context[start:end], plain(texts[last_of_first])) and 0 < start < end == len(context)


def test_facts_share_id_and_answer() -> None:
    facts = locate(facts_of(EXAMPLES), [p.text for p in BOOK])
    assert [len(fact.questions) for fact in facts] == [2, 1]
    assert [BOOK[fact.passage].number for fact in facts] == [2, 3]


def test_withheld_questions_are_some_and_of_other_facts() -> None:
    examples = [_example(f"问题{n}之{i}？", f"答案{n}。", "", str(n)) for n in range(60) for i in range(3)]
    facts = facts_of(examples)
    held = withhold(facts, 1)
    reworded = {fact.answer for _, fact in held.reworded}
    assert len(held.untaught) == 6 and len(reworded) == 20
    assert not reworded & {fact.answer for fact in held.untaught}
    assert withhold(facts, 1) == held


def test_faults_name_folder_and_mend(index: Path, tmp_path: Path) -> None:
    with pytest.raises(MiniGLMError, match="miniglm index"):
        Answerer(tmp_path)
    for name in (
        "encoder/encoder.safetensors",
        "judge.json",
        "books/0000/vectors/vectors.f16",
        "books/0000/postings/postings.u32",
        "facts/facts.jsonl",
    ):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(index, copy)
        (copy / name).write_bytes((copy / name).read_bytes()[:20])
        with pytest.raises(MiniGLMError, match="miniglm index"):
            Answerer(copy)
    copy = tmp_path / "version"
    shutil.copytree(index, copy)
    (copy / "index.json").write_text(json.dumps({"format": 99}), "utf-8")
    with pytest.raises(MiniGLMError, match="99"):
        Answerer(copy)
