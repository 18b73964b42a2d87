"""Synthesis against a real HTTP server that answers as scripted: whatever goes wrong, no accepted row is lost or
doubled and every rejected row has its reason."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import fails, miniglm
from scripted_endpoint import FALSE_REASONS, GOOD, Script, ScriptedEndpoint, facts_of, passage_text
from typer.testing import CliRunner

from miniglm.cli import app
from miniglm.corpus import Book, load_books
from miniglm.errors import MiniGLMError
from miniglm.qa.endpoint import OWN, PRESETS, Endpoint, read_key
from miniglm.qa.formats import Example, read_examples
from miniglm.qa.grounding import find_verbatim, parse_facts, parse_json
from miniglm.qa.keys import holds_keys
from miniglm.qa.passages import cut_passages
from miniglm.qa.synthesis import Budget, Price, Settings, Synthesis, read_seeds, rejected_file, work_folder
from miniglm.qa.text import fold

KEY = "sk-test-1234567890abcdef"
SETTINGS = Settings("scripted", passage=120, facts=2, phrasings=2)


@pytest.fixture(scope="session")
def seeds() -> list[Example]:
    return read_seeds(None)


def make_book(folder: Path, passages: int) -> Path:
    """A book of which every paragraph becomes a passage of its own."""
    path = folder / "客店.txt"
    lines = [f"第{n // 5 + 1}回 客店\n" * (n % 5 == 0) + passage_text(n) for n in range(passages)]
    path.write_text("\n".join(lines), "utf-8")
    return path


@pytest.fixture
def book(tmp_path: Path) -> list[Book]:
    return load_books([str(make_book(tmp_path, 12))])


def run(
    made: Synthesis,
    server: ScriptedEndpoint,
    *,
    key: str = "",
    at_once: int = 4,
    timeout: float = 60.0,
    **more: Any,
) -> tuple[str, Endpoint]:
    endpoint = Endpoint(server.base_url, "scripted", key, timeout=timeout, first_wait=0.01)

    async def go() -> str:
        try:
            return await made.run(endpoint, at_once=at_once, **more)
        finally:
            await endpoint.close()

    return asyncio.run(go()), endpoint


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def expected(passages: int) -> Counter[str]:
    return Counter(q for n in range(passages) for fact in facts_of(passage_text(n)) for q in fact["questions"])


def questions(path: Path) -> Counter[str]:
    return Counter(row["question"] for row in lines(path))


def at(*faults: str, then: str = GOOD) -> Script:
    """Every passage meets the faults in this order, then goes well."""
    return lambda passage, before: faults[before] if before < len(faults) else then


def test_a_good_endpoint(tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint(key=KEY) as server:
        stopped, _ = run(Synthesis(book, seeds, SETTINGS, out), server, key=KEY)
    assert stopped == ""
    assert questions(out) == expected(12)
    rows = lines(out)
    text = "\n".join(p.text for p in book[0].paragraphs)
    assert all(row["evidence"] in text and holds_keys(row["answer"], row["keys"]) for row in rows)
    assert all(row["source"] == "scripted" for row in rows)
    assert [row["chapter"] for row in rows] == [1] * 20 + [2] * 20 + [3] * 8
    assert len({row["id"] for row in rows}) == 24  # two questions a fact
    assert len(read_examples(out).examples) == 48
    body, headers = server.bodies[0], server.headers[0]
    assert body["response_format"]["type"] == "json_schema"
    assert sum(seed.answer in body["messages"][0]["content"] for seed in seeds) >= 3
    assert not headers.get("OpenAI-Organization") and not headers.get("OpenAI-Project")
    assert rejected_file(out).read_text("utf-8") == ""


FAULTS = ("429", "429 after 0", "500", "503", "cut", "hang", "html", "malformed")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_once_goes_well_the_next_time(
    fault: str, tmp_path: Path, book: list[Book], seeds: list[Example]
) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint(at(fault)) as server:
        stopped, endpoint = run(
            Synthesis(book, seeds, SETTINGS, out), server, at_once=12, timeout=2.0 if fault == "hang" else 60.0
        )
    assert stopped == "" and set(server.asked.values()) == {2}
    assert questions(out) == expected(12)
    assert endpoint.retries == (0 if fault == "malformed" else 12)


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_honoured(date: bool, tmp_path: Path, seeds: list[Example]) -> None:
    book = load_books([str(make_book(tmp_path, 1))])
    # A date has whole seconds: two from now are more than one away.
    asked = formatdate(time.time() + 2, usegmt=True) if date else "1"
    begun = time.monotonic()
    with ScriptedEndpoint(at(f"429 after {asked}")) as server:
        run(Synthesis(book, seeds, SETTINGS, tmp_path / "set.jsonl"), server)
    assert time.monotonic() - begun > 0.9
    assert questions(tmp_path / "set.jsonl") == expected(1)


def test_what_is_false_is_rejected_with_its_reason(tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint(lambda passage, before: "false") as server:
        made = Synthesis(book[:1], seeds, SETTINGS, out)
        run(made, server)
    rejected = lines(rejected_file(out))
    # The first four facts keep both of their good questions, of which each is rejected.
    doubled = [reason for reason in FALSE_REASONS for _ in range(2 if FALSE_REASONS.index(reason) < 3 else 1)]
    per_passage = Counter(doubled) + Counter({"太长或太短": 1})
    assert Counter(row["reason"] for row in rejected) == Counter({k: 12 * n for k, n in per_passage.items()})
    assert out.read_text("utf-8") == "" and made.progress.reasons == Counter(row["reason"] for row in rejected)


def test_an_endpoint_without_schemas(tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    for name, kinds in (
        ("no schema", ["json_schema", "json_object"]),
        ("no json", ["json_schema", "json_object", None]),
    ):
        out = tmp_path / f"{name}.jsonl"
        with ScriptedEndpoint(lambda passage, before, name=name: name) as server:  # type: ignore[misc]
            stopped, _ = run(Synthesis(book, seeds, SETTINGS, out), server, at_once=1)
        assert stopped == "" and questions(out) == expected(12)
        asked = [body.get("response_format", {}).get("type") for body in server.bodies]
        assert asked == kinds + [kinds[-1]] * 11  # learnt once


def test_a_model_that_refuses_the_usual_parameters(tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint(lambda passage, before: "reasoning model") as server:
        stopped, _ = run(Synthesis(book, seeds, SETTINGS, out), server, at_once=6)
    assert stopped == "" and questions(out) == expected(12)
    assert {"max_completion_tokens", "response_format"} <= server.bodies[-1].keys()
    assert not {"max_tokens", "temperature"} & server.bodies[-1].keys()


@pytest.mark.parametrize("name", ["ignores the schema", "traditional"])
def test_answers_in_another_form(name: str, tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint(lambda passage, before: name) as server:
        run(Synthesis(book, seeds, SETTINGS, out), server)
    assert questions(out) == expected(12)


def test_half_a_json_keeps_its_whole_facts(tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint(lambda passage, before: "half") as server:
        run(Synthesis(book, seeds, SETTINGS, out), server)
    assert set(server.asked.values()) == {1}
    firsts = Counter(q for n in range(12) for q in facts_of(passage_text(n))[0]["questions"])
    assert questions(out) == firsts
    assert Counter(row["reason"] for row in lines(rejected_file(out))) == {"回答写到一半断了": 12}


def test_a_model_that_repeats_the_seeds(tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint(lambda passage, before: "seeds") as server:
        server.seed_rows = [{"question": seeds[0].question, "answer": seeds[0].answer}]
        run(Synthesis(book, seeds, SETTINGS, out), server)
    assert out.read_text("utf-8") == ""
    assert {row["reason"] for row in lines(rejected_file(out))} == {"照抄示例"}


def test_the_second_pass_keeps_what_the_passage_answers(tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint(lambda passage, before: "doubtful") as server:
        run(Synthesis(book, seeds, Settings("scripted", 120, 2, 2, check=True), out), server)
    assert questions(out) == Counter(q for n in range(12) for q in facts_of(passage_text(n))[0]["questions"])
    rejected = lines(rejected_file(out))
    assert len(rejected) == 24 and {row["reason"] for row in rejected} == {"复核答不出要点"}


def test_a_key_that_expires_midway(tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint(key=KEY) as server:

        def expire(passage: str, before: int) -> str:
            if len(server.answered) == 5:
                server.key = "another"
            return GOOD

        server.script = expire
        stopped, _ = run(Synthesis(book, seeds, SETTINGS, out), server, key=KEY, at_once=1)
        assert "密钥" in stopped and "401" in stopped and KEY not in stopped and "1234567890" not in stopped
        assert sum(questions(out).values()) == 24  # six passages
        server.key, server.script = KEY, at()
        again = Synthesis(book, seeds, SETTINGS, out)
        assert again.progress.done == 6
        stopped, _ = run(again, server, key=KEY)
    assert stopped == "" and questions(out) == expected(12)
    assert set(server.asked.values()) == {1}  # nothing is asked twice


@pytest.mark.parametrize(("fault", "words"), [("no money", "额度"), ("404", "模型"), ("429 after 86400", "86400")])
def test_what_will_never_go_well_stops_at_once(
    fault: str, words: str, tmp_path: Path, book: list[Book], seeds: list[Example]
) -> None:
    with ScriptedEndpoint(lambda passage, before: fault) as server:
        stopped, _ = run(Synthesis(book, seeds, SETTINGS, tmp_path / "set.jsonl"), server, at_once=1)
        assert words in stopped and len(server.bodies) == 1


def test_an_endpoint_that_is_down_is_given_up_and_its_key_not_shown(
    tmp_path: Path, book: list[Book], seeds: list[Example]
) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint(lambda passage, before: "500") as server:
        made = Synthesis(book, seeds, SETTINGS, out)
        stopped, _ = run(made, server, key=KEY, at_once=1)
    assert "连续 8 个段落失败" in stopped and KEY not in stopped
    assert made.progress.failed == 8 and len(made.todo()) == 12


def test_a_budget_is_never_passed(tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    # The scripted endpoint says 100 tokens in and 50 out of every request; what is reserved for one is far more.
    for budget, price, cost in (
        (Budget(tokens=3000), None, None),
        (Budget(money=3.0), Price(1000.0, 1000.0), 3.0),
    ):
        out = tmp_path / f"{budget.money}.jsonl"
        with ScriptedEndpoint() as server:
            made = Synthesis(book, seeds, SETTINGS, out)
            stopped, _ = run(made, server, budget=budget, price=price)
            assert "预算" in stopped and 0 < made.progress.done < 12
            assert made.progress.tokens == 150 * made.progress.done <= 3000
            if price is not None and cost is not None:
                assert price.cost(made.progress.prompt_tokens, made.progress.completion_tokens) <= cost
            assert len(lines(out)) == 4 * made.progress.done
            run(Synthesis(book, seeds, SETTINGS, out), server)
        assert questions(out) == expected(12) and set(server.asked.values()) == {1}


def test_a_cut_last_line_is_asked_again_and_a_damaged_one_named(
    tmp_path: Path, book: list[Book], seeds: list[Example]
) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint() as server:
        run(Synthesis(book, seeds, SETTINGS, out), server)
        journal = work_folder(out) / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-20])
        again = Synthesis(book, seeds, SETTINGS, out)
        assert len(again.todo()) == 1
        run(again, server)
    assert questions(out) == expected(12) and sum(server.asked.values()) == 13
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*whole[:3], b'{"passage": 3\n', *whole[4:]]))
    with pytest.raises(MiniGLMError, match=r"journal\.jsonl 第 4 行"):
        Synthesis(book, seeds, SETTINGS, out)


def test_other_settings_are_refused_with_the_difference(tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    out = tmp_path / "set.jsonl"
    Synthesis(book, seeds, SETTINGS, out)
    with pytest.raises(MiniGLMError, match="模型 'scripted' → 'other'；--facts 2 → 3"):
        Synthesis(book, seeds, Settings("other", 120, 3, 2), out)
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(MiniGLMError, match="不会覆盖"):
        Synthesis(book, seeds, SETTINGS, tmp_path / "mine.jsonl")


def test_a_set_that_the_user_has_changed_is_kept(tmp_path: Path, book: list[Book], seeds: list[Example]) -> None:
    out = tmp_path / "set.jsonl"
    with ScriptedEndpoint() as server:
        run(Synthesis(book, seeds, SETTINGS, out), server)
        run(Synthesis(book, seeds, SETTINGS, out), server)
        assert len(list(tmp_path.glob("set-*.jsonl"))) == 0
        out.write_text("我改过的\n", "utf-8")
        run(Synthesis(book, seeds, SETTINGS, out), server)
    assert [path.read_text("utf-8") for path in tmp_path.glob("set-*.jsonl")] == ["我改过的\n"]
    assert questions(out) == expected(12)


# From the command line ------------------------------------------------------------------------------------------------


def command(book: Path, out: Path, server: ScriptedEndpoint, key_file: Path) -> list[str]:
    return [
        *("qa", "synthesize", str(book), "--out", str(out), "--base-url", server.base_url, "--model", "scripted"),
        *("--key-file", str(key_file), "--passage", "120", "--facts", "2", "--phrasings", "2", "--at-once", "2"),
    ]


def test_ctrl_c_loses_nothing_and_the_key_is_nowhere(tmp_path: Path) -> None:
    book, out, key_file = make_book(tmp_path, 30), tmp_path / "out" / "set.jsonl", tmp_path / "key"
    key_file.write_text(KEY + "\n")
    with ScriptedEndpoint(key=KEY, delay=0.1) as server:
        arguments = command(book, out, server, key_file)
        process = subprocess.Popen(
            [sys.executable, "-m", "miniglm", *arguments, "--yes"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUTF8": "1", "OPENAI_LOG": "debug", "OPENAI_ORG_ID": "org-mine"},
        )
        while len(server.answered) < 4:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
        assert process.returncode == 130, stderr.decode()
        assert "接着做" in stderr.decode() and "Traceback" not in stderr.decode()
        kept = sum(questions(out).values()) // 4
        assert 2 <= kept < 30
        assert len(lines(work_folder(out) / "journal.jsonl")) == kept
        done = miniglm(*arguments, "--yes", "--price-in", "1", "--price-out", "2")
        assert done.returncode == 0, done.stderr
        assert not any("org-mine" in header.values() for header in server.headers)
    assert questions(out) == expected(30)
    assert f"接着做：{kept} 段" in done.stderr and "元" in done.stderr
    # Only what was under way when the key was pressed is asked again.
    assert sum(server.asked.values()) <= 30 + 2
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for text in (stdout.decode(), stderr.decode(), done.stdout, done.stderr, written.decode()):
        assert KEY not in text


def test_two_processes_on_one_set(tmp_path: Path) -> None:
    """The second is told who the first is; a third takes over when the first has died. Nothing is lost or doubled."""
    book, out, key_file = make_book(tmp_path, 20), tmp_path / "out" / "set.jsonl", tmp_path / "key"
    key_file.write_text(KEY)
    with ScriptedEndpoint(key=KEY, delay=0.1) as server:
        arguments = [*command(book, out, server, key_file), "--yes"]
        first = subprocess.Popen([sys.executable, "-m", "miniglm", *arguments], stderr=subprocess.DEVNULL)
        while len(server.answered) < 4:
            assert first.poll() is None
            time.sleep(0.01)
        server.delay = 3600  # however long the second takes to begin, the first is at work
        fails(*arguments, words=("set.synthesis", "这个问答集正由", f"进程号 {first.pid}", "换一个 --out"))
        assert first.poll() is None
        first.kill()
        first.wait()
        server.delay = 0
        half = [out.with_name(f".miniglm-tmp-{digest}-x") for digest in ("0" * 8, _digest_of("set.jsonl"))]
        for path in half:
            path.write_text("half")
        done = miniglm(*arguments)
        assert done.returncode == 0, done.stderr
        assert [path.exists() for path in half] == [True, False]  # only what a killed process left of this very set
    assert questions(out) == expected(20)
    journal = lines(work_folder(out) / "journal.jsonl")
    assert len({record["passage"] for record in journal}) == len(journal) == 20


def _digest_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def refused(*arguments: object) -> str:
    """What the command line says to these arguments, which must end in one error for the user."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert isinstance(result.exception, MiniGLMError), result
    return str(result.exception)


