"""The panel as text for the terminal: a prompt, and under it a line for each stage's answer."""

import textwrap
from typing import Any

WIDTH = 100
RIGHT = "right"
"""The label of the data's answer."""
HEADINGS = {
    **dict.fromkeys(("medical", "meaning", "naming"), "Taught facts, in words that no training row has"),
    "chat": "Chat",
    **dict.fromkeys(("advice", "advice_other"), "What should I do?"),
    "never_taught": "Terms that were never taught",
    "held_out": "Held-out questions",
}
_OPEN = ("chat", "advice", "advice_other")
"""Kinds of prompts without one right answer."""


def answer_of(record: dict[str, Any]) -> str:
    """An answer as it is shown: marked where it was cut, or in words why there is none."""
    if record.get("error"):
        return f"(no answer: {record['error']})"
    cut = record.get("done_reason") == "length"
    return (str(record["answer"]) + (" …" if cut else "")) or "(nothing)"


def heading_of(kind: str) -> str:
    """The heading over prompts of a kind."""
    return HEADINGS.get(kind, HEADINGS["held_out"])


def right_of(record: dict[str, Any]) -> str:
    """The right answer to a prompt; "" where many would be as good."""
    return "" if record["kind"] in _OPEN else str(record["wanted"])


def side_by_side(answers: dict[str, list[dict[str, Any]]], max_tokens: int) -> str:
    """Each prompt, then a line for each stage; equal answers of successive stages once.

    Args:
        answers: For each stage its records, one for each prompt.
        max_tokens: Maximum number of tokens of an answer.
    """
    stages = list(answers)
    width = max(map(len, (", ".join(stages[1:]), *stages, RIGHT)))
    lines, heading = [], ""
    for number, first in enumerate(answers[stages[0]]):
        if (now := heading_of(first["kind"])) != heading:
            lines += ["", heading := now]
        lines.append(shortened("  ", first["question"]))
        said = {stage: answer_of(answers[stage][number]) for stage in stages}
        for together, text in grouped(said):
            lines.append(shortened(f"    {', '.join(together):<{width}}  ", text))
        if wanted := right_of(first):
            lines.append(shortened(f"    {RIGHT:<{width}}  ", wanted))
    about = (
        "The same prompts to each stage, through Ollama: greedy answers, none chosen, at most "
        f"{max_tokens} tokens (full text in the report). Not medical advice."
    )
    return "\n".join(["", *textwrap.wrap(about, WIDTH), *lines])


def grouped(said: dict[str, str]) -> list[tuple[list[str], str]]:
    """Stages with their answers; those that repeat the answer of the stage before them are together, as "the same"."""
    rows: list[tuple[list[str], str]] = []
    before: str | None = None
    repeated: list[str] = []
    for stage, text in said.items():
        if text != before:
            repeated = []
            rows.append(([stage], text))
        elif repeated:
            repeated.append(stage)
        else:
            repeated = [stage]
            rows.append((repeated, "the same"))
        before = text
    return rows


def shortened(begin: str, text: str) -> str:
    """A text on one line, cut with … at the terminal's width."""
    line = begin + " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"
