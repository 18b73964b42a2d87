"""Steps that would do harm are not taken; what does not fit into memory is taken in smaller pieces."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import batches, losses, model, run, stage

from miniglm.checkpoint import load_state
from miniglm.config import ModelConfig
from miniglm.dataset import Batch, Batches
from miniglm.errors import MiniGLMError
from miniglm.guard import (
    IN_A_ROW,
    LEAST,
    RETURNS,
    Guard,
    activation_bytes,
    is_out_of_memory,
    smaller_micro_batch,
)
from miniglm.model import GLM


class Harmful(Batches):
    """Poisoned batches: the loss of certain steps, and with it the gradient, is multiplied."""

    def __init__(self, made: GLM, steps: dict[int, float]) -> None:
        super().__init__(batches().text, None, rows=4)
        factor, plain = 1.0, made.loss

        def poison(step: int) -> None:
            nonlocal factor
            factor = steps.get(step, 1.0)

        def loss(*arguments: Any, **named: Any) -> tuple[torch.Tensor, int]:
            found, count = plain(*arguments, **named)
            return found * (factor if made.training else 1.0), count

        self.poison = poison
        made.loss = loss  # type: ignore[method-assign]

    def batch(self, step: int, micro: int = 0, micros: int = 1) -> Batch:
        self.poison(step)
        return super().batch(step, micro, micros)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def finite(made: GLM) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in made.state_dict().values())


def test_a_gradient_a_thousand_times_the_usual_is_skipped_with_its_rows_named(tmp_path: Path) -> None:
    made, said = model(), list[str]()
    run(tmp_path, made, stage(steps=14), source=Harmful(made, {10: 1e6}), warn=said.append)
    found = rows(tmp_path)
    assert [row["step"] for row in found if "skipped" in row] == [11]
    assert found[10]["skipped_rows"] == [f"text:{i}" for i in range(40, 44)]
    assert math.isfinite(found[10]["loss"]) and found[10]["gradient_norm"] > 1000 * found[9]["gradient_norm"]
    assert len(said) == 1 and "第 11 步跳过" in said[0] and "平时" in said[0]
    assert finite(made)


def test_bad_steps_in_a_row_go_back_to_the_saved_weights_at_half_the_rate(tmp_path: Path) -> None:
    """... and the rows that did it do not come again; three returns are borne, and the run ends well."""
    bad = {step: math.nan for first in (5, 13, 21) for step in range(first, first + IN_A_ROW)}
    made, said = model(), list[str]()
    run(tmp_path, made, stage(steps=30, decay=0.0, warmup=0.0), source=Harmful(made, bad), warn=said.append)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, 31))
    assert [row["step"] - 1 for row in found if "skipped" in row] == sorted(bad)
    assert [row["lr_factor"] for row in found if row["step"] in (1, 9, 17, 25)] == [1.0, 0.5, 0.25, 0.125]
    assert sum("退回" in line for line in said) == 3
    assert finite(made) and load_state(tmp_path / "state.safetensors")[1]["guard"]["returns"] == RETURNS


def test_after_the_last_return_it_stops_and_what_is_saved_is_good(tmp_path: Path) -> None:
    made, saved = model(), list[dict[str, float]]()
    bad = dict.fromkeys(range(9, 30), math.nan)
    with pytest.raises(MiniGLMError, match=r"已经 3 次退回.*已停止") as failed:
        run(tmp_path, made, stage(steps=30), source=Harmful(made, bad), save_best=saved.append)
    assert str(tmp_path / "metrics.jsonl") in str(failed.value)
    assert rows(tmp_path)[-1]["step"] == 9 + 4 * IN_A_ROW and "skipped_rows" in rows(tmp_path)[-1]
    tensors, _ = load_state(tmp_path / "state.safetensors")
    assert all(bool(torch.isfinite(t.float()).all()) for t in tensors.values())
    assert saved and all(math.isfinite(scores["score"]) for scores in saved)


def test_weights_that_turn_nan_are_never_saved(tmp_path: Path) -> None:
    """Loss and gradient were fine, the update was not: found before the validation, which would have saved them."""
    made, said, saved = model(), list[str](), list[bool]()
    done = False

    def spoil(progress: Any) -> None:
        nonlocal done
        if progress.step == 7 and not done:
            done = True
            with torch.no_grad():
                made.model.embed_tokens.weight[49, 0] = math.inf  # of a token that no row holds: no loss tells of it

    def save_best(scores: dict[str, float]) -> None:
        saved.append(finite(made))

    run(tmp_path, made, stage(steps=12), on_progress=spoil, save_best=save_best, warn=said.append)
    assert any("权重里有 NaN" in line for line in said)
    assert saved and all(saved) and finite(made)


def test_a_resumed_run_judges_as_an_undisturbed_one(tmp_path: Path) -> None:
    """Usual norm, skipped steps and learning rate are in the state: cut anywhere, the run ends with the same weights."""
    bad = {9: 1e6} | dict.fromkeys(range(13, 13 + IN_A_ROW), math.nan)
    whole = model()
    run(tmp_path / "whole", whole, stage(steps=24), source=Harmful(whole, bad))
    for cut in (10, 14, 17):
        folder = tmp_path / str(cut)

        def stop(progress: Any, cut: int = cut) -> None:
            if progress.step == cut:
                raise MemoryError  # as good as a kill between two saves

        made = model()
        with pytest.raises(MemoryError):
            run(folder, made, stage(steps=24), source=Harmful(made, bad), on_progress=stop)
        made = model()
        run(folder, made, stage(steps=24), source=Harmful(made, bad))
        assert losses(folder) == losses(tmp_path / "whole")
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), whole.parameters(), strict=True))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=150), st.floats(1.0, 1e9))
@settings(deadline=None)
def test_a_guard_comes_back_from_json_and_judges_by_the_median(norms: list[float], factor: float) -> None:
    guard = Guard()
    for norm in norms:
        guard.norms.append(norm)
    again = Guard(json.loads(json.dumps(guard.to_json())))
    middle = sorted(guard.norms)
    usual = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
    expected = len(guard.norms) >= LEAST and usual * factor > 1000 * usual
    assert (again.fault(1.0, usual * factor) is not None) == (guard.fault(1.0, usual * factor) is not None) == expected


class Hungry(Batches):
    """Refuses more rows at once than fit, as torch's allocator does."""

    def __init__(self, most: int, error: type[Exception] = RuntimeError) -> None:
        super().__init__(batches().text, None, rows=4)
        self.most, self.error, self.asked = most, error, list[int]()

    def batch(self, step: int, micro: int = 0, micros: int = 1) -> Batch:
        found = super().batch(step, micro, micros)
        self.asked.append(len(found.ids))
        if len(found.ids) > self.most:
            torch.rand(3)  # random numbers are drawn before it fails
            raise self.error("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
        return found


@pytest.mark.parametrize(("most", "error"), [(2, RuntimeError), (1, MemoryError), (1, torch.OutOfMemoryError)])
def test_what_does_not_fit_is_taken_in_smaller_pieces_with_the_same_result(
    tmp_path: Path, most: int, error: type[Exception]
) -> None:
    made, small, whole, said = model(), model(), model(), list[str]()
    run(tmp_path / "hungry", made, stage(), source=Hungry(most, error), warn=said.append)
    run(tmp_path / "small", small, stage(micro_rows=most))
    assert losses(tmp_path / "hungry") == losses(tmp_path / "small")  # as if it had been set so: bit for bit
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), small.parameters(), strict=True))
    assert len(said) == (1 if most == 2 else 2) and f"每次算 {most} 行" in said[-1]
    for undropped in (made, whole):
        undropped.initialize(1).dropout = 0.0  # its masks are drawn by micro-batch
    run(tmp_path / "1", made, stage(steps=5), source=Hungry(most, error))
    run(tmp_path / "2", whole, stage(steps=5))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)


