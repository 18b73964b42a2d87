"""The learnt choice among candidates and the learnt confidence in it: linear, a few dozen numbers, in JSON. Knows
nothing of what the features mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]
FARTHEST = 3.0


@dataclass(frozen=True, slots=True)
class Linear:
    """A weighted sum of standardized features: (x − mean) / spread · weights + bias.

    A feature that is farther from the mean than `FARTHEST` spreads counts as that far: on a book that is unlike the
    one it was learnt on, none alone decides.
    """

    mean: Floats
    spread: Floats
    weights: Floats
    bias: float = 0.0

    def __call__(self, features: Floats) -> Floats:
        """(…, features) to (…)."""
        scores = self.standard(features) @ self.weights + self.bias
        return np.asarray(scores, dtype=np.float32)

    def standard(self, features: Floats) -> Floats:
        """The features as it weighs them, of the same shape."""
        return _standard(features, self.mean, self.spread)

    def to_json(self) -> dict[str, Any]:
        """Lists of numbers."""
        lists = {name: [round(float(v), 6) for v in getattr(self, name)] for name in ("mean", "spread", "weights")}
        return lists | {"bias": round(self.bias, 6)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Linear:
        """What `to_json` gave."""
        mean, spread, weights = (np.array(data[n], dtype=np.float32) for n in ("mean", "spread", "weights"))
        return cls(mean, spread, weights, float(data["bias"]))


def _standard(features: Floats, mean: Floats, spread: Floats) -> Floats:
    clipped: Floats = np.clip((features - mean) / spread, -FARTHEST, FARTHEST).astype(np.float32)
    return clipped


def fit_ranker(
    lists: Sequence[tuple[Floats, NDArray[np.bool_]]], *, rising: bool = False, decay: float = 1e-2
) -> Linear:
    """Weights under which right candidates come first: softmax over each list's candidates, −log of the right ones'
    share (Cao et al. 2007, ListNet's top-one form), with an L2 penalty.

    Args:
        lists: of each question (candidates, features) and which candidates are right. Lists with none are left out.
        rising: no feature may speak against a candidate; does better where lists are few or right ones uncertain.

    Raises:
        ValueError: no list has a right candidate.
    """
    import torch

    lists = [(x, right) for x, right in lists if right.any()]
    if not lists:
        raise ValueError("no list has a right candidate")
    every = np.concatenate([x for x, _ in lists])
    mean, spread = every.mean(axis=0), every.std(axis=0) + 1e-6
    longest = max(len(x) for x, _ in lists)
    padded = np.zeros((len(lists), longest, every.shape[1]), dtype=np.float32)
    right, there = np.zeros((len(lists), longest), dtype=bool), np.zeros((len(lists), longest), dtype=bool)
    for n, (x, hit) in enumerate(lists):
        padded[n, : len(x)], right[n, : len(x)], there[n, : len(x)] = _standard(x, mean, spread), hit, True
    features, hits, real = torch.from_numpy(padded), torch.from_numpy(right), torch.from_numpy(there)
    free = torch.zeros(every.shape[1], requires_grad=True)

    def weights_now() -> torch.Tensor:
        return torch.nn.functional.softplus(free - 2) if rising else free

    def loss() -> torch.Tensor:
        weights = weights_now()
        scores = (features @ weights).masked_fill(~real, -torch.inf)
        return share_of_right(scores, hits).mean() + decay * weights.square().sum()

    _minimize(loss, [free])
    return Linear(mean, spread, weights_now().detach().numpy())


def share_of_right(scores: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Of each row −log of the right ones' share of its softmax."""
    return scores.logsumexp(1) - scores.masked_fill(~right, -float("inf")).logsumexp(1)


def fit_logistic(features: Floats, target: NDArray[np.bool_], decay: float = 1e-2) -> Linear:
    """Logistic regression, both classes weighing the same, with an L2 penalty."""
    import torch

    mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    x, y = torch.from_numpy(_standard(features, mean, spread)), torch.from_numpy(target.astype(np.float32))
    share = float(np.clip(y.mean(), 1e-3, 1 - 1e-3))
    each = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))
    weights, bias = torch.zeros(features.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)

    def loss() -> torch.Tensor:
        scores = x @ weights + bias
        return (
            torch.nn.functional.binary_cross_entropy_with_logits(scores, y, weight=each)
            + decay * weights.square().sum()
        )

    _minimize(loss, [weights, bias])
    return Linear(mean, spread, weights.detach().numpy(), float(bias.detach()))


def _minimize(loss: Any, parameters: list[torch.Tensor]) -> None:
    import torch

    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def fit_temperature(lists: Sequence[tuple[Floats, NDArray[np.bool_]]]) -> float:
    """What scores are to be divided by for their softmax to be probabilities (Guo et al. 2017).

    Args:
        lists: of each question (candidates,) scores and which candidates are right. Lists with none are left out.
    """
    import torch

    lists = [(scores, right) for scores, right in lists if right.any()]
    if not lists:
        return 1.0
    logarithm = torch.zeros(1, requires_grad=True)
    given = [(torch.from_numpy(scores), torch.from_numpy(right)) for scores, right in lists]

    def loss() -> torch.Tensor:
        by = logarithm.exp()
        return torch.cat([share_of_right((scores / by)[None], right[None]) for scores, right in given]).mean()

    _minimize(loss, [logarithm])
    return float(logarithm.detach().exp())
