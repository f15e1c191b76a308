"""Readers of rows: each turns the fields of a row in one of the forms of `data_prep.formats` into a row of a shape.

They raise a ValueError that says what is wrong with a row, and leave the check of the whole to `row_problem`.
"""

from typing import Any

from data_prep.answers import answers_of
from data_prep.fields import (
    CHOICES,
    CHOSEN,
    COMPLETIONS,
    CONTEXTS,
    CONVERSATIONS,
    LABELS,
    PROMPTS,
    REASONING,
    REFERENCES,
    SYSTEMS,
    Fields,
    is_blank,
    parse_flag,
)
from data_prep.rows import Row, row_problem, type_name
from data_prep.turns import add_reasoning, conversation, from_json, joined_parts, tools_of, turns_of

ANSWERED = (*REFERENCES, "answer", "solution")
"""Names of what a reward compares with."""
DOCUMENTS = ("sentences", "document", "text", "article", "source")
SUMMARIES = ("summaries", "summary", "highlights", "target")
"""Names of a document and of its summary, or summaries."""


def _question(fields: Fields) -> list[Row]:
    """Return what is asked: the system message, earlier turns, a context and the question of a row's own fields."""
    names: tuple[str, ...] = PROMPTS
    more = None
    if not fields.filled(*PROMPTS) and "user" in fields:
        names = ("user",)
    elif fields.filled("instruction") and fields.filled("input"):
        _, more = fields.take("input")
        names = tuple(name for name in PROMPTS if name != "input")
    name, value = fields.take(*names)
    if value is None:
        return []
    if more is not None:
        if not isinstance(value, str) or not isinstance(more, str):
            raise ValueError('"instruction" and "input" must be texts')
        value = f"{value}\n\n{more}"
    turns = turns_of(value, "user", name, fields)
    return _with_system(_history(fields) + _with_context(turns, fields), fields)


def _with_system(turns: list[Row], fields: Fields) -> list[Row]:
    """The turns after the row's own system message, which must be the one that they begin with, if they do."""
    system = _system(fields)
    first = [turn for turn in turns[:1] if turn["role"] == "system"]
    if system and first and system != first:
        raise ValueError("the system message beside the conversation differs from the one in it")
    return turns if first else system + turns


def _system(fields: Fields) -> list[Row]:
    name, system = fields.take(*SYSTEMS)
    if is_blank(system):
        return []
    if isinstance(system, list):
        system = joined_parts(system, fields)
    if not isinstance(system, str):
        raise ValueError(f'"{name}" must be a text, but is {type_name(system)}')
    return [{"role": "system", "content": system}]


def _history(fields: Fields) -> list[Row]:
    """Earlier turns, as pairs of a question and its answer (Alpaca, LLaMA-Factory) or as messages."""
    name, history = fields.take("history")
    history = from_json(history, name)
    if is_blank(history):
        return []
    if not isinstance(history, list):
        raise ValueError(f'"history" must be a list of [QUESTION, ANSWER], but is {type_name(history)}')
    if all(isinstance(turn, dict) for turn in history):
        return conversation(history, "history", fields)
    if not all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn) for turn in history):
        raise ValueError('"history" must be a list of [QUESTION, ANSWER], each a text')
    return [
        {"role": role, "content": text}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _with_context(turns: list[Row], fields: Fields) -> list[Row]:
    """The turns with a row's context before the last question."""
    name, context = fields.take(*CONTEXTS)
    if is_blank(context):
        return turns
    texts = context if isinstance(context, list) else [context]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f'"{name}" must be a text or a list of texts, but is {type_name(context)}')
    asked = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    if not asked:
        raise ValueError(f'"{name}" is there, but no question of the user\'s that it belongs to')
    question = turns[asked[-1]]
    question = {**question, "content": "\n\n".join([*texts, question["content"]])}
    fields.notes.append("contexts put before their question")
    return [*turns[: asked[-1]], question, *turns[asked[-1] + 1 :]]


def _answer(fields: Fields) -> list[Row]:
    """Return what is answered, with its reasoning."""
    names: tuple[str, ...] = COMPLETIONS
    if not fields.filled(*COMPLETIONS) and "assistant" in fields:
        names = ("assistant",)
    elif fields.filled("solution") and fields.filled("answer"):  # the solution and, for rewards, its result
        fields.take("answer")
        names = tuple(name for name in names if name != "answer")
    name, value = fields.take(*names)
    turns = turns_of(value, "assistant", name, fields)
    name, reasoning = fields.take(*REASONING)
    if not is_blank(reasoning):
        if len(turns) != 1 or not isinstance(reasoning, str):
            raise ValueError(f'"{name}" must be a text, beside an answer that is one message')
        add_reasoning(turns[0], name, reasoning)
    return turns


