"""A model's sizes, as its folder has them. Loads nothing, so that a page can name them without the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miniglm.errors import MiniGLMError
from miniglm.files import read_json

INCOMPLETE = "这个目录不完整，请重新训练或复制完整的目录"
"""How to mend a model folder that lacks something."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a decoder, under the names that transformers' `GlmConfig` uses."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool = True
    attention_bias: bool = True
    rms_norm_eps: float = 1.5625e-07  # GLM-4's
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5

    def __post_init__(self) -> None:
        sizes = asdict(self)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if not isinstance(sizes[name], int) or not 0 < sizes[name] <= 2**24:
                raise ValueError(f"{name} = {sizes[name]!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} "
                f"不是 num_key_value_heads = {self.num_key_value_heads} 的倍数"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}，应为偶数")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"head_dim × partial_rotary_factor = {self.head_dim * self.partial_rotary_factor}，应为偶数"
            )

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Reads a transformers `config.json` of the `glm` type, of version 4 or 5 of transformers.

        Raises:
            ValueError: another architecture, a missing key or an impossible size; the text names it.
        """
        if config.get("model_type") != "glm":
            raise ValueError(f"model_type = {config.get('model_type')!r}，应为 'glm'")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act = {config['hidden_act']!r}，应为 'silu'")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if (scaled := rope.get("rope_type", rope.get("type", "default"))) != "default":
            raise ValueError(f"rope_type = {scaled!r}，应为 'default'")
        heads = config.get("num_attention_heads")
        try:
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=config["num_attention_heads"],
                num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
                head_dim=config.get("head_dim") or config["hidden_size"] // (heads or 1),
                max_position_embeddings=config.get("max_position_embeddings", 131072),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                attention_bias=bool(config.get("attention_bias", True)),
                rms_norm_eps=float(config.get("rms_norm_eps", 1.5625e-07)),
                rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
                partial_rotary_factor=float(
                    rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
                ),
            )
        except KeyError as error:
            raise ValueError(f"缺少 {error.args[0]}") from None

    def to_hf(self) -> dict[str, Any]:
        """The content of `config.json`; readable by transformers 4 (flat keys) and 5 (`rope_parameters`)."""
        config = asdict(self)
        return config | {
            "architectures": ["GlmForCausalLM"],
            "model_type": "glm",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "dtype": "float32",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.partial_rotary_factor,
            },
        }

    @property
    def num_parameters(self) -> int:
        """All weights; tied ones count once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        if self.attention_bias:
            attention += self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations to train on one token: 6 a matrix weight (Kaplan et al. 2020, arXiv:2001.08361,
        section 2.1) plus causal attention's 6 · context · heads · head_dim a layer; norms and biases left out."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        scores = self.num_hidden_layers * context * self.num_attention_heads * self.head_dim
        return 6.0 * (self.num_hidden_layers * layer + self.vocab_size * self.hidden_size + scores)


def read_config(folder: Path) -> ModelConfig:
    """A model folder's sizes.

    Raises:
        MiniGLMError: there is no such folder, or its config.json is not one of a GLM.
    """
    if not folder.is_dir():
        raise MiniGLMError("没有这个模型目录", path=folder)
    try:
        return ModelConfig.from_hf(read_json(folder / "config.json", fix=INCOMPLETE))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise MiniGLMError(f"不是能用的 GLM 配置：{error}", path=folder / "config.json") from None
