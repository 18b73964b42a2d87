"""The stages of a run, each reading what the one before wrote in the run folder.

books → corpus → tokenizer → token arrays → plan → pretraining → finetuning → model. Every stage does what is
missing before it and says what it skipped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miniglm.chat import answer_questions
from miniglm.checkpoint import RunFolder, load_model, save_model
from miniglm.corpus import Paragraph, load_books, read_paragraphs, split, write_corpus
from miniglm.dataset import (
    Batches,
    PairRows,
    TextRows,
    read_pairs,
    read_tokens,
    validation_pair_batches,
    validation_text_batches,
    write_pairs,
    write_tokens,
)
from miniglm.errors import MiniGLMError
from miniglm.evaluation.measure import bits_per_character, key_accuracy
from miniglm.files import write_whole
from miniglm.generation import SamplingSettings
from miniglm.model import GLM
from miniglm.planning import LENGTHS, Plan, lengths, measure_gigaflops, plan
from miniglm.qa.formats import Example, read_examples, write_jsonl
from miniglm.qa.questions import normalize_question
from miniglm.recipe import Recipe, load_recipe
from miniglm.tokenizer import Tokenizer, resolve_tokenizer, train_tokenizer
from miniglm.training import Interrupted, TrainResult, train
from miniglm.ui import count_bar, download_bar, draw_losses, duration, say, training_bar

FROZEN = (
    ("corpus/summary.json", ("corpus.", "qa.")),
    ("tokens/meta.json", ("tokenizer.",)),
    ("plan.json", ("model.", "pretrain.", "finetune.", "run.seed")),
)
"""Which parts of a recipe have shaped what is on disk once a file is there: these an existing run does not change."""
MAY_CHANGE = ("qa.allow_bad_lines", *LENGTHS)
"""Ends of the keys among them that it changes all the same."""
TITLES = {"prepare": "语料和问答", "tokenize": "分词", "pretrain": "预训练", "finetune": "微调"}
EVALUATION_ROWS = 32


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        MiniGLMError: a device that this machine or this build of torch does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = name.split(":")[0]
    if not available.get(kind, False):
        have = "、".join(n for n, yes in available.items() if yes)
        raise MiniGLMError(f"设备 {name!r} 在这台机器上不可用，可用的有 {have}", fix="改用 --device auto")
    return torch.device(name)


class Run:
    """A run folder with its recipe.

    Args:
        path: the folder; made if it is not there.
        recipe: None takes the folder's own, or the default for a new one.

    Raises:
        MiniGLMError: not a run folder, made by another version, or the recipe changes what is already on disk.
    """

    def __init__(self, path: Path, recipe: Recipe | None = None) -> None:
        self.folder = RunFolder(path)
        self.folder.create_or_open()
        self.path = path
        saved = path / "recipe.toml"
        if recipe is None:
            recipe = load_recipe(saved if saved.exists() else None, {})
        elif saved.exists():
            _refuse_changes(saved, load_recipe(saved, {}), recipe)
        self.recipe = recipe
        write_whole(saved, recipe.to_toml())
        self.device = pick_device(recipe.run.device)
        self.told: set[str] = set()

    def skip(self, stage: str) -> None:
        """Says once that a stage is done already, unless this very process did it."""
        if stage not in self.told:
            self.told.add(stage)
            say(f"{TITLES[stage]}已完成，跳过")

    def note(self, **facts: Any) -> None:
        """Adds facts to results.json."""
        path = self.path / "results.json"
        write_whole(path, json.dumps(self.results() | facts, ensure_ascii=False, indent=2) + "\n")

    def results(self) -> dict[str, Any]:
        path = self.path / "results.json"
        found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return found

    def note_stage(self, name: str, seconds: float) -> None:
        """Remembers how long a stage took, in seconds; `skip` is then silent about it."""
        self.told.add(name)
        self.note(seconds=self.results().get("seconds", {}) | {name: round(seconds, 1)})


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _refuse_changes(path: Path, old: Recipe, new: Recipe) -> None:
    before, after = _flat(old.model_dump()), _flat(new.model_dump())
    frozen = [part for file, parts in FROZEN if (path.parent / file).exists() for part in parts]
    changed = [
        f"{key}：{before[key]} → {after[key]}"
        for key in before
        if before[key] != after[key] and key.startswith(tuple(frozen)) and not key.endswith(MAY_CHANGE)
    ]
    if changed:
        raise MiniGLMError(
            f"这个运行目录是用别的配方做的，不能改 {'；'.join(changed)}",
            path=path,
            fix="换一个 --out 目录，或去掉这些改动",
        )


def prepare(run: Run) -> None:
    """Books and question-answer sets in, clean text and examples out: RUN/corpus and RUN/qa."""
    corpus, qa = run.path / "corpus", run.path / "qa"
    if (corpus / "summary.json").exists() and (qa / "summary.json").exists():
        run.skip("prepare")
        return
    begun = time.monotonic()
    given = run.recipe.corpus
    with download_bar("取书") as progress:
        books = load_books(given.books, encoding=given.encoding, simplify=given.simplify, progress=progress)
    paragraphs = [paragraph for book in books for paragraph in book.paragraphs]
    parts = split(paragraphs, every=given.validation_every)
    for book in books:
        removed = sum(r.characters for r in book.removed.values())
        say(
            f"《{book.title}》：{book.characters:,} 字，{len(book.paragraphs):,} 段，{len(book.chapters)} 章，"
            f"编码 {book.encoding}，清洗去掉 {removed:,} 字"
        )
    sets: dict[str, list[Example]] = {}
    counts: dict[str, Any] = {}
    for name, files in (("train", run.recipe.qa.train), ("validation", run.recipe.qa.validation)):
        sets[name] = []
        for file in files:
            found = read_examples(Path(file), allow_bad=run.recipe.qa.allow_bad_lines)
            for bad in found.rejected:
                say(f"跳过 {bad.path} 第 {bad.line} 行：{bad.reason}")
            sets[name] += found.examples
            counts[file] = {"format": found.format, "examples": len(found.examples), "rejected": len(found.rejected)}
    if sets["train"] and not sets["validation"]:
        # Every tenth for validation, as in the reference.
        sets["validation"] = sets["train"][9::10]
        sets["train"] = [e for i, e in enumerate(sets["train"]) if i % 10 != 9]
    qa.mkdir(exist_ok=True)
    for name, examples in sets.items():
        write_jsonl(qa / f"{name}.jsonl", [_row(example) for example in examples])
    write_corpus(books, parts, corpus)
    write_whole(qa / "summary.json", json.dumps(counts, ensure_ascii=False, indent=2) + "\n")
    run.note_stage("prepare", time.monotonic() - begun)
    say(
        f"训练 {len(parts.train):,} 段、验证 {len(parts.validation):,} 段（{parts.duplicates_moved} 段因与训练部分重复移回训练）；"
        f"问答 训练 {len(sets['train']):,} 条、验证 {len(sets['validation']):,} 条"
    )


def _row(example: Example) -> dict[str, object]:
    """An example in a form that `read_examples` reads back."""
    if len(example.turns) == 1 and not example.system:
        kept = {k: v for k, v in example.extra.items() if k in ("chapter", "evidence")}
        row: dict[str, object] = {"question": example.question, "answer": example.answer} | kept
    else:
        messages = [{"role": "system", "content": example.system}] if example.system else []
        for turn in example.turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        row = {"messages": messages}
    if example.id:
        row["id"] = example.id
    if example.keys:
        row["keys"] = [list(group) for group in example.keys]
    return row


def examples(run: Run, name: str) -> list[Example]:
    """The run's `train` or `validation` questions and answers; empty where it has none."""
    path = run.path / "qa" / f"{name}.jsonl"
    return list(read_examples(path).examples) if path.exists() and path.stat().st_size else []


