"""The reference's whole job on a GPU: pretraining and finetuning steps at its sizes, with its model and with ours.

    python benchmarks/gpu_reference.py --device cuda [--text FILE …] [--pretrain 20000] [--finetune 10000]

Both train the same texts for the same number of characters seen a step or less: its way reads windows of 256 tokens of
GPT-2's, ours windows of 256 of a vocabulary made for the text, which are 2.7 times as many characters. What is printed
is seconds, bits a character on the text's last tenth, and the utilisation against the card's bfloat16 product.
Everything runs on a CPU too, in miniature (tests/test_benchmarks.py).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_model import (
    FULL,
    VOCABULARY,
    ReferenceModel,
    Sizes,
    learning_rate,
    random_windows,
    reference_tokenizer,
)
from side_by_side import parser, report

from miniglm.config import ModelConfig
from miniglm.dataset import Batches, TextRows, validation_text_batches
from miniglm.evaluation.measure import bits_per_character
from miniglm.model import GLM
from miniglm.optimizer import learning_rate_factor, set_learning_rate
from miniglm.planning import choose_precision, measure_gigaflops
from miniglm.tokenizer import train_tokenizer
from miniglm.training import Stage, autocast, optimizers_of


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """How long `work` takes, the device's queue included."""
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def their_way(
    text: str, sizes: Sizes, stages: list[tuple[int, int]], device: torch.device, vocabulary: int = VOCABULARY
) -> dict[str, Any]:
    """The reference's model and AdamW. `stages`: (steps, rows) of each."""
    tokenizer, which = reference_tokenizer(text)
    ids = np.asarray(tokenizer.encode(text))
    train, held = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    torch.manual_seed(0)
    model = ReferenceModel(sizes, vocabulary).to(device)
    optimizer, rng = model.optimizer(), np.random.default_rng(0)
    precision = choose_precision(device)

    def work() -> None:
        for steps, rows in stages:
            shape = replace(sizes, rows=rows)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(sizes, step, steps)
                inputs, targets = (t.to(device, non_blocking=True) for t in random_windows(train, shape, rng))
                with autocast(device, precision):
                    loss = model.loss(inputs, targets)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    took = seconds(work, device)
    model.eval()
    nats, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(held) - sizes.context, sizes.context):
            window = torch.from_numpy(held[start : start + sizes.context + 1].astype(np.int64)).to(device)[None]
            nats += model.loss(window[:, :-1], window[:, 1:]).item() * sizes.context
            count += sizes.context
    characters = len(tokenizer.decode(held.tolist()))
    tokens = sum(steps * rows for steps, rows in stages) * sizes.context
    layers = sizes.layers * (12 * sizes.width**2 + sizes.context * sizes.width)
    return {
        "seconds": took,
        "bits": nats / count * len(held) / characters / math.log(2),
        "gigaflops": 6.0 * (layers + vocabulary * sizes.width) * tokens / took / 1e9,
        "tokenizer": which,
    }


def our_way(text: str, config: ModelConfig, stages: list[tuple[int, int]], device: torch.device) -> dict[str, Any]:
    """Ours: a vocabulary of the text's own, Muon, the training loop's step."""
    begun = time.perf_counter()
    cut = len(text) * 9 // 10
    tokenizer = train_tokenizer([text[:cut]], vocab_size=config.vocab_size, corpus_characters=cut)
    train, held = (np.asarray(tokenizer.encode(part)) for part in (text[:cut], text[cut:]))
    before = time.perf_counter() - begun
    context, precision = config.max_position_embeddings, choose_precision(device)
    stage = Stage("gpu", rows=stages[0][1], precision=precision)
    model = GLM(replace(config, vocab_size=tokenizer.vocab_size)).initialize(0).to(device)
    optimizers = optimizers_of(stage, model)
    parameters, total = list(model.parameters()), sum(steps for steps, _ in stages)

    def work() -> None:
        done = 0
        for steps, rows in stages:
            batches = Batches(TextRows(train, context, tokenizer.prefix, seed=done), None, rows)
            for step in range(steps):
                factor = learning_rate_factor(
                    done / total, warmup=stage.warmup, decay=stage.decay, final=stage.final_lr
                )
                set_learning_rate(optimizers, factor)
                batch = batches.batch(step).to(device)
                with autocast(device, precision):
                    loss, targets = model.loss(batch.ids, batch.labels)
                (loss / targets).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, stage.clip)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                done += 1

    took = seconds(work, device)
    model.eval()
    bits = bits_per_character(model, validation_text_batches(held, context, tokenizer.prefix, 32), len(text) - cut)
    tokens = sum(steps * rows for steps, rows in stages) * context
    return {
        "seconds": took + before,
        "bits": bits,
        "gigaflops": model.config.flops_per_token(context) * tokens / took / 1e9,
        "weights": model.config.num_parameters,
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
    options.add_argument("--save-text", type=Path, help="keep the text that was used")
    given = options.parse_args()
    device, text = torch.device(given.device), read_text(given.text)
    if given.save_text is not None:
        given.save_text.write_text(text, "utf-8")
    stages = [(given.pretrain, 32), (given.finetune, 64)]
    config = ModelConfig(given.vocab, 512, 1376, 6, 8, 8, 64, 256)
    product = measure_gigaflops(device, choose_precision(device))
    found: dict[str, dict[str, Any]] = {}
    if given.only != "theirs":
        found["miniGLM"] = our_way(text, config, stages, device)
    if given.only != "ours":
        found["the reference's way"] = their_way(text, FULL, stages, device)
    rows = [
        {
            "": name,
            "seconds": r["seconds"],
            "bits a character": r["bits"],
            "utilisation": r["gigaflops"] / product,
        }
        for name, r in found.items()
    ]
    report("gpu_reference", f"{stages} on {device}", rows, given, found=found, product_gigaflops=product)


if __name__ == "__main__":
    main()
