"""The chat page in a real browser, over a service whose answers are known."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import gradio as gr
import httpx
import pytest
import uvicorn
from browsing import chromium
from fastapi import FastAPI
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, expect
from report_sample import make_report
from served import MODEL, local_service, serving

from miniglm.config import read_config
from miniglm.conversation import Message
from miniglm.corpus import Paragraph
from miniglm.lookup import Answerer, with_sources
from miniglm.lookup.build import build_index
from miniglm.qa.formats import read_examples
from miniglm.serving.about import Facts, SplitScore, facts_of
from miniglm.serving.app import create_app
from miniglm.serving.backend import RemoteService
from miniglm.serving.book import BookService
from miniglm.serving.guards import State
from miniglm.serving.page import create_page, mount_page, opened, unveiled, veiled
from miniglm.serving.page_text import MESSAGES, TEXTS
from miniglm.serving.service import Options, Piece, Service, ServiceError
from miniglm.serving.settings import Limits

PATIENCE = 60_000
"""Milliseconds until something that must happen counts as not happening, on a machine busy with other things."""
HTML = (
    "<script>document.title='坏'</script><img src=https://example.com/a.png onerror=\"document.title='坏'\">"
    "![图](https://example.com/b.png) [链接](https://example.com) **粗** $$x^2$$ &lt;b&gt; <!-- 注释 --> <b>粗</b>"
)
ANSWER = "曹操是沛国谯县人，字孟德，小字阿瞒。"


class Scripted:
    """Says what a question asks it to, character by character."""

    model_id = "miniglm"

    def __init__(self) -> None:
        self.pause = 0.01
        self.asked: list[tuple[list[Message], Options]] = []
        self.closed = 0

    async def _say(self, text: str) -> AsyncIterator[Piece]:
        try:
            for number, character in enumerate(text, 1):
                await asyncio.sleep(self.pause)
                yield Piece(character, number)
        finally:
            self.closed += 1

    def chat(self, messages: Sequence[Message], options: Options) -> AsyncIterator[Piece]:
        self.asked.append((list(messages), options))
        question = messages[-1]["content"]
        if "忙" in question:
            return self._busy()
        if "坏" in question:
            return self._broken()
        if "无" in question:
            return self._say("")
        if "代码" in question:
            return self._say(HTML)
        return self._say("慢" * 400 if "慢" in question else ANSWER)

    def complete(self, prompt: str, options: Options) -> AsyncIterator[Piece]:
        self.asked.append(([{"role": "user", "content": prompt}], options))
        return self._say("，投南而走。操引军追之。\n却说玄德闻之，大惊。" * 4)

    async def _busy(self) -> AsyncIterator[Piece]:
        raise ServiceError("现在太忙：等着的请求已有 128 个（上限 queue），请稍后再试", status=429)
        yield

    async def _broken(self) -> AsyncIterator[Piece]:
        yield Piece("刚说", 1)
        raise RuntimeError("secret detail")


FACTS = Facts(
    "demo",
    books=("三国演义",),
    parameters=4_100_000,
    layers=4,
    context=256,
    examples=(
        "曹操是哪里人？",
        "谁在长坂坡救出阿斗？",
        "诸葛亮第一次北伐失了哪里？",
        "温酒斩华雄的是谁？",
        "孙策死后谁继位？",
        "<b>谁</b>斩了颜良？",
    ),
    scores=(SplitScore("validation", 0.264, 0.241, 0.285, 1587), SplitScore("unseen", 0.028, 0.014, 0.044, 504)),
    has_report=True,
)


class Site:
    """The page on a port of this machine, in a thread."""

    def __init__(self, app: FastAPI, port: int = 0) -> None:
        listener = socket.create_server(("127.0.0.1", port))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def page_over(service: Service, feedback: Path | None) -> FastAPI:
    """An application that is the page and nothing else."""
    app = FastAPI()
    mount_page(app, service, FACTS, feedback=feedback, limits=Limits(max_prompt_characters=500))
    return app


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    off = ("background-networking", "component-update", "sync")
    flags = ["--disable-gpu", "--disable-quic", "--no-first-run", *(f"--disable-{x}" for x in off)]
    with chromium(flags=flags) as started:
        yield started


@pytest.fixture(scope="module")
def service() -> Scripted:
    return Scripted()


@pytest.fixture(scope="module")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "feedback.jsonl"


@pytest.fixture(scope="module")
def site(service: Scripted, feedback: Path) -> Iterator[Site]:
    started = Site(page_over(service, feedback))
    yield started
    started.close()


COUNT_WRITES = """
    window.writes = 0;
    const write = Storage.prototype.setItem;
    Storage.prototype.setItem = function (...given) { write.apply(this, given); window.writes++; };
