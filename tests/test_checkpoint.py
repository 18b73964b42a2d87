"""What is saved comes back; what is damaged is named; what was there survives."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from miniglm import checkpoint, weights
from miniglm.checkpoint import RunFolder, load_model, load_state, save_model, save_state
from miniglm.config import ModelConfig
from miniglm.errors import MiniGLMError
from miniglm.files import keep_dated, write_whole
from miniglm.model import GLM
from miniglm.optimizer import build_optimizers
from miniglm.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["滚滚长江东逝水，浪花淘尽英雄。"] * 20, vocab_size=None, corpus_characters=300)


def made_model(tokenizer: Tokenizer, tied: bool = True) -> GLM:
    return GLM(ModelConfig(tokenizer.vocab_size, 32, 48, 2, 2, 1, 16, 64, tie_word_embeddings=tied)).initialize(1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_folder_comes_back_and_transformers_opens_it(tmp_path: Path, tokenizer: Tokenizer, tied: bool) -> None:
    model = made_model(tokenizer, tied).eval()
    save_model(tmp_path / "m", model, tokenizer)
    loaded, loaded_tokenizer = load_model(tmp_path / "m")
    assert loaded.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    ids = loaded_tokenizer.encode("浪花淘尽英雄")
    assert ids == tokenizer.encode("浪花淘尽英雄")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.inference_mode():
        x = torch.tensor([ids])
        torch.testing.assert_close(theirs(x).logits, loaded.logits(loaded(x)), atol=1e-4, rtol=0)
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "m").encode("浪花淘尽英雄", add_special_tokens=False)
        == ids
    )
    assert sorted(theirs.generation_config.eos_token_id) == sorted(tokenizer.stop_ids)


def test_a_header_is_looked_at_once_and_once_more_with_the_weights(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, made_model(tokenizer), tokenizer, max_shard=20_000)
    read_header, read = weights.read_header, Counter[str]()

    def counting(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
        read[path.name] += 1
        return read_header(path)

    for module in (checkpoint, weights):
        monkeypatch.setattr(module, "read_header", counting)
    load_model(tmp_path)
    assert set(read) == {path.name for path in tmp_path.glob("*.safetensors")} and len(read) > 1
    assert set(read.values()) == {2}


def test_every_missing_or_cut_file_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "m"
    save_model(folder, made_model(tokenizer), tokenizer)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        whole = (folder / name).read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[: len(whole) - 2], b"", b"\x00" * 40):
            (folder / name).write_bytes(damaged)
            with pytest.raises(MiniGLMError, match=name):
                load_model(folder)
        (folder / name).unlink()
        with pytest.raises(MiniGLMError, match=name):
            load_model(folder)
        (folder / name).write_bytes(whole)
    load_model(folder)
    with pytest.raises(MiniGLMError, match="没有这个模型目录"):
        load_model(tmp_path / "nowhere")


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(tmp_path, made_model(tokenizer), tokenizer)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for change, word in (
        ({"num_hidden_layers": 3}, "缺少张量"),
        ({"num_hidden_layers": 1}, "多出张量"),
        ({"intermediate_size": 52}, "应为"),
        ({"num_hidden_layers": 2**24}, "缺少张量"),
        ({"rope_parameters": "x"}, r"config\.json"),
        ({"rms_norm_eps": 10**400}, r"config\.json"),
        ({"hidden_size": None}, r"config\.json"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(MiniGLMError, match=word):
            load_model(tmp_path)


def test_a_hostile_header_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(MiniGLMError, match="safetensors"):
        weights.read_safetensors(path)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(MiniGLMError, match="应有"):
        weights.read_safetensors(path)
    for text in (b"[" * 100_000, b"[1]", b'{"a": 1}', b'{"a": {"data_offsets": [0, Infinity]}}', b"\xff\xff"):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(MiniGLMError, match="不是有效的 safetensors"):
            weights.read_safetensors(path)


def test_state_comes_back_with_its_meta_and_its_format(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.arange(5)}, {"step": 7, "最好": {"score": 1.5}})
    tensors, meta = load_state(path)
    assert tensors["a"].tolist() == [0, 1, 2, 3, 4] and meta["step"] == 7 and meta["最好"] == {"score": 1.5}
    save_state(path, {}, {"format": 99})
    with pytest.raises(MiniGLMError, match="99"):
        load_state(path)


def test_resumed_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def begin() -> tuple[GLM, list[torch.optim.Optimizer]]:
        model = made_model(tokenizer)
        return model, build_optimizers(
            model, muon=True, matrix_lr=0.01, adam_lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)
        )

    def steps(model: GLM, optimizers: list[torch.optim.Optimizer], count: int) -> None:
        for _ in range(count):
            ids = torch.randint(0, 200, (2, 12))
            model.loss(ids, ids.roll(-1))[0].backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    torch.manual_seed(3)
    model, optimizers = begin()
    steps(model, optimizers, 3)
    tensors, others = checkpoint.optimizer_tensors(optimizers)
    weights = {f"w.{name}": parameter for name, parameter in model.named_parameters()}
    random = {f"r.{name}": state for name, state in checkpoint.rng_tensors().items()}
    path = tmp_path / "state.safetensors"
    save_state(path, {f"o.{name}": t for name, t in tensors.items()} | weights | random, {"others": others})
    steps(model, optimizers, 2)

    torch.manual_seed(99)
    again, fresh = begin()
    saved, meta = load_state(path)
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(saved[f"w.{name}"])
    kept = {name[2:]: t for name, t in saved.items() if name.startswith("o.")}
    checkpoint.restore_optimizers(fresh, kept, meta["others"])
    checkpoint.restore_rng({name[2:]: t for name, t in saved.items() if name.startswith("r.")})
    steps(again, fresh, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    smaller = [torch.optim.AdamW([parameter]) for parameter in list(again.parameters())[:2]]
    for wrong in (fresh[:1], fresh + fresh, smaller):
        with pytest.raises(MiniGLMError, match="优化器"):
            checkpoint.restore_optimizers(wrong, kept, meta["others"])


def test_a_write_that_fails_half_way_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everywhere, also where no small disk can be mounted: the system says that the disk is full when asked to flush."""
    write_whole(tmp_path / "f", "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MiniGLMError, match="原来的内容没有动"):
        write_whole(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    """A real one of 64 KiB, where the machine lets us mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.name == "posix"
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("cannot mount a small file system here")
    try:
        write_whole(disk / "f", b"old" * 1000)
        with pytest.raises(MiniGLMError, match="原来的内容没有动"):
            write_whole(disk / "f", b"new" * 100_000)
        assert (disk / "f").read_bytes() == b"old" * 1000
        assert [p.name for p in disk.iterdir()] == ["f"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_failing_rename_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "f", "old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(MiniGLMError, match="No space left"):
        write_whole(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_run_folder_is_marked_and_nothing_else_is_taken_for_one(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").create_or_open()
    (tmp_path / "new" / ".miniglm-tmp-killed").write_text("half")
    RunFolder(tmp_path / "new").create_or_open()
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"run.json", "run.lock", "run.lock.json"}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(MiniGLMError, match="不是 miniGLM 的运行目录"):
        RunFolder(tmp_path / "photos").create_or_open()
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"
    (tmp_path / "photos" / "cat.jpg").unlink()
    (tmp_path / "photos" / "run.lock").write_text("")  # killed before the mark was written
    RunFolder(tmp_path / "photos").create_or_open()
    (tmp_path / "new" / "run.json").write_text('{"format": 7, "miniglm": "9.9"}')
    with pytest.raises(MiniGLMError, match=r"7.*9\.9"):
        RunFolder(tmp_path / "new").create_or_open()
    with pytest.raises(MiniGLMError, match="是一个文件"):
        RunFolder(tmp_path / "new" / "run.json").create_or_open()


def test_what_is_in_the_way_is_kept_or_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_dated(tmp_path / "nothing")
    for text in ("first", "second"):
        (tmp_path / "a.txt").write_text(text, "utf-8")
        os.utime(tmp_path / "a.txt", (0, 0))  # made in the same second
        keep_dated(tmp_path / "a.txt")
    assert sorted(p.read_text("utf-8") for p in tmp_path.glob("a-*.txt")) == ["first", "second"]
    (tmp_path / "a.txt").write_text("third", "utf-8")

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(MiniGLMError, match=r"a\.txt"):
        keep_dated(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text("utf-8") == "third"
