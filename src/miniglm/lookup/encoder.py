"""A small text encoder that a run trains for itself: the weighted sum of learnt vectors of characters and pairs of
characters, scaled to length 1. Knows nothing of questions, books or files' places.

A bag needs no order and no layers, so it trains in a minute on a processor (training.py) and encodes a text in
microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from miniglm.files import write_whole
from miniglm.lookup.fault import damaged
from miniglm.lookup.sums import unit_sums
from miniglm.lookup.text import Grams, Plain, firsts, grams, places_in, plain, ranges

Bag = NDArray[np.int64]
"""Numbers of a text's n-grams, with repetitions."""
DIMENSIONS = 256
LARGEST_VOCABULARY = 120_000
AT_ONCE = 1024
"""Texts that are encoded at once."""
UNKNOWN = 0
SORTED = 2000
"""N-grams from which it is faster to look them up in order."""
FILE = "encoder.safetensors"


class Vocabulary:
    """The n-grams that the encoder knows.

    Args:
        names: them, rising; the first has number 1, since 0 is kept for what is unknown.
        idf: inverse document frequency of each, number 0 included.
    """

    def __init__(self, names: Grams, idf: NDArray[np.float32]) -> None:
        self.names, self.idf = names, idf
        self.rarest = float(idf.max())

    def numbers(self, found: Grams) -> Bag:
        """The number of each n-gram, 0 for unknown ones."""
        if len(found) > SORTED:
            # Each once, and in order: a binary search after another goes the same way, which processors like.
            keys = np.sort(found.astype(np.uint64) << 32 | np.arange(len(found), dtype=np.uint64))
            rising = (keys >> 32).astype(np.uint32)
            first = firsts(rising)
            numbers = np.empty(len(found), dtype=np.int64)
            numbers[keys.astype(np.uint32)] = np.repeat(
                self._numbers(rising[first]), np.diff(first, append=len(rising))
            )
            return numbers
        return self._numbers(found)

    def _numbers(self, found: Grams) -> Bag:
        known, places = places_in(self.names, found)
        return np.where(known, places + 1, UNKNOWN)

    def bag(self, text: Plain) -> Bag:
        """The text's known n-grams; one unknown where there is none."""
        return self.bags([grams(text)])[0]

    def bags(self, texts: Sequence[Grams]) -> list[Bag]:
        """The same of the n-grams of several."""
        numbers = self.numbers(np.concatenate(texts))
        ends = np.cumsum([len(text) for text in texts]).tolist()
        return [known_of(numbers[end - len(text) : end]) for text, end in zip(texts, ends, strict=True)]


def known_of(numbers: Bag) -> Bag:
    """The known ones of them; one unknown where there is none."""
    known = numbers[numbers != UNKNOWN]
    return known if len(known) else np.array([UNKNOWN])


def build_vocabulary(texts: Iterable[Plain]) -> Vocabulary:
    """N-grams that at least two of the texts have, the most frequent first."""
    each = [np.unique(grams(text)) for text in texts]
    names, counts = np.unique(np.concatenate([np.zeros(0, dtype=np.uint32), *each]), return_counts=True)
    kept = np.flatnonzero(counts > 1)
    if len(kept) >= LARGEST_VOCABULARY:
        kept = np.sort(kept[np.argsort(-counts[kept], kind="stable")[: LARGEST_VOCABULARY - 1]])
    # The unknown one weighs nothing, so that a text without a known n-gram is like no other.
    idf = np.concatenate([[0.0], np.log(len(each) / counts[kept])])
    return Vocabulary(names[kept], idf.astype(np.float32))


class Encoder:
    """Vectors of texts.

    Args:
        vocabulary: its n-grams.
        vectors: (n-grams, dimensions) the weighted vector of each.
    """

    def __init__(self, vocabulary: Vocabulary, vectors: NDArray[np.float32]) -> None:
        self.vocabulary, self.vectors = vocabulary, vectors
        self.lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)

    def bags(self, bags: Sequence[Bag]) -> NDArray[np.float32]:
        """Vectors of length 1, (bags, dimensions); all zero for a bag of nothing known."""
        made = [np.zeros((0, self.vectors.shape[1]), dtype=np.float32)]
        for start in range(0, len(bags), AT_ONCE):
            some = bags[start : start + AT_ONCE]
            starts = np.cumsum([0, *(len(bag) for bag in some[:-1])])
            made.append(unit_sums(self.vectors, np.concatenate(some), starts))
        return np.concatenate(made)

    def parts(self, numbers: Bag, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of length 1, (parts, dimensions), of those places of a text, which may overlap; all zero where nothing
        is known.

        Args:
            numbers: of the text's `grams`.
        """
        # A bag has the characters of its part, then the pairs.
        lengths = np.stack([ends - starts, np.maximum(ends - starts - 1, 0)], axis=1)
        first = np.stack([starts, starts + (len(numbers) + 1) // 2], axis=1)
        made = [np.zeros((0, self.vectors.shape[1]), dtype=np.float32)]
        for at in range(0, len(starts), AT_ONCE):
            own = lengths[at : at + AT_ONCE]
            rows = numbers[ranges(first[at : at + AT_ONCE].ravel(), own.ravel())]
            known = rows != UNKNOWN
            before = np.concatenate([[0], np.cumsum(known)])
            starts_of = np.cumsum(own.sum(axis=1)) - own.sum(axis=1)
            made.append(unit_sums(self.vectors, rows[known], before[starts_of]))
        return np.concatenate(made)

    def bag(self, bag: Bag) -> NDArray[np.float32]:
        """The vector of one, (dimensions,), as `bags` gives it, without what torch takes to begin."""
        summed = self.vectors[bag].sum(axis=0)
        found: NDArray[np.float32] = summed / max(float(np.linalg.norm(summed)), 1e-12)
        return found

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of length 1, (texts, dimensions)."""
        return self.bags([self.vocabulary.bag(plain(text)) for text in texts])

    @classmethod
    def joined(cls, encoders: Sequence[Encoder]) -> Encoder:
        """One with the dimensions of all of them, which have one vocabulary: a cosine of its vectors is about the mean of
        theirs, without what each learnt by chance."""
        return cls(encoders[0].vocabulary, np.concatenate([encoder.vectors for encoder in encoders], axis=1))

    def save(self, folder: Path) -> None:
        """Writes encoder.safetensors into `folder`, the vectors as float16."""
        folder.mkdir(parents=True, exist_ok=True)
        names, idf = self.vocabulary.names.astype(np.int64), self.vocabulary.idf
        write_whole(folder / FILE, save({"vectors": self.vectors.astype(np.float16), "idf": idf, "names": names}))

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """Reads what `save` wrote.

        Raises:
            MiniGLMError: a file is missing or damaged.
        """
        try:
            tensors = load_file(folder / FILE)
            vectors, idf, names = tensors["vectors"].astype(np.float32), tensors["idf"], tensors["names"]
            if not len(names) + 1 == len(vectors) == len(idf):
                raise ValueError(f"词表有 {len(names)} 项，向量有 {len(vectors)} 行")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise damaged(f"检索的编码器读不出来（{error}）", folder / FILE) from None
        return cls(Vocabulary(names.astype(np.uint32), idf), vectors)
