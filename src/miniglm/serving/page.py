"""The chat page: Gradio components and what happens when they are used, over any `Service`.

Knows nothing of models or HTTP servers; `mount_page` puts it into one. Every request stands alone: earlier turns are
shown but not sent, because a small model trained on single questions answers a second turn with nonsense.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported; also for what it makes by itself
import gradio as gr

from miniglm.errors import MiniGLMError
from miniglm.lookup import Citation, with_sources
from miniglm.qa.questions import normalize_question
from miniglm.serving import page_text
from miniglm.serving.about import Facts
from miniglm.serving.book import BookService
from miniglm.serving.feedback import Rating, add_feedback
from miniglm.serving.page_shell import PageShell
from miniglm.serving.page_text import Language, message, translations
from miniglm.serving.service import Options, Piece, Service, ServiceError
from miniglm.serving.settings import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

HERE = Path(__file__).parent
KEPT_MESSAGES, KEPT_CHARACTERS = 200, 60_000
"""How much of a conversation the reader's browser keeps; it also goes to the server with each question."""
STORAGE = "miniglm-conversation"
"""The history's name in the browser. Its secret is no secret: it is fixed so that a restarted server can read it."""
PAUSE = 0.03
"""Seconds between two updates of the page: more of them cannot be seen, and cost the engine time."""
AGAIN = 0.8
"""Temperature of a second answer to the same question where the settings say 0, which would repeat the first."""
QUEUE_SECONDS = 0.02
"""How often gradio's queue looks for work. Its own 1 ms wakes a server hundreds of times a second, an idle one too, and
each time takes the interpreter from the engine."""
NOTICE = "notice"
"""Marks a line in the conversation that the page wrote, not the model."""
SOURCES, EXCERPT = 5, 10
"""Sources of an answer that can be opened, and characters of each that its button shows."""
Source = tuple[str, str]
"""A button's text, and where in the book it leads: JSON of title, paragraph, first and last character."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

History = list[dict[str, Any]]


def veiled(text: str) -> str:
    """The text so that Gradio's conversation shows it as it is: it takes messages for HTML even where its Markdown is
    off. A word joiner (U+2060), which has no width, after "<" and "&" leaves nothing that HTML could read as a tag or a
    character's name, and unlike "&lt;" it cannot be seen where a message is edited. `unveiled` and page.js take it out.
    """
    return re.sub("[<&]", "\\g<0>\u2060", text)


def unveiled(text: str) -> str:
    """The text that `veiled` was given."""
    return re.sub("([<&])\u2060", "\\1", text)


def _said(role: str, text: str, *, notice: bool = False, sources: Sequence[Source] = ()) -> dict[str, Any]:
    made: dict[str, Any] = {"role": role, "content": veiled(text)}
    if notice:
        made["metadata"] = {"id": NOTICE}
    if sources:
        made["options"] = [{"label": label, "value": place} for label, place in sources]
    return made


def _sources_of(citations: Sequence[Citation]) -> list[Source]:
    return [
        (f"{c.label}{c.quoted[:EXCERPT]}…", json.dumps([c.book, c.paragraph, *(c.start + end for end in c.quote)]))
        for c in citations
    ]


def _sources(options: object) -> list[Source]:
    """An answer's sources as they came from a browser: they may be anything."""
    found = []
    for one in options[:SOURCES] if isinstance(options, list) else ():
        label, place = (one.get("label"), one.get("value")) if isinstance(one, dict) else (None, None)
        if isinstance(label, str) and isinstance(place, str):
            found.append((label[:100], place[:1000]))
    return found


