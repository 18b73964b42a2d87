"""Asks a model the questions of one or more sets and writes the report folder: report.json, report.html, pictures.

What the model says is appended to a journal as it goes, so an evaluation that was stopped goes on where it was. Knows
nothing of run folders: the caller brings the model, the questions and what the report shall say about them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from miniglm import __version__
from miniglm.conversation import encode_reference, prompt_of
from miniglm.corpus.reading import read_lines
from miniglm.errors import MiniGLMError
from miniglm.evaluation.baseline import NearestQuestion
from miniglm.evaluation.compare import against
from miniglm.evaluation.measure import sequence_nats
from miniglm.evaluation.pictures import draw_all, draw_histogram
from miniglm.evaluation.report import write_page
from miniglm.evaluation.scores import CopyIndex, bootstrap_interval, characters, ratio_interval, rouge_l
from miniglm.evaluation.summary import Said, interval, leak_report, missing_extras, split_report
from miniglm.files import (
    append_line,
    clean_temporaries,
    file_digest,
    keep_dated,
    read_json,
    sealed,
    unsealed,
    write_json,
    write_whole,
)
from miniglm.generation import Engine
from miniglm.lookup.answer import Answerer, with_sources
from miniglm.lookup.measure import answer_all, measure
from miniglm.model import GLM
from miniglm.qa.formats import Example, Turn
from miniglm.qa.spread import spread
from miniglm.sampling import SamplingSettings
from miniglm.tokenizer import Tokenizer
from miniglm.weights import weight_files

FORMAT = 1
"""Number of report.json's layout."""
JOURNAL, REQUEST, REPORT = "progress.jsonl", "request.json", "report.json"
AT_ONCE = 128
"""Questions between two lines of the journal: a stop loses at most so many."""
REFERENCE_TEMPERATURE, REFERENCE_TOP_K = 0.8, 100
"""How the reference samples the answers whose "perplexity" it reports."""
SELF_PERPLEXITY_QUESTIONS = 200
ALONE = 8
"""Questions that are asked one at a time, for the speed that a user sees."""


@dataclass(frozen=True, slots=True)
class Part:
    """Questions of one split. `total` is the number that the whole file has; `title`, `about` and `source` are for the
    reader of the report."""

    name: str
    title: str
    about: str
    source: str
    examples: Sequence[Example]
    total: int


@dataclass(frozen=True, slots=True)
class Text:
    """A text that the model was not trained on, as token ids."""

    source: str
    ids: Sequence[int]
    characters: int


@dataclass(frozen=True, slots=True)
class Subject:
    """What is evaluated, and what the report says about it beside the answers.

    Attributes:
        train: training examples; for the baseline, the leak check and what is copied. Empty where they are not known.
        losses: curves of the training stages, as in report.json.
        earlier: an earlier report to compare with.
        answerer: answers from the book, measured beside the model; None where there is no index.
        outside: questions that the book does not answer, which it should refuse.
    """

    name: str
    folder: Path
    model: GLM
    tokenizer: Tokenizer
    train: Sequence[Example] = ()
    losses: dict[str, Any] = field(default_factory=dict)
    earlier: dict[str, Any] | None = None
    answerer: Answerer | None = None
    outside: Sequence[Example] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are made. One sample is greedy unless a temperature is given."""

    samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 1337
    limit: int | None = None


Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""A progress bar: name and total in, a context manager that gives the callback (done) out."""


