"""Look-up in a book that has no question-answer set: what sixty questions about 《红楼梦》 find in it, and what is refused.

    python benchmarks/lookup_other_book.py 红楼梦.txt      # any edition of the first eighty chapters

Builds the index of the text alone and asks honglou_questions.jsonl beside this file (written for this measure; nothing
is tuned on it), and, to be refused, questions about 《三国演义》 and from data/sanguo/outside.jsonl but those about 《红楼梦》.
Prints a table and writes benchmarks/results/lookup_other_book.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from lookup_quality import shares
from side_by_side import parser, report

from miniglm.corpus import load_books
from miniglm.lookup import Answerer
from miniglm.lookup.build import build_index
from miniglm.qa.formats import read_examples
from miniglm.qa.keys import holds_keys

HERE = Path(__file__).parent
SANGUO = HERE.parent / "data" / "sanguo"
ABOUT_THE_BOOK = ("红楼", "宝玉", "黛玉", "大观园", "贾府")


def outcomes(answerer: Answerer) -> dict[str, list[bool]]:
    """Of each kind of question what is found and refused."""
    rows = [json.loads(line) for line in (HERE / "honglou_questions.jsonl").read_text("utf-8").splitlines()]
    answers = [answerer.answer(row["question"]) for row in rows]
    keys = [tuple(map(tuple, row["keys"])) for row in rows]
    both = list(zip(answers, keys, strict=True))
    elsewhere = [e.question for e in read_examples(SANGUO / "val.jsonl").examples[::8]]
    others = [e.question for e in read_examples(SANGUO / "outside.jsonl", need_answer=False).examples]
    others = [q for q in others if not any(name in q for name in ABOUT_THE_BOOK)]
    return {
        "keys in the answer": [holds_keys(a.text, own) for a, own in both],
        "keys in the first passage": [bool(a.citations) and holds_keys(a.citations[0].quoted, own) for a, own in both],
        "keys in one of five citations": [any(holds_keys(c.text, own) for c in a.citations) for a, own in both],
        "refused": [a.refused for a in answers],
        "refused of questions about 三国演义": [answerer.answer(q).refused for q in elsewhere],
        "refused of other outside questions": [answerer.answer(q).refused for q in others],
    }


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("book", help="a file, or a name from miniglm corpus list")
    options.add_argument("--seconds", type=float, default=60.0, help="for the encoder")
    options.add_argument("--seed", type=int, default=1337)
    given = options.parse_args()
    paragraphs = [p for book in load_books([given.book]) for p in book.paragraphs]
    with tempfile.TemporaryDirectory() as folder:
        build_index(paragraphs, [], [], Path(folder), seconds=given.seconds, seed=given.seed)
        found = outcomes(Answerer(Path(folder)))
    rows = [{"": what} | shares(values) for what, values in found.items()]
    report("lookup_other_book", "Look-up in a book without a set", rows, given)


if __name__ == "__main__":
    main()