def opened(book: BookService, place: object) -> str | None:
    """The paragraphs around a source, for a `gr.Markdown`, what the source quotes marked; None where there are none."""
    try:
        title, number, start, end = json.loads(str(place))
        heading, around = book.around(str(title), int(number))
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None
    lines = []
    for paragraph, text in around:
        quoted = paragraph == number and isinstance(start, int) and isinstance(end, int) and 0 <= start < end
        before, marked, after = (text[:start], text[start:end], text[end:]) if quoted else (text, "", "")
        shown = escape(before) + (f"<mark>{escape(marked)}</mark>" if marked else "") + escape(after)
        lines.append(f"<p>{' '.join(shown.split())}</p>")
    return f"<div><h3>{escape(' '.join(heading.split()))}</h3>{''.join(lines)}</div>"


def _text_of(content: object) -> str:
    """A message's text, however Gradio wrapped it; what is not text is nothing."""
    if isinstance(content, list):
        return "".join(_text_of(part) for part in content)
    if isinstance(content, dict):
        content = content.get("text")
    return unveiled(content) if isinstance(content, str) else ""


def _plain(history: object) -> History:
    """A conversation as it came from a browser, reduced to texts: it may hold anything."""
    kept: History = []
    for one in history if isinstance(history, list) else ():
        if isinstance(one, dict) and one.get("role") in ("user", "assistant"):
            metadata = one.get("metadata")
            notice = isinstance(metadata, dict) and metadata.get("id") == NOTICE
            sources = _sources(one.get("options"))
            kept.append(_said(one["role"], _text_of(one.get("content")), notice=notice, sources=sources))
    return kept


def _shortened(history: History) -> History:
    """The newest questions with their answers, as many as the browser keeps."""
    first, characters = len(history), 0
    while first > 0 and len(history) - first < KEPT_MESSAGES:
        characters += len(history[first - 1]["content"])
        if characters > KEPT_CHARACTERS:
            break
        first -= 1
    while first < len(history) and history[first]["role"] != "user":
        first += 1
    return history[first:]


def _language(request: gr.Request) -> Language:
    """The language of the page that asks; page.js sets the cookie where the reader chose one."""
    chosen = request.cookies.get("miniglm_lang") or request.headers.get("accept-language") or ""
    return "zh-CN" if str(chosen).lower().startswith("zh") else "en"


def _line(text: str) -> str:
    """Plain text for a `gr.Markdown`: an HTML block without a blank line, in which Markdown has no say.

    (`gr.HTML` would need `eval` in the browser, which the page's policy does not give.)
    """
    return f"<div>{escape(' '.join(text.split()))}</div>"


class _Clock:
    """How fast an answer comes."""

    def __init__(self) -> None:
        self.begun = self.last = time.monotonic()
        self.first: float | None = None
        self.characters = self.at_first = 0

    def add(self, text: str) -> None:
        self.last = time.monotonic()
        self.characters += len(text)
        if self.first is None and text:
            self.first, self.at_first = self.last, self.characters

    def line(self, language: Language, more: str = "") -> str:
        """For a `gr.Markdown`."""
        if self.first is None:
            return _line(message("waiting", language))
        passed, after = self.last - self.first, self.characters - self.at_first
        first = f"{self.first - self.begun:.2f}"
        if not after or passed <= 0:  # it came in one piece
            return _line(message("at_once", language, first=first, characters=self.characters) + more)
        rate = f"{after / passed:,.0f}"
        return _line(message("speed", language, first=first, rate=rate, characters=self.characters) + more)


async def _told(pieces: AsyncIterator[Piece], language: Language) -> AsyncIterator[tuple[str, _Clock, str | None]]:
    """The text so far, as often as the page can show it, and what went wrong, in the last one."""
    clock, text, shown = _Clock(), "", 0.0
    wrong: str | None = None
    try:
        async with aclosing(pieces):  # type: ignore[type-var]  # services give generators
            async for piece in pieces:
                text += piece.text
                clock.add(piece.text)
                if clock.last - shown >= PAUSE:
                    shown = clock.last
                    yield text, clock, None
    except ServiceError as error:
        wrong = error.message
    except Exception as error:  # whatever it is, the reader gets one line, and the terminal the rest
        traceback.print_exc(file=sys.stderr)
        wrong = message("failed", language, kind=type(error).__name__)
    if wrong is None and not text.strip():
        wrong = message("nothing", language)
    yield text, clock, wrong


