"""A small model's weights in the layouts that few rows are fastest with on a CPU, and one token of one sequence by
itself.

numpy's matrix products (OpenBLAS) of up to a dozen rows take half to three quarters of the time of torch's (MKL, on an
AMD processor), and its operations on a thousand numbers a third of the time: docs/speed.md has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from miniglm.config import ModelConfig
from miniglm.model import GLM, MLP, DecoderLayer, RMSNorm, rotary_table

MAX_PACKED = 2**28
"""Bytes of weights that are copied into these layouts; larger models stay as they are, for there the copies cost more
memory than they save time."""

FEW = 32
"""Below so many rows one thread does it all: there is too little to share, and where another process has the second
core, each product waits for it (75 ms a token in place of 1.3, measured on 2 cores)."""

SIZES = (8, 64, 256)
"""oneDNN makes and keeps a program for every number of rows that it meets (4 ms, 0.2 MB), so rows are filled up to a
multiple of the first of these, from the last of them on to one of the second: a server would grow by a hundred MB."""

BY_ITSELF = 3
"""Up to so many sequences make their tokens one after another sooner than together."""

Array = NDArray[np.float32]


def full_rows(rows: int) -> int:
    """So many rows are computed in place of `rows`, see `SIZES`."""
    fine, coarse, many = SIZES
    multiple = fine if rows <= many else coarse
    return -(-rows // multiple) * multiple


class Matrix:
    """A matrix that rows are multiplied with.

    It is kept twice on a CPU: as (in, out), which one row reads in order, and in oneDNN's blocks, for many rows.

    Args:
        weight: (out, in), as `nn.Linear` has it.
    """

    def __init__(self, weight: Tensor) -> None:
        self.plain = weight.t().contiguous()
        on_cpu = weight.device.type == "cpu"
        self.array: Array | None = self.plain.numpy() if on_cpu else None
        blocks = on_cpu and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        # Its two operations are what torch's own compiler makes of a linear layer on a CPU.
        self.blocks: Tensor | None = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), FEW) if blocks else None
        )

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """x (rows, in) times the matrix, plus `added` (rows, out): (rows, out)."""
        if self.array is not None and len(x) < FEW:
            y = torch.from_numpy(np.matmul(x.numpy(), self.array))
            return y if added is None else y.add_(added)
        if self.blocks is None:
            return x @ self.plain if added is None else torch.addmm(added, x, self.plain)
        linear = torch.ops.mkldnn._linear_pointwise
        missing = full_rows(len(x)) - len(x)
        out: Tensor
        if added is not None and not missing:
            out = linear.binary(x, added, self.blocks, None, "add")
            return out
        out = linear(F.pad(x, (0, 0, 0, missing)) if missing else x, self.blocks, None, "none", [], "")[: len(x)]
        return out if added is None else out.add_(added)


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A layer's matrices: q, k and v as one; the weight of the norm before a matrix multiplied into it; the scale of
    attention's scores multiplied into q."""

    qkv: Matrix
    qkv_bias: Tensor | None
    o: Matrix
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class Packed:
    """A model's layers and its output layer, with the last norm's weight in it."""

    layers: Sequence[PackedLayer]
    head: Matrix
    floor: Tensor
    """sqrt(D · eps): sqrt(sum of squares / D + eps) is hypot(norm, floor) / sqrt(D), in three operations for eight."""

    def scaled(self, x: Tensor) -> Tensor:
        """What a norm leaves but for its weight and sqrt(D), which are in the matrix behind it. x: (rows, D)."""
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(norm, self.floor)


@torch.no_grad()
def pack(model: GLM) -> Packed | None:
    """The weights as they are now; None for a model that is large, not float32, or not made of plain parts only
    (adapters, other architectures)."""
    weight, config = model.lm_head.weight, model.config
    layers = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]
    if weight.dtype != torch.float32 or config.num_parameters * weight.element_size() > MAX_PACKED:
        return None
    if not all(type(module) is nn.Linear for layer in layers for module in _matrices(layer)):
        return None
    return Packed(
        layers=[_pack_layer(layer) for layer in layers],
        head=_behind_norm(weight, model.model.norm),
        floor=torch.tensor(math.sqrt(config.hidden_size * config.rms_norm_eps), device=weight.device),
    )


def _matrices(layer: DecoderLayer) -> Sequence[nn.Module]:
    """What `_pack_layer` takes the weights of; in adapters and other architectures they are no `nn.Linear`."""
    attention, mlp = layer.self_attn, layer.mlp
    if type(mlp) is not MLP:
        return [mlp]
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]


