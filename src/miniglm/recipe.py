"""A recipe describes a run: one TOML file, read into one typed, validated object.

Everything has a default, a flag overrides the file, and a run folder keeps the resolved recipe. What is None here is
derived from the minutes, the machine and the corpus when the run is planned; what is given wins over that.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from miniglm.errors import MiniGLMError

DEFAULT_BOOK = DEFAULT_QA = "sanguo"
UNLIMITED = "none"
"""How a recipe writes `run.minutes = None`, for which TOML has no value."""

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


def shipped(*parts: str) -> Path:
    """A file or folder that comes with the program: beside the sources in a clone, else inside the installed package.

    Raises:
        MiniGLMError: it is in neither place.
    """
    package = Path(__file__).resolve().parent
    for root in (package.parents[1], package):
        if (root / "pyproject.toml").exists() or root == package:
            found = root.joinpath(*parts)
            if found.exists():
                return found
    raise MiniGLMError("安装不完整，缺少随程序提供的文件", path=package.joinpath(*parts), fix="请重新安装 miniglm-chat")


def default_qa() -> dict[str, str]:
    """The project's own question-answer set about 《三国演义》: the file of each part."""
    files = {"train": "train.jsonl", "validation": "val.jsonl", "unseen": "unseen.jsonl", "outside": "outside.jsonl"}
    return {part: str(shipped("data", "sanguo", file)) for part, file in files.items()}


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no silent conversions, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunRecipe(Section):
    """`minutes` covers both stages; None leaves the end to the stages' own settings."""

    minutes: Positive | None = 10.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    @field_validator("minutes", mode="before")
    @classmethod
    def _unlimited(cls, value: Any) -> Any:
        return None if value == UNLIMITED else value


class CorpusRecipe(Section):
    """`books`: files, folders, URLs or names of the catalogue. Every `validation_every`-th paragraph is validation.

    `texts`: more text to pretrain on, of any size, see corpus/large.py; it is not measured on, and looked up only with
    `look_up_texts`: text to learn the language from is no source to cite."""

    books: Annotated[list[Text], Field(min_length=1)] = [DEFAULT_BOOK]
    texts: list[Text] = Field(default_factory=list)
    look_up_texts: bool = False
    encoding: Text | None = None
    simplify: bool | None = None
    validation_every: Annotated[int, Field(ge=2)] = 10

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                codecs.lookup(value)
            except LookupError:
                raise ValueError("应为编码名，例如 utf-8、gb18030、big5、utf-16") from None
        return value


class QARecipe(Section):
    """Paths of question-answer files; empty lists for a run without questions.

    `train` is trained on, `validation` chooses the best weights, `unseen` (facts that only the book tells) is touched
    by evaluation alone. `outside` are questions that the books do not answer: those with `"part": "test"` only measure,
    the others set the threshold of refusal. Our own `unseen` and `outside` go with our own `train` and nothing else.
    """

    train: list[Text] = Field(default_factory=lambda: [default_qa()["train"]])
    validation: list[Text] = Field(default_factory=lambda: [default_qa()["validation"]])
    unseen: list[Text] = Field(
        default_factory=lambda data: [default_qa()["unseen"]] if data.get("train") == [default_qa()["train"]] else []
    )
    outside: list[Text] = Field(
        default_factory=lambda data: [default_qa()["outside"]] if data.get("train") == [default_qa()["train"]] else []
    )
    allow_bad_lines: bool = False


class TokenizerRecipe(Section):
    """`kind`: "bpe" (trained on the corpus), "gpt2", or the path of a tokenizer.json or of a folder with one."""

    kind: Text = "bpe"
    vocab_size: Annotated[int, Field(ge=300, le=2**20)] | None = None

    @model_validator(mode="after")
    def _own_size(self) -> Self:
        if self.kind != "bpe" and self.vocab_size is not None:
            raise ValueError(f'kind = "{self.kind}" 的词表大小已定，请去掉 vocab_size')
        return self


class ModelRecipe(Section):
    """Sizes under the names of model.ModelConfig; `context` is its `max_position_embeddings`, in tokens."""

    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    rms_norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    context: Annotated[int, Field(ge=16)] | None = None
    dropout: BelowOne | None = None

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads is not None and groups is not None and heads % groups:
            raise ValueError(f"num_attention_heads = {heads} 应为 num_key_value_heads = {groups} 的倍数")
        return self

    def sizes(self) -> dict[str, Any]:
        """What is given, as arguments of `ModelConfig` (dropout is no part of that)."""
        given = self.model_dump(exclude_none=True, exclude={"dropout"})
        if "context" in given:
            given["max_position_embeddings"] = given.pop("context")
        return given


