"""Chat templates of other models: Jinja, rendered in a sandbox, turned into token ids so that what people write stays
text. Our own form needs none of this (tokenizer.py); a public checkpoint brings its own template, and an answer is only
good in that form.

A message's content goes through the template as a stand-in and is put in place of it afterwards, so a control token
that is written in a message is never read as one. Templates that look into contents (to trim them, say) see the
stand-in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from miniglm.errors import MiniGLMError

STAND_IN = re.compile("\ue000(\\d+)\ue001")  # private-use characters, which no template writes


def read_template(folder: Path) -> str | None:
    """The chat template of a model folder: chat_template.jinja, else the entry of tokenizer_config.json (of several,
    the default one); None where there is none.

    Raises:
        MiniGLMError: a file cannot be read.
    """
    path = folder / "chat_template.jinja"
    try:
        if path.exists():
            return path.read_text("utf-8")
        path = folder / "tokenizer_config.json"
        found: Any = json.loads(path.read_text("utf-8")).get("chat_template") if path.exists() else None
        if isinstance(found, list):
            named = {entry["name"]: entry["template"] for entry in found}
            found = named.get("default") or next(iter(named.values()), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise MiniGLMError(f"读不了聊天模板（{error}）", path=path, fix="请重新复制或下载完整的目录") from None
    if found is not None and not isinstance(found, str):
        raise MiniGLMError("chat_template 应为字符串", path=path)
    return found


class ChatTemplate:
    """A Jinja template.

    Args:
        source: its text.
        control: the control tokens and their ids.
        names: `bos_token`, `eos_token` and the like, which a template may write.

    Raises:
        MiniGLMError: it is not a template.
    """

    def __init__(
        self, source: str, control: Mapping[str, int], names: Mapping[str, str], path: Path | None = None
    ) -> None:
        import jinja2
        import jinja2.sandbox

        self.source, self._control, self._names, self._path = source, dict(control), dict(names), path
        # As transformers sets it up: templates are written for that.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
        environment.globals["raise_exception"] = self._refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise MiniGLMError(f"聊天模板不是合法的 Jinja（{error}）", path=path) from None
        longest_first = sorted(self._control, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def _refuse(self, message: str) -> None:
        raise MiniGLMError(f"聊天模板不接受这段对话：{message}", path=self._path)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as text.

        Raises:
            MiniGLMError: the template fails on it.
        """
        try:
            return self._template.render(
                **self._names,
                messages=[dict(m) for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except MiniGLMError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise MiniGLMError(f"聊天模板出错（{error}）", path=self._path) from None

    def _ids(self, text: str, contents: Sequence[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
        """The ids of rendered text, one list for each control token and for each stretch of text between them."""
        parts = [part for part in self._split.split(text) if part]
        return [
            [self._control[part]]
            if part in self._control
            else encode(STAND_IN.sub(lambda match: contents[int(match[1])], part))
            for part in parts
        ]

    def encode(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, encode: Callable[[str], list[int]]
    ) -> list[int]:
        """The conversation as ids; `encode` gives those of ordinary text."""
        contents = [m["content"] for m in messages]
        text = self.render(_standing_in(messages), add_generation_prompt)
        return [id for part in self._ids(text, contents, encode) for id in part]

    def encode_training(
        self, messages: Sequence[Mapping[str, str]], closing: int, encode: Callable[[str], list[int]]
    ) -> tuple[list[int], list[int]]:
        """A finished conversation, and for each token 1 if the model shall learn to say it: each answer from where
        generation begins, and the control token after it, which is `closing` where the conversation ends.

        Raises:
            MiniGLMError: the template renders a conversation that goes on differently from one that ends there.
        """
        contents = [m["content"] for m in messages]
        stand_ins = _standing_in(messages)
        ids: list[int] = []
        targets: list[int] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(stand_ins[:number], True)
            answered = self.render(stand_ins[: number + 1], False)
            if not prompt.startswith(done) or not answered.startswith(prompt):
                raise MiniGLMError("这个聊天模板会改写前面的对话，不能用来微调", path=self._path)
            before = [id for part in self._ids(prompt[len(done) :], contents, encode) for id in part]
            answer = [id for part in self._ids(answered[len(prompt) :], contents, encode) for id in part]
            # The role token of the next turn is what ended the answer before it.
            targets += [int(bool(ids))] + [0] * (len(before) - 1) + [1] * len(answer)
            ids += before + answer
            done = answered
        if ids[-1] != closing:
            ids.append(closing)
            targets.append(1)
        return ids, targets


def _standing_in(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    return [{**m, "content": f"\ue000{n}\ue001"} for n, m in enumerate(messages)]
