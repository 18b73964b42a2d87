"""Text in, text out: questions, conversations and continuations on top of the engine, and the chat in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from miniglm.generation import Engine, SamplingSettings
from miniglm.lookup.answer import Answerer, with_sources
from miniglm.model import GLM
from miniglm.qa.formats import Example
from miniglm.qa.questions import normalize_question
from miniglm.tokenizer import StreamingDetokenizer, Tokenizer

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
    length, first = 0, len(turns) if len(turns) > 1 else 0
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


def answer_questions(
    model: GLM,
    tokenizer: Tokenizer,
    questions: Sequence[Example | Sequence[Message]],
    settings: SamplingSettings,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One answer to the last question of each example or conversation, many at once."""
    context = model.config.max_position_embeddings
    room = min(settings.max_new_tokens, context // 2)
    conversations = [messages_of(q) if isinstance(q, Example) else asked(q) for q in questions]
    prompts = [fit_prompt(tokenizer, messages, context, room) for messages in conversations]
    made = Engine(model).generate(prompts, settings, batch_size=batch_size, progress=progress)
    return [tokenizer.decode(g.ids).strip() for g in made]


def continue_text(
    model: GLM, tokenizer: Tokenizer, prompts: Sequence[str], settings: SamplingSettings | Sequence[SamplingSettings]
) -> list[str]:
    """What follows each text, without the text itself."""
    encoded = [tokenizer.prefix + tokenizer.encode(prompt) for prompt in prompts]
    return [tokenizer.decode(g.ids) for g in Engine(model).generate(encoded, settings)]


class ChatSession:
    """A conversation.

    Args:
        remember: so many earlier turns are put before a question. 0 asks each question by itself, as single questions
            and answers are trained: a small model that never saw a second turn answers one with nonsense.
    """

    def __init__(self, model: GLM, tokenizer: Tokenizer, settings: SamplingSettings, *, remember: int = 0) -> None:
        self.tokenizer, self.settings, self.remember = tokenizer, settings, remember
        self.engine = Engine(model)
        self.messages: list[Message] = []

    def clear(self) -> None:
        """Forgets all turns."""
        self.messages = []

    def reply(self, question: str) -> Iterator[str]:
        """Streams the answer in pieces that are never a broken character. What was said so far is remembered also
        when the reader stops in the middle."""
        self.messages.append({"role": "user", "content": normalize_question(question)})
        asked = self.messages[-1 - 2 * self.remember :]
        context = self.engine.context
        room = min(self.settings.max_new_tokens, context // 2)
        prompt = fit_prompt(self.tokenizer, asked, context, room)
        detokenizer = StreamingDetokenizer(self.tokenizer)
        said: list[str] = []
        try:
            for step in self.engine.stream([prompt], self.settings):
                if piece := detokenizer.add(step[0][1]):
                    said.append(piece)
                    yield piece
            if piece := detokenizer.finish():
                said.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})


def terminal_chat(
    model: GLM,
    tokenizer: Tokenizer,
    settings: SamplingSettings,
    *,
    remember: int = 0,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> None:
    """Asks and answers until Ctrl-D or /exit. Ctrl-C stops an answer; at the prompt it ends the chat."""
    _converse(ChatSession(model, tokenizer, settings, remember=remember), remember > 0, read, write)


class BookSession:
    """Answers from the book, each question by itself."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer

    def clear(self) -> None:
        """Nothing is remembered."""

    def reply(self, question: str) -> Iterator[str]:
        """The answer with its sources, in one piece."""
        yield with_sources(self.answerer.answer(question))


def terminal_lookup(
    answerer: Answerer,
    *,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> None:
    """As `terminal_chat`, with answers from the book."""
    _converse(BookSession(answerer), False, read, write)


def _converse(
    session: ChatSession | BookSession,
    remembers: bool,
    read: Callable[[str], str],
    write: Callable[[str], None],
) -> None:
    clear = "/clear 忘掉前面的对话，" if remembers else ""  # nothing to forget where each question stands alone
    write(f"问它关于书的问题。{clear}/exit 或 Ctrl-D 结束，Ctrl-C 打断回答。\n")
    while True:
        try:
            question = read("\n问：").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if question in ("/exit", "/quit"):
            return
        if question == "/clear":
            session.clear()
            write("已忘掉前面的对话。\n")
        elif question:
            answer = session.reply(question)
            try:
                write("答：")
                for piece in answer:
                    write(piece)
            except KeyboardInterrupt:
                answer.close()  # type: ignore[attr-defined]
                write("（已打断）")
            write("\n")