class StageRecipe(Section):
    """How one stage trains; see training.Stage. `warmup` and `decay` are shares of the stage, `final_lr` one of the
    peak rate. Batches are of `rows` rows, computed `micro_rows` at a time. `steps` or `minutes` ends the stage."""

    steps: Count | None = None
    minutes: Positive | None = None
    rows: Count | None = None
    micro_rows: Count | None = None
    optimizer: Literal["muon", "adamw"] = "muon"
    matrix_lr: Positive | None = None
    adam_lr: Positive | None = None
    weight_decay: NotNegative | None = None
    beta1: BelowOne | None = None
    beta2: BelowOne | None = None
    warmup: Share | None = None
    decay: Share | None = None
    final_lr: Share | None = None
    clip: Positive | None = None
    evaluate_every: Count | None = None
    patience: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps is not None and self.minutes is not None:
            raise ValueError("steps 与 minutes 只能给一个")
        if self.rows is not None and self.micro_rows is not None and self.micro_rows > self.rows:
            raise ValueError(f"micro_rows = {self.micro_rows} 应不大于 rows = {self.rows}")
        return self


class FinetuneRecipe(StageRecipe):
    """`text_share`: share of each batch's rows that are text of the books, so that the model does not forget them."""

    text_share: BelowOne | None = None


class Recipe(Section):
    """Everything that decides what a run does."""

    run: RunRecipe = Field(default_factory=RunRecipe)
    corpus: CorpusRecipe = Field(default_factory=CorpusRecipe)
    qa: QARecipe = Field(default_factory=QARecipe)
    tokenizer: TokenizerRecipe = Field(default_factory=TokenizerRecipe)
    model: ModelRecipe = Field(default_factory=ModelRecipe)
    pretrain: StageRecipe = Field(default_factory=StageRecipe)
    finetune: FinetuneRecipe = Field(default_factory=FinetuneRecipe)

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        stages: dict[str, StageRecipe] = {"pretrain": self.pretrain}
        if self.qa.train:
            stages["finetune"] = self.finetune
        for name, stage in stages.items():
            if self.run.minutes is None and stage.steps is None and stage.minutes is None:
                raise ValueError(f'run.minutes = "{UNLIMITED}" 时，应给出 {name}.steps 或 {name}.minutes')
        return self

    def to_toml(self) -> str:
        """The resolved recipe as a file that `load_recipe` reads back as an equal object."""
        lines = []
        for name, section in self:
            lines.append(f"[{name}]")
            for key, value in section:
                if name == "qa" and isinstance(value, list):
                    value = [_own_set_by_name(key, path) for path in value]
                if (name, key) == ("run", "minutes") and value is None:
                    value = UNLIMITED
                if value is not None:
                    lines.append(f"{key} = {_toml(value)}")
            lines.append("")
        return "\n".join(lines)


