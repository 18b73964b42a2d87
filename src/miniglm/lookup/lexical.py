"""BM25 (Robertson and Zaragoza 2009, in Lucene's form, by bm25s) over characters and pairs of characters, on disk and
memory-mapped. Knows nothing of what the texts are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniglm.lookup.text import Grams, Plain, grams


class Lexical:
    """Scores of all its texts for a query.

    Args:
        index: a bm25s index, or None where the texts have no n-gram at all.
        size: how many texts.
    """

    def __init__(self, index: Any, size: int) -> None:
        self._index, self.size = index, size

    @classmethod
    def build(cls, texts: Iterable[Plain]) -> Lexical:
        """Of the texts in their order."""
        import bm25s
        from bm25s.tokenization import Tokenized

        each = [grams(text) for text in texts]
        names, places = np.unique(np.concatenate([np.zeros(0, dtype=np.uint32), *each]), return_inverse=True)
        if not len(names):
            return cls(None, len(each))
        ids = np.split(places.astype(np.int32), np.cumsum([len(found) for found in each[:-1]]))
        index = bm25s.BM25()
        vocabulary = {str(name): number for number, name in enumerate(names)}
        index.index(Tokenized(ids=ids, vocab=vocabulary), show_progress=False)
        return cls(index, len(each))

    def scores(self, query: Grams) -> NDArray[np.float32]:
        """(texts,) how much of the query each holds; repetitions in the query count."""
        if self._index is None:
            return np.zeros(self.size, dtype=np.float32)
        numbers = self._index.vocab_dict
        known = [numbers[name] for name in map(str, query.tolist()) if name in numbers]
        found: NDArray[np.float32] = self._index.get_scores_from_ids(known)
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
        index = bm25s.BM25.load(str(folder), mmap=True, load_corpus=False)
        # Plain arrays over the mapped files: np.memmap's own slicing is slow.
        index.scores |= {name: np.asarray(index.scores[name]) for name in ("data", "indices", "indptr")}
        return cls(index, size)
