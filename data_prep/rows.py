"""Rows of a data directory: conversational JSONL, read with every line checked.

One row is one JSON object per line, in one of the shapes that the ecosystem uses (`SHAPES`). `messages` rows are for
supervised training, `prompt` + `choices` + `answer` rows are scored, `prompt` + `answers` rows are verified by
comparison, `prompt` rows are answered by `teach`, `text` + `label` rows are classified, `source` + `target` rows are
translated, `tokens` + `tags` rows are sentences with marked entities, `sentences` + `summaries` rows are documents with
what sums them up, `question` +
`context` + `answers` rows have their answers in a text. Further fields ("kind", "id") are kept and ignored by readers
that do not know them.

A message has a `role` and a `content`. An assistant's message may have `reasoning_content` (a text), `tool_calls`
(OpenAI's, with the arguments as an object) and `train`, which is only ever false: context that is not learned. A tool's
message may have `tool_call_id` and `name`. Beside the messages, `tools` lists what can be called, as JSON schemas.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.iob import OUTSIDE, tag_problem
from data_prep.normalisation import normalise as normalise
from workflows.errors import UserError
from workflows.untrusted import parse_json

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
ROLES = ("system", "user", "assistant", "tool")
_ASSISTANTS = ("reasoning_content", "tool_calls", "train")
_TOOLS = ("tool_call_id", "name")
SHAPES = {
    "messages": '{"messages": [..., {"role": "assistant", "content": TEXT}]}',
    "preference": '{"prompt": [...], "chosen": [...], "rejected": [...]}',
    "labelled": '{"prompt": [...], "completion": [...], "label": true}',
    "scoring": '{"prompt": [...], "choices": [TEXT, ...], "answer": INDEX}',
    "verifiable": '{"prompt": [...], "answers": [TEXT, ...]}',
    "prompts": '{"prompt": [...]}',
    "classified": '{"text": TEXT, "label": NAME}',
    "translated": '{"source": TEXT, "target": TEXT}',
    "tagged": '{"tokens": [WORD, ...], "tags": ["B-TYPE", "I-TYPE" or "O", ...]}',
    "summarised": '{"sentences": [TEXT, ...], "summaries": [TEXT, ...]}',
    "spans": '{"question": TEXT, "context": TEXT, "answers": {"text": [TEXT, ...], "answer_start": [INDEX, ...]}}',
}


def question_row(question: str, answer: str, kind: str, **fields: Any) -> Row:
    """A training row of one question and its answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": kind, **fields}


def scoring_row(question: str, choices: list[str], answer: int, **fields: Any) -> Row:
    """A question whose answer is one of several texts; `answer` is its index, from 0."""
    return {"prompt": [{"role": "user", "content": question}], "choices": choices, "answer": answer, **fields}


def row_problem(row: Any, shape: str) -> str | None:
    """What is wrong with a row of the given shape (a key of `SHAPES`), or None."""
    if not isinstance(row, dict):
        return f"is {type_name(row)}, not an object like {SHAPES[shape]}"
    if fields := {"classified": ("text", "label"), "translated": ("source", "target")}.get(shape):
        empty = [field for field in fields if not isinstance(row.get(field), str) or not row[field].strip()]
        return f'"{empty[0]}" must be a text that is not empty' if empty else None
    if shape == "tagged":
        return _tagged_problem(row.get("tokens"), row.get("tags"))
    if shape == "spans":
        return _spans_problem(row)
    if shape == "summarised":
        return _texts_problem(row, "sentences") or _texts_problem(row, "summaries")
    if problem := _tools_problem(row.get("tools")):
        return problem
    if shape == "messages":
        return _messages_problem(row.get("messages"), "messages", ("assistant",))
    if problem := _messages_problem(row.get("prompt"), "prompt", ("user", "system", "tool")):
        return problem
    if shape == "preference":
        return _messages_problem(row.get("chosen"), "chosen", ("assistant",)) or _messages_problem(
            row.get("rejected"), "rejected", ("assistant",)
        )
    if shape == "labelled":
        if not isinstance(row.get("label"), bool):
            return '"label" must be true or false'
        return _messages_problem(row.get("completion"), "completion", ("assistant",))
    if shape == "prompts":
        return None
    field = "choices" if shape == "scoring" else "answers"
    if problem := _texts_problem(row, field):
        return problem
    if shape == "scoring":
        texts, answer = row[field], row.get("answer")
        if len(texts) < 2 or len(set(texts)) != len(texts):
            return '"choices" must be at least two different texts'
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
            return f'"answer" must be the index of a choice, 0 to {len(texts) - 1}, but is {answer!r}'
    return None


def _tagged_problem(tokens: Any, tags: Any) -> str | None:
    for field, texts in (("tokens", tokens), ("tags", tags)):
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.split() == [t] for t in texts):
            return f'"{field}" must be a list of words, none of them empty or with white space in it'
    if len(tokens) != len(tags):
        return f'"tokens" has {len(tokens)} words and "tags" {len(tags)}'
    problems = (tag_problem(tag, before) for before, tag in zip([OUTSIDE, *tags], tags, strict=False))
    return next((f'"tags": {problem}' for problem in problems if problem), None)


