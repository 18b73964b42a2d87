"""The report's page: one HTML file that holds all it shows, to read and to send to others.

Knows nothing of how it looks: report.html beside this file is the page, with its style and its code, and gets one
object of data.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from miniglm.evaluation.summary import SCORES
from miniglm.files import write_whole

_READING = {
    "splits.png": (
        "各组的得分",
        "蓝柱是模型，灰柱是 BM25 基线，细线是 95 % 区间；基线照抄最像的那道训练题的答案，训练题就在它手边，所以在那一组总是满分。",
    ),
    "rouge_l.png": (
        "ROUGE-L 的分布",
        "横轴是答案与参考答案的 ROUGE-L，1 是完全一样，越靠右越好；实线是平均数，点线是中位数。",
    ),
    "perplexity.png": (
        "困惑度的分布",
        "横轴是模型对参考答案的困惑度（对数刻度），1 是毫不意外，越靠左越好；超出横轴的题数写在标题里。",
    ),
    "by_length.png": ("按答案长短", "按参考答案的字数分组，看长答案是不是更难；n 是题数，细线越长越说不准。"),
    "by_chapter.png": ("按章回", "看书的哪些部分学得好，章数多的书十章一组；n 是题数，细线重叠的两组分不出高下。"),
    "losses.png": (
        "两个阶段的损失",
        "灰线是训练损失（左轴），橙线是没参加训练的文字上的比特/字（右轴）；橙线掉头向上，就是学过了头。",
    ),
}
_PLACE = "/*DATA*/"


def _plain(value: Any) -> Any:
    """The value with floats in five digits, which halves the page, and None for what JSON has no number for."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _picture(folder: Path, name: str) -> dict[str, str]:
    title, reading = _READING.get(name, (name, ""))
    data = base64.b64encode((folder / name).read_bytes()).decode("ascii")
    return {"title": title, "reading": reading, "source": f"data:image/png;base64,{data}"}


def write_page(report: Mapping[str, Any], folder: Path, pictures: Sequence[str]) -> Path:
    """Writes `folder`/report.html, which needs no other file and asks nothing of any host.

    Args:
        report: what report.json holds.
        folder: where the pictures lie and the page goes.
        pictures: their file names, in the order in which they are shown.
    """
    shown = {key: value for key, value in report.items() if key != "losses"}
    if own := report["self_perplexity"]:
        shown["self_perplexity"] = {key: value for key, value in own.items() if key != "values"}
    data = {
        "report": shown,
        "scores": [asdict(score) for score in SCORES],
        "pictures": [_picture(folder, name) for name in pictures],
    }
    text = json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Inside of a script element only "<" can end it or open a comment; a model may well have written "</script>".
    for char in "<\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    template = resources.files("miniglm.evaluation").joinpath("report.html").read_text("utf-8")
    path = folder / "report.html"
    # A lone surrogate, which UTF-8 has no form for, becomes the escape that JSON has for it.
    write_whole(path, template.replace(_PLACE, text, 1).encode("utf-8", "backslashreplace"))
    return path
