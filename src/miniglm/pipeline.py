"""The stages of a run, each reading what the one before wrote in the run folder.

books → corpus → tokenizer → token arrays → plan → pretraining → finetuning → model. Every stage does what is
missing before it and says what it skipped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from miniglm.bulk_encoding import BulkEncoder
from miniglm.checkpoint import RunFolder, load_model, save_model
from miniglm.corpus import Paragraph, large, load_books, read_paragraphs, split, write_corpus
from miniglm.dataset import (
    Batch,
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
from miniglm.distributed import launch
from miniglm.distributed.choice import sharded_if, whole_weights
from miniglm.distributed.team import on_first, share, tell, total
from miniglm.errors import MiniGLMError
from miniglm.evaluation.evaluate import FORMAT as REPORT_FORMAT
from miniglm.evaluation.evaluate import Part, Settings, Subject, Text
from miniglm.evaluation.evaluate import evaluate as write_report
from miniglm.evaluation.measure import bits_per_character
from miniglm.evaluation.pictures import draw_losses
from miniglm.files import check_digests, file_digests, keep_dated, read_json, write_json, write_whole
from miniglm.large_tokens import tokenize_shards, training_tokens
from miniglm.locate import find_model, pick_device
from miniglm.lookup import answerer_of, has_index, is_current
from miniglm.model import GLM
from miniglm.planning import LENGTHS, UTILISATION, Plan, choose_precision, lengths, measure_gigaflops, plan
from miniglm.qa.formats import Example, read_examples, to_row, write_jsonl
from miniglm.qa.leaks import split_every_tenth
from miniglm.qa.offline import offline_sets, write_offline_sets
from miniglm.qa.questions import normalize_question
from miniglm.qa.spread import spread
from miniglm.recipe import Recipe, load_recipe
from miniglm.tokenizer import MAX_TRAINING_CHARACTERS, Tokenizer, resolve_tokenizer, train_tokenizer
from miniglm.training import EVALUATIONS, Interrupted, Stage, TrainResult, train
from miniglm.ui import count_bar, download_bar, duration, say, stage_curves, training_bar
from miniglm.weights import has_weights

FROZEN = (
    ("corpus/summary.json", ("corpus.", "qa.")),
    ("tokens/meta.json", ("tokenizer.",)),
    ("plan.json", ("model.", "pretrain.", "finetune.", "run.seed")),
)
"""Which parts of a recipe have shaped what is on disk once a file is there: these an existing run does not change."""
MAY_CHANGE = ("qa.allow_bad_lines", *LENGTHS)
"""Ends of the keys among them that it changes all the same."""
TITLES = {
    "prepare": "语料和问答",
    "tokenize": "分词",
    "pretrain": "预训练",
    "finetune": "微调",
    "index": "查找",
    "evaluate": "评测",
}
EVALUATION_ROWS = 32
VALIDATION_SHARE = 0.05
"""Of a training stage's time that goes into validating, about."""
VALIDATION_ROWS = 16
"""But no fewer rows, where there are as many: the best weights are chosen by them."""
ENCODED_AT_ONCE = 2**20
"""Characters of a corpus that are encoded at once."""
WHOLE = {"prepare": ("corpus", "qa"), "tokenize": ("tokens",)}
"""Of the stages that write data: their folders, each with the checksums of its files in the last one written."""