def _conversation(fields: Fields) -> list[Row]:
    """The messages of a row, up to the last answer; a question or an answer beside them must be one of theirs."""
    name, value = fields.take(*CONVERSATIONS)
    turns = _with_system(conversation(value, name, fields), fields)
    for names, role in ((PROMPTS, "user"), (COMPLETIONS, "assistant")):
        said = {turn["content"].strip() for turn in turns if turn["role"] == role}
        for beside in fields.filled(*names):
            text = fields.plain()[beside]
            if isinstance(text, str) and text.strip() in said:
                fields.take(beside)
            elif beside not in ANSWERED:  # those are for rewards
                raise ValueError(
                    f'it has both "{name}" and "{beside}", and no message of role {role} is that text; leave one of '
                    f"them out: --ignore_fields+={beside}"
                )
    return turns


def _up_to_last_answer(turns: list[Row], fields: Fields) -> list[Row]:
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < 0:
        hint = '; to ask it, call the messages "prompt"' if fields.filled(*ANSWERED) else ""
        raise ValueError(f"it has no answer: no message of role assistant{hint}")
    if last + 1 < len(turns):
        fields.notes.append("conversations cut after their last answer")
    return turns[: last + 1]


def _shown(turns: list[Row]) -> list[Row]:
    """Messages of a prompt: nothing in it is learned, so no flag says so."""
    return [{name: value for name, value in turn.items() if name != "train"} for turn in turns]


def _with_tools(row: Row, fields: Fields) -> Row:
    tools = tools_of(fields)
    return {**row, "tools": tools} if tools else row


def _references(fields: Fields, turns: list[Row]) -> Row:
    """Return what rewards compare with: answers that count as right, or options and the index of the right one."""
    plain = fields.plain()
    if isinstance(plain.get("choices"), list) and type(plain.get("answer")) is int:
        fields.take("choices")
        fields.take("answer")
        return {"choices": plain["choices"], "answer": plain["answer"]}
    answers = _right_answers(fields, turns)
    if answers is None:
        return {}
    for name in ANSWERED:
        fields.take(name)
    return {"answers": answers}


def _right_answers(fields: Fields, turns: list[Row]) -> list[str] | None:
    plain = fields.plain()
    return answers_of({**plain, "messages": turns, "answers": from_json(plain.get("answers"), "answers")})


def read_conversation(fields: Fields) -> Row:
    """A conversation to learn from."""
    turns = _up_to_last_answer(_conversation(fields), fields)
    return _with_tools({"messages": turns, **_references(fields, turns)}, fields)


def read_pair(fields: Fields) -> Row:
    """A question and its answer, as a conversation."""
    turns = [*_question(fields), *_answer(fields)]
    return _with_tools({"messages": turns, **_references(fields, turns)}, fields)


def _label(fields: Fields) -> bool:
    name, value = fields.take(*LABELS)
    label = parse_flag(value)
    if label is None:
        raise ValueError(
            f'"{name}" must say whether the answer is good, as true or false, but is {value!r:.40}; if it means '
            f"something else, leave it out: --ignore_fields+={name}"
        )
    if not isinstance(value, bool):
        fields.notes.append("labels written as 0 and 1 or as texts")
    return label


def read_labelled_conversation(fields: Fields) -> Row:
    """A conversation whose last answer is labelled as good or not."""
    turns = _shown(_up_to_last_answer(_conversation(fields), fields))
    return _with_tools({"prompt": turns[:-1], "completion": turns[-1:], "label": _label(fields)}, fields)


def read_labelled(fields: Fields) -> Row:
    """A question with an answer that is labelled as good or not."""
    row = {"prompt": _shown(_question(fields)), "completion": _shown(_answer(fields)), "label": _label(fields)}
    return _with_tools(row, fields)


def read_options(fields: Fields) -> Row:
    """A question with options; the right one is named by its index, its letter or its text."""
    name, choices = fields.take(*CHOICES)
    choices = from_json(choices, name)
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]) if isinstance(choices, list) else []
    if isinstance(choices, dict):  # by letters, or the texts and their letters side by side
        named = isinstance(choices.get("text"), list) and isinstance(choices.get("label"), list)
        letters = [str(letter) for letter in (choices["label"] if named else choices)]
        choices = choices["text"] if named else list(choices.values())
    _, answer = fields.take(*CHOSEN)
    if isinstance(answer, str) and isinstance(choices, list):
        found = [i for i, choice in enumerate(choices) if choice == answer] or [
            i for i, letter in enumerate(letters) if letter.lower() == answer.strip(" ().").lower()
        ]
        if len(found) == 1:
            answer = found[0]
        elif answer.strip().isdecimal():  # an index in a table's cell
            answer = int(answer)
    return {"prompt": _shown(_question(fields)), "choices": choices, "answer": answer}