def _join(paragraphs: Sequence[Paragraph]) -> str:
    return "\n".join(p.text for p in paragraphs)


def tokenize(run: Run) -> None:
    """Trains or takes the tokenizer and writes the token arrays: RUN/tokenizer and RUN/tokens."""
    prepare(run)
    tokens = run.path / "tokens"
    if (tokens / "meta.json").exists():
        run.skip("tokenize")
        return
    begun = time.monotonic()
    text = {name: read_paragraphs(run.path / "corpus" / f"{name}.jsonl") for name in ("train", "validation")}
    pairs = {name: examples(run, name) for name in ("train", "validation")}
    given = run.recipe.tokenizer
    if given.kind == "bpe":
        qa_text = [part for e in pairs["train"] for turn in e.turns for part in (turn.question, turn.answer)]
        source = [p.text for p in text["train"]] + qa_text
        tokenizer = train_tokenizer(source, vocab_size=given.vocab_size, corpus_characters=sum(map(len, source)))
    else:
        tokenizer = resolve_tokenizer(given.kind)
    tokenizer.save(run.path / "tokenizer")
    tokens.mkdir(exist_ok=True)
    meta: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    for name, paragraphs in text.items():
        ids: list[int] = []
        books = list(dict.fromkeys(p.book for p in paragraphs))
        for book in books:  # a closing token between books, none between paragraphs: their order is the story
            ids += tokenizer.encode(_join([p for p in paragraphs if p.book == book]))
            ids += [tokenizer.end_of_text] if book != books[-1] else []
        write_tokens(tokens / f"{name}.npy", np.asarray(ids))
        meta[f"{name}_tokens"] = len(ids)
        meta[f"{name}_characters"] = len(_join(paragraphs))
        encoded = [
            tokenizer.encode_training_example(
                [(normalize_question(turn.question), turn.answer) for turn in e.turns], e.system
            )
            for e in pairs[name]
        ]
        write_pairs(tokens / f"pairs_{name}.npz", encoded)
        meta[f"{name}_pairs"] = len(encoded)
        meta[f"{name}_answer_characters"] = sum(len(turn.answer) for e in pairs[name] for turn in e.turns)
    write_whole(tokens / "meta.json", json.dumps(meta, indent=2) + "\n")
    run.note_stage("tokenize", time.monotonic() - begun)
    per_character = meta["validation_tokens"] / max(1, meta["validation_characters"])
    say(f"词表 {tokenizer.vocab_size:,}，每字 {per_character:.2f} 个 token，训练部分 {meta['train_tokens']:,} 个 token")


