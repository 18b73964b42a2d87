"""Answers from the book for the page and the API: what is asked is looked up in a run's index, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from miniglm.conversation import Message
from miniglm.lookup import Answer, Answerer
from miniglm.qa.questions import normalize_question


def last_question(messages: Sequence[Message]) -> str:
    """The last of a conversation's questions, "" where it has none."""
    asked = (m["content"] for m in reversed(messages) if m["role"] == "user")
    return normalize_question(next(asked, ""))


class BookService:
    """Answers from the book (lookup.Answerer), each question by itself."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer

    async def find(self, messages: Sequence[Message]) -> Answer:
        """The answer to the conversation's last question."""
        return await asyncio.to_thread(self.answerer.answer, last_question(messages))

    def around(self, book: str, paragraph: int) -> tuple[str, list[tuple[int, str]]]:
        """The chapter's heading, and the paragraph with those next to it: (number, text) each.

        Raises:
            LookupError: there is no such paragraph.
        """
        return self.answerer.library.around(book, paragraph)
