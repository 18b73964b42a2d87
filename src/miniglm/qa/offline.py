"""Questions and answers from a book's text by rules alone, where there is no model to ask.

Four rules hold without understanding the text: who says a quotation (「某某曰」 before it), which line of verse follows
another, which name is missing from a sentence, and which chapter has a title. What they make is plain, and labelled as
such (`"source": "offline"`). Knows nothing of runs or models.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniglm.corpus.cleaning import Book, Paragraph, sentences
from miniglm.errors import MiniGLMError
from miniglm.qa.formats import write_jsonl
from miniglm.qa.spread import spread

SOURCE = "offline"
FEWEST = 40
"""Facts without which there is nothing to learn to answer."""
MOST = {"speaker": 700, "verse": 400, "name": 500, "chapter": 300}
"""Facts of each rule at most; of more an even spread over the book is taken. Together about as many as the shipped set."""
UNSEEN = 10
"""Every so manieth fact is asked about in evaluation only."""

TEMPLATES = {
    "speaker": (
        "“{given}”这句话是谁说的？",
        "{book}里，谁说过“{given}”？",
        "“{given}”出自哪个人物之口？",
        "说“{given}”的人是谁？",
    ),
    "verse": (
        "“{given}”的下一句是什么？",
        "{book}里的“{given}”，后面接的是哪一句？",
        "请接下一句：“{given}”",
        "“{given}”，紧接着的一句怎么说？",
    ),
    "name": (
        "“{given}”里的空格应填谁的名字？",
        "{book}写道：“{given}”空着的是谁？",
        "请填空：“{given}”",
        "“{given}”这一句说的＿＿是哪个人？",
    ),
    "chapter": (
        "“{given}”是{book}第几{unit}的标题？",
        "{book}哪一{unit}的标题里有“{given}”？",
        "“{given}”讲的事在第几{unit}？",
        "标题里有“{given}”的是哪一{unit}？",
    ),
}
ANSWERS = {  # what decides comes first: a small model has it before it tires of copying
    "speaker": "是{key}说的：“{given}”",
    "verse": "下一句是“{key}”，接在“{given}”后面。",
    "name": "空着的名字是{key}，原文是：“{whole}”",
    "chapter": "在{key}，标题里有“{given}”。",
}
BLANK = "＿＿"


@dataclass(frozen=True, slots=True)
class Fact:
    """What a rule found.

    Attributes:
        rule: a key of `TEMPLATES`.
        given: what the question quotes.
        key: what decides the answer.
        evidence: verbatim from the book.
        paragraph: where it stands.
        group: facts that give each other away share it.
        also: other forms of the key that are as right.
        words: further words for the templates.
    """

    rule: str
    given: str
    key: str
    evidence: str
    paragraph: Paragraph
    group: str
    also: tuple[str, ...] = ()
    words: tuple[tuple[str, str], ...] = ()


_HAN = "\u3400-\u9fff\uf900-\ufaff"
_SAYS = "曰|云|道|[说說笑问問答]道|[说說问問]"
_SAID = re.compile(
    rf"(?:^|(?<=[。！？；，、：”’』」…—\s]))(?P<who>[{_HAN}]{{2,12}}?)(?:{_SAYS})[：:，]\s*[“「\"](?P<what>[^”」\"]+)[”」\"]"
)
# What stands between a name and 曰 or 道: how it was said, and what was done meanwhile.
_MANNER = "大厉冷微点摇拍起回赶因也都只又便即乃亦急忙连低高含陪慢轻说笑哭泣叹怒喝骂问答喊叫应谢告谏奏禀报劝曰道忽正早先再方才却遂就则复皆"
_NO_NAME = re.compile(
    "[我你您他她它谁这那其之者众某吾汝皆人们的了着不是被把且却]"
    "|[喜惊声谓呼官卒叱付伏仰来听]|[臣士子将令面]$|口[内里]|[点摇回]头|拍手|半[晌日]|只得|大家|^嬷嬷$|洞主|哨马|左右|军士|小校|百姓|先生|丫头|丫鬟|婆子|媳妇|老爷|太太|奶奶|姑娘|妈妈|小厮|太医|主公|丞相|将军|太守|夫人|陛下"
    "|探马|细作|忽报|自思|自言|暗想|心中|诗曰|古语|俗语|常言|正是|听说|听见|听了|只听|只见|说罢|看官|后来|前日|今日"
)


def _names(paragraphs: Iterable[Paragraph], text: str) -> list[str]:
    """Who speaks in the book: two to four characters that stand right before 曰 or 道 and a quotation again and
    again, and elsewhere too. Most frequent first."""
    spoken: Counter[str] = Counter()
    for paragraph in paragraphs:
        for match in _SAID.finditer(paragraph.text):
            who = match["who"]
            while len(who) > 2 and who[-1] in _MANNER:
                who = who[:-1]
            if 2 <= len(who) <= 4 and not _NO_NAME.search(who) and who[-1] not in _MANNER:
                spoken[who] += 1
    often = {who: n for who, n in spoken.items() if n >= 3 and text.count(who) >= 2 * n}
    # 「玄德大喜」 begins with a name that is known without the rest, 「向宝玉」 ends with one.
    return [
        who
        for who in sorted(often, key=lambda who: -often[who])
        if not any(who != other and who.startswith(other) and often[other] > often[who] for other in often)
        and not (who[0] in "向对" and who[1:] in often)
    ]


def _kin(name: str, names: Sequence[str]) -> tuple[str, ...]:
    """Longer and shorter forms of a name: 林黛玉 and 黛玉."""
    return tuple(n for n in names if n != name and (name.endswith(n) or n.endswith(name)))


def _speakers(paragraphs: Sequence[Paragraph], names: Sequence[str]) -> Iterator[Fact]:
    by_length = sorted(names, key=len, reverse=True)
    for paragraph in paragraphs:
        for match in _SAID.finditer(paragraph.text):
            who = next((name for name in by_length if match["who"].startswith(name)), None)
            between = "" if who is None else match["who"][len(who) :]
            if who is None or any(name in between for name in names) or set("与和谓对问") & set(between):
                continue
            given = _beginning(match["what"])
            also = _kin(who, names)
            if (
                given
                and not any(char in given for char in "“”「」")
                and not any(name in given for name in (who, *also))
            ):
                start = match.start("what") + len(given)
                evidence = paragraph.text[match.start("who") : start]
                yield Fact("speaker", given, who, evidence, paragraph, given, also)


def _beginning(quotation: str, shortest: int = 8, longest: int = 36) -> str:
    """As many whole clauses of a quotation as fit into the length; "" where none does."""
    ends = [match.start() for match in re.finditer("[，。！？；：]", quotation)]
    fitting = [end for end in ends if shortest <= end <= longest]
    if shortest <= len(quotation) <= longest:
        return quotation.rstrip("。，；")
    return quotation[: fitting[-1]] if fitting else ""


_CLAUSE = re.compile(rf"[{_HAN}]+|[^{_HAN}]+")


def _verses(paragraphs: Sequence[Paragraph]) -> Iterator[Fact]:
    """Lines of five or seven characters in pairs: four or more in a row, or two that stand by themselves."""
    for paragraph in paragraphs:
        if paragraph.text == paragraph.chapter:
            continue
        for run in _regular_runs(paragraph.text):
            for first, second in zip(run[::2], run[1::2], strict=True):
                given, key = first[0], second[0]
                between = paragraph.text[first[1] + len(given) : second[1]]
                if re.search("[。！？；]", between) or re.search("[的了么呢吗]", given + key):
                    continue  # the run began with a line of prose, or is prose
                evidence = paragraph.text[first[1] : second[1] + len(key)]
                yield Fact("verse", given, key, evidence, paragraph, run[0][0])


def _regular_runs(text: str) -> Iterator[list[tuple[str, int]]]:
    """Runs of an even number of clauses of one length with where each begins."""
    run: list[tuple[str, int]] = []
    opened, gap = True, ""

    def whole(closed: bool) -> bool:
        return len(run) % 2 == 0 and (len(run) >= 4 or (len(run) == 2 and opened and closed))

    for match in [*_CLAUSE.finditer(text), None]:
        piece = "" if match is None else match[0]
        if match is not None and not re.match(f"[{_HAN}]", piece):
            if run and not re.fullmatch(r"[，。！？；、\s]+", piece):
                if whole(closed=True):
                    yield run
                run = []
            gap = piece
            continue
        if run and (match is None or len(piece) != len(run[0][0])):
            if whole(closed=match is None or "\n" in gap):
                yield run
            run = []
        if match is not None and len(piece) in (5, 7):
            if not run:
                opened = match.start() == 0 or gap.rstrip().endswith(("：", "“", "\n"))
            run.append((piece, match.start()))


_NOT_NARRATION = re.compile("[“”「」：‘’（）]|下文|下回|分解")


def _missing_names(paragraphs: Sequence[Paragraph], names: Sequence[str]) -> Iterator[Fact]:
    """Sentences of the narration that name one person, once."""
    pattern = re.compile("|".join(sorted(map(re.escape, names), key=len, reverse=True)))
    for paragraph in paragraphs:
        if paragraph.text == paragraph.chapter:
            continue
        for sentence in sentences(paragraph.text):
            whole = sentence.strip().rstrip("；，")
            found = pattern.findall(whole)
            if len(found) != 1 or not 14 <= len(whole) <= 40 or _NOT_NARRATION.search(whole):
                continue
            given = whole.replace(found[0], BLANK)
            words = (("whole", whole),)
            yield Fact("name", given, found[0], whole, paragraph, whole, _kin(found[0], names), words)


_NUMBER = re.compile(r"(?P<number>第\s*[^\s第]{1,9}?\s*(?P<unit>[回章节卷部集篇折幕话]))[\s　:：.、]*(?P<title>.+)")


def _chapters(paragraphs: Sequence[Paragraph]) -> Iterator[Fact]:
    """Titles to the numbers of their chapters, and of a title in two halves the second to the first."""
    for paragraph in paragraphs:
        match = _NUMBER.fullmatch(paragraph.text) if paragraph.text == paragraph.chapter else None
        if match is None:
            continue
        parts = [part for part in re.split(r"[\s　，,；;]+", match["title"]) if len(part) >= 4]
        words = (("unit", match["unit"]),)
        for part in parts:
            key = "".join(match["number"].split())
            yield Fact("chapter", part, key, paragraph.text, paragraph, paragraph.text, (), words)
        if len(parts) == 2 and len(parts[0]) == len(parts[1]):
            yield Fact("verse", parts[0], parts[1], paragraph.text, paragraph, paragraph.text)


def find_facts(book: Book) -> list[Fact]:
    """All that the rules find in a book and that one question has one answer to, in the book's order."""
    paragraphs = book.paragraphs
    names = _names(paragraphs, "\n".join(p.text for p in paragraphs))
    found = [*_chapters(paragraphs), *_verses(paragraphs)]
    if names:
        found += [*_speakers(paragraphs, names), *_missing_names(paragraphs, names)]
    answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in found:
        answers[fact.rule, fact.given].add(fact.key)
    chosen: list[Fact] = []
    for rule, most in MOST.items():
        single = {f.given: f for f in reversed(found) if f.rule == rule and len(answers[rule, f.given]) == 1}
        ordered = sorted(single.values(), key=lambda fact: fact.paragraph.number)
        chosen += spread(ordered, most)
    return sorted(chosen, key=lambda fact: fact.paragraph.number)


