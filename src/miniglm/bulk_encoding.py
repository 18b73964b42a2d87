"""Token ids of much text, several times as fast as `Tokenizer.encode` and the same, for tokenizers of our own form.

Merging is what encoding costs. BPE merges neighbours only, so two characters that no token of the vocabulary joins are
never in one token, and text cut between them has the tokens of the whole. Cut there, and where the pre-tokenizer cuts,
Chinese falls into some ten thousand different pieces of a few characters, each of which is merged once and looked up
from then on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, models, pre_tokenizers

from miniglm.tokenizer import (
    ENCODING_PIECE,
    PATTERN,
    Tokenizer,
    byte_alphabet,
    byte_level,
    repair_surrogates,
    safe_pieces,
)

BASIC = 2**16
"""Code points of the plane that nearly all text is in."""
COVERED = 2**18
"""Code points that the tables cover, the first four planes; text with others is encoded as `Tokenizer` does it."""
MARK = "\U0010ffff"
"""A character that is not covered."""
GROUPS = 2**11
"""Of characters, by what tokens join them with, on either side: a table of 4 MiB."""
MOST_KEPT = 2**19
"""Characters in the pieces that are kept with their ids: some 40 MiB."""


class BulkEncoder:
    """Encodes text after text with one tokenizer.

    Attributes:
        dtype: of the ids: two bytes where they fit, else four.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype: type[np.uint16] | type[np.uint32] = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self._is_ours = _form(tokenizer.hf) == _form(byte_level(models.BPE(), PATTERN)) and (
            tokenizer.control_ids == tokenizer.hf.get_added_tokens_decoder().keys()
        )
        if self._is_ours:
            self._left, self._right, self._loose = _joints(tokenizer)
            self._merging = tokenizers.Tokenizer(tokenizer.hf.model)  # what it is given is one word
            self._merging.pre_tokenizer = byte_alphabet()
            self._known: dict[str, bytes] = {}
            self._kept = 0

    def encode(self, text: str) -> NDArray[Any]:
        """What `Tokenizer.encode` gives: (tokens,)."""
        if not self._is_ours:
            return np.array(self.tokenizer.encode(text), self.dtype)
        found = [self._encode_piece(piece) for piece in safe_pieces(repair_surrogates(text), ENCODING_PIECE)]
        return np.frombuffer(b"".join(found), self.dtype)

    def _encode_piece(self, piece: str) -> bytes:
        codes = np.frombuffer(piece.encode("utf-32-le"), np.uint32)
        highest = int(codes.max())
        if highest >= COVERED:
            return self._as_bytes(self.tokenizer.encode(piece))
        words = _word_pattern(BASIC if highest < BASIC else COVERED).findall(piece)
        parts = self._parts(codes, words)
        try:
            return b"".join(map(self._known.__getitem__, parts))
        except KeyError:
            self._learn(set(parts))
            return b"".join(map(self._known.__getitem__, parts))

    def _parts(self, codes: NDArray[np.uint32], words: list[str]) -> list[str]:
        """A text of these code points and words, cut where no token reaches across."""
        begins = np.empty(len(codes) + 1, bool)
        begins[1:-1] = self._loose[self._left[codes[:-1]] + self._right[codes[1:]]]
        begins[np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))] = True
        begins[0] = False
        # A mark before each part and one split take half the time of slices.
        places = np.arange(len(codes)) + np.cumsum(begins[:-1])
        marked = np.full(places[-1] + 1, ord(MARK), np.uint32)
        marked[places] = codes
        return marked.tobytes().decode("utf-32-le").split(MARK)

    def _learn(self, parts: set[str]) -> None:
        """Sees to it that the ids of all of these are known."""
        new = parts - self._known.keys()
        self._kept += sum(map(len, new))
        if self._kept > MOST_KEPT:
            new, self._known, self._kept = parts, {}, sum(map(len, parts))
        ordered = list(new)
        encodings = self._merging.encode_batch_fast(ordered, add_special_tokens=False)
        self._known |= {part: self._as_bytes(e.ids) for part, e in zip(ordered, encodings, strict=True)}

    def _as_bytes(self, ids: list[int]) -> bytes:
        return np.array(ids, self.dtype).tobytes()


