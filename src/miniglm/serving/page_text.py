"""Every text of the page in Chinese and English, and how facts are put into words. Knows nothing of Gradio."""

from __future__ import annotations

from html import escape
from typing import Literal

from miniglm.serving.about import Facts

Language = Literal["zh-CN", "en"]
LANGUAGES: tuple[Language, ...] = ("zh-CN", "en")

TEXTS: dict[str, tuple[str, str]] = {
    # key: (Chinese, English)
    "ask_tab": ("问答", "Ask"),
    "continue_tab": ("续写", "Continue"),
    "conversation": ("对话", "Conversation"),
    "question": ("问题", "Question"),
    "question_hint": ("问一个关于书的问题", "Ask about the book"),
    "send": ("发送", "Send"),
    "stop": ("停止", "Stop"),
    "clear": ("清空对话", "Clear conversation"),
    "start": ("开头", "Beginning"),
    "start_hint": ("写下开头，例如：却说曹操引军", "Write a beginning, for example: 却说曹操引军"),
    "continue": ("续写", "Continue"),
    "continuation": ("续写的文字", "Continuation"),
    "copy": ("复制", "Copy"),
    "continuation_hint": ("模型接着往下写的文字会出现在这里", "What the model writes will appear here"),
    "settings": ("采样设置", "Sampling settings"),
    "look_up": ("到书里查", "Look it up in the book"),
    "shut": ("合上", "Close"),
    "max_tokens": ("最长", "Longest answer"),
    "max_tokens_about": (
        "最多写多少个 token，一个 token 约一到两个字。写完了会提早停。",
        "At most so many tokens, of one or two characters each. It stops earlier when it is done.",
    ),
    "temperature": ("温度", "Temperature"),
    "temperature_about": (
        "0 总取最有把握的字，同一问题答案相同；越大越多变，也越容易胡说。",
        "0 always takes the likeliest token: the same question, the same answer. Higher varies more, and errs more.",
    ),
    "top_p": ("top-p", "top-p"),
    "top_p_about": (
        "只在概率合计达到这么多的候选里选；1 为不限。温度为 0 时不起作用。",
        "Choose among the likeliest tokens that together have this probability; 1 is all. No effect at temperature 0.",
    ),
    "top_k": ("top-k", "top-k"),
    "top_k_about": (
        "只在最有把握的这么多个候选里选；0 为不限。温度为 0 时不起作用。",
        "Choose among so many of the likeliest tokens; 0 is all. No effect at temperature 0.",
    ),
    "repetition_penalty": ("重复惩罚", "Repetition penalty"),
    "repetition_penalty_about": (
        "大于 1 时，写过的字更难再出现，可减少来回重复；1 为不罚。",
        "Above 1, tokens already used become less likely, which stops loops; 1 changes nothing.",
    ),
    "seed": ("随机种子", "Seed"),
    "seed_about": (
        "填一个整数，同样的设置会写出同样的文字；留空则每次不同。",
        "With a whole number the same settings write the same text; empty is different each time.",
    ),
    "seed_hint": ("每次不同", "different each time"),
    # Gradio's own labels, by its own keys
    "chatbot.copy_message": ("复制", "Copy"),
    "chatbot.copied_message": ("已复制", "Copied"),
    "chatbot.retry": ("重新回答", "Answer again"),
    "chatbot.edit": ("修改问题", "Edit the question"),
    "chatbot.submit": ("提交修改", "Submit the change"),
    "chatbot.cancel": ("不改了", "Cancel"),
    "chatbot.like": ("赞", "Like"),
    "chatbot.dislike": ("踩", "Dislike"),
    "chatbot.clear": ("清空对话", "Clear conversation"),
}

MESSAGES: dict[str, tuple[str, str]] = {
    "empty": ("先写一个问题。", "Write a question first."),
    "no_start": ("先写一个开头。", "Write a beginning first."),
    "too_long": (
        "太长了：{found:,} 个字，最多 {limit:,} 个（上限 max_prompt_characters）。",
        "Too long: {found:,} characters, at most {limit:,} (limit max_prompt_characters).",
    ),
    "no_passage": ("书里没有这个地方", "There is no such place in the book"),
    "failed": (
        "出了意外的错（{kind}），服务器的终端里有详情。请再试一次。",
        "Something unexpected went wrong ({kind}); the server's terminal says more. Please try again.",
    ),
    "nothing": ("模型什么也没有写。", "The model wrote nothing."),
    "waiting": ("等待第一个字……", "Waiting for the first character…"),
    "speed": (
        "首字 {first} 秒 · 每秒 {rate} 字 · 共 {characters:,} 字",
        "first character {first} s · {rate} characters/s · {characters:,} characters",
    ),
    "at_once": ("用时 {first} 秒 · 共 {characters:,} 字", "{first} s · {characters:,} characters"),
    "again": (" · 重答用了温度 {temperature}", " · answered again at temperature {temperature}"),
    "liked": ("已记下：赞", "Noted: liked"),
    "disliked": ("已记下：踩", "Noted: disliked"),
    "taken_back": ("已收回评价", "Taken back"),
    "not_rated": ("这不是模型的回答，没有记下评价", "Not an answer of the model; nothing noted"),
    "rating_failed": ("评价没有记下：{why}", "The rating was not noted: {why}"),
    "no_feedback": ("这个服务器不记录评价", "This server keeps no ratings"),
}
"""Said by the server while the page is in use; `message` fills them in."""