"""


class Windows:
    """Opens the page in windows of their own, and notes what they ask for and complain about."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url = browser, url
        self.contexts: list[BrowserContext] = []
        self.asked: list[str] = []
        self.faults: list[str] = []
        self.listening = True

    def note(self, fault: str) -> None:
        if self.listening:
            self.faults.append(fault)

    def __call__(self, *, locale: str = "zh-CN", color_scheme: Any = "light", width: int = 1280) -> Page:
        context = self.browser.new_context(
            locale=locale,
            color_scheme=color_scheme,
            viewport={"width": width, "height": 844},
            permissions=["clipboard-read", "clipboard-write"],
        )
        context.set_default_timeout(PATIENCE)
        context.add_init_script(COUNT_WRITES)
        self.contexts.append(context)
        context.on("request", lambda request: self.asked.append(request.url))
        context.on("console", lambda m: self.note(m.text) if m.type in ("error", "warning") else None)
        context.on("weberror", lambda error: self.note(str(error.error)))
        page = context.new_page()
        go(page, self.url)
        return page

    def close(self) -> None:
        for context in self.contexts:
            for page in context.pages if self.listening else ():
                streams = Streams.of[page]
                until(lambda streams=streams: streams.begun == streams.ended, page)  # type: ignore[misc]
            context.close()


@pytest.fixture
def show(browser: Browser, site: Site, service: Scripted) -> Iterator[Windows]:
    """Opens windows; whatever the test, no other host may be asked for anything and the console must stay empty."""
    service.pause = 0.01
    service.asked.clear()
    windows = Windows(browser, site.url)
    yield windows
    windows.close()
    assert [url for url in windows.asked if not url.startswith((site.url, "data:", "blob:"))] == []
    assert windows.faults == []


class Streams:
    """The streams of events that a page has open: Gradio complains when one is cut by leaving."""

    of: ClassVar[WeakKeyDictionary[Page, Streams]] = WeakKeyDictionary()

    def __init__(self, page: Page) -> None:
        self.begun = self.ended = 0
        page.on("request", self._begin)
        page.on("requestfinished", self._end)
        page.on("requestfailed", self._end)  # Gradio closes the stream of an event that is over
        self.of[page] = self

    def _begin(self, request: Request) -> None:
        self.begun += "queue/data" in request.url

    def _end(self, request: Request) -> None:
        self.ended += "queue/data" in request.url


@contextmanager
def arriving(page: Page, *, cut: bool = False) -> Iterator[None]:
    """Goes to another address inside: what is streaming ends first, unless it shall be cut, and afterwards the new page
    has come to rest."""
    streams = Streams.of.get(page) or Streams(page)
    if not cut:
        until(lambda: streams.begun == streams.ended, page)
    before = streams.begun
    yield
    until(lambda: before < streams.begun == streams.ended, page)  # what the browser kept has been shown
    page.wait_for_timeout(100)


def go(page: Page, url: str | None = None, *, cut: bool = False) -> None:
    """Opens an address, or the same one again, and waits until the page is at rest."""
    with arriving(page, cut=cut):
        page.goto(url) if url else page.reload()


def ask(page: Page, question: str, *, wait: bool = True) -> None:
    """Asks; with `wait` until the answer is there and kept."""
    page.locator("#question textarea").fill(question)
    with at_rest(page, wait=wait):
        page.locator("#send").click()


@contextmanager
def at_rest(page: Page, *, wait: bool = True) -> Iterator[None]:
    """Waits for an answer that is begun inside: its beginning, with `wait` its end. The question is kept by the browser
    in one step with the stop button's coming, the answer with its going; both steps may fall together."""
    writes = page.evaluate("window.writes")
    yield
    until(lambda: bool(page.evaluate("window.writes") > writes), page)
    page.locator("#send" if wait else "#stop").wait_for()


def answers(page: Page) -> list[str]:
    return [unveiled(text) for text in page.locator("[data-testid=bot] .message-content").all_inner_texts()]


def questions(page: Page) -> list[str]:
    return page.locator("[data-testid=user] .message-content").all_inner_texts()


def under_the_last(page: Page, name: str) -> Any:
    return page.locator("#conversation").get_by_role("button", name=name, exact=True).last


