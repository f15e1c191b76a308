"""Rows in the forms of other tools: what each becomes, what is refused by name, what is counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.fields import CHOICES, COMPLETIONS, CONVERSATIONS, LABELS, PROMPTS, REFERENCES
from data_prep.formats import FORMATS, Intake
from data_prep.readers import DOCUMENTS, SUMMARIES
from data_prep.rows import SHAPES, row_problem

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def read(raw: Any, **settings: Any) -> dict[str, Any]:
    return Intake(**settings).read(raw)


MESSAGES = {
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
        [system("S"), user("Q"), assistant("A")],
    ),
    "sharegpt calls": (
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "A"},
            ],
        },
        [
            user("Q"),
            assistant("", tool_calls=[{k: CALL[k] for k in ("type", "function")}]),
            {"role": "tool", "content": "2"},
            assistant("A"),
        ],
    ),
    "openai calls": (
        {
            "messages": [
                user("Q"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "2", "name": "add"},
                assistant("A"),
            ]
        },
        [
            user("Q"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
            assistant("A"),
        ],
    ),
    "older call": (
        {"messages": [user("Q"), {"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]},
        [user("Q"), assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])],
    ),
    "capitals": (
        {"messages": [{**system("S"), "role": "System "}, {**user("Q"), "role": "USER"}, {**user("A"), "role": "GPT"}]},
        [system("S"), user("Q"), assistant("A")],
    ),
    "parts": (
        {"messages": [user([{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]), assistant("A")]},
        [user("Q?"), assistant("A")],
    ),
    "json text": (
        {"messages": json.dumps([user("Q"), assistant("A")])},
        [user("Q"), assistant("A")],
    ),
    "flags": (
        {
            "messages": [
                {**user("Q"), "train": False, "weight": 0},
                assistant("A", weight=0),
                user("B"),
                assistant("C", loss="false"),
                user("D"),
                assistant("E", weight=1.0, train=True, learn=None),
            ]
        },
        [user("Q"), assistant("A", train=False), user("B"), assistant("C", train=False), user("D"), assistant("E")],
    ),
    "reasoning": (
        {"messages": [user("Q"), assistant("A", thinking="T", reasoning="")]},
        [user("Q"), assistant("A", reasoning_content="T")],
    ),
    "only reasoning": (
        {"messages": [user("Q"), {"role": "assistant", "content": None, "reasoning_content": "T"}]},
        [user("Q"), assistant("", reasoning_content="T")],
    ),
    "greeting first": (
        {"messages": [assistant("Hi"), user("Q"), assistant("A")]},
        [assistant("Hi"), user("Q"), assistant("A")],
    ),
    "alpaca": (
        {"instruction": "I", "input": "more", "output": "A", "system": "S", "history": [["Q0", "A0"], ["Q1", "A1"]]},
        [system("S"), user("Q0"), assistant("A0"), user("Q1"), assistant("A1"), user("I\n\nmore"), assistant("A")],
    ),
    "alpaca without more": (
        {"instruction": "I", "input": "", "output": "A", "system": "", "history": []},
        [user("I"), assistant("A")],
    ),
    "dolly": (
        {"instruction": "Q", "context": "C", "response": "A", "category": "open_qa"},
        [user("C\n\nQ"), assistant("A")],
    ),
    "contexts": (
        {"question": "Q", "contexts": ["C", "D"], "answer": "a long answer\nof two lines"},
        [user("C\n\nD\n\nQ"), assistant("a long answer\nof two lines")],
    ),
    "capital names": (
        {"Question": "Q", "Complex_CoT": "T", "Response": "A"},
        [user("Q"), assistant("A", reasoning_content="T")],
    ),
    "a tool's result as an object": (
        {"messages": [user("Q"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": {"x": "é"}},
                      assistant("A")]},
        [user("Q"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": '{"x": "é"}'}, assistant("A")],
    ),
    "names in camel case": (
        {"messages": [user("Q"), assistant("A", reasoningContent="T")], "systemPrompt": "S"},
        [system("S"), user("Q"), assistant("A", reasoning_content="T")],
    ),
    "reasoning twice": (
        {"messages": [user("Q"), assistant("<think>\nT\n</think>\n\nA", reasoning_content="T")]},
        [user("Q"), assistant("A", reasoning_content="T")],
    ),
    "system in parts": (
        {"system": [{"type": "text", "text": "S"}], "messages": [user("Q"), assistant("A")]},
        [system("S"), user("Q"), assistant("A")],
    ),
    "roles of other collections": (
        {"messages": [{"role": "prompter", "content": "Q"}, {"role": "Chatbot", "content": "A"}]},
        [user("Q"), assistant("A")],
    ),
    "an answer said to be good": ({"question": "Q", "answer": "A", "is_correct": True}, [user("Q"), assistant("A")]),
    "user and assistant": ({"user": "Q", "assistant": "A"}, [user("Q"), assistant("A")]),
    "user is a name": ({"prompt": "Q", "completion": "A", "user": "alice"}, [user("Q"), assistant("A")]),
    "a number": ({"prompt": "Q", "completion": 2.5}, [user("Q"), assistant("2.5")]),
    "trl": (
        {"prompt": [system("S"), user("Q")], "completion": [assistant("A")]},
        [system("S"), user("Q"), assistant("A")],
    ),
    "the prompt again": (
        {"prompt": "Q", "messages": [user("Q"), assistant("A")], "prompt_id": "1"},
        [user("Q"), assistant("A")],
    ),
    "other columns": (
        {"messages": [user("Q"), assistant("A")], "text": "page", "summary": "short", "source": "x", "target": "y"},
        [user("Q"), assistant("A")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", MESSAGES)
def test_conversations_and_questions_become_messages(form: str):
    raw, messages = MESSAGES[form]
    row = read(raw)
    assert row["messages"] == messages
    assert row_problem(row, "messages") is None
    assert read(row) == row


def test_tools_come_along_in_one_form():
    messages = [user("Q"), assistant("A")]
    bare = TOOL["function"]
    for tools in ({"tools": [TOOL]}, {"tools": json.dumps([bare])}, {"functions": [bare]}):
        assert read({"messages": messages, **tools}) == {"messages": messages, "tools": [TOOL]}
    assert read({"prompt": "Q", "chosen": "A", "rejected": "B", "tools": [TOOL]})["tools"] == [TOOL]
    assert "tools" not in read({"messages": messages, "tools": []})


@pytest.mark.parametrize(
    ("raw", "answers"),
    [
        ({"question": "Q", "answer": "1+1=<<1+1=2>>2\n#### 2"}, ["2"]),
        ({"prompt": "Q", "solution": r"So \boxed{\frac{1}{2}}."}, [r"\frac{1}{2}"]),
        ({"prompt": "Q", "answer": "3"}, ["3"]),
        ({"problem": "Q", "solution": "Long. So it is 4.", "answer": "4"}, ["4"]),
        ({"messages": [user("Q"), assistant("A")], "answers": ["a", "b"]}, ["a", "b"]),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "so\n#### 5"}]}, ["5"]),
    ],
)
def test_rows_with_an_answer_to_compare_with_have_it(raw: dict[str, Any], answers: list[str]):
    row = read(raw)
    assert row["answers"] == answers
    assert row["messages"][-1]["role"] == "assistant"


def test_a_solution_is_learned_and_its_result_is_not():
    row = read({"problem": "Q", "solution": "Long. So it is 4.", "answer": "4"})
    assert row["messages"] == [user("Q"), assistant("Long. So it is 4.")]


OTHERS = {
    "kto": (
        {"instruction": "Q", "output": "A", "kto_tag": False, "system": "S"},
        "labelled",
        {"prompt": [system("S"), user("Q")], "completion": [assistant("A")], "label": False},
    ),
    "kto with 0": (
        {"prompt": "Q", "completion": "A", "label": 0},
        "labelled",
        {"prompt": [user("Q")], "completion": [assistant("A")], "label": False},
    ),
    "kto of a table": (
        {"question": "Q", "answer": "A", "label": "TRUE"},
        "labelled",
        {"prompt": [user("Q")], "completion": [assistant("A")], "label": True},
    ),
    "kto conversation": (
        {"messages": [user("Q"), assistant("A", weight=0), user("R"), assistant("B"), user("Thanks")], "label": True},
        "labelled",
        {"prompt": [user("Q"), assistant("A"), user("R")], "completion": [assistant("B")], "label": True},
    ),
    "hh": (
        {"chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: B", "rejected":
         "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: C"},
        "preference",
        {"prompt": [user("Q"), assistant("A"), user("R")], "chosen": [assistant("B")], "rejected": [assistant("C")]},
    ),
    "hh with its prompt": (
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " A", "rejected": " B"},
        "preference",
        {"prompt": [user("Q")], "chosen": [assistant(" A")], "rejected": [assistant(" B")]},
    ),
    "llama-factory": (
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"},
         "rejected": {"from": "gpt", "value": "B"}, "system": "S"},
        "preference",
        {"prompt": [system("S"), user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
    ),
    "implicit prompt": (
        {"chosen": [system("S"), user("Q"), assistant("A")], "rejected": [system("S"), user("Q"), assistant("B")]},
        "preference",
        {"prompt": [system("S"), user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
    ),
    "the prompt in both": (
        {"prompt": "Q", "system": "S", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")],
         "messages": [user("Q"), assistant("A")]},
        "preference",
        {"prompt": [system("S"), user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
    ),
    "a system message in both": (
        {"prompt": "Q", "chosen": [system("S"), user("Q"), assistant("A")],
         "rejected": [system("S"), user("Q"), assistant("B")]},
        "preference",
        {"prompt": [system("S"), user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
    ),
    "later turns": (
        {"prompt": "Q", "chosen": [assistant("X"), user("R"), assistant("A")],
         "rejected": [assistant("X"), user("R"), assistant("B")]},
        "preference",
        {"prompt": [user("Q"), assistant("X"), user("R")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
    ),
    "context of a pair": (
        {"question": "Q", "context": "C", "chosen": "A", "rejected": "B"},
        "preference",
        {"prompt": [user("C\n\nQ")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
    ),
    "options": (
        {"question": "Q", "choices": ["a", "b"], "answer": 1},
        "scoring",
        {"prompt": [user("Q")], "choices": ["a", "b"], "answer": 1},
    ),
    "options by letter": (
        {"question": "Q", "options": {"A": "x", "B": "y"}, "answer": "B"},
        "scoring",
        {"prompt": [user("Q")], "choices": ["x", "y"], "answer": 1},
    ),
    "options by letter, ARC": (
        {"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        "scoring",
        {"prompt": [user("Q")], "choices": ["x", "y"], "answer": 1},
    ),
    "options in a cell": (
        {"question": "Q", "choices": '["x", "y"]', "answer": "1"},
        "scoring",
        {"prompt": [user("Q")], "choices": ["x", "y"], "answer": 1},
    ),
    "options by text": (
        {"prompt": "Q", "choices": ["x", "y"], "answer": "x"},
        "scoring",
        {"prompt": [user("Q")], "choices": ["x", "y"], "answer": 0},
    ),
    "verifiable": (
        {"prompt": "Q", "answers": [2, "two"]},
        "verifiable",
        {"prompt": [user("Q")], "answers": ["2", "two"]},
    ),
    "verl": ({"prompt": [user("Q")], "ground_truth": "2"}, "verifiable", {"prompt": [user("Q")], "answers": ["2"]}),
}  # fmt: skip


@pytest.mark.parametrize("form", OTHERS)
def test_other_shapes(form: str):
    raw, shape, row = OTHERS[form]
    intake = Intake()
    assert intake.read(raw) == row
    assert intake.shape == shape
    assert read(row) == row


REFUSED = [
    ({"messages": [user("Q"), assistant("A", weight=0.5)]}, '"weight" is 0.5; a message is learned (1, true) or not'),
    ({"messages": [user("Q"), assistant("A", mask=True)]}, '"mask" marks learned messages in some data'),
    ({"messages": [user("Q"), assistant("A", weight=1, train=False)]}, "'weight' and 'train' contradict each other"),
    ({"messages": [{**user("Q"), "train": True}, assistant("A")]}, "asks to learn a message of role user"),
    ({"messages": [user("Q"), assistant("A", train=False)]}, "has nothing to learn"),
    ({"messages": [user("Q"), assistant("A")], "weight": 0.5}, 'the field "weight" (what is learned)'),
    ({"messages": [user("Q"), assistant("A")], "images": ["a.png"]}, 'the field "images" (images, sound'),
    ({"messages": [{**user("Q"), "images": ["a.png"]}, assistant("A")]}, "message 1: it has 'images'"),
    ({"messages": [user([{"type": "image_url", "image_url": {}}]), assistant("A")]}, "a part of type 'image_url'"),
    ({"messages": [user("Q"), assistant("A")], "context": "C"}, 'the field "context" (part of what the model'),
    ({"messages": [user("Q"), assistant("A")], "history": [["a", "b"]]}, 'the field "history"'),
    ({"messages": [user("Q"), assistant("A")], "prompt": "R"}, 'it has both "messages" and "prompt"'),
    ({"messages": [user("Q"), assistant("A")], "output": "B"}, 'it has both "messages" and "output"'),
    ({"messages": [user("Q"), assistant("A")], "conversations": [user("R"), assistant("A")]}, "which differ"),
    ({"messages": [system("S"), user("Q"), assistant("A")], "system": "T"}, "the system message beside"),
    ({"messages": [user("Q"), assistant("A")], "label": "good"}, "must say whether the answer is good, as"),
    ({"messages": [user("Q"), assistant("A")], "label": 2}, "--ignore_fields+=label"),
    ({"messages": [user("Q"), {"role": "assistant", "content": None}]}, '"content" is null or missing'),
    ({"messages": [user("Q"), {"role": "assistant", "content": True}]}, "must be a text, but is true or false"),
    ({"messages": [{"role": "doctor", "content": "Q"}, assistant("A")]}, '"role" must be one of system, user'),
    ({"messages": [{"content": "Q"}, assistant("A")]}, '"role" must be one of'),
    ({"messages": [user("Q")]}, "it has no answer: no message of role assistant"),
    ({"messages": [{**user("Q"), "reasoning": "T"}, assistant("A")]}, "belongs to a message of role assistant"),
    ({"messages": [user("Q"), assistant("A", tool_calls=[{"name": "f", "arguments": "no"}])]}, "arguments of f"),
    ({"messages": [user("Q"), assistant("A")], "tools": ["add"]}, "'tools' must hold"),
    ({"messages": [user("Q"), assistant("A")], "reasoning": "T"}, "the answer's reasoning, which belongs in"),
    ({"prompt": "Q", "completion": "A", "question": "R"}, "it has both 'prompt' and 'question', which differ"),
    ({"prompt": "Q", "completion": "A", "response": "B"}, "it has both 'completion' and 'response', which differ"),
    ({"question": "Q", "answer": "A", "Answer": "B"}, "the field 'answer' twice"),
    ({"question": "Q", "answer": True}, 'write the answer as a text, such as "yes"'),
    ({"question": "Q", "answer": None}, "it has the fields 'question', which match no known form; null: 'answer'"),
    ({"messages": [user("Q"), assistant("A", masked=True)]}, 'the field "masked" (what is learned)'),
    ({"messages": [user("Q"), assistant("A", trainOn=0)]}, 'the field "trainOn" (what is learned)'),
    ({"messages": [user("Q"), assistant("A", train_on_turn=False)]}, "has nothing to learn"),
    ({"prompt": "Q", "completion": "A", "sample_weight": 0.1}, 'the field "sample_weight" (what is learned)'),
    ({"question": "Q", "answer": "A", "is_correct": False}, '"is_correct" (the answer is not good; to learn from good'),
    ({"messages": [user("Q"), assistant("A")], "rejected_response": "B"}, '"rejected_response" (a preference)'),
    ({"messages": [user("Q"), assistant("<think>S</think>A", reasoning="T")]}, "begins with other reasoning"),
    ({"input": {}, "preferred_output": [], "non_preferred_output": [1]}, "a preference in OpenAI's form"),
    ({"prompt": [user("Q")], "reward_model": {"ground_truth": "1"}}, 'write it as "answers"'),
    ({"prompt": "Q", "label": "42"}, 'call it "answers"'),
    ({"messages": [user("Q")], "answer": "42"}, 'to ask it, call the messages "prompt"'),
    ({"contents": [{"role": "user", "parts": []}]}, "in Gemini's form"),
    ({"question": "Q", "answer": "A", "context": {"a": 1}}, '"context" must be a text or a list of texts'),
    ({"instruction": "Q", "output": "A", "history": [["a"]]}, '"history" must be a list of [QUESTION, ANSWER]'),
    ({"prompt": "[{'role': 'user', 'content': 'Q'}]", "completion": "A"}, "as Python prints it; write it as JSON"),
    ({"chosen": "A", "rejected": "B"}, 'it has no prompt, and "chosen" and "rejected" have no first message'),
    ({"prompt": "Q", "chosen": [user("R"), assistant("A")], "rejected": [user("R"), assistant("B")]}, "prompt differs"),
    ({"prompt": "Q", "chosen": "A"}, 'it has "chosen" without "rejected"'),
    ({"prompt": "Q", "chosen": "A", "rejected": "B", "label": True}, 'the field "label" (whether an answer is good)'),
    ({"prompt": "Q", "chosen": [assistant("A", weight=0)], "rejected": "B"}, "marked as not learned"),
    ({"question": "Q", "choices": ["a", "b"], "answer": "C"}, '"answer" must be the index of a choice, 0 to 1'),
    ({"text": "a page"}, "continued pretraining on raw text is not available"),
    ({"text": "a page", "label": 1}, "reads no classification data"),
    ({"tokens": ["a"], "tags": ["O"]}, "--data iob"),
    ({"document": "D", "summary": "S", "question": "Q"}, 'the field "question"'),
    ({"source": "a", "target": "b", "system": "S"}, 'the field "system"'),
    ([1], "is a list, not an object"),
    ({}, "it is an empty object"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "words"), REFUSED)
def test_what_would_be_lost_is_refused_by_name(raw: Any, words: str):
    with pytest.raises(ValueError) as e:
        read(raw)
    assert words in str(e.value)


def test_fields_are_counted_once_a_row_and_harmless_ones_are_not():
    intake = Intake()
    messages = [{**user("Q"), "mood": "calm", "id": 1}, {**assistant("A"), "mood": "sad"}]
    for _ in range(3):
        intake.read({"messages": messages, "Score": 3, "id": "x", "url": "y", "empty": "", "none": None})
    assert intake.unused == {"messages: mood": 3, "Score": 3}


def test_a_broken_row_counts_nothing():
    intake = Intake()
    with pytest.raises(ValueError):
        intake.read({"messages": [system(""), user(""), assistant("A")], "score": 3})
    assert not intake.unused and not intake.notes and not intake.forms


def test_ignored_fields_are_left_out_of_rows_and_messages_and_counted():
    intake = Intake(ignored=frozenset({"label", "weight"}))
    row = intake.read({"messages": [user("Q"), assistant("A", weight=0.5)], "Label": "medical"})
    assert row == {"messages": [user("Q"), assistant("A")]}
    assert intake.unused == {"Label": 1, "messages: weight": 1}


def test_what_was_read_as_something_else_is_noted():
    intake = Intake()
    intake.read({"messages": [{"role": "developer", "content": "S"}, user("Q"), assistant("A"), user("Thanks")]})
    intake.read({"messages": [system(" "), user("Q"), assistant([{"type": "text", "text": "A"}])]})
    intake.read({"question": "Q", "answer": 3, "context": "C"})
    assert intake.notes == {
        "messages of role developer read as system": 1,
        "conversations cut after their last answer": 1,
        "empty system messages left out": 1,
        "contents in parts, their texts joined": 1,
        "numbers read as texts": 1,
        "contexts put before their question": 1,
    }
    assert intake.read_as() == "messages (2 conversations: messages; 1 questions with answers: question, answer)"


def test_marks_of_a_chat_template_in_texts_are_noted():
    intake = Intake()
    intake.read({"prompt": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "completion": "A<|im_end|>"})
    intake.read({"prompt": "[Q] <x>", "completion": "A"})
    assert intake.notes == {"rows with the marks of a chat template in their texts, which are kept as they are": 1}


def test_the_first_row_decides_the_shape_and_a_name_overrules_it():
    intake = Intake()
    intake.read({"prompt": "Q", "completion": "A"})
    with pytest.raises(ValueError, match='the field "label"'):
        intake.read({"prompt": "Q", "completion": "A", "label": False})
    with pytest.raises(ValueError, match=r"one of pairs of answers \(preference\), not of the shape messages"):
        intake.read({"prompt": "Q", "chosen": "A", "rejected": "B"})
    assert read({"prompt": "Q", "answer": "4"}, shape="verifiable") == {"prompt": [user("Q")], "answers": ["4"]}
    assert read({"source": ["a", "b"], "target": ["c"]}) == {"sentences": ["a", "b"], "summaries": ["c"]}
    assert read({"source": "a", "target": "c"}) == {"source": "a", "target": "c"}
    assert read({"source": "a", "target": "c"}, shape="summarised")["summaries"] == ["c"]


def test_every_form_is_of_a_known_shape():
    assert {form.shape for form in FORMATS} <= set(SHAPES)
    assert len({form.name for form in FORMATS}) == len(FORMATS)


def test_the_docs_list_every_form_and_its_names():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0].strip("| ") for line in table] == [form.name for form in FORMATS]
    for line, form in zip(table, FORMATS, strict=True):
        assert f"`{form.shape}`" in line
    for names in (PROMPTS, COMPLETIONS, CONVERSATIONS, LABELS, REFERENCES, CHOICES, DOCUMENTS, SUMMARIES):
        assert all(f"`{name}`" in page for name in names), names
