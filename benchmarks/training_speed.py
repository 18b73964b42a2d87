"""Training throughput beside transformers' GlmForCausalLM with torch.optim.AdamW in the plain loop of its docs.

    python benchmarks/training_speed.py [--model default|reference] [--device cpu] [--precision float32] [--rounds 5]

The same sizes, batch and token ids. Utilisation is the model's own operations (ModelConfig.flops_per_token; Muon's
are overhead) over the speed of a matrix product of 1,024 measured in the same round, in the same arithmetic.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from side_by_side import alternate, median_ratio, parser, report

from miniglm.config import ModelConfig
from miniglm.kernels import autocast
from miniglm.model import GLM
from miniglm.planning import choose_precision, measure_gigaflops
from miniglm.training import Stage, keep_allocations, optimizers_of

MODELS = {
    "default": ModelConfig(4096, 256, 704, 4, 4, 2, 64, 256),
    # 44.6 M weights, as the reference system's: output layer and embedding are one matrix of GPT-2's size.
    "reference": ModelConfig(50304, 512, 1365, 6, 8, 8, 64, 256),
    "tiny": ModelConfig(300, 32, 64, 1, 2, 1, 16, 32),
}


def timed(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds for one step."""
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / steps


def our_step(
    config: ModelConfig, ids: torch.Tensor, labels: torch.Tensor, precision: str, muon: bool
) -> Callable[[], None]:
    """A step as training.train does it, without its bookkeeping."""
    stage = Stage("speed", rows=len(ids), muon=muon, precision=precision)
    model = GLM(config).initialize(0).to(ids.device)
    optimizers = optimizers_of(stage, model)
    parameters = list(model.parameters())

    def step() -> None:
        with autocast(ids.device, precision):
            loss, targets = model.loss(ids, labels)
        (loss / targets).backward()  # type: ignore[no-untyped-call]
        loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, stage.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def their_step(config: ModelConfig, ids: torch.Tensor) -> Callable[[], None]:
    """The loop of transformers' documentation: forward with labels, backward, step, zero_grad."""
    from transformers import GlmConfig, GlmForCausalLM

    model = GlmForCausalLM(GlmConfig(**(config.to_hf() | {"pad_token_id": 0, "eos_token_id": [1]}))).to(ids.device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()

    def step() -> None:
        outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", choices=MODELS, default="default")
    options.add_argument("--device", default="cpu")
    options.add_argument("--precision", choices=("float32", "bfloat16"), help="default: what a run would choose")
    options.add_argument("--tokens", type=int, default=2048, help="a step")
    options.add_argument("--steps", type=int, default=4, help="in a measurement")
    given = options.parse_args()
    keep_allocations()
    torch.manual_seed(0)
    device, config = torch.device(given.device), MODELS[given.model]
    precision = given.precision or choose_precision(device)
    context = config.max_position_embeddings
    ids = torch.randint(2, config.vocab_size, (max(1, given.tokens // context), context), device=device)
    labels = ids.roll(-1, dims=1)
    muon, adam = (our_step(config, ids, labels, precision, muon) for muon in (True, False))
    theirs = their_step(config, ids)
    found = alternate(
        {
            "miniGLM": lambda: ids.numel() / timed(muon, given.steps, device),
            "miniGLM, AdamW": lambda: ids.numel() / timed(adam, given.steps, device),
            "transformers, AdamW": lambda: ids.numel() / timed(theirs, given.steps, device),
            "product": lambda: measure_gigaflops(device, precision, 0.5),
        },
        given.rounds,
    )
    product = found.pop("product")
    work = config.flops_per_token(context) / 1e9
    rows = [
        {
            "": name,
            "tokens/s": statistics.median(speeds),
            "× transformers": median_ratio(speeds, found["transformers, AdamW"]),
            "utilisation": work * median_ratio(speeds, product),
        }
        for name, speeds in found.items()
    ]
    title = f"{config.num_parameters / 1e6:.1f} M weights, {ids.numel()} tokens a step, {device}, ours in {precision}"
    report(
        f"training_speed_{given.model}",
        title,
        rows,
        given,
        precision=precision,
        product_gigaflops=statistics.median(product),
        rounds=found,
    )


if __name__ == "__main__":
    main()
