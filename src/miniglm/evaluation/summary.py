"""From answers to figures: the scores of each answer, their means with intervals, and the baseline's beside them.

Pure functions over what a model said (`Said`): no model, no files. The report's page and pictures only show what is
made here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Literal

from miniglm.evaluation import scores
from miniglm.evaluation.baseline import NearestQuestion
from miniglm.evaluation.scores import CopyIndex, Interval, bootstrap_interval, ratio_interval
from miniglm.qa.formats import Example
from miniglm.qa.keys import holds_keys, key_hits
from miniglm.qa.leaks import find_leaks

Of = Literal["answers", "tokens", "characters", "windows"]


@dataclass(frozen=True, slots=True)
class Score:
    """A score as the report shows it.

    Attributes:
        unit: "share" is shown in per cent, "number" as it is.
        higher_is_better: None where neither end is good.
    """

    name: str
    title: str
    about: str
    unit: Literal["share", "number"] = "share"
    higher_is_better: bool | None = True


SCORES = (
    Score("key_accuracy", "要点全中", "答案含有这道题的每一组要点。全半角、繁简、数字写法不同不算错。"),
    Score("rouge_l", "ROUGE-L F（字）", "答案与参考答案的最长公共子序列（按字），精确率与召回率的调和平均。"),
    Score("rouge_l_precision", "ROUGE-L 精确率（字）", "最长公共子序列占答案的比例。"),
    Score("rouge_l_recall", "ROUGE-L 召回率（字）", "最长公共子序列占参考答案的比例。"),
    Score("rouge_l_words", "ROUGE-L F（词）", "同上，按 jieba 分出的词。"),
    Score("rouge_1", "ROUGE-1 F（字）", "共有的字。"),
    Score("rouge_2", "ROUGE-2 F（字）", "共有的相邻两字。"),
    Score("character_f1", "字 F1", "去掉标点后共有的字（SQuAD 的 F1，以字为词）。"),
    Score("exact_match", "完全相同", "除标点、空白、全半角和繁简外，与参考答案一字不差。"),
    Score("bleu", "BLEU（各答案平均）", "sacrebleu 的单句 BLEU（中文按字），对答案取平均。"),
    Score("corpus_bleu", "BLEU（全部答案合算）", "sacrebleu 把全部答案当一篇文章算的 BLEU，论文里通常报告这个。"),
    Score("chrf", "chrF2", "sacrebleu 的单句 chrF2，对答案取平均。"),
    Score(
        "perplexity_token",
        "困惑度/token（对 token 平均）",
        "模型在完整分布上对参考答案（连同结束符）的困惑度：全部答案的负对数概率之和除以 token 总数，再取指数。",
        "number",
        False,
    ),
    Score(
        "perplexity_token_of_answers",
        "困惑度/token（对答案平均）",
        "每个参考答案各算一个困惑度，再对答案取平均；少数极难的答案会把它拉高。",
        "number",
        False,
    ),
    Score(
        "perplexity_character",
        "困惑度/字（对字平均）",
        "同上，除以字数，所以不同词表的模型可以比较。",
        "number",
        False,
    ),
    Score("bits_per_character", "参考答案的比特/字", "困惑度/字的以 2 为底的对数。", "number", False),
    Score("repetition", "重复", "答案里出现过的四字组又出现的比例。", "share", False),
    Score("length_ratio", "长度比", "答案的字数除以参考答案的字数。", "number", None),
    Score("stopped", "自己停下", "没有写到长度上限，自己结束的答案。"),
    Score("copied", "照抄训练答案", "答案里最长的、在某个训练答案里原样出现的一段，占答案的比例。", "share", None),
)
BY_NAME = {score.name: score for score in SCORES}
LENGTH_EDGES = (0, 10, 15, 20, 25, 30, 40, 60, 100, math.inf)
"""Bounds of the groups of answers by the characters of their reference."""
LEAKS = {"question": "问题相同或几乎相同", "answer": "问题不同而答案相同", "copied": "答案原样在训练答案里"}
LEAKS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Said:
    """What the model made of one question.

    Attributes:
        answers, reasons: one each for every sample; a reason is "stop" or "length".
        nats: -log p of the reference answer and the token that closes it; None where there is no reference.
        tokens: their number.
    """

    answers: tuple[str, ...]
    reasons: tuple[str, ...]
    nats: float | None = None
    tokens: int = 0


def missing_extras() -> list[str]:
    """Packages of the `eval` extra that are not installed; the scores that need them are left out."""
    return [name for name in ("jieba", "sacrebleu") if find_spec(name) is None]


def interval(found: Interval, of: Of = "answers") -> dict[str, Any]:
    """An interval as JSON, with what was averaged over."""
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(found).items()} | {
        "of": of
    }


def _against_reference(answer: str, reference: str, missing: Sequence[str]) -> dict[str, float]:
    """The scores of one text against another."""
    mine, theirs = scores.characters(answer), scores.characters(reference)
    longest = scores.rouge_l(mine, theirs)
    found = {
        "rouge_l": longest.f1,
        "rouge_l_precision": longest.precision,
        "rouge_l_recall": longest.recall,
        "rouge_1": scores.rouge_n(mine, theirs, 1).f1,
        "rouge_2": scores.rouge_n(mine, theirs, 2).f1,
        "character_f1": scores.character_f1(answer, reference),
        "exact_match": scores.exact_match(answer, reference),
        "length_ratio": scores.length_ratio(answer, reference),
    }
    if "jieba" not in missing:
        found["rouge_l_words"] = scores.rouge_l(scores.words(answer), scores.words(reference)).f1
    if "sacrebleu" not in missing:
        found |= {"bleu": scores.bleu(answer, reference), "chrf": scores.chrf(answer, reference)}
    return found


class _Scorer:
    """Scores texts, each pair of answer and reference once: models and look-ups repeat themselves."""

    def __init__(self, copies: CopyIndex | None) -> None:
        self.missing, self._copies = missing_extras(), copies
        self._known: dict[tuple[str, str], dict[str, float]] = {}

    def of(self, answer: str, reference: str) -> dict[str, float]:
        """All scores that one answer can have."""
        if (answer, reference) not in self._known:
            found = _against_reference(answer, reference, self.missing) if scores.characters(reference) else {}
            found["repetition"] = scores.repetition(answer)
            if self._copies is not None:
                found["copied"] = self._copies.share(answer)
            self._known[answer, reference] = found
        return self._known[answer, reference]


def _mean(dicts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(d[name] for d in dicts) / len(dicts) for name in dicts[0]}


def row(number: int, example: Example, said: Said, scorer: _Scorer, nearest: tuple[str, str] | None) -> dict[str, Any]:
    """One question with everything known about it, as JSON."""
    reference, keys = example.answer, example.keys
    found = _mean([scorer.of(answer, reference) for answer in said.answers])
    found["stopped"] = sum(reason == "stop" for reason in said.reasons) / len(said.reasons)
    if said.nats is not None and said.tokens:
        found["perplexity_token"] = math.exp(said.nats / said.tokens)
        found["perplexity_character"] = math.exp(said.nats / max(1, len(reference)))
    question, answer = nearest or ("", "")
    return {
        "number": number,
        "id": example.id,
        "chapter": chapter(example),
        "question": example.question,
        "reference": reference,
        "answers": list(said.answers),
        "finish_reasons": list(said.reasons),
        "keys": [list(group) for group in keys],
        "hits": key_hits(said.answers[0], keys),
        "right": sum(holds_keys(a, keys) for a in said.answers) / len(said.answers) if keys else None,
        "nats": said.nats,
        "tokens": said.tokens,
        "scores": {name: round(value, 4) for name, value in found.items()},
        "baseline": answer,
        "baseline_question": question,
        "baseline_right": float(holds_keys(answer, keys)) if keys and nearest is not None else None,
        "baseline_scores": scorer.of(answer, reference) if nearest is not None else {},
    }


def chapter(example: Example) -> int | str | None:
    """The chapter that the set gives for the question, if any."""
    value = example.extra.get("chapter")
    return value if isinstance(value, (int, str)) else None


def _means(rows: Sequence[dict[str, Any]], part: str, right: str) -> dict[str, Any]:
    """Means with intervals over all rows that have the score."""
    found = {}
    if marked := [r[right] for r in rows if r[right] is not None]:
        found["key_accuracy"] = interval(bootstrap_interval(marked))
    for name in (score.name for score in SCORES):
        if values := [r[part][name] for r in rows if name in r[part]]:
            of_answers = "perplexity_token_of_answers" if name == "perplexity_token" else name
            if name != "perplexity_character":
                found[of_answers] = interval(bootstrap_interval(values))
    return found


def _corpus_means(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    pairs = [(a, r) for a, r in zip(answers, references, strict=True) if scores.characters(r)]
    if not pairs or "sacrebleu" in missing_extras():
        return {}
    mine, theirs = [a for a, _ in pairs], [r for _, r in pairs]
    return {"corpus_bleu": interval(scores.corpus_bleu(mine, theirs))}


def _fit(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How well the model fits the reference answers: ratios of sums, so that long answers weigh as much as they are."""
    known = [r for r in rows if r["nats"] is not None and r["tokens"]]
    if not known:
        return {}
    nats, tokens = [r["nats"] for r in known], [float(r["tokens"]) for r in known]
    characters = [float(max(1, len(r["reference"]))) for r in known]
    return {
        "perplexity_token": interval(ratio_interval(nats, tokens, transform=math.exp), "tokens"),
        "perplexity_character": interval(ratio_interval(nats, characters, transform=math.exp), "characters"),
        "bits_per_character": interval(
            ratio_interval(nats, characters, transform=lambda ratio: ratio / math.log(2)), "characters"
        ),
    }


