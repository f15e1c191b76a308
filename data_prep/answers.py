r"""Answers that count as right, taken from the fields in which published data sets have them.

GRPO's verifiable rewards compare with a row's "answers". Few published files have that field: GSM8K writes the answer
after `####` at the end of its solution, MATH and NuminaMath inside `\boxed{}`, TRL's examples in "solution" or
"answer", other collections of mathematics in "final_answer", "expected_answer" or "ground_truth".
"""

import math
import re
from typing import Any

from data_prep.rows import Row

CHECKED_FIELDS = ("final_answer", "expected_answer", "ground_truth", "solution")
"""Fields whose text is there to be compared with: without a mark it is the answer as a whole, however long."""
ANSWER_FIELDS = ("final_answer", "expected_answer", "ground_truth", "answer", "solution", "completion", "output")
"""Fields that can hold a right answer, in the order in which they are read."""
MAX_SHORT_WORDS = 10
"""Maximum number of words of an unmarked "answer" that is compared with; a longer one is prose to learn from."""
NOT_ANSWERED_BY_TEXT = ("choices", "chosen", "label", "kto_tag")
"""Fields of rows in other shapes: an option's index, a preference, a completion that is good or bad."""

_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)\s*\Z", re.MULTILINE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def answers_of(row: Row) -> list[str] | None:
    r"""Return the texts that count as right answers to a row's question, for the rewards that compare with them.

    Args:
        row: A row as it is in the user's file, or in a canonical shape (the last message of `messages` counts only if
            it marks its answer by `####` or `\boxed{}`).

    Returns:
        "answers" as they are where the row has them; else the answer that the first of `ANSWER_FIELDS` marks (after
        `####` on its last line, in its last `\boxed{}`) or is, if it is short; None if there is none, or the row is of
        a shape that is judged otherwise (`NOT_ANSWERED_BY_TEXT`). Numbers become texts.

    Raises:
        ValueError: If "answers" is there and is no text, number or list of these; the message says what is wrong.
    """
    if (given := row.get("answers")) is not None:
        return _listed(given)
    if any(row.get(field) is not None for field in NOT_ANSWERED_BY_TEXT):
        return None
    for field in ANSWER_FIELDS:
        text = _text_of(row.get(field))
        if text and (found := marked_answer(text) or _whole(text, field)):
            return [found]
    messages = row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        last = messages[-1]
        text = _text_of(last.get("content")) if last.get("role") == "assistant" else None
        return [found] if text and (found := marked_answer(text)) else None
    return None


def marked_answer(text: str) -> str | None:
    r"""Return the answer that a text marks as its own: in its last `\boxed{}`, or after `####` on its last line.

    A heading of Markdown's fourth level has lines below it, and is not taken for an answer.
    """
    box = last_box(text)
    if box is not None:
        return box or None
    found = _HASHES.search(text)
    return found[1].strip() if found else None


def last_box(text: str) -> str | None:
    r"""Return what the last `\boxed{}` of a text holds, with braces nested to any depth.

    Returns:
        None if there is no box, and an empty text if the last one is empty or its closing brace is missing.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :]
    if not rest.startswith("{"):  # \boxed 5: TeX takes what follows
        bare = re.match(r"[^\s$.,;]*(?:[.,]\d+)*", rest)
        return bare[0] if bare else ""
    depth = 0
    for brace in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rest[1 : brace.start()].strip()
    return ""


def _whole(text: str, field: str) -> str | None:
    short = field == "answer" and "\n" not in text and len(text.split()) <= MAX_SHORT_WORDS
    return text if short or field in CHECKED_FIELDS else None


def _text_of(value: Any) -> str | None:
    """The text of a text or number that is not empty, else None."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


def _listed(given: Any) -> list[str]:
    if isinstance(given, dict):  # as SQuAD has them
        given = given.get("text")
    texts = [_text_of(answer) for answer in (given if isinstance(given, list) else [given])]
    found = [text for text in texts if text]
    if not found or len(found) < len(texts):
        raise ValueError('"answers" must be texts or numbers that count as right, none of them empty')
    return list(dict.fromkeys(found))
