"""Question-answer sets: reading every common format, and finding and preventing leaks between splits.

Knows nothing of tokens, models or scores.
"""

from miniglm.qa.formats import Example, QASet, Rejected, Turn, read_examples, write_jsonl
from miniglm.qa.questions import normalize_question

__all__ = ["Example", "QASet", "Rejected", "Turn", "normalize_question", "read_examples", "write_jsonl"]