def _form(hf: tokenizers.Tokenizer) -> dict[str, Any]:
    """All of a tokenizer that decides how it encodes, but for its vocabulary."""
    data = json.loads(hf.to_str())
    model = {key: value for key, value in data["model"].items() if key not in ("vocab", "merges")}
    return {"model": model, "normalizer": data["normalizer"], "pre_tokenizer": data["pre_tokenizer"]}


@cache
def _word_pattern(limit: int) -> re.Pattern[str]:
    """`PATTERN` for Python's `re` and text below a code point. `re` knows no \\p, so letters, digits and white space are
    written out as they are to `tokenizers`, whose Unicode may be older or newer than Python's."""
    letter, digit, space = (_members(name, limit) for name in (r"\p{L}", r"\p{N}", r"\s"))
    return re.compile(
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{letter}{digit}]?[{letter}]+|[{digit}]{{1,3}}"
        rf"| ?[^{space}{letter}{digit}]+[\r\n]*|[{space}]*[\r\n]+|[{space}]+(?![^{space}])|[{space}]+"
    )


def _members(name: str, limit: int) -> str:
    """The characters below a code point that `tokenizers` counts to a class, as ranges to stand between brackets."""
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, limit)]))
    others = pre_tokenizers.Split(Regex(f"[^{name}]+"), behavior="removed")
    runs = [run for run, _ in others.pre_tokenize_str(every)]
    return "".join(f"\\U{ord(run[0]):08x}-\\U{ord(run[-1]):08x}" for run in runs)


def _joints(tokenizer: Tokenizer) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """Where no token joins two characters.

    Returns:
        left, right: (COVERED,), of each character.
        loose: (GROUPS²,), [left[x] + right[y]] says that no token holds the end of x and the beginning of y behind it.
            False may stand there for True.
    """
    pairs: set[tuple[int, int]] = set()
    joins_any = np.zeros((2, COVERED), bool)  # what is behind it; what is before it
    for id in tokenizer.hf.get_vocab(with_added_tokens=False).values():
        for before, after in _boundaries(tokenizer.token_bytes(id)):
            if len(before) == len(after) == 1:
                pairs.add((before[0], after[0]))
            elif len(before) == 1:
                joins_any[0, before[0]] = True
            else:
                joins_any[1, after.start : after.stop] = True
    numbers = np.zeros((2, COVERED), np.int32)
    for side in (0, 1):
        members = sorted({pair[side] for pair in pairs})
        numbers[side, members] = 1 + np.arange(len(members)) % (GROUPS - 2)
        numbers[side, joins_any[side]] = GROUPS - 1
    left, right = numbers
    loose = np.ones((GROUPS, GROUPS), bool)
    for x, y in pairs:
        loose[left[x], right[y]] = False
    loose[-1], loose[:, -1] = False, False
    return left * GROUPS, right, loose.ravel()


def _boundaries(token: bytes) -> Iterator[tuple[range, range]]:
    """Where a token holds the end of a character and the beginning of one that is covered: the code points that each
    may be."""
    starts = [place for place, byte in enumerate(token) if place == 0 or not _continues(byte)]
    for start, place in pairwise(starts):
        if token[place] <= 0xF0:
            yield _beginning(token[start:place]), _beginning(token[place:])


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 is not a character's first."""
    return byte & 0xC0 == 0x80


def _beginning(data: bytes) -> range:
    """The covered code points whose UTF-8 begins as `data` does, whatever follows the first character in it; all of
    them, where it begins inside of a character."""
    lead = data[0]
    if lead < 0x80:
        return range(lead, lead + 1)
    if _continues(lead) or lead > 0xF0:
        return range(COVERED)
    code, size = (lead & 0x1F, 2) if lead < 0xE0 else (lead & 0x0F, 3) if lead < 0xF0 else (0, 4)
    for byte in takewhile(_continues, data[1:size]):
        code, size = code << 6 | byte & 0x3F, size - 1
    missing = 6 * (size - 1)
    return range(code << missing, (code + 1) << missing)