class Run:
    """A run folder with its recipe. Of processes that train together the first one holds it; all must see it.

    Args:
        path: the folder; made if it is not there.
        recipe: None takes the folder's own, or the default for a new one.
        evaluating: open a run that is there to read it and write its report; another process may work on the rest.
        shard: training processes hold a share of the model each.

    Raises:
        MiniGLMError: not a run folder, made by another version, or the recipe changes what is already on disk.
    """

    def __init__(
        self, path: Path, recipe: Recipe | None = None, *, evaluating: bool = False, shard: bool = False
    ) -> None:
        self.folder = RunFolder(path)
        self.path, self.shard = path, shard
        opened = on_first(lambda: self._open(recipe, evaluating))
        self.recipe = opened or self._read()
        self.device = pick_device(self.recipe.run.device)
        self.told: set[str] = set()

    def _open(self, recipe: Recipe | None, evaluating: bool) -> Recipe:
        if evaluating:
            self.folder.open_to_evaluate()
        else:
            self.folder.create_or_open()
        saved = self.path / "recipe.toml"
        if recipe is None:
            recipe = load_recipe(saved if saved.exists() else None, {})
        elif saved.exists():
            _refuse_changes(saved, load_recipe(saved, {}), recipe)
        if not evaluating:
            write_whole(saved, recipe.to_toml())
        return recipe

    def _read(self) -> Recipe:
        """What the first process has opened.

        Raises:
            MiniGLMError: it is not to be seen from here.
        """
        saved = self.path / "recipe.toml"
        if not saved.exists():
            raise MiniGLMError(
                f"进程 {launch.rank()} 看不到第一个进程打开的运行目录",
                path=self.path.resolve(),
                fix="多台机器一起训练时，--out 要在共享的文件系统上，各台机器上路径相同",
            )
        return load_recipe(saved, {})

    def done(self, *names: str) -> bool:
        """Whether all these files are there, as the first process finds."""
        return bool(tell(all((self.path / name).exists() for name in names)))

    def skip(self, stage: str) -> None:
        """Says once that a stage is done already, unless this very process did it.

        Raises:
            MiniGLMError: a file that it wrote has changed since.
        """
        if stage not in self.told:
            self.told.add(stage)
            for name in WHOLE.get(stage, ()):
                folder = self.path / name
                fix = f"删去 {folder} 再运行，会重新做出来"
                mark = read_json(folder / ("meta.json" if name == "tokens" else "summary.json"), fix=fix)
                check_digests(folder, mark.get("files", {}), fix=fix)
            say(f"{TITLES[stage]}已完成，跳过")

    def note(self, **facts: Any) -> None:
        """Adds facts to results.json."""
        write_json(self.path / "results.json", self.results() | facts)

    def results(self) -> dict[str, Any]:
        """What results.json says. Nothing depends on it: a damaged one is kept under a dated name."""
        path = self.path / "results.json"
        try:
            return read_json(path, fix="") if path.exists() else {}
        except MiniGLMError as error:
            say(f"{error.path}：{error.what}；改名留着，重新记")
            keep_dated(path)
            return {}

    def note_stage(self, name: str, seconds: float) -> None:
        """Remembers how long a stage took, in seconds; `skip` is then silent about it."""
        self.told.add(name)
        self.note(seconds=self.results().get("seconds", {}) | {name: round(seconds, 1)})


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _changes(before: dict[str, Any], after: dict[str, Any], keys: Sequence[str]) -> str:
    """Those settings of `keys` that differ, with both values; "" where none does."""

    def shown(value: Any) -> str:
        return "没有设" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    return "；".join(
        f"{key}：{shown(before.get(key))} → {shown(after[key])}" for key in keys if before.get(key) != after[key]
    )


def _refuse_changes(path: Path, old: Recipe, new: Recipe) -> None:
    before, after = _flat(old.model_dump()), _flat(new.model_dump())
    frozen = [part for file, parts in FROZEN if (path.parent / file).exists() for part in parts]
    fixed = [key for key in before if key.startswith(tuple(frozen)) and not key.endswith(MAY_CHANGE)]
    if changed := _changes(before, after, fixed):
        raise MiniGLMError(
            f"这个运行目录是用别的配方做的，不能改 {changed}",
            path=path,
            fix="换一个 --out 目录，或去掉这些改动",
        )


def prepare(run: Run) -> None:
    """Books and question-answer sets in, clean text and examples out: RUN/corpus and RUN/qa."""
    corpus, qa = run.path / "corpus", run.path / "qa"
    if (corpus / "summary.json").exists() and (qa / "summary.json").exists():
        run.skip("prepare")
        _write_texts(run)
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
    given_qa = run.recipe.qa
    for name in ("train", "validation", "unseen", "outside"):
        files: list[str] = getattr(given_qa, name)
        sets[name] = []
        for file in files:
            found = read_examples(Path(file), need_answer=name != "outside", allow_bad=given_qa.allow_bad_lines)
            for bad in found.rejected:
                say(f"跳过 {bad.path} 第 {bad.line} 行：{bad.reason}")
            sets[name] += found.examples
            counts[file] = {"format": found.format, "examples": len(found.examples), "rejected": len(found.rejected)}
    if sets["train"] and not sets["validation"]:
        halves = split_every_tenth(sets["train"])
        sets |= {"train": halves.train, "validation": halves.validation}
    qa.mkdir(exist_ok=True)
    for name, examples in sets.items():
        write_jsonl(qa / f"{name}.jsonl", [to_row(example) for example in examples])
    write_corpus(books, parts, corpus)
    write_json(qa / "summary.json", counts | {"files": file_digests(qa, [f"{name}.jsonl" for name in sets])})
    run.note_stage("prepare", time.monotonic() - begun)
    say(
        f"训练 {len(parts.train):,} 段、验证 {len(parts.validation):,} 段（{parts.duplicates_moved} 段因与训练部分重复移回训练）；"
        f"问答 训练 {len(sets['train']):,} 条、验证 {len(sets['validation']):,} 条、没教过的 {len(sets['unseen']):,} 条"
    )
    _write_texts(run)


