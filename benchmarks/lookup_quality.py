"""How good look-up is and what each part of it contributes. How it grows with the books: lookup_scale.py.

    python benchmarks/lookup_quality.py RUN            # a run folder with an index, of the default set

Prints a table and writes RUN/lookup_quality.json. The closed book's figures are those of
RUN/report/report.json where there is one. Nothing is trained or tuned here.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from miniglm.evaluation.scores import bootstrap_interval
from miniglm.files import write_whole
from miniglm.lookup.answer import Answer, Answerer
from miniglm.lookup.look import Look, ranked
from miniglm.lookup.measure import measure
from miniglm.qa.formats import Example, read_examples
from miniglm.qa.keys import holds_keys
from miniglm.qa.text import bare

ROOT = Path(__file__).parent.parent / "data" / "sanguo"


def shares(values: list[bool]) -> dict[str, float]:
    """A share with its 95 % bootstrap interval."""
    found = bootstrap_interval([float(value) for value in values])
    return {"mean": found.mean, "low": found.low, "high": found.high, "count": len(values)}


def outside_tests() -> list[Example]:
    """The questions from outside the book that only measure."""
    outside = read_examples(ROOT / "outside.jsonl", need_answer=False).examples
    return [e for e in outside if e.extra["part"] == "test"]


def fact_orders(answerer: Answerer, found: Look) -> dict[str, list[int]]:
    """The first five facts by each way of choosing."""
    memory, query = answerer.memory, found.query
    told = memory.told.scores(query.grams)
    cosine = np.asarray(memory.vectors["together"] @ query.vector)
    best = found.facts.numbers[ranked(answerer.scores(found).facts)]
    return {
        "BM25": np.argsort(-told, kind="stable")[:5].tolist(),
        "encoder": np.argsort(-cosine, kind="stable")[:5].tolist(),
        "fused": found.facts.numbers[:5].tolist(),
        "re-ranked": best[:5].tolist(),
    }


def apart(texts: list[str], starts: list[tuple[int, int]], order: list[int]) -> list[str]:
    """The first five of an order that do not overlap."""
    kept: list[int] = []
    for place in order:
        paragraph, start = starts[place]
        end = start + len(texts[place])
        if not any(
            starts[k][0] == paragraph and starts[k][1] < end and start < starts[k][1] + len(texts[k]) for k in kept
        ):
            kept.append(place)
    return [texts[place] for place in kept[:5]]


def passage_orders(answerer: Answerer, found: Look) -> dict[str, list[str]]:
    """The first five passages by each way of choosing."""
    library, query = answerer.library, found.query
    hits = library.search(query.grams, query.vector, 40)
    shown = [library.passage(n) for n, *_ in hits]
    texts, starts = [p.text for p in shown], [(p.paragraph, p.start) for p in shown]
    bm25 = sorted(range(len(hits)), key=lambda i: -hits[i][1])
    dense = sorted(range(len(hits)), key=lambda i: -np.nan_to_num(hits[i][2], nan=-1))
    own, own_starts = [p.text for p in found.texts], [(p.paragraph, p.start) for p in found.texts]
    best = ranked(answerer.scores(found).passages).tolist()
    return {
        "BM25": apart(texts, starts, bm25),
        "encoder": apart(texts, starts, dense),
        "fused": apart(own, own_starts, list(range(len(own)))),
        "re-ranked": apart(own, own_starts, best),
    }


def quality(run: Path) -> dict[str, Any]:
    """All figures."""
    answerer = Answerer(run / "index")
    val = read_examples(ROOT / "val.jsonl").examples
    unseen = read_examples(ROOT / "unseen.jsonl").examples
    test = outside_tests()
    table: dict[str, dict[str, Any]] = {}

    def add(row: str, column: str, values: list[bool]) -> None:
        table.setdefault(row, {})[column] = shares(values)

    report = run / "report" / "report.json"
    if report.exists():
        for split in json.loads(report.read_text("utf-8"))["splits"]:
            if split["name"] in ("validation", "unseen"):
                name = "val" if split["name"] == "validation" else "unseen"
                table.setdefault("closed book", {})[f"{name} keys"] = split["scores"]["key_accuracy"]
    timed: list[float] = []

    def find(examples: list[Example]) -> tuple[list[Look], list[Answer]]:
        looks, given = [], []
        for e in examples:
            begun = time.perf_counter()
            looks.append(answerer.look(e.question))
            given.append(answerer.decide(looks[-1]))
            timed.append(time.perf_counter() - begun)
        return looks, given

    given: dict[str, Any] = {}
    for name, examples in (("val", val), ("unseen", unseen), ("outside", test)):
        looks, answers = find(examples)
        found = measure(examples, answers)
        given |= {f"{name} refused": found["refused"], f"{name} quoted": found["quoted"]}
        if name == "outside":
            for kind in dict.fromkeys(str(e.extra["kind"]) for e in test):
                own = [a.refused for e, a in zip(test, answers, strict=True) if e.extra["kind"] == kind]
                given[f"outside refused: {kind}"] = shares(own)
            continue
        given |= {f"{name} keys": found["key_accuracy"], f"{name} keys shown": found["key_shown"]}
        given |= {f"{name} evidence in 5": found["evidence_shown"], f"{name} both": found["both"]}
        given |= {f"{name} several facts": found["several_facts"], f"{name} several quotes": found["several_quotes"]}
        given |= {f"{name} evidence in 5, without what is around": found["evidence_quoted"]}
        given |= {f"{name} characters": found["characters"]}
        ways = [fact_orders(answerer, one) for one in looks] if name == "val" else []
        for way in ways[0] if ways else ():
            told = [[answerer.memory.facts[n].answer for n in order[way]] for order in ways]
            add(way, "val keys", [holds_keys(t[0], e.keys) for e, t in zip(val, told, strict=True)])
            add(way, "val fact in 5", [e.answer in t for e, t in zip(val, told, strict=True)])
        quotes = [passage_orders(answerer, one) for one in looks] if name == "unseen" else []
        for way in quotes[0] if quotes else ():
            evidence = [
                (bare(str(e.extra["evidence"])), [bare(text) for text in texts[way]])
                for e, texts in zip(unseen, quotes, strict=True)
            ]
            add(way, "unseen keys", [holds_keys(t[way][0], e.keys) for e, t in zip(unseen, quotes, strict=True)])
            add(way, "unseen evidence first", [own in texts[0] for own, texts in evidence])
            add(way, "unseen evidence in 5", [any(own in text for text in texts) for own, texts in evidence])
    table["answers as given"] = given
    return {
        "index": json.loads((run / "index" / "index.json").read_text("utf-8")),
        "table": table,
        "milliseconds": {"median": float(np.median(timed)) * 1e3, "p95": float(np.quantile(timed, 0.95)) * 1e3},
    }


def show(found: dict[str, Any]) -> None:
    """The table on the terminal."""
    for row, cells in found["table"].items():
        print(row)
        for column, value in cells.items():
            if value is not None:
                print(
                    f"    {column:32} {value['mean']:.3f} ({value['low']:.3f}–{value['high']:.3f})  n={value['count']}"
                )
    print(
        f"look-up: median {found['milliseconds']['median']:.1f} ms, 95th percentile {found['milliseconds']['p95']:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    found = quality(arguments.run)
    show(found)
    write_whole(arguments.run / "lookup_quality.json", json.dumps(found, ensure_ascii=False, indent=2) + "\n")


if __name__ == "__main__":
    main()
