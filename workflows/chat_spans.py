"""Encode a conversation for training: one rendering, the token ids of inference, a loss mask on every assistant turn.

The whole conversation is rendered once and encoded once. An assistant turn begins where the prompt that asks for it
ends, and ends with the token that stops generation; what the template writes between the header and the answer (a
space, a channel, an empty reasoning block) is part of the turn. Turns are found by character offsets: a message's
content is the part of the rendering that changes when the content is replaced by a marker, so that contents which look
like the template's own text do not confuse the search.

Some templates rewrite earlier turns, most often to leave out their reasoning. Such a turn is learned as the whole
rendering has it if it follows the header that the model is asked with; if not, it is context, and counted in `notes`.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workflows.errors import UserError

if TYPE_CHECKING:
    from workflows.chat_template import ChatTemplate, Message

# Private-use characters: no tokenizer or template treats them specially, and no real text holds them by accident.
MARKER = "\ue000\ue005\ue001"
_ARGUMENT = "marker_7f3a_of_arguments"  # JSON may be written with escapes, which private-use characters do not survive
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""The names under which templates look for a message's reasoning."""

RETOKENIZED = "answers encoded apart from their prompt: in the whole text one token would straddle the border"
APART = "answers encoded after a prompt that the template's text of the conversation does not repeat (its reasoning)"
NO_TEXT = "earlier answers not learned: the template leaves them out"
OTHER_HEADER = (
    "earlier answers not learned: the template drops the reasoning that their prompt begins with, so they do not "
    "follow the text that the model is asked with"
)
NO_PROMPT = "opening answers not learned: the template writes no prompt for a conversation that the assistant opens"
OTHER_CONTEXT = "earlier answers learned after a context that the template has rewritten since"
NO_END = "ends of earlier answers not learned: the template ends them with another token than the last answer"
NO_REASONING = "earlier answers learned without their reasoning: the template drops it from earlier turns"
REASONING_LOST = "answers learned without their reasoning: the template does not write it"
REASONING_REMOVED = "answers learned without their reasoning: reasoning is removed (--reasoning drop or none)"
REASONING_HIDDEN = (
    "earlier answers shown to the model without their reasoning: reasoning is removed (--reasoning drop or none)"
)
NOT_SHOWN = "messages not shown to the model: the template does not write them"
UNKNOWN = "conversations with characters that the tokenizer does not know: the model sees its unknown token instead"
UNMARKED = "answers not learned: their messages are marked `train: false`"
NO_TOOLS = "conversations whose tools are not shown to the model: the template writes no tools"


@dataclass(frozen=True)
class EncodedChat:
    """One conversation as token ids, split where the model begins to speak.

    Attributes:
        prompt: Ids up to and including the generation prompt of the first assistant turn that is learned.
        completion: The ids that follow.
        loss_mask: For each completion id, whether it is learned (turn-ending tokens included).
        notes: What is not learned or was encoded in another way than the whole text; one entry for each turn.
    """

    prompt: list[int]
    completion: list[int]
    loss_mask: list[bool]
    notes: tuple[str, ...] = ()


@dataclass
class _Text:
    """The rendering of a conversation, and how it is made.

    Attributes:
        text: The rendering.
        last: Where the last answer begins: after the prompt that asks for it.
        build: Renders another version of the same conversation in the same way.
        contents: Where the contents of messages are, as far as they were looked for.
    """

    text: str
    last: int
    build: Callable[[list["Message"]], str]
    contents: dict[int, tuple[int, int] | None] = field(default_factory=dict)


def encode_chat(
    template: "ChatTemplate", messages: list["Message"], prompt_turns: int = 0, tools: list[Any] | None = None
) -> EncodedChat:
    """Encode a conversation for training; `ChatTemplate.encode_chat` documents it."""
    if not messages or messages[-1].get("role") != "assistant":
        raise UserError("A training conversation must end with an assistant message.")
    notes: list[str] = []
    spoken = []
    for i in range(prompt_turns, len(messages)):
        if messages[i]["role"] == "assistant":
            if messages[i].get("train") is False:
                notes.append(UNMARKED)
            else:
                spoken.append(i)
    if not spoken:
        return EncodedChat([], [], [], tuple(notes))
    messages = messages[: spoken[-1] + 1]  # no later message is seen by a turn that is learned
    if template.removes_reasoning:
        notes += [REASONING_REMOVED for i in spoken if template.has_reasoning(messages[i])]
    notes += prompt_notes(template, messages, tools, spoken)
    messages = template.prepared(messages)
    whole = _whole(template, messages, tools, notes)
    turns = [_find_turn(template, whole, messages, i, tools, notes) for i in spoken]
    return _encode(template, whole.text, [turn for turn in turns if turn is not None], notes)


