"""The decoder against transformers' GLM, and its own parts against plain formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from miniglm.config import ModelConfig
from miniglm.model import GLM, IGNORE

SHAPES = [(4, 2, True), (4, 4, True), (4, 1, False), (4, 4, False)]


def config(heads: int = 4, groups: int = 2, tied: bool = True) -> ModelConfig:
    return ModelConfig(97, 64, 96, 3, heads, groups, 16, 48, tie_word_embeddings=tied)


def random_model(made: ModelConfig, seed: int = 0) -> GLM:
    """All weights random, also those that training starts from zero: otherwise layers would do nothing."""
    model = GLM(made).initialize(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("heads", "groups", "tied"), SHAPES)
def test_transformers_opens_our_folder_with_the_same_logits(
    tmp_path: Path, heads: int, groups: int, tied: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model(config(heads, groups, tied))
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_hf() | {"eos_token_id": [1], "pad_token_id": 0}))
    weights = {n: t.contiguous() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "GlmForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = tokens(2, 40)
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(model(ids)), theirs.eval()(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("heads", "groups", "tied"), SHAPES)
def test_a_transformers_model_loads_into_ours(tmp_path: Path, heads: int, groups: int, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GlmForCausalLM(
        transformers.GlmConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=16,
            max_position_embeddings=48,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=[1],
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = GLM(ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))).eval()
    assert ours.config == ModelConfig.from_hf(theirs.config.to_dict())
    ours.load_state_dict(theirs.state_dict())
    ids = tokens(2, 40)
    with torch.inference_mode():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"vocab_size": -5}, "vocab_size"),
    ],
)
def test_an_impossible_config_is_named(change: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ModelConfig.from_hf(config().to_hf() | change)
    broken = config().to_hf()
    del broken["hidden_size"]
    with pytest.raises(ValueError, match="hidden_size"):
        ModelConfig.from_hf(broken)


def test_parameters_are_counted() -> None:
    for tied in (True, False):
        made = config(tied=tied)
        assert made.num_parameters == sum(p.numel() for p in GLM(made).parameters())


def test_loss_counts_targets_only_and_survives_none() -> None:
    model = random_model(config())
    ids = tokens(2, 20)
    labels = torch.full_like(ids, IGNORE)
    nothing, count = model.loss(ids, labels)
    assert count == 0 and nothing.item() == 0.0
    labels[0, 5], labels[1, 19] = 7, 3
    loss, count = model.loss(ids, labels)
    logits = model.logits(model(ids))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    assert count == 2
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_packed_sequences_do_not_see_each_other() -> None:
    model = random_model(config())
    a, b = tokens(1, 11, 1), tokens(1, 17, 2)
    segments = torch.tensor([[0] * 11 + [1] * 17])
    positions = torch.tensor([[*range(11), *range(17)]])
    causal = torch.ones(28, 28, dtype=torch.bool).tril()
    mask = ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]
    with torch.inference_mode():
        packed = model(torch.cat((a, b), 1), positions=positions, mask=mask)
        torch.testing.assert_close(packed[:, :11], model(a), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(packed[:, 11:], model(b), atol=1e-5, rtol=1e-4)
