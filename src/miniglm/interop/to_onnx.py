"""A model as an ONNX graph, for phones, browsers and whatever else runs onnxruntime.

The graph is written node by node from the sizes and the weights: no tracing, so nothing hangs on an exporter's version.
Inputs and outputs have the names that transformers.js and Optimum use, with the keys and values of what was read so far
as inputs and outputs, so that a new token costs one position. Reading from the start means passing empty ones.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from miniglm.errors import MiniGLMError
from miniglm.files import written_whole
from miniglm.model import GLM, rotary_table

if TYPE_CHECKING:
    import onnx

OPSET = 23
"""The first with RMSNormalization, RotaryEmbedding and Attention; each is defined by older operators as well, so a
runtime without a kernel of its own can still run it."""
LIMIT = 2**31 - 1
"""Bytes that one protobuf can have."""


def export_onnx(model: GLM, out: Path, *, type: str) -> None:
    """Writes `out`.

    Args:
        type: f32, or int8: matrices in eight bits, activations quantized as they come (onnxruntime's dynamic
            quantization).

    Raises:
        MiniGLMError: a library is missing, or the model is larger than one file of this format can be.
    """
    try:
        import onnx

        if type == "int8":
            from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise MiniGLMError(
            f"导出 ONNX 需要 {error.name}，而它没有安装", fix="pip install 'miniglm-chat[export]' onnxruntime"
        ) from None
    if (size := 4 * model.config.num_parameters) > 0.95 * LIMIT:
        raise MiniGLMError(f"权重有 {size / 1e9:.1f} GB，一个 ONNX 文件最多 2 GB", fix="用 --format gguf 导出")
    # Quantized, input and output matrix are two, each with scales of its own.
    made = build_graph(model, share_embedding=type == "f32")
    onnx.checker.check_model(made)
    if type == "f32":
        with written_whole(out) as file:
            file.write(made.SerializeToString())
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "f32.onnx"
        plain.write_bytes(made.SerializeToString())
        logging.disable(logging.WARNING)  # it advises a pass over traced graphs, which this is not
        try:
            quantize_dynamic(
                plain,
                Path(folder) / "int8.onnx",
                op_types_to_quantize=[
                    "MatMul",
                    "Gather",
                ],  # Attention as it stands would be taken for an older operator
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
        finally:
            logging.disable(logging.NOTSET)
        with written_whole(out) as file:
            file.write((Path(folder) / "int8.onnx").read_bytes())


class _Graph:
    """Nodes and constants as they are added; every method returns the name of what it made."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        import onnx

        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(onnx.helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, name: str, array: NDArray[Any]) -> str:
        import onnx

        self.constants[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def integers(self, *values: int) -> str:
        return self.constant(f"integers_{'_'.join(map(str, values))}", np.asarray(values, np.int64))


def build_graph(model: GLM, *, share_embedding: bool) -> onnx.ModelProto:
    """The whole model.

    Inputs: input_ids and position_ids (batch, seq), attention_mask (batch, past + seq), and for each layer
    past_key_values.N.key and .value (batch, kv heads, past, head_dim). Outputs: logits (batch, seq, V), present.N.key
    and .value.

    Args:
        share_embedding: tied weights are stored once and transposed when the graph is loaded.
    """
    from onnx import TensorProto, helper

    config, g = model.config, _Graph()
    weights = {name: t.detach().to("cpu").float().numpy() for name, t in model.state_dict().items()}

    def linear(x: str, name: str) -> str:
        y: str = g.op("MatMul", x, g.constant(f"{name}.weight", weights[f"{name}.weight"].T))
        if f"{name}.bias" in weights:
            y = g.op("Add", y, g.constant(f"{name}.bias", weights[f"{name}.bias"]))
        return y

    def norm(x: str, name: str) -> str:
        scale = g.constant(f"{name}.weight", weights[f"{name}.weight"])
        y: str = g.op("RMSNormalization", x, scale, axis=-1, epsilon=config.rms_norm_eps)
        return y

    def heads(x: str, count: int) -> str:
        """(batch, seq, heads · head_dim) to (batch, heads, seq, head_dim)."""
        y: str = g.op("Reshape", x, g.integers(0, 0, count, config.head_dim))
        return str(g.op("Transpose", y, perm=[0, 2, 1, 3]))

    table = rotary_table(config, config.max_position_embeddings)
    cosine = g.constant("rotary.cos", table.real.numpy())
    sine = g.constant("rotary.sin", table.imag.numpy())

    def rotate(x: str) -> str:
        turned: str = g.op(
            "RotaryEmbedding", x, cosine, sine, "position_ids", interleaved=1, rotary_embedding_dim=config.rotary_dim
        )
        return turned

    # Who sees whom, (batch, 1, seq, past + seq): what came before and is no padding, and everyone itself, so that no
    # row of the softmax is empty.
    zero, one = g.constant("zero", np.array(0, np.int64)), g.constant("one", np.array(1, np.int64))
    total = g.op("Gather", g.op("Shape", "attention_mask"), one)
    now = g.op("Gather", g.op("Shape", "input_ids"), one)
    keys = g.op("Range", zero, total, one)
    queries = g.op("Unsqueeze", g.op("Range", g.op("Sub", total, now), total, one), g.integers(1))
    real = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=TensorProto.BOOL), g.integers(1, 2))
    seen = g.op("And", g.op("LessOrEqual", keys, queries), real)
    mask = g.op("Or", seen, g.op("Equal", keys, queries))

    embedding = g.constant("model.embed_tokens.weight", weights["model.embed_tokens.weight"])
    x: str = g.op("Gather", embedding, "input_ids")
    past, present = [], []
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        q = rotate(heads(linear(y, f"{at}.self_attn.q_proj"), config.num_attention_heads))
        k = rotate(heads(linear(y, f"{at}.self_attn.k_proj"), config.num_key_value_heads))
        v = heads(linear(y, f"{at}.self_attn.v_proj"), config.num_key_value_heads)
        names = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        y, new_k, new_v = g.op("Attention", q, k, v, mask, *names, outputs=3)
        y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.integers(0, 0, -1))
        for part, made in (("key", new_k), ("value", new_v)):
            g.nodes.append(helper.make_node("Identity", [made], [f"present.{layer}.{part}"]))
            past.append(f"past_key_values.{layer}.{part}")
            present.append(f"present.{layer}.{part}")
        x = g.op("Add", x, linear(y, f"{at}.self_attn.o_proj"))
        y = linear(norm(x, f"{at}.post_attention_layernorm"), f"{at}.mlp.gate_up_proj")
        gate, up = g.op("Split", y, outputs=2, axis=-1, num_outputs=2)
        y = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        x = g.op("Add", x, linear(y, f"{at}.mlp.down_proj"))
    x = norm(x, "model.norm")
    if config.tie_word_embeddings and share_embedding:
        output = g.op("Transpose", embedding, perm=[1, 0])
    else:
        output = g.constant("lm_head.weight", weights["lm_head.weight"].T)
    g.nodes.append(helper.make_node("MatMul", [x, output], ["logits"]))

    def value(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    def cache(names: list[str], length: str) -> list[onnx.ValueInfoProto]:
        sizes = ("batch", config.num_key_value_heads, length, config.head_dim)
        return [value(name, TensorProto.FLOAT, *sizes) for name in names]

    graph = helper.make_graph(
        g.nodes,
        "glm",
        [
            value("input_ids", TensorProto.INT64, "batch", "seq"),
            value("attention_mask", TensorProto.INT64, "batch", "total"),
            value("position_ids", TensorProto.INT64, "batch", "seq"),
            *cache(past, "past"),
        ],
        [value("logits", TensorProto.FLOAT, "batch", "seq", config.vocab_size), *cache(present, "total")],
        list(g.constants.values()),
    )
    opset = helper.make_opsetid("", OPSET)
    # The oldest file version that this opset allows: runtimes refuse files newer than themselves.
    version = helper.find_min_ir_version_for([opset])
    return helper.make_model(graph, opset_imports=[opset], ir_version=version, producer_name="miniglm")
