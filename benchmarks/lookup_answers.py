"""Thirty answers from the book as they are, right and wrong, drawn by chance: docs/lookup-answers.md.

    python benchmarks/lookup_answers.py RUN > docs/lookup-answers.md     # a run folder with an index, of the default set

Twelve questions each of val.jsonl and unseen.jsonl, and six from outside the book.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from lookup_quality import ROOT, outside_tests

from miniglm.lookup.answer import Answer, Answerer
from miniglm.lookup.measure import shows_evidence
from miniglm.qa.formats import Example, read_examples
from miniglm.qa.keys import holds_keys

KINDS = {"fact": "教过的事实", "quote": "引用原文", "both": "两个都给", "refused": "没有找到"}
SHOWN = 2
"""Citations of each."""
HEAD = """# 三十个查书的回答，照原样

`python benchmarks/lookup_answers.py {run} --seed {seed}` 从{what}的索引里随机抽的（12 道验证题、12 道没教过的题、6 道书外的题），没有挑选。
「要点」是回答里要点全不全，「依据」是所列五条出处里有没有讲这件事的那句；出处只列前两条里标出的那几句。怎么量的见 [lookup.md](lookup.md)。
"""


def drawn(examples: list[Example], number: int, numbers: random.Random) -> list[Example]:
    """So many of them, in the set's order."""
    return [examples[i] for i in sorted(numbers.sample(range(len(examples)), number))]


def judged(example: Example, answer: Answer) -> str:
    """Whether the answer is right, of a question that the book answers."""
    keys = "要点全" if holds_keys(answer.text, example.keys) else "**要点不全**"
    shown = shows_evidence(answer, str(example.extra["evidence"]))
    return f"- 参考答案：{example.answer}\n- {keys}，依据{'在' if shown else '**不在**'}出处里"


def outside(example: Example, answer: Answer) -> str:
    """The same of one that it does not."""
    return f"- 应当拒答：{'拒了' if answer.refused else '**没有拒**'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--what", default="默认的十分钟运行", help="which run it is, in words")
    given = parser.parse_args()
    answerer, numbers, number = Answerer(given.run / "index"), random.Random(given.seed), 0
    validation, unseen = (read_examples(ROOT / name).examples for name in ("val.jsonl", "unseen.jsonl"))
    parts: list[tuple[str, list[Example], int, Callable[[Example, Answer], str]]] = [
        ("验证题：教过的事实，没见过的问法", validation, 12, judged),
        ("没教过的题：只有书里讲到", unseen, 12, judged),
        ("书外的题：应当拒答", outside_tests(), 6, outside),
    ]
    print(HEAD.format(run=f"runs/{given.run.name}", seed=given.seed, what=given.what), end="")
    for title, examples, count, judge in parts:
        print(f"\n## {title}")
        for example in drawn(examples, count, numbers):
            number += 1
            answer = answerer.answer(example.question)
            print(f"\n**{number}. {example.question}**\n")
            print(f"- 回答（{KINDS[answer.kind]}）：{'／'.join(said.text for said in answer.statements)}")
            for citation in answer.citations[:SHOWN]:
                print(f"- 出处 {citation.label}{citation.quoted}")
            print(judge(example, answer))


if __name__ == "__main__":
    main()
