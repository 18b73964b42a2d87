"""The report's page in a real browser: what it shows, that it asks nobody for anything, and that texts stay texts."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import chromium
from playwright.sync_api import Browser, Dialog, Page
from report_sample import HTML, make_report

from miniglm.evaluation.compare import against
from miniglm.evaluation.pictures import draw_all
from miniglm.evaluation.report import write_page

Open = Callable[..., Page]

# Contrast by WCAG 2.2 (1.4.3) of every element with text of its own against the nearest background that is not clear.
CONTRAST = """() => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const poor = [];
  for (const element of document.body.querySelectorAll("*")) {
    if (!element.checkVisibility() || ![...element.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    let behind = element;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(light);
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) poor.push([element.textContent.slice(0, 30), contrast]);
  }
  return poor;
}"""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return make_report()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, report: dict[str, Any]) -> tuple[Path, list[str]]:
    """A folder with the report's pictures, and their names."""
    folder = tmp_path_factory.mktemp("report")
    return folder, draw_all(report, folder)


@pytest.fixture
def show(browser: Browser, drawn: tuple[Path, list[str]]) -> Iterator[Open]:
    """Writes a report's page and opens it; whatever the test, nothing may be asked for, go wrong or pop up."""
    faults: list[str] = []

    def refuse(dialog: Dialog) -> None:
        faults.append(dialog.message)
        dialog.dismiss()

    def open_page(report: dict[str, Any], *, width: int = 1280, color_scheme: Any = "light") -> Page:
        path = write_page(report, drawn[0], drawn[1] if report["splits"] else [])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=color_scheme)
        page.on("request", lambda request: faults.append(request.url))
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", refuse)
        page.goto(path.as_uri())
        faults[:] = [fault for fault in faults if fault != path.as_uri() and not fault.startswith("data:")]
        return page

    yield open_page
    assert faults == []


def column(page: Page, name: str) -> list[str]:
    place = page.locator("#columns th").evaluate_all(
        "(all, name) => all.findIndex(one => one.dataset.name === name)", name
    )
    return page.locator(f"#rows .row td:nth-child({place + 1})").all_inner_texts()