def _meta(run: Run) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((run.path / "tokens" / "meta.json").read_text("utf-8"))
    return meta


def make_plan(run: Run, seconds: float | None = None) -> Plan:
    """The run's plan: read back, or made now. Lengths that the recipe has since changed are taken over.

    Args:
        seconds: for both training stages; default: the recipe's minutes less a tenth for everything else.
    """
    tokenize(run)
    path = run.path / "plan.json"
    meta = _meta(run)
    if seconds is None and run.recipe.run.minutes is not None:
        seconds = 60 * run.recipe.run.minutes * 0.9
    known = Plan.from_json(json.loads(path.read_text("utf-8"))) if path.exists() else None
    if known is not None and known.recipe_lengths == lengths(run.recipe):
        return known
    made = plan(
        run.recipe,
        vocab_size=meta["vocab_size"],
        characters=meta["train_characters"] + meta["train_answer_characters"],
        tokens=meta["train_tokens"],
        gigaflops=known.gigaflops if known is not None else measure_gigaflops(run.device),
        seconds=seconds,
        has_pairs=meta["train_pairs"] > 0,
    )
    if known is not None:  # the weights on disk keep their sizes
        made = replace(made, model=known.model, context=known.context, dropout=known.dropout)
    write_whole(path, json.dumps(made.to_json(), indent=2) + "\n")
    say(
        f"这台机器矩阵乘法 {made.gigaflops:,.0f} GFLOP/s（{run.device.type}）；模型 {made.model.num_hidden_layers} 层、"
        f"宽 {made.model.hidden_size}、{made.model.num_parameters / 1e6:.1f} 百万参数，上下文 {made.context}"
    )
    return made


def _train(
    run: Run, made: Plan, name: str, model: GLM, tokenizer: Tokenizer, batches: Batches, evaluate: Any
) -> TrainResult:
    folder = run.path / name
    meta = _meta(run)
    begun = time.monotonic()

    def save_best(scores: dict[str, float]) -> None:
        save_model(folder / "model", model, tokenizer)

    title = TITLES[name]
    with training_bar(title, meta["train_characters"] / meta["train_tokens"]) as bar:
        result = train(
            model,
            batches,
            made.pretrain if name == "pretrain" else made.finetune,
            folder,
            evaluate=evaluate,
            save_best=save_best,
            on_progress=bar,
            on_evaluation=lambda: draw_losses(run.path),
        )
    write_whole(folder / "done.json", json.dumps(asdict(result), indent=2) + "\n")
    draw_losses(run.path)
    run.note_stage(name, result.elapsed)
    say(
        f"{title}完成：{result.steps} 步，最好的验证 {result.best['score']:.3f} 比特/字，用时 {duration(time.monotonic() - begun)}"
    )
    return result


