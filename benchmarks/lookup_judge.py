"""Makes the judge that is shipped for books without enough questions to learn one on, src/miniglm/lookup/judge.json.

    python benchmarks/lookup_judge.py RUN              # a run folder of the default set with an index

It is to be made anew whenever the features change. Prints how it does on the withheld questions of RUN's index.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from miniglm.files import write_whole
from miniglm.lookup.build import learn, locate_all
from miniglm.lookup.encoder import Encoder
from miniglm.lookup.library import Library
from miniglm.lookup.withheld import withhold
from miniglm.pipeline import Run, examples, paragraphs_of

SHIPPED = Path(__file__).parent.parent / "src" / "miniglm" / "lookup" / "judge.json"


def main(path: Path) -> None:
    run = Run(path)
    facts = locate_all(paragraphs_of(run), examples(run, "train"))
    outside = [e.question for e in examples(run, "outside") if e.extra.get("part") != "test"]
    encoder, library = Encoder.load(path / "index" / "encoder"), Library(path / "index" / "books")
    withheld = withhold(facts, run.recipe.run.seed)
    judge, measured = learn(encoder, library, facts, withheld, outside, portable=True)
    write_whole(SHIPPED, json.dumps(judge.to_json(), ensure_ascii=False) + "\n")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
