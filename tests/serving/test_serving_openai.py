"""The official client against a real server: what it parses, and which of its exceptions it raises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from served import MODEL, Running, Start

from miniglm.chat import answer_questions
from miniglm.generation import Engine
from miniglm.lookup import NOT_FOUND
from miniglm.model import GLM
from miniglm.sampling import SamplingSettings
from miniglm.serving.book import BookService
from miniglm.serving.settings import Limits
from miniglm.tokenizer import Tokenizer

ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": "长江在哪"}]


def client_of(running: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


def expected(parts: tuple[GLM, Tokenizer], tokens: int, **settings: Any) -> str:
    """What `miniglm ask` says."""
    model, tokenizer = parts
    chosen = SamplingSettings(max_new_tokens=tokens, stop_ids=tokenizer.stop_ids, **settings)
    return answer_questions(model, tokenizer, [[{"role": "user", "content": "长江在哪"}]], chosen)[0]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "miniglm"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 7}])
def test_a_chat_answers_as_the_command_line_does(
    client: openai.OpenAI, parts: tuple[GLM, Tokenizer], settings: dict[str, Any]
) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=24, **settings)
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content is not None
    assert choice.message.content.strip() == expected(parts, 24, **settings)
    assert answer.usage is not None and answer.usage.prompt_tokens > 0
    made = answer.usage.completion_tokens
    assert choice.finish_reason == ("length" if made == 24 else "stop")
    assert answer.usage.total_tokens == made + answer.usage.prompt_tokens


def test_a_streamed_chat_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=ASKED, max_completion_tokens=40)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=ASKED,
            max_completion_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *body, last = chunks
    assert body[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in body]
    assert "".join(pieces) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in body if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in body)
    assert last.choices == [] and last.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_have_seeds_that_follow_one_another(client: openai.OpenAI) -> None:
    def answers(seed: int, n: int) -> list[str | None]:
        made = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=12, temperature=1, seed=seed, n=n)
        assert [choice.index for choice in made.choices] == list(range(n))
        return [choice.message.content for choice in made.choices]

    three = answers(5, 3)
    assert three == answers(5, 1) + answers(6, 1) + answers(7, 1)
    assert len(set(three)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=12, temperature=1, seed=5, n=3, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == three


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=6, logprobs=True, top_logprobs=3)
    [choice] = made.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 6
    spelled = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert spelled.decode("utf-8", "replace") == choice.message.content
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        # greedy: what is taken is what was most probable
        assert token.top_logprobs[0].token == token.token and token.top_logprobs[0].logprob == token.logprob <= 0
    streamed = []
    for chunk in client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=6, logprobs=True, top_logprobs=3, stream=True
    ):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == choice.logprobs.content


def test_completions(client: openai.OpenAI, parts: tuple[GLM, Tokenizer]) -> None:
    model, tokenizer = parts
    ids = tokenizer.prefix + tokenizer.encode("滚滚")
    settings = SamplingSettings(max_new_tokens=16, stop_ids=tokenizer.stop_ids)
    [greedy] = Engine(model).generate([ids], settings)
    for prompt in ("滚滚", ids):
        made = client.completions.create(model=MODEL, prompt=prompt, max_tokens=16, temperature=0, logprobs=2)
        assert made.choices[0].text == tokenizer.decode(greedy.ids)
    found = made.choices[0].logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert len(found.tokens) == len(found.token_logprobs or []) == len(found.top_logprobs or []) == 16
    assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)
    several = client.completions.create(model=MODEL, prompt=["滚滚", "英雄"], max_tokens=8, temperature=0, n=2)
    texts = [choice.text for choice in several.choices]
    assert texts[0] == texts[1] and texts[2] == texts[3] and texts[0] != texts[2]
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model=MODEL, prompt="滚滚", max_tokens=16, temperature=0, stream=True)
    )
    assert text == tokenizer.decode(greedy.ids)


def test_a_stop_text_ends_the_answer_wherever_tokens_end(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=30).choices[0].message.content
    assert whole is not None
    for begin in range(1, len(whole) - 3):
        stop = whole[begin : begin + 3]
        made = client.chat.completions.create(
            model=MODEL, messages=ASKED, max_tokens=30, stop=[stop, "没有的"], logprobs=True
        )
        assert made.choices[0].message.content == whole[: whole.index(stop)]
        assert made.choices[0].finish_reason == "stop"
    streamed = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=30, stop=stop, stream=True)
    )
    assert streamed == whole[: whole.index(stop)]


def test_refusals_are_the_clients_own_exceptions(client: openai.OpenAI, start: Start) -> None:
    def ask(asker: openai.OpenAI, **more: Any) -> Any:
        given: dict[str, Any] = {"model": MODEL, "messages": ASKED, "max_tokens": 2} | more
        return asker.chat.completions.create(**given)

    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="gpt-4o")
    assert missing.value.param == "model" and missing.value.code == "model_not_found"
    for name, value in {
        "temperature": -1,
        "top_p": 0,
        "max_tokens": 0,
        "n": 99,
        "stop": ["a"] * 5,
        "seed": 2**70,
        "top_logprobs": 3,
        "messages": [],
    }.items():
        with pytest.raises(openai.BadRequestError) as bad:
            ask(client, **{name: value})
        assert bad.value.param == name and name in str(bad.value)
    with pytest.raises(openai.UnprocessableEntityError) as cannot:
        ask(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert cannot.value.param == "tools"
    with start(Limits(slots=1, queue=0, max_tokens=10**6), api_key="secret-key") as small:
        with client_of(small, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
            ask(stranger)
        with client_of(small, "secret-key") as known:
            stream = ask(known, max_tokens=10**6, stream=True)
            with pytest.raises(openai.RateLimitError) as busy:
                ask(known)
            assert int(busy.value.response.headers["retry-after"]) >= 1 and "queue" in str(busy.value)
            cast(Any, stream).close()


def test_with_an_index_answers_have_citations(start: Start, book: BookService, parts: tuple[GLM, Tokenizer]) -> None:
    asked: list[ChatCompletionMessageParam] = [{"role": "user", "content": "古庙里住着谁"}]
    with start(book=book) as running, client_of(running) as client:

        def ask(**more: Any) -> Any:
            given: dict[str, Any] = {"model": MODEL, "messages": asked, "max_tokens": 24} | more
            return client.chat.completions.create(**given)

        whole = ask()
        assert whole.choices[0].message.content == "住着老僧慧远。" and whole.choices[0].finish_reason == "stop"
        assert whole.usage.completion_tokens > 0 and whole.model_extra["refused"] is False
        first = whole.model_extra["citations"][0]
        assert set(first) == {"book", "chapter", "chapter_title", "paragraph", "start", "text", "quote", "score"}
        assert (first["book"], first["chapter"], first["paragraph"]) == ("山中记", 1, 2)
        assert "慧远" in first["text"][slice(*first["quote"])]
        *before, last = ask(stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in before) == "住着老僧慧远。"
        assert all("citations" not in chunk.model_extra for chunk in before)
        assert last.choices[0].finish_reason == "stop"
        assert last.model_extra["citations"] == whole.model_extra["citations"]
        other = ask(messages=[{"role": "user", "content": "how much is 2+2 in PyTorch?"}])
        assert other.choices[0].message.content == NOT_FOUND and other.model_extra["refused"] is True
        # The model's own answer has none of that, and what only it can do needs it.
        own = ask(messages=ASKED, extra_body={"look_up": False})
        assert own.choices[0].message.content.strip() == expected(parts, 24) and "citations" not in own.model_extra
        for more in ({"logprobs": True}, {"n": 2}, {"stop": "。"}):
            with pytest.raises(openai.BadRequestError, match="look_up: false") as bad:
                ask(**more)
            assert bad.value.param == next(iter(more))
            assert ask(**more, extra_body={"look_up": False}).choices


def test_without_an_index_nothing_is_looked_up(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="miniglm index") as bad:
        client.chat.completions.create(model=MODEL, messages=ASKED, extra_body={"look_up": True})
    assert bad.value.param == "look_up"
