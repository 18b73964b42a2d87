"""The tokenizer: round trips, control tokens, chat form, streaming, files, agreement with transformers and tiktoken."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from miniglm import tokenizer as module
from miniglm.errors import MiniGLMError
from miniglm.tokenizer import (
    CONTROL_TOKENS,
    MIN_VOCAB_SIZE,
    PATTERN,
    StreamingDetokenizer,
    Tokenizer,
    default_vocab_size,
    from_tiktoken,
    load_gpt2_tokenizer,
    repair_surrogates,
    resolve_tokenizer,
    train_tokenizer,
)

DATA = Path(__file__).parents[1] / "data" / "sanguo" / "train.jsonl"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
    r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)

relaxed = settings(deadline=None)  # a busy machine is no failure

SPACES = ["\n", "\r\n", "\r", " ", "  ", "\t", "\u3000", "\u00a0", "\x85", "\x1c", "\u2028", "\0", "\ufeff"]
WORDS = ["曹操", "刘备，", "。", "？」", "abc", " the", "'s", "'LL", "ſ", "123", "45678", "é", "e\u0301", "<|", "|>"]
RARE = ["🙂", "👨\u200d👩\u200d👧", "\ufffd", "\U00020000", "\ud83d", "\ude00", "\ud83d\ude00"]
fragments = st.sampled_from([*CONTROL_TOKENS, *SPACES, *WORDS, *RARE])
any_text = st.text(st.characters(exclude_categories=())) | st.lists(fragments, max_size=12).map("".join)
# Python's UTF-8 and a renderer of chats both refuse surrogates, and transformers takes control tokens literally.
plain_text = any_text.map(repair_surrogates).filter(lambda text: not any(token in text for token in CONTROL_TOKENS))


def corpus() -> list[str]:
    """The training questions and answers, and enough of what they lack for its tokens: white space, marks, digits."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    odd = "曹操\n\n\u3000\u3000刘备  \n\r\n\r\n  the 2345678 12345678，，。。\n\n  \t\n\n\n\n，，，，    a"
    return [row["question"] + "\n" + row["answer"] + "\n" for row in rows] + [odd] * 500


TEXTS = corpus()
CHARACTERS = sum(map(len, TEXTS))
# Not a fixture: hypothesis wants none that is made anew for each example, and this is one second for the whole file.
TOKENIZER = train_tokenizer(TEXTS, vocab_size=1000, corpus_characters=CHARACTERS)


def reference_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """What `tokenizers` itself makes of the uncut text."""
    return tokenizer.hf.encode(text, add_special_tokens=False).ids


def byte_ids(data: bytes) -> list[int]:
    ids = {TOKENIZER.token_bytes(id): id for id in range(TOKENIZER.vocab_size)}
    return [ids[data[i : i + 1]] for i in range(len(data))]


# Training


def test_default_vocab_size_grows_with_the_square_root() -> None:
    assert default_vocab_size(600_000) == 4096
    assert default_vocab_size(2_400_000) == 8192
    assert default_vocab_size(0) == 512
    assert default_vocab_size(10**12) == 32_768
    sizes = [default_vocab_size(characters) for characters in range(0, 10**7, 12_345)]
    assert sizes == sorted(sizes)
    assert all(size % 256 == 0 for size in sizes)