def _write_texts(run: Run) -> None:
    """The recipe's further text, in shards: RUN/texts."""
    given = run.recipe.corpus
    if not given.texts or (run.path / "texts" / large.SUMMARY).exists():
        return
    begun = time.monotonic()
    with download_bar("读入大语料") as progress:
        shards = large.write_shards(given.texts, run.path / "texts", simplify=bool(given.simplify), progress=progress)
    characters, documents = (sum(shard[key] for shard in shards) for key in ("characters", "documents"))
    if not characters:
        raise MiniGLMError("corpus.texts 里没有文字", path=run.path / "recipe.toml", fix="换别的来源")
    say(f"大语料 {documents:,} 篇、{characters:,} 字，分成 {len(shards)} 份，用时 {duration(time.monotonic() - begun)}")


def open_offline(path: Path, recipe: Recipe) -> Run:
    """A run on the question sets that rules find in its own books, in RUN/offline; a rerun takes those that are there.

    The sets are found before anything is written, so that a book without any leaves nothing behind.

    Raises:
        MiniGLMError: the books cannot be read or the rules find too little in them; and as `Run`.
    """
    folder = path / "offline"
    files = {name: folder / f"{name}.jsonl" for name in ("train", "validation", "unseen")}
    sets = None
    if not all(file.exists() for file in files.values()):
        given = recipe.corpus
        with download_bar("取书") as progress:
            books = load_books(given.books, encoding=given.encoding, simplify=given.simplify, progress=progress)
        sets = offline_sets(books)
    qa = recipe.qa.model_copy(update={name: [str(file.resolve())] for name, file in files.items()})
    run = Run(path, recipe.model_copy(update={"qa": qa}))
    if sets is not None:
        write_offline_sets(sets, folder)
        counts = "、".join(
            f"{title} {len(sets[name]):,} 条"
            for name, title in (("train", "训练"), ("validation", "验证"), ("unseen", "没教过的"))
        )
        say(f"用规则从书里出了题：{counts}（{folder}）。只问谁说的、下一句、缺的名字和第几回，远不如人写的或大模型出的")
    return run


def examples(run: Run, name: str) -> list[Example]:
    """The run's `train`, `validation`, `unseen` or `outside` questions and answers; empty where it has none."""
    path = run.path / "qa" / f"{name}.jsonl"
    if not path.exists() or not path.stat().st_size:
        return []
    return list(read_examples(path, need_answer=name != "outside").examples)


def _join(paragraphs: Sequence[Paragraph]) -> str:
    return "\n".join(p.text for p in paragraphs)


def encode_lines(encoder: BulkEncoder, lines: Iterable[str]) -> NDArray[Any]:
    """Token ids of the lines with newlines between them, `ENCODED_AT_ONCE` characters at a time: beside the ids, two
    bytes each where they fit, only so much is in memory."""
    ids = bytearray()
    waiting: list[str] = []
    size = 0
    for line in lines:
        if size > ENCODED_AT_ONCE:
            # No token reaches across: the pre-tokenizer never joins a newline with the letters after it.
            ids += encoder.encode("\n".join([*waiting, ""])).tobytes()
            waiting, size = [], 0
        waiting.append(line)
        size += len(line)
    ids += encoder.encode("\n".join(waiting)).tobytes()
    return np.frombuffer(ids, encoder.dtype)


def tokenize(run: Run, processes: int | None = None) -> None:
    """Trains or takes the tokenizer and writes the token arrays: RUN/tokenizer and RUN/tokens.

    Args:
        processes: how many tokenize a large corpus at once; default: one a core.
    """
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
        if run.recipe.corpus.texts:
            room = MAX_TRAINING_CHARACTERS - sum(map(len, source))
            source += large.sample(run.path / "texts", max(room, MAX_TRAINING_CHARACTERS // 2))
        tokenizer = train_tokenizer(source, vocab_size=given.vocab_size, corpus_characters=sum(map(len, source)))
    else:
        tokenizer = resolve_tokenizer(given.kind)
    tokenizer.save(run.path / "tokenizer")
    tokens.mkdir(exist_ok=True)
    meta: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    encoder = BulkEncoder(tokenizer)
    for name, paragraphs in text.items():
        parts: list[NDArray[Any]] = []
        books = list(dict.fromkeys(p.book for p in paragraphs))
        for book in books:  # a closing token between books, none between paragraphs: their order is the story
            parts.append(encode_lines(encoder, (p.text for p in paragraphs if p.book == book)))
            parts += [np.array([tokenizer.end_of_text], parts[-1].dtype)] if book != books[-1] else []
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.uint16)])
        write_tokens(tokens / f"{name}.npy", ids)
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
    if run.recipe.corpus.texts:
        held_out = {p.text for p in text["validation"]}
        with count_bar("分词", len(large.read_shards(run.path / "texts"))) as bar:
            shards = tokenize_shards(
                run.path / "texts",
                tokens,
                run.path / "tokenizer",
                held_out=held_out,
                processes=processes,
                progress=bar,
            )
        meta["shards"] = shards
        meta["train_tokens"] += sum(shard["tokens"] for shard in shards)
        meta["train_characters"] += sum(shard["characters"] for shard in shards)
    names = [f"{name}.npy" for name in text] + [f"pairs_{name}.npz" for name in text]
    write_json(tokens / "meta.json", meta | {"files": file_digests(tokens, [*names, "../tokenizer/tokenizer.json"])})
    run.note_stage("tokenize", time.monotonic() - begun)
    per_character = meta["validation_tokens"] / max(1, meta["validation_characters"])
    say(f"词表 {tokenizer.vocab_size:,}，每字 {per_character:.2f} 个 token，训练部分 {meta['train_tokens']:,} 个 token")


