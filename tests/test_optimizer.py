"""Muon against the singular value decomposition and against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from miniglm.optimizer import POLAR_EXPRESS, Muon, orthogonalize

SHAPES = [(3, 24, 24), (2, 16, 20), (2, 16, 80), (2, 80, 16)]
CONVERGING = ((1.875, -1.25, 0.375),) * 20


def random_matrices(shape: tuple[int, int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def composed(s: Tensor) -> Tensor:
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return s


def test_the_polynomials_come_near_one_everywhere() -> None:
    far = composed(torch.logspace(math.log10(0.02), 0, 10_000, dtype=torch.float64)) - 1
    assert far.abs().max() < 0.102
    assert far.max() > 0.1 and far.min() < -0.1  # as much above as below
    assert composed(torch.tensor(1e-3)) > 0.05  # and what is smaller is at least made fifty times larger


@pytest.mark.parametrize("shape", SHAPES)
def test_each_singular_value_goes_through_the_polynomials(shape: tuple[int, int, int]) -> None:
    given = random_matrices(shape)
    u, s, v = torch.linalg.svd(given.double(), full_matrices=False)
    expected = u @ torch.diag_embed(composed(s / (s**4).sum(1, keepdim=True) ** 0.25)) @ v
    torch.testing.assert_close(orthogonalize(given).double(), expected, atol=1e-4, rtol=0)


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 9)), torch.zeros(1, 4, 9))


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_stays_near(shape: tuple[int, int, int]) -> None:
    given = random_matrices(shape)
    found = orthogonalize(given.bfloat16()).float()
    assert (found - orthogonalize(given)).norm() < 0.1 * found.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rule_is_torchs(shape: tuple[int, int, int]) -> None:
    start = random_matrices(shape)
    ours, theirs = ([nn.Parameter(m.clone()) for m in start] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.02, weight_decay=0.3, coefficients=CONVERGING),
        torch.optim.Muon(
            theirs,
            lr=0.02,
            weight_decay=0.3,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
            ns_coefficients=CONVERGING[0],
            ns_steps=len(CONVERGING),
        ),
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            # Well conditioned, so that both sets of steps reach U·Vᵀ: torch's are always in bfloat16.
            u, _, v = torch.linalg.svd(torch.randn(start[0].shape, generator=generator), full_matrices=False)
            mine.grad = u @ torch.diag(1 + torch.rand(u.shape[1], generator=generator)) @ v
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert moved > 0.1
        assert (mine - other).norm() < 0.02 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-133, -99, -66, -40, -20, 20, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_of_a_gradient_does_not_matter(shape: tuple[int, int, int], exponent: int, dtype: torch.dtype) -> None:
    """Weights that begin at zero make gradients of others tiny; nothing may overflow, vanish to 0 / 0 or diverge."""
    given = random_matrices(shape)
    made = orthogonalize(given.to(dtype) * 2.0**exponent).float()
    if exponent < -99:  # as good as zero
        assert made.abs().max() <= 2
    else:
        torch.testing.assert_close(made, orthogonalize(given.to(dtype)).float(), atol=0.05, rtol=0)
