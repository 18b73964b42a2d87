"""The rule behind `--minutes`: from the time given, this machine's speed and the corpus to model size and batch.

The measurements that the constants rest on are in docs/how-minutes-work.md; explicit settings of a recipe win.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from miniglm.config import ModelConfig
from miniglm.errors import MiniGLMError
from miniglm.recipe import Recipe, StageRecipe
from miniglm.training import Stage

UTILISATION = 0.6
"""Share of the measured matrix-product speed that the rule counts with. The default run reaches less
(docs/how-minutes-work.md); the next constant was settled with this one, so they change together."""
PARAMETERS_PER_ROOT_FLOP = 0.36
"""Weights for a budget of C operations: this times sqrt(C), so that tokens and weights grow alike
(Hoffmann et al. 2022, arXiv:2203.15556); the factor is measured for one novel read several times."""
PARAMETERS_PER_CHARACTER = 8.0
"""More weights than this for each character of the corpus only learn it by heart: 7 of them get worse from the eighth
pass over the text on, and 13 answered fewer questions after the same hour (docs/how-minutes-work.md)."""
PRETRAIN_SHARE = 0.45
"""Share of the training time that the novel's text gets before the questions come."""
TEXT_SHARE = 0.125
"""Share of the rows of a finetuning batch that go on being text of the book."""
BFLOAT16_PAYS = 2.0
"""How many times float32's speed bfloat16's products must have for a CPU to train in it: with six times (AMX) a
training step takes 0.7 of the time, since everything that is no product stays as it is."""
LADDER = ((64, 2), (96, 2), (128, 3), (192, 4), (256, 4), (320, 5), (384, 6), (512, 6), (640, 8), (768, 10), (1024, 12))
"""Hidden size and layers to choose from."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does, all settled. Kept as plan.json in the run folder."""

    model: ModelConfig
    context: int
    dropout: float
    pretrain: Stage
    finetune: Stage
    text_share: float
    gigaflops: float
    recipe_lengths: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Reads what `to_json` wrote."""
        stages = {n: Stage(**(data[n] | {"betas": tuple(data[n]["betas"])})) for n in ("pretrain", "finetune")}
        return cls(**(data | {"model": ModelConfig(**data["model"])} | stages))


LENGTHS = ("steps", "minutes", "micro_rows", "evaluate_every", "patience")
"""A stage's settings that a run may change after its plan was made."""


def lengths(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of `LENGTHS` and of the minutes in all."""
    stages = {"pretrain": recipe.pretrain, "finetune": recipe.finetune}
    return {"minutes": recipe.run.minutes} | {n: {k: getattr(s, k) for k in LENGTHS} for n, s in stages.items()}


def measure_gigaflops(device: torch.device, precision: str, seconds: float = 1.0, size: int | None = None) -> float:
    """Best speed of a matrix product of `size` rows and columns on `device`, in 10^9 operations a second. The best, not
    the median: another program that happens to run just now must not decide how large the model is.

    Args:
        size: default 1,024, or 8,192 on CUDA, where a smaller product measures how long it takes to begin.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times) < 5:
        started = time.perf_counter()
        (a @ b).sum().item()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) / 1e9