def prompt_notes(
    template: "ChatTemplate", messages: list["Message"], tools: list[Any] | None, spoken: Sequence[int] = ()
) -> list[str]:
    """Notes on what of a conversation a model is not shown: messages other than the assistant's, tools, reasoning.

    Args:
        template: The chat template.
        messages: The conversation, or a prompt.
        tools: JSON schemas of the tools that the assistant may call.
        spoken: Indices of the assistant's messages that are learned; their reasoning is another matter.

    Raises:
        UserError: If the template leaves out a user's message or tool calls: the rest would make no sense.
    """
    notes = []
    if template.removes_reasoning:
        context = [m for i, m in enumerate(messages) if m["role"] == "assistant" and i not in spoken]
        notes += [REASONING_HIDDEN for message in context if template.has_reasoning(message)]
    messages = template.prepared(messages)
    roles = tuple(str(message["role"]) for message in messages)
    calls = [i for i, message in enumerate(messages) if message.get("tool_calls")]
    if calls or roles not in template.unwritten:
        marked = [{**message, "content": f"{MARKER}{n}."} for n, message in enumerate(messages)]
        for i in calls:
            marked[i] = {**_marked_calls(messages[i], f"{_ARGUMENT}{i}."), "content": messages[i]["content"]}
        text = template.render(marked, tools=tools)
        if any(f"{_ARGUMENT}{i}." not in text for i in calls):
            raise UserError(
                "The chat template does not write the assistant's tool calls. Use a model whose template does, or "
                "remove such conversations from the data."
            )
        template.unwritten[roles] = [
            role for n, role in enumerate(roles) if role != "assistant" and f"{MARKER}{n}." not in text
        ]
    for role in template.unwritten[roles]:
        if role == "user":
            raise template.no_user_error()
        notes.append(f"{role} {NOT_SHOWN}")
    if tools and template.render(messages, tools=tools) == template.render(messages):
        notes.append(NO_TOOLS)
    return notes


def concerns_prompt(note: str) -> bool:
    """Return True for a note on what a model is shown, which all answers to a prompt share."""
    return note in (NO_TOOLS, REASONING_HIDDEN, UNKNOWN) or note.endswith(NOT_SHOWN)


def answer_prompt(template: "ChatTemplate", messages: list["Message"], tools: list[Any] | None = None) -> str:
    """The text up to where an answer's content begins; `ChatTemplate.answer_prompt` documents it."""
    marked = [*template.prepared(messages), {"role": "assistant", "content": MARKER}]
    before, found, _ = _whole(template, marked, tools, []).text.partition(MARKER)
    if not found:
        raise UserError("The chat template does not write the assistant's answer; check chat_template.jinja.")
    return before


def _whole(template: "ChatTemplate", messages: list["Message"], tools: list[Any] | None, notes: list[str]) -> _Text:
    """Render a conversation so that it begins with the prompt that asks for its last answer."""

    def plain(version: list["Message"]) -> str:
        return template.render(version, tools=tools)

    def continued(version: list["Message"]) -> str:
        return template.render(version[:-1], True, tools) + template.answer_text(version[-1]["content"])

    text = plain(messages)
    if len(messages) == 1:  # the assistant speaks first, and alone
        start = _after_header(template, alone := _Text(text, 0, plain), messages)
        if start is None:
            raise UserError("The conversation has no message that the answer replies to.")
        alone.last = start
        return alone
    prompt = template.render(messages[:-1], True, tools)
    if text.startswith(prompt):
        return _Text(text, len(prompt), plain)
    if template.opens_thoughts:
        if messages[-1].get("tool_calls"):
            raise UserError(
                "The chat template begins answers with the reasoning but does not write it before tool calls. Remove "
                "the tool calls from the data, or use another template (--chat_template)."
            )
        notes.append(APART)
        return _Text(continued(messages), len(prompt), continued)
    at = _common_prefix(text, prompt)
    raise UserError(
        "The chat template writes another text before the answer than in the prompt that asks for it, so a model "
        f"trained on it would not be asked in the form that it learned: {text[max(0, at - 20) : at + 40]!r} in the "
        f"conversation, {prompt[max(0, at - 20) : at + 40]!r} in the prompt. Correct chat_template.jinja."
    )


