"""Questions and conversations as the tokens that a model reads, and the tokens that it should answer."""

from __future__ import annotations

from collections.abc import Sequence

from miniglm.qa.formats import Example
from miniglm.qa.questions import normalize_question
from miniglm.tokenizer import Tokenizer

Message = dict[str, str]


def messages_of(example: Example) -> list[Message]:
    """An example's conversation up to its last question, in chat form."""
    messages = [{"role": "system", "content": example.system}] if example.system else []
    for turn in example.turns[:-1]:
        messages.append({"role": "user", "content": normalize_question(turn.question)})
        messages.append({"role": "assistant", "content": turn.answer})
    return [*messages, {"role": "user", "content": normalize_question(example.question)}]


def asked(messages: Sequence[Message]) -> list[Message]:
    """A conversation given as messages, its questions in the form that `messages_of` gives them."""
    return [
        {**m, "content": normalize_question(m["content"])} if m.get("role") == "user" else dict(m) for m in messages
    ]


def fit_prompt(tokenizer: Tokenizer, messages: Sequence[Message], context: int, room: int) -> list[int]:
    """The prompt's tokens with `room` left for an answer: the oldest turns go first, each a question with all that
    follows it, and the last message never. The system message goes after them; a question that alone is too long keeps
    its end."""
    system = [m for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    limit = max(context - room, context // 2)
    # A long history costs one encoding of what may fit, not one for every turn that is dropped. Other templates put
    # less around a turn than is counted here, so that three times the context is certainly too much.
    length, first = 0, max(0, len(turns) - 1)  # the last one is not dropped, whatever its length
    while first > 0 and length <= 3 * context:
        first -= 1
        length += 1 + len(tokenizer.encode("\n" + turns[first]["content"]))
    while first > 0 and turns[first]["role"] != "user":  # the turn that will be dropped is dropped whole
        first -= 1
    turns = turns[first:]
    while True:
        ids = tokenizer.encode_chat(system + turns)
        if len(ids) <= limit:
            return ids
        if len(turns) > 1:
            turns = turns[next((i for i, m in enumerate(turns) if i and m["role"] == "user"), len(turns) - 1) :]
        elif system:
            system = []
        else:
            head = tokenizer.encode_chat([{"role": "user", "content": ""}], add_generation_prompt=False)
            return head + ids[len(ids) - (limit - len(head)) :]


def prompt_of(tokenizer: Tokenizer, example: Example, context: int, room: int) -> list[int]:
    """What the model reads before it answers an example's last question, with `room` left for the answer."""
    return fit_prompt(tokenizer, messages_of(example), context, room)


def encode_reference(tokenizer: Tokenizer, example: Example, context: int) -> tuple[list[int], int]:
    """An example's prompt, its reference answer and the token that closes it, and the position where the answer
    begins. At most `context` + 1 tokens: of an answer longer than that the end is cut."""
    answer = [*tokenizer.encode(example.answer), tokenizer.end_of_text]
    prompt = prompt_of(tokenizer, example, context, min(len(answer), context // 2))
    return (prompt + answer)[: context + 1], len(prompt)
