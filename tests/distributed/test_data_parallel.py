"""Data parallel training: however many processes there are, the run is the same but for the order of sums."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from running import fails, miniglm
from safetensors.torch import load_file
from small_runs import (
    batches,
    losses,
    model,
    reached,
    rows,
    run,
    same_result,
    same_run,
    stage,
    stopped,
)
from together import together, torchrun, wait_for, workers

from miniglm.dataset import Batch, Batches
from miniglm.distributed import launch
from miniglm.errors import MiniGLMError
from miniglm.model import GLM
from miniglm.training import Stage


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(folder, stage())
    assert losses(folder)[-1] < 0.9 * losses(folder)[0]
    return folder


# The same run -----------------------------------------------------------------------------------------------------------


class Slow(Batches):
    """One process takes its time."""

    def batch(self, step: int, micro: int = 0, micros: int = 1) -> Batch:
        if launch.rank() == 1:
            time.sleep(0.02)
        return super().batch(step, micro, micros)


def slowly(folder: Path) -> None:
    plain = batches()
    run(folder, stage(), Slow(plain.text, plain.pairs, plain.rows, 0.5))


@pytest.mark.parametrize("size", [2, 4])
def test_more_processes_change_nothing_but_rounding(tmp_path: Path, alone: Path, size: int) -> None:
    together(size, slowly, tmp_path)  # four processes for six rows: two, two, one and one
    same_run(tmp_path, alone)


def test_adamw_alone_and_parts_of_parts(tmp_path: Path) -> None:
    how = stage(muon=False, micro_rows=1)
    run(tmp_path / "1", how)
    together(2, run, tmp_path / "2", how)
    same_run(tmp_path / "2", tmp_path / "1")


def test_fewer_rows_than_processes(tmp_path: Path) -> None:
    run(tmp_path / "1", stage(rows=3))
    together(4, run, tmp_path / "4", stage(rows=3))
    same_run(tmp_path / "4", tmp_path / "1")


class Watched(Batches):
    """Notes what a process draws."""

    def batch(self, step: int, micro: int = 0, micros: int = 1) -> Batch:
        found = super().batch(step, micro, micros)
        with Path(os.environ["DRAWN"], f"{launch.rank()}.txt").open("a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in found.rows if step < 10_000)  # the others are for validation
        return found


def watched(folder: Path, how: Stage) -> None:
    os.environ["DRAWN"] = str(folder)
    plain = batches(how.rows)
    run(folder / "run", how, Watched(plain.text, plain.pairs, plain.rows, 0.5))


def test_nobody_trains_on_a_row_that_another_has(tmp_path: Path) -> None:
    plain = batches(5)
    assert plain.text is not None
    steps = -(-plain.text.rows_per_epoch // plain.text_rows)  # an epoch of the text, whose last batch is not full
    together(3, watched, tmp_path, stage(rows=5, steps=steps, evaluate_every=steps, micro_rows=1))
    drawn = [(tmp_path / f"{rank}.txt").read_text("utf-8").split() for rank in range(3)]
    together_drawn = sorted(name for part in drawn for name in part)
    assert together_drawn == sorted(name for step in range(steps) for name in plain.names(step))
    assert len(set(together_drawn)) == 5 * steps and all(drawn)


# What all do together ---------------------------------------------------------------------------------------------------


class Tight(Batches):
    """The memory of one process holds one row at a time."""

    def batch(self, step: int, micro: int = 0, micros: int = 1) -> Batch:
        found = super().batch(step, micro, micros)
        if launch.rank() == 1 and step == 3 and len(found.ids) > 1:
            raise MemoryError
        return found


def tightly(folder: Path) -> None:
    plain, said = batches(), list[str]()
    run(folder, stage(), Tight(plain.text, plain.pairs, plain.rows, 0.5), warn=said.append)
    assert [line for line in said if "每次算 1 行" in line]


def test_one_process_out_of_memory_makes_all_take_fewer_rows(tmp_path: Path, alone: Path) -> None:
    together(2, tightly, tmp_path)
    same_run(tmp_path, alone)


class Poisoned(Batches):
    """Token ids of nothing in one process's rows: its loss is no number."""

    def __init__(self, made: GLM, steps: set[int]) -> None:
        plain = batches()
        super().__init__(plain.text, plain.pairs, plain.rows, 0.5)
        self.made, self.steps = made, steps

    def batch(self, step: int, micro: int = 0, micros: int = 1) -> Batch:
        found = super().batch(step, micro, micros)
        if launch.rank() == 1 and step in self.steps:
            found.ids[:] = 1_000  # beyond the embedding below, which then gives NaN
        return found


def poisoned(folder: Path, steps: set[int], fails: bool) -> None:
    made = model()
    plain = made.model.embed_tokens.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return plain(ids.clamp_max(49)).masked_fill((ids > 49)[..., None], float("nan"))

    made.model.embed_tokens.forward = forward  # type: ignore[method-assign,assignment]
    try:
        run(folder, stage(steps=30), Poisoned(made, steps), made)
    except MiniGLMError as error:
        assert fails and "3 次退回" in str(error)
    else:
        assert not fails


