"""How long a user waits: `miniglm --help`, and `miniglm ask` with a model folder, each a process of its own.

    python benchmarks/startup.py [RUN] [--rounds 5]

RUN's index answers, and its model with at most 32 tokens. Without RUN only the latter, by a model of the default run's
sizes with random weights.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from side_by_side import alternate, parser, report

from miniglm.checkpoint import save_model
from miniglm.config import ModelConfig
from miniglm.model import GLM
from miniglm.tokenizer import train_tokenizer

GOALS = {"miniglm --help": 0.3, "miniglm ask": 2.5, "miniglm ask --closed-book": 2.5, "import torch": None}


def command(*arguments: str) -> Callable[[], float]:
    """Seconds that a Python process with these arguments takes."""

    def measure() -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        return time.perf_counter() - begun

    return measure


def random_model(folder: Path) -> None:
    """A model folder that is as large as the default run's."""
    letters = [chr(0x4E00 + i) for i in range(3000)]
    texts = ["".join(letters[(i * j) % 3000] for j in range(1, 40)) for i in range(1, 3000)]
    tokenizer = train_tokenizer(texts, vocab_size=4096, corpus_characters=117_000)
    save_model(folder, GLM(ModelConfig(4096, 256, 704, 4, 4, 2, 64, 256)).initialize(0), tokenizer)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("run", nargs="?", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.run is None:
            random_model(Path(scratch))
        ask = ["-m", "miniglm", "ask", str(given.run or scratch), "关羽字什么？"]
        measured = {
            "miniglm --help": command("-m", "miniglm", "--help"),
            "miniglm ask": command(*ask),
            "miniglm ask --closed-book": command(*ask, "--closed-book", "--max-new-tokens", "32"),
            "import torch": command("-c", "import torch"),
        }
        if given.run is None:
            del measured["miniglm ask"]
        found = alternate(measured, given.rounds)
    rows = [
        {"": name, "seconds": statistics.median(times), "best": min(times), "goal": GOALS[name] or ""}
        for name, times in found.items()
    ]
    report("startup", "Start", rows, given, rounds=found)


if __name__ == "__main__":
    main()
