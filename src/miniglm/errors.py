"""The one exception that users see, as one line on stderr and a non-zero exit.

Everything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations

from pathlib import Path


class MiniGLMError(Exception):
    """A fault the user can mend. The command line prints it as one line, without a traceback.

    Args:
        what: what was found and what was expected, in Chinese, one line, no full stop needed.
        path: the file or folder concerned, if any; named first in the message.
        line: 1-based line number in `path`, if any.
        fix: how to mend it, if that is not obvious from `what`.
    """

    def __init__(
        self, what: str, *, path: str | Path | None = None, line: int | None = None, fix: str | None = None
    ) -> None:
        self.what, self.path, self.line, self.fix = what, path, line, fix
        place = "" if path is None else f"{path}：" if line is None else f"{path} 第 {line} 行："
        message = f"{place}{what}" + (f"。{fix}" if fix else "")
        super().__init__(" ".join(message.split("\n")))