def token_meta(run: Run) -> dict[str, Any]:
    """Counts of the run's token arrays."""
    return read_json(run.path / "tokens" / "meta.json", fix=f"删去 {run.path / 'tokens'} 再运行，会重新做出来")


def read_plan(path: Path) -> Plan:
    """A run's plan.json.

    Raises:
        MiniGLMError: damaged, or of another version.
    """
    fix = "换一个 --out 重新训练；已有的 model 目录不受影响"
    try:
        return Plan.from_json(read_json(path, fix=fix))
    except (ValueError, LookupError, TypeError) as error:
        raise MiniGLMError(f"不是这个版本的训练计划（{error}）", path=path, fix=fix) from None


def make_plan(run: Run, seconds: float | None = None) -> Plan:
    """The run's plan: read back, or made now. Lengths that the recipe has since changed are taken over.

    Args:
        seconds: for both training stages; default: the recipe's minutes less a tenth for everything else.
    """
    return on_first(lambda: _make_plan(run, seconds)) or read_plan(run.path / "plan.json")


def _make_plan(run: Run, seconds: float | None) -> Plan:
    tokenize(run)
    path = run.path / "plan.json"
    meta = token_meta(run)
    if seconds is None and run.recipe.run.minutes is not None:
        seconds = 60 * run.recipe.run.minutes * 0.9
    known = read_plan(path) if path.exists() else None
    if known is not None and known.recipe_lengths == lengths(run.recipe):
        return known
    if known is not None and _trained(run, has_pairs=meta["train_pairs"] > 0):
        before, after = (_flat(own) for own in (known.recipe_lengths, lengths(run.recipe)))
        changed = _changes(before, after, list(after)).replace("minutes", "run.minutes")
        say(f"这个运行已经训练完，不会因为改了时长再训练（{changed}）；要重新训练，换一个 --out 目录")
        return known
    precision = known.pretrain.precision if known is not None else choose_precision(run.device)
    # The rule's constants were settled with float32's speed on CPUs, whatever these train in.
    counted = "float32" if run.device.type == "cpu" else precision
    made = plan(
        run.recipe,
        vocab_size=meta["vocab_size"],
        characters=meta["train_characters"] + meta["train_answer_characters"],
        tokens=meta["train_tokens"],
        gigaflops=known.gigaflops if known is not None else launch.size() * measure_gigaflops(run.device, counted),
        precision=precision,
        seconds=seconds,
        has_pairs=meta["train_pairs"] > 0,
    )
    if known is not None:  # the weights on disk keep their sizes
        made = replace(made, model=known.model, context=known.context, dropout=known.dropout)
    write_json(path, made.to_json())
    machines = "这台机器" if launch.size() == 1 else f"{launch.size()} 个进程一共"
    say(
        f"{machines}矩阵乘法 {made.gigaflops:,.0f} GFLOP/s（{run.device.type}）；模型 {made.model.num_hidden_layers} 层、"
        f"宽 {made.model.hidden_size}、{made.model.num_parameters / 1e6:.1f} 百万参数，上下文 {made.context}"
    )
    return made


def _trained(run: Run, *, has_pairs: bool) -> bool:
    """Whether both stages are over, the second where there is something to finetune on."""
    over = [run.path / name / "done.json" for name in ("pretrain", *(("finetune",) if has_pairs else ()))]
    return all(path.exists() for path in over) and has_weights(run.path / "model")