def until(condition: Callable[[], bool], page: Page) -> None:
    """Waits while the browser goes on."""
    for _ in range(PATIENCE // 20):
        if condition():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it never came about")


def test_an_answer_comes_character_by_character(show: Windows, service: Scripted) -> None:
    page = show()
    service.pause = 0.08
    page.evaluate("""() => {
        window.seen = [];
        const look = () => {
            const all = document.querySelectorAll("[data-testid=bot] .message-content");
            const text = all[all.length - 1]?.innerText ?? "";
            if (text !== window.seen[window.seen.length - 1]) window.seen.push(text);
        };
        new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
    }""")
    page.locator("#question textarea").fill("  曹操是哪里人 ")
    with at_rest(page):
        page.keyboard.press("Enter")
    seen = [text for text in page.evaluate("window.seen") if text]
    assert len(seen) > len(ANSWER) // 2
    assert all(ANSWER.startswith(text) for text in seen)
    assert [len(text) for text in seen] == sorted({len(text) for text in seen})
    assert answers(page) == [ANSWER], "and the question is not repeated in it"
    assert questions(page) == ["曹操是哪里人？"], "with the mark that was missing"
    assert service.asked[-1][0] == [{"role": "user", "content": "曹操是哪里人？"}]
    assert re.fullmatch(rf"首字 \d+\.\d\d 秒 · 每秒 \d+ 字 · 共 {len(ANSWER)} 字", page.locator("#speed").inner_text())
    ask(page, "孙权呢？")
    assert service.asked[-1][0] == [{"role": "user", "content": "孙权呢？"}], "each question stands alone"
    assert questions(page) == ["曹操是哪里人？", "孙权呢？"]


def test_stop_and_ask_again(show: Windows, service: Scripted) -> None:
    page = show()
    ask(page, "慢慢说", wait=False)
    until(lambda: len("".join(answers(page))) > 5, page)
    closed = service.closed
    page.locator("#stop").click()
    page.locator("#send").wait_for()
    until(lambda: service.closed == closed + 1, page)
    partial = answers(page)[-1]
    assert 5 < len(partial) < 400
    ask(page, "曹操是哪里人")
    assert answers(page) == [partial, ANSWER]


def test_leaving_drops_the_answer(show: Windows, service: Scripted) -> None:
    page = show()
    ask(page, "慢慢说", wait=False)
    until(lambda: bool("".join(answers(page))), page)
    closed = service.closed
    show.listening = False  # Gradio complains of a window that is left in the middle
    page.goto("about:blank")
    until(lambda: service.closed == closed + 1, page)


def test_two_windows_at_once(show: Windows, service: Scripted) -> None:
    first, second = show(), show()
    service.pause = 0.03
    ask(first, "慢慢说", wait=False)
    until(lambda: bool("".join(answers(first))), first)
    ask(second, "曹操是哪里人")
    assert answers(second) == [ANSWER]
    assert first.locator("#stop").is_visible() and 0 < len(answers(first)[0]) < 400
    first.locator("#stop").click()
    first.locator("#send").wait_for()


def test_again_edit_and_copy(show: Windows, service: Scripted) -> None:
    page = show()
    ask(page, "曹操是哪里人")
    with at_rest(page):
        under_the_last(page, "重新回答").click()
    assert [options.temperature for _, options in service.asked] == [0.0, 0.8]
    assert "温度 0.8" in page.locator("#speed").inner_text()
    under_the_last(page, "修改问题").click()
    box = page.locator("#conversation textarea")
    assert box.input_value() == "曹操是哪里人？"
    box.fill("写代码 <b>&amp;")
    with at_rest(page):
        under_the_last(page, "提交修改").click()
    assert service.asked[-1][0][0]["content"] == "写代码 <b>&amp;"
    assert answers(page) == [HTML]
    under_the_last(page, "复制").click()
    assert page.evaluate("navigator.clipboard.readText()") == HTML


def test_what_a_model_writes_is_text(show: Windows) -> None:
    page = show()
    ask(page, "写一段代码")
    assert answers(page) == [HTML]
    for tag in ("img", "script", "a", "b", "strong", ".katex"):
        assert page.locator(f"[data-testid=bot] {tag}").count() == 0
    assert page.title() == "《三国演义》问答"
    assert unveiled(page.locator("#conversation").inner_text()).count("<img") == 1
    go(page)
    until(lambda: answers(page) == [HTML], page)
    assert page.locator("[data-testid=bot] img").count() == 0


def test_examples_and_markup_in_a_question(show: Windows, service: Scripted) -> None:
    page = show()
    shown = [unveiled(text) for text in page.locator("#conversation .example").all_inner_texts()]
    assert shown == list(FACTS.examples)
    with at_rest(page):
        page.locator("#conversation .example").last.click()
    assert answers(page) == [ANSWER]
    assert service.asked[-1][0][0]["content"] == FACTS.examples[-1]
    assert [unveiled(text) for text in questions(page)] == [FACTS.examples[-1]]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("忙吗", ["现在太忙：等着的请求已有 128 个（上限 queue），请稍后再试"]),
        ("坏了吗", ["刚说\n出了意外的错（RuntimeError），服务器的终端里有详情。请再试一次。"]),
        ("无话", ["模型什么也没有写。"]),
    ],
)
def test_what_goes_wrong_is_one_line(
    show: Windows, site: Site, capfd: pytest.CaptureFixture[str], question: str, said: list[str]
) -> None:
    page = show()
    ask(page, question)
    assert [re.sub(r"\n+", "\n", "\n".join(answers(page)))] == said
    assert "secret detail" not in page.content() and "Traceback" not in page.content()
    assert ("secret detail" in capfd.readouterr().err) == ("坏" in question)
    ask(page, "曹操是哪里人")
    assert answers(page)[-1] == ANSWER


