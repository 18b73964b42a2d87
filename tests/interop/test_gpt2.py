"""The reference's checkpoints: converted, they say what the reference's own formulas say, here and in transformers."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from running import ROOT, fails, miniglm
from torch import Tensor

from miniglm.checkpoint import load_model
from miniglm.errors import MiniGLMError
from miniglm.generation import Engine
from miniglm.interop.export import export_model
from miniglm.interop.gpt2 import convert_checkpoint
from miniglm.sampling import SamplingSettings
from miniglm.tokenizer import Tokenizer, train_tokenizer

LAYERS, HEADS, SIZE, CONTEXT, ROWS = 2, 4, 32, 64, 400
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """In place of GPT-2's, which is not here without a network."""
    return train_tokenizer(["滚滚长江东逝水，浪花淘尽英雄。"] * 20, vocab_size=None, corpus_characters=300)


def random_weights(bias: bool) -> Weights:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    made = {"transformer.wte.weight": random(ROWS, SIZE), "transformer.wpe.weight": random(CONTEXT, SIZE)}
    parts: dict[str, tuple[int, ...]] = {"transformer.ln_f": (SIZE,)}
    for n in range(LAYERS):
        at = f"transformer.h.{n}."
        parts |= {f"{at}ln_1": (SIZE,), f"{at}ln_2": (SIZE,)}
        parts |= {f"{at}attn.c_attn": (3 * SIZE, SIZE), f"{at}attn.c_proj": (SIZE, SIZE)}
        parts |= {f"{at}mlp.c_fc": (4 * SIZE, SIZE), f"{at}mlp.c_proj": (SIZE, 4 * SIZE)}
    for name, shape in parts.items():
        made[f"{name}.weight"] = random(*shape)
        if bias:
            made[f"{name}.bias"] = random(shape[0])
    return made | {"lm_head.weight": made["transformer.wte.weight"]}


def save_checkpoint(path: Path, weights: Weights, **changes: Any) -> Path:
    """As the reference's train.py does: also optimizer, counters and settings, and torch.compile's prefix."""
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": SIZE, "block_size": CONTEXT, "vocab_size": ROWS}
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in weights.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 3e-4, "betas": (0.9, 0.99)}]},
        "model_args": sizes | {"bias": False, "dropout": 0.2} | changes,
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.9),
        "config": {"dataset": "jinyong", "device": "cuda"},
    }
    torch.save(content, path)
    return path


def by_the_formulas(w: Weights, ids: Tensor) -> Tensor:
    """Logits of the reference's architecture, (batch, seq, vocabulary), written out."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (SIZE,), w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]
    causal = torch.ones(ids.shape[1], ids.shape[1]).tril() == 0
    for n in range(LAYERS):
        at = f"transformer.h.{n}"
        q, k, v = (
            t.reshape(*ids.shape, HEADS, -1).transpose(1, 2)
            for t in linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").chunk(3, dim=-1)
        )
        scores = (q @ k.mT / (SIZE // HEADS) ** 0.5).masked_fill(causal, -torch.inf).softmax(-1)
        x = x + linear((scores @ v).transpose(1, 2).flatten(2), f"{at}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")), f"{at}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


@pytest.mark.parametrize("bias", [False, True])
def test_converted_it_says_what_the_reference_says(tmp_path: Path, tokenizer: Tokenizer, bias: bool) -> None:
    weights = random_weights(bias)
    convert_checkpoint(save_checkpoint(tmp_path / "ckpt.pt", weights, bias=bias), tmp_path / "out", tokenizer)
    model, loaded = load_model(tmp_path / "out")
    ids = torch.randint(0, ROWS, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = by_the_formulas(weights, ids)
    assert model.config.num_parameters == sum(p.numel() for p in model.parameters())
    transformers = pytest.importorskip("transformers")
    theirs, about = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == "GPT2LMHeadModel" and not about["missing_keys"] and not about["unexpected_keys"]
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(model(ids)), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(theirs.eval()(ids).logits, expected, atol=1e-4, rtol=0)
    # Through the engine with its cache, past the context: the greedy choice of the formulas at every step.
    prompts = [ids[0, :5].tolist(), ids[1, :9].tolist()]
    made = Engine(model).generate(prompts, SamplingSettings(max_new_tokens=30))
    for prompt, generation in zip(prompts, made, strict=True):
        whole = torch.tensor([prompt + generation.ids])
        assert by_the_formulas(weights, whole)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == generation.ids
    # The reference's form: nothing between question and answer, and nothing before.
    assert loaded.encode_chat([{"role": "user", "content": "谁？"}]) == tokenizer.encode("谁？")
    assert loaded.prefix == tokenizer.encode("\n")


def test_on_the_command_line_it_samples_and_is_evaluated(tmp_path: Path, tokenizer: Tokenizer, material: Path) -> None:
    convert_checkpoint(save_checkpoint(tmp_path / "ckpt.pt", random_weights(False)), tmp_path / "out", tokenizer)
    (tmp_path / "qa.jsonl").write_text(
        "".join((material / "qa.jsonl").read_text("utf-8").splitlines(True)[:5]), "utf-8"
    )
    done = miniglm("evaluate", tmp_path / "out", "--qa", tmp_path / "qa.jsonl", "--text", tmp_path / "qa.jsonl")
    assert done.returncode == 0, done.stderr
    assert "比特/字" in done.stdout and (tmp_path / "out" / "report" / "report.json").exists()
    done = miniglm("sample", tmp_path / "out", "--start", "长江", "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr
    with pytest.raises(MiniGLMError, match="gpt2"):
        export_model(tmp_path / "out", "gguf", "f32", None)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    made = tmp_path / "was-run"
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps({"model": Evil(made), "model_args": {}}))
    archive = tmp_path / "ckpt.pt"
    torch.save({"model": Evil(made), "model_args": {}}, archive)
    assert zipfile.is_zipfile(archive)
    with pytest.raises(MiniGLMError, match="拒绝打开"):
        convert_checkpoint(plain, tmp_path / "out")
    fails("convert", archive, "--out", tmp_path / "out", words=(str(archive), "拒绝打开"))
    assert not made.exists() and not (tmp_path / "out").exists()
    with pytest.raises(Exception):  # noqa: B017  # to show that the file would have done it
        torch.load(plain, weights_only=False)["model"].missing  # noqa: B018
    assert made.exists()


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    weights = random_weights(False)
    whole = save_checkpoint(tmp_path / "whole.pt", weights).read_bytes()
    path = tmp_path / "ckpt.pt"
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(MiniGLMError, match=r"ckpt\.pt"):
            convert_checkpoint(path, tmp_path / "out", tokenizer)
    for changes, word in (
        ({"n_layer": 3}, "没有"),
        ({"n_layer": 10**7}, "张量"),
        ({"n_layer": 1}, "多出"),
        ({"n_head": 5}, "倍数"),
        ({"n_head": 0}, "尺寸"),
        ({"n_embd": "x"}, "尺寸"),
        ({"block_size": 65}, "wpe"),
    ):
        save_checkpoint(path, weights, **changes)
        with pytest.raises(MiniGLMError, match=word):
            convert_checkpoint(path, tmp_path / "out", tokenizer)
    torch.save([1, 2], path)
    with pytest.raises(MiniGLMError, match="model_args"):
        convert_checkpoint(path, tmp_path / "out", tokenizer)
    with pytest.raises(MiniGLMError, match="没有这个文件"):
        convert_checkpoint(tmp_path / "nothing.pt", tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
    with pytest.raises(MiniGLMError, match="不会覆盖"):
        convert_checkpoint(tmp_path / "whole.pt", ROOT, tokenizer)