def evaluate(
    subject: Subject,
    parts: Sequence[Part],
    text: Text | None,
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    bar: Bar,
) -> dict[str, Any]:
    """Evaluates and writes the report into `folder`; a report already there is kept under a dated name.

    Args:
        resume: go on with an evaluation of the same things that was stopped.

    Raises:
        MiniGLMError: nothing to evaluate, or `resume` where what was stopped is something else.
    """
    if text is None and not any(part.examples for part in parts):
        raise MiniGLMError(
            "没有可以评测的问题或文字", path=subject.folder, fix="用 --qa 给出问答文件，或 --text 给出文字"
        )
    if subject.earlier is not None:
        _check_pairs(parts, subject.earlier)
    request = {"miniglm": __version__, "weights": _checksum(subject.folder), "settings": asdict(settings)}
    request["parts"] = {part.name: _fingerprint(part.examples) for part in parts}
    _open_folder(folder, request, resume)
    begun = time.monotonic()
    journal = _Journal(folder / JOURNAL)
    with bar("回答", sum(len(part.examples) for part in parts)) as progress:
        done = 0
        for part in parts:
            done = _answer(subject, part, settings, journal, progress, done)
    nearest = NearestQuestion(subject.train) if subject.train else None
    copies = CopyIndex(turn.answer for e in subject.train for turn in e.turns) if subject.train else None
    splits = []
    for part in parts:
        said = [journal.said[part.name, number] for number in range(len(part.examples))]
        about = {"name": part.name, "title": part.title, "about": part.about, "source": part.source}
        splits.append(about | {"total": part.total} | split_report(part.examples, said, nearest, copies))
        splits[-1]["with_book"] = _with_book(subject, part, splits[-1]["rows"], bar)
    held_out = {part.name: part.examples for part in parts if part.name != "train" and part.examples}
    config = subject.model.config
    report: dict[str, Any] = {
        "format": FORMAT,
        "miniglm": __version__,
        "made": datetime.now().isoformat(timespec="seconds"),
        "name": subject.name,
        "model": {
            "folder": str(subject.folder),
            "parameters": config.num_parameters,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocabulary": config.vocab_size,
            "context": config.max_position_embeddings,
        },
        "settings": asdict(settings) | {"max_new_tokens": _room(subject)},
        "text": None if text is None else {"source": text.source, "bits_per_character": _text_bits(subject, text)},
        "leaks": leak_report(subject.train, held_out) if subject.train and held_out else None,
        "missing": missing_extras(),
        "outside": _outside(subject),
        "splits": splits,
        "speed": _speed(subject, parts, journal, settings),
        "self_perplexity": _self_perplexity(subject, parts, settings),
        "losses": subject.losses,
        "against": None,
    }
    if subject.earlier is not None:
        report["against"] = against(report, subject.earlier)
    report["speed"]["seconds"] = round(time.monotonic() - begun, 1)
    write_page(report, folder, draw_all(report, folder))
    write_json(folder / REPORT, report, indent=None)  # last: a folder that has it is whole
    for name in (JOURNAL, REQUEST):
        (folder / name).unlink(missing_ok=True)
    return report


def _with_book(subject: Subject, part: Part, rows: Sequence[dict[str, Any]], bar: Bar) -> dict[str, Any] | None:
    """How the look-up answers the part's questions; its answers are added to the rows. None without an index, and for
    training questions, which it holds word for word."""
    if subject.answerer is None or part.name == "train" or not part.examples:
        return None
    with bar("查书", len(part.examples)) as progress:
        answers = answer_all(subject.answerer, [e.question for e in part.examples], progress)
    for row, answer in zip(rows, answers, strict=True):
        cited = answer.citations[: len(answer.statements)]
        row["with_book"] = {
            "answer": answer.text,
            "sources": [f"{c.label}{c.quoted}" for c in cited],
            "shown": with_sources(answer),
        }
    return measure(part.examples, answers)


def _outside(subject: Subject) -> dict[str, Any] | None:
    """Of the questions that the book does not answer, how many are refused."""
    if subject.answerer is None or not subject.outside:
        return None
    answers = answer_all(subject.answerer, [e.question for e in subject.outside])
    found = measure(subject.outside, answers)
    return {"questions": len(answers), "refused": found["refused"]}


def _check_pairs(parts: Sequence[Part], earlier: dict[str, Any]) -> None:
    """Refuses an earlier report that shares no question before anything is asked, not after."""
    theirs = {
        (split["name"], row["question"], row["reference"]) for split in earlier["splits"] for row in split["rows"]
    }
    if not any((part.name, e.question, e.answer) in theirs for part in parts for e in part.examples):
        raise MiniGLMError(
            f"--against 的报告（{earlier['name']}）和这次没有一道相同的题，比不了", fix="去掉 --against，或评测同样的题"
        )


def _checksum(folder: Path) -> str:
    return " ".join(file_digest(path) for path in weight_files(folder))


