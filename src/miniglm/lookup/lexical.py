"""BM25 (Robertson and Zaragoza 2009, in Lucene's form, by bm25s) over characters and pairs of characters, on disk and
memory-mapped. Knows nothing of what the texts are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniglm.lookup.text import grams


class Lexical:
    """Scores of all its texts for a query.

    Args:
        index: a bm25s index, or None where the texts have no n-gram at all.
        size: how many texts.
    """

    def __init__(self, index: Any, size: int) -> None:
        self._index, self.size = index, size

    @classmethod
    def build(cls, texts: Iterable[str]) -> Lexical:
        """Of the texts in their order."""
        import bm25s
        from bm25s.tokenization import Tokenized

        numbers: dict[str, int] = {}
        ids = []
        for text in texts:
            ids.append(np.array([numbers.setdefault(g, len(numbers)) for g in grams(text)], dtype=np.int32))
        if not numbers:
            return cls(None, len(ids))
        index = bm25s.BM25()
        index.index(Tokenized(ids=ids, vocab=numbers), show_progress=False)
        return cls(index, len(ids))

    def scores(self, query: str) -> NDArray[np.float32]:
        """(texts,) how much of the query each holds; repetitions in the query count."""
        known = [] if self._index is None else [g for g in grams(query) if g in self._index.vocab_dict]
        if not known:
            return np.zeros(self.size, dtype=np.float32)
        found: NDArray[np.float32] = self._index.get_scores(known)
        return found

    def save(self, folder: Path) -> None:
        """Writes the index into `folder`: numpy arrays and JSON."""
        if self._index is not None:
            self._index.save(str(folder))

    @classmethod
    def load(cls, folder: Path, size: int) -> Lexical:
        """Reads what `save` wrote, its arrays memory-mapped; an empty one where there is nothing."""
        import bm25s

        if not folder.exists():
            return cls(None, size)
        return cls(bm25s.BM25.load(str(folder), mmap=True, load_corpus=False), size)