def test_too_long_or_empty_is_said_and_nothing_is_lost(show: Windows, service: Scripted) -> None:
    page = show()
    page.locator("#question textarea").fill("长" * 501)
    page.locator("#send").click()
    expect(page.locator("#speed")).to_contain_text(
        "太长了：502 个字，最多 500 个（上限 max_prompt_characters）", timeout=PATIENCE
    )
    assert page.locator("#question textarea").input_value() == "长" * 501
    page.wait_for_timeout(300)  # a second click on what is not quite over counts for nothing
    page.locator("#question textarea").fill(" ")
    page.locator("#send").click()
    expect(page.locator("#speed")).to_contain_text("先写一个问题", timeout=PATIENCE)
    assert service.asked == [] and answers(page) == []


def test_two_languages(show: Windows) -> None:
    page = show()
    ask(page, "曹操是哪里人")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert "410 万参数" in page.locator("#header").inner_text() and "26.4" in page.locator("#header").inner_text()
    with arriving(page):
        page.get_by_role("link", name="English").click()
        page.get_by_role("button", name="Send", exact=True).wait_for()
    assert len(page.context.pages) == 1 and page.locator("html").get_attribute("lang") == "en"
    until(lambda: answers(page) == [ANSWER], page)
    assert "4.1 M parameters" in page.locator("#header").inner_text()
    assert not re.search(
        "[\u4e00-\u9fff]", page.locator("#ask").inner_text().replace(ANSWER, "").replace("曹操是哪里人？", "")
    )
    ask(page, "无话")
    assert answers(page)[-1] == "The model wrote nothing."
    go(page, page.url.split("?")[0])
    page.get_by_role("button", name="Send", exact=True).wait_for()
    with arriving(page):
        page.get_by_role("link", name="中文").click()
        page.get_by_role("button", name="发送", exact=True).wait_for()


@pytest.mark.parametrize(("locale", "send"), [("zh-TW", "发送"), ("en-GB", "Send"), ("fr-FR", "Send")])
def test_the_browsers_language_comes_first(show: Windows, locale: str, send: str) -> None:
    assert show(locale=locale).locator("#send").inner_text().strip() == send


def test_the_history_stays_in_the_browser(show: Windows, site: Site) -> None:
    page = show()
    ask(page, "曹操是哪里人")
    go(page)
    until(lambda: answers(page) == [ANSWER], page)
    assert questions(page) == ["曹操是哪里人？"]
    ask(page, "慢慢说", wait=False)
    until(lambda: len(answers(page)) == 2, page)
    show.listening = False  # Gradio complains of a window that is left in the middle
    go(page, cut=True)
    show.listening = True
    until(lambda: questions(page) == ["曹操是哪里人？", "慢慢说？"], page)
    assert answers(page) == [ANSWER], "of an answer that was cut short by leaving the question stays"
    page.locator("#clear").click()
    until(lambda: questions(page) == [], page)
    go(page)
    page.locator("#conversation .example").first.wait_for()
    assert questions(page) == []


