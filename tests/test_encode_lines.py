"""Encoding a corpus piece by piece gives the ids of the whole."""

from __future__ import annotations

import numpy as np
import pytest

from miniglm import pipeline
from miniglm.bulk_encoding import BulkEncoder
from miniglm.tokenizer import train_tokenizer

LINES = ["却说曹操引兵追赶。", "玄德曰：“公何人也？”", "a b  c, 12 34!", "…", "“——”"] * 40


@pytest.mark.parametrize("at_once", [0, 30, 10**6])
def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    tokenizer = train_tokenizer(LINES, vocab_size=None, corpus_characters=sum(map(len, LINES)))
    monkeypatch.setattr(pipeline, "ENCODED_AT_ONCE", at_once)
    found = pipeline.encode_lines(BulkEncoder(tokenizer), iter(LINES))
    assert found.dtype == np.uint16
    assert found.tolist() == tokenizer.encode("\n".join(LINES))
    assert pipeline.encode_lines(BulkEncoder(tokenizer), []).tolist() == []
