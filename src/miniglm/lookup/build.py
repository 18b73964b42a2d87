"""Builds a run's index: trains the encoder, lays both memories down, learns to choose and when to say nothing.

What is learnt after the encoder is learnt on questions that it has not seen (withheld.py). These go into the memory
afterwards. Validation questions and those that only the book answers are never looked at.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from miniglm.corpus import Paragraph
from miniglm.files import file_digest, write_whole
from miniglm.lookup.answer import FORMAT, RERANKER, quotes
from miniglm.lookup.cross_fitting import Ranked, learn_rerankers
from miniglm.lookup.encoder import Encoder
from miniglm.lookup.facts import Fact, Memory, facts_of, locate, without
from miniglm.lookup.features import Sources
from miniglm.lookup.library import Library, Part, build_library, parts_of
from miniglm.lookup.look import Judge, in_doubt, likely, linear_scores, look, reranked, share_of, signals
from miniglm.lookup.pairs import train
from miniglm.lookup.ranking import fit_logistic, fit_temperature
from miniglm.lookup.text import passages
from miniglm.lookup.withheld import Looked, Withheld, answers, withhold
from miniglm.qa.formats import Example

SEVERAL, SEVERAL_SECONDS = 3, 180.0
"""Encoders, of different seeds, that are joined into one where there are at least that many seconds, which half an hour
of `demo` has: a little better, and three times as long to train and to compare by. docs/lookup.md has how much."""
FEWEST = 100
"""Withheld questions below which the shipped choice serves, learnt on 《三国演义》."""
REFUSED = 0.02
"""Share of the withheld questions that the threshold refuses: docs/lookup.md has what more and less would do."""


def build_index(
    paragraphs: Sequence[Paragraph],
    examples: Sequence[Example],
    outside: Sequence[str],
    folder: Path,
    *,
    seconds: float,
    seconds_reranking: float = 0.0,
    seed: int,
    texts: Sequence[Part] = (),
    sample: Sequence[Paragraph] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Writes the index into `folder`: encoder/, books/, facts/, reranker/ where there is one, judge.json and, last,
    index.json.

    Args:
        paragraphs: of all books, each book's in order.
        examples: training questions; may be empty.
        outside: questions that the books do not answer, to set the threshold with; may be empty.
        seconds: for training the encoder; `seconds_reranking`: for the rerankers, 0 for none.
        texts: more to look up, which need not fit into memory; `sample`: what the encoder learns from of it.
        progress: is told the share of the seconds that is gone.

    Returns:
        What index.json holds: counts, seconds, and how the choice does on the withheld questions.
    """
    begun = time.monotonic()
    facts = locate_all(paragraphs, examples)
    withheld = withhold(facts, seed)
    part = seconds / (seconds + seconds_reranking)
    encoder = train(
        paragraphs,
        facts,
        withheld,
        more=sample,
        encoders=SEVERAL if seconds >= SEVERAL_SECONDS else 1,
        seconds=seconds,
        seed=seed,
        progress=lambda share: progress(part * share),
    )
    trained = time.monotonic()
    learnt = None
    if seconds_reranking and _enough(withheld):
        learnt = learn_rerankers(
            paragraphs,
            without(facts, withheld.questions),
            folder,
            more=sample,
            seconds=seconds_reranking,
            seed=seed,
            progress=lambda share: progress(part + (1 - part) * share),
        )
    reread = time.monotonic()
    encoder.save(folder / "encoder")
    encoder = Encoder.load(folder / "encoder")  # rounded as it will be when questions come
    digest = file_digest(folder / "encoder" / "encoder.safetensors")
    build_library([*parts_of(paragraphs), *texts], encoder, digest, folder / "books")
    library = Library(folder / "books")
    laid = time.monotonic()
    judge, measured = learn(encoder, library, facts, withheld, outside, learnt)
    if learnt is not None:
        learnt.rerankers.save(folder / RERANKER)
    else:
        shutil.rmtree(folder / RERANKER, ignore_errors=True)
    write_whole(folder / "judge.json", json.dumps(judge.to_json(), ensure_ascii=False) + "\n")
    Memory.build(facts, library, encoder).save(folder / "facts")
    about = {
        "format": FORMAT,
        "reranked": learnt is not None,
        "passages": library.size,
        "facts": len(facts),
        "seconds": {
            "encoder": round(trained - begun, 1),
            "reranker": round(reread - trained, 1),
            "books": round(laid - reread, 1),
            "choice": round(time.monotonic() - laid, 1),
        },
        "withheld": measured,
    }
    write_whole(folder / "index.json", json.dumps(about, ensure_ascii=False, indent=2) + "\n")
    return about


def locate_all(paragraphs: Sequence[Paragraph], examples: Sequence[Example]) -> list[Fact]:
    """The examples' facts with their passages."""
    texts = [paragraphs[span.paragraph].text[span.start : span.end] for span in passages(paragraphs)]
    return locate(facts_of(examples), texts)


def shipped_judge() -> Judge:
    """The choice learnt on 《三国演义》, for books without enough questions to learn one on."""
    text = resources.files("miniglm.lookup").joinpath("judge.json").read_text("utf-8")
    return Judge.from_json(json.loads(text))


def _enough(withheld: Withheld) -> bool:
    """Whether there are questions enough to learn a choice on."""
    return min(len(withheld.reworded), len(withheld.new)) >= FEWEST


