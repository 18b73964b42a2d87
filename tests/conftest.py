"""A small real run, made once and shared: a book, questions about it, and what the demo makes of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: threads of their own would only be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
from running import RECIPE, ROOT, demo, miniglm


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a book, questions and a recipe: the shipped set's sentences, chapter by chapter, as a book."""
    folder = tmp_path_factory.mktemp("material")
    rows = [json.loads(line) for line in (ROOT / "data/sanguo/train.jsonl").read_text("utf-8").splitlines()]
    lines, chapter, seen = [], 0, set()
    for row in rows[:1500]:
        if row["chapter"] != chapter:
            chapter = row["chapter"]
            lines.append(f"第{chapter}回 测试")
        if row["id"] not in seen:
            seen.add(row["id"])
            lines.append(row["answer"])
    (folder / "书.txt").write_text("\n".join(lines), "utf-8")
    (folder / "qa.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows[:60]), "utf-8")
    (folder / "recipe.toml").write_text(RECIPE, "utf-8")
    return folder


@pytest.fixture(scope="session")
def finished(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    done = miniglm(*demo(material, out))
    assert done.returncode == 0, done.stderr
    assert "比特/字" in done.stdout and done.stdout.count("问：") == 5
    return out
