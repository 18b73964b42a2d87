"""The book as a `Service`: what is asked is looked up in a run's index, and the answer comes with its source."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from miniglm.chat import Message, with_sources
from miniglm.lookup import Answerer
from miniglm.qa.questions import normalize_question
from miniglm.serving.service import Options, Piece, ServiceError


class BookService:
    """Answers from the book (lookup.Answerer), each question by itself; the options have no say in it.

    Args:
        model_id: under which name answers are rated.
    """

    def __init__(self, answerer: Answerer, model_id: str) -> None:
        self.answerer, self.model_id = answerer, model_id

    async def chat(self, messages: Sequence[Message], options: Options) -> AsyncIterator[Piece]:
        """The answer to the last question with its sources, in one piece: it is there at once."""
        question = normalize_question(messages[-1]["content"])
        yield Piece(with_sources(await asyncio.to_thread(self.answerer.answer, question)), 1)

    async def complete(self, prompt: str, options: Options) -> AsyncIterator[Piece]:
        """Nothing is made up here."""
        raise ServiceError("查书不能续写", status=400)
        yield
