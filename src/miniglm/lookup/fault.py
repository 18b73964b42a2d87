"""The one fault that a user can mend of everything that lies in an index: it cannot be read, so it is made anew."""

from __future__ import annotations

from pathlib import Path

from miniglm.errors import MiniGLMError


def damaged(message: str, path: Path) -> MiniGLMError:
    """What to raise: `message`, where it is, and the mend."""
    return MiniGLMError(message, path=path, fix="运行 miniglm index --out 运行目录 重建；还是不行就先删去其中的 index")