def test_faults_of_the_user_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book, out, key_file = make_book(tmp_path, 3), tmp_path / "set.jsonl", tmp_path / "key"
    key_file.write_text(KEY)
    begin = ("qa", "synthesize", book, "--out", out)
    monkeypatch.delenv("ZHIPUAI_API_KEY", raising=False)
    assert "ZHIPUAI_API_KEY" in refused(*begin, "--provider", "zhipu", "--model", "m")
    assert "--provider" in refused(*begin, "--provider", "other", "--model", "m")
    assert "--offline" in refused(*begin, "--model", "m")
    assert "--model" in refused(*begin, "--provider", "ollama")
    local = (*begin, "--provider", "ollama", "--model", "m")
    assert "单价" in refused(*local, "--budget", "10元")
    assert "一起" in refused(*local, "--price-in", "1")
    assert "多少" in refused(*local, "--budget", "多少")
    assert not out.exists() and not work_folder(out).exists()
    with ScriptedEndpoint(key=KEY) as server:
        # No terminal to confirm in: nothing is asked.
        assert "--yes" in refused(*command(book, out, server, key_file))
        assert server.bodies == []
        server.key = "another"
        found = refused(*command(book, out, server, key_file), "--yes")
        assert "密钥" in found and "401" in found and KEY not in found