def test_the_history_outlives_the_server(browser: Browser) -> None:
    first = Site(page_over(Scripted(), None))
    context = browser.new_context(locale="zh-CN")
    context.set_default_timeout(PATIENCE)
    context.add_init_script(COUNT_WRITES)
    page = context.new_page()
    try:
        go(page, first.url)
        ask(page, "曹操是哪里人")
        assert page.get_by_role("button", name="赞", exact=True).count() == 0, "no file for ratings, no buttons"
        page.goto("about:blank")
    finally:
        first.close()
    second = Site(page_over(Scripted(), None), port=first.port)
    try:
        go(page, second.url)
        until(lambda: answers(page) == [ANSWER], page)
    finally:
        context.close()
        second.close()


def test_ratings_are_noted_and_can_be_learnt_from(show: Windows, feedback: Path) -> None:
    page = show()
    ask(page, "曹操是哪里人")
    under_the_last(page, "赞").click()
    expect(page.locator("#speed")).to_contain_text("已记下：赞", timeout=PATIENCE)
    ask(page, "写代码")
    under_the_last(page, "踩").click()
    expect(page.locator("#speed")).to_contain_text("已记下：踩", timeout=PATIENCE)
    ask(page, "无话")
    under_the_last(page, "赞").click()
    expect(page.locator("#speed")).to_contain_text("没有记下", timeout=PATIENCE)
    rows = [json.loads(line) for line in feedback.read_text("utf-8").splitlines()]
    assert [(row["question"], row["answer"], row["rating"]) for row in rows] == [
        ("曹操是哪里人？", ANSWER, "like"),
        ("写代码？", HTML, "dislike"),
    ]
    assert [(e.question, e.answer) for e in read_examples(feedback).examples] == [("曹操是哪里人？", ANSWER)]


def test_settings_reach_the_model(show: Windows, service: Scripted) -> None:
    page = show()
    page.get_by_role("button", name="采样设置").click()
    panel = page.locator("#ask .settings")
    for name, value in (("最长", "64"), ("温度", "0.7"), ("top-p", "0.9"), ("top-k", "40"), ("重复惩罚", "1.2")):
        box = panel.get_by_label(re.compile(f"number input for {name}"))
        slider = panel.get_by_label(re.compile(f"range slider for {name}"))

        def taken(box: Locator = box, slider: Locator = slider, value: str = value) -> bool:
            box.fill(value)  # again: a folded panel that was just opened may not listen yet
            box.blur()
            return slider.input_value() == value

        until(taken, page)
    panel.get_by_label("随机种子").fill("7")
    ask(page, "曹操是哪里人")
    assert service.asked[-1][1] == Options(64, 0.7, 0.9, 40, 1.2, 7)


def test_the_second_tab_continues_a_text(show: Windows, service: Scripted) -> None:
    page = show()
    page.get_by_role("tab", name="续写").click()
    page.locator("#go").click()
    expect(page.locator("#pace")).to_contain_text("先写一个开头", timeout=PATIENCE)
    page.wait_for_timeout(300)  # a second click on what is not quite over counts for nothing
    service.pause = 0.03
    page.locator("#start textarea").fill("却说曹操<b>引军")
    page.locator("#go").click()
    page.locator("#halt").wait_for()
    until(lambda: len(page.locator("#made textarea").input_value()) > 12, page)
    page.locator("#halt").click()
    page.locator("#go").wait_for()
    page.locator("#copy").click()
    until(lambda: page.locator("#copy[data-copied]").count() == 1, page)
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#made textarea").input_value()
    assert page.locator("#made textarea").input_value().startswith("却说曹操<b>引军，投南")
    assert service.asked[-1][0][0]["content"] == "却说曹操<b>引军" and service.asked[-1][1].temperature == 0.8