def fact_rows(fact: Fact) -> list[dict[str, Any]]:
    """A fact as rows of a set, one a phrasing."""
    words = {"given": fact.given, "key": fact.key, "book": f"《{fact.paragraph.book}》"} | dict(fact.words)
    name = hashlib.sha256(f"{fact.paragraph.book}\n{fact.rule}\n{fact.given}".encode()).hexdigest()[:12]
    return [
        {
            "id": f"{fact.rule}-{name}",
            "chapter": fact.paragraph.chapter_number,
            "question": template.format(**words),
            "answer": ANSWERS[fact.rule].format(**words),
            "keys": [[fact.key, *fact.also]],
            "evidence": fact.evidence,
            "source": SOURCE,
        }
        for template in TEMPLATES[fact.rule]
    ]


def offline_sets(books: Sequence[Book], seed: int = 1337) -> dict[str, list[dict[str, Any]]]:
    """Rows for `train`, `validation` and `unseen`, as the shipped set has them.

    Of every fact that is taught, one phrasing is kept for validation, another one each time; every tenth group of facts
    is asked about in `unseen` only.

    Raises:
        MiniGLMError: the rules find too little.
    """
    facts = [fact for book in books for fact in find_facts(book)]
    if len(facts) < FEWEST:
        raise MiniGLMError(
            f"规则只在书里找到 {len(facts)} 个可问的事实，至少要 {FEWEST} 个",
            path="、".join(book.source for book in books),
            fix="去掉 --offline 训练一个只会续写的模型，或用 --qa 给出问答（miniglm qa synthesize 可以生成）",
        )
    groups = list(dict.fromkeys(fact.group for fact in facts))
    random.Random(seed).shuffle(groups)
    unseen = set(groups[::UNSEEN])
    sets: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "unseen": []}
    for number, fact in enumerate(facts):
        rows = fact_rows(fact)
        if fact.group in unseen:
            sets["unseen"] += rows
        else:
            sets["validation"].append(rows.pop(number % len(rows)))
            sets["train"] += rows
    return sets


def write_offline_sets(sets: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """Writes what `offline_sets` made: train.jsonl, validation.jsonl and unseen.jsonl.

    Raises:
        MiniGLMError: a file cannot be written.
    """
    for name, rows in sets.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
