"""Each function of kernels.py, forward and backward, against its plain formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miniglm.config import ModelConfig
from miniglm.kernels import LinearCrossEntropy, RMSNorm, RotaryAttention, Rotated, losses_and_gradient
from miniglm.model import IGNORE, rotary_table, rotate


def agree(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-5) -> None:
    """The same values and the same gradients of a random weighting of them."""
    found, expected = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    a, b = ours(*found), plain(*expected)
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    weighting = random(*a.shape, seed=99)
    for mine, other in zip(
        torch.autograd.grad((a * weighting).sum(), found),
        torch.autograd.grad((b * weighting).sum(), expected),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=10 * tolerance, rtol=10 * tolerance)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm() -> None:
    agree(
        lambda x, w: RMSNorm.apply(x, w, 0.1),  # type: ignore[no-untyped-call]
        lambda x, w: x * w / (x.square().mean(-1, keepdim=True) + 0.1).sqrt(),
        random(3, 7, 20),
        random(20, seed=1),
    )


@pytest.mark.parametrize(("groups", "each"), [(2, 2), (1, 3), (2, 1)])
@pytest.mark.parametrize("length", [5, 64, 150])
@pytest.mark.parametrize("packed", [False, True])
def test_rotary_attention(groups: int, each: int, length: int, packed: bool) -> None:
    heads, size, batch = groups * each, 8, 2
    table = rotary_table(ModelConfig(9, 16, 16, 1, heads, groups, size, 200), length)[None, :, None]
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
    if packed:  # two sequences in each row, each counting its positions from 0
        parts = torch.stack([(torch.arange(length) >= cut).long() for cut in (length // 3, length // 2)])
        mask = mask & (parts[:, :, None] == parts[:, None, :])[:, None]
        positions = torch.stack(
            [torch.arange(length) - (length // 3) * parts[0], torch.arange(length) - (length // 2) * parts[1]]
        )
        table = table[0, :, 0][positions][:, :, None]
    bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)

    def plain(projected: Tensor) -> Tensor:
        q, k, v = projected.view(batch, length, -1, size).split_with_sizes((heads, groups, groups), dim=2)
        q, k = rotate(q, table).transpose(1, 2), rotate(k, table).transpose(1, 2)
        k, v = (t.repeat_interleave(each, dim=1) for t in (k, v.transpose(1, 2)))
        weights = (q @ k.mT / math.sqrt(size) + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def ours(projected: Tensor) -> Tensor:
        out: Tensor = RotaryAttention.apply(projected, table, bias if packed else None, groups, size)  # type: ignore[no-untyped-call]
        return out

    agree(ours, plain, random(batch, length, (heads + 2 * groups) * size))


@pytest.mark.parametrize("shared", [True, False])
def test_rotation_in_place_and_in_real_numbers(shared: bool) -> None:
    table = rotary_table(ModelConfig(9, 16, 16, 1, 3, 1, 8, 50), 12)[None, :, None]
    if not shared:  # each row has its own positions
        table = torch.cat([table, table.flip(1)])

    def plain(projected: Tensor) -> Tensor:
        heads = projected.view(2, 12, 5, 8)
        return torch.cat([rotate(heads[:, :, :4], table), heads[:, :, 4:]], dim=2).flatten(2)

    def in_place(projected: Tensor) -> Tensor:
        out: Tensor = Rotated.apply(projected * 1, table, 4, 8)  # type: ignore[no-untyped-call]
        return out

    def real(projected: Tensor) -> Tensor:
        heads = projected.view(2, 12, 5, 8)
        return torch.cat([rotate(heads[:, :, :4], torch.view_as_real(table)), heads[:, :, 4:]], dim=2).flatten(2)

    agree(in_place, plain, random(2, 12, 40))
    agree(real, plain, random(2, 12, 40))


@pytest.mark.parametrize("compiled", [None, losses_and_gradient])
def test_linear_cross_entropy_of_rows_that_are_ignored(compiled: Callable[..., tuple[Tensor, Tensor]] | None) -> None:
    labels = torch.randint(0, 2000, (1500,), generator=torch.Generator().manual_seed(0))
    labels[::3] = IGNORE
    agree(
        lambda h, w: LinearCrossEntropy.apply(h, w, labels, IGNORE, compiled),  # type: ignore[no-untyped-call]
        lambda h, w: F.cross_entropy(h @ w.T, labels, reduction="sum"),
        random(1500, 24),
        random(2000, 24, seed=1) * 0.3,
        tolerance=1e-3,
    )


@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(1500, 2000), (300, 20_000), (5, 9)]
)  # the first two in several blocks
def test_linear_cross_entropy(rows: int, vocabulary: int) -> None:
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(0))
    agree(
        lambda h, w: LinearCrossEntropy.apply(h, w, labels) / rows,  # type: ignore[no-untyped-call]
        lambda h, w: F.cross_entropy(h @ w.T, labels),
        random(rows, 24),
        random(vocabulary, 24, seed=1) * 0.3,
    )


def test_a_hopeless_prediction_costs_a_finite_loss() -> None:
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    assert 80 < LinearCrossEntropy.apply(hidden, weight, torch.tensor([1])) < 90  # type: ignore[no-untyped-call]