def _grouped(rows: Sequence[dict[str, Any]], group: Callable[[dict[str, Any]], Any]) -> Iterable[tuple[Any, Any]]:
    """Key accuracy, or ROUGE-L where there are no keys, of each group of rows: model and baseline."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for r in rows:
        groups[group(r)].append(r)
    keyed = any(r["right"] is not None for r in rows)
    for name in sorted((name for name in groups if name is not None), key=lambda n: (isinstance(n, str), n)):
        values: dict[str, Any] = {}
        for side, right, part in (("model", "right", "scores"), ("baseline", "baseline_right", "baseline_scores")):
            found = [r[right] if keyed else r[part].get("rouge_l") for r in groups[name]]
            if known := [value for value in found if value is not None]:
                values[side] = interval(bootstrap_interval(known))
        if "model" in values:
            yield name, values


def _length_group(r: dict[str, Any]) -> int | None:
    length = len(scores.characters(r["reference"]))
    return max(i for i, edge in enumerate(LENGTH_EDGES) if edge <= length) if length else None


def split_report(
    examples: Sequence[Example], said: Sequence[Said], nearest: NearestQuestion | None, copies: CopyIndex | None
) -> dict[str, Any]:
    """Scores, groups and rows of one split; the caller adds what it is called and where it is from."""
    scorer = _Scorer(copies)
    close = [None] * len(examples) if nearest is None else nearest.find([e.question for e in examples])
    rows = [row(i, e, s, scorer, n) for i, (e, s, n) in enumerate(zip(examples, said, close, strict=True))]
    references = [r["reference"] for r in rows]
    found = _means(rows, "scores", "right") | _fit(rows)
    found |= _corpus_means([r["answers"][0] for r in rows], references)
    baseline = None
    if nearest is not None:
        baseline = _means(rows, "baseline_scores", "baseline_right")
        baseline |= _corpus_means([r["baseline"] for r in rows], references)
    by_length = [
        {"from": LENGTH_EDGES[i], "to": None if math.isinf(LENGTH_EDGES[i + 1]) else LENGTH_EDGES[i + 1]} | values
        for i, values in _grouped(rows, _length_group)
    ]
    by_chapter = [{"chapter": name} | values for name, values in _grouped(rows, lambda r: r["chapter"])]
    for r in rows:
        del r["baseline_scores"]
    order = [score.name for score in SCORES]
    return {
        "questions": len(rows),
        "with_keys": sum(r["right"] is not None for r in rows),
        "scores": {name: found[name] for name in order if name in found},
        "baseline": None if baseline is None else {name: baseline[name] for name in order if name in baseline},
        "by_length": by_length,
        "by_chapter": by_chapter,
        "rows": rows,
    }


def leak_report(
    train: Sequence[Example],
    splits: Mapping[str, Sequence[Example]],
    *,
    similarity: float = 0.8,
    shown: int | None = LEAKS_SHOWN,
) -> dict[str, Any]:
    """What the training questions and answers give away of each split: counts, and `shown` examples of each kind (all
    for None)."""
    found = {}
    for name, examples in splits.items():
        leaks = find_leaks(train, examples, similarity=similarity)
        kinds = {kind: [leak for leak in leaks.found if leak.kind == kind] for kind in LEAKS}
        found[name] = {
            "examples": leaks.evaluation,
            **{kind: len(of_kind) for kind, of_kind in kinds.items()},
            "shown": [
                {
                    "kind": kind,
                    "question": examples[leak.evaluation].question,
                    "answer": examples[leak.evaluation].answer,
                    "train_question": train[leak.train].question,
                    "train_answer": train[leak.train].answer,
                    "similarity": round(leak.similarity, 3),
                }
                for kind, of_kind in kinds.items()
                for leak in of_kind[:shown]
            ],
        }
    return {"train": len(train), "splits": found}


def leak_table(report: dict[str, Any]) -> Iterable[Any]:
    """A leak report for the terminal, as rich prints it: a table of counts, then `LEAKS_SHOWN` examples of each kind."""
    from rich.table import Table

    def folding(*headings: str, **options: Any) -> Table:
        made = Table(**options)
        for heading in headings:  # Chinese has no spaces to break at: fold, or a narrow terminal shows an ellipsis
            made.add_column(heading, overflow="fold")
        return made

    table = folding("评测的问答", "题数", *LEAKS.values(), title=f"训练的问答 {report['train']:,} 题")
    for name, part in report["splits"].items():
        counts = [f"{part[kind]:,}（{part[kind] / max(1, part['examples']):.1%}）" for kind in LEAKS]
        table.add_row(name, f"{part['examples']:,}", *counts)
    yield table
    for name, part in report["splits"].items():
        if part["shown"]:
            examples = folding("怎样", "相似度", "评测的问答", "训练的问答", title=name, show_lines=True)
            by_kind = ([leak for leak in part["shown"] if leak["kind"] == kind] for kind in LEAKS)
            for leak in (leak for of_kind in by_kind for leak in of_kind[:LEAKS_SHOWN]):
                sides = [
                    f"{leak[q]}\n{leak[a]}" for q, a in (("question", "answer"), ("train_question", "train_answer"))
                ]
                examples.add_row(LEAKS[leak["kind"]], f"{leak['similarity']:.2f}", *sides)
            yield examples
