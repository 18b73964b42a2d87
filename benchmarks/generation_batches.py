"""How much more the engine makes when it makes many sequences at once: characters are not counted here, tokens are.

    python benchmarks/generation_batches.py [RUN] [--rounds 5] [--json FILE]

Without RUN a model of the default run's size with random weights: the speed is the same. One sequence and each batch
alternate; the table has medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from miniglm.checkpoint import load_model
from miniglm.config import ModelConfig
from miniglm.generation import Engine
from miniglm.locate import find_model
from miniglm.model import GLM
from miniglm.sampling import SamplingSettings

DEFAULT = ModelConfig(4096, 256, 704, 4, 4, 2, 64, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=150, help="tokens a sequence")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = load_model(find_model(given.run))[0] if given.run else GLM(DEFAULT).initialize(0).eval()
    engine, settings = Engine(model), SamplingSettings(max_new_tokens=given.tokens)
    sizes = (1, 2, 4, 8, 16, 32, 64)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(given.rounds + 1):
        for size in sizes:
            prompts = [[7 + i, *range(20, 32)] for i in range(size)]
            begun = time.perf_counter()
            engine.generate(prompts, settings, batch_size=size)
            if turn:  # the first round warms up
                seconds[size].append(time.perf_counter() - begun)
    rates = {size: size * given.tokens / statistics.median(seconds[size]) for size in sizes}
    print(f"{'sequences':>9}  {'tokens/s':>9}  {'to one':>6}")
    for size, rate in rates.items():
        print(f"{size:>9}  {rate:>9,.0f}  {rate / rates[1]:>6.1f}")
    if given.json:
        given.json.write_text(json.dumps({"tokens_per_second": rates}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
