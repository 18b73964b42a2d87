"""A corpus that need not fit into memory: sources, shards that a killed run goes on after, the same tokens whatever
the number of processes."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running import ROOT, fails, miniglm

from miniglm.corpus import large
from miniglm.corpus.large import clean_document, documents, read_shard, read_shards, sample, write_shards
from miniglm.dataset import TextRows, TokenShards
from miniglm.errors import MiniGLMError
from miniglm.large_tokens import tokenize_shards, training_tokens
from miniglm.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"第{i}篇。却说玄德引{i}骑，望{'东南西北'[i % 4]}而行。\n次日又行{i * 7}里。" for i in range(200)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(TEXTS[:50]), "utf-8")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[50:120]), "utf-8")
    with gzip.open(folder / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": t, "id": 1}, ensure_ascii=False) + "\n" for t in TEXTS[120:])
    (folder / "notes.md").write_text("no text", "utf-8")
    return folder


def test_every_document_of_every_source(source: Path) -> None:
    assert [clean_document(text) for text in documents(str(source))] == TEXTS


def test_parquet_and_a_data_set_are_read_by_their_libraries(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": TEXTS, "id": list(range(200))}), tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == TEXTS
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), "utf-8")
    assert list(documents(f"hf:{tmp_path / 'set'}")) == TEXTS  # a folder is a data set to it as one of the Hub is


def test_what_is_no_text_is_cleaned_away() -> None:
    assert clean_document(" 一\u200b 行\ufffd \n\n\t \r\n 二\u3000\u3000行\x00") == "一 行\n二 行"
    assert clean_document("\ufeff \n") == ""


def test_a_file_of_one_endless_line_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LONGEST", 100)
    (tmp_path / "a.txt").write_text("字" * 1000, "utf-8")
    assert [len(document) for document in documents(str(tmp_path / "a.txt"))] == [100] * 10


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', ("第 2 行", "JSON")),
        ("a.jsonl", b'{"content": "x"}\n', ("第 1 行", "text")),
        ("a.txt", "曹操".encode("gb18030"), ("UTF-8",)),
        ("a.jsonl.gz", b"no gzip", ("读不出来",)),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-30], ("读不出来",)),
        ("a.pdf", b"", (".parquet",)),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, words: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MiniGLMError) as caught:
        list(documents(str(tmp_path / name)))
    assert all(word in str(caught.value) for word in (name, *words))
    with pytest.raises(MiniGLMError, match="没有这个文件"):
        list(documents(str(tmp_path / "nothing.txt")))


class Killed(Exception):
    pass


def test_shards_go_on_where_a_killed_run_stopped(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_shards([str(source)], tmp_path / "whole", size=2000)
    assert len(whole) > 3 and sum(shard["documents"] for shard in whole) == 200
    assert whole == read_shards(tmp_path / "whole")
    plain = large.documents

    def killed(name: str) -> Iterator[str]:
        yield from itertools.islice(plain(name), 130)
        raise Killed

    monkeypatch.setattr(large, "documents", killed)
    with pytest.raises(Killed):
        write_shards([str(source)], tmp_path / "cut", size=2000)
    monkeypatch.undo()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.jsonl")}
    assert 0 < len(before) < len(whole)
    assert write_shards([str(source)], tmp_path / "cut", size=2000) == whole
    for shard in whole:
        made = tmp_path / "cut" / shard["name"]
        assert made.read_bytes() == (tmp_path / "whole" / shard["name"]).read_bytes()
        assert before.get(made.name, made.stat().st_mtime_ns) == made.stat().st_mtime_ns
    assert [text for shard in whole for text in read_shard(tmp_path / "cut" / shard["name"])] == TEXTS
    assert 800 <= sum(map(len, sample(tmp_path / "cut", 1000))) <= 1000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, vocab_size=None, corpus_characters=8000).save(folder)
    return folder


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("text-*.npy"))}


def test_the_same_tokens_whatever_the_number_of_processes(source: Path, tmp_path: Path, tokenizer: Path) -> None:
    texts = tmp_path / "texts"
    write_shards([str(source)], texts, size=2000)
    held_out = [TEXTS[7].split("\n")[1]]
    made = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        made[processes] = tokenize_shards(texts, folder, tokenizer, held_out=held_out, processes=processes)
    assert made[1] == made[2] and arrays(tmp_path / "1") == arrays(tmp_path / "2")
    # Gone and damaged ones are made again, the others stay.
    kept = tmp_path / "2" / "text-00000.npy"
    first = kept.stat().st_mtime_ns
    (tmp_path / "2" / "text-00001.npy").unlink()
    (tmp_path / "2" / "text-00002.json").write_text("{")
    assert tokenize_shards(texts, tmp_path / "2", tokenizer, held_out=held_out, processes=1) == made[1]
    assert arrays(tmp_path / "2") == arrays(tmp_path / "1") and kept.stat().st_mtime_ns == first

    spoken = Tokenizer.load(tokenizer)
    np.save(tmp_path / "1" / "train.npy", np.array(spoken.encode("书。"), np.uint16))
    ids = training_tokens(tmp_path / "1", made[1])
    parts: list[str] = []
    part: list[int] = []
    for token in ids[:].tolist():
        if token == spoken.end_of_text:
            parts.append(spoken.decode(part))
            part = []
        else:
            part.append(token)
    expected = [text for text in ("\n".join(x for x in t.split("\n") if x not in held_out) for t in TEXTS) if text]
    assert [*parts, spoken.decode(part)] == ["书。", *expected]
    (tmp_path / "1" / "text-00001.npy").write_bytes((tmp_path / "1" / "text-00000.npy").read_bytes())
    with pytest.raises(MiniGLMError, match=r"text-00001\.npy.*应有"):
        training_tokens(tmp_path / "1", made[1])


def test_a_changed_text_is_told(source: Path, tmp_path: Path, tokenizer: Path) -> None:
    shards = write_shards([str(source)], tmp_path / "texts", size=4000)
    with (tmp_path / "texts" / shards[1]["name"]).open("a", encoding="utf-8") as file:
        file.write('"更多"\n')
    (tmp_path / "tokens").mkdir()
    with pytest.raises(MiniGLMError, match=r"00001\.jsonl.*校验和"):
        tokenize_shards(tmp_path / "texts", tmp_path / "tokens", tokenizer, held_out=[], processes=1)


def test_shards_are_one_array() -> None:
    whole = np.arange(1000, dtype=np.uint16)
    shards = TokenShards([whole[:300], whole[300:301], whole[301:301], whole[301:]])
    assert len(shards) == 1000
    for start, stop in ((0, 1000), (299, 302), (300, 301), (301, 301), (990, 2000), (0, 300), (500, 520)):
        assert np.array_equal(shards[start:stop], whole[start:stop])
    one, other = (TextRows(tokens, 24, [0, 1], seed=0) for tokens in (whole, shards))
    assert all(np.array_equal(one.row(i).ids, other.row(i).ids) for i in range(100))


def test_a_run_pretrains_on_it(source: Path, material: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command: list[str | Path] = ["pretrain", "--recipe", material / "recipe.toml", "--book", material / "书.txt"]
    done = miniglm(*command, "--text", source, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "大语料 200 篇" in done.stderr
    meta = json.loads((out / "tokens" / "meta.json").read_text("utf-8"))
    assert meta["train_tokens"] == len(np.load(out / "tokens" / "train.npy")) + meta["shards"][0]["tokens"]
    fails(*command, "--text", ROOT / "README.md", "--out", tmp_path / "b", words=("README.md", ".jsonl"))
    fails(*command, "--text", source / "a.txt", "--out", out, words=("corpus.texts",))
