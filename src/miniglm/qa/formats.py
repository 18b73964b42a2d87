"""Reads question-answer sets in the formats people have them in, and writes JSON lines.

`read_examples` turns any of them into `Example`s and says of every line it could not use where it is and why.
The format follows from the fields, never from a flag. It knows nothing of tokens, prompts or scores.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from miniglm.errors import MiniGLMError
from miniglm.files import written_whole

MAX_REJECTED = 0.01
"""Largest share of lines that may be unusable before `read_examples` refuses the file."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer. The answer is "" where a file of questions has none."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation. Its last turn is the one that is evaluated; all its answers are trained on.

    Attributes:
        turns: at least one.
        system: the system prompt, or "".
        keys: what a right last answer must hold: every group is met by at least one of its alternatives.
        id: names the fact; phrasings of one fact share it. "" where the file has none.
        extra: the line's original fields, to be written back with more beside them.
    """

    turns: tuple[Turn, ...]
    system: str = ""
    keys: tuple[tuple[str, ...], ...] = ()
    id: str = ""
    extra: dict[str, object] = field(default_factory=dict, compare=False, repr=False)

    @property
    def question(self) -> str:
        """The last turn's question."""
        return self.turns[-1].question

    @property
    def answer(self) -> str:
        """The last turn's answer."""
        return self.turns[-1].answer


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line that could not be used. `line` is 1-based; `reason` is for the user, in Chinese."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path} 第 {self.line} 行：{self.reason}"


@dataclass(frozen=True, slots=True)
class QASet:
    """What `read_examples` found. `format` is a key of `FORMATS`, "csv" or "text"."""

    examples: list[Example]
    rejected: list[Rejected]
    format: str

    def row(self, example: Example) -> dict[str, object]:
        """An example as the user's own JSON row, or as one of ours where it had none: a table's cells are text."""
        return to_row(example) if self.format == "csv" or not example.extra else dict(example.extra)


class _BadLineError(ValueError):
    """Why one line cannot be used; becomes a `Rejected`."""


_Row = Mapping[str, object]
_Conversation = tuple[str, list[Turn]]  # system prompt, turns


def _kind(value: object) -> str:
    """A JSON type's name in a message to the user."""
    kinds = ((bool, "真假值"), (str, "字符串"), ((int, float), "数字"), (list, "数组"), (dict, "对象"))
    return next((name for types, name in kinds if isinstance(value, types)), "null")


def _is_blank(text: str) -> bool:
    """Whether nothing in it can be seen: white space, control and format characters only."""
    return all(unicodedata.category(char) in ("Cc", "Cf", "Zs", "Zl", "Zp") for char in text)


def _text(row: _Row, name: str, *, required: bool = True) -> str:
    """The field as stripped text; "" for an absent or empty one that is not required."""
    value = row.get(name)
    if value is None:
        if required:
            raise _BadLineError(f"缺少 {name}" if name not in row else f"{name} 是 null")
        return ""
    if not isinstance(value, str):
        raise _BadLineError(f"{name} 应是字符串，却是{_kind(value)}")
    if _is_blank(value):
        if required:
            raise _BadLineError(f"{name} 是空的" if not value.strip() else f"{name} 只有控制字符")
        return ""
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise _BadLineError(f"{name} 含有不成对的代理字符（\\ud800 到 \\udfff），不是合法的文字")
    return value.strip()


def _pair(question: str, answer: str) -> Callable[[_Row, bool], _Conversation]:
    """A reader for rows that hold one question and one answer under these names."""

    def read(row: _Row, need_answer: bool) -> _Conversation:
        turn = Turn(_text(row, question), _text(row, answer, required=need_answer))
        return _text(row, "system", required=False), [turn]

    return read


def _alpaca(row: _Row, need_answer: bool) -> _Conversation:
    question, more = _text(row, "instruction"), _text(row, "input", required=False)
    turns = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise _BadLineError(f"history 应是数组，却是{_kind(history)}")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise _BadLineError('history 的每一项应是 ["问", "答"]')
        old = {"history 的问": pair[0], "history 的答": pair[1]}
        turns.append(Turn(_text(old, "history 的问"), _text(old, "history 的答")))
    turns.append(Turn(f"{question}\n{more}" if more else question, _text(row, "output", required=need_answer)))
    return _text(row, "system", required=False), turns


def _content(message: _Row, name: str, *, required: bool = True) -> str:
    """A message's text, which OpenAI also writes as a list of parts."""
    parts = message.get(name)
    if not isinstance(parts, list):
        return _text(message, name, required=required)
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            found = part.get("type") if isinstance(part, dict) else _kind(part)
            raise _BadLineError(f"{name} 里只能有 text 部分，却有 {found}")
        if not isinstance(part.get("text"), str):
            raise _BadLineError(f"{name} 里 text 部分的 text 应是字符串，却是{_kind(part.get('text'))}")
        texts.append(part["text"])
    return _text({name: "".join(texts)}, name, required=required)


