"""How a question typed by a person is brought into the form that training questions have.

Knows nothing of chat, tokens or models; question-answer sets are read as they are and never pass through here.
"""

from __future__ import annotations

import re

_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_TERMINAL = "？?！!。.…；;：:～~"
_CLOSING = "”’」』》〉）)】]\"'"
_DANGLING = "，,、"


def normalize_question(text: str) -> str:
    """Ends a question the way a reader would: a missing mark is added, an ASCII one becomes 「？」.

    Text that already ends a sentence (「请介绍曹操。」, also inside quotation marks) gets no mark. Text without a
    Chinese character keeps and gets the ASCII mark. Blank text becomes "". Applying it twice changes nothing.
    """
    text = text.strip()
    chinese = _CHINESE.search(text) is not None
    if chinese:
        text = text.replace("?", "？")
    if not text or text.rstrip(_CLOSING).endswith(tuple(_TERMINAL)):
        return text
    end = len(text)
    while end and (text[end - 1] in _DANGLING or text[end - 1].isspace()):
        end -= 1
    text = text[:end]
    if not text or text.rstrip(_CLOSING).endswith(tuple(_TERMINAL)):
        return text
    return text + ("？" if chinese else "?")
