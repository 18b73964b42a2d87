"""FSDP2: a model shared out over processes trains as a whole one, and its state goes on on any number of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import losses, model, near, run, same_run, stage, stopped
from together import together

from miniglm.distributed import launch
from miniglm.distributed.sharded_state import load_sharded
from miniglm.distributed.sharding import shard
from miniglm.distributed.team import lost
from miniglm.errors import MiniGLMError
from miniglm.model import GLM
from miniglm.optimizer import local
from miniglm.training import Progress, Stage


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(folder, stage())
    return folder


def sharded(folder: Path, how: Stage, stop: bool = False) -> None:
    made = shard(model(), torch.device("cpu"))
    assert sum(local(p).numel() for p in made.parameters()) < 0.6 * sum(p.numel() for p in made.parameters())
    if stop:
        stopped(folder, 1, made)
    else:
        run(folder, how, made=made)


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*state*"))


@pytest.mark.parametrize(("muon", "size"), [(True, 2), (False, 2), (True, 3)])
def test_a_sharded_model_trains_as_a_whole_one(tmp_path: Path, muon: bool, size: int) -> None:
    how = stage(muon=muon, micro_rows=2)
    run(tmp_path / "whole", how)
    together(size, sharded, tmp_path / "sharded", how)  # three processes: no dimension divides evenly
    same_run(tmp_path / "sharded", tmp_path / "whole")
    assert states(tmp_path / "sharded") == ["state-00000008", "state-00000012"]
    assert not list(tmp_path.rglob("*.distcp")) and not list(tmp_path.rglob(".metadata"))  # which are pickles


def test_a_sharded_state_goes_on_on_one_process_and_back(tmp_path: Path, alone: Path) -> None:
    together(2, sharded, tmp_path, stage(), True)
    assert len(losses(tmp_path)) == 6 and "state-00000006" in states(tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(GLM, "loss", _killed_at(9))
        run(tmp_path, stage(evaluate_every=8))
    assert states(tmp_path) == ["state.previous.safetensors", "state.safetensors"] or states(tmp_path) == [
        "state.safetensors"
    ]
    together(3, sharded, tmp_path, stage())  # from a whole state to three shares
    assert states(tmp_path) == ["state-00000012"]
    assert losses(tmp_path) == near(losses(alone))


def _killed_at(calls: int):  # type: ignore[no-untyped-def]
    plain, left = GLM.loss, [calls]

    def loss(self: GLM, *arguments: object, **named: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("killed")
        return plain(self, *arguments, **named)  # type: ignore[arg-type]

    return loss


def test_a_damaged_sharded_state_is_told_and_the_one_before_is_used(tmp_path: Path) -> None:
    together(2, sharded, tmp_path, stage())
    last = tmp_path / "state-00000012"
    victim = sorted(last.glob("*.safetensors"))[1]
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    said: list[str] = []
    found = load_sharded(tmp_path / "state.safetensors", said.append)
    assert found is not None and found[1]["step"] == 8
    assert len(said) == 1 and victim.name in said[0] and "state-00000008" in said[0]
    assert (tmp_path / "damaged-state-00000012").exists()
    (tmp_path / "state-00000008" / "state.json").write_text("{")
    with pytest.raises(MiniGLMError, match=r"state\.json"):
        load_sharded(tmp_path / "state.safetensors", said.append)


def left(folder: Path) -> None:
    def leave(progress: Progress) -> None:
        if progress.step == 3 and launch.rank() == 1:
            os._exit(0)

    made = shard(model(), torch.device("cpu"))
    with pytest.raises((RuntimeError, MiniGLMError)) as caught:
        run(folder, stage(), made=made, on_progress=leave)
    assert "失去联系" in str(caught.value if isinstance(caught.value, MiniGLMError) else lost(caught.value))
    os._exit(0)  # without saying goodbye to who is gone


def test_a_process_that_goes_in_the_midst_is_missed(tmp_path: Path) -> None:
    together(2, left, tmp_path)
    assert len(losses(tmp_path)) == 3


def too_large(*arguments: Any, **named: Any) -> tuple[torch.Tensor, int]:
    return torch.empty(2**60), 0


def crowded(folder: Path) -> None:
    made = shard(model(), torch.device("cpu"))
    if launch.rank() == 1:
        made.loss = too_large  # type: ignore[method-assign]
    with pytest.raises((RuntimeError, MiniGLMError)) as caught:
        run(folder, stage(), made=made)
    if launch.rank() == 1:
        assert "micro_rows" in str(caught.value)
    os._exit(0)


def test_a_sharded_run_without_memory_says_what_to_change(tmp_path: Path) -> None:
    together(2, crowded, tmp_path)