def _spans_problem(row: Row) -> str | None:
    for field in ("question", "context"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            return f'"{field}" must be a text that is not empty'
    answers = row.get("answers")
    if not isinstance(answers, dict) or _texts_problem(answers, "text"):
        return '"answers" must hold "text", a list of texts, and "answer_start", where each begins'
    starts = answers.get("answer_start")
    if not isinstance(starts, list) or len(starts) != len(answers["text"]):
        return '"answer_start" must say for each answer where it begins'
    for text, start in zip(answers["text"], starts, strict=True):
        if type(start) is not int or start < 0 or row["context"][start : start + len(text)] != text:
            return f"the answer {text!r:.60} does not stand in the context at {start!r}"
    return None


def _texts_problem(row: Row, field: str) -> str | None:
    texts = row.get(field)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        return f'"{field}" must be a list of texts, none of them empty'
    return None


def _messages_problem(messages: Any, field: str, last_roles: tuple[str, ...]) -> str | None:
    if messages is None:
        return f'has no "{field}"'
    if not isinstance(messages, list) or not messages:
        return f'"{field}" must be a list of at least one message, but is {type_name(messages)}'
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return f'"{field}", message {number} is {type_name(message)}, not {{"role": ..., "content": ...}}'
        if problem := _message_problem(message):
            return f'"{field}", message {number}: {problem}'
    if messages[-1]["role"] not in last_roles:
        return f'"{field}" must end with a message of role {" or ".join(last_roles)}'
    if field == "messages" and len(messages) < 2:
        return '"messages" must hold a question before the answer'
    answers = [message for message in messages if message["role"] == "assistant"]
    if "assistant" in last_roles and all(message.get("train") is False for message in answers):
        return f'"{field}" has nothing to learn: every message of role assistant is marked as not learned'
    return None


def _message_problem(message: Row) -> str | None:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f'"role" must be one of {", ".join(ROLES)}, but is {role!r}'
    known = {"assistant": _ASSISTANTS, "tool": _TOOLS}.get(role, ())
    if unknown := [name for name in message if name not in ("role", "content", *known)]:
        return f'"{unknown[0]}" is no field of a prepared message of role {role}; prepare the file by `make data`'
    if not isinstance(content, str):
        return f'"content" must be a text, but is {type_name(content)}'
    if not content.strip() and role != "tool" and not ("tool_calls" in message or "reasoning_content" in message):
        return '"content" is empty'
    if "reasoning_content" in message and not _is_text(message["reasoning_content"]):
        return '"reasoning_content" must be a text that is not empty'
    if message.get("train", False) is not False:
        return '"train" can only be false (not learned)'
    if "tool_calls" in message and not (
        isinstance(message["tool_calls"], list) and message["tool_calls"] and all(map(_is_call, message["tool_calls"]))
    ):
        return '"tool_calls" must be a list of {"type": "function", "function": {"name": TEXT, "arguments": {...}}}'
    if odd := [name for name in _TOOLS if not isinstance(message.get(name, ""), str)]:
        return f'"{odd[0]}" must be a text'
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and _is_text(function.get("name")) and isinstance(function.get("arguments"), dict)


def _tools_problem(tools: Any) -> str | None:
    if tools is None or (isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools)):
        return None
    return f'"tools" must be a list of objects (JSON schemas of functions), but is {type_name(tools)}'


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}")


def iterate_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Values of a JSONL file with their line numbers (from 1); blank lines are skipped.

    Raises:
        UserError: If the file is missing, is not UTF-8, or a line is not JSON; the message names file and line.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                yield number, parse_line(path, number, line)


def parse_line(path: Path, number: int, line: bytes) -> Any:
    """The value of a line of a JSONL file.

    Args:
        path: The file, for messages.
        number: The line's number, from 1.
        line: Its bytes.

    Raises:
        UserError: If it is not UTF-8 or not JSON; the message names file and line.
    """
    try:
        return parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"), unique_names=True)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}, line {number}: not UTF-8 text ({e.reason}); save it as UTF-8.") from None
    except json.JSONDecodeError as e:
        raise UserError(
            f"{path}, line {number}: not valid JSON ({e.msg} at column {e.colno}). "
            "Fix or remove that line; if it is the last one, the file may be cut short."
        ) from None
    except ValueError as e:
        raise UserError(f"{path}, line {number}: not valid JSON ({e}). Fix or remove that line.") from None


def read_rows(path: Path, shape: str = "messages") -> list[Row]:
    """Read a JSONL file whose rows all have the given shape.

    Args:
        path: A `.jsonl` file.
        shape: A key of `SHAPES`.

    Raises:
        UserError: If the file is missing or empty, or a line is not such a row; the message names file and line.
    """
    rows = []
    for number, row in iterate_jsonl(path):
        if problem := row_problem(row, shape):
            raise UserError(f"{path}, line {number}: {problem}. A row looks like {SHAPES[shape]}.")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no rows. Prepare the data again with `make data`.")
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSONL; the caller makes the write atomic (`workflows.files.atomic_dir`)."""
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
