"""A file of JSON lines that only grows: what is in it survives a kill at any moment. Knows nothing of what is in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from miniglm.errors import MiniGLMError


class Journal:
    """Opens the journal at `path`, made if it is not there, for reading back and for appending.

    A last line that a kill cut off is taken away: what it would have said is done again.

    Attributes:
        records: what was in it when it was opened.

    Raises:
        MiniGLMError: it cannot be opened, or a line in the middle of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise MiniGLMError(f"写不了（{error.strerror}）", path=path, fix="请检查文件夹的写权限") from None
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError
            except ValueError:
                raise MiniGLMError(
                    "这一行坏了，应是一个 JSON 对象", path=self.path, line=number, fix="删掉这一行再运行，它会重做"
                ) from None
            self.records.append(record)
        if whole < len(data):
            self._file.truncate(whole)

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record; on return it is on the disk.

        Raises:
            MiniGLMError: it cannot be written.
        """
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise MiniGLMError(
                f"写不进去（{error.strerror}），前面的都在", path=self.path, fix="请检查磁盘空间"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