def _find_turn(
    template: "ChatTemplate",
    whole: _Text,
    messages: list["Message"],
    i: int,
    tools: list[Any] | None,
    notes: list[str],
) -> tuple[int, int] | None:
    """The start and the end of an assistant turn in the text; None, with a note, where it cannot be learned."""
    text, last = whole.text, i == len(messages) - 1
    start = whole.last if last else _start(template, whole, messages, i, tools, notes)
    if start is None:
        return None
    if (end := _end_of_plain_turn(template, text, messages, i, start)) is not None:
        return start, end

    content = _content(whole, messages, i)
    written = content and content[1]
    if messages[i].get("tool_calls"):
        written = _tool_calls_end(whole, messages, i)
    elif content is None and messages[i]["content"].strip() and MARKER not in whole.build(_marked(messages, i)):
        if last:
            raise UserError("The chat template does not write the assistant's answer; check chat_template.jinja.")
        notes.append(NO_TEXT)
        return None
    limit = len(text)
    if not last:
        following = (_content(whole, messages, j) for j in range(i + 1, len(messages)))
        limit = next((span[0] for span in following if span is not None and span[0] >= (written or start)), limit)
    if template.has_reasoning(messages[i]) and not _is_written(whole, messages, i):
        notes.append(REASONING_LOST if last else NO_REASONING)
    written = max(start, written or start)
    end = template.find_stop(text, written, limit)
    if end is None:
        if last:
            raise template.no_stop_error(text[written:])
        notes.append(NO_END)
        end = written
    return start, end


def _end_of_plain_turn(
    template: "ChatTemplate", text: str, messages: list["Message"], i: int, start: int
) -> int | None:
    """The end of a turn that is nothing but its content in what the template writes around it; None for others.

    It spares the renderings by which contents are found in general.
    """
    last = i == len(messages) - 1
    if not messages[i].keys() <= {"role", "content"} or (not last and messages[i + 1]["role"] != "user"):
        return None
    if last not in template.frames:
        template.frames[last] = _frame(template, last)
    if (frame := template.frames[last]) is None:
        return None
    lead, tail, stop = frame
    written = f"{lead}{messages[i]['content']}{tail}"
    if not text.startswith(written, start) or (last and len(text) != start + len(written)):
        return None
    return start + len(written) - len(tail) + stop


def _frame(template: "ChatTemplate", last: bool) -> tuple[str, str, int] | None:
    """The template's text before an answer's content and after it, up to the next message, and its stop token's end."""
    asked: list[Message] = [{"role": "user", "content": "?"}]
    marked: list[Message] = [{"role": "assistant", "content": MARKER}, {"role": "user", "content": MARKER}]
    try:
        prompt = template.render(asked, True)
        text = template.render([*asked, *marked[: 1 if last else 2]])
    except UserError:
        return None
    lead, *tails = text.removeprefix(prompt).split(MARKER)
    if not text.startswith(prompt) or len(tails) != (1 if last else 2):
        return None
    stop = template.find_stop(tails[0], 0, len(tails[0]))
    return None if stop is None else (lead, tails[0], stop)


def _start(
    template: "ChatTemplate",
    whole: _Text,
    messages: list["Message"],
    i: int,
    tools: list[Any] | None,
    notes: list[str],
) -> int | None:
    """Find the start of an earlier turn: after its prompt, or after the prompt's end where the rest was rewritten."""
    text = whole.text
    if i == 0:
        start = _after_header(template, whole, messages)
        if start is None:
            notes.append(NO_PROMPT)
        return start
    try:
        if text.startswith(prompt := template.render(messages[:i], True, tools)):
            return len(prompt)
        asked = template.render(_marked(messages[:i], i - 1), True, tools)
    except UserError:  # a template may refuse the beginning of a conversation that it accepts as a whole
        asked = ""
    _, found, header = asked.rpartition(MARKER)
    before = _content(whole, messages, i - 1)
    if not found or before is None or not text.startswith(header, before[1]):
        notes.append(NO_PROMPT if not found else OTHER_HEADER)
        return None
    notes.append(OTHER_CONTEXT)
    return before[1] + len(header)


def _after_header(template: "ChatTemplate", whole: _Text, messages: list["Message"]) -> int | None:
    """Find the start of an answer that opens a conversation: after the header that a prompt would end with."""
    header, content = template.generation_header, _content(whole, messages, 0)
    if not header or content is None:
        return None
    start = whole.text.find(header, 0, content[0])
    return None if start < 0 else start + len(header)


