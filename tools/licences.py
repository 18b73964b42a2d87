"""Writes docs/licences.md: the licence of every package in requirements.lock, as its own metadata says.

    .venv/bin/python tools/licences.py

Run it in an environment with all extras (`make lint` makes one) after the lock file has changed; a test compares the two.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK, PAGE = ROOT / "requirements.lock", ROOT / "docs" / "licences.md"
ELSEWHERE = {
    "rouge-chinese": "Apache-2.0",
    "audioop-lts": "PSF-2.0",
    "colorama": "BSD-3-Clause",
    "tzdata": "Apache-2.0",
    "hf-xet": "Apache-2.0",
}
"""Of packages that only some systems or versions of Python install, or whose metadata names a file instead."""
HEAD = """# 依赖的许可证

miniGLM 自己是 Apache-2.0。下面是 `requirements.lock` 里每个包的许可证，由 `tools/licences.py` 从已安装的包自己的元数据写出，
锁文件变了要重新运行（测试会比对）。没有一个包的代码收在本项目里，都由 pip 从包索引安装。GPL、LGPL、MPL 一类有传染性或
部分传染性的，表里用 ⚠ 标出：只是使用它们不影响你自己的代码，把它们打包分发时才要照它们的条款办。

"""


def locked(text: str) -> list[str]:
    """Names of the packages in a lock file, each once."""
    return list(dict.fromkeys(re.findall(r"^([A-Za-z0-9][\w.-]*)==", text, re.M)))


def licence(name: str) -> str:
    """The licence of an installed package: its SPDX expression, its classifiers, or the licence field's first line."""
    try:
        metadata = distribution(name).metadata
    except PackageNotFoundError:
        return ELSEWHERE.get(name, "")
    if expressions := metadata.get_all("License-Expression"):
        return str(expressions[0])
    classifiers = [str(c).split(" :: ") for c in metadata.get_all("Classifier") or () if str(c).startswith("License")]
    named = [parts[-1] for parts in classifiers if len(parts) > 2 or parts[-1] != "OSI Approved"]
    if named:
        return " / ".join(named)
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    field = str((metadata.get_all("License") or [""])[0]).strip()
    return field.splitlines()[0][:60] if field else ""


def page(names: list[str]) -> str:
    """The whole of docs/licences.md.

    Raises:
        SystemExit: a package whose licence is not known.
    """
    found = {name: licence(name) for name in names}
    if unknown := [name for name, text in found.items() if not text]:
        sys.exit(f"no licence known for {', '.join(unknown)}: install them, or look them up for ELSEWHERE")
    marked = {
        name: ("⚠ " if re.search(r"GPL|General Public|MPL|Mozilla|EPL|CDDL", text) else "") + text.replace("|", "/")
        for name, text in found.items()
    }
    lines = ["| 包 | 许可证 |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in marked.items())]
    counts = Counter(found.values()).most_common()
    summary = "；".join(f"{text} {count} 个" for text, count in counts)
    return HEAD + "\n".join(lines) + f"\n\n共 {len(found)} 个包：{summary}。\n"


if __name__ == "__main__":
    PAGE.write_text(page(locked(LOCK.read_text("utf-8"))), "utf-8")
