"""The local page to go through a set with, made with Gradio. Shows and asks; `review` knows and keeps."""

from __future__ import annotations

import html
from functools import partial
from pathlib import Path
from typing import Any

from miniglm.errors import MiniGLMError
from miniglm.qa.review import Review, keys_text, parse_keys

VERDICTS = {"keep": "保留", "edit": "改过", "reject": "弃"}
ALL, ANY_DOUBT = "全部", "任何疑点"

# Keys only count outside of the text boxes. There Escape leaves the box, Ctrl+Enter keeps.
_KEYS = """() => {
  const buttons = {k: "keep", r: "reject", ArrowLeft: "back", ArrowRight: "next", u: "undecided", w: "write"};
  document.addEventListener("keydown", event => {
    const typing = /^(input|textarea|select)$/i.test(event.target.tagName) || event.target.isContentEditable;
    const click = name => { event.preventDefault(); document.getElementById(name).click(); };
    if (typing) {
      if (event.key === "Escape") event.target.blur();
      else if (event.key === "Enter" && event.ctrlKey) { event.target.blur(); click("keep"); }
    } else if (event.ctrlKey || event.altKey || event.metaKey) {
      return;
    } else if (event.key === "e") {
      event.preventDefault();
      document.querySelector("#question textarea").focus();
    } else if (buttons[event.key]) click(buttons[event.key]);
  });
}"""
_STYLE = """
#passage .text { white-space: pre-wrap; line-height: 1.8; max-height: 24em; overflow: auto; }
#passage mark { background: #ffe08a; color: #222; padding: 0 .1em; }
#place .doubt { color: #b00020; }
.dark #place .doubt { color: #ff9a9a; }
"""


