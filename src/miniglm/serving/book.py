"""The book as a `Service`: what is asked is looked up in a run's index, and the answer comes with its source."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from miniglm.chat import Message, with_sources
from miniglm.lookup import Answer, Answerer
from miniglm.qa.questions import normalize_question
from miniglm.serving.service import Options, Piece, ServiceError


def last_question(messages: Sequence[Message]) -> str:
    """The last of a conversation's questions, "" where it has none."""
    asked = (m["content"] for m in reversed(messages) if m["role"] == "user")
    return normalize_question(next(asked, ""))


class BookService:
    """Answers from the book (lookup.Answerer), each question by itself; the options have no say in it.

    Args:
        model_id: under which name answers are rated.
    """

    def __init__(self, answerer: Answerer, model_id: str) -> None:
        self.answerer, self.model_id = answerer, model_id

    async def find(self, messages: Sequence[Message]) -> Answer:
        """The answer to the conversation's last question."""
        return await asyncio.to_thread(self.answerer.answer, last_question(messages))

    def around(self, book: str, paragraph: int) -> tuple[str, list[tuple[int, str]]]:
        """The chapter's heading, and the paragraph with those next to it: (number, text) each.

        Raises:
            LookupError: there is no such paragraph.
        """
        return self.answerer.library.around(book, paragraph)

    async def chat(self, messages: Sequence[Message], options: Options) -> AsyncIterator[Piece]:
        """The answer to the last question with its sources, in one piece: it is there at once."""
        yield Piece(with_sources(await self.find(messages)), 1)

    async def complete(self, prompt: str, options: Options) -> AsyncIterator[Piece]:
        """Nothing is made up here."""
        raise ServiceError("查书不能续写", status=400)
        yield