def test_below_one_row_it_says_what_would_fit(tmp_path: Path) -> None:
    with pytest.raises(MiniGLMError, match=r"一行也放不下：权重和梯度各 .* MiB.*一行 24 个 token.*MiB"):
        run(tmp_path, model(), stage(), source=Hungry(0))
    assert load_state(tmp_path / "state.safetensors")[1]["step"] == 0
    assert smaller_micro_batch(5, model().config, torch.device("cpu")) == 2


def test_errors_that_are_not_about_memory_are_not_taken_for_it(tmp_path: Path) -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(tmp_path, model(), stage(), source=Mismatched(batches().text, None, 4))


class Mismatched(Batches):
    def batch(self, step: int, micro: int = 0, micros: int = 1) -> Batch:
        torch.ones(2, 3) @ torch.ones(2, 3)
        raise AssertionError


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(500, 64, 192, 2, 4, 2, 16, 128),
        ModelConfig(500, 192, 512, 4, 3, 3, 64, 128),
        ModelConfig(4608, 256, 704, 4, 4, 2, 64, 128),
    ],
)
def test_the_estimate_of_a_row_is_near_what_autograd_keeps(config: ModelConfig) -> None:
    made = GLM(config, dropout=0.1).initialize(1)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # the output layer's gradient is made on the way forward: it is counted among the gradients
        if not isinstance(tensor, torch.nn.Parameter) and tensor.shape != made.lm_head.weight.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}
    ids = torch.randint(0, config.vocab_size, (1, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = made.loss(ids, ids)
    counted = sum(n for at, n in kept.items() if at not in weights)
    assert loss.requires_grad and 0.67 < activation_bytes(made.config, 128) / counted < 1.5, counted


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from miniglm.dataset import Batches, TextRows
from miniglm.errors import MiniGLMError
from miniglm.model import GLM
from miniglm.config import ModelConfig
from test_training import losses, run, stage

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def train(name, context, rows, layers, steps=2):
    tokens = np.arange(8 * context * rows, dtype=np.uint16) % 48 + 2
    source = Batches(TextRows(tokens, context, [0, 1], seed=0), None, rows=rows)
    made = GLM(ModelConfig(50, 64, 256, layers, 2, 1, 32, context)).initialize(1)
    how = stage(rows=rows, steps=steps, evaluate_every=steps)
    try:
        run(folder / name, made, how, source=source, warn=lambda line: print(name, "WARN", line))
        print(name, "LOSSES", *losses(folder / name))
    except MiniGLMError as error:
        print(name, "ERROR", error)

train("warm", 64, 1, 1, 1)  # what torch maps on first use is not what the limit is about
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 30 * 2**20, resource.RLIM_INFINITY))
train("cut", 256, 16, 2)
train("row", 2048, 2, 4)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
train("whole", 256, 16, 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux only")
def test_a_real_limit_of_the_address_space(tmp_path: Path) -> None:
    """The allocator's own refusals, as under `ulimit -v`: 16 rows need some 60 MiB, and 30 may be had."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    said = {(line.split()[0], line.split()[1]): line for line in done.stdout.splitlines()}
    assert "内存不够" in said["cut", "WARN"] and "行" in said["cut", "WARN"], done.stdout
    cut, whole = ([float(word) for word in said[name, "LOSSES"].split()[2:]] for name in ("cut", "whole"))
    assert cut == pytest.approx(whole, rel=1e-5)
    assert "放不下" in said["row", "ERROR"] and "上限" in said["row", "ERROR"], done.stdout
