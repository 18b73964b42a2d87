"""A model folder as one GGUF file for llama.cpp and Ollama, with the Modelfile that Ollama needs beside it.

llama.cpp's own converter knows a tokenizer by a hash over what it does to a fixed text, so it refuses every newly
trained one. This one says outright what the tokenizer is: byte-level BPE behind GLM-4's pre-tokenizer, which llama.cpp
has built in as `chatglm-bpe`. Knows the file format, not how the programs run it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from miniglm.config import ModelConfig
from miniglm.errors import MiniGLMError
from miniglm.files import write_whole, written_whole
from miniglm.model import GLM
from miniglm.tokenizer import CHAT_TEMPLATE, PATTERN, Tokenizer

if TYPE_CHECKING:
    import gguf

PRE_TOKENIZER = "chatglm-bpe"
BLOCK = 32
"""Weights that one scale of q8_0 or q4_0 serves; a row must be a whole number of blocks."""


def export_gguf(model: GLM, tokenizer: Tokenizer, out: Path, *, type: str, name: str) -> None:
    """Writes `out` and, beside it, a Modelfile for Ollama.

    Matrices are of the given type; norms and biases stay float32. In q4_0 the embedding, which is the output layer too
    where they are tied, is q8_0: at four bits it costs more than all layers together (docs/interop.md).

    Args:
        type: of the matrices; one of f32, f16, q8_0, q4_0.
        name: what the file says the model is called.

    Raises:
        MiniGLMError: the `gguf` library is missing, or llama.cpp has no form for this model or this tokenizer.
    """
    try:
        import gguf
    except ImportError:
        raise MiniGLMError("导出 GGUF 需要 gguf，而它没有安装", fix="pip install 'miniglm-chat[export]'") from None
    _check(model.config, tokenizer)
    with written_whole(out) as file:
        writer = gguf.GGUFWriter(Path(file.name), gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.CHATGLM])
        _describe(writer, model.config, tokenizer, type, name)
        for tensor, array in _tensors(model):
            kind = _kind(tensor, array, type)
            data = array if kind == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(array, kind)
            writer.add_tensor(tensor, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    write_whole(modelfile_of(out), modelfile(tokenizer, model.config, out.name))


def _check(config: ModelConfig, tokenizer: Tokenizer) -> None:
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        raise MiniGLMError(
            f"llama.cpp 的 chatglm 要求 num_attention_heads × head_dim 等于 hidden_size，"
            f"这个模型是 {config.num_attention_heads} × {config.head_dim} ≠ {config.hidden_size}",
            fix="用 ONNX 导出，或换一个尺寸训练",
        )
    if not _splits_by(PATTERN, json.loads(tokenizer.hf.to_str())["pre_tokenizer"]):
        raise MiniGLMError(
            "这个分词器的切分规则不是 GLM-4 的，llama.cpp 会把文字切成别的 token",
            fix='用配方里 tokenizer.kind = "bpe" 训练的模型，或 GLM-4 自己的分词器',
        )


def _splits_by(pattern: str, pre_tokenizer: Any) -> bool:
    """Whether a tokenizer.json's pre-tokenizer has this pattern and no other."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    found = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    return found == [pattern] and not any(s["type"] == "ByteLevel" and s.get("use_regex", True) for s in steps)


def _describe(writer: gguf.GGUFWriter, config: ModelConfig, tokenizer: Tokenizer, type: str, name: str) -> None:
    """All that is not a weight: sizes, the vocabulary, the tokens that end an answer, the chat template."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(type, f"MOSTLY_{type.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)

    data = json.loads(tokenizer.hf.to_str())
    tokens: list[str] = [f"[PAD{id}]" for id in range(config.vocab_size)]  # rows that no token has
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    for token, id in data["model"]["vocab"].items():
        tokens[id], types[id] = token, gguf.TokenType.NORMAL
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_eot_token_id(tokenizer.user)  # an answer ends where the next turn would begin, too
    writer.add_eom_token_id(tokenizer.observation)
    writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)  # [gMASK]<sop> comes from the template: added here too, it would stand there twice
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(tokenizer.template.source if tokenizer.template else CHAT_TEMPLATE)


def _tensors(model: GLM) -> list[tuple[str, NDArray[np.float32]]]:
    """The weights under llama.cpp's names: q, k and v in one matrix, gate and up in one (as we have them)."""
    import torch

    weights = model.state_dict()

    def get(name: str) -> NDArray[np.float32]:
        found: NDArray[np.float32] = weights[name].detach().to("cpu", torch.float32).contiguous().numpy()
        return found

    found = [("token_embd.weight", get("model.embed_tokens.weight")), ("output_norm.weight", get("model.norm.weight"))]
    if not model.config.tie_word_embeddings:
        found.append(("output.weight", get("lm_head.weight")))
    for layer in range(model.config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        parts = ("weight", "bias") if model.config.attention_bias else ("weight",)
        for part in parts:
            qkv = [get(f"{ours}self_attn.{x}_proj.{part}") for x in "qkv"]
            found.append((f"{theirs}attn_qkv.{part}", np.concatenate(qkv)))
        for their_name, our_name in (
            ("attn_norm", "input_layernorm"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_up", "mlp.gate_up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ):
            found.append((f"{theirs}{their_name}.weight", get(f"{ours}{our_name}.weight")))
    return found


def _kind(tensor: str, array: NDArray[np.float32], type: str) -> gguf.GGMLQuantizationType:
    import gguf

    if array.ndim == 1 or type == "f32":
        return gguf.GGMLQuantizationType.F32
    if type == "f16" or array.shape[1] % BLOCK:
        return gguf.GGMLQuantizationType.F16
    if type == "q4_0" and tensor in ("token_embd.weight", "output.weight"):
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType[type.upper()]


def modelfile_of(out: Path) -> Path:
    """Where the Modelfile of a GGUF file lies."""
    return out.with_name(f"{out.stem}.Modelfile")


def modelfile(tokenizer: Tokenizer, config: ModelConfig, gguf_name: str) -> str:
    """Ollama's Modelfile. The template and the stop words are written out: a model imported without them gets its
    question as plain text and answers nonsense without end."""
    if tokenizer.template is None:
        begin, after_role, ask = "[gMASK]<sop>", "\n", "<|assistant|>\n"
    else:  # Ollama's templates are Go's, not Jinja: the parts that all GLM templates have are read off a rendering
        asked = tokenizer.template.render([{"role": "user", "content": "\ue000"}], False)
        prompted = tokenizer.template.render([{"role": "user", "content": "\ue000"}], True)
        begin, _, after = asked.partition("<|user|>")
        after_role, ask = after.partition("\ue000")[0], prompted.removeprefix(asked)
    stops = [tokenizer.decode([id], skip_control=False) for id in sorted(tokenizer.stop_ids)]
    return (
        f"FROM ./{gguf_name}\n"
        f'TEMPLATE """{begin}{{{{ range .Messages }}}}<|{{{{ .Role }}}}|>{after_role}{{{{ .Content }}}}{{{{ end }}}}{ask}"""\n'
        + "".join(f'PARAMETER stop "{stop}"\n' for stop in stops)
        + f"PARAMETER num_ctx {config.max_position_embeddings}\nPARAMETER temperature 0\n"
    )
