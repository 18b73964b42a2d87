"""Scores of answers against reference answers, as pure functions: no model, no files, nothing printed.

A score that a paper or library defines agrees with that library (rouge-score, sacrebleu; held by tests). All lie
between 0 and 1; where there is nothing to compare (an empty side, nothing in common) they are 0, never an error.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniglm.errors import MiniGLMError
from miniglm.qa.text import bare

RESAMPLES = 1000
"""Bootstrap resamples: the bounds of a 95 % interval are then good to a few hundredths of its width."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `count` values with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float
    count: int


def _resampled(columns: Sequence[Sequence[float]], resamples: int, seed: int) -> NDArray[np.float64]:
    """Sums of each column over `resamples` random draws of its rows, with replacement: (resamples, columns).

    Raises:
        ValueError: there are no rows, or a value is not finite.
    """
    array = np.asarray(columns, dtype=np.float64).T  # (rows, columns)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"needs finite values, got {array.size} of which {np.isfinite(array).sum()} are")
    rows = len(array)
    random, sums, at_once = np.random.default_rng(seed), np.empty((resamples, array.shape[1])), max(1, 2**22 // rows)
    for start in range(0, resamples, at_once):  # in blocks, so that 100,000 values need no gigabyte
        block = sums[start : start + at_once]
        block[:] = array[random.integers(0, rows, (len(block), rows))].sum(axis=1)
    return sums


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean with its percentile bootstrap interval (Efron 1979). The same seed gives the same bounds.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    return ratio_interval(values, [1.0] * len(values), confidence=confidence, resamples=resamples, seed=seed)


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    transform: Callable[[float], float] = float,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The ratio of two sums over the same things (nats over tokens), bootstrapped over the things.

    Args:
        transform: rising function of the ratio (`math.exp` makes a perplexity of nats a token).

    Raises:
        ValueError: there are no values, one is not finite, or the denominators' sum is not positive.
    """
    sums = _resampled((numerators, denominators), resamples, seed)
    if not sum(denominators) > 0:
        raise ValueError("the denominators must have a positive sum")
    drawn = sums[sums[:, 1] > 0]
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [(1 - confidence) / 2, (1 + confidence) / 2])
    ratio = float(np.sum(numerators) / np.sum(denominators))
    return Interval(transform(ratio), transform(float(low)), transform(float(high)), len(numerators))


@dataclass(frozen=True, slots=True)
class Overlap:
    """What answer and reference share: of the answer (precision), of the reference (recall), and their harmonic
    mean."""

    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, shared: int, answer: int, reference: int) -> Overlap:
        """From the number of shared units and each side's total."""
        if not shared:
            return cls(0.0, 0.0, 0.0)
        return cls(shared / answer, shared / reference, 2 * shared / (answer + reference))


def characters(text: str) -> list[str]:
    """The text's characters without white space: the units of scores over characters."""
    return [char for char in text if not char.isspace()]


def _missing(package: str) -> MiniGLMError:
    return MiniGLMError(f"没有安装 {package}，这项评分要用它", fix='请运行 pip install "miniglm-chat[eval]"')


@functools.lru_cache(maxsize=4)
def _segmenter(extra: tuple[str, ...]) -> Any:
    try:
        import jieba  # type: ignore[import-untyped]
    except ImportError:
        raise _missing("jieba") from None
    jieba.setLogLevel("WARNING")
    segmenter = jieba.Tokenizer()  # one of our own, so that added words stay out of the shared one
    for word in extra:
        segmenter.add_word(word)
    return segmenter


def words(text: str, *, extra: Iterable[str] = ()) -> list[str]:
    """The text's words by jieba, without white space. `extra` are words to keep whole, such as a novel's names.

    Raises:
        MiniGLMError: jieba is not installed.
    """
    return [word for word in _segmenter(tuple(extra)).lcut(text) if not word.isspace()]


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> Overlap:
    """ROUGE-L (Lin 2004, section 3): the longest common subsequence of units, which are `characters` or `words`."""
    from rapidfuzz.distance import LCSseq

    return Overlap.of(LCSseq.similarity(answer, reference), len(answer), len(reference))


def rouge_n(answer: Sequence[str], reference: Sequence[str], n: int) -> Overlap:
    """ROUGE-N (Lin 2004, section 2): common n-grams of units, each counted as often as both sides have it."""
    mine, theirs = (Counter(tuple(side[i : i + n]) for i in range(len(side) - n + 1)) for side in (answer, reference))
    return Overlap.of((mine & theirs).total(), mine.total(), theirs.total())


def character_f1(answer: str, reference: str) -> float:
    """F1 over the bag of characters, after folding and without punctuation (SQuAD's F1, with characters as words)."""
    return rouge_n(bare(answer), bare(reference), 1).f1


def exact_match(answer: str, reference: str) -> float:
    """1.0 where nothing differs but width, case, white space, punctuation and traditional characters, else 0.0."""
    return float(bare(answer) == bare(reference))


@functools.cache
def _sacrebleu(metric: str) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise _missing("sacrebleu") from None
    made = {"chrf": CHRF(), "corpus": BLEU(tokenize="zh"), "sentence": BLEU(tokenize="zh", effective_order=True)}
    return made[metric]


def bleu(answer: str, reference: str) -> float:
    """BLEU of one answer by sacrebleu, over Chinese characters and other words, with effective order."""
    return float(_sacrebleu("sentence").sentence_score(answer, [reference]).score) / 100


def chrf(answer: str, reference: str) -> float:
    """chrF2 of one answer by sacrebleu."""
    return float(_sacrebleu("chrf").sentence_score(answer, [reference]).score) / 100


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> Interval:
    """BLEU of all answers as one text, by sacrebleu: what papers report, and no mean of `bleu`. Bootstrapped over
    answers.

    Raises:
        ValueError: no answers.
        MiniGLMError: sacrebleu is not installed.
    """
    metric = _sacrebleu("corpus")
    found = [metric.corpus_score([a], [[r]]) for a, r in zip(answers, references, strict=True)]
    # Counts and totals of n-grams, then both lengths: corpus BLEU is a function of their sums.
    rows = np.array([[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in found], dtype=np.float64)
    sums = _resampled(rows.T.tolist() if len(rows) else [], RESAMPLES, 0)

    def score(total: NDArray[np.float64]) -> float:
        order = (len(total) - 2) // 2
        made = metric.compute_bleu(
            correct=total[:order].tolist(),
            total=total[order:-2].tolist(),
            sys_len=int(total[-2]),
            ref_len=int(total[-1]),
            smooth_method="exp",
        )
        return float(made.score) / 100

    low, high = np.quantile([score(total) for total in sums], [0.025, 0.975])
    return Interval(score(rows.sum(axis=0)), float(low), float(high), len(answers))


def repetition(text: str, n: int = 4) -> float:
    """Share of the text's n-grams of characters that occurred before in it; 0 for a text shorter than n."""
    units = characters(text)
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def length_ratio(answer: str, reference: str) -> float:
    """The answer's length over the reference's, in characters; NaN for an empty reference."""
    return len(characters(answer)) / length if (length := len(characters(reference))) else math.nan


class CopyIndex:
    """Finds what an answer has copied from any of many training answers, in milliseconds an answer.

    A suffix array (Manber and Myers 1990) over all distinct training answers, by prefix doubling in numpy: eight bytes
    a character and seconds for a million of them.
    """

    def __init__(self, answers: Iterable[str]) -> None:
        self._text = "\0".join(dict.fromkeys(answers))
        order = np.frombuffer(self._text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ranks = np.unique(order, return_inverse=True)[1].astype(np.int64) + 1
        width, distinct = 1, 0
        while distinct < len(ranks):
            following = np.zeros_like(ranks)
            following[: max(len(ranks) - width, 0)] = ranks[width:]
            values, ranks = np.unique(ranks * (len(ranks) + 1) + following, return_inverse=True)
            ranks, width, distinct = ranks + 1, 2 * width, len(values)
        self._suffixes: list[int] = np.argsort(ranks).tolist()

    def _holds(self, piece: str) -> bool:
        at = bisect_left(self._suffixes, piece, key=lambda start: self._text[start : start + len(piece)])
        return at < len(self._suffixes) and self._text.startswith(piece, self._suffixes[at])

    def longest(self, answer: str) -> str:
        """The longest stretch of the answer that stands verbatim in a training answer; the first of several."""
        answer = answer.replace("\0", "\ufffd")  # the separator must never match
        start, length = 0, 0
        for at in range(len(answer)):
            while at + length < len(answer) and self._holds(answer[at : at + length + 1]):
                start, length = at, length + 1
        return answer[start : start + length]

    def share(self, answer: str) -> float:
        """That stretch's length over the answer's; 0 for an empty answer."""
        return len(self.longest(answer)) / len(answer) if answer else 0.0


def paired_interval(
    before: Sequence[float],
    after: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of `after` minus `before`, question by question, with its bootstrap interval.

    Raises:
        ValueError: the two are not of the same questions, or as `bootstrap_interval`.
    """
    if len(before) != len(after):
        raise ValueError(f"paired values must be of the same questions, got {len(before)} and {len(after)}")
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return bootstrap_interval(differences.tolist(), confidence=confidence, resamples=resamples, seed=seed)