def pretrain(run: Run, seconds: float | None = None) -> None:
    """Teaches the book's text to a new model: RUN/pretrain."""
    made = make_plan(run, seconds)
    if (run.path / "pretrain" / "done.json").exists():
        run.skip("pretrain")
        return
    tokenizer = Tokenizer.load(run.path / "tokenizer")
    model = GLM(made.model, made.dropout).initialize(run.recipe.run.seed).to(run.device)
    tokens = run.path / "tokens"
    text = TextRows(read_tokens(tokens / "train.npy"), made.context, tokenizer.prefix, run.recipe.run.seed)
    batches = Batches(text, None, made.pretrain.rows, 1.0)
    _train(run, made, "pretrain", model, tokenizer, batches, lambda: {"score": _text_bits(run, model, tokenizer, made)})


def _text_bits(run: Run, model: GLM, tokenizer: Tokenizer, made: Plan) -> float:
    tokens = read_tokens(run.path / "tokens" / "validation.npy")
    batches = validation_text_batches(tokens, made.context, tokenizer.prefix, EVALUATION_ROWS)
    return bits_per_character(model, batches, _meta(run)["validation_characters"])


def _answer_bits(run: Run, model: GLM, tokenizer: Tokenizer, made: Plan) -> float:
    pairs = read_pairs(run.path / "tokens" / "pairs_validation.npz")
    batches = validation_pair_batches(pairs, made.context, tokenizer.end_of_text, EVALUATION_ROWS)
    return bits_per_character(model, batches, _meta(run)["validation_answer_characters"])


def finetune(run: Run, seconds: float | None = None) -> None:
    """Teaches questions and answers to the pretrained model: RUN/finetune, and the finished model in RUN/model."""
    pretrain(run, seconds)
    if (run.path / "model" / "model.safetensors").exists() and (run.path / "finetune" / "done.json").exists():
        run.skip("finetune")
        return
    made = make_plan(run)
    if _meta(run)["train_pairs"] == 0:
        model, tokenizer = load_model(run.path / "pretrain" / "model")
        save_model(run.path / "model", model, tokenizer)
        say("没有问答，模型只会续写：miniglm sample")
        return
    model, tokenizer = load_model(run.path / "pretrain" / "model", device=str(run.device))
    model.dropout = made.dropout
    tokens, seed = run.path / "tokens", run.recipe.run.seed + 1
    pairs = PairRows(read_pairs(tokens / "pairs_train.npz"), made.context, seed, tokenizer.end_of_text)
    if pairs.truncated:
        say(f"{pairs.truncated} 条问答长于上下文 {made.context}，答案的末尾被截去")
    share = made.text_share
    text = TextRows(read_tokens(tokens / "train.npy"), made.context, tokenizer.prefix, seed) if share > 0 else None
    batches = Batches(text, pairs, made.finetune.rows, share)
    _train(
        run, made, "finetune", model, tokenizer, batches, lambda: {"score": _answer_bits(run, model, tokenizer, made)}
    )
    best, _ = load_model(run.path / "finetune" / "model")
    save_model(run.path / "model", best, tokenizer)


