"""The decoder with a key-value cache: the mathematics of model.py, arranged for many sequences at different positions
and few tokens at a time.

`CachedDecoder` owns a fixed number of slots, each with room for one sequence. It knows token ids and positions, not
which token is taken next (generation.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from miniglm.model import GLM, DecoderLayer, rotate
from miniglm.packed import BY_ITSELF, FEW, Alone, Packed, attend, pack


class CachedDecoder:
    """A model that remembers what each of its sequences has seen, so that a new token costs one position.

    A sequence lies in a slot, its token at position p at index p. Slots 0 to n are read as one contiguous block, so
    whoever frees a slot in the middle moves the last one there (`move`).

    Args:
        model: its weights are copied where it is small: make a new decoder after training them further.
        slots: sequences at once.
        capacity: tokens of a sequence that are remembered.
        packed: what `pack` made of the model, where that is there already.
    """

    def __init__(self, model: GLM, slots: int, capacity: int, packed: Packed | None = None) -> None:
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
        self.layers = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]
        self.packed = packed or pack(model)
        self.alone: Alone | None = None
        if self.packed is not None and self.device.type == "cpu":
            self.alone = Alone(config, self.packed, weight, self.cache)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies what slot `source` has of its first `length` positions to slot `target`."""
        for cache in self.cache:
            cache[target, :, :length] = cache[source, :, :length]

    def step(
        self, ids: Sequence[int], positions: Sequence[int], whole: Sequence[tuple[int, Sequence[int]]] = ()
    ) -> Tensor:
        """Reads one token of each sequence in slots 0 to n, and other sequences as a whole, in one pass: the weights
        come from memory once for all of them (Yu et al. 2022, Orca, OSDI '22: selective batching).

        Args:
            ids: a token of each of the slots 0 to n.
            positions: where it stands in its sequence.
            whole: (slot, token ids from position 0). A slot that is among the first n too gets what is read here.

        Returns:
            Logits after the last token of each, (n + len(whole), V).
        """
        if self.alone is not None and len(ids) <= BY_ITSELF and not whole:
            return torch.stack([self.alone.step(*each) for each in zip(ids, positions, range(len(ids)), strict=True)])
        n = len(ids)
        spans: list[tuple[int, int, int]] = []  # slot, first row, end
        flat, places, last = list(ids), list(positions), list(range(n))
        for slot, sequence in whole:
            spans.append((slot, len(flat), len(flat) + len(sequence)))
            flat += sequence
            places += range(len(sequence))
            last.append(len(flat) - 1)
        few = self.alone is not None and len(flat) < FEW
        with _threads(1) if few else nullcontext():
            return self._read(flat, places, positions, spans, last)

    def _read(
        self,
        flat: Sequence[int],
        places: Sequence[int],
        positions: Sequence[int],
        spans: Sequence[tuple[int, int, int]],
        last: Sequence[int],
    ) -> Tensor:
        """`step`, with all tokens in one row of rows.

        Args:
            flat: every token that is read.
            places: the position of each.
            positions: those of the slots 0 to n, which come first.
            spans: slot, first row and end of each whole sequence.
            last: the rows whose logits are wanted.
        """
        n = len(positions)
        at = torch.tensor(places, device=self.device)
        table = self.model.rotary(at[:, None], max(places) + 1)[:, 0]
        x = self.model.embed(torch.tensor(flat, device=self.device), at)
        mask, seen = self._mask(positions), max(positions, default=-1) + 1
        slots = torch.arange(n, device=self.device)
        scale = None if self.packed is None else 1.0  # it is in the weights
        for number, layer in enumerate(self.layers):
            qkv = self._qkv(number, x, table)
            q, kv, cache = qkv[:, : self.heads], qkv[:, self.heads :], self.cache[number]
            parts: list[Tensor] = []
            if n:
                if self.alone is not None:  # as below; numpy takes a tenth of the time
                    cache.numpy()[slots.numpy(), :, at[:n].numpy()] = kv[:n].numpy()
                else:
                    cache[slots, :, at[:n]] = kv[:n]
                past = cache[:n, :, :seen]
                keys, values = past[:, : self.kv_heads], past[:, self.kv_heads :]
                # The query heads of a group see the same keys: they stand as that many queries of one head.
                grouped = q[:n].reshape(n, self.kv_heads, -1, self.head_dim)
                if self.alone is not None:
                    parts.append(attend(keys.numpy(), values.numpy(), grouped.numpy(), mask))
                else:
                    y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
                    parts.append(y.reshape(n, -1))
            for slot, begin, end in spans:
                own = kv[begin:end].transpose(0, 1)
                cache[slot, :, : end - begin] = own
                seq = F.scaled_dot_product_attention(
                    q[None, begin:end].transpose(1, 2),
                    own[None, : self.kv_heads],
                    own[None, self.kv_heads :],
                    is_causal=True,
                    enable_gqa=layer.self_attn.grouped,
                    scale=scale,
                )
                parts.append(seq[0].transpose(0, 1).flatten(1))
            y = parts[0] if len(parts) == 1 else torch.cat(parts)
            if spans and number == len(self.layers) - 1:  # of the rest only the keys and values were wanted
                x, y = x[last], y[last]
            x = self._after_attention(number, x, y)
        if self.packed is None:
            return self.model.logits(self.model.model.norm(x))
        return self.packed.head(self.packed.scaled(x))

    def _mask(self, positions: Sequence[int]) -> Tensor | None:
        """Added to the scores of sequences of different length, (n, 1, 1, longest): each sees its own positions."""
        if not positions or min(positions) == max(positions):
            return None
        longest = max(positions) + 1
        hidden = torch.arange(longest, device=self.device) > torch.tensor(positions, device=self.device)[:, None]
        mask = torch.zeros(len(positions), longest, device=self.device, dtype=self.dtype)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None]

    def _qkv(self, number: int, x: Tensor, table: Tensor) -> Tensor:
        """Rotated queries, rotated keys and values of what a layer reads (rows, D): (rows, heads, head_dim)."""
        if self.packed is None:
            attention, x = self.layers[number].self_attn, self.layers[number].input_layernorm(x)
            qkv = torch.cat((attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)), dim=-1)
        else:
            packed = self.packed.layers[number]
            qkv = packed.qkv(self.packed.scaled(x))
            if packed.qkv_bias is not None:
                qkv += packed.qkv_bias
        qkv = qkv.view(len(x), -1, self.head_dim)
        turned = qkv[:, : self.heads + self.kv_heads]
        if qkv.dtype == torch.float32:  # in place, without a copy
            pairs = turned[..., : 2 * table.shape[-1]]
            torch.view_as_complex(pairs.view(*pairs.shape[:-1], -1, 2)).mul_(table)
        else:
            turned.copy_(rotate(turned, table))
        return qkv

    def _after_attention(self, number: int, x: Tensor, y: Tensor) -> Tensor:
        """A layer's residual stream after what attention saw, y (rows, heads · head_dim), and after the MLP."""
        if self.packed is None:
            layer = self.layers[number]
            x = x + layer.self_attn.o_proj(y)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            return x
        packed = self.packed.layers[number]
        x = packed.o(y, x)
        gate, up = packed.gate_up(self.packed.scaled(x)).chunk(2, dim=-1)
        return packed.down(F.silu(gate).mul_(up), x)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
