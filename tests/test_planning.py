"""The rule behind --minutes: what it settles, and that a plan on disk is the plan."""

from __future__ import annotations

import json

import pytest
import torch

from miniglm.planning import Plan, choose_precision, plan
from miniglm.recipe import load_recipe


def made(precision: str = "float32", has_pairs: bool = True) -> Plan:
    return plan(
        load_recipe(None, {}),
        vocab_size=4096,
        characters=600_000,
        tokens=480_000,
        gigaflops=300.0,
        precision=precision,
        seconds=540.0,
        has_pairs=has_pairs,
    )


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
