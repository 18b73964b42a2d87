"""What the tests of this folder share beside the fixtures: odd strings, sizes, prompts."""

from __future__ import annotations

from collections.abc import Sequence

from miniglm.conversation import prompt_of
from miniglm.qa.formats import Example
from miniglm.tokenizer import Tokenizer

LINES = 10_000
ODD = (
    *("", " ", "\n", "\r\n \t", "　　全角空格　", "a  b   c", "I'LL we've IT'S", "12345678901", "曹操 Cao Cao 155年"),
    *(
        "🙂👨‍👩‍👧‍👦",
        "é e\u0301 ﬁ",
        "\u200b\ufeff\u00a0",
        "[gMASK]<sop><|user|>",
        "<|endoftext|>",
        "�",
        "𠀀𪚥",
        "สวัสดี مرحبا",
        "{{ x }}",
    ),
    *("——“你好！”……", "()[]{}<>|\\/", "\x00\x01\x7f", "a\n\n\nb\n", "x" * 300, "曹" * 300),
)
"""Strings that programs are known to treat in ways of their own."""
ANSWERS = 200
ROOM = 40
"""Tokens that an answer may take."""


def prompts_of(tokenizer: Tokenizer, questions: Sequence[Example]) -> list[list[int]]:
    return [prompt_of(tokenizer, e, 128, ROOM) for e in questions]
