"""The review page in a real browser: decisions by keyboard, kept at every key, and no request to anyone outside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import chromium
from playwright.sync_api import Browser, Dialog, Page, expect
from scripted_endpoint import facts_of, passage_text

from miniglm.corpus import load_books
from miniglm.qa.review import Review, decisions_file
from miniglm.qa.review_page import launch_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def rows() -> list[dict[str, Any]]:
    made = []
    for number in range(6):
        for place, fact in enumerate(facts_of(passage_text(number))):
            row = {"id": f"{number}-{place}", "chapter": number // 3 + 1, "question": fact["questions"][0]} | fact
            del row["questions"]
            made.append(row)
    made[3] |= {"evidence": "书里没有的话"}
    made[7] |= {"answer": "<b>店主</b>叫" + made[7]["keys"][0][0] + "<script>alert(1)</script>"}
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()), "utf-8")
    (tmp_path / "客店.txt").write_text(
        "\n".join(f"第{n // 3 + 1}回 客店\n" * (n % 3 == 0) + passage_text(n) for n in range(6)), "utf-8"
    )
    return path


def decisions(file: Path) -> list[tuple[str, str]]:
    """What is on the disk at this moment."""
    records = [json.loads(line) for line in decisions_file(file).read_text("utf-8").splitlines()]
    return [(record["verdict"], record["question"]) for record in records if "row" in record]


def at(page: Page, position: int, of: int = 12) -> None:
    expect(page.locator("#place")).to_contain_text(f"第 {position}/{of} 条")


def press(page: Page, key: str) -> None:
    page.keyboard.press(key)


def test_going_through_a_set_by_keyboard(browser: Browser, file: Path, tmp_path: Path) -> None:
    made, out = rows(), tmp_path / "out.jsonl"
    books = load_books([str(tmp_path / "客店.txt")])
    review = Review(file, books)
    blocks = launch_page(review, out, browser=False)
    asked: list[str] = []
    faults: list[str] = []

    def refuse(dialog: Dialog) -> None:
        faults.append(dialog.message)
        dialog.dismiss()

    try:
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", refuse)
        page.goto(blocks.local_url)
        at(page, 1)
        question, passage = page.locator("#question textarea"), page.locator("#passage")
        expect(question).to_have_value(made[0]["question"])
        expect(passage.locator("mark")).to_have_text(made[0]["evidence"])
        expect(passage).to_contain_text("平生最爱钓鱼")

        press(page, "k")
        at(page, 2)
        assert decisions(file) == [("keep", made[0]["question"])]
        press(page, "r")
        at(page, 3)
        press(page, "e")
        expect(question).to_be_focused()
        page.keyboard.press("Control+a")
        page.keyboard.insert_text("krkr 谁开的店？")  # letters that are keys outside of the box
        page.keyboard.press("Control+Enter")
        at(page, 4)
        assert decisions(file)[1:] == [("reject", made[1]["question"]), ("edit", "krkr 谁开的店？")]

        # Evidence that is not in the book is said, not marked.
        expect(page.locator("#place")).to_contain_text("证据不是原文")
        expect(passage.locator("mark")).to_have_count(0)
        press(page, "ArrowLeft")
        at(page, 3)
        expect(question).to_have_value("krkr 谁开的店？")
        press(page, "ArrowLeft")
        at(page, 2)
        expect(page.locator("#place")).to_contain_text("弃")
        press(page, "k")  # a change of mind
        at(page, 3)
        press(page, "u")
        at(page, 4)

        # Filters.
        page.locator("#doubt input").click()
        page.get_by_role("option", name="证据不是原文").click()
        at(page, 1, of=1)
        page.locator("#doubt input").click()
        page.get_by_role("option", name="全部").click()
        at(page, 4)
        page.locator("#chapter input").click()
        page.get_by_role("option", name="2", exact=True).click()
        at(page, 1, of=6)
        expect(question).to_have_value(made[6]["question"])
        page.locator("#chapter input").blur()
        press(page, "ArrowRight")
        at(page, 2, of=6)
        expect(page.locator("#answer textarea")).to_have_value(made[7]["answer"])

        # Nothing can be kept without an answer.
        page.locator("#answer textarea").fill("")
        page.keyboard.press("Escape")
        press(page, "k")
        expect(page.locator("#note textarea")).to_have_value("第 8 条的问题或答案是空的。写上再保留，或者弃掉")
        assert len(decisions(file)) == 4

        press(page, "w")
        expect(page.locator("#note textarea")).to_have_value(f"12 条写到 {out}，其中 9 条还没有看")
        page.close()
    finally:
        blocks.close(verbose=False)
        review.close()
    assert asked and all(url.startswith((blocks.local_url, "data:", "blob:")) for url in asked)
    assert faults == []
    written = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert written == [row | ({"question": "krkr 谁开的店？"} if n == 2 else {}) for n, row in enumerate(made)]

    # Another day: what was decided is there, also when the set has more rows.
    file.write_text(
        json.dumps(made[0] | {"question": "新的一条是什么？"}, ensure_ascii=False) + "\n" + file.read_text("utf-8"),
        "utf-8",
    )
    again = Review(file, books)
    assert {n: d.verdict for n, d in again.decisions.items()} == {1: "keep", 2: "keep", 3: "edit"}
    # What this review wrote before is written anew; what somebody else put there is kept.
    again.write(out)
    assert list(tmp_path.glob("out-*.jsonl")) == []
    out.write_text("别人的\n", "utf-8")
    assert again.write(out) == 13
    again.close()
    assert [path.read_text("utf-8") for path in tmp_path.glob("out-*.jsonl")] == ["别人的\n"]