def _content(whole: _Text, messages: list["Message"], i: int) -> tuple[int, int] | None:
    """Find a message's content in the text; None if the template does not write it, or more than once."""
    if i not in whole.contents:
        before, found, after = whole.build(_marked(messages, i)).partition(MARKER)
        if found and MARKER not in after and whole.text.endswith(after):
            end = len(whole.text) - len(after)
            whole.contents[i] = min(_common_prefix(whole.text, before), end), end
        else:
            whole.contents[i] = None
    return whole.contents[i]


def _tool_calls_end(whole: _Text, messages: list["Message"], i: int) -> int | None:
    """Find the end of the arguments of an assistant turn's last tool call."""
    version = [*messages[:i], _marked_calls(messages[i], _ARGUMENT), *messages[i + 1 :]]
    _, found, after = whole.build(version).rpartition(_ARGUMENT)
    return len(whole.text) - len(after) if found and whole.text.endswith(after) else None


def _marked_calls(message: "Message", mark: str) -> "Message":
    """An assistant message with the arguments of its last tool call replaced by a mark."""
    *others, call = message["tool_calls"]
    if "function" in call:
        call = {**call, "function": {**call["function"], "arguments": {mark: mark}}}
    else:
        call = {**call, "arguments": {mark: mark}}
    return {**message, "tool_calls": [*others, call]}


def _is_written(whole: _Text, messages: list["Message"], i: int) -> bool:
    """Return True if the text has the reasoning of an assistant turn."""
    message = {**messages[i]}
    content = str(message["content"])
    if "</think>" in content:
        message["content"] = f"<think>\n{MARKER}\n</think>\n\n{content.rpartition('</think>')[2].strip()}"
    for name in REASONING_FIELDS:
        if name in message:
            message[name] = MARKER
    return MARKER in whole.build([*messages[:i], message, *messages[i + 1 :]])


def split_reasoning(content: str) -> tuple[str, str]:
    """The reasoning that an answer begins with, "" if it has none, and what follows it."""
    before, found, after = content.partition("</think>")
    opened = before.lstrip().startswith("<think>")
    if not found or ("<think>" in before and not opened):
        return "", content
    return before.lstrip().removeprefix("<think>").strip(), after.lstrip()


def _marked(messages: list["Message"], i: int) -> list["Message"]:
    """A conversation with one content replaced by the marker."""
    return [*messages[:i], {**messages[i], "content": MARKER}, *messages[i + 1 :]]


def _common_prefix(a: str, b: str) -> int:
    """The number of characters that two texts begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _encode(template: "ChatTemplate", text: str, turns: list[tuple[int, int]], notes: list[str]) -> EncodedChat:
    """Encode the text up to the end of its last turn to learn; ids in the turns are learned."""
    if not turns:
        return EncodedChat(template.encode(text), [], [], tuple(notes))
    encoding = template.tokenizer.encode(text, add_special_tokens=False)
    tokens = list(zip(encoding.ids, encoding.offsets, strict=True))

    def cuts(n: int) -> bool:
        """Return True for a token that cuts the text: tokens before it do not depend on the text after it."""
        token, (begin, end) = tokens[n]
        return text[begin:end].strip() == template.added_tokens.get(token)

    for start, _ in turns:
        index = bisect.bisect_left(tokens, start, key=lambda token: token[1][0])
        first = next((n for n in range(index - 1, -1, -1) if cuts(n)), 0)
        begin = tokens[first][1][0] if first < len(tokens) else 0
        prompt = template.tokenizer.encode(text[begin:start], add_special_tokens=False)
        if prompt.ids == [token for token, _ in tokens[first:index]]:
            continue
        if APART not in notes:
            notes.append(RETOKENIZED)
        after = next((n for n in range(index, len(tokens)) if cuts(n)), len(tokens))
        upto = tokens[after][1][0] if after < len(tokens) else len(text)
        again = [(i, (begin + a, begin + b)) for i, (a, b) in zip(prompt.ids, prompt.offsets, strict=True)]
        again += [(i, (start, upto)) for i in template.encode_inside(text[start:upto])]
        tokens[first:after] = again
    end = max(end for _, end in turns)
    tokens = [token for token in tokens if token[1][1] <= end]
    ids = template.checked_ids([token for token, _ in tokens])
    if template.unknown_id in ids:
        notes.append(UNKNOWN)
    learned = [any(a <= start and stop <= b for a, b in turns) for _, (start, stop) in tokens]
    first = learned.index(True) if True in learned else len(ids)
    return EncodedChat(ids[:first], ids[first:], learned[first:], tuple(notes))