def train_stage(
    run: Run,
    made: Plan,
    name: str,
    model: GLM,
    batches: Batches,
    every: int,
    evaluate: Callable[[], dict[str, float]],
    save: Callable[[Path, Mapping[str, Tensor]], None],
) -> TrainResult:
    """Trains a stage and notes how it went; `save` writes the best model so far, whose weights it is given, to a
    folder, by the first process. Every so-manieth row of the validation data is what `evaluate` measures."""
    folder = run.path / name
    meta = token_meta(run)
    begun = time.monotonic()

    def draw() -> None:
        draw_losses(stage_curves(run.path), run.path / "loss.png")

    def save_best(scores: dict[str, float]) -> None:
        weights = whole_weights(model)
        on_first(lambda: save(folder / "model", weights))

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
            on_evaluation=draw,
            warn=say,
        )

    def note() -> None:
        write_json(folder / "done.json", asdict(result))
        draw()
        run.note_stage(name, result.elapsed)

    on_first(note)
    part = "" if every == 1 else f"（验证数据的 1/{every}）"
    score = f"{result.best['score']:.3f} 比特/字{part}"
    say(f"{title}完成：{result.steps} 步，最好的验证 {score}，用时 {duration(time.monotonic() - begun)}")
    return result


def pretrain(run: Run, seconds: float | None = None) -> None:
    """Teaches the book's text to a new model: RUN/pretrain."""
    made = make_plan(run, seconds)
    if run.done("pretrain/done.json"):
        run.skip("pretrain")
        return
    tokenizer = Tokenizer.load(run.path / "tokenizer")
    model = GLM(made.model, made.dropout).initialize(run.recipe.run.seed)
    model = sharded_if(run.shard, model, run.device)
    tokens = run.path / "tokens"
    text = TextRows(
        training_tokens(tokens, token_meta(run).get("shards", [])), made.context, tokenizer.prefix, run.recipe.run.seed
    )
    batches = Batches(text, None, made.pretrain.rows, 1.0)
    every = validation_rows(run, made, made.pretrain, pairs=False)
    train_stage(
        run,
        made,
        "pretrain",
        model,
        batches,
        every,
        lambda: {"score": text_bits(run, model, tokenizer, made, every)},
        lambda folder, weights: save_model(folder, model, tokenizer, weights=weights),
    )


def text_bits(run: Run, model: GLM, tokenizer: Tokenizer, made: Plan, every: int = 1) -> float:
    """Bits per character of the books' validation part, or of every so-manieth row of it."""
    tokens = read_tokens(run.path / "tokens" / "validation.npy")
    batches = validation_text_batches(tokens, made.context, tokenizer.prefix, EVALUATION_ROWS, every)
    return _bits(model, batches, token_meta(run)["validation_characters"] / max(1, len(tokens)))


def answer_bits(run: Run, model: GLM, tokenizer: Tokenizer, made: Plan, every: int = 1) -> float:
    """Bits per character of the validation questions' answers, or of every so-manieth row of them."""
    pairs = read_pairs(run.path / "tokens" / "pairs_validation.npz")
    batches = validation_pair_batches(pairs, made.context, tokenizer.end_of_text, EVALUATION_ROWS, every)
    return _bits(model, batches, token_meta(run)["validation_answer_characters"] / max(1, int(pairs.targets.sum())))


def _bits(model: GLM, batches: Iterable[Batch], characters_per_target: float) -> float:
    targets = 0

    def counted() -> Iterator[Batch]:
        nonlocal targets
        for batch in share(batches):
            targets += batch.targets
            yield batch

    bits = total(bits_per_character(model, counted(), 1))
    return bits / (total(targets) * characters_per_target)


