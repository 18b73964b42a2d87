"""Speed and memory of turning a corpus into token ids: pipeline.encode_lines and dataset.write_tokens, as a run does it.

    python benchmarks/tokenizing.py [--megabytes 1 10 100 1000] [--vocab 4096] [--cores 1]

The text is the novel's own paragraphs in random order, made while it is read, so that what is measured is the memory
of tokenizing. Each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from side_by_side import parser, report


def novel(book: str) -> list[str]:
    """Paragraphs of a book that `corpus` knows, or of a file."""
    from miniglm.corpus import load_books

    return [p.text for found in load_books([book]) for p in found.paragraphs]


def endless(paragraphs: list[str], megabytes: float) -> Iterator[str]:
    """Paragraphs in random order until there are so many MB of UTF-8."""
    rng = random.Random(0)
    left = megabytes * 1e6
    while left > 0:
        yield (paragraph := rng.choice(paragraphs))
        left -= 3 * len(paragraph) + 1


def measure(book: str, megabytes: float, vocabulary: int) -> dict[str, float]:
    """Seconds and memory of one size, in this process."""
    from miniglm.bulk_encoding import BulkEncoder
    from miniglm.dataset import write_tokens
    from miniglm.pipeline import encode_lines
    from miniglm.tokenizer import train_tokenizer

    paragraphs = novel(book)
    begun = time.perf_counter()
    tokenizer = train_tokenizer(paragraphs, vocab_size=vocabulary, corpus_characters=sum(map(len, paragraphs)))
    trained = time.perf_counter() - begun
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, worked = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        ids = encode_lines(BulkEncoder(tokenizer), endless(paragraphs, megabytes))
        write_tokens(Path(folder) / "tokens.npy", ids)
    seconds, busy = time.perf_counter() - begun, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "MB": megabytes,
        "seconds": seconds,
        "MB/s": megabytes / seconds,
        "MB a CPU second": megabytes / busy,
        "tokens": float(len(ids)),
        "peak MiB": peak / 1024,
        "of it before": before / 1024,
        "training s": trained,
    }


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--megabytes", type=float, nargs="+", default=[1, 10, 100, 1000])
    options.add_argument("--book", default="sanguo")
    options.add_argument("--vocab", type=int, default=4096)
    options.add_argument("--cores", type=int, default=1)
    options.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.alone:
        print(json.dumps(measure(given.book, given.megabytes[0], given.vocab)))
        return
    rows = []
    for size in given.megabytes:
        settings = ["--alone", "--megabytes", str(size), "--book", given.book, "--vocab", str(given.vocab)]
        done = subprocess.run(
            [sys.executable, __file__, *settings],
            env=os.environ
            | {"RAYON_NUM_THREADS": str(given.cores), "TOKENIZERS_PARALLELISM": str(given.cores > 1).lower()},
            stdout=subprocess.PIPE,
            check=True,
        )
        rows.append(json.loads(done.stdout))
    report("tokenizing", "Tokenizing", rows, given)


if __name__ == "__main__":
    main()