def score(run: Run, *, limit: int | None = None) -> dict[str, Any]:
    """What the finished model reached, on data it was not trained on and, for comparison, on training questions.

    Args:
        limit: at most so many questions of each part; default all of validation and as many of training.
    """
    begun = time.monotonic()
    made = make_plan(run)
    model, tokenizer = load_model(run.path / "model", device=str(run.device))
    found: dict[str, Any] = {"text_bits_per_character": round(_text_bits(run, model, tokenizer, made), 4)}
    validation = examples(run, "validation")
    if validation:
        found["answer_bits_per_character"] = round(_answer_bits(run, model, tokenizer, made), 4)
    settings = SamplingSettings(max_new_tokens=made.context // 2, stop_ids=tokenizer.stop_ids)
    train_examples = examples(run, "train")
    count = min(limit or len(validation), len(validation))

    def spread(part: list[Example]) -> list[Example]:
        """`count` of them from the whole book, not from its first chapters."""
        return part[:: max(1, len(part) // max(1, count))][:count]

    for name, part in (("validation", spread(validation)), ("train", spread(train_examples))):
        if not part:
            continue
        with count_bar("验证题" if name == "validation" else "训练题", len(part)) as bar:
            answers = answer_questions(model, tokenizer, part, settings, progress=bar)
        accuracy, marked = key_accuracy(answers, part)
        found[f"{name}_key_accuracy"] = None if accuracy is None else round(accuracy, 4)
        found[f"{name}_questions"] = marked
        write_jsonl(
            run.path / f"answers_{name}.jsonl",
            [_row(e) | {"prediction": answer} for e, answer in zip(part, answers, strict=True)],
        )
    found["peak_memory_mib"] = peak_memory()
    run.note(**found)
    run.note_stage("score", time.monotonic() - begun)
    return found


def peak_memory() -> int | None:
    """The process's largest resident size so far, MiB; None on Windows, where the standard library does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def find_model(path: Path, *, pretrained: bool = False) -> Path:
    """The model folder that a user means by a run folder or by a model folder.

    Args:
        pretrained: prefer the model as it was before finetuning (to continue text).

    Raises:
        MiniGLMError: neither.
    """
    if (path / "config.json").exists():
        return path
    order = ("pretrain/model", "model") if pretrained else ("model", "finetune/model", "pretrain/model")
    for name in order:
        if (path / name / "config.json").exists():
            return path / name
    if not path.exists():
        raise MiniGLMError("没有这个目录", path=path, fix="先运行 miniglm demo，或给出一个运行目录或模型目录")
    raise MiniGLMError(
        "这里没有训练好的模型", path=path, fix="给出运行目录（里面有 model/）或模型目录（里面有 config.json）"
    )


__all__ = ["Interrupted", "Run", "examples", "find_model", "finetune", "prepare", "pretrain", "score", "tokenize"]


SCORE_SHARE = 0.08
"""Share of the minutes kept for scoring, loading and drawing."""
SHOWN = 5
"""Validation questions that the demo shows with their answers."""


def demo(run: Run, begun: float) -> None:
    """Everything up to a scored model within the recipe's minutes, counted from `begun` (time.monotonic)."""
    tokenize(run)
    seconds = None
    if run.recipe.run.minutes is not None:
        total = 60 * run.recipe.run.minutes
        seconds = max(0.25 * total, total * (1 - SCORE_SHARE) - (time.monotonic() - begun))
    finetune(run, seconds)
    if "text_bits_per_character" not in run.results():
        score(run, limit=None if (run.recipe.run.minutes or 0) >= 5 else 200)
        run.note_stage("all", time.monotonic() - begun)


def report_lines(run: Run) -> list[str]:
    """What the run reached, for a reader: scores on validation data, then a few questions with their answers."""
    results = run.results()
    lines = [f"验证部分的小说：{results['text_bits_per_character']:.2f} 比特/字（越低越好，模型没有见过这些段落）"]
    if "answer_bits_per_character" in results:
        lines.append(f"验证题的参考答案：{results['answer_bits_per_character']:.2f} 比特/字")
    for name, title in (("validation", "验证题（同样的事实，没见过的问法）"), ("train", "训练题（见过的问法）")):
        if results.get(f"{name}_key_accuracy") is not None:
            lines.append(
                f"{title}：{results[f'{name}_key_accuracy']:.1%} 答对要点（{results[f'{name}_questions']} 题）"
            )
    path = run.path / "answers_validation.jsonl"
    if path.exists():
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        step = max(1, len(rows) // SHOWN)
        for row in rows[step // 2 :: step][:SHOWN]:
            question = row.get("question") or row["messages"][-2]["content"]
            answer = row.get("answer") or row["messages"][-1]["content"]
            lines += ["", f"问：{question}", f"答：{row['prediction']}", f"（参考：{answer}）"]
    return lines
