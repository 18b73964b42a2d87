"""The ONNX graph in onnxruntime: the same logits, the same answers, with its cache and with padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interop.texts import ROOM, prompts_of
from numpy.typing import NDArray

from miniglm.config import ModelConfig
from miniglm.errors import MiniGLMError
from miniglm.interop import to_onnx
from miniglm.interop.to_onnx import export_onnx
from miniglm.model import GLM
from miniglm.qa.formats import Example
from miniglm.sampling import Generation
from miniglm.tokenizer import Tokenizer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def open_session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def empty(config: ModelConfig, batch: int) -> dict[str, NDArray[np.float32]]:
    shape = (batch, config.num_key_value_heads, 0, config.head_dim)
    parts = [f"past_key_values.{n}.{part}" for n in range(config.num_hidden_layers) for part in ("key", "value")]
    return {name: np.zeros(shape, np.float32) for name in parts}


def run(
    session: Any, ids: NDArray[Any], mask: NDArray[Any], past: dict[str, Any]
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | past
    logits, *rest = session.run(None, feed)
    return logits, dict(zip(past, rest, strict=True))


def greedy(session: Any, config: ModelConfig, prompts: list[list[int]], stops: frozenset[int]) -> list[list[int]]:
    """Answers in one batch with left padding, a token at a time through the cache."""
    longest = max(map(len, prompts))
    ids = np.array([[0] * (longest - len(p)) + p for p in prompts])
    mask = np.array([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    past: dict[str, Any] = empty(config, len(prompts))
    made: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for _ in range(ROOM):
        logits, past = run(session, ids, mask, past)
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate((mask, np.ones_like(ids)), axis=1)
        for row, token in enumerate(ids[:, 0].tolist()):
            going[row] = going[row] and token not in stops
            if going[row]:
                made[row].append(token)
    return made


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(97, 64, 96, 3, 4, 2, 16, 64, tie_word_embeddings=True),
        ModelConfig(97, 48, 96, 2, 4, 4, 16, 64, tie_word_embeddings=False, attention_bias=False),
        ModelConfig(97, 64, 96, 2, 4, 1, 16, 64, partial_rotary_factor=1.0, rope_theta=5e5, rms_norm_eps=1e-5),
    ],
)
def test_logits_agree_for_every_shape(config: ModelConfig, tmp_path: Path) -> None:
    model = GLM(config).initialize(0).eval()
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)) * 0.1)
    export_onnx(model, tmp_path / "m.onnx", type="f32")
    session = open_session(tmp_path / "m.onnx")
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model.logits(model(ids)).numpy()
    x, mask = ids.numpy(), np.ones((3, 40), np.int64)
    logits, _ = run(session, x, mask, empty(config, 3))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    first, past = run(session, x[:, :25], mask[:, :25], empty(config, 3))  # in two parts
    second, _ = run(session, x[:, 25:], mask, past)
    np.testing.assert_allclose(np.concatenate((first, second), axis=1), expected, atol=1e-4)


def test_answers_are_ours_and_stop(
    ours: tuple[GLM, Tokenizer], questions: list[Example], answers: list[Generation], tmp_path: Path
) -> None:
    model, tokenizer = ours
    export_onnx(model, tmp_path / "m.onnx", type="f32")
    opened = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(opened, full_check=True)
    session = open_session(tmp_path / "m.onnx")
    made = greedy(session, model.config, prompts_of(tokenizer, questions), tokenizer.stop_ids)
    assert made == [g.ids for g in answers]


def test_int8_is_small_and_close(
    ours: tuple[GLM, Tokenizer],
    questions: list[Example],
    answers: list[Generation],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, tokenizer = ours
    export_onnx(model, tmp_path / "f32.onnx", type="f32")
    export_onnx(model, tmp_path / "int8.onnx", type="int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f32.onnx", "int8.onnx"] and not caplog.records
    quantized = onnx.load(tmp_path / "int8.onnx").graph
    matrices = sum(node.op_type == "MatMulInteger" for node in quantized.node)
    assert matrices == 6 * model.config.num_hidden_layers + 1  # all, the output layer too
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * (tmp_path / "f32.onnx").stat().st_size
    made = greedy(
        open_session(tmp_path / "int8.onnx"), model.config, prompts_of(tokenizer, questions), tokenizer.stop_ids
    )
    same = sum(ours == g.ids for ours, g in zip(made, answers, strict=True))
    assert same > 0.3 * len(answers)


def test_too_large_for_one_file(ours: tuple[GLM, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "LIMIT", 1000)
    with pytest.raises(MiniGLMError, match="2 GB"):
        export_onnx(ours[0], tmp_path / "m.onnx", type="f32")
    assert not list(tmp_path.iterdir())
