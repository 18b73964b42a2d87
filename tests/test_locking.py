"""A run folder belongs to one process at a time, and to nobody once that has died."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from running import fails, miniglm

from miniglm.checkpoint import RunFolder
from miniglm.errors import MiniGLMError
from miniglm.locking import HOLDER, REPORT, hold

HOLD = """
import sys
from pathlib import Path
from miniglm.checkpoint import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.open_to_evaluate() if "report" in sys.argv else folder.create_or_open()
print("held", flush=True)
sys.stdin.read()
"""


def holder(path: Path, *more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_told_who_has_the_folder_and_takes_over_from_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = holder(path)
    try:
        half = path / ".miniglm-tmp-being-written"  # of the first one, at work
        half.write_text("half")
        with pytest.raises(MiniGLMError) as refused:
            RunFolder(path).create_or_open()
        text = str(refused.value)
        assert str(first.pid) in text and socket.gethostname() in text and str(path) in text and "20" in text
        assert half.exists()
        (path / HOLDER).write_text("")  # the moment between the lock and the note
        with pytest.raises(MiniGLMError, match="另一个进程"):
            hold(path)
    finally:
        first.kill()
        first.communicate()
    mine = RunFolder(path)
    mine.create_or_open()
    assert json.loads((path / HOLDER).read_text("utf-8"))["pid"] == os.getpid()
    assert not half.exists()


def test_one_process_may_open_its_folder_twice_and_leaves_it_when_it_drops_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first, second = RunFolder(path), RunFolder(tmp_path / "x" / ".." / "run")
    first.create_or_open()
    (tmp_path / "x").mkdir()
    second.create_or_open()
    del first
    gc.collect()
    refused = subprocess.run([sys.executable, "-c", HOLD, str(path)], capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and str(os.getpid()) in refused.stderr
    del second
    gc.collect()
    process = holder(path)
    process.communicate("")
    assert process.returncode == 0


def test_a_run_at_work_can_be_evaluated_and_only_once_at_a_time(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    trains = holder(run)
    try:
        recipe = (run / "recipe.toml").stat().st_mtime_ns
        done = miniglm("evaluate", run, "--limit", "2")
        assert done.returncode == 0, done.stderr
        assert json.loads((run / HOLDER).read_text("utf-8"))["pid"] == trains.pid
        assert (run / "recipe.toml").stat().st_mtime_ns == recipe
    finally:
        trains.communicate("")
    evaluates = holder(run, REPORT)
    try:
        fails("evaluate", run, words=("评测报告", str(evaluates.pid), "等它结束再评测"))
        half, old = run / "report" / ".miniglm-tmp-being-written", run / ".miniglm-tmp-of-a-killed-one"
        half.write_text("half")
        old.write_text("half")
        RunFolder(run).create_or_open()
        assert half.exists() and not old.exists()
    finally:
        evaluates.kill()
        evaluates.communicate()
    RunFolder(run).open_to_evaluate()
    assert not half.exists()