def build_page(review: Review, out: Path) -> Any:
    """The page as Gradio blocks; `launch_page` shows it.

    Raises:
        MiniGLMError: Gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError:
        raise MiniGLMError("看问答的网页要用 gradio", fix='请运行 pip install "miniglm-chat[serve]"') from None

    doubts = list(dict.fromkeys(doubt for each in review.doubts for doubt in each))

    def rows(chapter: str, doubt: str) -> list[int]:
        wanted = "" if doubt == ALL else "*" if doubt == ANY_DOUBT else doubt
        return review.visible("" if chapter == ALL else chapter, wanted)

    def show(number: int | None, chapter: str, doubt: str, note: str = "") -> list[Any]:
        """Values for all of `shown`, from a row; None where no row fits the filters."""
        listed = rows(chapter, doubt)
        if number is None:
            text = "没有符合条件的问答"
            return [-1, f"<p>{text}</p>", "", "", "", "", note]
        decision, example = review.current(number), review.examples[number]
        counts = review.counts()
        done = "、".join(f"{title} {counts[name]}" for name, title in VERDICTS.items())
        position = f"第 {listed.index(number) + 1}/{len(listed)} 条" if number in listed else "（不在筛选里）"
        state = VERDICTS[decision.verdict] if number in review.decisions else "没看过"
        where = example.extra.get("chapter")
        place = (
            f"<p>{position} · {html.escape(f'第 {where} 章 · ' if where is not None else '')}<b>{state}</b> · "
            f"看过 {len(review.decisions)}/{len(review.examples)}（{done}）</p>"
        )
        if review.doubts[number]:
            place += f'<p class="doubt">疑点：{html.escape("、".join(review.doubts[number]))}</p>'
        return [
            number,
            place,
            _passage(review, number),
            decision.question,
            decision.answer,
            keys_text(decision.keys),
            note,
        ]

    def step(number: int, chapter: str, doubt: str, by: int, note: str = "") -> list[Any]:
        listed = rows(chapter, doubt)
        if by > 0:
            further = [n for n in listed if n > number] or listed[-1:]
        else:
            further = [n for n in reversed(listed) if n < number] or listed[:1]
        return show(further[0] if further else None, chapter, doubt, note)

    def first(chapter: str, doubt: str, after: int = -1) -> list[Any]:
        """The next row that nobody has decided on, from the beginning if there is none after."""
        listed = rows(chapter, doubt)
        open_rows = [n for n in listed if n not in review.decisions]
        chosen = next((n for n in open_rows if n > after), next(iter(open_rows or listed), None))
        return show(chosen, chapter, doubt, "" if open_rows else "这里的都看过了")

    def decide(keep: bool, number: float, chapter: str, doubt: str, question: str, answer: str, keys: str) -> list[Any]:
        row = int(number)
        if row < 0:
            return first(chapter, doubt)
        try:
            review.decide(row, keep, question, answer, parse_keys(keys))
        except MiniGLMError as error:
            return [gr.skip()] * 6 + [str(error)]
        return step(row, chapter, doubt, 1, f"第 {row + 1} 条：{VERDICTS[review.decisions[row].verdict]}")

    def write() -> str:
        try:
            count = review.write(out)
        except MiniGLMError as error:
            return str(error)
        left = len(review.examples) - len(review.decisions)
        return f"{count} 条写到 {out}" + (f"，其中 {left} 条还没有看" if left else "")

    with gr.Blocks(title="看问答", analytics_enabled=False) as page:
        number = gr.Number(-1, visible="hidden", elem_id="number")
        with gr.Row():
            chapter = gr.Dropdown([ALL, *review.chapters()], value=ALL, label="章", elem_id="chapter")
            doubt = gr.Dropdown([ALL, ANY_DOUBT, *doubts], value=ALL, label="疑点", elem_id="doubt")
        place = gr.HTML(elem_id="place")
        with gr.Row():
            passage = gr.HTML(elem_id="passage")
            with gr.Column():
                question = gr.Textbox(label="问题（e 来改）", lines=2, elem_id="question")
                answer = gr.Textbox(label="答案", lines=4, elem_id="answer")
                keys = gr.Textbox(label="要点：一行一组，同一要点的几种说法用 / 隔开", lines=2, elem_id="keys")
        with gr.Row():
            buttons = {
                name: gr.Button(title, elem_id=name, variant="primary" if name == "keep" else "secondary")
                for name, title in (
                    ("keep", "保留（k）"),
                    ("reject", "弃（r）"),
                    ("back", "上一条（←）"),
                    ("next", "下一条（→）"),
                    ("undecided", "下一条没看过的（u）"),
                    ("write", "写出（w）"),
                )
            }
        note = gr.Textbox(label="", show_label=False, interactive=False, elem_id="note", container=False)
        gr.Markdown("在文字框里：Esc 离开，Ctrl+Enter 保留改过的。每按一次都已存下，随时可以关掉。")

        shown = [number, place, passage, question, answer, keys, note]
        filters = [chapter, doubt]
        texts = [number, *filters, question, answer, keys]
        more: dict[str, Any] = {"outputs": shown, "queue": False, "show_progress": "hidden"}
        buttons["keep"].click(partial(decide, True), texts, **more)
        buttons["reject"].click(partial(decide, False), texts, **more)
        buttons["back"].click(lambda n, c, d: step(int(n), c, d, -1), [number, *filters], **more)
        buttons["next"].click(lambda n, c, d: step(int(n), c, d, 1), [number, *filters], **more)
        buttons["undecided"].click(lambda n, c, d: first(c, d, int(n)), [number, *filters], **more)
        buttons["write"].click(write, None, note, queue=False, show_progress="hidden")
        for each in filters:
            each.change(first, filters, **more)
        page.load(first, filters, **more)
    return page


def _passage(review: Review, number: int) -> str:
    """The passage with its evidence marked, as HTML."""
    shown, evidence = review.shown(number), html.escape(review.evidence(number))
    if shown.evidence:
        before, middle, after = (html.escape(part) for part in (shown.before, shown.evidence, shown.after))
        return f'<div class="text">{before}<mark>{middle}</mark>{after}</div>'
    text = f'<div class="text">{html.escape(shown.before)}</div>' if shown.before else ""
    return text + f"<p>证据：{evidence or '没有'}</p>"


def launch_page(review: Review, out: Path, *, port: int | None = None, browser: bool = True) -> Any:
    """Serves the page on this machine alone, in the background; the blocks, whose `close` ends it.

    Raises:
        MiniGLMError: Gradio is not installed, or the port is taken.
    """
    page = build_page(review, out)
    import gradio as gr

    # The default themes fetch their fonts from Google.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            inbrowser=browser,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=theme,
            css=_STYLE,
            js=_KEYS,
            ssr_mode=False,
            share=False,
            run_history=False,
        )
    except OSError:
        raise MiniGLMError(f"端口 {port} 用不了" if port else "找不到空的端口", fix="换一个 --port") from None
    return page