def learn(
    encoder: Encoder,
    library: Library,
    facts: Sequence[Fact],
    withheld: Withheld,
    outside: Sequence[str],
    learnt: Ranked | None = None,
    *,
    portable: bool = False,
) -> tuple[Judge, dict[str, Any]]:
    """The choice and its confidence, from the withheld questions, and how they do on these; the shipped ones where
    there are too few. Without questions from outside, refusal is the shipped one's with a threshold of its own.

    Args:
        learnt: rankers that were learnt on other questions; default: none, and linear ones of these.
        portable: facts are chosen by features that may only speak for them, which does a little worse on this book and
            better on others: for the judge that is shipped.
    """
    if not _enough(withheld) or not library.size:
        return shipped_judge(), {}
    memory = Memory.build(without(facts, withheld.questions), library, encoder)
    sources = Sources(encoder, memory, library)
    looked = Looked.up(withheld.reworded, withheld.new, sources)
    old, new = looked.old, looked.new
    none = [look(q, sources) for q in outside]
    every = [found for found, _ in (*old, *new)] + none
    temperatures = (1.0, 1.0)
    if learnt is None:
        fact_ranker, passage_ranker = looked.rankers(portable=portable)
        scores = [linear_scores(found, fact_ranker, passage_ranker) for found in every]
    else:
        fact_ranker, passage_ranker = learnt.facts, learnt.passages
        scores = [reranked(found, fact_ranker, passage_ranker, sources, learnt.rerankers) for found in every]
        of_old, of_new = scores[: len(old)], scores[len(old) : len(old) + len(new)]
        temperatures = (
            fit_temperature([(own.facts, hit) for own, hit in zip(of_old, looked.right, strict=True)]),
            fit_temperature([(own.passages, hit) for own, hit in zip(of_new, looked.told, strict=True)]),
        )
        scores = [own.cooled(*temperatures) for own in scores]
    rows = [signals(found, own) for found, own in zip(every, scores, strict=True)]
    full, plain = (np.stack([row[side] for row in rows]) for side in (0, 1))
    best_fact = [memory.facts[found.facts.numbers[s.facts.argmax()]] for found, s in zip(every, scores, strict=True)]
    best_text = [found.texts[s.passages.argmax()].text for found, s in zip(every, scores, strict=True)]
    asked = [fact for _, fact in (*old, *new)]
    answered = [answers(own.answer, fact) for own, fact in zip(best_fact, asked, strict=False)]
    quoted = [answers(text, fact) for text, fact in zip(best_text, asked, strict=False)]
    nothing = [False] * len(none)
    fact_right = fit_logistic(full, np.array(answered + nothing))
    passage_right = fit_logistic(full, np.array(quoted + nothing))
    known_right, quote_right = np.array(answered), np.array(quoted)
    one = known_right != quote_right
    prefer = fit_logistic(full[: len(asked)][one], known_right[one])
    inside_target = np.array([True] * len(asked) + nothing)
    shipped = shipped_judge() if not none else None
    inside = fit_logistic(full, inside_target) if shipped is None else shipped.inside
    inside_passages = fit_logistic(plain, inside_target) if shipped is None else shipped.inside_passages
    known = slice(0, len(old))
    judge = Judge(
        fact_ranker=fact_ranker,
        passage_ranker=passage_ranker,
        fact_temperature=temperatures[0],
        passage_temperature=temperatures[1],
        fact_right=fact_right,
        passage_right=passage_right,
        prefer=prefer,
        inside=inside,
        threshold=float(np.quantile(inside(full[known]), REFUSED)),
        inside_passages=inside_passages,
        threshold_passages=float(np.quantile(inside_passages(plain[known]), REFUSED)),
    )
    kept = inside(full) >= judge.threshold
    chances = share_of(prefer(full[: len(asked)]))
    both = in_doubt(chances)
    said = [
        [memory.facts[found.facts.numbers[n]].answer for n in likely(s.facts)]
        for found, s in zip(every, scores, strict=True)
    ]
    said_right = np.array([any(answers(text, fact) for text in own) for own, fact in zip(said, asked, strict=False)])
    shown = [
        [quote.passage.text for quote in quotes(found, s, alone=not unsure)]
        for found, s, unsure in zip(every, scores, both, strict=False)
    ]
    shown_right = np.array([any(answers(t, fact) for t in own) for own, fact in zip(shown, asked, strict=False)])
    right_as_given = np.where(both, said_right | shown_right, np.where(chances >= 0.5, said_right, shown_right))
    right_as_given &= kept[: len(asked)]
    measured = {
        "reworded": len(old),
        "reworded_right": float(np.mean(answered[: len(old)])),
        "reworded_right_as_given": float(right_as_given[: len(old)].mean()),
        "reworded_both": float(both[: len(old)].mean()),
        "reworded_several_facts": float(np.mean([len(own) > 1 for own in said[: len(old)]])),
        "untaught": len(new),
        "untaught_quoted": float(np.mean(quoted[len(old) :])),
        "untaught_right_as_given": float(right_as_given[len(old) :].mean()),
        "untaught_both": float(both[len(old) :].mean()),
        "reworded_refused": float(1 - kept[: len(old)].mean()),
        "untaught_refused": float(1 - kept[len(old) : len(asked)].mean()),
        "outside": len(none),
        "outside_refused": float(1 - kept[len(asked) :].mean()) if none else None,
        "threshold": judge.threshold,
    }
    return judge, measured
