"""The decoder with a key-value cache: the mathematics of model.py, arranged for many sequences at different positions
and few tokens at a time.

`CachedDecoder` owns a fixed number of slots, each with room for one sequence. It knows token ids and positions, not
which token is taken next (generation.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniglm.model import GLM, MLP, DecoderLayer, rotate

MAX_PACKED = 2**28
"""Bytes of weights that are copied into the layout that single rows are fastest with; larger models stay as they are,
for there the copy costs more memory than it saves time."""


@dataclass(frozen=True, slots=True)
class _Packed:
    """A layer's matrices as (in, out), so that one row times a matrix reads it in order; q, k and v as one."""

    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    gate_up: Tensor
    down: Tensor


class CachedDecoder:
    """A model that remembers what each of its sequences has seen, so that a new token costs one position.

    A sequence lies in a slot, its token at position p at index p. Slots 0 to n are read as one contiguous block, so
    whoever frees a slot in the middle moves the last one there (`move`).

    Args:
        model: its weights are copied where it is small: make a new decoder after training them further.
        slots: sequences at once.
        capacity: tokens of a sequence that are remembered.
    """

    def __init__(self, model: GLM, slots: int, capacity: int) -> None:
        self.model, self.config, self.capacity = model, model.config, capacity
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        config = model.config
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        # keys and values of a layer in one array, so that one write stores both: (slots, 2 · kv heads, capacity, dim)
        shape = (slots, 2 * self.kv_heads, capacity, self.head_dim)
        self.cache = [torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in model.model.layers]
        layers = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]
        self.layers = layers
        small = model.config.num_parameters * weight.element_size() <= MAX_PACKED
        plain = all(type(module) is nn.Linear for layer in layers for module in _matrices(layer))
        self.packed = [_pack(layer) for layer in layers] if small and plain else None
        self.head = model.lm_head.weight.t().contiguous() if small and plain else None

    def move(self, source: int, target: int, length: int) -> None:
        """Copies what slot `source` has of its first `length` positions to slot `target`."""
        for cache in self.cache:
            cache[target, :, :length] = cache[source, :, :length]

    def prefill(self, sequences: Sequence[Sequence[int]], first: int) -> Tensor:
        """Reads whole sequences, from position 0, into slots `first`, `first` + 1, …; logits after the last token of
        each, (n, V)."""
        lengths = [len(ids) for ids in sequences]
        longest = max(lengths)
        # What stands right of a shorter sequence is never seen: later tokens overwrite it before anyone looks there.
        ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences], device=self.device)
        x = self.model.embed(ids, None)
        table = self.model.rotary(None, longest)
        slots = slice(first, first + len(sequences))
        for number, layer in enumerate(self.layers):
            attention = layer.self_attn
            y = layer.input_layernorm(x)
            qkv = self._qkv(number, y, table)
            q, kv = qkv[:, :, : self.heads].transpose(1, 2), qkv[:, :, self.heads :].transpose(1, 2)
            self.cache[number][slots, :, :longest] = kv
            y = F.scaled_dot_product_attention(
                q, kv[:, : self.kv_heads], kv[:, self.kv_heads :], is_causal=True, enable_gqa=attention.grouped
            )
            x = x + attention.o_proj(y.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        last = x[torch.arange(len(lengths), device=self.device), torch.tensor(lengths, device=self.device) - 1]
        return self._logits(last)

    def step(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Reads one token of each sequence in slots 0 to n, at its position; logits after it, (n, V)."""
        n = len(ids)
        longest = max(positions) + 1
        at = torch.tensor(positions, device=self.device)
        slots = torch.arange(n, device=self.device)
        mask = None
        if min(positions) + 1 < longest:  # sequences of different length: each sees its own positions only
            hidden = torch.arange(longest, device=self.device) > at[:, None]
            mask = torch.zeros(n, longest, device=self.device, dtype=self.dtype)
            mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        table = self.model.rotary(at[:, None], longest)
        x = self.model.embed(torch.tensor(ids, device=self.device), at)
        for number, layer in enumerate(self.layers):
            qkv = self._qkv(number, layer.input_layernorm(x)[:, None], table)[:, 0]
            cache = self.cache[number]
            cache[slots, :, at] = qkv[:, self.heads :]
            kv = cache[:n, :, :longest]
            # The query heads of a group see the same keys: they stand as that many queries of one head.
            q = qkv[:, : self.heads].reshape(n, self.kv_heads, -1, self.head_dim)
            y = F.scaled_dot_product_attention(q, kv[:, : self.kv_heads], kv[:, self.kv_heads :], attn_mask=mask)
            y = y.reshape(n, -1)
            if self.packed is None:
                x = x + layer.self_attn.o_proj(y)
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            else:
                packed = self.packed[number]
                x = torch.addmm(x, y, packed.o)
                gate, up = (layer.post_attention_layernorm(x) @ packed.gate_up).chunk(2, dim=-1)
                x = torch.addmm(x, F.silu(gate).mul_(up), packed.down)
        return self._logits(x)

    def _qkv(self, number: int, x: Tensor, table: Tensor) -> Tensor:
        """Rotated queries, rotated keys and values of a layer's input (batch, seq, D): (batch, seq, heads, head_dim)."""
        if self.packed is None:
            attention = self.layers[number].self_attn
            qkv = torch.cat((attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)), dim=-1)
        else:
            packed = self.packed[number]
            flat = x.flatten(0, 1)
            qkv = flat @ packed.qkv if packed.qkv_bias is None else torch.addmm(packed.qkv_bias, flat, packed.qkv)
        qkv = qkv.view(*x.shape[:2], -1, self.head_dim)
        turned = qkv[:, :, : self.heads + self.kv_heads]
        if qkv.dtype == torch.float32:  # in place, without a copy
            pairs = turned[..., : 2 * table.shape[-1]]
            torch.view_as_complex(pairs.view(*pairs.shape[:-1], -1, 2)).mul_(table)
        else:
            turned.copy_(rotate(turned, table))
        return qkv

    def _logits(self, x: Tensor) -> Tensor:
        hidden = self.model.model.norm(x)
        return self.model.logits(hidden) if self.head is None else hidden @ self.head


def _matrices(layer: DecoderLayer) -> Sequence[nn.Module]:
    """What `_pack` takes the weights of; adapters and the parts of other architectures are no `nn.Linear` there."""
    attention, mlp = layer.self_attn, layer.mlp
    if type(mlp) is not MLP:
        return [mlp]
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]


def _pack(layer: DecoderLayer) -> _Packed:
    attention, mlp = layer.self_attn, layer.mlp
    three = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases: list[Tensor] = [module.bias for module in three if module.bias is not None]
    return _Packed(
        qkv=torch.cat([module.weight for module in three]).t().contiguous(),
        qkv_bias=torch.cat(biases) if biases else None,
        o=attention.o_proj.weight.t().contiguous(),
        gate_up=mlp.gate_up_proj.weight.t().contiguous(),
        down=mlp.down_proj.weight.t().contiguous(),
    )