# Contrast by WCAG 2.2 (1.4.3) of every element with text of its own against the nearest background that is not clear.
CONTRAST = """() => {
  const parts = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * x + .7152 * y + .0722 * z;
  };
  const poor = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || element.placeholder || element.value;
    if (!own || !element.checkVisibility({opacityProperty: true}) || element.closest(".sr-only, script, style, .visually-hidden")) continue;
    let behind = element;
    while (behind && (parts(getComputedStyle(behind).backgroundColor)[3] ?? 1) < 1) behind = behind.parentElement;
    const style = element.placeholder && !element.value ? getComputedStyle(element, "::placeholder") : getComputedStyle(element);
    const [a, b] = [style.color, getComputedStyle(behind).backgroundColor].map(parts).map(light);
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) poor.push([element.outerHTML.slice(0, 120), contrast]);
  }
  return poor;
}"""
CUT_OFF = """width => [...document.querySelectorAll("body *")].filter(one =>
    one.checkVisibility() && !one.closest(".sr-only, .visually-hidden, [aria-hidden=true]")
    && (one.getBoundingClientRect().right > width + 1 || one.getBoundingClientRect().left < -1)
).map(one => one.outerHTML.slice(0, 120))"""
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, a[href], [role=button]")].filter(one =>
    one.checkVisibility() && !one.closest("[aria-hidden=true]")
    && !(one.innerText.trim() || one.ariaLabel || one.title || [...(one.labels ?? [])].some(l => l.textContent.trim()))
).map(one => one.outerHTML.slice(0, 120))"""


def check_looks(page: Page, width: int) -> None:
    page.wait_for_timeout(300)  # what slides has come to rest
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    assert page.evaluate(CUT_OFF, width) == []
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(NAMELESS) == []


@pytest.mark.parametrize(("width", "locale"), [(390, "zh-CN"), (390, "en"), (1280, "zh-CN")])
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_it_can_be_read_on_any_screen(show: Windows, width: int, locale: str, color_scheme: str) -> None:
    page = show(width=width, locale=locale, color_scheme=color_scheme)
    page.locator("#conversation .example").first.wait_for()
    check_looks(page, width)
    ask(page, "Cao" * 80)
    ask(page, "代码")
    page.locator("#ask .settings > button").click()
    check_looks(page, width)
    page.get_by_role("tab").nth(1).click()
    page.locator("#go").wait_for()
    check_looks(page, width)


def test_the_keyboard_is_enough(show: Windows) -> None:
    page = show()
    page.locator("#question textarea").focus()
    page.keyboard.type("曹操是哪里人")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    until(lambda: answers(page) == [ANSWER], page)
    page.get_by_role("tab", name="问答").focus()
    page.get_by_role("tab", name="续写").press("Enter")
    page.locator("#start textarea").wait_for()


def test_only_what_the_page_needs_is_open(site: Site) -> None:
    with httpx.Client(base_url=site.url, trust_env=False) as client:
        document = client.get("/", headers={"accept-encoding": "gzip, br"})
        policy = document.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "http" not in policy and "eval" not in policy
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']([^\"']+)", document.text)
        assert loaded and not [url for url in loaded if "//" in url]
        assert "og:image" not in document.text and "raw.githubusercontent" not in document.text
        head = client.head("/")
        assert head.status_code == 200 and not head.content
        for path in (
            "gradio_api/upload",
            "gradio_api/info",
            "gradio_api/openapi.json",
            "gradio_api/file=/etc/passwd",
            "gradio_api/file/etc/passwd",
            "gradio_api/proxy=http://example.com/",
            "gradio_api/vibe-code",
            "gradio_api/call/ask",
            "gradio_api/run/predict",
            "gradio_api/runs",
            "monitoring",
            "assets/../config/secret",
            "manifest.json",
            "nothing",
        ):
            for method in ("GET", "POST"):
                assert client.request(method, path).status_code == 404, path
        assert "secret" not in client.get("config").text.replace('"secret":"miniglm-conversation"', "")


def test_an_idle_page_leaves_the_engine_alone(service: Scripted) -> None:
    """gradio's queue looks for work a thousand times a second, unless it is told under a name that it knows."""
    assert hasattr(gr.Blocks()._queue, "sleep_when_free")
    assert create_page(service, FACTS, feedback=None)._queue.sleep_when_free >= 0.01


def test_every_text_is_in_both_languages() -> None:
    for key, (chinese, english) in {**TEXTS, **MESSAGES}.items():
        assert re.search("[\u4e00-\u9fff]", chinese) or key in ("top_p", "top_k")
        assert not re.search("[\u4e00-\u9fff]", english.replace("却说曹操引军", "")), key
        assert sorted(re.findall(r"{\w+", chinese)) == sorted(re.findall(r"{\w+", english)), key


def test_a_veil_comes_off() -> None:
    for text in (HTML, "", "a < b & c", "<<&&", "&lt;"):
        assert unveiled(veiled(text)) == text
        assert not re.search("<[a-zA-Z/!?]|&[a-zA-Z#]", veiled(text))


