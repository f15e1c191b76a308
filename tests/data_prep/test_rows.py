"""Rows: what each shape accepts, and what is said about a line that is none."""

import json
from pathlib import Path

import pytest

from data_prep.rows import question_row, read_rows, row_problem, scoring_row, write_rows
from workflows.errors import UserError

TOOL = {"role": "tool", "content": "", "tool_call_id": "c", "name": "f"}
CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}]
USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}
GOOD = {
    "messages": {"messages": [{"role": "system", "content": "Be kind."}, USER, ASSISTANT, USER, ASSISTANT]},
    "preference": {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]},
    "labelled": {"prompt": [USER], "completion": [ASSISTANT], "label": False},
    "scoring": {"prompt": [USER], "choices": ["a", "b"], "answer": 1},
    "verifiable": {"prompt": [USER], "answers": ["a"]},
    "translated": {"source": "a", "target": "b"},
}


@pytest.mark.parametrize("shape", GOOD)
def test_every_shape_accepts_its_rows_and_no_others(shape: str):
    for other, row in GOOD.items():
        assert (row_problem(row, shape) is None) == (other == shape), (shape, other)


@pytest.mark.parametrize(
    ("shape", "change", "words"),
    [
        ("messages", {"messages": "hello"}, "must be a list"),
        ("messages", {"messages": []}, "an empty list"),
        ("messages", {"messages": [ASSISTANT]}, "a question before the answer"),
        ("messages", {"messages": [USER]}, "must end with a message of role assistant"),
        ("messages", {"messages": [USER, "hi"]}, "message 2 is a text"),
        ("messages", {"messages": [{"role": "doctor", "content": "x"}, ASSISTANT]}, "'doctor'"),
        ("messages", {"messages": [{"role": "user", "content": 3}, ASSISTANT]}, "a number"),
        ("messages", {"messages": [{"role": "user", "content": " \n"}, ASSISTANT]}, "is empty"),
        ("messages", {"messages": [USER, {**ASSISTANT, "weight": 0}]}, '"weight" is no field of a prepared message'),
        ("messages", {"messages": [{**USER, "train": False}, ASSISTANT]}, '"train" is no field of a prepared message'),
        ("messages", {"messages": [USER, {**ASSISTANT, "train": True}]}, '"train" can only be false'),
        ("messages", {"messages": [USER, {**ASSISTANT, "train": False}]}, "has nothing to learn"),
        (
            "messages",
            {"messages": [USER, {**ASSISTANT, "reasoning_content": ""}]},
            '"reasoning_content" must be a text',
        ),
        ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "f"}]}]}, '"tool_calls" must be a list'),
        ("messages", {"messages": [USER, {**TOOL, "tool_call_id": 1}, ASSISTANT]}, '"tool_call_id" must be a text'),
        ("messages", {"tools": []}, '"tools" must be a list of objects'),
        ("preference", {"tools": ["f"]}, '"tools" must be a list of objects'),
        ("preference", {"prompt": [USER, ASSISTANT]}, "must end with a message of role user or system or tool"),
        ("preference", {"rejected": None}, 'no "rejected"'),
        ("labelled", {"label": 1}, "true or false"),
        ("scoring", {"answer": 2}, "0 to 1"),
        ("scoring", {"answer": True}, "0 to 1"),
        ("scoring", {"choices": ["a", "a"]}, "two different"),
        ("scoring", {"choices": ["a", ""]}, "none of them empty"),
        ("verifiable", {"answers": "a"}, "list of texts"),
        ("translated", {"target": " "}, '"target" must be a text that is not empty'),
        ("translated", {"source": 1}, '"source" must be a text'),
    ],
)
def test_the_problem_is_named(shape: str, change: dict, words: str):
    assert words in str(row_problem({**GOOD[shape], **change}, shape))


def test_reasoning_calls_tools_and_what_is_not_learned_are_accepted():
    messages = [
        {"role": "assistant", "content": "Hello."},
        USER,
        {"role": "assistant", "content": "", "tool_calls": CALLS, "train": False},
        TOOL,
        {"role": "assistant", "content": "", "reasoning_content": "Hm."},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert row_problem({"messages": messages, "tools": tools}, "messages") is None
    assert row_problem({"prompt": messages[:-1], "answers": ["a"], "tools": tools}, "verifiable") is None


def test_rows_survive_the_file(tmp_path: Path):
    rows = [question_row("Ärzte?\n漢字", "Ja\u2028🙂", "name", id="1"), question_row("b", "c", "name")]
    write_rows(tmp_path / "a.jsonl", rows)
    assert read_rows(tmp_path / "a.jsonl") == rows
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 2
    scoring = [scoring_row("q", ["a", "b"], 0)]
    write_rows(tmp_path / "b.jsonl", scoring)
    assert read_rows(tmp_path / "b.jsonl", "scoring") == scoring


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (b'{"messages": [', "line 3: not valid JSON"),
        (b'{"messages": []}', "line 3: .*an empty list"),
        (b"[1, 2]", "line 3: is a list"),
        (b"\xff\xfe{}", "line 3: not UTF-8"),
    ],
)
def test_a_bad_file_names_itself_and_the_line(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD["messages"]).encode() + b"\n\n"  # the blank line counts too
    path.write_bytes(content if not content.strip() else good + content)
    with pytest.raises(UserError, match=f"rows.jsonl.*{words}"):
        read_rows(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"none.jsonl does not exist"):
        read_rows(tmp_path / "none.jsonl")
