"""Runs the command line as a user does: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPE = """
[run]
minutes = "none"
device = "cpu"
[tokenizer]
vocab_size = 700
[model]
num_hidden_layers = 1
hidden_size = 32
intermediate_size = 64
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
context = 96
[pretrain]
steps = 12
rows = 4
evaluate_every = 6
[finetune]
steps = 12
rows = 4
evaluate_every = 6
"""


def miniglm(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "miniglm", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=os.environ | {"PYTHONUTF8": "1", "COLUMNS": "200"} | environment,
        stdin=subprocess.DEVNULL,
    )


def fails(*arguments: str | Path, words: tuple[str, ...], **environment: str) -> None:
    """The command must end with one line that has these words, exit code 1, and no traceback."""
    done = miniglm(*arguments, **environment)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("错误：")
    for word in words:
        assert word in last, last


def demo(material: Path, out: Path, *more: str | Path) -> list[str | Path]:
    return [
        "demo",
        "--no-chat",
        "--recipe",
        material / "recipe.toml",
        "--book",
        material / "书.txt",
        "--qa",
        material / "qa.jsonl",
        "--out",
        out,
        *more,
    ]