def read_verifiable(fields: Fields) -> Row:
    """A question with answers that count as right."""
    answers = _right_answers(fields, [])
    for name in ANSWERED:
        fields.take(name)
    if answers is None:
        raise ValueError('it has no answer to compare with: give "answers", a list of texts that count as right')
    return _with_tools({"prompt": _shown(_question(fields)), "answers": answers}, fields)


def read_preference(fields: Fields) -> Row:
    """A prompt with a chosen and a rejected answer.

    The answers may repeat the prompt's messages before their own, and then there may be no prompt apart from them; or
    begin with turns that both share, which are then part of the prompt.

    Raises:
        ValueError: If there is no prompt, or the fields contradict each other.
    """
    prompt = _shown(_question(fields))
    sides = {}
    for name in ("chosen", "rejected"):
        _, value = fields.take(name)
        sides[name] = turns_of(value, "assistant", name, fields)
    whole = None
    if fields.filled(*CONVERSATIONS):
        name, value = fields.take(*CONVERSATIONS)
        whole = conversation(value, name, fields)
        if not prompt and whole != sides["chosen"]:
            prompt, whole = [*_system(fields), *_shown(whole)], None
    shared = 0
    most = min(map(len, sides.values())) - 1  # an answer is left to each
    while shared < most and sides["chosen"][shared] == sides["rejected"][shared]:
        shared += 1
    common = _shown(sides["chosen"][:shared])
    answers = {name: turns[shared:] for name, turns in sides.items()}
    if common and common[0]["role"] == "assistant":
        prompt = prompt + common
    elif common:
        prompt = _agreed(prompt or _system(fields), common)
    if not prompt:
        raise ValueError('it has no prompt, and "chosen" and "rejected" have no first message in common')
    if whole is not None and whole not in ([*prompt, *answers["chosen"]], prompt, sides["chosen"]):
        raise ValueError(f'it has both "{name}" and a prompt with another conversation; leave one of them out')
    if odd := [name for name, turns in answers.items() if not turns or turns[0]["role"] != "assistant"]:
        if not answers[odd[0]]:
            raise ValueError(f'"{odd[0]}" must be a list of at least one message, but is an empty list')
        raise ValueError(f"{odd[0]!r} does not begin with the assistant's message after the prompt")
    if any("train" in turn for turns in answers.values() for turn in turns):
        raise ValueError(
            "a preference is learned from whole answers, but one of their messages is marked as not learned"
        )
    return _with_tools({"prompt": prompt, **answers}, fields)


def _agreed(prompt: list[Row], common: list[Row]) -> list[Row]:
    """The conversation that a prompt and the messages which both answers repeat have in common.

    Raises:
        ValueError: If one is not part of the other.
    """
    systems = [turn for turn in (*prompt[:1], *common[:1]) if turn["role"] == "system"]
    asked, repeated = ([turn for turn in turns if turn not in systems[:1]] for turns in (prompt, common))
    if len(systems) > 1 and systems[0] != systems[1]:
        raise ValueError('the system message differs from the one with which "chosen" and "rejected" begin')
    if asked in (repeated[: len(asked)], repeated[len(repeated) - len(asked) :]):
        return systems[:1] + repeated
    if repeated == asked[len(asked) - len(repeated) :]:
        return systems[:1] + asked
    raise ValueError('the prompt differs from the messages with which "chosen" and "rejected" begin')


def _texts(value: Any, name: str) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name!r} must be a text or a list of texts, but is {type_name(value)}")
    return value


def read_summary(fields: Fields) -> Row:
    """A document and its summaries; "text" is the document as it is written, which is split into sentences later."""
    names = [next((n for n in names if n in fields), names[0]) for names in (DOCUMENTS, SUMMARIES)]
    (_, document), (_, summary) = (fields.take(name) for name in names)
    text = {"text": document} if isinstance(document, str) else {}
    return {**text, "sentences": _texts(document, names[0]), "summaries": _texts(summary, names[1])}


def read_translation(fields: Fields) -> Row:
    """A text and its translation."""
    row = {}
    for side in ("source", "target"):
        _, text = fields.take(side)
        if not isinstance(text, str):
            raise ValueError(f"{side!r} must be a text, but is {type_name(text)}")
        row[side] = text.strip()
    return row


def read_spans(fields: Fields) -> Row:
    """A question about a context with its answers, and the article's title where there is one."""
    row = {name: fields.take(name)[1] for name in ("question", "context", "answers")}
    unanswered = isinstance(row["answers"], dict) and not row["answers"].get("text")  # counted later
    if not unanswered and (problem := row_problem(row, "spans")):
        raise ValueError(problem)
    article = fields.plain().get("title")
    return {**row, "title": str(article)} if article else row
