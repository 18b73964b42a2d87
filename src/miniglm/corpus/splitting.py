"""Paragraphs to a training and a validation side between which nothing is repeated.

Every tenth paragraph is validation. A validation paragraph that has an exact or near duplicate in training would
measure memory, not learning, so it moves to training. Knows nothing of books or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from miniglm.corpus.cleaning import Paragraph, count_characters, sentences
from miniglm.errors import MiniGLMError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NGRAM = 3  # characters; a gram packs three code points of 21 bits into one integer
SHORTEST_NEAR = 10  # characters; of shorter paragraphs only exact duplicates count
SMALLEST_CORPUS = 200  # characters
# Bands and rows of the MinHash index: two texts of similarity s meet in it with probability 1 - (1 - s**rows)**bands,
# which is 1 - 5e-8 at 0.8. Candidates are then compared exactly, so a chance meeting costs time and nothing else.
BANDS, ROWS = 32, 4


@dataclass(frozen=True, slots=True)
class Split:
    """The two sides of a corpus.

    Attributes:
        duplicates_moved: paragraphs due for validation that went to training because it holds (nearly) the same.
        cut_by_sentence: True if there were too few paragraphs to choose from (or all had duplicates), and
            validation is the end of the text instead, about a tenth, cut at a sentence.
    """

    train: list[Paragraph]
    validation: list[Paragraph]
    duplicates_moved: int
    cut_by_sentence: bool = False


def split(paragraphs: Sequence[Paragraph], *, every: int = 10, similarity: float = 0.8) -> Split:
    """Split paragraphs (of all books, in order): every `every`-th is validation. Both sides keep the order.

    Args:
        similarity: Jaccard similarity of the sets of character 3-grams from which two paragraphs are near duplicates.

    Raises:
        MiniGLMError: under 200 characters of text, or a text so repetitive that nothing is left to validate with.
    """
    characters = sum(count_characters(paragraph.text) for paragraph in paragraphs)
    if characters < SMALLEST_CORPUS:
        raise MiniGLMError(
            f"文本太少：只有 {characters} 字，至少要 {SMALLEST_CORPUS} 字",
            fix="请多给些文本，一般要十万字以上才学得到东西",
        )
    due = [index for index in range(len(paragraphs)) if index % every == every - 1]
    texts = [paragraph.text for paragraph in paragraphs]
    moved = _repeated(texts, due, similarity)
    if len(moved) < len(due):
        validation = set(due) - moved
        return Split(
            [paragraph for index, paragraph in enumerate(paragraphs) if index not in validation],
            [paragraphs[index] for index in sorted(validation)],
            len(moved),
        )
    return _last_tenth(paragraphs, every, similarity, len(moved))


def _last_tenth(paragraphs: Sequence[Paragraph], every: int, similarity: float, already_moved: int) -> Split:
    parts = [(p, sentence.strip()) for p in paragraphs for sentence in sentences(p.text) if sentence.strip()]
    wanted = sum(len(text) for _, text in parts) / every
    if len(parts) == 1:  # not one sentence mark in the text
        paragraph, text = parts[0]
        middle = len(text) - max(1, int(wanted))
        parts = [(paragraph, text[:middle]), (paragraph, text[middle:])]
    start, taken = len(parts), 0
    for share in (wanted, 2 * wanted, 5 * wanted):  # a tail that the rest repeats: go further back, to half the text
        while start > 1 and taken < share:
            start -= 1
            taken += len(parts[start][1])
        train, validation = _joined(parts[:start]), _joined(parts[start:])
        pieces = train + validation
        repeated = _repeated([piece.text for piece in pieces], list(range(len(train), len(pieces))), similarity)
        if kept := set(range(len(train), len(pieces))) - repeated:
            return Split(
                [piece for index, piece in enumerate(pieces) if index not in kept],
                [pieces[index] for index in sorted(kept)],
                already_moved + len(repeated),
                cut_by_sentence=True,
            )
    raise MiniGLMError("文本几乎全是重复，分不出验证部分", fix="请换一份内容不重复的文本")


def _joined(parts: list[tuple[Paragraph, str]]) -> list[Paragraph]:
    """Sentences put together again into the paragraphs they came from."""
    joined: list[Paragraph] = []
    for paragraph, text in parts:
        if joined and (joined[-1].book, joined[-1].number) == (paragraph.book, paragraph.number):
            joined[-1] = replace(joined[-1], text=joined[-1].text + text)
        else:
            joined.append(replace(paragraph, text=text))
    return joined


def _repeated(texts: list[str], due: list[int], similarity: float) -> set[int]:
    """Indices of `due` that may not be validation.

    One that moves to training takes its own duplicates with it, hence the queue.
    """
    if not due:
        return set()
    import numpy as np

    staying = set(due)
    same: dict[str, list[int]] = {}
    for index in due:
        same.setdefault(texts[index], []).append(index)
    grams = {index: _grams(texts[index]) for index in due if len(texts[index]) >= SHORTEST_NEAR}
    known = np.unique(np.concatenate([*grams.values(), np.empty(0, np.int64)]))
    lsh: Any = None  # built when the first paragraph asks: most books need none
    queue = [index for index in range(len(texts)) if index not in staying]
    while queue:
        index = queue.pop()
        found = set(same.get(texts[index], ()))
        if len(texts[index]) >= SHORTEST_NEAR:
            own = grams[index] if index in grams else _grams(texts[index])
            # Jaccard of s with any set of grams needs a share s of one's own grams in it, so in all of them together.
            places = np.minimum(np.searchsorted(known, own), max(len(known) - 1, 0))
            if len(known) and np.count_nonzero(known[places] == own) >= similarity * len(own):
                if lsh is None:
                    lsh = _index(grams)
                candidates = (other for other in lsh.query(_minhash(own)) if other in staying)
                found |= {other for other in candidates if _jaccard(own, grams[other]) >= similarity}
        for other in found & staying:
            staying.remove(other)
            queue.append(other)
    return set(due) - staying


def _grams(text: str) -> NDArray[np.int64]:
    """The sorted set of a text's character 3-grams, each one exact integer."""
    import numpy as np

    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32).astype(np.int64)
    return np.unique((codes[:-2] << 42) | (codes[1:-1] << 21) | codes[2:])


def _jaccard(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    import numpy as np

    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _minhash(grams: NDArray[np.int64]) -> Any:
    import numpy as np
    from datasketch import MinHash

    # MinHash wants 32-bit hashes; a multiplicative hash over the whole array is far cheaper than SHA-1 a gram.
    mixed = (grams.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    minhash = MinHash(num_perm=BANDS * ROWS, seed=1, hashfunc=int)
    minhash.update_batch(mixed.tolist())
    return minhash


def _index(grams: dict[int, NDArray[np.int64]]) -> Any:
    from datasketch import MinHashLSH

    lsh = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    with lsh.insertion_session() as session:
        for index, own in grams.items():
            session.insert(index, _minhash(own), check_duplication=False)
    return lsh
