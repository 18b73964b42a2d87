"""Bulk encoding gives `Tokenizer.encode`'s ids, for any text, any vocabulary and any form of tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers

from miniglm import bulk_encoding as module
from miniglm.bulk_encoding import BulkEncoder
from miniglm.tokenizer import CONTROL_TOKENS, PATTERN, Tokenizer, byte_level, repair_surrogates, train_tokenizer

DATA = Path(__file__).parents[1] / "data" / "sanguo" / "train.jsonl"
relaxed = settings(deadline=None)  # a busy machine is no failure

ROWS = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
TEXTS = [f"{row['question']}\n{row['answer']}\n" for row in ROWS]
ODD = "曹操\n\n\u3000\u3000刘备  \n\r\n\r\n  the can't I'LL 2345678，，。。\n\n  \t\n，，，，    a🙂🙂🙂\U00020000é\n"
SPACES = ["\n", "\r\n", "\r", " ", "  ", "\t", "\u3000", "\u00a0", "\x85", "\x1c", "\u2028", "\0"]
WORDS = ["曹操", "刘备，", "。", "？」", "abc", " the", "'s", "'LL", "'ſ", "123", "45678", "é", "e\u0301", "\ufeff"]
RARE = ["🙂", "\ufffd", "\uffff", "\U00020000", "\U000e0041", "\U0010ffff", "\ud83d", "\ude00", "\ud83d\ude00"]
fragments = st.sampled_from([*CONTROL_TOKENS, *SPACES, *WORDS, *RARE])
any_text = st.text(st.characters(exclude_categories=())) | st.lists(fragments, max_size=12).map("".join)


def trained(texts: list[str], vocab_size: int | None = None) -> Tokenizer:
    return train_tokenizer(texts, vocab_size=vocab_size, corpus_characters=sum(map(len, texts)))


ALIKE_AT_THEIR_END = [0x3C0, 0x400, 0x440, 0x480, 0x540, 0x5340, 0x6340, 0x7340, 0x20340, 0x21340]
ALIKE_AT_THEIR_START = [*range(0x3C1, 0x3D0), *range(0x5001, 0x5E00, 83), *range(0x20001, 0x23000, 501)]


def across_characters() -> Tokenizer:
    """One whose tokens hold the end of a character and the beginning of the next one."""
    rng = random.Random(0)
    texts = []
    for _ in range(1000):
        words = [code for _ in range(9) for code in map(rng.choice, (ALIKE_AT_THEIR_END, ALIKE_AT_THEIR_START))]
        texts.append("".join(map(chr, words)))
    return trained(texts, 500)


NOVEL = trained([*TEXTS, *[ODD] * 500], 3000)
ACROSS = across_characters()
BULK, BULK_ACROSS = BulkEncoder(NOVEL), BulkEncoder(ACROSS)


def same(encoder: BulkEncoder, text: str) -> None:
    assert encoder.encode(text).tolist() == encoder.tokenizer.encode(text)


@relaxed
@given(any_text)
def test_any_text(text: str) -> None:
    same(BULK, text)


@relaxed
@given(st.text(st.sampled_from([*map(chr, ALIKE_AT_THEIR_END + ALIKE_AT_THEIR_START), *"却，a1 \n'"]), max_size=40))
def test_tokens_that_end_inside_of_a_character(text: str) -> None:
    same(BULK_ACROSS, text)


def test_the_tokenizer_for_that_has_such_tokens() -> None:
    tokens = [ACROSS.token_bytes(id) for id in ACROSS.hf.get_vocab(with_added_tokens=False).values()]
    inside = [token for token in tokens if token[0] & 0xC0 == 0x80]
    assert {byte for token in inside for byte in token if byte >= 0xC0} == {0xCF, 0xE5, 0xF0}
    assert {token[-1] for token in tokens if len(token) > 1 and token[-1] >= 0xC0} == {0xCF, 0xE5, 0xF0}


@relaxed
@given(st.lists(st.text(st.sampled_from("曹操刘备关羽的了，。 ab1\n"), max_size=30), min_size=1), st.data())
def test_any_vocabulary(texts: list[str], data: st.DataObject) -> None:
    encoder = BulkEncoder(trained(texts * 3))
    same(encoder, data.draw(st.text(st.sampled_from("曹操刘备关羽的了，。 ab1\n"))))
    same(encoder, "".join(texts))


@pytest.mark.parametrize(("first", "limit", "step"), [(0, module.BASIC, 1), (module.BASIC, module.COVERED, 11)])
def test_words_are_those_of_the_pattern_at_every_character(first: int, limit: int, step: int) -> None:
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    codes = [code for code in range(first, limit, step) if not 0xD800 <= code < 0xE000]
    text = "x".join(f"{character}2{character} {character}{character}'{character}\n" for character in map(chr, codes))
    assert module._word_pattern(limit).findall(text) == [word for word, _ in split.pre_tokenize_str(text)]


def test_a_corpus_at_once_falls_into_few_parts() -> None:
    encoder = BulkEncoder(NOVEL)
    text = "".join(TEXTS)
    assert encoder.encode(text).tolist() == NOVEL.encode(text)
    assert len(encoder._known) < len(text) / 8


def test_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters share a group, and hardly any part is kept."""
    monkeypatch.setattr(module, "GROUPS", 5)
    monkeypatch.setattr(module, "MOST_KEPT", 50)
    encoder = BulkEncoder(NOVEL)
    for text in [*TEXTS[:200], ODD, *TEXTS[:200]]:
        assert encoder.encode(text).tolist() == NOVEL.encode(text)
        assert sum(map(len, encoder._known)) <= max(50, len(text))


def test_ids_of_four_bytes() -> None:
    alphabet = {token: 300 * number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    wide = Tokenizer(byte_level(models.BPE(vocab=alphabet, merges=[]), PATTERN))
    assert wide.vocab_size > 2**16
    same(BulkEncoder(wide), ODD)


def changed(change: str) -> Tokenizer:
    """A tokenizer that is not of our form: one thing about it is different."""
    hf = tokenizers.Tokenizer.from_str(NOVEL.hf.to_str())
    if change == "normalizer":
        hf.normalizer = normalizers.Replace("é", "é")
    elif change == "added token":
        hf.add_tokens(["曹操"])
    elif change == "pattern":
        hf.pre_tokenizer = byte_level(models.BPE(), r"\p{N}|[^\p{N}]+").pre_tokenizer
    else:
        data = json.loads(hf.to_str())
        data["model"]["ignore_merges"] = True
        data["model"]["vocab"]["zqjx"] = len(data["model"]["vocab"])  # where the control tokens began
        for token in data["added_tokens"]:
            token["id"] += 1
        hf = tokenizers.Tokenizer.from_str(json.dumps(data))
    return Tokenizer(hf)


@pytest.mark.parametrize("change", ["normalizer", "added token", "pattern", "ignore_merges"])
def test_tokenizers_of_another_form(change: str) -> None:
    encoder = BulkEncoder(changed(change))
    for text in ("", "曹操曰", "a zqjx", ODD, repair_surrogates("".join(TEXTS[:50]))):
        same(encoder, text)