def _dialogue(key: str, role_key: str, text_key: str) -> Callable[[_Row, bool], _Conversation]:
    """A reader for rows whose field `key` lists messages with a role and a text."""
    roles = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "developer": "system"}

    def read(row: _Row, need_answer: bool) -> _Conversation:
        messages = row[key]
        if not isinstance(messages, list) or not messages:
            raise _BadLineError(f"{key} 应是非空的数组，却是{_kind(messages)}")
        system = _text(row, "system", required=False)
        spoken: list[str] = []
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict):
                raise _BadLineError(f"{key} 第 {number} 条应是对象，却是{_kind(message)}")
            name = message.get(role_key)
            role = roles.get(name, name) if isinstance(name, str) else None
            if role == "system" and number == 1:
                system = _content(message, text_key, required=False)
                continue
            expected = "assistant" if len(spoken) % 2 else "user"
            if role != expected:
                raise _BadLineError(f"{key} 第 {number} 条的 {role_key} 是 {name!r}，该轮到 {expected}")
            try:
                spoken.append(_content(message, text_key))
            except _BadLineError as error:
                raise _BadLineError(f"{key} 第 {number} 条的 {error}") from None
        if not spoken:
            raise _BadLineError(f"{key} 里没有问题")
        if len(spoken) % 2:
            if need_answer:
                raise _BadLineError(f"{key} 的最后一条不是回答")
            spoken.append("")
        return system, [Turn(q, a) for q, a in zip(spoken[::2], spoken[1::2], strict=True)]

    return read


@dataclass(frozen=True, slots=True)
class _Format:
    mark: str  # the field that only this format has
    looks: str
    read: Callable[[_Row, bool], _Conversation]


FORMATS: Mapping[str, _Format] = {
    "messages": _Format("messages", "messages", _dialogue("messages", "role", "content")),
    "sharegpt": _Format("conversations", "conversations", _dialogue("conversations", "from", "value")),
    "alpaca": _Format("instruction", "instruction/input/output", _alpaca),
    "miniglm": _Format("question", "question/answer", _pair("question", "answer")),
    "reference": _Format("Question", "Question/Answer", _pair("Question", "Answer")),
    "chinese": _Format("问题", "问题/答案", _pair("问题", "答案")),
}
"""The formats by name. A file's is the one whose marking field its first usable line has."""


def _keys(value: object) -> tuple[tuple[str, ...], ...]:
    """Checks the groups of alternatives that a right answer must hold."""
    wanted = '应形如 [["甲", "甲的别名"], ["乙"]]'
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _BadLineError(f"keys {wanted}，却是{_kind(value)}")
    for group in value:
        if not isinstance(group, list) or not group:
            raise _BadLineError(f"keys {wanted}，其中一组是{'空的' if group == [] else _kind(group)}")
        if not all(isinstance(key, str) and not _is_blank(key) for key in group):
            raise _BadLineError(f"keys {wanted}，其中一组有空的或不是字符串的词")
    return tuple(tuple(group) for group in value)


def _example(row: _Row, original: dict[str, object], reader: _Format, need_answer: bool) -> Example:
    if reader.mark not in row:
        raise _BadLineError(f"缺少 {reader.mark}，本文件是 {reader.looks} 格式")
    system, turns = reader.read(row, need_answer)
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
        raise _BadLineError(f"id 应是字符串或整数，却是{_kind(name)}")
    return Example(tuple(turns), system, _keys(row.get("keys")), "" if name is None else str(name), original)


# A record: its line, then either its fields (folded for look-up, as written) or why there are none.
_Record = tuple[int, tuple[_Row, dict[str, object]] | str]


def _checked(value: object) -> tuple[_Row, dict[str, object]] | str:
    return (value, value) if isinstance(value, dict) else f"应是一个 JSON 对象，却是{_kind(value)}"


def _json_lines(data: bytes) -> Iterator[_Record]:
    for number, raw in enumerate(data.split(b"\n"), 1):  # not splitlines: U+2028 may stand inside a string
        try:
            text = raw.decode("utf-8").strip().lstrip("\ufeff")
        except UnicodeDecodeError:
            yield number, "不是 UTF-8 编码"
            continue
        if not text:
            continue
        try:
            yield number, _checked(json.loads(text))
        except json.JSONDecodeError as error:
            rest = text[error.pos : error.pos + 12]
            yield number, f"JSON 在第 {error.colno} 个字符处不合语法：{f'那里是 {rest}' if rest else '没有写完'}"
        except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
            yield number, "JSON 里有过长的数字或过深的嵌套"