def test_facts_of_a_run(tmp_path: Path) -> None:
    assert facts_of(None, name="远") == Facts("远")
    assert facts_of(tmp_path, name="空") == Facts("空")
    for folder in ("qa", "corpus", "report", "model"):
        (tmp_path / folder).mkdir()
    rows = [{"question": f"第{n}问？" + "长" * (n % 2) * 40, "answer": "答"} for n in range(100)]
    (tmp_path / "qa/validation.jsonl").write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    (tmp_path / "corpus/summary.json").write_text(json.dumps({"books": [{"title": "三国演义"}]}), "utf-8")
    (tmp_path / "report/report.json").write_text(json.dumps(make_report(count=8)), "utf-8")
    (tmp_path / "report/report.html").write_text("<p>", "utf-8")
    facts = facts_of(tmp_path, name="demo")
    assert facts.books == ("三国演义",) and facts.has_report and facts.parameters is None
    assert [score.split for score in facts.scores] == ["validation", "unseen"]
    assert all(0 <= score.low <= score.mean <= score.high <= 1 and score.questions for score in facts.scores)
    assert len(facts.examples) == 6 and all(len(question) <= 24 for question in facts.examples)
    for name in ("qa/validation.jsonl", "corpus/summary.json", "report/report.json", "model/config.json"):
        (tmp_path / name).write_bytes(b'{"books": 3, "splits": [{"scores": null}, 7]')
    assert facts_of(tmp_path, name="demo") == Facts("demo", has_report=True)
    (tmp_path / "report/report.json").write_text(
        '{"splits": [{"name": "x", "scores": {"key_accuracy": 1}}, 7]}', "utf-8"
    )
    assert facts_of(tmp_path, name="demo").scores == ()


def test_a_run_in_training_tells_of_the_model_it_has(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "pretrain" / "model")
    facts, known = facts_of(tmp_path, name="demo"), read_config(model_folder)
    assert (facts.parameters, facts.context) == (known.num_parameters, known.max_position_embeddings)


def test_over_another_server(browser: Browser, model_folder: Path) -> None:
    """`--backend`: the page asks a second server of ours, and shows what that one says."""
    with serving(model_folder) as second:
        site = Site(create_app(RemoteService(f"{second.url}/v1", model_id=MODEL), Limits(), State()))
        context = browser.new_context(locale="zh-CN")
        context.set_default_timeout(PATIENCE)
        context.add_init_script(COUNT_WRITES)
        try:
            page = context.new_page()
            go(page, site.url)
            ask(page, "长江")
            body = {"model": MODEL, "messages": [{"role": "user", "content": "长江？"}], "max_tokens": 128}
            said = httpx.post(f"{second.url}/v1/chat/completions", json=body, timeout=60).json()
            assert answers(page)[0].split() == said["choices"][0]["message"]["content"].split()
        finally:
            context.close()
            site.close()


def test_over_a_real_model(browser: Browser, model_folder: Path) -> None:
    """Through all guards, the page and the engine, and back: the page shows what the service says."""
    service = local_service(model_folder, Limits())
    site = Site(create_app(service, Limits(), State(), run=model_folder))
    context = browser.new_context(locale="zh-CN")
    context.set_default_timeout(PATIENCE)
    context.add_init_script(COUNT_WRITES)
    try:
        page = context.new_page()
        go(page, site.url)
        ask(page, "长江")

        async def expected() -> str:
            return "".join([p.text async for p in service.chat([{"role": "user", "content": "长江？"}], Options(64))])

        assert "一次能读 128 个 token" in page.locator("#header").inner_text()
        with ThreadPoolExecutor() as pool:  # playwright's own loop runs in this thread
            said = pool.submit(asyncio.run, expected()).result()
        assert said and answers(page)[0].split() == said.split()
        under_the_last(page, "赞").click()
        expect(page.locator("#speed")).to_contain_text("已记下：赞", timeout=PATIENCE)
        assert read_examples(model_folder / "feedback.jsonl").examples[0].question == "长江？"
        (model_folder / "feedback.jsonl").unlink()
    finally:
        context.close()
        site.close()
        service.close(0)


@contextmanager
def book_windows(browser: Browser, service: Scripted, book: BookService) -> Iterator[Windows]:
    """Windows of the page over a service and a book; nothing may complain."""
    app = FastAPI()
    mount_page(app, service, FACTS, feedback=None, limits=Limits(), book=book)
    site = Site(app)
    windows = Windows(browser, site.url)
    service.asked.clear()
    try:
        yield windows
        windows.close()
        assert windows.faults == []
    finally:
        site.close()


