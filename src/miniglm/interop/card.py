"""The model card: README.md with the Hub's metadata, and ModelScope's configuration.json, from what a run knows of itself.

Nothing here is made up: what a run does not say (a report, a recipe) the card says is not known. Knows nothing of
uploading: that is the user's own command (docs/interop.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from miniglm import __version__
from miniglm.config import ModelConfig, read_config
from miniglm.errors import MiniGLMError
from miniglm.evaluation.summary import SCORES
from miniglm.files import write_whole
from miniglm.locate import find_model
from miniglm.pipeline import read_report
from miniglm.recipe import DEFAULT_BOOK, Recipe, default_qa, load_recipe

PERCENT = ("key_accuracy", "rouge_l")
"""The scores that the Hub's metadata lists, as shares of 1."""


def write_card(path: Path) -> Path:
    """Writes README.md and configuration.json into the model folder of a run, or into a model folder; returns the
    card's path.

    Raises:
        MiniGLMError: there is no model, a README.md of the user's own is there, or the folder cannot be written to.
    """
    folder = find_model(path)
    card = folder / "README.md"
    if card.exists() and MARK not in card.read_text("utf-8", "replace"):
        raise MiniGLMError("已有一个不是 miniglm card 写的 README.md，不会覆盖", path=card, fix="先把它改名或移走")
    config = read_config(folder)
    recipe = load_recipe(path / "recipe.toml") if (path / "recipe.toml").exists() else None
    report = read_report(path) if (path / "report" / "report.json").exists() else None
    facts = {
        "corpus": _read(path / "corpus" / "summary.json"),
        "qa": _read(path / "qa" / "summary.json"),
        "results": _read(path / "results.json"),
    }
    name = path.resolve().name
    write_whole(card, _metadata(name, recipe, report) + _body(config, name, recipe, facts, report))
    about = {"framework": "pytorch", "task": "text-generation", "model": {"type": "glm"}}
    write_whole(folder / "configuration.json", json.dumps(about, indent=2) + "\n")
    return card


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise MiniGLMError(f"读不了，应为 JSON（{error}）", path=path) from None
    return found if isinstance(found, dict) else {}


MARK = "<!-- miniglm card -->"


def _own_material(recipe: Recipe | None) -> bool:
    """Whether the model learnt from nothing but the public-domain novel and the project's own questions."""
    return (
        recipe is not None and recipe.corpus.books == [DEFAULT_BOOK] and set(recipe.qa.train) <= {default_qa()["train"]}
    )


