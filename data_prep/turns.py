"""Messages of other tools' files, brought into this project's form (see `data_prep.rows`).

Read are OpenAI's messages, ShareGPT's turns (`from`, `value`), contents in parts of text, tool calls in their older and
newer form, reasoning beside the content, and flags that say which answers are learned. What is left out, or read as
something else, is noted in the row's `Fields`.
"""

import json
import re
from decimal import Decimal
from typing import Any

from data_prep.fields import FLAGS, MEDIA, REASONING, TOOLS, Fields, is_blank, parse_flag
from data_prep.rows import ROLES, Row, type_name
from workflows.untrusted import parse_json

_ROLE_NAMES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(
        ("gpt", "chatgpt", "chatbot", "bard", "bing", "claude", "model", "ai", "bot", "function_call"), "assistant"
    ),
    "developer": "system",
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_PYTHON_LIST = re.compile(r"\s*\[\{\s*'(role|from|content|value)'\s*:")
_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH = re.compile(r"\A\s*Human:.*\n\nAssistant:", re.DOTALL)


def conversation(value: Any, field: str, fields: Fields) -> list[Row]:
    """The messages of a list, or of a JSON text of one.

    Args:
        value: The list; a message by itself counts as a list of one.
        field: Its name, for messages.
        fields: The row's; learns what was left out.

    Raises:
        ValueError: If a message cannot be read.
    """
    value = from_json(value, field)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{field!r} must be a list of messages, but is {type_name(value)}")
    found = []
    for number, raw in enumerate(value, start=1):
        place = f'"{field}", message {number}'
        try:
            message = Fields(raw, fields.ignored, field)
        except ValueError as e:
            raise ValueError(f'{place} {e} like {{"role": ..., "content": ...}}') from None
        try:
            turn = _turn(message)
        except ValueError as e:
            raise ValueError(f"{place}: {e}") from None
        fields.notes += message.notes
        fields.unused += message.unused
        if turn is not None:
            found.append(turn)
    return found


def turns_of(value: Any, role: str, field: str, fields: Fields) -> list[Row]:
    """The messages of a prompt or an answer: a text (a conversation, if it is in Anthropic's HH form) or messages."""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f'"{field}" is empty')
        if _PYTHON_LIST.match(value):
            raise ValueError(f"{field!r} is a list of messages as Python prints it; write it as JSON")
        if _HH.match(value):
            fields.notes.append("texts in the form of Human: and Assistant: read as conversations")
            return hh_conversation(value)
        if messages := _written_messages(value):
            fields.notes.append("messages written as JSON texts")
            return conversation(messages, field, fields)
        return [{"role": role, "content": value}]
    if role == "assistant" and _is_number(value):
        return [{"role": role, "content": _number_text(value, fields)}]
    if isinstance(value, list | dict):
        return conversation(value, field, fields)
    hint = '; write the answer as a text, such as "yes"' if isinstance(value, bool) else ""
    raise ValueError(f"{field!r} must be a text or a list of messages, but is {type_name(value)}{hint}")


def _written_messages(text: str) -> list[Any] | None:
    """The messages of a JSON text that is a list of them, as in a table's cell; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = parse_json(text, unique_names=True)
    except ValueError:
        return None
    pairs = ({"role", "content"}, {"from", "value"})
    is_list = isinstance(value, list) and all(
        isinstance(m, dict) and any(pair <= m.keys() for pair in pairs) for m in value
    )
    return value if is_list else None


def hh_conversation(text: str) -> list[Row]:
    """The messages of a text in the form of Anthropic's HH data; a last turn without words is left out."""
    _, *parts = _HH_TURN.split(text)
    names = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": names[name], "content": content.strip()} for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns if turns[-1]["content"] else turns[:-1]


