"""The way the reference system trains and samples, written anew from its description, to measure against.

A GPT-2-style decoder: learned positions, LayerNorm, GELU, no biases, output layer tied to the embedding of 50,304
entries, AdamW for everything, random windows of the text, the whole context again for every sampled token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from miniglm.tokenizer import Tokenizer, load_gpt2_tokenizer, train_tokenizer

VOCABULARY = 50304
TOKENS_PER_CHARACTER = 2.21
"""GPT-2's on 三国演义."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Its shapes; the defaults are those of its public setting for CPUs."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    rows: int = 12
    dropout: float = 0.0
    learning_rate: float = 1e-3


FULL = Sizes(layers=6, heads=8, width=512, context=256, rows=32, dropout=0.2, learning_rate=3e-4)
"""What its report trains on a GPU: 44.6 M weights."""


class Block(nn.Module):
    """Attention and a GELU network of four times the width, each behind a LayerNorm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.dropout = sizes.heads, sizes.dropout
        self.norm_1, self.norm_2 = (nn.LayerNorm(sizes.width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)
        self.up = nn.Linear(sizes.width, 4 * sizes.width, bias=False)
        self.down = nn.Linear(4 * sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        drop = self.dropout if self.training else 0.0
        batch, seq, width = x.shape
        q, k, v = (t.view(batch, seq, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(batch, seq, width)), drop)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), drop)


class ReferenceModel(nn.Module):
    """The whole decoder. `vocabulary` is smaller only in tests."""

    def __init__(self, sizes: Sizes, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.sizes = sizes
        self.tokens, self.positions = nn.Embedding(vocabulary, sizes.width), nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * sizes.layers) if last else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, (batch, seq, vocabulary)."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        x = F.dropout(x, self.sizes.dropout if self.training else 0.0)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token."""
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW with the reference's settings."""
        decayed = [p for p in self.parameters() if p.ndim == 2]
        plain = [p for p in self.parameters() if p.ndim != 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.sizes.learning_rate, betas=(0.9, 0.99))

    @torch.no_grad()
    def sample(self, ids: Tensor, count: int, temperature: float = 0.8, top_k: int = 100) -> Tensor:
        """`ids` (1, n) continued by `count` tokens, the whole window again for each."""
        for _ in range(count):
            logits = self(ids[:, -self.sizes.context :])[:, -1] / temperature
            least = torch.topk(logits, min(top_k, logits.shape[-1])).values[:, -1:]
            chosen = torch.multinomial(logits.masked_fill(logits < least, -math.inf).softmax(-1), 1)
            ids = torch.cat((ids, chosen), dim=1)
        return ids


def learning_rate(sizes: Sizes, step: int, steps: int, warmup: int = 100) -> float:
    """Its schedule: linear warm-up, then a cosine to a tenth (a third at full size)."""
    final = sizes.learning_rate / (3 if sizes.width >= 512 else 10)
    if step < warmup:
        return sizes.learning_rate * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + 0.5 * (sizes.learning_rate - final) * (1 + math.cos(math.pi * share))


def random_windows(tokens: NDArray[np.integer], sizes: Sizes, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A batch as it draws them: windows at random places, and the same one token on."""
    starts = rng.integers(len(tokens) - sizes.context, size=sizes.rows)
    windows = np.stack([tokens[s : s + sizes.context + 1] for s in starts]).astype(np.int64)
    both = torch.from_numpy(windows)
    return both[:, :-1], both[:, 1:]


def reference_tokenizer(text: str) -> tuple[Tokenizer, str]:
    """GPT-2's tokenizer, or where its vocabulary cannot be had offline a byte-level BPE with as few merges as give
    as many tokens a character; the second value says which."""
    from miniglm.errors import MiniGLMError

    try:
        return load_gpt2_tokenizer(), "GPT-2's own vocabulary"
    except (MiniGLMError, ImportError):
        pass
    sample = text[:200_000]
    most = train_tokenizer([sample], vocab_size=None, corpus_characters=len(sample)).vocab_size
    low, high = 280, min(2000, most)  # more entries, fewer tokens: halve the interval
    while high - low > 8:
        middle = (low + high) // 2
        tokenizer = train_tokenizer([sample], vocab_size=middle, corpus_characters=len(sample))
        many = len(tokenizer.encode(sample)) / len(sample) > TOKENS_PER_CHARACTER
        low, high = (middle, high) if many else (low, middle)
    tokenizer = train_tokenizer([sample], vocab_size=high, corpus_characters=len(sample))
    return tokenizer, f"stand-in with GPT-2's {TOKENS_PER_CHARACTER} tokens a character ({high} entries in use)"
