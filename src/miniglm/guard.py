"""What keeps a training run from harm: steps that must not be taken, and batches that do not fit into memory.

Knows losses, gradient norms and bytes; it knows nothing of files, and the loop (training.py) does what it says.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from miniglm.config import ModelConfig
from miniglm.errors import MiniGLMError

SPIKE = 1000.0
"""So many times the usual gradient norm is no gradient to follow."""
HISTORY = 100
"""The usual norm is the median of so many good steps before."""
LEAST = 8
"""Good steps before there is a usual norm."""
IN_A_ROW = 3
"""Skipped steps one after another that send the weights back to the last saved state."""
RETURNS = 3
"""Such returns, each with half the learning rate, before the run stops."""


class Guard:
    """Watches losses and gradient norms.

    Attributes:
        skipped: steps skipped one after another just now.
        returns: how often the weights went back to a saved state.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        saved = saved or {}  # states of older versions have none
        self.norms: deque[float] = deque(saved.get("norms", ()), HISTORY)
        self.skipped: int = saved.get("skipped", 0)
        self.returns: int = saved.get("returns", 0)

    def to_json(self) -> dict[str, Any]:
        """For the saved state: a resumed run judges as an undisturbed one."""
        return {"norms": list(self.norms), "skipped": self.skipped, "returns": self.returns}

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by."""
        return float(0.5**self.returns)

    def fault(self, loss: float, norm: float) -> str | None:
        """Why a step must not be taken; None for a good one, which then counts for the usual norm."""
        reason = None
        if not math.isfinite(loss) or not math.isfinite(norm):
            reason = f"损失 {loss:g}，梯度范数 {norm:g}，不是有限数"
        elif len(self.norms) >= LEAST and norm > SPIKE * (usual := statistics.median(self.norms)) > 0:
            reason = f"梯度范数 {norm:g}，平时是 {usual:g}"
        if reason is None:
            self.norms.append(norm)
            self.skipped = 0
        else:
            self.skipped += 1
        return reason

    @property
    def must_return(self) -> bool:
        """Whether skipping does not help."""
        return self.skipped >= IN_A_ROW

    def count_return(self, reason: str, metrics: Path, stage: str) -> str:
        """Counts a return to the last saved state, and says so.

        Raises:
            MiniGLMError: there were `RETURNS` of them already.
        """
        if self.returns >= RETURNS:
            raise MiniGLMError(
                f"{reason}；已经 {RETURNS} 次退回上次保存的状态、每次把学习率减半，还是这样，已停止",
                path=metrics,
                fix=f"保存的状态和模型没有受影响；请看其中 skipped_rows 指的是哪些数据，"
                f"或换一个 --out，把 {stage}.matrix_lr 和 {stage}.adam_lr 改小",
            )
        self.returns += 1
        self.skipped = 0
        return f"{reason}；退回上次保存的权重，学习率减半（第 {self.returns} 次，最多 {RETURNS} 次）"


_OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "bad allocation")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: of a GPU, or of a CPU's limit (torch's allocator on a CPU raises
    a plain RuntimeError). Where Linux promises more than it has, it kills the process instead; nobody is asked."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def smaller_micro_batch(rows: int, config: ModelConfig, device: torch.device) -> int:
    """The rows of a micro-batch after one of `rows` did not fit: half as many.

    Raises:
        MiniGLMError: it was a single row; the text says what it needs, what there is and what would fit.
    """
    if rows > 1:
        return rows // 2
    raise MiniGLMError(f"内存不够，一行也放不下：{memory_needed(config, device)}")


@contextlib.contextmanager
def memory_explained(config: ModelConfig, device: torch.device) -> Iterator[None]:
    """Where fewer rows at once do not help: says what is needed when memory runs out.

    Raises:
        MiniGLMError: it ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MiniGLMError(f"内存不够：{memory_needed(config, device)}") from None


def release_memory(device: torch.device) -> None:
    """Gives what a failed step left in torch's own cache back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def activation_bytes(config: ModelConfig, context: int) -> int:
    """Bytes that one row of `context` tokens keeps for its backward pass, in float32; within a third of what autograd
    saves (tests/test_guard.py counts it). Each layer keeps the residual stream, its norms and the branches' outputs
    (about 6 D), q, k, v before and after rotation and the attention's output, the weights of half of all pairs of
    positions for each head, and the gated unit's halves and product (4 F); then come the logits' gradients, in blocks
    that do not count here."""
    attention = 3 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    attention += config.num_attention_heads * context // 2
    layer = 6 * config.hidden_size + attention + 4 * config.intermediate_size
    return 4 * context * (config.num_hidden_layers * layer + 3 * config.hidden_size)


def memory_needed(config: ModelConfig, device: torch.device) -> str:
    """The arithmetic behind "does not fit": what is used, what one row takes, and which context would fit."""
    context = config.max_position_embeddings
    mib = 2**20
    weights, row = 4 * config.num_parameters, activation_bytes(config, context)
    limit, used = _memory(device)
    text = (
        f"权重和梯度各 {weights / mib:,.1f} MiB，优化器最多 {2 * weights / mib:,.1f} MiB，"
        f"一行 {context} 个 token 的中间结果约 {row / mib:,.1f} MiB"
    )
    if limit is None:
        return f"{text}。把 model.context 减半再试，或换小的模型"
    left = limit - used - weights  # the gradients come with the row
    fits = int(context * left / row) if left > 0 else 0
    text += f"；上限 {limit / mib:,.0f} MiB，已用 {used / mib:,.0f} MiB"
    if fits >= context:  # the estimate is rough, and memory may be in pieces
        fits = context // 2
    if fits < 16:
        return f"{text}，连 16 个 token 也放不下。请换小的模型（hidden_size、num_hidden_layers、vocab_size）或加内存"
    return f"{text}，context 约 {fits} 以下才放得下。请用新的 --out 改 model.context，或换小的模型"


def _memory(device: torch.device) -> tuple[int | None, int]:
    """Bytes that there may be (None: not known) and that are used: of the GPU, or of this process under its limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, total - free
    if sys.platform != "linux":
        return None, 0
    import os
    import resource

    page = os.sysconf("SC_PAGE_SIZE")
    mapped, resident = (int(word) * page for word in Path("/proc/self/statm").read_text("ascii").split()[:2])
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return limit, mapped
    return page * os.sysconf("SC_PHYS_PAGES"), resident
