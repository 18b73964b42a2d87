"""Finetuning that starts from another's model: any `GlmForCausalLM` folder with its own tokenizer and chat template,
all of it or low-rank adapters, saved as a plain folder again.

The run's questions, token arrays and training loop are those of every other run (pipeline.py); only what is trained and
how long differs. docs/interop.md says how much memory the public models need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniglm.checkpoint import load_model, save_model
from miniglm.config import read_config
from miniglm.dataset import Batches, PairRows, TextRows, read_pairs
from miniglm.distributed.choice import sharded_if
from miniglm.distributed.team import on_first, tell
from miniglm.errors import MiniGLMError
from miniglm.files import read_json, write_json
from miniglm.interop.lora import add_adapters, load_adapters, merge_adapters, save_adapters
from miniglm.large_tokens import training_tokens
from miniglm.pipeline import Run, answer_bits, read_plan, text_bits, token_meta, tokenize, train_stage, validation_rows
from miniglm.planning import Plan, lengths
from miniglm.training import Stage
from miniglm.ui import say
from miniglm.weights import has_weights, weight_files

RECORD = "init.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONTEXT = 1024
"""Tokens of a training row unless the recipe says otherwise: enough for questions, little enough for memory."""
FULL_LR, LORA_LR = 2e-5, 2e-4
"""Peak rates of AdamW for all weights (the usual order of magnitude for finetuning) and for adapters, which take ten
times that (Schulman et al. 2025, LoRA Without Regret)."""


@dataclass(frozen=True, slots=True)
class Start:
    """From what a run's finetuning starts, and how; kept as init.json in the run folder."""

    folder: str
    lora: bool = False
    dtype: str = "float32"
    checkpointing: bool = False


def read_start(path: Path) -> Start | None:
    """What a run folder has started from; None where it began with a model of its own.

    Raises:
        MiniGLMError: the record is damaged.
    """
    record = path / RECORD
    if not record.exists():
        return None
    fix = "换一个 --out 目录"
    try:
        return Start(**read_json(record, fix=fix))
    except TypeError as error:
        raise MiniGLMError(f"读不了（{error}）", path=record, fix=fix) from None


def finetune_from(run: Run, start: Start) -> None:
    """Teaches the run's questions (or, where it has none, its books) to another's model: RUN/finetune and RUN/model.

    The recipe's tokenizer must be the model's own folder.

    With `bfloat16`, adapters are trained in float32 beside weights in bfloat16. Without adapters the weights are kept
    in float32 while matrices multiply in bfloat16, since an update of a bfloat16 weight is mostly rounded away
    (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1), and saved as bfloat16.

    Raises:
        MiniGLMError: the run began otherwise, or the model cannot be used.
    """
    folder, dtype = Path(start.folder), DTYPES.get(start.dtype)
    if dtype is None:
        raise MiniGLMError(f"--dtype 是 {start.dtype!r}，应为 {'、'.join(DTYPES)} 之一")
    config = read_config(folder)
    for file in weight_files(folder):
        if not file.exists():
            raise MiniGLMError("缺少这个文件", path=file, fix="这个目录不完整，请重新下载")
    made = on_first(lambda: _begin(run, start, config)) or _plan(run, start, config)
    if run.done("finetune/done.json") and tell(has_weights(run.path / "model")):
        run.skip("finetune")
        return
    held = dtype if start.lora else torch.float32
    if start.lora and run.shard:
        raise MiniGLMError("--lora 和 --shard 不能一起用", fix="LoRA 每个进程都放得下整个模型，去掉 --shard")
    model, tokenizer = load_model(folder, device="cpu" if run.shard else str(run.device), dtype=held)
    model.checkpointing = start.checkpointing
    if start.lora:
        torch.manual_seed(run.recipe.run.seed)  # the adapters begin at random
        add_adapters(model)
    if run.shard:
        model = sharded_if(True, model, run.device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        f"从 {folder} 开始：{config.num_parameters / 1e6:,.1f} 百万参数，训练其中 {trained / 1e6:,.2f} 百万，上下文 {made.context}"
    )
    has_pairs = token_meta(run)["train_pairs"] > 0
    every = validation_rows(run, made, made.finetune, pairs=has_pairs)

    def evaluate() -> dict[str, float]:
        bits = answer_bits if has_pairs else text_bits
        return {"score": bits(run, model, tokenizer, made, every)}

    def save(place: Path, weights: Mapping[str, Tensor]) -> None:
        if start.lora:
            save_adapters(place.with_name("adapters.safetensors"), model)
        else:
            save_model(place, model, tokenizer, weights=weights, dtype=dtype)

    with _arithmetic(run.device, start):
        train_stage(run, made, "finetune", model, _batches(run, made, tokenizer), every, evaluate, save)

    def finish() -> None:
        if start.lora:
            load_adapters(run.path / "finetune" / "adapters.safetensors", model)
            merge_adapters(model)
            save_model(run.path / "model", model, tokenizer, dtype=dtype)
        else:
            save_model(run.path / "model", *load_model(run.path / "finetune" / "model"), dtype=dtype)

    on_first(finish)


