"""A small report as an evaluation makes it, of answers that are made up: some right, some wrong, some odd."""

from __future__ import annotations

from typing import Any

from running import ROOT

from miniglm.evaluation.baseline import NearestQuestion
from miniglm.evaluation.scores import CopyIndex, bootstrap_interval
from miniglm.evaluation.summary import Said, interval, leak_report, split_report
from miniglm.qa.formats import Example, read_examples

HTML = '</script><!--<script><img src=x onerror="alert(1)"><b>粗</b>&amp;\u2028\u2029'
ODD = {5: HTML, 8: "", 11: "Cao" * 200, 14: "缺\ud800了一半"}
"""Answers by the place of their question: HTML, nothing, no place to break a line, a lone surrogate."""


def examples(name: str, count: int, every: int = 1) -> list[Example]:
    return read_examples(ROOT / "data" / "sanguo" / f"{name}.jsonl").examples[: count * every : every]


def _answers(asked: list[Example], right_every: int, nats: float) -> list[Said]:
    texts = [e.answer if n % right_every == 0 else asked[n - 1].answer for n, e in enumerate(asked)]
    return [
        Said((ODD.get(n, text),), ("length" if n == 11 else "stop",), nats * (1 + n % 7), 20)
        for n, text in enumerate(texts)
    ]


def make_report(name: str = "demo", *, count: int = 40, right_every: int = 3, nats: float = 4.0) -> dict[str, Any]:
    """A report of `count` validation questions from all over the book, a few unseen ones and a few training ones."""
    train = examples("train", 200)
    parts = {
        "validation": ("验证题", "同样的事实，没见过的问法", examples("val", count, 1500 // count), right_every, nats),
        "unseen": ("没见过的题", "只有书里讲到的事实", examples("unseen", 12), 6, 7 * nats),
        "train": ("训练题", "训练时见过的问题", train[:9], 1, nats / 10),
    }
    nearest, copies = NearestQuestion(train), CopyIndex(e.answer for e in train)
    splits: list[dict[str, Any]] = [
        {"name": split, "title": title, "about": about, "source": f"qa/{split}.jsonl", "total": 3 * len(asked)}
        | split_report(asked, _answers(asked, every, of_nats), nearest, copies)
        for split, (title, about, asked, every, of_nats) in parts.items()
    ]
    for split in splits[:2]:
        for row in split["rows"]:
            told = f"查到：{row['reference']}"
            row["with_book"] = {"answer": told, "sources": ["【第一回】桃园"], "shown": f"{told}\n【第一回】桃园"}
    of_text = interval(bootstrap_interval([6.3, 6.5, 6.4]), "windows")
    of_own = interval(bootstrap_interval([1.2, 1.5]))
    return {
        "format": 1,
        "miniglm": "0.1.0",
        "made": "2026-11-25T10:15:00",
        "name": name,
        "model": {
            "folder": f"{name}/model",
            "parameters": 4_470_000,
            "layers": 4,
            "hidden_size": 256,
            "vocabulary": 4608,
            "context": 256,
        },
        "settings": {"temperature": 0.0, "top_k": 0, "samples": 1, "max_new_tokens": 128, "seed": 1, "limit": None},
        "text": {"source": "corpus/validation.jsonl", "bits_per_character": of_text},
        "leaks": leak_report(train, {split: parts[split][2] for split in ("validation", "unseen")}),
        "missing": [],
        "splits": splits,
        "speed": {
            "questions": count + 21,
            "batched_seconds": 2.5,
            "batched_characters_per_second": 812.0,
            "alone_characters_per_second": interval(bootstrap_interval([200.0, 220.0])),
            "first_character_seconds": interval(bootstrap_interval([0.01, 0.02])),
        },
        "self_perplexity": {"interval": of_own, "temperature": 0.8, "top_k": 100, "values": [1.2, 1.5]},
        "losses": {
            "pretrain": [[0.1 * n, 8 - 0.1 * n] for n in range(40)],
            "pretrain_validation": [[1.0, 7.5], [4.0, 6.0]],
            "finetune": [[0.1 * n, 5 - 0.1 * n] for n in range(40)],
            "finetune_validation": [[1.0, 3.5], [4.0, 0.3]],
        },
        "against": None,
    }
