"""Text beyond memory is looked up beside the book, from the files that it lies in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import miniglm

from miniglm.corpus import large
from miniglm.lookup import library
from miniglm.lookup.encoder import Encoder, build_vocabulary
from miniglm.lookup.library import Library, build_library
from miniglm.lookup.text import grams, plain
from miniglm.lookup.texts import TITLE, text_parts, text_sample
from miniglm.lookup.training import train_encoder

DOCUMENTS = [
    f"第{n}篇说的是{place}。\n那里出产{thing}。"
    for n, (place, thing) in enumerate(zip("甲乙丙丁戊", "茶米盐铁丝", strict=True))
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), "utf-8")
    large.write_shards([str(source)], tmp_path / "texts", size=50)
    return tmp_path / "texts"


def _encoder() -> Encoder:
    vocabulary = build_vocabulary(map(plain, DOCUMENTS))
    bags = [vocabulary.bag(plain(text)) for text in DOCUMENTS]
    return train_encoder(vocabulary, lambda current, share: (bags, bags), seconds=1000, seed=1, most_steps=5)


def test_documents_are_numbered_through_all_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(large.read_shards(folder)) > 2
    parts = text_parts(folder)
    paragraphs = [p for part in parts for p in part.paragraphs()]
    assert [p.text for p in paragraphs] == [line for text in DOCUMENTS for line in text.split("\n")]
    assert [p.number for p in paragraphs] == list(range(1, 11))
    assert [p.chapter_number for p in paragraphs] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert {(p.book, p.chapter) for p in paragraphs} == {(TITLE, "")}
    monkeypatch.setattr("miniglm.lookup.texts.FILES", 100)
    assert [p for part in text_parts(folder) for p in part.paragraphs()] == paragraphs and len(text_parts(folder)) == 1


def test_sample_is_of_that_size(folder: Path) -> None:
    assert 15 <= sum(len(p.text) for p in text_sample(folder, 30)) <= 30


@pytest.mark.parametrize("block", [1, 10**6])
def test_found_wherever_it_lies_and_built_once(
    folder: Path, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "BLOCK", block)
    encoder, parts = _encoder(), text_parts(folder)
    assert build_library(parts, encoder, "a", tmp_path / "books") == len(parts) > 1
    assert build_library(parts, encoder, "a", tmp_path / "books") == 0
    found = Library(tmp_path / "books")
    assert found.size == 10
    for number, thing in enumerate("茶米盐铁丝"):
        question = plain(f"哪里出产{thing}？")
        hits = found.search(grams(question), encoder.bag(encoder.vocabulary.bag(question)), 3)
        first = max(hits, key=lambda hit: hit[1])[0]
        passage = found.passage(first)
        assert passage.text == f"那里出产{thing}。" and passage.paragraph == 2 * number + 2
        # A document ends where the next one begins.
        assert [n for n, _ in found.around(TITLE, passage.paragraph)[1]] == [2 * number + 1, 2 * number + 2]
        context = "".join(map(chr, found.context(first)[0]))
        assert thing in context and not any(other in context for other in "茶米盐铁丝" if other != thing)


def test_index_of_text_beside_a_book(material: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("南海有一座灯塔，守塔人名叫林海生。他每夜点灯三次。\n", "utf-8")
    out = tmp_path / "run"
    made = miniglm(
        "index", "--out", out, "--book", material / "书.txt", "--text", tmp_path / "more.txt", "--minutes", "0.5"
    )
    assert made.returncode == 0, made.stderr
    done = miniglm("ask", out, "南海灯塔的守塔人名叫什么？")
    assert f"【{TITLE}】" in done.stdout and "林海生" in done.stdout