def test_with_an_index_the_book_answers_unless_the_reader_wants_the_model(
    browser: Browser, service: Scripted, book: BookService
) -> None:
    with book_windows(browser, service, book) as windows:
        page = windows()
        assert "先到书里查" in page.locator("#conversation").inner_text()
        ask(page, "古庙里住着谁")
        assert answers(page)[0].startswith(with_sources(book.answerer.answer("古庙里住着谁？")))
        assert "【第一回】" in answers(page)[0] and "山中有一座古庙" in answers(page)[0]
        assert service.asked == [], "the model is not asked"
        assert re.fullmatch(r"用时 \d+\.\d\d 秒 · 共 \d+ 字", page.locator("#speed").inner_text())
        page.locator("#look-up input").uncheck()
        ask(page, "曹操是哪里人")
        assert answers(page)[-1] == ANSWER and len(service.asked) == 1
        assert page.locator("#conversation .option").count() == 0


def test_a_source_opens_in_its_place(browser: Browser, service: Scripted, book: BookService) -> None:
    with book_windows(browser, service, book) as windows:
        page = windows()
        expect(page.locator("#passage")).to_be_hidden()
        ask(page, "古庙里住着谁")
        sources = page.locator("#conversation .option")
        assert "【第一回】山中有一座古庙" in sources.first.inner_text()
        sources.first.click()
        mark = page.locator("#opened mark")
        expect(mark).to_have_text("山中有一座古庙，庙里住着老僧慧远。", timeout=PATIENCE)
        expect(mark).to_be_in_viewport()
        text = page.locator("#opened").inner_text()
        assert "第一回 山中" in text and "铁匠名叫石勇" in text and "船家姓柳" not in text
        page.locator("#shut").click()
        expect(page.locator("#passage")).to_be_hidden(timeout=PATIENCE)
        # With the keyboard alone, and after a reload.
        with arriving(page):
            page.reload()
        sources.last.focus()
        page.keyboard.press("Enter")
        expect(mark).to_be_visible(timeout=PATIENCE)
        expect(page.locator("#shut")).to_be_focused(timeout=PATIENCE)
        page.keyboard.press("Escape")
        expect(page.locator("#passage")).to_be_hidden(timeout=PATIENCE)
        expect(sources.last).to_be_focused(timeout=PATIENCE)


def test_what_a_book_says_is_only_shown(browser: Browser, service: Scripted, tmp_path: Path) -> None:
    line = f"庙里住着老僧慧远。{HTML}"
    heading = "第一回 <i>山中</i>"
    story = [Paragraph("山中记", heading, 1, number, text) for number, text in enumerate((heading, line), 1)]
    build_index(story, [], [], tmp_path, seconds=600, seed=1)
    book = BookService(Answerer(tmp_path))
    with book_windows(browser, service, book) as windows:
        page = windows()
        ask(page, "庙里住着老僧慧远")
        page.locator("#conversation .option").first.click()
        expect(page.locator("#opened mark")).to_be_visible(timeout=PATIENCE)
        assert "<script>document.title" in page.locator("#opened").inner_text() and "坏" not in page.title()
        assert page.locator("#opened img, #opened script, #opened b, #opened i").count() == 0


@pytest.mark.parametrize("place", [None, 3, "", "[]", '["山中记", 2]', '["山中记", "二", 0, 3]', '["别记", 2, 0, 3]',
                                   '["山中记", 99, 0, 3]', "[" * 9999, '["山中记", 1e999, 0, 3]', '{"a": 1}'])  # fmt: skip
def test_a_place_that_is_none_opens_nothing(book: BookService, place: object) -> None:
    assert opened(book, place) is None


def test_a_place_with_odd_ends_opens_the_paragraph(book: BookService) -> None:
    for ends in ("-5, 3", "3, 2", "900, 999", '"a", null', "1.5, 2"):
        found = opened(book, f'["山中记", 2, {ends}]')
        assert found is not None and "山中有一座古庙" in found and "<mark>" not in found


def test_nothing_under_the_question_is_cut_off_on_a_phone(
    browser: Browser, service: Scripted, book: BookService
) -> None:
    with book_windows(browser, service, book) as windows:
        for locale in ("zh-CN", "en"):
            page = windows(width=390, locale=locale)
            ask(page, "古庙里住着谁")
            for name in ("#look-up label", "#clear"):
                box = page.locator(name).first.bounding_box()
                assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390, (locale, name, box)
            # Boxes as wide as their words cut the last character's edge off unless what overflows is shown.
            for name in ("#look-up", "#look-up label", "#look-up .label-text"):
                expect(page.locator(name)).to_have_css("overflow", "visible")