def message(key: str, language: Language, **values: object) -> str:
    """One line for the reader, plain text."""
    return MESSAGES[key][LANGUAGES.index(language)].format(**values)


def translations(facts: Facts) -> dict[str, dict[str, str]]:
    """All texts that Gradio translates in the browser, by language."""
    return {
        language: {key: texts[number] for key, texts in TEXTS.items()} | _of_facts(facts, language)
        for number, language in enumerate(LANGUAGES)
    }


def title(facts: Facts, language: Language) -> str:
    """What the page is called, plain text."""
    if not facts.books:
        return facts.name
    if language == "en":
        return f"Ask about {'、'.join(f'《{book}》' for book in facts.books[:2])}"
    more = f"等 {len(facts.books)} 部书" if len(facts.books) > 2 else ""
    return f"{''.join(f'《{book}》' for book in facts.books[:2])}{more}问答"


def _of_facts(facts: Facts, language: Language) -> dict[str, str]:
    zh = language == "zh-CN"
    other = '<a class="language" href="?__lang={}" lang="{}" hreflang="{}">{}</a>'
    switch = other.format(*(("en",) * 3), "English") if zh else other.format("zh-CN", "zh", "zh", "中文")
    lines = [line for line in (_model(facts, zh), _score(facts, zh)) if line]
    about = "".join(f"<p>{line}</p>" for line in lines)
    return {
        "header": f'<header><div class="top"><h1>{escape(title(facts, language))}</h1>{switch}</div>{about}</header>',
        "welcome": _welcome(zh, facts.looks_up),
        "continue_about": (
            "给一个开头，模型按书里的笔法往下写。它只看开头的末尾一段，写的是虚构，不是原文。"
            if zh
            else "Give it a beginning and the model goes on in the book's style. It reads only the last part of it, "
            "and what it writes is invented."
        ),
    }


def _welcome(zh: bool, looks_up: bool) -> str:
    if looks_up and zh:
        return (
            "<h2>问一个关于书的问题</h2><p>每个问题先到书里查，答案带出处，查不到就说没有。"
            "不选「到书里查」时由模型凭记忆回答，它会很有把握地答错。</p>"
        )
    if looks_up:
        return (
            "<h2>Ask about the book</h2><p>Each question is looked up in the book first, and the answer says where it "
            "comes from. Without that the model answers from memory, and is wrong with great confidence.</p>"
        )
    if zh:
        return (
            "<h2>问一个关于书的问题</h2><p>每个问题单独回答，不看前面的对话。小模型会很有把握地答错，请对照原书。</p>"
        )
    return (
        "<h2>Ask about the book</h2><p>Each question stands alone; earlier ones are not read. A small model is wrong "
        "with great confidence: check it against the book.</p>"
    )


def _model(facts: Facts, zh: bool) -> str:
    parts = [f"<strong>{escape(facts.name)}</strong>"]
    if facts.parameters:
        millions = f"{facts.parameters / 1e6:,.1f}"
        parts.append(
            f"{facts.parameters / 1e4:,.0f} 万参数"
            if zh and facts.parameters < 1e8
            else f"{facts.parameters / 1e8:,.1f} 亿参数"
            if zh
            else f"{millions} M parameters"
        )
    if facts.layers:
        parts.append(f"{facts.layers} 层" if zh else f"{facts.layers} layer{'s' * (facts.layers > 1)}")
    if facts.context:
        parts.append(f"一次能读 {facts.context:,} 个 token" if zh else f"reads {facts.context:,} tokens at a time")
    return " · ".join(parts)


def _score(facts: Facts, zh: bool) -> str:
    parts = []
    for score in facts.scores:
        share = f"{100 * score.mean:.1f}"
        name = _SPLITS.get(score.split, (score.split, score.split))[0 if zh else 1]
        if score.book is not None:
            found = f"{100 * score.book:.1f}"
            parts.append(
                f"{escape(name)}答对 <strong>{found}&nbsp;%</strong>，只凭模型 {share}&nbsp;%（{score.questions:,} 题）"
                if zh
                else f"{escape(name)}: <strong>{found}&nbsp;%</strong> right, {share}&nbsp;% from the model alone "
                f"({score.questions:,} questions)"
            )
            continue
        parts.append(
            f"{escape(name)}答对 <strong>{share}&nbsp;%</strong>（{score.questions:,} 题）"
            if zh
            else f"{escape(name)}: <strong>{share}&nbsp;%</strong> right ({score.questions:,} questions)"
        )
    if facts.has_report:
        parts.append(f'<a href="/report" target="_blank">{"完整的评估报告" if zh else "full report (Chinese)"}</a>')
    return " · ".join(parts)


_SPLITS = {
    "validation": ("新问法", "taught facts in new words"),
    "unseen": ("没教过的事实", "facts never taught"),
    "given": ("给定的题", "given questions"),
}