def test_keys_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", f" {KEY} ")
    assert read_key(PRESETS["deepseek"], None) == KEY
    assert read_key(PRESETS["ollama"], None) == ""
    monkeypatch.delenv("MINIGLM_API_KEY", raising=False)
    assert read_key(OWN, None) == ""
    (tmp_path / "key").write_text("one two")
    with pytest.raises(MiniGLMError, match="应只有密钥"):
        read_key(OWN, tmp_path / "key")


# Parts ----------------------------------------------------------------------------------------------------------------


def test_passages_are_the_book(tmp_path: Path) -> None:
    long = "这是很长的一句话，" * 30 + "。"
    (tmp_path / "b.txt").write_text(
        f"第一回 甲\n{passage_text(1)}\n{long}\n短。\n第二回 乙\n{passage_text(2)}\n", "utf-8"
    )
    books = load_books([str(tmp_path / "b.txt")])
    for longest in (100, 200, 1000):
        found = cut_passages(books, longest)
        assert all(len(p.text) <= longest for p in found)
        assert len({p.id for p in found}) == len(found)
        assert found == cut_passages(books, longest)
    whole = "".join(p.text for p in cut_passages(books, 1000)).replace("\n", "")
    assert whole == "".join(p.text for p in books[0].paragraphs if p.text != p.chapter)
    assert [p.chapter_number for p in cut_passages(books, 1000)] == [1, 2]


@settings(deadline=None)
@given(st.text(alphabet="甲乙丙 \n，。", max_size=30), st.integers(0, 30), st.integers(0, 30))
def test_verbatim_is_what_stands_there(text: str, start: int, length: int) -> None:
    piece = text[start : start + length]
    found = find_verbatim(piece, text)
    assert fold(found) == fold(piece) and found in text
    assert find_verbatim(piece + "丁", text) == ""


@settings(deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({"answer": st.text(max_size=8), "keys": st.lists(st.text(max_size=3), max_size=2)}),
        max_size=4,
    ),
    st.integers(0, 400),
)
def test_of_half_a_json_the_whole_facts_are_kept(facts: list[dict[str, Any]], at: int) -> None:
    text = json.dumps({"facts": facts}, ensure_ascii=False)
    assert parse_json(f"好的：\n```json\n{text}\n```") == {"facts": facts} or "```" in text or "<think>" in text
    found, faults = parse_facts(text[:at])
    ends = [len('{"facts": ')]
    for fact in facts:
        ends.append(ends[-1] + len(json.dumps(fact, ensure_ascii=False)) + (2 if len(ends) > 1 else 1))
    assert found == facts[: sum(end <= at for end in ends[1:])]
    assert found or faults or at >= len(text)