def _json_array(path: Path, text: str) -> Iterator[_Record]:
    """The elements one by one, because `json.loads` of the whole would not tell their lines."""
    decoder = json.JSONDecoder()
    line, counted, at = 1, 0, text.index("[") + 1

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    at = skip(at)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where, reason = line, "有过长的数字或过深的嵌套"
            if isinstance(error, json.JSONDecodeError):
                rest = text[error.pos : error.pos + 12].split("\n")[0]
                where, reason = error.lineno, f"那里是 {rest}" if rest else "没有写完"
            raise MiniGLMError(
                f"JSON 数组不合语法：{reason}",
                path=path,
                line=where,
                fix="改正后再读，或改成每行一个对象的 .jsonl",
            ) from None
        yield line, _checked(value)
        at = skip(at)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise MiniGLMError(
                "JSON 数组没有写完，应是逗号或 ]", path=path, line=line, fix="文件可能被截断，请重新取得"
            )
    if text[at + 1 :].strip():
        line += text.count("\n", counted, at)
        raise MiniGLMError(
            "JSON 数组在这里结束，后面却还有内容", path=path, line=line, fix="整个文件应是一个数组，或每行一个对象"
        )


def _csv_rows(path: Path, text: str) -> Iterator[_Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # of a row that spans several, the first
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field larger" in str(error):
                raise MiniGLMError("从这一行起有引号没有闭合", path=path, line=line, fix="补上缺的双引号") from None
            yield line, "引号用得不对：单元格里的双引号要写成两个，整个单元格再用双引号括起来"
            continue
        while row and not row[-1].strip() and (header is None or len(row) > len(header)):
            row.pop()  # spreadsheets pad rows with empty cells
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [name.strip() for name in row]
        elif len(row) > len(header):
            yield line, f"有 {len(row)} 列，表头只有 {len(header)} 列；含逗号的单元格要用双引号括起来"
        else:
            original: dict[str, object] = dict(zip(header, row, strict=False))
            folded = {name.casefold(): value for name, value in original.items()}
            cell = str(folded.get("keys", "")).strip()
            try:
                folded["keys"] = json.loads(cell) if cell else None
                yield line, (folded, original)
            except (ValueError, RecursionError):
                yield line, 'keys 一列应是 JSON，形如 [["甲", "甲的别名"], ["乙"]]'


def _decode(path: Path, data: bytes, *, fallback: bool) -> str:
    """UTF-8, or GB18030 where `fallback` allows it: what Chinese Excel and Notepad write."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if fallback:
            with contextlib.suppress(UnicodeDecodeError):
                return data.decode("gb18030")
        raise MiniGLMError(
            f"不是 UTF-8 编码{'，也不是 GB18030' if fallback else ''}",
            path=path,
            line=data.count(b"\n", 0, error.start) + 1,
            fix="请另存为 UTF-8",
        ) from None


def _load(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MiniGLMError("没有这个文件", path=path) from None
    except IsADirectoryError:
        raise MiniGLMError("这是文件夹，应是一个问答文件", path=path) from None
    except OSError as error:
        raise MiniGLMError(f"读不了：{error.strerror}", path=path) from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise MiniGLMError("是 UTF-16 编码，应是 UTF-8", path=path, fix="请另存为 UTF-8")
    if b"\0" in data:
        fix = "请在表格软件里另存为“CSV UTF-8”" if path.suffix.lower() in (".xlsx", ".xls") else None
        raise MiniGLMError("是二进制文件，应是 .jsonl、.json 或 .csv 的问答集", path=path, fix=fix)
    if not data.strip():
        raise MiniGLMError("文件是空的，应至少有一个问答", path=path)
    return data


def _records(path: Path, data: bytes) -> tuple[list[_Record], str | None]:
    """The file's records, and its format's name if that does not follow from the fields."""
    if path.suffix.lower() == ".csv":
        return list(_csv_rows(path, _decode(path, data, fallback=True))), "csv"
    if data.lstrip().startswith(b"["):
        return list(_json_array(path, _decode(path, data, fallback=False))), None
    return list(_json_lines(data)), None


def _without_refused(path: Path, records: list[_Record]) -> list[_Record]:
    """The records without the answers that readers refused. Of several lines of one question and answer with a `rating`
    ("like", "dislike", "none") the last counts, and only "like" is an answer to learn; other ratings mean nothing here.

    Raises:
        MiniGLMError: nothing is left.
    """
    rated: dict[int, tuple[str, str]] = {}
    last: dict[tuple[str, str], int] = {}
    for number, (_, content) in enumerate(records):
        if not isinstance(content, str) and content[0].get("rating") in ("like", "dislike", "none"):
            rated[number] = (str(content[0].get("question")), str(content[0].get("answer")))
            last[rated[number]] = number

    def counts(number: int) -> bool:
        content = records[number][1]
        if number not in rated or isinstance(content, str):
            return True
        return last[rated[number]] == number and content[0]["rating"] == "like"

    kept = [record for number, record in enumerate(records) if counts(number)]
    if records and not kept:
        raise MiniGLMError("里面的回答都被踩了或收回了，没有可以学的", path=path)
    return kept


def _unknown_format(path: Path, records: list[_Record]) -> MiniGLMError:
    known = "、".join(known.looks for known in FORMATS.values())
    line, fields = next(((line, content[1]) for line, content in records if not isinstance(content, str)), (0, None))
    if fields is not None:
        names = "、".join(list(fields)[:8]) or "空的"
        return MiniGLMError(f"认不出格式：字段是 {names}；认得的有 {known}", path=path, line=line)
    if not records:
        return MiniGLMError(f"没有问答，只有表头或空的数组；认得的有 {known}", path=path)
    return _too_many(path, [Rejected(path, line, str(content)) for line, content in records], len(records))


def _too_many(path: Path, rejected: list[Rejected], total: int) -> MiniGLMError:
    shown = "；".join(f"第 {bad.line} 行：{bad.reason}" for bad in rejected[:3])
    more = "……" if len(rejected) > 3 else ""
    if len(rejected) == total:
        return MiniGLMError(f"{total} 行没有一行能用：{shown}{more}", path=path)
    share = f"{len(rejected) / total:.1%}，最多容许 {MAX_REJECTED:.0%}"
    return MiniGLMError(
        f"{total} 行里有 {len(rejected)} 行不能用（{share}）：{shown}{more}",
        path=path,
        fix="请改正这些行，或加 --allow-bad-lines 略过它们",
    )


def read_examples(path: str | Path, *, allow_bad: bool = False, need_answer: bool = True) -> QASet:
    """Reads a question-answer set: JSON lines, one JSON array, or CSV with a header, in any format of `FORMATS`.

    Blank lines are ignored; a byte-order mark too; CSV may also be GB18030. Any format may have `id` and `keys`. Where
    answers are needed, those whose `rating` is "dislike" or "none" are passed over: readers refused them.

    Args:
        allow_bad: go on with whatever lines can be used, however few.
        need_answer: whether a line without an answer is unusable. Without it, a .txt file is one question a line.

    Raises:
        MiniGLMError: the file cannot be read, has no known format, no usable line, or (unless `allow_bad`) more than
            `MAX_REJECTED` of its lines are unusable.
    """
    path = Path(path)
    data = _load(path)
    if path.suffix.lower() == ".txt" and not need_answer:
        lines = _decode(path, data, fallback=True).split("\n")
        questions = [line.strip() for line in lines if not _is_blank(line)]
        if not questions:
            raise MiniGLMError("文件里没有问题，应每行一个", path=path)
        return QASet([Example((Turn(q, ""),), extra={"question": q}) for q in questions], [], "text")

    records, name = _records(path, data)
    if need_answer:
        records = _without_refused(path, records)
    rows = (content[0] for _, content in records if not isinstance(content, str))
    shape = next((key for row in rows for key, known in FORMATS.items() if known.mark in row), None)
    if shape is None:
        raise _unknown_format(path, records)
    examples, rejected = [], []
    for line, content in records:
        try:
            if isinstance(content, str):
                raise _BadLineError(content)
            examples.append(_example(*content, FORMATS[shape], need_answer))
        except _BadLineError as error:
            rejected.append(Rejected(path, line, str(error)))
    if not examples or (not allow_bad and len(rejected) > MAX_REJECTED * len(records)):
        raise _too_many(path, rejected, len(records))
    return QASet(examples, rejected, name or shape)


def to_row(example: Example) -> dict[str, object]:
    """An example in a form that `read_examples` reads back."""
    if len(example.turns) == 1 and not example.system:
        kept_keys = ("chapter", "evidence", "source", "part", "topic", "kind")
        kept = {k: v for k, v in example.extra.items() if k in kept_keys}
        row: dict[str, object] = {"question": example.question, "answer": example.answer} | kept
    else:
        messages = [{"role": "system", "content": example.system}] if example.system else []
        for turn in example.turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        row = {"messages": messages}
    if example.id:
        row["id"] = example.id
    if example.keys:
        row["keys"] = [list(group) for group in example.keys]
    return row


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes one JSON object a line, UTF-8; the file appears whole or not at all. Makes missing folders.

    Raises:
        MiniGLMError: the file cannot be written; whatever stood there before still does.
    """
    with written_whole(Path(path)) as file:
        for row in rows:
            try:
                line = json.dumps(row, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:  # a lone surrogate, which UTF-8 has no bytes for
                line = json.dumps(row).encode("ascii")
            file.write(line + b"\n")