def validation_rows(run: Run, made: Plan, stage: Stage, *, pairs: bool) -> int:
    """Every how-manieth row of the validation text or pairs is measured while a stage trains, so that it takes near
    `VALIDATION_SHARE` of its time: a loss alone costs a third of what its gradient costs too (`flops_per_token`)."""
    tokens = int(token_meta(run)["validation_tokens"])
    if pairs:
        tokens = len(read_pairs(run.path / "tokens" / "pairs_validation.npz").ids)
    if stage.steps is not None:
        trained = float(stage.steps * stage.rows * made.context)
    else:
        speed = 1e9 * made.gigaflops * UTILISATION / made.model.flops_per_token(made.context)
        trained = 60 * (stage.minutes or 0.0) * speed
    times = stage.steps // stage.evaluate_every if stage.steps and stage.evaluate_every else EVALUATIONS
    every = tokens * max(1, times) / max(1.0, VALIDATION_SHARE * 3 * trained)
    return max(1, min(round(every), tokens // (VALIDATION_ROWS * made.context)))


def finetune(run: Run, seconds: float | None = None) -> None:
    """Teaches questions and answers to the pretrained model: RUN/finetune, and the finished model in RUN/model."""
    pretrain(run, seconds)
    if run.done("finetune/done.json") and tell(has_weights(run.path / "model")):
        run.skip("finetune")
        return
    made = make_plan(run)
    if token_meta(run)["train_pairs"] == 0:
        on_first(lambda: _copy_model(run, "pretrain"))
        say("没有问答，模型只会续写：miniglm sample")
        return
    model, tokenizer = load_model(run.path / "pretrain" / "model")
    model = sharded_if(run.shard, model, run.device)
    model.dropout = made.dropout
    tokens, seed = run.path / "tokens", run.recipe.run.seed + 1
    pairs = PairRows(read_pairs(tokens / "pairs_train.npz"), made.context, seed, tokenizer.end_of_text)
    if pairs.truncated:
        say(f"{pairs.truncated} 条问答长于上下文 {made.context}，答案的末尾被截去")
    share = made.text_share
    text = TextRows(read_tokens(tokens / "train.npy"), made.context, tokenizer.prefix, seed) if share > 0 else None
    batches = Batches(text, pairs, made.finetune.rows, share)
    every = validation_rows(run, made, made.finetune, pairs=True)
    train_stage(
        run,
        made,
        "finetune",
        model,
        batches,
        every,
        lambda: {"score": answer_bits(run, model, tokenizer, made, every)},
        lambda folder, weights: save_model(folder, model, tokenizer, weights=weights),
    )
    on_first(lambda: _copy_model(run, "finetune"))


def _copy_model(run: Run, stage: str) -> None:
    """The best model of a stage becomes the run's."""
    save_model(run.path / "model", *load_model(run.path / stage / "model"))


def paragraphs_of(run: Run) -> list[Paragraph]:
    """All paragraphs of the run's corpus, of both parts, each book's in order."""
    found = [p for name in ("train", "validation") for p in read_paragraphs(run.path / "corpus" / f"{name}.jsonl")]
    order = {book: number for number, book in enumerate(dict.fromkeys(p.book for p in found))}
    return sorted(found, key=lambda p: (order[p.book], p.number))


def index(run: Run) -> None:
    """Lays down what answers are looked up in: RUN/index, from the corpus and the training questions. Needs no model."""
    prepare(run)
    if is_current(run.path / "index"):
        run.skip("index")
        return
    if has_index(run.path / "index"):
        say("查找的索引是别的版本建的，重新建")
    from miniglm.lookup.build import build_index
    from miniglm.lookup.pairs import MOST_TEXT
    from miniglm.lookup.texts import text_parts, text_sample

    begun = time.monotonic()
    texts = run.path / "texts" if run.recipe.corpus.look_up_texts else None
    outside = [e.question for e in examples(run, "outside") if e.extra.get("part") != "test"]
    with count_bar("查找", 100) as bar:
        made = build_index(
            paragraphs_of(run),
            examples(run, "train"),
            outside,
            run.path / "index",
            seconds=seconds_of(ENCODER, run.recipe.run.minutes or 10),
            seconds_reranking=reranking_seconds(run.recipe.run.minutes or 10),
            seed=run.recipe.run.seed,
            texts=text_parts(texts) if texts else (),
            sample=text_sample(texts, MOST_TEXT // 2) if texts else (),
            progress=lambda share: bar(round(100 * share)),
        )
    run.note_stage("index", time.monotonic() - begun)
    say(
        f"查找完成：{made['passages']:,} 段书、{made['facts']:,} 个教过的事实，用时 {duration(time.monotonic() - begun)}"
    )


SPLITS = {
    "validation": ("验证题", "训练时教过的事实，换了没见过的问法"),
    "unseen": ("没教过的题", "训练问答里没有的事实，只有书里讲到"),
    "train": ("训练题", "训练时见过的问法"),
}
"""The parts of a run's questions in the order of the report: title, and what the part is."""
SPLIT_NAMES = {"val": "validation"} | {name: name for name in SPLITS}
"""As a user writes them."""


def evaluate(
    path: Path,
    *,
    qa: Sequence[Path] = (),
    text: Path | None = None,
    splits: Sequence[str] = (),
    settings: Settings | None = None,
    earlier: Path | None = None,
    resume: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Measures the model of a run folder, or of a model folder with `qa` or `text`, and writes PATH/report.

    Args:
        qa: questions to ask in place of the run's own.
        text: a text to measure in place of the run's validation part.
        splits: names of `SPLITS`; all by default. With `qa`, what these questions are called.
        earlier: a run with a report, to compare with.

    Raises:
        MiniGLMError: there is no model, or nothing to evaluate.
    """
    settings = settings or Settings()
    folder = find_model(path)
    before = None if earlier is None else read_report(earlier)
    run = Run(path, evaluating=True) if (path / "run.json").exists() else None
    where = pick_device(device or ("auto" if run is None else run.recipe.run.device))
    model, tokenizer = load_model(folder, device=str(where))
    if qa:
        found = [e for file in qa for e in _questions(file)]
        name = splits[0] if splits else "given"
        title, about = SPLITS.get(name, ("给定的题", "用 --qa 给出的问答"))
        source = "、".join(file.name for file in qa)
        parts = [Part(name, title, about, source, spread(found, settings.limit), len(found))]
    else:
        parts = [] if run is None else _own_parts(run, splits, settings.limit)
    subject = Subject(
        name=path.resolve().name,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        train=[] if run is None else examples(run, "train"),
        losses=stage_curves(path),
        earlier=before,
        answerer=answerer_of(path),
        outside=[] if run is None else [e for e in examples(run, "outside") if e.extra.get("part") == "test"],
    )
    return write_report(
        subject, parts, _text(run, text, tokenizer), settings, path / "report", resume=resume, bar=count_bar
    )


def _questions(file: Path) -> list[Example]:
    found = read_examples(file, need_answer=False)
    for bad in found.rejected:
        say(f"跳过 {bad}")
    return list(found.examples)


def _own_parts(run: Run, splits: Sequence[str], limit: int | None) -> list[Part]:
    """The run's own questions. Of the training questions no more than of the validation ones: they are there for
    comparison."""
    parts = []
    for name, (title, about) in SPLITS.items():
        found = examples(run, name)
        if not found or (splits and name not in splits):
            continue
        most = limit
        if name == "train" and not splits:
            most = min(limit or len(found), len(examples(run, "validation")) or len(found))
        parts.append(Part(name, title, about, f"qa/{name}.jsonl", spread(found, most), len(found)))
    if splits and not parts:
        titles = "、".join(SPLITS[name][0] for name in splits)
        raise MiniGLMError(f"这个运行没有{titles}", path=run.path / "qa", fix="用 --qa 给出问答文件，或换一个 --split")
    return parts


def _text(run: Run | None, file: Path | None, tokenizer: Tokenizer) -> Text | None:
    if file is not None:
        text = "\n\n".join(_join(book.paragraphs) for book in load_books([str(file)]))
        return Text(file.name, tokenizer.encode(text), len(text))
    if run is None or not (run.path / "tokens" / "validation.npy").exists():
        return None
    ids = read_tokens(run.path / "tokens" / "validation.npy")
    return Text("小说的验证部分", ids.tolist(), token_meta(run)["validation_characters"]) if len(ids) else None


def read_report(path: Path) -> dict[str, Any]:
    """report.json of a run folder, of a report folder, or the file itself.

    Raises:
        MiniGLMError: there is none, or it is damaged or of another version.
    """
    known = (path, path / "report.json", path / "report" / "report.json")
    file = next((each for each in known if each.is_file()), None)
    if file is None:
        raise MiniGLMError("这里没有评测报告", path=path, fix=f"先运行 miniglm evaluate {path}")
    try:
        report = read_json(file, fix="")
        form = report["format"]
    except (MiniGLMError, KeyError):
        raise MiniGLMError("不是完整的评测报告", path=file, fix="请重新运行 miniglm evaluate") from None
    if form != REPORT_FORMAT:
        raise MiniGLMError(f"评测报告的格式是 {form}，这个版本只认 {REPORT_FORMAT}", path=file, fix="请重新评测")
    return report


def score(run: Run, *, limit: int | None = None) -> dict[str, Any]:
    """Evaluates the finished model and notes its main figures in results.json.

    Args:
        limit: at most so many questions of each part.
    """
    begun = time.monotonic()
    try:
        report = evaluate(run.path, settings=Settings(limit=limit), resume=True, device=str(run.device))
    except KeyboardInterrupt:
        raise Interrupted from None
    found: dict[str, Any] = {}
    if report["text"] is not None:
        found["text_bits_per_character"] = report["text"]["bits_per_character"]["mean"]
    for part in report["splits"]:
        scores = part["scores"]
        found[f"{part['name']}_key_accuracy"] = scores["key_accuracy"]["mean"] if "key_accuracy" in scores else None
        found[f"{part['name']}_questions"] = part["with_keys"]
        if part["with_book"] is not None and part["with_book"]["key_accuracy"] is not None:
            found[f"{part['name']}_key_accuracy_with_book"] = part["with_book"]["key_accuracy"]["mean"]
        if part["name"] == "validation" and "bits_per_character" in scores:
            found["answer_bits_per_character"] = scores["bits_per_character"]["mean"]
    found["peak_memory_mib"] = peak_memory()
    run.note(**found)
    run.note_stage("evaluate", time.monotonic() - begun)
    return report


def peak_memory() -> int | None:
    """The process's largest resident size so far, MiB; None on Windows, where the standard library does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


SCORING = (0.12, 28.0, 240.0)
"""Share of the minutes kept for scoring, loading and drawing, and the bounds of that in seconds: a model of an hour
answers all questions in 100 s on two cores."""
ENCODER = (0.1, 2.0, 240.0)
"""The same for what the look-up's encoder may learn in."""
RERANKING = ((45.0, 500.0), (57.0, 860.0))
"""Minutes from which on there are rerankers, and better ones, and seconds for them."""
INDEXING = (0.05, 20.0, 60.0)
"""The same for the rest of the index, its vectors and learning to choose."""
ALL_QUESTIONS = 10.0
"""Minutes from which on scoring asks all questions."""
LEAST_QUESTIONS = 200
SHOWN = 5
"""Validation questions that the demo shows with their answers."""


def question_limit(minutes: float) -> int | None:
    """How many questions of each part the demo's scoring asks at most: in a short run one for every second, so that
    scoring does not take longer than training; None: all."""
    return None if minutes >= ALL_QUESTIONS else max(LEAST_QUESTIONS, round(60 * minutes))


def seconds_of(part: tuple[float, float, float], minutes: float) -> float:
    """A part's seconds in a run of so many minutes: its share, within its bounds."""
    share, least, most = part
    return min(max(60 * minutes * share, least), most)


def seconds_kept(minutes: float, *, index: bool) -> float:
    """What of a run's minutes is kept from training, for what comes after it.

    Args:
        index: there is one to be built.
    """
    kept = sum(seconds_of(part, minutes) for part in (SCORING, *((ENCODER, INDEXING) if index else ())))
    return kept + (reranking_seconds(minutes) if index else 0.0)


def reranking_seconds(minutes: float) -> float:
    """For the look-up's rerankers in a run of so many minutes."""
    return max((seconds for least, seconds in RERANKING if minutes >= least), default=0.0)


def demo(run: Run, begun: float) -> None:
    """Everything up to a scored model within the recipe's minutes, counted from `begun` (time.monotonic)."""
    tokenize(run)
    seconds = None
    if run.recipe.run.minutes is not None:
        total = 60 * run.recipe.run.minutes
        kept = seconds_kept(run.recipe.run.minutes, index=not is_current(run.path / "index"))
        seconds = max(0.25 * total, total - kept - (time.monotonic() - begun))
    finetune(run, seconds)
    index(run)
    if not (run.path / "report" / "report.json").exists():
        score(run, limit=question_limit(run.recipe.run.minutes or 0))
        run.note_stage("all", time.monotonic() - begun)


def report_lines(report: dict[str, Any]) -> list[str]:
    """A report for the terminal: how good, on what, compared with what, then a few questions with their answers: from
    the book with where it says so, where there is an index, and the model's own."""

    def shown(found: dict[str, Any], percent: bool) -> str:
        mean, low, high = (found[key] * (100 if percent else 1) for key in ("mean", "low", "high"))
        return f"{mean:.1f}%（{low:.1f}–{high:.1f}）" if percent else f"{mean:.2f}（{low:.2f}–{high:.2f}）"

    lines = []
    if report["text"] is not None:
        text = report["text"]
        lines.append(f"{text['source']}：{shown(text['bits_per_character'], False)} 比特/字，越低越好")
    for part in report["splits"]:
        scores, baseline = part["scores"], part["baseline"] or {}
        line = f"{part['title']}（{part['about']}；{part['questions']} 题）："
        name, title = ("key_accuracy", "要点全中") if "key_accuracy" in scores else ("rouge_l", "ROUGE-L")
        if name not in scores:
            lines.append(line + "没有要点也没有参考答案，只列出回答")
            continue
        line += f"{title} {shown(scores[name], True)}"
        if name in baseline:
            line += f"，照搬最像的训练题的答案（BM25）{shown(baseline[name], True)}"
        if (with_book := part.get("with_book")) and with_book["key_accuracy"]:
            line += f"，查书回答 {shown(with_book['key_accuracy'], True)}"
        if "bits_per_character" in scores:
            line += f"；参考答案 {shown(scores['bits_per_character'], False)} 比特/字"
        lines.append(line)
    if outside := report.get("outside"):
        lines.append(f"书里没有的事（{outside['questions']} 题）：查书后说没有找到的 {shown(outside['refused'], True)}")
    if lines:
        lines.append("括号里是 95% 置信区间（自助法）。")
    rows = report["splits"][0]["rows"] if report["splits"] else []
    for row in spread(rows, SHOWN):
        lines += ["", f"问：{row['question']}"]
        if found := row.get("with_book"):  # as `ask` and the page answer
            lines += [f"查书的回答：{found.get('shown', found['answer'])}", f"模型自己的回答：{row['answers'][0]}"]
        else:
            lines.append(f"答：{row['answers'][0]}")
        lines += [f"（参考：{row['reference']}）"] if row["reference"] else []
    return lines