def _fingerprint(examples: Sequence[Example]) -> str:
    rows = [[e.system, [[t.question, t.answer] for t in e.turns], e.keys] for e in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()


def _open_folder(folder: Path, request: dict[str, Any], resume: bool) -> None:
    stopped = folder / REQUEST
    clean_temporaries(folder)
    if resume and stopped.exists() and not (folder / REPORT).exists():
        try:
            before = read_json(stopped, fix="")
        except MiniGLMError:
            before = {}
        changed = [key for key in request if before.get(key) != request[key]]
        if not changed:
            return
        names = {"miniglm": "miniglm 的版本", "weights": "模型的权重", "settings": "评测的设置", "parts": "题目"}
        raise MiniGLMError(
            f"停下的那次评测和这次的{'、'.join(names[key] for key in changed)}不同，不能接着做",
            path=folder,
            fix="去掉 --resume 重新评测（停下的那次会改名留着）",
        )
    keep_dated(folder)
    write_json(folder / REQUEST, request, indent=None)


class _Journal:
    """What the model said, line by line, each with its checksum. A line that is cut short or damaged is dropped, and
    its questions are asked again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.said: dict[tuple[str, int], Said] = {}
        self.seconds = 0.0
        if path.exists():
            # At line feeds only: an answer may hold what `str.splitlines` splits at, such as U+2028.
            whole = []
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, LookupError, TypeError):
                    self._take(unsealed(json.loads(line)))
                    whole.append(line + b"\n")
            write_whole(path, b"".join(whole))

    def _take(self, line: dict[str, Any]) -> None:
        self.seconds += line["seconds"]
        for number, answers, reasons, nats, tokens in line["rows"]:
            self.said[line["part"], number] = Said(tuple(answers), tuple(reasons), nats, tokens)

    def add(self, part: str, numbers: Sequence[int], said: Sequence[Said], seconds: float) -> None:
        """Keeps answers for good."""
        rows = [[n, s.answers, s.reasons, s.nats, s.tokens] for n, s in zip(numbers, said, strict=True)]
        line = {"part": part, "seconds": seconds, "rows": rows}
        append_line(self._path, json.dumps(sealed(line), ensure_ascii=False))
        self._take(line)


def _room(subject: Subject) -> int:
    return subject.model.config.max_position_embeddings // 2


def _sampling(subject: Subject, settings: Settings, sample: int) -> SamplingSettings:
    return SamplingSettings(
        max_new_tokens=_room(subject),
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed + sample,
        stop_ids=subject.tokenizer.stop_ids,
    )


def _answer(
    subject: Subject, part: Part, settings: Settings, journal: _Journal, progress: Callable[[int], None], done: int
) -> int:
    """Asks what the journal does not have yet; returns how many questions are done in all."""
    left = [n for n in range(len(part.examples)) if (part.name, n) not in journal.said]
    done += len(part.examples) - len(left)
    progress(done)
    left.sort(key=lambda n: len(part.examples[n].question))  # prompts of like length together
    engine, tokenizer = Engine(subject.model), subject.tokenizer
    for start in range(0, len(left), AT_ONCE):
        numbers = left[start : start + AT_ONCE]
        examples = [part.examples[n] for n in numbers]
        prompts = [prompt_of(tokenizer, e, engine.context, _room(subject)) for e in examples]
        begun = time.monotonic()
        made = [engine.generate(prompts, _sampling(subject, settings, s)) for s in range(settings.samples)]
        seconds = time.monotonic() - begun
        nats = reference_nats(subject.model, tokenizer, examples)
        said = [
            Said(
                tuple(tokenizer.decode(m[i].ids).strip() for m in made),
                tuple(m[i].finish_reason for m in made),
                *nats[i],
            )
            for i in range(len(numbers))
        ]
        journal.add(part.name, numbers, said, seconds)
        done += len(numbers)
        progress(done)
    return done


def reference_nats(model: GLM, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[tuple[float | None, int]]:
    """Of each reference answer with the token that closes it: -log p in nats on the full distribution, and the number
    of tokens. (None, 0) where there is no reference."""
    encoded = [
        encode_reference(tokenizer, e, model.config.max_position_embeddings) if e.answer else None for e in examples
    ]
    nats = iter(sequence_nats(model, [pair for pair in encoded if pair is not None]))
    return [(None, 0) if pair is None else (next(nats), len(pair[0]) - pair[1]) for pair in encoded]


def _text_bits(subject: Subject, text: Text) -> dict[str, Any]:
    """Bits per character with an interval over windows of the model's context; every token is a target once."""
    prefix, context = subject.tokenizer.prefix, subject.model.config.max_position_embeddings
    stride = context - len(prefix) + 1
    windows = [list(text.ids[start : start + stride]) for start in range(0, len(text.ids), stride)]
    nats = sequence_nats(subject.model, [(prefix + window, len(prefix)) for window in windows])
    # A character that a window's edge cuts is in neither; scaled, they add up to the text's.
    sizes = [len(subject.tokenizer.decode(window).replace("\ufffd", "")) for window in windows]
    scale = text.characters / max(1, sum(sizes)) * math.log(2)
    return interval(ratio_interval(nats, [size * scale for size in sizes]), "windows")


def _speed(subject: Subject, parts: Sequence[Part], journal: _Journal, settings: Settings) -> dict[str, Any]:
    """Characters a second of all questions together, and of some asked alone with the time to the first character."""
    made = sum(len(characters(a)) for said in journal.said.values() for a in said.answers)
    found: dict[str, Any] = {
        "questions": len(journal.said),
        "batched_seconds": round(journal.seconds, 2),
        "batched_characters_per_second": round(made / journal.seconds, 1) if journal.seconds else 0.0,
        "alone_characters_per_second": None,
        "first_character_seconds": None,
    }
    examples = spread([e for part in parts for e in part.examples], ALONE)
    engine, tokenizer = Engine(subject.model), subject.tokenizer
    first, rates = [], []
    for example in examples:
        prompt = prompt_of(tokenizer, example, engine.context, _room(subject))
        begun = time.perf_counter()
        ids: list[int] = []
        for step in engine.stream([prompt], _sampling(subject, settings, 0)):
            if not ids:
                first.append(time.perf_counter() - begun)
            ids.append(step[0][1])
        if ids:
            rates.append(len(characters(tokenizer.decode(ids))) / (time.perf_counter() - begun))
    if rates:
        found["alone_characters_per_second"] = interval(bootstrap_interval(rates))
        found["first_character_seconds"] = interval(bootstrap_interval(first))
    return found


def _self_perplexity(subject: Subject, parts: Sequence[Part], settings: Settings) -> dict[str, Any] | None:
    """The reference's "perplexity": of the model's own sampled answers under the distribution they were drawn from."""
    examples = spread(next((p.examples for p in parts if p.examples), ()), SELF_PERPLEXITY_QUESTIONS)
    sampling = Settings(temperature=REFERENCE_TEMPERATURE, top_k=REFERENCE_TOP_K, seed=settings.seed)
    values = [value for value in self_perplexities(subject, examples, sampling)[1] if value is not None]
    if not values:
        return None
    return {
        "interval": interval(bootstrap_interval(values)),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "values": [round(value, 4) for value in values],
    }


def self_perplexities(
    subject: Subject, examples: Sequence[Example], sampling: Settings
) -> tuple[list[str], list[float | None]]:
    """An answer sampled to each question, and exp of the mean -log p of its tokens under the distribution they were
    drawn from, in log space; None for an answer without a token.

    It measures how sure the model is of what it says, not how well it fits anything: a low value is no praise.
    """
    engine, tokenizer = Engine(subject.model), subject.tokenizer
    prompts = [prompt_of(tokenizer, e, engine.context, _room(subject)) for e in examples]
    made = engine.generate(prompts, [_sampling(subject, sampling, number) for number in range(len(prompts))])
    sequences = [(p + m.ids, len(p)) for p, m in zip(prompts, made, strict=True)]
    nats = sequence_nats(subject.model, sequences, temperature=sampling.temperature, top_k=sampling.top_k)
    answers = [tokenizer.decode(m.ids).strip() for m in made]
    return answers, [math.exp(n / len(m.ids)) if m.ids else None for n, m in zip(nats, made, strict=True)]


def sample_and_score(subject: Subject, prompts: Path, folder: Path, sampling: Settings) -> dict[str, Any]:
    """The reference's own evaluation: answers sampled to the questions of a text file, one a line, against
    `labels.txt` beside it. Writes rouge_l.png, perplexity.png and sample_eval.json into `folder`; what is there
    already is kept under a dated name.

    Raises:
        MiniGLMError: a file is missing or empty, or the two differ in their number of lines.
    """
    labels = prompts.with_name("labels.txt")
    if not labels.is_file():
        raise MiniGLMError("没有这个文件", path=labels, fix=f"--eval 要在 {prompts.name} 旁边有它，一行一个参考答案")
    questions, references = read_lines(prompts), read_lines(labels)
    if len(questions) != len(references):
        raise MiniGLMError(
            f"有 {len(references)} 个参考答案，{prompts.name} 有 {len(questions)} 个问题，应当一样多", path=labels
        )
    if not questions:
        raise MiniGLMError("没有问题", path=prompts, fix="一行一个问题")
    examples = [Example(turns=(Turn(q, a),)) for q, a in zip(questions, references, strict=True)]
    answers, perplexities = self_perplexities(subject, examples, sampling)
    overlaps = [rouge_l(characters(a), characters(r)).f1 for a, r in zip(answers, references, strict=True)]
    known = [value for value in perplexities if value is not None]
    found: dict[str, Any] = {
        "settings": asdict(sampling),
        "rouge_l": interval(bootstrap_interval(overlaps)),
        "self_perplexity": interval(bootstrap_interval(known)) if known else None,
        "rows": [
            {"question": q, "reference": r, "answer": a, "rouge_l": o, "self_perplexity": p}
            for q, r, a, o, p in zip(questions, references, answers, overlaps, perplexities, strict=True)
        ],
    }
    for name in ("rouge_l.png", "perplexity.png", "sample_eval.json"):
        keep_dated(folder / name)
    draw_histogram(overlaps, folder / "rouge_l.png", title="Sampled answers", xlabel="ROUGE-L F (characters)", high=1.0)
    if known:
        label = "self-perplexity (of the model's own samples)"
        draw_histogram(
            known, folder / "perplexity.png", title="Sampled answers", xlabel=label, low=1.0, high=1e4, log=True
        )
    write_whole(folder / "sample_eval.json", json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    return found