def rows_of(report: dict[str, Any], split: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = next(s["rows"] for s in report["splits"] if s["name"] == split)
    return found


def sideways(page: Page) -> int:
    found: int = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return found


def test_the_first_screen_says_how_good_and_compared_with_what(show: Open, report: dict[str, Any]) -> None:
    page = show(report)
    validation, unseen = (split["scores"]["key_accuracy"] for split in report["splits"][:2])
    assert page.locator("#heads .value").all_inner_texts() == [
        f"{100 * validation['mean']:.1f} %",
        f"{100 * unseen['mean']:.1f} %",
        "6.40",
    ]
    cards = page.locator("#heads .card").all_inner_texts()
    assert "BM25 基线" in cards[0] and "40 题" in cards[0] and "3 段" in cards[2]
    assert "447 万参数" in page.locator("#model").inner_text()
    assert page.title() == "demo 的评估报告"
    bottom = page.locator("#verdict").bounding_box()
    assert bottom is not None and bottom["y"] + bottom["height"] <= 800


def test_answers_that_are_the_same_by_design_are_explained(show: Open, report: dict[str, Any]) -> None:
    report = copy.deepcopy(report)
    report["leaks"]["splits"]["validation"] |= {"examples": 1587, "question": 0, "answer": 1587}
    said = show(report).locator("#verdict").inner_text()
    assert "没有一道题的问法在 200 道训练题里出现过" in said
    assert "1,587 题的答案与训练题相同" in said and "偏乐观" in said


def test_a_leaked_question_is_said_first_and_its_example_lies_open(show: Open, report: dict[str, Any]) -> None:
    report = copy.deepcopy(report)
    leak = {"kind": "question", "similarity": 0.91, "answer": "甲", "train_question": "乙", "train_answer": "丙"}
    report["leaks"]["splits"]["unseen"] |= {"question": 3, "shown": [leak | {"question": HTML}]}
    page = show(report)
    assert "有 3 道题的问法在训练题里出现过" in page.locator("#verdict p").first.inner_text()
    assert "bad" in (page.locator("#verdict").get_attribute("class") or "")
    assert "<b>粗</b>" in page.locator("#examples details[open] .leak").inner_text()


def test_an_earlier_run_is_compared_with(show: Open, report: dict[str, Any]) -> None:
    page = show(report | {"against": against(report, make_report("before", right_every=8))})
    assert "有差别（更好）" in page.locator("#heads .card").first.inner_text()
    assert "before" in page.locator("#against h2").inner_text()
    assert page.locator("#against tbody tr").count() == 4


def test_all_scores_stand_beside_each_other_and_say_what_they_are(show: Open, report: dict[str, Any]) -> None:
    page = show(report)
    head = page.locator("#all-scores thead tr").first.inner_text()
    assert all(title in head for title in ("验证题", "没见过的题", "训练题", "120 题里的 40 题"))
    line = page.locator("#all-scores tbody tr", has_text="困惑度/token（对 token 平均）")
    about = line.locator("details p")
    assert "对 token 平均" in line.locator("th small").inner_text() and not about.is_visible()
    line.locator("summary").click()
    assert "完整分布" in about.inner_text()
    assert "自信" in page.locator("#measured").inner_text()
    assert page.locator("#figures figure").count() == 6


def test_the_worst_come_first_and_more_in_steps(show: Open) -> None:
    report = make_report(count=150)
    page = show(report)
    assert page.locator("#rows .row").count() == 20
    expected = sorted(
        rows_of(report, "validation"),
        key=lambda row: (row["right"], row["scores"]["rouge_l"], -row["scores"]["perplexity_token"], row["number"]),
    )
    assert column(page, "place") == [f"验证题 {row['number']}" for row in expected[:20]]
    page.locator("#more").click()
    assert page.locator("#rows .row").count() == 120
    page.locator("#more").click()
    assert page.locator("#rows .row").count() == 171 and not page.locator("#more").is_visible()


def test_every_column_sorts_both_ways(show: Open, report: dict[str, Any]) -> None:
    page = show(report)
    number = {"rouge_l": float, "perplexity": float, "chapter": int}
    for name in page.locator("#columns th").evaluate_all("all => all.map(one => one.dataset.name)"):
        head = page.locator(f"#columns th[data-name={name}]")
        found = {}
        for direction in ("ascending", "descending"):
            head.locator("button").click()
            assert head.get_attribute("aria-sort") == direction
            page.locator("#more").click()
            found[direction] = column(page, name)
            if name in number:
                values = [number[name](re.sub(r"[^\d.]", "", cell)) for cell in found[direction]]
                assert values == sorted(values, reverse=direction == "descending")
        assert sorted(found["ascending"]) == sorted(found["descending"]) and len(found["ascending"]) == 61
        assert found["ascending"] != found["descending"]
    page.locator("#order").select_option("worst")
    assert "最差的在前" in page.locator("#found").inner_text()


def test_search_and_filters_work_together(show: Open, report: dict[str, Any]) -> None:
    page = show(report)
    wanted = rows_of(report, "unseen")[3]["question"]
    page.locator("#search").fill(f" {wanted.upper()} ")
    assert wanted in column(page, "question")
    page.locator("#search").fill("没有哪道题有这句话")
    assert page.locator("#rows .row").count() == 0 and "有 0 题符合" in page.locator("#found").inner_text()
    page.locator("#search").fill("")
    page.locator("#split").select_option("unseen")
    assert (
        all(cell.startswith("没见过的题") for cell in column(page, "place"))
        and page.locator("#rows .row").count() == 12
    )
    page.locator("#right").select_option("right")
    right = [row for row in rows_of(report, "unseen") if row["right"] == 1]
    assert page.locator("#rows .row").count() == len(right) > 0
    page.locator("#right").select_option("wrong")
    assert page.locator("#rows .row").count() == 12 - len(right)


def test_a_row_opens_to_all_that_is_known(show: Open, report: dict[str, Any]) -> None:
    page = show(report)
    row = next(r for r in rows_of(report, "validation") if r["right"] == 0 and r["answers"][0] and r["baseline"])
    page.locator("#search").fill(row["question"])
    button = page.locator("#rows .open").first
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    shown = page.locator("#rows .detail").inner_text()
    told = (row["answers"][0], row["reference"], row["baseline"], row["baseline_question"], row["with_book"]["shown"])
    assert all(text in shown for text in told)
    hits = page.locator("#rows .chip.good").count(), page.locator("#rows .chip.bad").count()
    assert hits == (sum(row["hits"]), len(row["hits"]) - sum(row["hits"]))
    page.keyboard.press("Enter")
    assert page.locator("#rows .detail").count() == 0


def test_html_in_an_answer_stays_text(show: Open, report: dict[str, Any]) -> None:
    page = show(report | {"name": "<i>名</i>"})
    assert page.locator("#name").inner_text() == "<i>名</i> 的评估报告"
    page.locator("#search").fill("onerror")
    page.locator("#split").select_option("validation")
    page.locator("#rows .row").click()
    assert page.locator("#rows .detail .text").first.evaluate("element => element.textContent") == HTML
    assert page.locator("#questions img, #questions b b, #questions script").count() == 0


@pytest.mark.parametrize("width", [390, 760, 1280])
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_it_can_be_read_on_any_screen(show: Open, report: dict[str, Any], width: int, color_scheme: str) -> None:
    page = show(report, width=width, color_scheme=color_scheme)
    for row in page.locator("#rows .row").all()[:12]:
        row.click()
    assert "Cao" * 200 in page.locator("#rows").inner_text()
    assert sideways(page) == 0
    cut_off = page.locator("body *").evaluate_all(
        "(all, width) => all.filter(one => one.checkVisibility() && one.getBoundingClientRect().right > width + 1"
        " && !one.closest('nav, thead')).map(one => one.outerHTML.slice(0, 80))",
        width,
    )
    assert cut_off == []
    assert page.evaluate(CONTRAST) == []


def test_numbers_that_are_none_are_shown_as_such(show: Open, report: dict[str, Any]) -> None:
    report = copy.deepcopy(report)
    rows_of(report, "validation")[0]["scores"] |= {"perplexity_token": float("inf"), "length_ratio": float("nan")}
    page = show(report)
    page.locator("#search").fill(rows_of(report, "validation")[0]["question"])
    assert column(page, "perplexity")[0].endswith("—")


def test_a_set_without_keys_or_training_questions(show: Open, report: dict[str, Any]) -> None:
    report = copy.deepcopy(report) | {"text": None, "leaks": None, "self_perplexity": None, "losses": {}}
    split = report["splits"][0] | {"name": "given", "title": "给定的题", "baseline": None, "with_keys": 0}
    split["scores"] = {name: value for name, value in split["scores"].items() if name != "key_accuracy"}
    for row in split["rows"]:
        row |= {"keys": [], "hits": [], "right": None, "chapter": None, "baseline": "", "baseline_question": ""}
        row |= {"baseline_right": None, "answers": [row["answers"][0], "第二次的答案"], "finish_reasons": ["stop"] * 2}
    report["splits"] = [split | {"by_chapter": []}]
    page = show(report)
    assert "ROUGE-L" in page.locator("#heads .card").first.inner_text() and page.locator("#heads .card").count() == 3
    assert "没有做泄漏检查" in page.locator("#verdict").inner_text()
    assert not page.locator("#right").is_visible() and not page.locator("#split").is_visible()
    names = page.locator("#columns th").all_inner_texts()
    assert [name.strip() for name in names] == ["题", "问题", "模型的答案", "ROUGE-L", "困惑度"]
    page.locator("#rows .row").first.click()
    assert "第二次的答案" in page.locator("#rows .detail").inner_text()


def test_a_report_of_a_text_alone(show: Open, report: dict[str, Any]) -> None:
    speed = report["speed"] | {"questions": 0}
    page = show(report | {"splits": [], "leaks": None, "self_perplexity": None, "losses": {}, "speed": speed})
    assert page.locator("#heads .value").all_inner_texts() == ["6.40"]
    assert page.locator("section").count() == 1