def test_vocabulary_is_bytes_then_merges_then_control_tokens_in_order() -> None:
    assert TOKENIZER.vocab_size == 1000
    assert {TOKENIZER.token_bytes(id) for id in range(256)} == {bytes([byte]) for byte in range(256)}
    assert [TOKENIZER.hf.token_to_id(token) for token in CONTROL_TOKENS] == list(range(986, 1000))
    assert TOKENIZER.control_ids == set(range(986, 1000))
    assert all(TOKENIZER.token_bytes(id) == b"" for id in TOKENIZER.control_ids)
    assert len(TOKENIZER.encode("曹操")) == 1
    names = [TOKENIZER.end_of_text, TOKENIZER.system, TOKENIZER.user, TOKENIZER.assistant, TOKENIZER.observation]
    assert [TOKENIZER.decode([id], skip_control=False) for id in [*TOKENIZER.prefix, *names]] == (
        ["[gMASK]", "<sop>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    )
    assert TOKENIZER.stop_ids == {TOKENIZER.end_of_text, TOKENIZER.user, TOKENIZER.observation}


def test_training_is_deterministic_and_takes_a_generator() -> None:
    again = train_tokenizer((text for text in TEXTS), vocab_size=1000, corpus_characters=CHARACTERS)
    assert again.hf.to_str() == TOKENIZER.hf.to_str()


def test_cutting_texts_for_training_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAINING_PIECE", 10**9)
    uncut = train_tokenizer(TEXTS, vocab_size=1000, corpus_characters=CHARACTERS)
    assert uncut.hf.to_str() == TOKENIZER.hf.to_str()


def test_one_long_line_without_a_space() -> None:
    line = "".join(chr(0x4E00 + i * i * 7919 % 997) for i in range(500_000))
    tokenizer = train_tokenizer([line], vocab_size=None, corpus_characters=len(line))
    ids = tokenizer.encode(line)
    assert len(ids) < len(line) * 2
    assert tokenizer.decode(ids) == line


def test_a_large_corpus_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TRAINING_CHARACTERS", 2_000)
    texts = ["桃园结义。" * 20] * 100 + ["三顾茅庐。" * 20] * 100 + [f"{n}，" * 2 for n in range(100, 500)]
    size = sum(map(len, texts))
    sampled = train_tokenizer(texts, vocab_size=None, corpus_characters=size)
    assert len(sampled.encode("桃园结义")) == len(sampled.encode("三顾茅庐")) == 1
    assert sampled.vocab_size < train_tokenizer(texts, vocab_size=None, corpus_characters=1).vocab_size


def test_surrogates_and_control_tokens_in_the_corpus() -> None:
    texts = ["曹操\ud83d\ude00 \ud800 <|user|>[gMASK]<sop>曹操\n" * 50]
    tokenizer = train_tokenizer(texts, vocab_size=None, corpus_characters=2_000)
    assert len(tokenizer.encode("\U0001f600")) == 1
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode(texts[0]))


@pytest.mark.parametrize("size", [MIN_VOCAB_SIZE - 1, 0, -1])
def test_vocabulary_too_small(size: int) -> None:
    with pytest.raises(MiniGLMError, match=f"{size} 太小.*{MIN_VOCAB_SIZE}"):
        train_tokenizer(TEXTS, vocab_size=size, corpus_characters=CHARACTERS)


def test_vocabulary_larger_than_the_corpus_can_give() -> None:
    text = "滚滚长江东逝水，浪花淘尽英雄。" * 3
    most = train_tokenizer([text], vocab_size=None, corpus_characters=len(text)).vocab_size
    assert MIN_VOCAB_SIZE < most < default_vocab_size(len(text))
    with pytest.raises(MiniGLMError, match=rf"只能得到 {most} 个词元.*vocab_size = {most + 1}.*降到 {most}"):
        train_tokenizer([text], vocab_size=most + 1, corpus_characters=len(text))
    assert train_tokenizer([text], vocab_size=most, corpus_characters=len(text)).vocab_size == most


def test_bytes_alone_are_enough() -> None:
    tokenizer = train_tokenizer([], vocab_size=MIN_VOCAB_SIZE, corpus_characters=0)
    assert tokenizer.encode("曹") == tokenizer.hf.encode("曹").ids
    assert [tokenizer.token_bytes(id) for id in tokenizer.encode("曹")] == [b"\xe6", b"\x9b", b"\xb9"]


# Encoding and decoding


@relaxed
@given(any_text)
def test_decodes_what_it_encodes_and_never_a_control_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(ids, skip_control=False) == repair_surrogates(text)
    assert TOKENIZER.control_ids.isdisjoint(ids)


@relaxed
@given(any_text)
def test_repair_surrogates(text: str) -> None:
    repaired = repair_surrogates(text)
    repaired.encode()  # has none left
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert repaired == text


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("\ud83d\ude00!", "\U0001f600!"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00a", "\ufffda"),
        ("\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        ("\ufeff曹", "\ufeff曹"),
    ],
)
def test_repair_surrogates_by_example(text: str, repaired: str) -> None:
    assert repair_surrogates(text) == repaired


@relaxed
@given(st.lists(any_text, max_size=5))
def test_encode_batch_is_encode_of_each(texts: list[str]) -> None:
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_long_texts_are_encoded_in_pieces_with_the_ids_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["".join(TEXTS), "短", "", "".join(reversed(TEXTS))]
    expected = [reference_ids(TOKENIZER, text) for text in texts]
    for batch in (1, 70_000, 10**9):
        monkeypatch.setattr(module, "ENCODING_BATCH", batch)
        assert TOKENIZER.encode_batch(texts) == expected
    assert TOKENIZER.encode(texts[0]) == expected[0]


@relaxed
@given(
    st.lists(
        st.tuples(st.text("a7曹，。 \n\r'\u3000", max_size=4), st.sampled_from("aZ7曹"), st.sampled_from("\r\n ，。,."))
    )
)
def test_cutting_where_it_is_safe_changes_no_id(parts: list[tuple[str, str, str]]) -> None:
    text = "".join(map("".join, parts))  # has a safe cut in any 8 characters
    pieces = list(module.safe_pieces(text, 8))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 16 for piece in pieces)
    for tokenizer in (TOKENIZER, GPT2_LIKE):
        assert [id for piece in pieces for id in reference_ids(tokenizer, piece)] == reference_ids(tokenizer, text)


