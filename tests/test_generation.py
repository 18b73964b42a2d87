"""The engine: cached against uncached, batches against single sequences, sampling against plain formulas."""

from __future__ import annotations

import math
import random

import pytest
import torch

from miniglm.config import ModelConfig
from miniglm.generation import Engine, _Sequence, sample
from miniglm.model import GLM
from miniglm.sampling import SamplingSettings

CONTEXT = 40
torch.set_num_threads(1)  # these matrices are too small to share


@pytest.fixture(scope="module")
def model() -> GLM:
    made = GLM(ModelConfig(61, 32, 48, 2, 2, 1, 16, CONTEXT)).initialize(3).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def uncached(model: GLM, prompt: list[int], steps: int) -> list[int]:
    """Greedy continuation that reads everything anew for each token, the window sliding as documented."""
    ids, made = list(prompt), []
    for _ in range(steps):
        if len(ids) > CONTEXT:
            ids = ids[:2] + ids[-CONTEXT // 2 :]
        with torch.inference_mode():
            token = int(model.logits(model(torch.tensor([ids])))[0, -1].argmax())
        ids.append(token)
        made.append(token)
    return made


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(61) for _ in range(length)] for length in (1, 7, 3, 30, 12, 38, 40, 41, 100)]


def test_greedy_equals_the_uncached_loop_past_the_window(model: GLM) -> None:
    settings = SamplingSettings(max_new_tokens=60)
    made = Engine(model).generate(prompts(), settings)
    for prompt, generation in zip(prompts(), made, strict=True):
        assert generation.ids == uncached(model, prompt, 60)
        assert generation.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_result_does_not_depend_on_the_batch(model: GLM, temperature: float) -> None:
    settings = [
        SamplingSettings(max_new_tokens=20 + i, temperature=temperature, top_k=20, top_p=0.9, seed=i)
        for i in range(len(prompts()))
    ]
    together = Engine(model).generate(prompts(), settings)
    alone = [Engine(model).generate([p], s)[0] for p, s in zip(prompts(), settings, strict=True)]
    assert together == alone
    assert Engine(model).generate(prompts(), settings, batch_size=2) == together


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_window_slides_in_the_smallest_contexts(context: int) -> None:
    tiny = GLM(ModelConfig(61, 32, 48, 1, 2, 1, 16, context)).initialize(1).eval()
    [made] = Engine(tiny).generate([[1, 2, 3, 4]], SamplingSettings(max_new_tokens=7))
    assert len(made.ids) == 7


def test_sequences_that_end_at_different_steps_leave_the_others_alone(model: GLM) -> None:
    """The cache is compacted in the middle, at the ends and across a sliding window."""
    settings = [SamplingSettings(max_new_tokens=n) for n in (3, 60, 1, 9, 60, 3, 20, 50, 2)]
    made = Engine(model).generate(prompts(), settings, batch_size=9)
    for prompt, each, generation in zip(prompts(), settings, made, strict=True):
        assert generation.ids == uncached(model, prompt, each.max_new_tokens)


def test_stop_tokens_end_a_sequence_and_are_not_part_of_it(model: GLM) -> None:
    free = Engine(model).generate([[5, 6, 7]], SamplingSettings(max_new_tokens=20))[0].ids
    stop = free[6]
    cut = Engine(model).generate([[5, 6, 7]], SamplingSettings(max_new_tokens=20, stop_ids=frozenset({stop})))[0]
    assert cut.ids == free[: free.index(stop)]
    assert cut.finish_reason == "stop"


def test_streaming_yields_what_generate_returns(model: GLM) -> None:
    settings = SamplingSettings(max_new_tokens=15, temperature=1.0, seed=4)
    streamed: dict[int, list[int]] = {0: [], 1: []}
    for step in Engine(model).stream([[1, 2], [3]], settings):
        for row, token in step:
            streamed[row].append(token)
    assert [streamed[0], streamed[1]] == [g.ids for g in Engine(model).generate([[1, 2], [3]], settings)]


def draws(logits: list[float], settings: SamplingSettings, count: int, seen: set[int] | None = None) -> list[float]:
    """Shares of each token over many draws."""
    sequence = _Sequence(0, settings, [0], rng=random.Random(1), seen=seen or set())
    counts = [0] * len(logits)
    for _ in range(count):
        counts[sample(torch.tensor([logits]), [sequence])[0]] += 1
    return [c / count for c in counts]


