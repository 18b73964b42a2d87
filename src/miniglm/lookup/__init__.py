"""Answers that stand on the book: finds the fact or the passage that answers a question and says where it is.

Two memories, the training questions with their answers and the book's passages; a lexical index and a small encoder
trained in the run; a learnt choice among what they find, and a threshold below which nothing is claimed. Knows
nothing of the decoder, of chat or of the command line. See docs/lookup.md.
"""

from miniglm.lookup.answer import (
    NOT_FOUND,
    Answer,
    Answerer,
    Citation,
    Statement,
    answerer_of,
    has_index,
    is_current,
    with_sources,
)

__all__ = [
    "NOT_FOUND",
    "Answer",
    "Answerer",
    "Citation",
    "Statement",
    "answerer_of",
    "has_index",
    "is_current",
    "with_sources",
]