def _pack_layer(layer: DecoderLayer) -> PackedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    three = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([module.weight for module in three])
    biases: list[Tensor] = [module.bias for module in three if module.bias is not None]
    bias = torch.cat(biases) if biases else None
    for tensor in (weight, bias):
        if tensor is not None:
            tensor[: attention.q_proj.out_features] *= attention.head_dim**-0.5
    return PackedLayer(
        qkv=_behind_norm(weight, layer.input_layernorm),
        qkv_bias=bias,
        o=Matrix(attention.o_proj.weight),
        gate_up=_behind_norm(mlp.gate_up_proj.weight, layer.post_attention_layernorm),
        down=Matrix(mlp.down_proj.weight),
    )


def _behind_norm(weight: Tensor, norm: RMSNorm) -> Matrix:
    """A matrix that reads `Packed.scaled` in place of the norm."""
    return Matrix(weight * norm.weight * math.sqrt(weight.shape[1]))


def attend(keys: Array, values: Array, q: Array, mask: Tensor | None) -> Tensor:
    """One query of each sequence on all its keys: a product of a matrix and a vector for each head, which does not
    copy anything.

    Args:
        keys: (n, kv heads, seen, head_dim).
        values: the same.
        q: scaled, (n, kv heads, heads of each, head_dim).
        mask: added to the scores, (n, 1, 1, seen).

    Returns:
        (n, heads · head_dim)
    """
    scores = torch.from_numpy(np.matmul(keys[:, :, None], q[..., None])[..., 0])
    if mask is not None:
        scores += mask
    weights = scores.softmax(dim=-1).numpy()
    return torch.from_numpy(np.matmul(weights[..., None, :], values[:, :, None])).view(len(q), -1)


class Alone:
    """One token of one sequence, by itself: two thirds of the time go into the matrices.

    Args:
        packed: on a CPU.
        embeddings: (V, D).
        caches: of each layer, (slots, 2 · kv heads, capacity, head_dim).
    """

    def __init__(self, config: ModelConfig, packed: Packed, embeddings: Tensor, caches: Sequence[Tensor]) -> None:
        size, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.floor, self.embeddings = config.hidden_size * config.rms_norm_eps, embeddings.detach().numpy()
        self.layers = [
            (
                _array(layer.qkv),
                None if layer.qkv_bias is None else layer.qkv_bias.numpy(),
                _array(layer.o),
                _array(layer.gate_up),
                _array(layer.down),
                cache.numpy(),
            )
            for layer, cache in zip(packed.layers, caches, strict=True)
        ]
        self.head, self.kv_heads = _array(packed.head), kv_heads
        self.table = rotary_table(config, caches[0].shape[2]).numpy()
        self.x, self.scaled, self.added = (np.empty(size, np.float32) for _ in range(3))
        self.qkv = np.empty((heads + 2 * kv_heads) * dim, np.float32)
        self.q = self.qkv[: heads * dim].reshape(kv_heads, -1, dim, 1)
        self.kv = self.qkv[heads * dim :].reshape(2 * kv_heads, dim)
        pairs = self.qkv.view(np.complex64).reshape(-1, dim // 2)
        self.turned = pairs[: heads + kv_heads, : config.rotary_dim // 2]
        self.seen = np.empty((kv_heads, heads // kv_heads, 1, dim), np.float32)
        gate_up = torch.empty(2 * config.intermediate_size)
        self.gate, self.up = gate_up.chunk(2)
        self.gate_up, self.inner = gate_up.numpy(), self.gate.numpy()

    def step(self, id: int, position: int, slot: int) -> Tensor:
        """Logits after this token, which stands at this position of the sequence in this slot, (V,)."""
        x, dot, seen = self.x, np.dot, position + 1
        x[:] = self.embeddings[id]
        for qkv, bias, o, gate_up, down, cache in self.layers:
            dot(self._scale(), qkv, out=self.qkv)
            if bias is not None:
                self.qkv += bias
            self.turned *= self.table[position]
            own = cache[slot]
            own[:, position] = self.kv
            self._attend(own[: self.kv_heads, None, :seen], own[self.kv_heads :, None, :seen])
            x += dot(self.seen.reshape(-1), o, out=self.added)
            dot(self._scale(), gate_up, out=self.gate_up)
            F.silu(self.gate, inplace=True).mul_(self.up)  # torch's: no exponent of ours overflows
            x += dot(self.inner, down, out=self.added)
        return torch.from_numpy(dot(self._scale(), self.head))

    def _scale(self) -> Array:
        """`Packed.scaled` of x."""
        x = self.x
        return np.multiply(x, np.float32(1 / math.sqrt(float(np.dot(x, x)) + self.floor)), out=self.scaled)

    def _attend(self, keys: Array, values: Array) -> None:
        """As `attend`. keys and values: (kv heads, 1, seen, head_dim)."""
        scores = np.matmul(keys, self.q)[..., 0]
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        np.matmul(scores[:, :, None], values, out=self.seen)


def _array(matrix: Matrix) -> Array:
    assert matrix.array is not None
    return matrix.array