def find_recipe(spec: str | Path) -> Path:
    """A recipe file by its path, or by the name of one that comes with the program (`"tiny"`).

    Raises:
        MiniGLMError: there is no such file.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    folder = shipped("recipes")
    name = str(spec)
    if re.fullmatch(r"[\w-]+", name) and (folder / f"{name}.toml").is_file():
        return folder / f"{name}.toml"
    known = "、".join(sorted(file.stem for file in folder.glob("*.toml")))
    raise MiniGLMError("找不到配方文件", path=spec, fix=f"应为 TOML 文件的路径，或自带配方的名字：{known}")


def load_recipe(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe, or the defaults for None, and lays the overrides over it.

    Relative paths of books, questions and tokenizer are looked for beside the recipe, then in the current folder
    (those of overrides only there), and made absolute if found; what looks like no path is left as it is. A file that
    names other books than the default and no questions gets none, not those about 《三国演义》.

    Args:
        overrides: value by dotted key, `{"run.minutes": 5.0}`; None as value means not given.

    Raises:
        MiniGLMError: names the file (or the command line), the key, what was found and what was expected.
    """
    data: dict[str, Any] = {}
    if path is not None:
        path = find_recipe(path)
        data = _read_toml(path)
        if isinstance(data.get("tokenizer"), str):  # tokenizer = "gpt2" for short
            data["tokenizer"] = {"kind": data["tokenizer"]}
        corpus = data.get("corpus")
        if isinstance(corpus, dict) and corpus.get("books", [DEFAULT_BOOK]) != [DEFAULT_BOOK]:
            data.setdefault("qa", {})
            if isinstance(data["qa"], dict) and "train" not in data["qa"]:
                data["qa"] = {"train": [], "validation": []} | data["qa"]
        _anchor(data, [path.resolve().parent, Path.cwd()])
    given: dict[str, dict[str, Any]] = {}
    for key, value in (overrides or {}).items():
        section, _, name = key.partition(".")
        if value is not None:
            given.setdefault(section, {})[name] = value
    _anchor(given, [Path.cwd()])
    for section, values in given.items():
        below = data.setdefault(section, {})
        if isinstance(below, dict):
            below |= values
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        flags = {f"{section}.{name}" for section, values in given.items() for name in values}
        by_flag = all(".".join(str(part) for part in fault["loc"][:2]) in flags for fault in faults)
        place = "命令行" if by_flag or path is None else path
        raise MiniGLMError("；".join(map(_describe, faults)), path=place) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise MiniGLMError(f"无法读取配方（{error.strerror}）", path=path) from None
    except UnicodeDecodeError as error:
        raise MiniGLMError(f"第 {error.start} 字节处不是 UTF-8", path=path, fix="请把配方存为 UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise MiniGLMError(f"不是合法的 TOML：{error}", path=path, line=int(line[1]) if line else None) from None


def _anchor(data: dict[str, Any], folders: Iterable[Path]) -> None:
    """Makes the paths in a raw recipe absolute, in place; `"sanguo"` among questions is the project's own set."""
    folders = list(folders)

    def absolute(value: Any) -> Any:
        if not isinstance(value, str) or "://" in value or not re.search(r"[./\\]", value):
            return value
        path = Path(value).expanduser()
        found = next((folder / path for folder in folders if (folder / path).exists()), path)
        return str(found.resolve()) if found.exists() else value

    for section, key in (
        ("corpus", "books"),
        ("corpus", "texts"),
        *(("qa", part) for part in default_qa()),
        ("tokenizer", "kind"),
    ):
        table = data.get(section)
        if not isinstance(table, dict) or key not in table:
            continue
        value = table[key]
        if isinstance(value, list):
            own = {DEFAULT_QA: default_qa()[key]} if section == "qa" else {}
            table[key] = [own.get(v, absolute(v)) if isinstance(v, str) else v for v in value]
        else:
            table[key] = absolute(value)


def _own_set_by_name(key: str, path: str) -> str:
    """So that a saved recipe does not name the place where the program is installed."""
    return DEFAULT_QA if path == default_qa().get(key) else path


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # JSON's escapes are a subset of a basic string's, but DEL must be escaped too
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


_EXPECTED = {
    "int_type": "整数",
    "float_type": "数",
    "string_type": "带引号的字符串",
    "string_too_short": "非空的字符串",
    "bool_type": "true 或 false",
    "list_type": "列表 [...]",
    "model_type": "一节（其中有若干设置）",
    "too_short": "至少 {min_length} 项",
    "greater_than": "大于 {gt} 的数",
    "greater_than_equal": "不小于 {ge} 的数",
    "less_than": "小于 {lt} 的数",
    "less_than_equal": "不大于 {le} 的数",
    "finite_number": "有限的数",
    "literal_error": "{expected} 之一",
}
"""What was expected, by pydantic's error type; the names in braces are from its context."""


def _describe(fault: ErrorDetails) -> str:
    """One fault in one clause: key, found, expected."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        model: Any = Recipe if len(fault["loc"]) == 1 else Recipe.model_fields[str(fault["loc"][0])].annotation
        names = list(model.model_fields)
        near = difflib.get_close_matches(str(fault["loc"][-1]), names, n=1)
        return f"没有设置 {key}，" + (f"是否想写 {near[0]}" if near else f"应为 {'、'.join(names)} 之一")
    if kind == "value_error" and isinstance(fault["input"], dict):  # a check across keys names them itself
        return f"[{key}] {context['error']}" if key else str(context["error"])
    value = fault["input"]
    found = (
        _toml(value)
        if isinstance(value, (str, int, float, list))
        else "一节"
        if isinstance(value, dict)
        else repr(value)
    )
    found = found if len(found) <= 60 else found[:59] + "…"
    if kind == "value_error":
        return f"{key} = {found}，{context['error']}"
    expected = _EXPECTED.get(kind, fault["msg"]).format(**context).replace(" or ", ", ").replace(", ", "、")
    return f"{key} = {found}，应为{expected}"