def choose_precision(device: torch.device) -> str:
    """ "bfloat16" where the device has units for it, "float32" elsewhere: processors without them emulate it at a
    tenth of the speed, and which have them is measured, since their names say it differently everywhere."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type != "cpu":
        return "float32"
    plain, half = (measure_gigaflops(device, precision, 0.1, size=512) for precision in ("float32", "bfloat16"))
    return "bfloat16" if half >= BFLOAT16_PAYS * plain else "float32"


def choose_size(budget: float, characters: int, vocab_size: int) -> tuple[int, int]:
    """Hidden size and layers for `budget` floating-point operations and a corpus of `characters`."""
    wanted = min(PARAMETERS_PER_ROOT_FLOP * math.sqrt(budget), PARAMETERS_PER_CHARACTER * characters)

    def distance(size: tuple[int, int]) -> float:
        config = _config(*size, vocab_size=vocab_size, context=256)
        return abs(math.log(config.num_parameters / wanted))

    return min(LADDER, key=distance)


def _config(hidden: int, layers: int, *, vocab_size: int, context: int, **given: Any) -> ModelConfig:
    """Sizes from the two that matter; what is given wins. Raises ValueError where they do not fit together."""
    head_dim = 64 if hidden % 64 == 0 and hidden >= 192 else min(32, hidden)
    heads = hidden // head_dim
    sizes = {
        "intermediate_size": math.ceil(hidden * 8 / 3 / 64) * 64,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "head_dim": head_dim,
    }
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        max_position_embeddings=context,
        **(sizes | given),
    )


def plan(
    recipe: Recipe,
    *,
    vocab_size: int,
    characters: int,
    tokens: int,
    gigaflops: float,
    precision: str,
    seconds: float | None,
    has_pairs: bool,
) -> Plan:
    """Settles what the recipe leaves open.

    Args:
        characters: of the corpus's training part; `tokens`: the same in tokens.
        gigaflops: of float32 products on a CPU, of those in `precision` on a GPU.
        precision: see training.Stage.
        seconds: for both stages together; None where the recipe gives every length itself.

    Raises:
        MiniGLMError: sizes that do not fit together, or no length at all.
    """
    given = recipe.model
    budget = gigaflops * 1e9 * UTILISATION * (seconds or 600.0)
    hidden, layers = choose_size(budget, characters, vocab_size)
    # A short corpus must still cut into a fair number of rows.
    context = given.context or next((c for c in (256, 128, 64) if tokens >= 40 * c), 32)
    hidden, layers = given.hidden_size or hidden, given.num_hidden_layers or layers
    explicit = {
        name: value
        for name, value in given.model_dump(exclude={"context", "dropout", "hidden_size", "num_hidden_layers"}).items()
        if value is not None
    }
    if "num_attention_heads" in explicit:
        explicit = {"num_key_value_heads": explicit["num_attention_heads"]} | explicit
        explicit = {"head_dim": hidden // explicit["num_attention_heads"]} | explicit
    try:
        config = _config(hidden, layers, vocab_size=vocab_size, context=context, **explicit)
    except ValueError as error:
        raise MiniGLMError(
            f"配方 [model] 的尺寸不相容：{error}",
            fix="hidden_size 取 32 的倍数，或给出合适的 num_attention_heads 和 head_dim",
        ) from None
    # Without questions there is no second stage: its length is then only a number.
    shares = (PRETRAIN_SHARE, 1 - PRETRAIN_SHARE) if has_pairs else (1.0, 1.0)
    dropout = given.dropout if given.dropout is not None else 0.0
    pretrain, finetune = (
        _stage(name, given, recipe, None if seconds is None else seconds * part, context, precision)
        for name, given, part in zip(("pretrain", "finetune"), (recipe.pretrain, recipe.finetune), shares, strict=True)
    )
    return Plan(
        model=config,
        context=context,
        dropout=dropout,
        pretrain=pretrain,
        finetune=finetune,
        text_share=recipe.finetune.text_share if recipe.finetune.text_share is not None else TEXT_SHARE,
        gigaflops=round(gigaflops, 1),
        recipe_lengths=lengths(recipe),
    )


def _stage(name: str, given: StageRecipe, recipe: Recipe, seconds: float | None, context: int, precision: str) -> Stage:
    minutes = None if given.steps is not None else given.minutes if given.minutes is not None else (seconds or 0) / 60
    if given.steps is None and not minutes:
        raise MiniGLMError(f"配方里 {name} 既没有 steps 也没有 minutes，run.minutes 也是空的", fix="给出其中一个")
    default = Stage(name=name, rows=max(1, 2048 // context))
    chosen: dict[str, Any] = {
        "rows": given.rows,
        "micro_rows": given.micro_rows,
        "muon": None if given.optimizer is None else given.optimizer == "muon",
        "matrix_lr": given.matrix_lr,
        "adam_lr": given.adam_lr,
        "weight_decay": given.weight_decay,
        "warmup": given.warmup,
        "decay": given.decay,
        "final_lr": given.final_lr,
        "clip": given.clip,
        "evaluate_every": given.evaluate_every,
        "patience": given.patience,
    }
    betas = (
        given.beta1 if given.beta1 is not None else default.betas[0],
        given.beta2 if given.beta2 is not None else default.betas[1],
    )
    return replace(
        default,
        steps=given.steps,
        minutes=minutes,
        seed=recipe.run.seed,
        precision=precision,
        betas=betas,
        **{key: value for key, value in chosen.items() if value is not None},
    )