def _metadata(name: str, recipe: Recipe | None, report: Any) -> str:
    """The card's front matter. Values are written as JSON, which is YAML."""
    own = _own_material(recipe)
    entries: dict[str, Any] = {
        "language": ["zh"],
        "license": "apache-2.0" if own else "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["glm", "miniglm", "question-answering"],
        "frameworks": ["pytorch"],  # this and the next are ModelScope's
        "tasks": ["text-generation"],
    }
    results = []
    for part in report["splits"] if report else []:
        metrics = [
            {"type": score, "name": score, "value": round(part["scores"][score]["mean"], 4)}
            for score in PERCENT
            if score in part["scores"]
        ]
        if metrics:
            results.append(
                {
                    "task": {"type": "text-generation", "name": "书的问答"},
                    "dataset": {"type": part["name"], "name": part["title"], "split": part["name"]},
                    "metrics": metrics,
                }
            )
    if results:
        entries["model-index"] = [{"name": name, "results": results}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    return "---\n" + "\n".join(lines) + "\n---\n"


def _body(config: ModelConfig, name: str, recipe: Recipe | None, facts: dict[str, Any], report: Any) -> str:
    size = (
        f"{config.num_hidden_layers} 层，宽 {config.hidden_size}，{config.num_attention_heads} 个注意力头"
        f"（键值 {config.num_key_value_heads} 个），词表 {config.vocab_size:,}，上下文 {config.max_position_embeddings} 个 token"
    )
    parts = [
        f"\n{MARK}\n# {name}\n",
        f"用 [miniGLM](https://pypi.org/project/miniglm-chat/) {__version__} 训练的 GLM-4 式小模型"
        f"（`GlmForCausalLM`，{config.num_parameters / 1e6:.1f} 百万参数）：{size}。\n",
        _usage(),
        "## 数据\n",
        _data(recipe, facts),
        "## 成绩\n",
        _scores(report),
        "## 局限\n",
        _limits(config, report),
        "## 许可\n",
        "小说《三国演义》已在公有领域；问答集是 miniGLM 项目的，Apache-2.0。\n"
        if _own_material(recipe)
        else "训练用的书和问答是使用者自己的；发布之前，请按它们的许可把上面的 `license: other` 改成对的。\n",
    ]
    if recipe is not None:
        parts += [
            "## 配方\n",
            f"`miniglm demo --recipe 这段.toml` 可以重做：\n\n```toml\n{_public(recipe).strip()}\n```\n",
        ]
    return "\n".join(parts)


def _public(recipe: Recipe) -> str:
    """The recipe without the folders of the machine it ran on: of a path, the file's name."""
    bare = recipe.model_dump()
    text = recipe.to_toml()
    paths = [*bare["corpus"]["books"], *(p for files in bare["qa"].values() if isinstance(files, list) for p in files)]
    paths.append(bare["tokenizer"]["kind"])
    for path in paths:
        if Path(path).is_absolute():
            text = text.replace(json.dumps(path, ensure_ascii=False), json.dumps(Path(path).name, ensure_ascii=False))
    return text


def _usage() -> str:
    return (
        "```python\n"
        "from transformers import pipeline\n\n"
        'chat = pipeline("text-generation", model="这个目录或它在 Hub 上的名字")\n'
        'print(chat([{"role": "user", "content": "关羽字什么？"}], max_new_tokens=64)[0]["generated_text"][-1]["content"])\n'
        "```\n\n"
        "对话模板和停止符都在目录里；默认每步取最可能的词（`do_sample: false`）。\n"
    )


def _data(recipe: Recipe | None, facts: dict[str, Any]) -> str:
    lines = []
    for book in facts["corpus"].get("books", []):
        lines.append(f"- 书：《{book['title']}》，{book['characters']:,} 字")
    for file, found in facts["qa"].items():
        if "examples" not in found:  # the file's own checksums
            continue
        lines.append(f"- 问答：`{Path(file).name}`，{found['examples']:,} 条")
    results = facts["results"]
    minutes = {name: results.get("seconds", {}).get(name) for name in ("pretrain", "finetune")}
    told = [
        f"{title} {minutes[name] / 60:.1f} 分钟"
        for name, title in (("pretrain", "预训练"), ("finetune", "微调"))
        if minutes[name]
    ]
    if told:
        lines.append(f"- 训练时间：{'，'.join(told)}")
    if recipe is not None and not facts["qa"]:
        lines.append("- 没有问答：这个模型只会续写")
    return "\n".join(lines or ["没有记录：这个目录不在运行目录里。"]) + "\n"


def _scores(report: Any) -> str:
    if not report:
        return "还没有评测（`miniglm evaluate`）。\n"
    lines = [
        f"`miniglm evaluate`（{report['made'][:10]}）；括号里是 95% 置信区间（自助法）。"
        "基线不用模型：照搬 BM25 找到的最像的训练题的答案。\n",
        "| 部分 | 题数 | 分数 | 模型 | 基线 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for part in report["splits"]:
        for score in SCORES:
            if score.name in part["scores"] and score.name in ("key_accuracy", "rouge_l", "bits_per_character"):
                base = (part["baseline"] or {}).get(score.name)
                shown = [_interval(found, score.name) if found else "–" for found in (part["scores"][score.name], base)]
                lines.append(
                    f"| {part['title']}：{part['about']} | {part['questions']:,} | {score.title} | {' | '.join(shown)} |"
                )
    if report["text"] is not None:
        bits = report["text"]["bits_per_character"]
        lines.append(
            f"| {report['text']['source']} | – | 比特/字，越低越好 | {_interval(bits, 'bits_per_character')} | – |"
        )
    return "\n".join(lines) + "\n"


def _interval(found: dict[str, float], score: str) -> str:
    factor, digits, sign = (100, 1, "%") if score in PERCENT else (1, 2, "")
    mean, low, high = (f"{found[key] * factor:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean}{sign}（{low}–{high}）"


def _limits(config: ModelConfig, report: Any) -> str:
    lines = [
        "- 只知道训练它的书和问答，别的都不知道；答错时口气一样肯定。",
        f"- 上下文 {config.max_position_embeddings} 个 token；除非训练用了多轮对话，每个问题都是单独回答的。",
        "- 没有做过任何安全训练，不宜直接给公众用。",
    ]
    for part in report["splits"] if report else []:
        found, base = part["scores"].get("key_accuracy"), (part["baseline"] or {}).get("key_accuracy")
        if part["name"] != "train" and found and base and found["mean"] < base["mean"]:
            lines.append(f"- 在{part['title']}上不如直接照搬最像的训练题的答案（见上表）。")
    return "\n".join(lines) + "\n"
