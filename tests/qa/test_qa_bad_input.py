"""What people's files have wrong with them, and what the reader says of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniglm.errors import MiniGLMError
from miniglm.qa import Example, QASet, Turn, normalize_question, read_examples, write_jsonl

GOOD = '{"question": "谁？", "answer": "他。"}'


def read(tmp_path: Path, content: str | bytes, name: str = "qa.jsonl", **options: bool) -> QASet:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return read_examples(path, **options)


def rejected(tmp_path: Path, bad: str, good: str = GOOD) -> str:
    """The reason why a line is not used, among lines that are."""
    found = read(tmp_path, f"{good}\n\n{bad}\n{good}\n", allow_bad=True)
    assert len(found.examples) == 2
    [line] = found.rejected
    assert (line.path, line.line) == (tmp_path / "qa.jsonl", 3)
    assert str(line) == f"{tmp_path / 'qa.jsonl'} 第 3 行：{line.reason}"
    return line.reason


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{}", "缺少 question"),
        ('{"Question": "谁？", "Answer": "他"}', "缺少 question，本文件是 question/answer 格式"),
        ('{"question": "谁？", "answer": null}', "answer 是 null"),
        ('{"question": "谁？", "answer": 14}', "answer 应是字符串，却是数字"),
        ('{"question": true, "answer": "他"}', "question 应是字符串，却是真假值"),
        ('{"question": "谁？", "answer": "\\u0000\\u0007\\u200b"}', "answer 只有控制字符"),
        ('{"question": "谁\\ud800？", "answer": "他"}', "代理字符"),
        ('{"question": "谁？", "answer": "他", "id": [1]}', "id 应是字符串或整数，却是数组"),
        ('{"question": "谁？", "answer": "他", "keys": ["他"]}', "keys 应形如"),
        ('{"question": "谁？", "answer": "他", "keys": [[]]}', "其中一组是空的"),
        ('{"question": "谁？", "answer": "他", "keys": [["他", ""]]}', "空的或不是字符串"),
        ('{"question": "谁？" "answer": "他"}', 'JSON 在第 19 个字符处不合语法：那里是 "answer"'),
        ('{"question": ' + "[" * 100_000, "过深的嵌套"),
        ('{"question": ' + "9" * 5000 + "}", "过长的数字"),
        ('"谁？"', "应是一个 JSON 对象，却是字符串"),
    ],
)
def test_a_line_says_what_is_wrong_with_it(tmp_path: Path, bad: str, reason: str) -> None:
    assert reason in rejected(tmp_path, bad)


MESSAGES = '{"messages": [{"role": "user", "content": "谁？"}, {"role": "assistant", "content": "他。"}]}'


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "非空的数组"),
        ("谁？", "应是非空的数组，却是字符串"),
        (["谁？"], "第 1 条应是对象"),
        ([("system", "短")], "没有问题"),
        ([("user", "谁？")], "最后一条不是回答"),
        ([("assistant", "他。")], "第 1 条的 role 是 'assistant'，该轮到 user"),
        ([("user", "谁？"), ("user", "谁？")], "第 2 条的 role 是 'user'，该轮到 assistant"),
        ([("user", "谁？"), ("system", "短"), ("assistant", "他。")], "第 2 条的 role 是 'system'"),
        ([("user", "谁？"), ("tool", "他。")], "'tool'"),
        ([("user", "谁？"), ("assistant", "")], "第 2 条的 content 是空的"),
        ([("user", "谁？"), ("assistant", None)], "第 2 条的 content 是 null"),
        ([("user", [{"type": "image_url"}]), ("assistant", "他")], "只能有 text 部分，却有 image_url"),
        ([("user", [{"type": "text", "text": 5}]), ("assistant", "他")], "应是字符串，却是数字"),
    ],
)
def test_a_conversation_says_what_is_wrong_with_it(tmp_path: Path, messages: object, reason: str) -> None:
    if isinstance(messages, list):
        messages = [{"role": m[0], "content": m[1]} if isinstance(m, tuple) else m for m in messages]
    assert reason in rejected(tmp_path, json.dumps({"messages": messages}, ensure_ascii=False), MESSAGES)


def test_conversations_in_all_their_forms(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "谁"}, {"type": "text", "text": "？"}]}
    said = {"role": "assistant", "content": "他。"}
    silent = {"role": "system", "content": ""}
    [example] = read(tmp_path, json.dumps({"messages": [silent, parts, said], "id": 7})).examples
    assert example == Example((Turn("谁？", "他。"),), system="", id="7")
    share = {"system": "简短", "conversations": [{"from": "human", "value": "谁？"}, {"from": "gpt", "value": "他。"}]}
    assert read(tmp_path, json.dumps(share)).examples == [Example((Turn("谁？", "他。"),), system="简短")]
    alpaca = {"instruction": "谁？", "output": "他。", "system": "简短", "history": [["何时？", "昨日。"]]}
    [example] = read(tmp_path, json.dumps(alpaca)).examples
    assert example == Example((Turn("何时？", "昨日。"), Turn("谁？", "他。")), system="简短")
    assert (example.question, example.answer) == ("谁？", "他。")
    for history in ("x", [["一"]], [["一", ""]], [5]):
        with pytest.raises(MiniGLMError, match="history"):
            read(tmp_path, json.dumps(alpaca | {"history": history}))


def test_formats_are_named_and_the_unknown_one_is_shown_with_the_known(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD).format == "miniglm"
    assert read(tmp_path, MESSAGES).format == "messages"
    assert read(tmp_path, '{"note": 1}\n' + f"{GOOD}\n" * 200).format == "miniglm"  # one odd line does not decide
    with pytest.raises(MiniGLMError) as caught:
        read(tmp_path, '\n{"prompt": "谁？", "completion": "他"}\n')
    message = str(caught.value)
    assert "qa.jsonl 第 2 行" in message and "prompt、completion" in message
    assert "instruction/input/output" in message and "问题/答案" in message


def test_one_line_in_a_hundred_may_be_bad_and_no_more(tmp_path: Path) -> None:
    assert len(read(tmp_path, f"{GOOD}\n" * 99 + "x\n").rejected) == 1
    with pytest.raises(MiniGLMError) as caught:
        read(tmp_path, f"{GOOD}\n" * 96 + "x\n{}\n[]\nnull\n")
    message = str(caught.value)
    assert "100 行里有 4 行不能用（4.0%，最多容许 1%）" in message and "--allow-bad-lines" in message
    assert "第 97 行" in message and "第 98 行" in message and "第 99 行" in message and "第 100 行" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("qa.jsonl", b"", "文件是空的"),
        ("qa.jsonl", b"\xef\xbb\xbf", "文件是空的"),
        ("qa.jsonl", b" \n\n", "文件是空的"),
        ("qa.json", b"[]", "没有问答"),
        ("qa.csv", b"question,answer\r\n", "没有问答"),
        ("qa.csv", "谁？,他。\r\n谁？,他。".encode(), "认不出格式：字段是 谁？、他。"),
        ("qa.jsonl", b"\x89PNG\r\n\x1a\n\0\0", "二进制文件"),
        ("qa.xlsx", b"PK\3\4\0\0", "另存为“CSV UTF-8”"),
        ("qa.jsonl", GOOD.encode("utf-16"), "UTF-16"),
        ("qa.jsonl", GOOD.encode("gb18030"), "不是 UTF-8 编码"),
        ("qa.csv", b"question,answer\n\xff\xff,\xff", "也不是 GB18030"),
        ("qa.json", b'[{"question": "a", "answer": "b"}\n{"question"', "第 2 行：JSON 数组没有写完"),
        ("qa.json", b'[\n{"question": "a", "answer": }]', "第 2 行：JSON 数组不合语法：那里是 }]"),
        ("qa.json", b'[{"question": "a", "answer": "b"}]\n[]', "后面却还有内容"),
        ("qa.csv", 'question,answer\n谁？,"他。\n谁？,他。\n'.encode(), "第 2 行：从这一行起有引号没有闭合"),
    ],
)
def test_a_file_says_what_is_wrong_with_it(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    with pytest.raises(MiniGLMError) as caught:
        read(tmp_path, content, name, allow_bad=True)
    assert name in str(caught.value) and reason in str(caught.value)


def test_a_folder_is_not_a_set(tmp_path: Path) -> None:
    with pytest.raises(MiniGLMError, match=r"文件夹|读不了"):
        read_examples(tmp_path)


def test_an_array_names_the_line_of_a_bad_element(tmp_path: Path) -> None:
    found = read(tmp_path, f'[\n  {GOOD},\n\n  {{"question":\n "谁？"}},\n  {GOOD}\n]\n', "qa.json", allow_bad=True)
    assert len(found.examples) == 2 and [line.line for line in found.rejected] == [4]


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    rows = [
        "Question ,Answer,keys,备注,",
        '谁借东风？,"孔明说""好""，\r\n去了","[[""孔明"", ""诸葛亮""]]",旧,',
        ",,,,",
        "谁,来,,,,多",
        '"谁"x,他',
        "谁？,他,孔明",
        "谁？",
        "关羽字什么？,云长",
    ]
    found = read(tmp_path, "\r\n".join(rows), "qa.csv", allow_bad=True)
    assert found.format == "csv"
    first, last = found.examples
    assert first == Example((Turn("谁借东风？", '孔明说"好"，\r\n去了'),), keys=(("孔明", "诸葛亮"),))
    assert first.extra["备注"] == "旧" and list(first.extra)[:2] == ["Question", "Answer"]
    assert last.turns == (Turn("关羽字什么？", "云长"),) and last.keys == ()
    assert [line.line for line in found.rejected] == [5, 6, 7, 8]
    for line, reason in zip(found.rejected, ["有 6 列", "引号", "keys 一列应是 JSON", "answer"], strict=True):
        assert reason in line.reason


def test_line_and_paragraph_separators_inside_a_string_do_not_end_a_line(tmp_path: Path) -> None:
    found = read(tmp_path, '{"question": "谁\u2028？", "answer": "他\u0085。"}\r\n' + GOOD)
    assert [e.question for e in found.examples] == ["谁\u2028？", "谁？"]


def test_questions_without_answers(tmp_path: Path) -> None:
    asked = '{"messages": [{"role": "user", "content": "谁？"}]}'
    assert read(tmp_path, asked, need_answer=False).examples == [Example((Turn("谁？", ""),))]
    assert read(tmp_path, '{"question": "谁？", "answer": ""}', need_answer=False).examples[0].answer == ""
    assert read(tmp_path, "问题\n谁？\n", "q.csv", need_answer=False).examples[0].question == "谁？"
    text = "谁？\r\n\r\n何时".encode("gb18030")
    found = read(tmp_path, text, "q.txt", need_answer=False)
    assert [e.extra for e in found.examples] == [{"question": "谁？"}, {"question": "何时"}] and found.format == "text"
    for bad in ('{"question": "", "answer": "他"}', '{"question": "谁？", "answer": 5}'):
        with pytest.raises(MiniGLMError, match="没有一行能用"):
            read(tmp_path, bad, need_answer=False)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3))


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["question", "answer", "messages", "conversations", "instruction", "output", "history", "keys"]
        ),
        JSON | st.lists(st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), JSON, max_size=3)),
    )
)
def test_no_object_is_a_crash(tmp_path_factory: pytest.TempPathFactory, row: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    write_jsonl(path, [row])
    for need_answer in (True, False):
        try:
            [example] = read_examples(path, need_answer=need_answer).examples
        except MiniGLMError as error:
            assert "any.jsonl" in str(error)
        else:
            assert example.question.strip() and (example.answer.strip() or not need_answer)
            assert example.extra == row


def test_writing_keeps_every_field_and_every_character(tmp_path: Path) -> None:
    row = {"question": "谁？\u2028", "note": "\ud800", "emoji": "😀", "n": [1, None]}
    write_jsonl(tmp_path / "new" / "out.jsonl", [row, {}])
    lines = (tmp_path / "new" / "out.jsonl").read_text("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [row, {}] and lines[-1] == ""
    write_jsonl(tmp_path / "out.jsonl", [{"q": "谁"}])
    assert "谁" in (tmp_path / "out.jsonl").read_text("utf-8")  # not escaped


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    write_jsonl(path, [{"n": 1}])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_jsonl(path, [{"n": 2}, {"n": object()}])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MiniGLMError, match=r"out\.jsonl.*写不进去.*磁盘"):
        write_jsonl(path, [{"n": 2}])
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["out.jsonl"]  # noqa: PTH208
    monkeypatch.undo()
    with pytest.raises(MiniGLMError, match="写不进去"):
        write_jsonl(path / "below a file" / "out.jsonl", [{}])


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("", ""),
        (" ，\n", ""),
        ("谁写了《三国演义》", "谁写了《三国演义》？"),
        ("“走吧。”", "“走吧。”"),
        ("曹操是谁，", "曹操是谁？"),
        ("讲讲曹操：", "讲讲曹操："),
        ("真的吗?!", "真的吗？!"),
        ("who is Cao Cao", "who is Cao Cao?"),
        ("谁是 Cao Cao", "谁是 Cao Cao？"),
        ("𠮷野家?", "𠮷野家？"),
    ],
)
def test_question_marks_at_the_edges(question: str, expected: str) -> None:
    assert normalize_question(question) == expected


@given(st.text("谁a?？，。”》 \n", max_size=8))
def test_a_question_ends_and_stays_as_it_is(question: str) -> None:
    once = normalize_question(question)
    assert normalize_question(once) == once
    assert once.rstrip("”》").endswith(("?", "？", "。")) or not once.strip("，")