def test_a_bad_row_in_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    together(2, poisoned, tmp_path, {3, 9, 10, 11}, False)
    found = rows(tmp_path)
    assert [r["step"] for r in found if "skipped" in r] == [4, 10, 11, 12]
    assert found[3]["skipped_rows"] == batches().names(3)
    assert found[-1]["lr_factor"] < 0.05  # after a return to the last state, half of what it would be
    weights = [load_file(tmp_path / f"weights{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(t, weights[1][n]) and torch.isfinite(t).all() for n, t in weights[0].items())


def test_bad_rows_without_end_stop_all(tmp_path: Path) -> None:
    together(2, poisoned, tmp_path, set(range(5, 30)), True)


@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_process_ends_all_and_another_number_goes_on(tmp_path: Path, alone: Path, who: int) -> None:
    together(4 if who else 2, stopped, tmp_path, who)
    assert len(losses(tmp_path)) == 6
    if who:
        together(2, run, tmp_path, stage())
    else:
        run(tmp_path, stage())
    same_run(tmp_path, alone)


def timed(folder: Path) -> None:
    if launch.rank() == 1:  # its clock runs a hundred times as fast
        plain = time.monotonic
        time.monotonic = lambda: 100 * plain()
    run(folder, stage(steps=None, minutes=0.02, evaluate_every=None))


def test_the_first_process_decides_when_time_is_over(tmp_path: Path) -> None:
    together(2, timed, tmp_path)
    assert 1.2 <= rows(tmp_path)[-1]["elapsed"] < 100
    weights = [load_file(tmp_path / f"weights{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(t, weights[1][n]) for n, t in weights[0].items())


def dropped(folder: Path) -> None:
    for name in ("a", "b"):
        made = model()
        made.dropout = 0.2
        run(folder / name, stage(steps=4), made=made)


def test_dropout_is_the_same_on_every_repetition(tmp_path: Path) -> None:
    together(2, dropped, tmp_path)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


MEETS = """
import atexit
import torch.distributed as dist
atexit.register(lambda: print("connected" if dist.is_initialized() else "left"))  # called last
from miniglm.distributed import team
team.join()
team.tell(team.total(1.0))
"""


def test_connections_are_taken_down_before_the_process_ends() -> None:
    """Else C++ ends some of the processes with SIGABRT, when all is done."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    where |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEETS],
            env=os.environ | where | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    assert [process.communicate(timeout=120)[0] for process in started] == ["left\n"] * 2
    assert [process.returncode for process in started] == [0, 0]


# The command line -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str | Path]]:
    """An undisturbed run of one process, and how it was started."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    command: list[str | Path] = ["finetune", "--recipe", material / "recipe.toml"]
    command += ["--book", material / "书.txt", "--qa", material / "qa.jsonl"]
    done = miniglm(*command, "--out", out, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return out, command


def test_a_killed_worker_comes_back(prepared: tuple[Path, list[str | Path]], tmp_path: Path) -> None:
    alone, command = prepared
    out = tmp_path / "run"
    with torchrun(2, *command, "--out", out, restarts=1) as started:
        wait_for(lambda: reached(out / "finetune" / "metrics.jsonl", 7), started)
        workers(started)[1].kill()
        output = started.communicate(timeout=150)[0]
        assert started.returncode == 0, output
    assert output.count("微调完成") == 1 and output.count("预训练完成") == 1  # one process speaks
    same_result(out, alone)


def test_sigterm_saves_a_sharded_run_and_one_process_goes_on(
    prepared: tuple[Path, list[str | Path]], tmp_path: Path
) -> None:
    alone, command = prepared
    out = tmp_path / "run"
    with torchrun(2, *command, "--shard", "--out", out) as started:
        wait_for(lambda: reached(out / "finetune" / "metrics.jsonl", 3), started)
        started.send_signal(signal.SIGTERM)
        output = started.communicate(timeout=150)[0]
    assert "已保存" in output and not (out / "finetune" / "done.json").exists()
    assert any((out / "finetune").glob("state-*/state.json"))
    fails(*command, "--shard", "--out", out, words=("--shard", "torchrun"))
    done = miniglm(*command, "--out", out, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    same_result(out, alone)


def test_other_verbs_and_faults_are_one_line(tmp_path: Path, material: Path) -> None:
    with torchrun(2, "demo", "--out", tmp_path / "a") as started:
        output = started.communicate(timeout=150)[0]
    assert output.count("错误（进程 ") == 1 and "torchrun 只用于 pretrain、finetune" in output
    with torchrun(2, "pretrain", "--recipe", material / "没有.toml", "--out", tmp_path / "b") as started:
        output = started.communicate(timeout=150)[0]
    assert output.count("错误（进程 0）") == 1 and "找不到配方文件" in output
