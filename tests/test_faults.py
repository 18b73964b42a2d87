"""Runs that are killed, stopped, damaged or short of disk lose nothing; a run folder of an older version goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ROOT, demo, fails, miniglm
from test_training import losses, model, run, stage

from miniglm import checkpoint
from miniglm.checkpoint import load_last_state, load_model, load_state, previous_state, save_state
from miniglm.errors import MiniGLMError
from miniglm.files import (
    TEMPORARY,
    check_digests,
    clean_temporaries,
    file_digests,
    read_json,
    sealed,
    temporary_folder,
    unsealed,
    write_json,
    write_whole,
)
from miniglm.weights import read_safetensors

KEPT = ROOT / "tests" / "data"


# Checksums ------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "sha256"), json_values, max_size=5), st.data())
@settings(deadline=None, max_examples=60)
def test_a_sealed_object_comes_back_and_a_flipped_bit_is_told(content: dict[str, object], data: st.DataObject) -> None:
    assert unsealed(json.loads(json.dumps(sealed(content)))) == json.loads(json.dumps(content))
    text = bytearray(json.dumps(sealed(content)).encode())
    at = data.draw(st.integers(0, 8 * len(text) - 1))
    text[at // 8] ^= 1 << at % 8
    # Told, or the name of the checksum itself was hit and nothing else.
    with contextlib.suppress(ValueError):
        found = unsealed(json.loads(text))
        assert {k: v for k, v in found.items() if k in content} == json.loads(json.dumps(content))


def test_files_without_a_checksum_are_those_of_older_versions(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"steps": 3}')
    assert read_json(tmp_path / "a.json", fix="") == {"steps": 3}
    write_json(tmp_path / "b.json", {"steps": 3})
    (tmp_path / "b.json").write_text((tmp_path / "b.json").read_text().replace("3", "4", 1))
    with pytest.raises(MiniGLMError, match=r"b\.json.*校验和.*再来"):
        read_json(tmp_path / "b.json", fix="再来")
    digests = file_digests(tmp_path, ["a.json"])
    check_digests(tmp_path, digests, fix="")
    (tmp_path / "a.json").unlink()
    with pytest.raises(MiniGLMError, match=r"a\.json"):
        check_digests(tmp_path, digests, fix="")


def test_every_flipped_bit_of_a_state_is_told_and_the_one_before_is_used(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    for step in (1, 2):
        save_state(path, {"w": torch.full((3,), float(step))}, {"step": step})
    whole = path.read_bytes()
    chosen = random.Random(0).sample(range(8 * len(whole)), 300) + list(range(64))
    for bit in chosen:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            tensors, meta = load_state(path)
        except MiniGLMError as error:
            assert path.name in str(error)
        else:  # the bit was in the name of the checksum: all else is as it was
            assert meta["step"] == 2 and tensors["w"].tolist() == [2.0] * 3
            assert "sha256" not in read_safetensors(path)[1]
    for cut in (b"", whole[:7], whole[: len(whole) // 2], whole[:-1], whole + b"\0"):
        path.write_bytes(cut)
        said: list[str] = []
        found = load_last_state(path, said.append)
        assert found is not None and found[1]["step"] == 1 and found[0]["w"].tolist() == [1.0] * 3
        assert len(said) == 1 and "state.safetensors" in said[0] and "第 1 步" in said[0]
        assert not path.exists() and (tmp_path / "state.damaged.safetensors").read_bytes() == cut
    save_state(path, {"w": torch.ones(3)}, {"step": 3})
    assert load_state(previous_state(path))[1]["step"] == 1  # the good one was kept, not the damaged one
    path.unlink()  # killed between the two renames
    found = load_last_state(path, lambda line: pytest.fail(line))
    assert found is not None and found[1]["step"] == 1
    previous_state(path).write_bytes(b"")
    with pytest.raises(MiniGLMError, match="previous"):
        load_last_state(path, lambda line: None)


def test_a_run_with_a_damaged_state_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    whole, cut = model(), model()
    run(tmp_path / "whole", whole, stage())

    class Killed(Exception):
        pass

    def kill(progress: object) -> None:
        if getattr(progress, "step", 0) == 10:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "cut", cut, stage(), on_progress=kill)
    state = tmp_path / "cut" / "state.safetensors"
    assert load_state(state)[1]["step"] == 8 and load_state(previous_state(state))[1]["step"] == 4
    content = bytearray(state.read_bytes())
    content[-9] ^= 4
    state.write_bytes(content)
    said: list[str] = []
    cut = model()
    run(tmp_path / "cut", cut, stage(), warn=said.append)
    assert "第 4 步" in said[0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), whole.parameters(), strict=True))


def test_damaged_numbers_in_metrics_cost_only_their_lines(tmp_path: Path) -> None:
    run(tmp_path, model(), stage(steps=4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1].replace(b"step", b"stfp"), b"\xff\xfe", b"[1]", *lines[2:]]))
    tensors, meta = load_state(tmp_path / "state.safetensors")
    save_state(tmp_path / "state.safetensors", tensors, meta | {"finished": False})
    run(tmp_path, model(), stage(steps=6))
    assert [json.loads(line)["step"] for line in path.read_text("utf-8").splitlines()] == [1, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("name", "redone"),
    [
        ("corpus/train.jsonl", "corpus"),
        ("qa/train.jsonl", "qa"),
        ("tokens/train.npy", "tokens"),
        ("tokens/pairs_train.npz", "tokens"),
        ("tokens/meta.json", "tokens"),
        ("corpus/summary.json", "corpus"),
        ("tokenizer/tokenizer.json", "tokens"),
        ("plan.json", None),
        ("model/model.safetensors", None),
        ("model/config.json", None),
        ("model/tokenizer.json", None),
    ],
)
def test_one_flipped_bit_in_any_file_of_a_run_is_named(
    finished: Path, tmp_path: Path, name: str, redone: str | None
) -> None:
    from miniglm.pipeline import Run, make_plan

    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("report"))
    content = bytearray((folder / name).read_bytes())
    at = 2 * len(content) // 3
    while not (chr(content[at]).isdigit() or name.endswith(("npy", "npz", "safetensors"))):
        at += 1  # a digit into another one: still JSON, still plausible
    content[at] ^= 1
    (folder / name).write_bytes(content)
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    with pytest.raises(MiniGLMError) as failed:
        if name.startswith("model"):
            load_model(folder / "model")
        else:
            make_plan(Run(folder))
    assert Path(name).name in str(failed.value) and len(str(failed.value).splitlines()) == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    if redone is not None:  # what the message says to do helps, and trains nothing again
        assert f"删去 {folder / redone}" in str(failed.value)
        shutil.rmtree(folder / redone)
        make_plan(Run(folder))


def test_results_that_are_damaged_are_put_aside(finished: Path, tmp_path: Path) -> None:
    from miniglm.pipeline import Run

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "results.json").write_bytes(b'{"seconds": ')
    opened = Run(folder)
    opened.note(more=1)
    assert opened.results() == {"more": 1} and len(list(folder.glob("results-*.json"))) == 1


# The disk -------------------------------------------------------------------------------------------------------------


def test_a_rename_that_fails_leaves_the_last_state_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {}, {"step": 1})
    plain, calls = Path.replace, list[str]()

    def fail(self: Path, target: Path) -> Path:
        calls.append(self.name)
        if self.name.startswith(TEMPORARY):
            raise OSError(errno.EIO, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(MiniGLMError, match="原来的内容没有动"):
        save_state(path, {}, {"step": 2})
    assert load_state(path)[1]["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    assert len(calls) == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.name != "posix" or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a small file system here (not root)")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_while_training(small_disk: Path, tmp_path: Path) -> None:
    """The run ends with a line, the last state is whole, and with room again it ends like an undisturbed one."""
    folder, ballast = small_disk / "run", small_disk / "ballast"
    whole, cut = model(), model()
    run(tmp_path / "whole", whole, stage())

    def fill(progress: object) -> None:
        if getattr(progress, "step", 0) == 6:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(MiniGLMError, match="写不了文件"):
        run(folder, cut, stage(), on_progress=fill)
    assert load_state(folder / "state.safetensors")[1]["step"] == 4
    assert not list(folder.glob(f"{TEMPORARY}*"))
    ballast.unlink()
    cut = model()
    run(folder, cut, stage())
    assert losses(folder) == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), whole.parameters(), strict=True))


def test_a_folder_that_becomes_read_only(small_disk: Path) -> None:
    folder = small_disk / "run"

    def lock(progress: object) -> None:
        if getattr(progress, "step", 0) == 6:
            subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    with pytest.raises(MiniGLMError, match="写不了文件"):
        run(folder, model(), stage(), on_progress=lock)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert load_state(folder / "state.safetensors")[1]["step"] == 4
    run(folder, model(), stage())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(MiniGLMError, match=r"new.*Read-only"):
        checkpoint.RunFolder(small_disk / "new").create_or_open()


# Stops and kills ------------------------------------------------------------------------------------------------------


def started(material: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "miniglm", *map(str, demo(material, out))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"},
    )


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("place", ["corpus", "pretrain/metrics.jsonl", "report"])
def test_a_stop_at_any_stage_ends_with_its_exit_code(
    material: Path, finished: Path, tmp_path: Path, sent: signal.Signals, code: int, place: str
) -> None:
    if (sent, place) in ((signal.SIGINT, "pretrain/metrics.jsonl"), (signal.SIGINT, "report")):
        pytest.skip("test_cli.py and test_evaluate.py do that")
    out = tmp_path / "run"
    if place == "report":
        shutil.copytree(finished, out, ignore=shutil.ignore_patterns("report"))
    process = started(material, out)
    while process.poll() is None and not (out / place).exists():
        time.sleep(0.002)
    process.send_signal(sent)
    said, errors = process.communicate()
    assert process.returncode == code, said + errors
    assert "Traceback" not in errors
    if place.startswith("pretrain"):
        assert "接着做" in errors
        assert load_state(out / "pretrain" / "state.safetensors")[1]["step"] >= 0
    assert not list(out.rglob(f"{TEMPORARY}*"))


def interrupted_at_every_instruction(action: Callable[[], object], check: Callable[[], None], file: str = "") -> int:
    """Runs `action` again and again, with a Ctrl-C before its first instruction, its second, and so on, in all code but
    C, or in that of one file; `check` looks at what each leaves. Returns how many instructions there were."""
    at = left = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_code.co_filename.endswith(file):
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    while True:
        at += 1
        left = at
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            action()
        except KeyboardInterrupt:
            ended = False
        else:
            ended = True
        finally:
            sys.settrace(before)
        check()
        if ended:
            return at - 1


def test_ctrl_c_at_any_instruction_leaves_no_half_written_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "f"

    def look() -> None:
        assert {p.name for p in tmp_path.rglob("*") if p.is_file()} <= {"f"}
        assert not path.exists() or path.read_text() == "new"

    assert interrupted_at_every_instruction(lambda: write_whole(path, "new"), look) > 50


def test_ctrl_c_at_any_instruction_leaves_no_temporary_folder_that_is_not_cleaned_up(tmp_path: Path) -> None:
    def use() -> None:
        with temporary_folder(tmp_path / "run") as folder:
            (folder / "f").write_text("x")

    def look() -> None:
        clean_temporaries(tmp_path)
        assert not any((tmp_path / "run").iterdir())

    (tmp_path / "run").mkdir()
    assert interrupted_at_every_instruction(use, look, str(Path("miniglm") / "files.py")) > 20


SLOW = """
import sys
from pathlib import Path
from test_training import model, run, stage
def slow(progress):
    print(progress.step, flush=True)
    while progress.step == 3: pass