@relaxed
@given(any_text, st.integers(1, 10))
def test_pieces_are_the_text(text: str, size: int) -> None:
    pieces = list(module.safe_pieces(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 2 * size for piece in pieces)


@pytest.mark.parametrize("id", [-1, 1000])
def test_unknown_id(id: int) -> None:
    with pytest.raises(ValueError, match=str(id)):
        TOKENIZER.token_bytes(id)
    with pytest.raises(ValueError, match=str(id)):
        TOKENIZER.decode([5, id])
    with pytest.raises(ValueError, match=str(id)):
        StreamingDetokenizer(TOKENIZER).add(id)


def test_control_tokens_are_skipped_or_written() -> None:
    ids = [*TOKENIZER.prefix, *TOKENIZER.encode("曹操"), TOKENIZER.end_of_text]
    assert TOKENIZER.decode(ids) == "曹操"
    assert TOKENIZER.decode(ids, skip_control=False) == "[gMASK]<sop>曹操<|endoftext|>"


# Streaming


@relaxed
@given(st.lists(st.integers(0, 999) | st.integers(0, 255)))
def test_streamed_pieces_are_the_decoded_text(ids: list[int]) -> None:
    stream = StreamingDetokenizer(TOKENIZER)
    pieces = [stream.add(id) for id in ids]
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(ids)


@relaxed
@given(st.text())
def test_streaming_shows_each_character_as_soon_as_it_is_whole(text: str) -> None:
    stream = StreamingDetokenizer(TOKENIZER)
    for character in text:
        *head, last = byte_ids(character.encode())
        assert [stream.add(id) for id in head] == [""] * len(head)
        assert stream.add(last) == character
    assert stream.finish() == ""


def test_streaming_flushes_an_incomplete_character_and_starts_anew() -> None:
    stream = StreamingDetokenizer(TOKENIZER)
    head, *rest = byte_ids("🙂".encode())
    assert stream.add(head) == ""
    assert stream.finish() == "\ufffd"
    assert "".join(map(stream.add, [head, *rest])) == "🙂"


# Chat form


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_chat_form_token_by_token() -> None:
    t, newline = TOKENIZER, TOKENIZER.encode("\n")
    ids = t.encode_chat(
        [message("system", "答"), message("user", "谁"), message("assistant", "曹"), message("user", "啊")]
    )
    assert ids == [
        *(t.gmask, t.sop),
        *(t.system, *newline, *t.encode("答")),
        *(t.user, *newline, *t.encode("谁")),
        *(t.assistant, *newline, *t.encode("曹")),
        *(t.user, *newline, *t.encode("啊")),
        *(t.assistant, *newline),
    ]
    assert t.encode_chat([message("user", "谁")], add_generation_prompt=False) == [
        *(t.gmask, t.sop, t.user, *newline),
        *t.encode("谁"),
    ]


@relaxed
@given(st.lists(st.tuples(st.sampled_from(module.ROLES), any_text), max_size=4), st.booleans())
def test_content_cannot_smuggle_in_control_tokens(turns: list[tuple[str, str]], prompt: bool) -> None:
    ids = TOKENIZER.encode_chat([message(*turn) for turn in turns], add_generation_prompt=prompt)
    written = ["[gMASK]", "<sop>"] + [f"<|{role}|>" for role, _ in turns] + ["<|assistant|>"] * prompt
    assert [TOKENIZER.decode([id], skip_control=False) for id in ids if id in TOKENIZER.control_ids] == written


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"role": "robot", "content": "x"}, "第 2 条.*robot.*assistant"),
        ({"content": "x"}, "第 2 条.*role"),
        ({"role": "user"}, "第 2 条.*content"),
        ({"role": "user", "content": None}, "第 2 条.*content"),
    ],
)
def test_wrong_message(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(MiniGLMError, match=says):
        TOKENIZER.encode_chat([message("user", "谁？"), wrong])


def test_training_example_learns_answers_and_their_closing_tokens() -> None:
    turns = [("谁？", "是曹操。"), ("还有？", "刘备<|user|>。")]
    ids, targets = TOKENIZER.encode_training_example(turns, system="答题")
    learnt = [id for id, target in zip(ids, targets, strict=True) if target]
    assert set(targets) == {0, 1}
    assert learnt == [
        *(*TOKENIZER.encode("是曹操。"), TOKENIZER.user),
        *(*TOKENIZER.encode("刘备<|user|>。"), TOKENIZER.end_of_text),
    ]
    assert ids.count(TOKENIZER.user) == 2
    messages = [message("system", "答题")]
    for question, answer in turns:
        messages.append(message("user", question))
        prompt = TOKENIZER.encode_chat(messages)
        assert ids[: len(prompt)] == prompt
        assert targets[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
        messages.append(message("assistant", answer))
    assert ids == [*TOKENIZER.encode_chat(messages, add_generation_prompt=False), TOKENIZER.end_of_text]


@relaxed
@given(st.lists(st.tuples(any_text, any_text), min_size=1, max_size=3), any_text)
def test_training_example_with_any_text(turns: list[tuple[str, str]], system: str) -> None:
    ids, targets = TOKENIZER.encode_training_example(turns, system)
    closing = [TOKENIZER.user] * (len(turns) - 1) + [TOKENIZER.end_of_text]
    learnt: list[int] = []
    for (_, answer), close in zip(turns, closing, strict=True):
        learnt += [*TOKENIZER.encode(answer), close]
    assert [id for id, target in zip(ids, targets, strict=True) if target] == learnt
    first = [message("system", system)] * bool(system) + [message("user", turns[0][0])]
    prompt = TOKENIZER.encode_chat(first)
    assert ids[: len(prompt)] == prompt


def test_training_example_needs_a_turn() -> None:
    with pytest.raises(ValueError, match="turn"):
        TOKENIZER.encode_training_example([])


# Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "new" / "model"
    TOKENIZER.save(path, model_max_length=256)
    return path


def test_save_and_load_is_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for spec in (folder, folder / "tokenizer.json"):
        loaded = resolve_tokenizer(str(spec))
        assert loaded.encode_batch(TEXTS[:50]) == TOKENIZER.encode_batch(TEXTS[:50])
        assert loaded.stop_ids == TOKENIZER.stop_ids
        assert loaded.control_ids == TOKENIZER.control_ids
        loaded.save(tmp_path, model_max_length=256)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_full_disk_leaves_the_last_good_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TOKENIZER.save(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MiniGLMError, match=r"tokenizer.json：写不了文件.*No space.*磁盘"):
        GPT2_LIKE.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert Tokenizer.load(tmp_path).hf.to_str() == TOKENIZER.hf.to_str()


def test_saving_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x")
    with pytest.raises(MiniGLMError, match="写不了文件"):
        TOKENIZER.save(tmp_path / "model")


Json = dict[str, Any]


def edited(change: Callable[[Json], object]) -> bytes:
    data = json.loads(TOKENIZER.hf.to_str())
    change(data)
    return json.dumps(data).encode()


def without_a_byte(data: Json) -> None:
    data["model"]["vocab"]["not a byte"] = data["model"]["vocab"].pop("A")


def with_a_hole(data: Json) -> None:
    """An ordinary token where the first added one would go."""
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    data["model"]["vocab"][last] += 1
    data["added_tokens"] = []


def word_level() -> bytes:
    return tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).to_str().encode()


BROKEN = {
    "empty": (b"", "截断"),
    "truncated": (TOKENIZER.hf.to_str(pretty=True).encode()[:5000], r"第 \d\d+ 行.*截断"),
    "binary": (b"\x80\x02}q\x00(\xff\xfe", "不是 JSON"),
    "a list": (b"[1, 2]", "没有 model"),
    "no model": (b"{}", "没有 model"),
    "no vocabulary": (b'{"model": {"type": "BPE"}}', "打不开"),
    "wrong added tokens": (edited(lambda data: data.update(added_tokens=7)), "打不开"),
    "word level": (word_level(), "WordLevel.*字节级 BPE"),
    "a byte is missing": (edited(without_a_byte), "不是字节级 BPE"),
    "no byte level": (edited(lambda data: data.update(pre_tokenizer=None)), "得不到原文"),
    "prefix space": (
        edited(lambda data: data["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)),
        "得不到原文",
    ),
    "lower case": (edited(lambda data: data.update(normalizer={"type": "Lowercase"})), "得不到原文"),
    "colliding ids": (edited(with_a_hole), "同一个编号"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(name: str, tmp_path: Path) -> None:
    content, says = BROKEN[name]
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    for spec in (tmp_path, file):
        with pytest.raises(MiniGLMError, match=rf"tokenizer\.json.*{says}") as caught:
            Tokenizer.load(spec)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["missing.json", ".", "a/b/c"])
def test_missing_file(spec: str, tmp_path: Path) -> None:
    with pytest.raises(MiniGLMError, match="找不到分词器文件"):
        resolve_tokenizer(str(tmp_path / spec))


def test_control_tokens_are_added_to_a_vocabulary_that_lacks_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(edited(lambda data: data.update(added_tokens=[])))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.hf.to_str() == TOKENIZER.hf.to_str()


def test_a_loaded_file_cannot_open_the_door_to_smuggling(tmp_path: Path) -> None:
    def loosen(data: Json) -> None:
        for token in data["added_tokens"]:
            token["special"] = False
        data["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        data["model"]["dropout"] = 0.5

    (tmp_path / "tokenizer.json").write_bytes(edited(loosen))
    loaded = Tokenizer.load(tmp_path)
    text = "".join(CONTROL_TOKENS) + TEXTS[0]
    assert loaded.control_ids == TOKENIZER.control_ids
    assert loaded.encode(text) == TOKENIZER.encode(text)


def test_a_vocabulary_whose_merges_make_a_control_token_is_refused() -> None:
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: id for id, letter in enumerate(sorted(letters))}
    merges = []
    for end in range(2, 6):
        merges.append(("<sop>"[: end - 1], "<sop>"[end - 1]))
        vocabulary["<sop>"[:end]] = len(vocabulary)
    hf = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.decoder = decoders.ByteLevel()
    with pytest.raises(MiniGLMError, match="编码成控制符"):
        Tokenizer(hf)


# transformers


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_transformers_opens_the_folder(theirs: Any) -> None:
    assert theirs.is_fast
    assert len(theirs) == TOKENIZER.vocab_size
    assert theirs.eos_token_id == theirs.pad_token_id == TOKENIZER.end_of_text
    assert set(theirs.all_special_ids) == TOKENIZER.control_ids
    assert theirs.model_max_length == 256
    assert theirs.padding_side == "left"
    assert not theirs.clean_up_tokenization_spaces
    ids = [*TOKENIZER.prefix, *TOKENIZER.encode("Is it , ok ?"), TOKENIZER.end_of_text]
    assert theirs.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ids) == "Is it , ok ?"


def test_transformers_gives_the_same_ids(theirs: Any) -> None:
    @relaxed
    @given(plain_text)
    def check(text: str) -> None:
        assert theirs.encode(text) == TOKENIZER.encode(text)

    check()
    for text in TEXTS[:200]:
        assert theirs.encode(text) == TOKENIZER.encode(text)


def test_chat_template_gives_the_same_ids(theirs: Any) -> None:
    @relaxed
    @given(st.lists(st.tuples(st.sampled_from(module.ROLES), plain_text), min_size=1, max_size=4), st.booleans())
    def check(turns: list[tuple[str, str]], prompt: bool) -> None:
        messages = [message(*turn) for turn in turns]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ids == TOKENIZER.encode_chat(messages, add_generation_prompt=prompt)

    check()
    with pytest.raises(Exception, match="robot"):
        theirs.apply_chat_template([message("robot", "x")])


def test_chat_template_by_example(theirs: Any) -> None:
    messages = [message("system", "答题。"), message("user", "\n 谁？\n"), message("assistant", "  曹操\n\n")]
    for count in (1, 2, 3):
        ids = theirs.apply_chat_template(messages[:count], add_generation_prompt=True, return_dict=False)
        assert ids == TOKENIZER.encode_chat(messages[:count])
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "[gMASK]<sop><|system|>\n答题。<|user|>\n\n 谁？\n<|assistant|>\n  曹操\n\n<|assistant|>\n"


# tiktoken


def tiktoken_encoding(pattern: str, **more: int) -> Any:
    import tiktoken

    ranks = {TOKENIZER.token_bytes(id): id for id in range(TOKENIZER.vocab_size - len(CONTROL_TOKENS))}
    ranks |= {token.encode(): rank for token, rank in more.items()}
    return tiktoken.Encoding(
        "small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )


GPT2_LIKE = from_tiktoken(tiktoken_encoding(GPT2_PATTERN))


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K_PATTERN, PATTERN])
def test_tiktoken_gives_the_same_ids(pattern: str, tmp_path: Path) -> None:
    encoding = tiktoken_encoding(pattern)
    from_tiktoken(encoding).save(tmp_path)
    ours = Tokenizer.load(tmp_path)

    @relaxed
    @given(any_text.map(repair_surrogates))
    def check(text: str) -> None:
        assert ours.encode(text) == encoding.encode_ordinary(text)

    check()
    for texts in (TEXTS[:500], TEXTS[-1:], ["0123456789" * 3, "23456", "a\n\n\n b"]):
        assert ours.encode_batch(texts) == encoding.encode_ordinary_batch(texts)
    assert ours.end_of_text == encoding.eot_token == 986
    assert ours.vocab_size == encoding.n_vocab + len(CONTROL_TOKENS) - 1


def test_tiktoken_token_that_no_merges_lead_to() -> None:
    encoding = tiktoken_encoding(GPT2_PATTERN, qzxqzx=986)
    ours = from_tiktoken(encoding)
    for text in ("qzxqzx", "qzxqzxq", "a qzxqzx"):
        assert ours.encode(text) == encoding.encode_ordinary(text)
    assert ours.encode("qzxqzx") == [986]


def test_tiktoken_ranks_with_holes() -> None:
    with pytest.raises(ValueError, match="holes"):
        from_tiktoken(tiktoken_encoding(GPT2_PATTERN, qzxqzx=990))


def test_gpt2_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": tiktoken_encoding(GPT2_PATTERN)}.__getitem__)
    assert resolve_tokenizer("gpt2").hf.to_str() == GPT2_LIKE.hf.to_str()


@pytest.mark.parametrize("error", [ConnectionError("offline"), ValueError("Hash mismatch")])
def test_gpt2_without_network(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(MiniGLMError, match=r"下载不了.*TIKTOKEN_CACHE_DIR.*tokenizer\.json"):
        load_gpt2_tokenizer()


def test_gpt2_without_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(MiniGLMError, match=r"没有安装.*miniglm-chat\[gpt2\]"):
        load_gpt2_tokenizer()


# The process around it


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_importing_is_light() -> None:
    program = "import sys, miniglm.tokenizer; print({'torch', 'tiktoken', 'transformers'} & set(sys.modules))"
    assert run_python(program).stdout.strip() == "set()"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_encodes_without_hanging_or_warning(folder: Path) -> None:
    program = """if True:
        import os, sys
        from miniglm.tokenizer import Tokenizer
        tokenizer = Tokenizer.load(sys.argv[1])
        texts = ["曹操问刘备。" * 100] * 200
        expected = tokenizer.encode_batch(texts)
        child = os.fork()
        if child == 0:
            os._exit(0 if tokenizer.encode_batch(texts) == expected else 3)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    result = run_python(program, str(folder))
    assert (result.returncode, result.stderr) == (0, "")
