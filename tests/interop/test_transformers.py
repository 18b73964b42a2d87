"""The model folder in transformers: the same ids, the same logits, the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interop.texts import ODD, ROOM, prompts_of

from miniglm.conversation import messages_of
from miniglm.model import GLM
from miniglm.qa.formats import Example
from miniglm.sampling import Generation
from miniglm.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def their_tokenizer(taught: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(taught)


@pytest.fixture(scope="module")
def their_model(taught: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(taught).eval()


def test_the_lines_of_the_novel_and_odd_strings_get_our_ids(
    ours: tuple[GLM, Tokenizer], their_tokenizer: Any, lines: list[str]
) -> None:
    assert their_tokenizer(lines, add_special_tokens=False)["input_ids"] == ours[1].encode_batch(lines)
    assert their_tokenizer(lines[:100])["input_ids"] == ours[1].encode_batch(lines[:100])  # nothing is added
    for text in ODD:
        # Control tokens in a text are text to us; transformers is told so.
        assert their_tokenizer.encode(text, split_special_tokens=True) == ours[1].encode(text), text
        assert their_tokenizer.decode(ours[1].encode(text)) == text.encode().decode("utf-8", "replace")


def test_the_template_gives_our_prompts(
    ours: tuple[GLM, Tokenizer], their_tokenizer: Any, questions: list[Example]
) -> None:
    for example in questions:
        ids = their_tokenizer.apply_chat_template(messages_of(example), add_generation_prompt=True, return_dict=False)
        assert ids == ours[1].encode_chat(messages_of(example))


def test_logits_agree(ours: tuple[GLM, Tokenizer], their_model: Any, lines: list[str]) -> None:
    model, tokenizer = ours
    ids = torch.tensor([(tokenizer.prefix + tokenizer.encode("".join(lines[i : i + 40])))[:120] for i in range(8)])
    with torch.inference_mode():
        torch.testing.assert_close(their_model(ids).logits, model.logits(model(ids)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("use_cache", "count"), [(True, 200), (False, 50)])
def test_batched_greedy_answers_with_left_padding(
    ours: tuple[GLM, Tokenizer],
    their_model: Any,
    their_tokenizer: Any,
    questions: list[Example],
    answers: list[Generation],
    use_cache: bool,
    count: int,
) -> None:
    prompts = prompts_of(ours[1], questions[:count])
    padded = their_tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    assert padded["attention_mask"].sum() < padded["attention_mask"].numel()  # of different length
    made = their_model.generate(**padded, max_new_tokens=ROOM, use_cache=use_cache)  # do_sample: as the folder says
    for row, answer in zip(made[:, padded["input_ids"].shape[1] :].tolist(), answers, strict=False):
        ends = [i for i, id in enumerate(row) if id in ours[1].stop_ids]
        assert row[: ends[0] if ends else None] == answer.ids


def test_one_by_one_the_answers_are_ours(
    ours: tuple[GLM, Tokenizer], their_model: Any, questions: list[Example], answers: list[Generation]
) -> None:
    for prompt, answer in zip(prompts_of(ours[1], questions[:40]), answers, strict=False):
        made = their_model.generate(torch.tensor([prompt]), max_new_tokens=ROOM)[0, len(prompt) :].tolist()
        if answer.finish_reason == "stop":
            assert made.pop() in ours[1].stop_ids  # generation ends there by the folder's own configuration
        assert made == answer.ids


def test_the_pipeline_answers_messages(
    taught: Path, ours: tuple[GLM, Tokenizer], questions: list[Example], answers: list[Generation]
) -> None:
    pipe = transformers.pipeline("text-generation", model=str(taught))
    for example, answer in zip(questions[:5], answers, strict=False):
        made = pipe(messages_of(example), max_new_tokens=ROOM)[0]["generated_text"]
        assert made[-1] == {"role": "assistant", "content": ours[1].decode(answer.ids)}
