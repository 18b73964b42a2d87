"""Conversations: what is asked of the model, what is dropped when it grows too long, what the terminal shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from miniglm.chat import ChatSession, answer_questions, continue_text, terminal_chat
from miniglm.config import ModelConfig
from miniglm.conversation import fit_prompt, messages_of
from miniglm.generation import Engine
from miniglm.model import GLM
from miniglm.qa.formats import Example, Turn
from miniglm.sampling import SamplingSettings
from miniglm.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def parts() -> tuple[GLM, Tokenizer]:
    tokenizer = train_tokenizer(["滚滚长江东逝水，浪花淘尽英雄。"] * 20, vocab_size=None, corpus_characters=300)
    model = GLM(ModelConfig(tokenizer.vocab_size, 32, 48, 1, 2, 1, 16, 128)).initialize(1).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as initialised, layers do nothing and an answer would hang on the last token only
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, tokenizer


def test_questions_are_asked_as_they_were_trained(parts: tuple[GLM, Tokenizer]) -> None:
    example = Example((Turn("长江在哪", "东"), Turn("英雄呢?", "")), system="你是老人")
    contents = [m["content"] for m in messages_of(example)]
    assert contents == ["你是老人", "长江在哪？", "东", "英雄呢？"]


def test_the_oldest_turns_go_first_and_a_long_question_keeps_its_end(parts: tuple[GLM, Tokenizer]) -> None:
    _, tokenizer = parts
    messages = [
        {"role": "user", "content": "长江" * 5},
        {"role": "assistant", "content": "英雄" * 5},
        {"role": "user", "content": "浪花？"},
    ]
    assert fit_prompt(tokenizer, messages, 1000, 100) == tokenizer.encode_chat(messages)
    assert fit_prompt(tokenizer, messages, 40, 10) == tokenizer.encode_chat(messages[2:])
    cut = fit_prompt(tokenizer, [{"role": "user", "content": "水" * 500 + "英雄？"}], 60, 20)
    assert len(cut) == 40 and cut[:3] == tokenizer.encode_chat([{"role": "user", "content": ""}])[:3]
    assert tokenizer.decode(cut).strip().endswith("英雄？")


@pytest.mark.parametrize("before", [["user"], ["assistant"], ["system", "user"], ["user", "assistant", "assistant"]])
def test_the_last_question_is_never_dropped(parts: tuple[GLM, Tokenizer], before: list[str]) -> None:
    _, tokenizer = parts
    last = {"role": "user", "content": "浪花？"}
    system = [{"role": "system", "content": "老"}] if before[0] == "system" else []
    older = [{"role": role, "content": "长江" * 60} for role in before if role != "system"]
    assert fit_prompt(tokenizer, [*system, *older, last], 60, 20) == tokenizer.encode_chat([*system, last])


def test_a_single_question_is_encoded_once(parts: tuple[GLM, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, encoded = parts[1], []
    encode = tokenizer.encode

    def counting(text: str) -> list[int]:
        encoded.append(text)
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", counting)
    fit_prompt(tokenizer, [{"role": "user", "content": "浪花？"}], 60, 20)
    assert sum("浪花" in text for text in encoded) == 1


def test_a_conversation_is_answered_like_the_same_example(parts: tuple[GLM, Tokenizer]) -> None:
    model, tokenizer = parts
    example = Example((Turn("长江在哪", "东"), Turn("英雄呢?", "")), system="你是老人")
    said = [
        {"role": "system", "content": "你是老人"},
        {"role": "user", "content": "长江在哪"},
        {"role": "assistant", "content": "东"},
        {"role": "user", "content": "英雄呢?"},
    ]
    settings = SamplingSettings(max_new_tokens=12, temperature=1.0, seed=3)
    alone = Example((Turn("英雄呢", ""),))
    answers = answer_questions(model, tokenizer, [example, said, alone], settings)
    assert answers[0] == answers[1] != answers[2]
    assert said[1]["content"] == "长江在哪"  # the caller's messages stay as they are


def test_an_interrupted_answer_is_remembered_as_far_as_it_came(parts: tuple[GLM, Tokenizer]) -> None:
    model, tokenizer = parts
    session = ChatSession(model, tokenizer, SamplingSettings(max_new_tokens=30, temperature=1.0, seed=5))
    answer = session.reply("长江")
    first = next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert [m["content"] for m in session.messages] == ["长江？", first]


def test_streamed_pieces_are_the_answer(parts: tuple[GLM, Tokenizer]) -> None:
    model, tokenizer = parts
    settings = SamplingSettings(max_new_tokens=30, temperature=1.0, seed=5)
    session = ChatSession(model, tokenizer, settings)
    pieces = list(session.reply("长江"))
    [whole] = answer_questions(model, tokenizer, [Example((Turn("长江", ""),))], settings)
    assert "".join(pieces).strip() == whole
    assert session.messages == [
        {"role": "user", "content": "长江？"},
        {"role": "assistant", "content": "".join(pieces)},
    ]
    session.clear()
    assert session.messages == []


def test_a_continuation_does_not_repeat_the_prompt(parts: tuple[GLM, Tokenizer]) -> None:
    model, tokenizer = parts
    settings = SamplingSettings(max_new_tokens=4)
    texts = continue_text(model, tokenizer, ["滚滚", "浪花淘尽"], settings)
    prompts = [tokenizer.prefix + tokenizer.encode(text) for text in ("滚滚", "浪花淘尽")]
    assert texts == [tokenizer.decode(g.ids) for g in Engine(model).generate(prompts, settings)]


def test_the_terminal(parts: tuple[GLM, Tokenizer]) -> None:
    model, tokenizer = parts
    shown: list[str] = []

    def typed() -> Iterator[str]:
        yield from ("", "长江", "/clear", "英雄", "/exit")

    lines = typed()
    terminal_chat(
        model, tokenizer, SamplingSettings(max_new_tokens=5), read=lambda prompt: next(lines), write=shown.append
    )
    text = "".join(shown)
    assert text.count("答：") == 2 and "已忘掉" in text

    def interrupt(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    shown.clear()
    answers = iter(["长江"])

    def read(prompt: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    terminal_chat(
        model, tokenizer, SamplingSettings(max_new_tokens=20, temperature=1.0, seed=2), read=read, write=interrupt
    )
    assert "（已打断）" in "".join(shown)


@pytest.mark.parametrize("remember", [0, 1])
def test_a_question_brings_as_many_earlier_turns_as_asked(
    parts: tuple[GLM, Tokenizer], remember: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = parts
    session = ChatSession(model, tokenizer, SamplingSettings(max_new_tokens=2), remember=remember)
    prompts: list[list[int]] = []
    stream = session.engine.stream

    def spy(asked: list[list[int]], settings: SamplingSettings) -> Iterator[list[tuple[int, int]]]:
        prompts.extend(asked)
        return stream(asked, settings)

    monkeypatch.setattr(session.engine, "stream", spy)
    for question in ("长江", "英雄", "浪花"):
        list(session.reply(question))
    assert prompts[2] == tokenizer.encode_chat(session.messages[4 - 2 * remember : 5])
