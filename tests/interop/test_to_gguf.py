"""The GGUF file in llama.cpp itself: loads, reads text as we do, answers as we do, and stops.

Each of the failures that people meet with small models exported elsewhere has a test here: an unknown pre-tokenizer, a
missing template, a doubled start token, an answer that never ends.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interop.texts import ODD, ROOM

from miniglm.config import ModelConfig
from miniglm.conversation import messages_of
from miniglm.errors import MiniGLMError
from miniglm.interop.export import FORMATS
from miniglm.interop.to_gguf import export_gguf
from miniglm.model import GLM
from miniglm.qa.formats import Example
from miniglm.sampling import Generation
from miniglm.tokenizer import Tokenizer, from_tiktoken

xllamacpp = pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

Ask = Callable[..., Any]


@contextmanager
def llama_cpp(path: Path) -> Iterator[Ask]:
    """llama.cpp's server with this file, in float32 throughout; gives a function (path, body) that posts JSON."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.warmup = False
    parameters.fit_params = False
    parameters.cache_ram_mib = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.port = 0
    server = xllamacpp.Server(parameters)

    def ask(where: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(server.listening_address + where, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())

    yield ask  # the server ends with the last reference to it


@pytest.fixture(scope="module")
def exported(ours: tuple[GLM, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    export_gguf(*ours, folder / "model.gguf", type="f32", name="三国")
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def llama(exported: Path) -> Iterator[Ask]:
    with llama_cpp(exported) as ask:
        yield ask


def test_it_loads_with_our_sizes_and_its_pre_tokenizer_is_known(
    llama: Ask, exported: Path, ours: tuple[GLM, Tokenizer], capfd: pytest.CaptureFixture[str]
) -> None:
    about = llama("/v1/models")["data"][0]["meta"]
    config = ours[0].config
    assert about["n_vocab"] == config.vocab_size and about["n_ctx_train"] == config.max_position_embeddings
    assert about["n_embd"] == config.hidden_size
    # llama.cpp warns of a pre-tokenizer it does not know, or refuses the file; "default" would split text differently.
    fields = gguf.GGUFReader(exported).fields
    assert fields["tokenizer.ggml.pre"].contents() == "chatglm-bpe"


def test_an_unknown_pre_tokenizer_would_be_refused(exported: Path, tmp_path: Path) -> None:
    """That the file above loads says that its pre-tokenizer is known: one that is not is refused."""
    broken = tmp_path / "model.gguf"
    broken.write_bytes(exported.read_bytes().replace(b"chatglm-bpe", b"miniglm-bpe", 1))
    with pytest.raises(Exception), llama_cpp(broken):  # noqa: B017  # the wheel raises nothing narrower
        pass


def test_the_lines_of_the_novel_and_odd_strings_get_our_ids(
    llama: Ask, ours: tuple[GLM, Tokenizer], lines: list[str]
) -> None:
    tokenizer = ours[1]
    for text in [*lines, *(t for t in ODD if t)]:
        assert llama("/tokenize", content=text, parse_special=False)["tokens"] == tokenizer.encode(text), text


def test_answers_are_ours_and_stop(
    llama: Ask, ours: tuple[GLM, Tokenizer], questions: list[Example], answers: list[Generation]
) -> None:
    """Template, start tokens and stops are llama.cpp's reading of the file."""
    for example, answer in zip(questions, answers, strict=True):
        prompt = llama("/apply-template", messages=messages_of(example))["prompt"]
        made = llama("/completion", prompt=prompt, n_predict=ROOM, temperature=0, return_tokens=True)
        assert [id for id in made["tokens"] if id not in ours[1].stop_ids] == answer.ids
        assert made["stop_type"] == {"stop": "eos", "length": "limit"}[answer.finish_reason]
        text = ours[1].decode(answer.ids)
        if "\ufffd" not in text:  # it leaves an unfinished character out, where we say U+FFFD
            assert chat(llama, example) == (text, answer.finish_reason)


def chat(llama: Ask, example: Example) -> tuple[str, str]:
    """The answer through the chat endpoint, and why it ended."""
    made = llama("/v1/chat/completions", messages=messages_of(example), max_tokens=ROOM, temperature=0)["choices"][0]
    return made["message"]["content"], made["finish_reason"]


def test_the_embedded_template_is_used_with_one_start_token(
    llama: Ask, ours: tuple[GLM, Tokenizer], questions: list[Example]
) -> None:
    messages = [
        {"role": "system", "content": "答题。"},
        {"role": "user", "content": "谁？"},
        {"role": "assistant", "content": "曹操"},
        {"role": "user", "content": "字什么？"},
    ]
    text = llama("/apply-template", messages=messages)["prompt"]
    assert text.startswith("[gMASK]<sop><|system|>\n答题。<|user|>\n")
    read = llama("/tokenize", content=text, parse_special=True, add_special=True)["tokens"]
    assert read == ours[1].encode_chat(messages)
    # What generation really reads: as many tokens as ours, so no start token is put before the template's own.
    used = llama("/v1/chat/completions", messages=messages, max_tokens=1, cache_prompt=False)["usage"]
    assert used["prompt_tokens"] == len(read) and read[:3].count(ours[1].gmask) == 1


def test_every_stop_token_ends_an_answer(llama: Ask, ours: tuple[GLM, Tokenizer]) -> None:
    """Whatever the model's weights: a stop token that is forced ends the answer and is not shown."""
    prompt = ours[1].encode_chat([{"role": "user", "content": "谁？"}])
    for id in ours[1].stop_ids:
        made = llama("/completion", prompt=prompt, n_predict=5, logit_bias=[[id, 1000]], cache_prompt=False)
        assert made["stop_type"] == "eos" and made["content"] == ""


@pytest.mark.parametrize("kind", FORMATS["gguf"])
def test_every_type_loads_and_is_as_small_as_it_says(
    kind: str, ours: tuple[GLM, Tokenizer], questions: list[Example], answers: list[Generation], tmp_path: Path
) -> None:
    export_gguf(*ours, tmp_path / "m.gguf", type=kind, name="m")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) == 2 and "token_embd" not in t.name}
    assert kinds == {kind.upper()}
    close = {}
    for tensor in reader.tensors:  # what is stored is our weights, to the type's own precision
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "blk.1.ffn_up.weight":
            weight = ours[0].get_parameter("model.layers.1.mlp.gate_up_proj.weight").detach().numpy()
            close[kind] = float(np.linalg.norm(stored - weight) / np.linalg.norm(weight))
    assert close[kind] <= {"f32": 0, "f16": 1e-3, "q8_0": 0.01, "q4_0": 0.15}[kind]
    with llama_cpp(tmp_path / "m.gguf") as ask:
        right = 0
        for example, answer in zip(questions[:20:2], answers[:20:2], strict=True):
            right += chat(ask, example)[0] == ours[1].decode(answer.ids).strip("\ufffd")
        assert right >= {"f32": 10, "f16": 9, "q8_0": 7, "q4_0": 1}[kind]


def test_the_modelfile_has_template_and_stops(exported: Path, ours: tuple[GLM, Tokenizer]) -> None:
    text = (exported.parent / "model.Modelfile").read_text("utf-8")
    assert text.startswith("FROM ./model.gguf\n")
    stops = re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)
    assert sorted(stops) == ["<|endoftext|>", "<|observation|>", "<|user|>"]
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert template is not None
    # Go's template by hand, for the one construct that it uses.
    begin, body, end = re.fullmatch(
        r"(.*)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template[1], re.DOTALL
    ).groups()  # type: ignore[union-attr]
    messages = [{"role": "system", "content": "甲"}, {"role": "user", "content": "乙"}]
    rendered = begin + "".join(
        body.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages
    )
    assert rendered + end == "[gMASK]<sop><|system|>\n甲<|user|>\n乙<|assistant|>\n"
    assert f"PARAMETER num_ctx {ours[0].config.max_position_embeddings}" in text


def test_what_llama_cpp_could_not_read_is_not_written(tmp_path: Path, ours: tuple[GLM, Tokenizer]) -> None:
    import tiktoken

    wide = GLM(ModelConfig(ours[1].vocab_size, 64, 64, 1, 2, 1, 64, 64)).initialize(0)
    with pytest.raises(MiniGLMError, match="head_dim"):
        export_gguf(wide, ours[1], tmp_path / "m.gguf", type="f32", name="m")
    ranks = {bytes([i]): i for i in range(256)}
    other = from_tiktoken(tiktoken.Encoding("x", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={}))
    with pytest.raises(MiniGLMError, match="切分"):
        export_gguf(ours[0], other, tmp_path / "m.gguf", type="f32", name="m")
    assert not list(tmp_path.iterdir())