def test_sampling_draws_from_the_distribution_it_names() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    expected = (torch.tensor(logits) / 0.7).softmax(0).tolist()
    assert draws(logits, SamplingSettings(temperature=0.7), 4000) == pytest.approx(expected, abs=0.03)
    top2 = torch.tensor(logits[:2]).softmax(0).tolist()
    assert draws(logits, SamplingSettings(temperature=1.0, top_k=2), 4000) == pytest.approx([*top2, 0, 0], abs=0.03)
    # 0.64 is under 0.7, so the second token is needed too; the third is not
    assert draws(logits, SamplingSettings(temperature=1.0, top_p=0.7), 4000) == pytest.approx([*top2, 0, 0], abs=0.03)
    assert draws(logits, SamplingSettings(temperature=1.0, top_p=0.01), 50) == [1, 0, 0, 0]


def test_repetition_penalty_is_keskars() -> None:
    logits = [2.0, 1.9, -1.0, -1.2]
    assert draws(logits, SamplingSettings(repetition_penalty=1.5), 1, seen={0}) == [0, 1, 0, 0]
    penalised = torch.tensor([2.0 / 1.5, 1.9, -1.5, -1.2]).softmax(0).tolist()
    settings = SamplingSettings(temperature=1.0, repetition_penalty=1.5)
    assert draws(logits, settings, 4000, seen={0, 2}) == pytest.approx(penalised, abs=0.03)


def reference(logits: list[float], settings: SamplingSettings, uniform: float, seen: set[int]) -> int:
    """What docs/generation.md says, one token at a time in plain Python."""
    penalty = settings.repetition_penalty
    penalised = [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(logits)]
    order = sorted(range(len(logits)), key=lambda i: (-penalised[i], i))[: settings.top_k or None]
    weights = [math.exp((penalised[i] - penalised[order[0]]) / settings.temperature) for i in order]
    held, kept = 0.0, 0
    while kept < len(order) and held < settings.top_p * sum(weights):
        held += weights[kept]
        kept += 1
    point, held = uniform * sum(weights[:kept]), 0.0
    for token, weight in zip(order[:kept], weights[:kept], strict=True):
        held += weight
        if held > point:
            return token
    return order[kept - 1]


@pytest.mark.parametrize("size", [5, 128, 500])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])  # from flat to peaked
def test_sampling_is_the_plain_reference(size: int, spread: float) -> None:
    rng = random.Random(size)
    kinds = [
        SamplingSettings(temperature=t, top_k=k, top_p=p, repetition_penalty=r, seed=seed)
        for seed, (t, k, p, r) in enumerate(
            (t, k, p, r)
            for t in (0.3, 1.0)
            for k in (0, 1, 7, 128, 10**6)
            for p in (0.05, 0.6, 1.0)
            for r in (1.0, 1.3)
        )
    ]
    rows = [[rng.gauss(0, spread) for _ in range(size)] for _ in kinds]
    exact = torch.tensor(rows)
    seen = [{rng.randrange(size) for _ in range(3)} for _ in kinds]
    sequences = [_Sequence(i, s, [0], rng=random.Random(s.seed), seen=seen[i]) for i, s in enumerate(kinds)]
    expected = [reference(exact[i].tolist(), s, random.Random(s.seed).random(), seen[i]) for i, s in enumerate(kinds)]
    assert sample(exact.clone(), sequences) == expected


def test_equal_logits_are_taken_by_id() -> None:
    logits = torch.zeros(1, 512)  # the edge of top_k lies among equals
    for seed in range(20):
        settings = SamplingSettings(temperature=1.0, top_k=64, seed=seed)
        drawn = sample(logits.clone(), [_Sequence(0, settings, [0], rng=random.Random(seed))])
        assert drawn == [int(random.Random(seed).random() * 64)]


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-40, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    shares = draws([1.0, 3.0, 2.0, -torch.inf], SamplingSettings(temperature=temperature), 3000)
    expected = [0, 1, 0, 0] if temperature < 1 else pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.04)
    assert shares == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingSettings(**{name: value})  # type: ignore[arg-type]


def test_an_empty_prompt_is_refused(model: GLM) -> None:
    with pytest.raises(ValueError, match="empty"):
        Engine(model).generate([[]], SamplingSettings())