def _options(values: Sequence[Any], limits: Limits) -> Options:
    """Options from the components' values, brought within what they may be."""
    max_tokens, temperature, top_p, top_k, penalty = (
        value if isinstance(value, (int, float)) and math.isfinite(value) else None for value in values[:5]
    )
    seed = str(values[5] or "").strip()

    def within(value: float | None, low: float, high: float, default: float) -> float:
        return default if value is None else min(max(value, low), high)

    return Options(
        max_tokens=int(within(max_tokens, 1, limits.max_tokens, 128)),
        temperature=within(temperature, 0.0, 2.0, 0.0),
        top_p=within(top_p, 0.01, 1.0, 1.0),
        top_k=int(within(top_k, 0, 1000, 0)),
        repetition_penalty=within(penalty, 1.0, 2.0, 1.0),
        seed=int(seed) % 2**31 if re.fullmatch("[0-9]{1,18}", seed) else None,
    )


def create_page(
    service: Service,
    facts: Facts,
    *,
    feedback: Path | None,
    limits: Limits | None = None,
    book: BookService | None = None,
) -> gr.Blocks:
    """The page's components and events; `mount_page` gives them looks and languages.

    Args:
        book: answers questions from the book, unless the reader wants the model's own answer.
        feedback: where ratings are added; None shows no buttons for them.
    """
    limits = limits or Limits()
    facts = replace(facts, looks_up=book is not None)
    i18n = gr.I18n(**translations(facts))
    blocks = gr.Blocks(analytics_enabled=False, title=page_text.title(facts, "zh-CN"), fill_width=True)
    blocks.i18n_instance = i18n
    with blocks:
        gr.Markdown(i18n("header"), elem_id="header", latex_delimiters=[])
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(i18n("ask_tab"), elem_id="ask"):
                _ask_tab(blocks, service, facts, i18n, feedback, limits, book)
            with gr.Tab(i18n("continue_tab"), elem_id="continue"):
                _continue_tab(service, facts, i18n, limits)
    # As many at once as the engine has slots; what is more waits in the engine, which says when it is full.
    blocks.queue(default_concurrency_limit=limits.slots, api_open=False)
    blocks._queue.sleep_when_free = QUEUE_SECONDS
    return blocks


