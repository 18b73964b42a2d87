"""The reference's whole job on a GPU: pretraining and finetuning steps at its sizes, with its model and with ours.

    python benchmarks/gpu_reference.py --device cuda [--text FILE …] [--pretrain 20000] [--finetune 10000]

Its way reads windows of 256 tokens of GPT-2's, ours windows of 256 of a vocabulary made for the text, which are about
three times as many characters. So ours takes as many steps as read the same number of characters (or, with
`--same-steps`, as many steps). With `--share` only so much of the steps is run, the schedules shortened to them, and
the seconds of all of them are computed from the time of one. What is printed is seconds, bits a character
on the text's last tenth at their best and at the end, on what was read last, and the utilisation against the card's
bfloat16 product. Everything runs on a CPU too, in miniature (tests/test_benchmarks.py).
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_model import (
    FULL,
    TOKENS_PER_CHARACTER,
    VOCABULARY,
    ReferenceModel,
    Sizes,
    learning_rate,
    random_windows,
    reference_tokenizer,
)
from side_by_side import parser, report
from torch import Tensor

from miniglm.config import ModelConfig
from miniglm.dataset import Batches, TextRows, validation_text_batches
from miniglm.evaluation.measure import bits_per_character
from miniglm.kernels import autocast
from miniglm.model import GLM
from miniglm.planning import choose_precision, measure_gigaflops
from miniglm.tokenizer import train_tokenizer
from miniglm.training import Stage, train

VALIDATIONS = 8
"""Of each stage, as in the training loop."""
LAST = 50
"""Steps that the loss of what was read last is a mean of."""


def wait_for(device: torch.device) -> float:
    """The clock, once the device's queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def their_way(
    text: str, sizes: Sizes, stages: list[tuple[int, int]], device: torch.device, vocabulary: int = VOCABULARY
) -> dict[str, Any]:
    """The reference's model and AdamW. `stages`: (steps, rows) of each. Validations do not count as its time."""
    tokenizer, which = reference_tokenizer(text)
    ids = np.asarray(tokenizer.encode(text))
    train_ids, held = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    to_bits = len(held) / len(tokenizer.decode(held.tolist())) / math.log(2)
    torch.manual_seed(0)
    model = ReferenceModel(sizes, vocabulary).to(device)
    optimizer, rng = model.optimizer(), np.random.default_rng(0)
    precision, context = choose_precision(device), sizes.context
    starts = range(0, len(held) - context, context)
    windows = torch.from_numpy(np.stack([held[s : s + context + 1] for s in starts]).astype(np.int64))

    @torch.inference_mode()
    def validate() -> float:
        model.eval()
        with autocast(device, precision):
            nats = [model.loss(w[:, :-1], w[:, 1:]).item() * len(w) for w in torch.split(windows.to(device), 32)]
        model.train()
        return sum(nats) / len(windows) * to_bits

    found: list[float] = []
    last: list[Tensor] = []
    took = []
    for steps, rows in stages:
        shape, spent, begun = replace(sizes, rows=rows), 0.0, wait_for(device)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(sizes, step, steps)
            inputs, targets = (t.to(device, non_blocking=True) for t in random_windows(train_ids, shape, rng))
            with autocast(device, precision):
                loss = model.loss(inputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            last = [*last[1 - LAST :], loss.detach()]
            if (step + 1) * VALIDATIONS // steps > step * VALIDATIONS // steps:
                spent += wait_for(device) - begun
                found.append(validate())
                begun = wait_for(device)
        took.append(spent)
    tokens = sum(steps * rows for steps, rows in stages) * context
    layers = sizes.layers * (12 * sizes.width**2 + context * sizes.width)
    return {
        "seconds": sum(took),
        "milliseconds a step": [1000 * t / steps for t, (steps, _) in zip(took, stages, strict=True) if steps],
        "best": min(found),
        "bits": found[-1],
        "read": float(torch.stack(last).mean()) * to_bits,
        "gigaflops": 6.0 * (layers + vocabulary * sizes.width) * tokens / sum(took) / 1e9,
        "characters a token": len(text) / len(ids),
        "tokenizer": which,
    }


def our_way(
    text: str,
    config: ModelConfig,
    stages: list[tuple[int, int]],
    device: torch.device,
    characters_a_token: float | None = None,
) -> dict[str, Any]:
    """Ours: a vocabulary of the text's own and the training loop as it is, validations and all.

    Args:
        characters_a_token: theirs, to read as many characters as they do; None for as many steps.
    """
    begun = time.perf_counter()
    cut = len(text) * 9 // 10
    tokenizer = train_tokenizer([text[:cut]], vocab_size=config.vocab_size, corpus_characters=cut)
    train_ids, held = (np.asarray(tokenizer.encode(part)) for part in (text[:cut], text[cut:]))
    before = time.perf_counter() - begun
    share = 1.0 if characters_a_token is None else characters_a_token * len(train_ids) / cut
    context, precision = config.max_position_embeddings, choose_precision(device)
    model = GLM(replace(config, vocab_size=tokenizer.vocab_size)).initialize(0).to(device)
    found: list[float] = []
    read: list[float] = []
    told: list[str] = []
    took, done = [], []

    def evaluate() -> dict[str, float]:
        batches = validation_text_batches(held, context, tokenizer.prefix, 64)
        found.append(bits_per_character(model, batches, len(text) - cut))
        return {"score": found[-1]}

    for number, (steps, rows) in enumerate(stages):
        stage = Stage("pretrain", rows=rows, steps=math.ceil(steps * share), precision=precision)
        batches = Batches(TextRows(train_ids, context, tokenizer.prefix, seed=number), None, rows)
        with tempfile.TemporaryDirectory() as folder:
            started = wait_for(device)
            train(
                model,
                batches,
                stage,
                Path(folder),
                evaluate=evaluate,
                save_best=lambda scores: None,
                on_progress=lambda progress: read.append(progress.loss),
                warn=told.append,
            )
            took.append(wait_for(device) - started)
        done.append((stage.steps or 0, rows))
    tokens = sum(steps * rows for steps, rows in done) * context
    return {
        "seconds": sum(took) + before,
        "tokenizer seconds": before,
        "steps": done,
        "milliseconds a step": [1000 * t / steps for t, (steps, _) in zip(took, done, strict=True)],
        "best": min(found),
        "bits": found[-1],
        "read": float(np.mean(read[-LAST:])) * len(train_ids) / cut / math.log(2),
        "gigaflops": model.config.flops_per_token(context) * tokens / sum(took) / 1e9,
        "weights": model.config.num_parameters,
        "warnings": told,
    }


def read_text(books: list[str]) -> str:
    """Clean text of files or of books that `miniglm corpus list` knows."""
    from miniglm.corpus import load_books

    return "\n".join(p.text for book in load_books(books) for p in book.paragraphs)


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__, rounds=1)
    options.add_argument("--device", default="cuda")
    options.add_argument("--text", nargs="+", default=["sanguo"], help="books; the reference's three have 8.75 MB")
    options.add_argument("--pretrain", type=int, default=20_000, help="steps of 32 rows")
    options.add_argument("--finetune", type=int, default=10_000, help="steps of 64 rows")
    options.add_argument("--vocab", type=int, default=8192)
    options.add_argument("--only", choices=("ours", "theirs"))
    options.add_argument("--same-steps", action="store_true", help="ours takes as many steps, not as many characters")
    options.add_argument("--share", type=float, default=1.0, help="of all steps, so many are run")
    options.add_argument("--save-text", type=Path, help="keep the text that was used")
    given = options.parse_args()
    device, text = torch.device(given.device), read_text(given.text)
    if given.save_text is not None:
        given.save_text.write_text(text, "utf-8")
    stages = [(given.pretrain, 32), (given.finetune, 64)]
    run = [(math.ceil(steps * given.share), rows) for steps, rows in stages]
    config = ModelConfig(given.vocab, 512, 1376, 6, 8, 8, 64, 256)
    product = measure_gigaflops(device, choose_precision(device))
    found: dict[str, dict[str, Any]] = {}
    if given.only != "theirs":
        found["miniGLM"] = our_way(text, config, run, device, None if given.same_steps else 1 / TOKENS_PER_CHARACTER)
    if given.only != "ours":
        found["the reference's way"] = their_way(text, FULL, run, device)
    rows = [
        {
            "": name,
            "seconds": r["seconds"],
            "of all steps": r["seconds"] / given.share,
            "bits, held out, best": r["best"],
            "at the end": r["bits"],
            "read last": r["read"],
            "utilisation": r["gigaflops"] / product,
        }
        for name, r in found.items()
    ]
    report("gpu_reference", f"{stages} on {device}", rows, given, found=found, product_gigaflops=product)


if __name__ == "__main__":
    main()
