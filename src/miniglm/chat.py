"""Text in, text out: questions, conversations and continuations on top of the engine, and the chat in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from miniglm.conversation import Message, asked, fit_prompt, messages_of
from miniglm.generation import Engine
from miniglm.lookup.answer import Answerer, with_sources
from miniglm.model import GLM
from miniglm.qa.formats import Example
from miniglm.qa.questions import normalize_question
from miniglm.sampling import SamplingSettings
from miniglm.tokenizer import StreamingDetokenizer, Tokenizer


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