def from_json(value: Any, field: str) -> Any:
    """A value that may be written as a JSON text, as in a table's cell.

    Raises:
        ValueError: If it is such a text and no JSON.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return parse_json(value, unique_names=True)
    except ValueError as e:
        raise ValueError(f"{field!r} is a text that is not valid JSON ({e})") from None


def tools_of(fields: Fields) -> list[Row] | None:
    """The row's tools as a list of {"type": "function", "function": {...}}, or None.

    Raises:
        ValueError: If they are in no known form.
    """
    name, value = fields.take(*TOOLS)
    value = from_json(value, name)
    if is_blank(value):
        return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{name!r} must be a list of tools, but is {type_name(value)}")
    tools = []
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'{name!r} must hold {{"type": "function", "function": {{"name": ...}}}}')
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools


def _turn(message: Fields) -> Row | None:
    """A message in our form; None for a system message without words."""
    name, given = message.take("role", "from")
    role = given.strip().lower() if isinstance(given, str) else given
    role = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f'"{name}" must be one of {", ".join(ROLES)} (or their names in ShareGPT), but is {given!r}')
    named = given.strip().lower()
    if named == "developer":
        message.notes.append("messages of role developer read as system")
    name, content = message.take("content", "value")
    if named == "function_call":
        calls = from_json(content, name)
        turn: Row = {"role": role, "content": "", "tool_calls": _calls(calls, name)}
    else:
        turn = {"role": role, "content": _content(content, role, message)}
        _add_reasoning(turn, message)
        _add_calls(turn, message)
    if _is_learned(message, role) is False and role == "assistant":
        turn["train"] = False
    for field in ("tool_call_id", "name"):
        if role == "tool" and field in message:
            _, value = message.take(field)
            turn[field] = str(value)
    if refused := message.filled(*MEDIA):
        raise ValueError(f"it has {refused[0]!r}; only text can be learned from here")
    message.finish()
    if role == "system" and not turn["content"].strip():
        message.notes.append("empty system messages left out")
        return None
    if content is None and role != "tool" and not turn.keys() & {"tool_calls", "reasoning_content"}:
        raise ValueError(f'"{name}" is null or missing')
    return turn


def _content(content: Any, role: str, message: Fields) -> str:
    if content is None:
        return ""
    typed = isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    if role == "tool" and not typed and not isinstance(content, str):
        message.notes.append("results of tools written as JSON texts")
        return json.dumps(content, ensure_ascii=False)
    if isinstance(content, list):
        return joined_parts(content, message)
    if role == "assistant" and _is_number(content):
        return _number_text(content, message)
    if not isinstance(content, str):
        raise ValueError(f'"content" must be a text, but is {type_name(content)}')
    return content


def joined_parts(parts: list[Any], message: Fields) -> str:
    """The texts of parts such as {"type": "text", "text": TEXT}, one after another as chat templates write them."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type_name(part)
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError(f'"content" has a part of type {kind!r}; only text can be learned from here')
        texts.append(part["text"])
    if texts:
        message.notes.append("contents in parts, their texts joined")
    return "".join(texts)


def _add_reasoning(turn: Row, message: Fields) -> None:
    name, reasoning = message.take(*REASONING)
    if is_blank(reasoning):
        return
    if not isinstance(reasoning, str):
        raise ValueError(f'"{name}" must be a text, but is {type_name(reasoning)}')
    if turn["role"] != "assistant":
        raise ValueError(f'"{name}" belongs to a message of role assistant, not {turn["role"]}')
    add_reasoning(turn, name, reasoning)


def add_reasoning(turn: Row, name: str, reasoning: str) -> None:
    """Put reasoning beside an answer's content, from which the same reasoning is taken out.

    Args:
        turn: The assistant's message.
        name: The reasoning's field, for messages.
        reasoning: The text.

    Raises:
        ValueError: If the content begins with other reasoning.
    """
    if found := _THOUGHTS.match(turn["content"]):
        if found[1].strip() != reasoning.strip():
            raise ValueError(f'the answer begins with other reasoning, in <think>, than "{name}" has; keep one of them')
        turn["content"] = turn["content"][found.end() :]
    turn["reasoning_content"] = reasoning


def _add_calls(turn: Row, message: Fields) -> None:
    name, calls = message.take("tool_calls", "function_call")
    calls = from_json(calls, name)
    if is_blank(calls):
        return
    if turn["role"] != "assistant":
        raise ValueError(f'"{name}" belongs to a message of role assistant, not {turn["role"]}')
    turn["tool_calls"] = _calls(calls, name)


def _calls(value: Any, field: str) -> list[Row]:
    """Calls of tools in OpenAI's form, the arguments as an object."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'"{field}" must be calls of functions, {{"name": TEXT, "arguments": {{...}}}}')
        arguments = from_json(function.get("arguments"), "arguments")
        arguments = {} if is_blank(arguments) else arguments
        if not isinstance(arguments, dict):
            raise ValueError(
                f'"{field}": the arguments of {function["name"]} are {type_name(arguments)}, not an object'
            )
        identity = {"id": str(call["id"])} if call.get("id") else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _is_learned(message: Fields, role: str) -> bool | None:
    """Return whether the message's flags say that it is learned; None if it has none.

    Raises:
        ValueError: If a flag is neither yes nor no, or two differ, or a message is to be learned that cannot be.
    """
    if message.filled("mask"):
        raise ValueError(
            '"mask" marks learned messages in some data and others elsewhere; write "train": false instead'
        )
    verdicts: dict[str, bool] = {}
    for name in message.filled(*FLAGS):
        _, value = message.take(name)
        verdict = parse_flag(value)
        if verdict is None:
            raise ValueError(
                f'"{name}" is {json.dumps(value)}; a message is learned (1, true) or not (0, false), with no weight '
                "between"
            )
        verdicts[name] = verdict
    if len(set(verdicts.values())) > 1:
        raise ValueError(f"{' and '.join(map(repr, verdicts))} contradict each other")
    if role != "assistant" and True in verdicts.values():
        raise ValueError(f'"{next(iter(verdicts))}" asks to learn a message of role {role}; only the assistant\'s are')
    return next(iter(verdicts.values()), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _number_text(value: int | float | Decimal, fields: Fields) -> str:
    fields.notes.append("numbers read as texts")
    return str(value) if isinstance(value, Decimal) else json.dumps(value)
