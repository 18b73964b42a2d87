"""The rule behind --minutes: what it settles, and that a plan on disk is the plan."""

from __future__ import annotations

import json

import pytest
import torch

from miniglm.errors import MiniGLMError
from miniglm.planning import Plan, choose_precision, choose_size, plan
from miniglm.recipe import load_recipe


def made(precision: str = "float32", has_pairs: bool = True, **model: int) -> Plan:
    return plan(
        load_recipe(None, {f"model.{name}": size for name, size in model.items()}),
        vocab_size=4096,
        characters=600_000,
        tokens=480_000,
        gigaflops=300.0,
        precision=precision,
        seconds=540.0,
        has_pairs=has_pairs,
    )


def test_sizes_that_were_measured_to_be_the_better_ones() -> None:
    """docs/how-minutes-work.md: one novel, 155 GFLOP/s, of which the training gets these minutes."""
    for minutes, expected in ((7.3, (192, 4)), (51.0, (256, 4))):
        assert choose_size(0.6 * 155e9 * 60 * minutes, 594_605, 4_608) == expected
    assert choose_size(1e20, 10 * 594_605, 8_192) > choose_size(1e20, 594_605, 4_608)  # more text, larger models


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_plan_comes_back_from_json(precision: str) -> None:
    settled = made(precision)
    assert Plan.from_json(json.loads(json.dumps(settled.to_json()))) == settled
    assert settled.pretrain.precision == settled.finetune.precision == precision


def test_without_questions_the_text_gets_all_the_time() -> None:
    assert made(has_pairs=False).pretrain.minutes == pytest.approx(9.0)
    both = made()
    assert (both.pretrain.minutes or 0) + (both.finetune.minutes or 0) == pytest.approx(9.0)


def test_bfloat16_only_where_it_is_fast() -> None:
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        assert choose_precision(torch.device("cpu")) == "float32"
    assert choose_precision(torch.device("cpu")) in ("float32", "bfloat16")


@pytest.mark.parametrize("hidden", [4, 8, 16, 24, 31, 33, 48, 100, 191, 192, 1000])
def test_any_width_has_heads_or_says_what_does_not_fit(hidden: int) -> None:
    if hidden == 31:
        with pytest.raises(MiniGLMError, match=r"head_dim = 31.*32 的倍数"):
            made(hidden_size=hidden)
        return
    found = made(hidden_size=hidden).model
    assert found.num_attention_heads >= 1 and found.num_attention_heads * found.head_dim <= hidden
    assert made(hidden_size=30, head_dim=16).model.head_dim == 16  # what is given mends what would not fit


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(MiniGLMError, match=r"num_attention_heads = 6 .*num_key_value_heads = 4"):
        made(num_attention_heads=6, num_key_value_heads=4)
    with pytest.raises(MiniGLMError, match="head_dim = 0"):
        made(hidden_size=16, num_attention_heads=32)
