"""The cached decoder against the model that reads everything anew."""

from __future__ import annotations

import pytest
import torch

from miniglm.config import ModelConfig
from miniglm.decoding import CachedDecoder
from miniglm.model import GLM, DecoderLayer


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> GLM:
    model = GLM(config).initialize(0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.to(dtype)


PLAIN = ModelConfig(61, 32, 48, 2, 4, 2, 16, 64)
CONFIGS = {
    "grouped-query": PLAIN,
    "one head a group": ModelConfig(61, 32, 48, 2, 2, 2, 16, 64),
    "untied, no bias": ModelConfig(61, 32, 48, 2, 2, 1, 16, 64, tie_word_embeddings=False, attention_bias=False),
}


WAYS: dict[str, dict[str, object]] = {
    "each by itself": {},
    "few together": {"miniglm.decoding.BY_ITSELF": 0},
    "many together": {"miniglm.decoding.BY_ITSELF": 0, "miniglm.packed.FEW": 0},
    "many without oneDNN": {
        "miniglm.decoding.BY_ITSELF": 0,
        "miniglm.packed.FEW": 0,
        "torch.backends.mkldnn.is_available": lambda: False,
    },
    "not packed": {"miniglm.packed.MAX_PACKED": 0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_cached_logits_are_the_uncached_ones(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of different length, one leaving in the middle and another taking its slot."""
    for target, value in WAYS[way].items():
        monkeypatch.setattr(target, value)
    model = random_model(CONFIGS[name])
    decoder = CachedDecoder(model, slots=3, capacity=40)
    assert (decoder.packed is not None) == (way != "not packed")
    ids = torch.randint(0, 61, (3, 40), generator=torch.Generator().manual_seed(1))
    lengths = [5, 12, 9]
    full = model.logits(model(ids))
    first = decoder.step([], [], [(row, ids[row, :n].tolist()) for row, n in enumerate(lengths)])
    for row, length in enumerate(lengths):
        torch.testing.assert_close(first[row], full[row, length - 1], atol=1e-4, rtol=1e-4)
    for _ in range(6):
        now = decoder.step([int(ids[row, n]) for row, n in enumerate(lengths)], lengths)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(now[row], full[row, length], atol=1e-4, rtol=1e-4)
        lengths = [n + 1 for n in lengths]
    decoder.move(2, 0, lengths[2])  # the first sequence goes, the last one takes its slot
    now = decoder.step([int(ids[2, lengths[2]]), int(ids[1, lengths[1]])], [lengths[2], lengths[1]])
    torch.testing.assert_close(now[0], full[2, lengths[2]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(now[1], full[1, lengths[1]], atol=1e-4, rtol=1e-4)
    again = decoder.step([], [], [(2, ids[0, :30].tolist())])
    torch.testing.assert_close(again[0], full[0, 29], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_bfloat16_is_decoded_without_conversion() -> None:
    model = random_model(PLAIN, torch.bfloat16)
    decoder = CachedDecoder(model, slots=1, capacity=16)
    decoder.step([], [], [(0, [1, 2, 3])])
    logits = decoder.step([4], [3])
    assert logits.dtype == torch.bfloat16
    expected = model.logits(model(torch.tensor([[1, 2, 3, 4]])))[0, -1]
    torch.testing.assert_close(logits[0].float(), expected.float(), atol=0.2, rtol=0.1)


@torch.inference_mode()
def test_adapters_in_place_of_matrices_are_not_passed_over() -> None:
    """A module that stands where a matrix was, as adapters do, is called, not replaced by its weight."""

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = random_model(PLAIN)
    layer = model.model.layers[0]
    assert isinstance(layer, DecoderLayer)
    plain = layer.self_attn.o_proj
    doubled = Doubled(plain.in_features, plain.out_features, bias=False)
    doubled.load_state_dict(plain.state_dict())
    layer.self_attn.o_proj = doubled
    expected = model.logits(model(torch.tensor([[1, 2, 3, 4]])))[0, -1]
    decoder = CachedDecoder(model, slots=1, capacity=16)
    decoder.step([], [], [(0, [1, 2, 3])])
    torch.testing.assert_close(decoder.step([4], [3])[0], expected, atol=1e-4, rtol=1e-4)