def _begin(run: Run, start: Start, config: Any) -> Plan:
    """What comes before the training."""
    before = read_start(run.path)
    if before is None and (run.path / "plan.json").exists():
        raise MiniGLMError("这个运行已经有自己的模型了，不能改从别的模型开始", path=run.path, fix="换一个 --out 目录")
    if before is not None and before != start:
        raise MiniGLMError(
            f"这个运行是从 {before.folder} 开始的，设置也不能改：{before}",
            path=run.path / RECORD,
            fix="换一个 --out 目录",
        )
    tokenize(run)
    write_json(run.path / RECORD, asdict(start))
    return _plan(run, start, config)


def _plan(run: Run, start: Start, config: Any) -> Plan:
    """The run's plan: read back, or made, also where the recipe's lengths have changed since."""
    path = run.path / "plan.json"
    if path.exists() and (known := read_plan(path)).recipe_lengths == lengths(run.recipe):
        return known
    given, minutes = run.recipe.finetune, run.recipe.run.minutes
    context = min(run.recipe.model.context or CONTEXT, config.max_position_embeddings)
    rows = given.rows or 8
    stage = Stage(
        name="finetune",
        rows=rows,
        micro_rows=min(given.micro_rows or 1, rows),
        steps=given.steps,
        minutes=None if given.steps else given.minutes or (minutes or 10.0) * 0.9,
        muon=False,
        adam_lr=given.adam_lr or (LORA_LR if start.lora else FULL_LR),
        weight_decay=given.weight_decay or 0.0,
        betas=(given.beta1 or 0.9, given.beta2 or 0.999),
        warmup=0.03 if given.warmup is None else given.warmup,
        decay=0.97 if given.decay is None else given.decay,
        final_lr=0.1 if given.final_lr is None else given.final_lr,
        clip=given.clip or 1.0,
        evaluate_every=given.evaluate_every,
        patience=given.patience,
        seed=run.recipe.run.seed,
    )
    made = Plan(
        model=config,
        context=context,
        dropout=0.0,
        pretrain=replace(stage, name="pretrain"),
        finetune=stage,
        text_share=given.text_share or 0.0,
        gigaflops=0.0,
        recipe_lengths=lengths(run.recipe),
    )
    write_json(path, made.to_json())
    return made


def _batches(run: Run, made: Plan, tokenizer: Any) -> Batches:
    tokens, seed = run.path / "tokens", made.finetune.seed
    meta = token_meta(run)
    pairs = text = None
    if meta["train_pairs"]:
        pairs = PairRows(read_pairs(tokens / "pairs_train.npz"), made.context, seed, tokenizer.end_of_text)
        if pairs.truncated:
            say(f"{pairs.truncated} 条问答长于上下文 {made.context}，答案的末尾被截去")
    if pairs is None or made.text_share > 0:
        text = TextRows(training_tokens(tokens, meta.get("shards", [])), made.context, tokenizer.prefix, seed)
    return Batches(text, pairs, made.finetune.rows, made.text_share)


def _arithmetic(device: torch.device, start: Start) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 products of float32 weights on the CPU; a GPU does so by itself (training.autocast)."""
    if start.dtype == "bfloat16" and not start.lora and device.type == "cpu":
        # Without its cache, which would go on with the weights of the first step.
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()