try:
    run(Path(sys.argv[1]), model(), stage(steps=10**6, evaluate_every=10**6), on_progress=slow)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_second_stop_ends_at_once(tmp_path: Path, sent: signal.Signals) -> None:
    """In the middle of a step that never ends: the first stop waits for it, the second does not."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=KEPT.parent,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "3\n":
        pass
    process.send_signal(sent)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(sent)
    _, errors = process.communicate()
    assert process.returncode in (-sent, 130), errors
    assert load_state(tmp_path / "state.safetensors")[1]["step"] == 0


def test_a_stop_that_comes_after_the_last_step_is_not_lost(tmp_path: Path) -> None:
    def stop() -> None:
        if len(losses(tmp_path)) == 12:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model(), stage(), on_evaluation=stop)
    assert load_state(tmp_path / "state.safetensors")[1]["finished"]


def test_kills_lose_nothing(tmp_path: Path) -> None:
    """A few of the many that benchmarks/faults/kills.py does."""
    script = ROOT / "benchmarks" / "faults" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "5", "--json", str(tmp_path / "kills.json")],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kills.json").read_text("utf-8"))
    assert found["kills"] >= 5 and found["lost"] == 0 and all(s["rounds"] for s in found["scenarios"].values())


def test_the_kill_script_sees_what_is_broken(tmp_path: Path, finished: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "faults" / "kills.py"), run_name="kills")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    assert script["broken_files"](folder) == []
    for name, cut in (("plan.json", 10), ("qa/train.jsonl", 3), ("tokens/train.npy", 5), ("loss.png", 2)):
        (folder / name).write_bytes((folder / name).read_bytes()[:-cut])
    assert len(script["broken_files"](folder)) == 4


# Folders of older versions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", sorted(path.name for path in KEPT.glob("run-format-*")))
def test_a_run_folder_of_each_version_opens_goes_on_and_is_evaluated(kept: str, tmp_path: Path) -> None:
    """Stopped in the middle of finetuning by the version that made it."""
    folder = tmp_path / "run"
    shutil.copytree(KEPT / kept, folder)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 200_000
    _, tokenizer = load_model(folder / "pretrain" / "model")
    assert tokenizer.decode(tokenizer.encode("刘备")) == "刘备"
    before = losses(folder / "finetune")
    state = load_state(folder / "finetune" / "state.safetensors")[1]
    assert not state["finished"] and 0 < state["step"] < 6
    done = miniglm("finetune", "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "预训练已完成，跳过" in done.stderr
    after = losses(folder / "finetune")
    assert len(after) == 6 and after[: len(before)] == before
    assert miniglm("evaluate", folder, "--limit", "2").returncode == 0
    report = read_json(folder / "report" / "report.json", fix="")
    assert report["splits"]
    assert all((path / "model.safetensors").exists() for path in (folder / "model", folder / "finetune" / "model"))


def test_a_recipe_may_change_lengths_and_not_sizes(finished: Path, tmp_path: Path, material: Path) -> None:
    """What may change does, what may not is refused with both values; everything at once, not one at a time."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("report"))
    (folder / "finetune" / "done.json").unlink()  # of what is over no length would matter
    text = (material / "recipe.toml").read_text("utf-8")
    given = ("--book", material / "书.txt", "--qa", material / "qa.jsonl", "--out", folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "sizes.toml").write_text(
        text.replace("hidden_size = 32", "hidden_size = 64").replace("vocab_size = 700", "vocab_size = 600"), "utf-8"
    )
    words = ("model.hidden_size：32 → 64", "tokenizer.vocab_size：700 → 600", "--out")
    fails("pretrain", "--recipe", tmp_path / "sizes.toml", *given, words=words)
    noted = {folder / "run.lock", folder / "run.lock.json"}
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p not in noted} | {
        p: content for p, content in before.items() if p in noted
    }
    (tmp_path / "lengths.toml").write_text(text.replace("evaluate_every = 6", "evaluate_every = 4"), "utf-8")
    done = miniglm("pretrain", "--recipe", tmp_path / "lengths.toml", *given)
    assert done.returncode == 0, done.stderr
    plan = read_json(folder / "plan.json", fix="")
    assert plan["pretrain"]["evaluate_every"] == 4 and plan["model"]["hidden_size"] == 32
    assert read_json(folder / "results.json", fix="")
    write_whole(folder / "recipe.toml", text.replace("[pretrain]", "[pretrian]"))
    fails("pretrain", "--out", folder, words=("recipe.toml", "pretrian"))