def _settings(i18n: gr.I18n, facts: Facts, limits: Limits, *, tokens: int, temperature: float) -> list[Any]:
    """The folded settings; their values go to `_options`."""
    longest = min(limits.max_tokens, (facts.context or 2 * limits.max_tokens) // 2)

    def slider(name: str, low: float, high: float, step: float, value: float) -> gr.Slider:
        return gr.Slider(low, high, value, step=step, label=i18n(name), info=i18n(f"{name}_about"), buttons=[])

    with gr.Accordion(i18n("settings"), open=False, elem_classes="settings"):
        return [
            slider("max_tokens", 1, longest, 1, min(tokens, longest)),
            slider("temperature", 0, 2, 0.05, temperature),
            slider("top_p", 0.05, 1, 0.05, 1),
            slider("top_k", 0, 200, 1, 0),
            slider("repetition_penalty", 1, 2, 0.05, 1),
            gr.Textbox(  # a gr.Number cannot be empty
                label=i18n("seed"), info=i18n("seed_about"), placeholder=i18n("seed_hint"), max_lines=1, max_length=10
            ),
        ]


def _ask_tab(
    blocks: gr.Blocks,
    service: Service,
    facts: Facts,
    i18n: gr.I18n,
    feedback: Path | None,
    limits: Limits,
    book: BookService | None,
) -> None:
    saved = gr.BrowserState([], storage_key=STORAGE, secret=STORAGE)
    chatbot = gr.Chatbot(
        label=i18n("conversation"),
        show_label=False,
        elem_id="conversation",
        height=None,
        placeholder=cast(str, i18n("welcome")),  # translated like the others, whatever the hint says
        examples=[{"text": veiled(question)} for question in facts.examples],
        editable="user",
        buttons=["copy"],
        render_markdown=False,
        sanitize_html=True,
        allow_tags=False,
        latex_delimiters=[],
        feedback_options=("Like", "Dislike"),
        layout="bubble",
    )
    with gr.Column(visible=False, elem_id="passage") as passage:
        leaf = gr.Markdown("", elem_id="opened", latex_delimiters=[])
        shut = gr.Button(i18n("shut"), size="sm", elem_id="shut")
    with gr.Row(elem_classes="line", equal_height=True):
        question = gr.Textbox(
            label=i18n("question"),
            placeholder=i18n("question_hint"),
            show_label=False,
            container=False,
            lines=1,
            max_lines=6,
            scale=1,
            min_width=80,
            elem_id="question",
        )
        send = gr.Button(i18n("send"), variant="primary", scale=0, min_width=84, elem_id="send")
        stop = gr.Button(i18n("stop"), variant="stop", scale=0, min_width=84, visible=False, elem_id="stop")
    with gr.Row(elem_classes="under"):
        speed = gr.Markdown("", elem_id="speed", latex_delimiters=[])
        looked_up = gr.Checkbox(
            book is not None,
            label=i18n("look_up"),
            container=False,
            min_width=120,
            visible=book is not None,
            elem_id="look-up",
        )
        clear = gr.Button(i18n("clear"), variant="secondary", size="sm", scale=0, min_width=96, elem_id="clear")
    settings = [*_settings(i18n, facts, limits, tokens=128, temperature=0.0), looked_up]
    outputs = [chatbot, saved, question, speed, send, stop]

    async def answer(
        asked: str, history: History, values: Sequence[Any], language: Language, *, again: bool = False
    ) -> AsyncIterator[list[Any]]:
        """Puts the question under the conversation and streams its answer."""
        normal = normalize_question(asked)
        if not normal:
            yield [history, gr.skip(), gr.skip(), _line(message("empty", language)), gr.skip(), gr.skip()]
            return
        if len(normal) > limits.max_prompt_characters:
            line = message("too_long", language, found=len(normal), limit=limits.max_prompt_characters)
            yield [history, gr.skip(), gr.skip(), _line(line), gr.skip(), gr.skip()]
            return
        history = [*history, _said("user", normal)]
        waiting = _line(message("waiting", language))
        shown = [*history, _said("assistant", "")]
        # Kept before the answer is there, so that the question is not lost with a window that is closed.
        yield [shown, _shortened(history), "", waiting, gr.update(visible=False), gr.update(visible=True)]
        options = _options(values, limits)
        more = ""
        looked_in = None if values[-1] is False else book
        if again and options.temperature == 0 and looked_in is None:
            options = replace(options, temperature=AGAIN)
            more = message("again", language, temperature=AGAIN)
        messages = [{"role": "user", "content": normal}]
        sources: list[Source] = []

        async def looked_up_pieces(book: BookService) -> AsyncIterator[Piece]:
            found = await book.find(messages)
            sources.extend(_sources_of(found.citations))
            yield Piece(with_sources(found), 1)

        pieces = service.chat(messages, options) if looked_in is None else looked_up_pieces(looked_in)
        async with aclosing(_told(pieces, language)) as told:  # type: ignore[type-var]
            async for text, clock, wrong in told:
                said = [_said("assistant", text, sources=sources)] if text.strip() or not wrong else []
                said += [_said("assistant", wrong, notice=True)] if wrong else []
                line = gr.skip() if clock.first is None else clock.line(language, more)
                yield [[*history, *said], gr.skip(), gr.skip(), line, gr.skip(), gr.skip()]

    async def ask(asked: str, history: History, request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        async with aclosing(answer(asked, _plain(history), values, _language(request))) as steps:  # type: ignore[type-var]
            async for step in steps:
                yield step

    async def example(
        history: History, request: gr.Request, chosen: gr.SelectData, *values: Any
    ) -> AsyncIterator[list[Any]]:
        asked = _text_of(chosen.value)
        async with aclosing(answer(asked, _plain(history), values, _language(request))) as steps:  # type: ignore[type-var]
            async for step in steps:
                yield step

    async def retry(
        history: History, request: gr.Request, chosen: gr.RetryData, *values: Any
    ) -> AsyncIterator[list[Any]]:
        plain, at = _plain(history), _index(chosen.index)
        if not 0 <= at < len(plain):
            return
        asked = _text_of(plain[at]["content"])
        steps = answer(asked, plain[:at], values, _language(request), again=True)
        async with aclosing(steps):  # type: ignore[type-var]
            async for step in steps:
                yield step

    async def edit(
        history: History, request: gr.Request, changed: gr.EditData, *values: Any
    ) -> AsyncIterator[list[Any]]:
        plain, at = _plain(history), _index(changed.index)
        steps = answer(_text_of(changed.value), plain[: max(at, 0)], values, _language(request))
        async with aclosing(steps):  # type: ignore[type-var]
            async for step in steps:
                yield step

    def finish(history: History) -> list[Any]:
        """After an answer, whole or stopped."""
        return [_shortened(_plain(history)), gr.update(visible=True), gr.update(visible=False)]

    def answering(trigger: Callable[..., Any], handler: Callable[..., Any], inputs: list[Any]) -> Any:
        event = trigger(handler, [*inputs, *settings], outputs, **QUIET)
        event.then(finish, [chatbot], [saved, send, stop], **QUIET)
        return event

    running = [
        answering(question.submit, ask, [question, chatbot]),
        answering(send.click, ask, [question, chatbot]),
        answering(chatbot.example_select, example, [chatbot]),
        answering(chatbot.retry, retry, [chatbot]),
        answering(chatbot.edit, edit, [chatbot]),
    ]
    stop.click(None, None, None, cancels=running, **QUIET)

    def restore(history: object) -> list[History]:
        """The conversation that the browser kept; an answer that never came is left out."""
        plain = _plain(history)
        while plain and plain[-1]["role"] == "assistant" and not plain[-1]["content"]:
            plain.pop()
        return [plain, plain]

    def forget() -> list[Any]:
        return [[], [], ""]

    def rate(history: History, request: gr.Request, data: gr.LikeData) -> str:
        language, plain, at = _language(request), _plain(history), _index(data.index)
        if feedback is None:
            return _line(message("no_feedback", language))
        if not 1 <= at < len(plain) or "metadata" in plain[at] or plain[at - 1]["role"] != "user":
            return _line(message("not_rated", language))
        rating: Rating = "like" if data.liked is True else "dislike" if data.liked is False else "none"
        asked, said = _text_of(plain[at - 1]["content"]), _text_of(plain[at]["content"])
        try:
            add_feedback(feedback, asked, said, rating, model=service.model_id)
        except MiniGLMError as error:
            return _line(message("rating_failed", language, why=str(error)))
        return _line(message({"like": "liked", "dislike": "disliked", "none": "taken_back"}[rating], language))

    def open_source(chosen: gr.SelectData, request: gr.Request) -> list[Any]:
        found = opened(book, chosen.value) if book is not None else None
        return [gr.update(visible=True), found or _line(message("no_passage", _language(request)))]

    def shut_source() -> list[Any]:
        return [gr.update(visible=False), ""]

    if book is not None:
        chatbot.option_select(open_source, None, [passage, leaf], **QUIET)
        shut.click(shut_source, None, [passage, leaf], **QUIET)
    blocks.load(restore, [saved], [chatbot, saved], **QUIET)
    clear.click(forget, None, [chatbot, saved, speed], cancels=running, **QUIET)
    if feedback is not None:
        chatbot.like(rate, [chatbot], [speed], **QUIET)


def _index(index: object) -> int:
    """A message's place as Gradio's events tell it."""
    first = index[0] if isinstance(index, (list, tuple)) and index else index
    return first if isinstance(first, int) else -1


def _continue_tab(service: Service, facts: Facts, i18n: gr.I18n, limits: Limits) -> None:
    gr.Markdown(i18n("continue_about"), elem_classes="about", latex_delimiters=[])
    start = gr.Textbox(label=i18n("start"), placeholder=i18n("start_hint"), lines=4, max_lines=12, elem_id="start")
    with gr.Row(elem_classes="line"):
        go = gr.Button(i18n("continue"), variant="primary", scale=0, min_width=84, elem_id="go")
        halt = gr.Button(i18n("stop"), variant="stop", scale=0, min_width=84, visible=False, elem_id="halt")
        pace = gr.Markdown("", elem_id="pace", latex_delimiters=[])
        # page.js copies: the box's own button stands inside its label and takes the label for itself.
        gr.Button(i18n("copy"), size="sm", scale=0, min_width=64, elem_id="copy")
    made = gr.Textbox(
        label=i18n("continuation"),
        placeholder=i18n("continuation_hint"),
        lines=8,
        max_lines=24,
        interactive=False,
        elem_id="made",
    )
    settings = _settings(i18n, facts, limits, tokens=256, temperature=0.8)

    async def go_on(text: str, request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        language, text = _language(request), text or ""
        wrong: str | None = None
        if not text.strip():
            wrong = message("no_start", language)
        elif len(text) > limits.max_prompt_characters:
            wrong = message("too_long", language, found=len(text), limit=limits.max_prompt_characters)
        if wrong:
            yield [gr.skip(), _line(wrong), gr.skip(), gr.skip()]
            return
        yield ["", _line(message("waiting", language)), gr.update(visible=False), gr.update(visible=True)]
        pieces = service.complete(text, _options(values, limits))
        async with aclosing(_told(pieces, language)) as told:  # type: ignore[type-var]
            async for more, clock, failed in told:
                line = _line(failed) if failed else clock.line(language)
                yield [text + more if more else gr.skip(), line, gr.skip(), gr.skip()]

    def finish() -> list[Any]:
        return [gr.update(visible=True), gr.update(visible=False)]

    event = go.click(go_on, [start, *settings], [made, pace, go, halt], **QUIET)
    event.then(finish, None, [go, halt], **QUIET)
    halt.click(None, None, None, cancels=[event], **QUIET)


FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "Noto Sans Mono CJK SC", "monospace"]


def mount_page(
    app: FastAPI,
    service: Service,
    facts: Facts,
    *,
    feedback: Path | None,
    limits: Limits | None = None,
    book: BookService | None = None,
) -> gr.Blocks:
    """Puts the page at `/` of an application; it takes every path that no earlier route has."""
    blocks = create_page(service, facts, feedback=feedback, limits=limits, book=book)
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        server_name="127.0.0.1",  # only told to Gradio: the application listens where it was told to
        server_port=7860,
        theme=gr.themes.Base(font=FONTS, font_mono=MONO),  # names of fonts that are there or not; none is fetched
        css_paths=[HERE / "page.css"],
        i18n=cast(gr.I18n, blocks.i18n_instance),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=1,
        allowed_paths=[],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
    )
    head = f"<title>{escape(page_text.title(facts, 'zh-CN'))}</title>\n<script>{(HERE / 'page.js').read_text('utf-8')}</script>"
    mounted = cast(Any, app.router.routes[-1]).app
    mounted.add_middleware(PageShell, head=head)
    return blocks
