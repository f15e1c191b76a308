"""Rows that are asked: read, checked for what the rewards need, and encoded as prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from data_prep.rows import Row, iterate_jsonl, row_problem
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.training.rewards import Rewards


@dataclass(frozen=True)
class Question:
    """A row that can be asked, and its prompt's ids."""

    row: Row
    prompt: list[int]


def questions_of(
    fabric: L.Fabric, settings: dict[str, Any], rewards: Rewards
) -> tuple[ChatTemplate, dict[str, list[Question]]]:
    """A step's chat template, and its questions for training, validation and test; says what was left out.

    Raises:
        UserError: If the data is not usable, or no question is left.
    """
    template = ChatTemplate.from_checkpoint(settings["checkpoint_dir"]).with_reasoning(settings["reasoning"])
    room = settings["train"].max_seq_length - settings["max_new_tokens"]
    questions: dict[str, list[Question]] = {}
    limits = {"train": None, "validation": settings["max_val_rows"], "test": settings["max_test_rows"]}
    for split, most in limits.items():
        path = Path(settings["data"]) / f"{split}.jsonl"
        if split == "test" and (not most or not path.is_file()):
            questions[split] = []
            continue
        rows = read_questions(path, rewards.fields, settings["kinds"])[:most]
        rewards.check(rows, path)
        questions[split], told = encode_questions(rows, template, room, str(path))
        fabric.print(told)
        if not questions[split]:
            raise UserError(f"No question is left to ask. {told}\nRaise --train.max_seq_length.")
    return template, questions


def read_questions(path: Path, fields: Sequence[str], kinds: list[str] | None) -> list[Row]:
    """Rows that can be asked and judged: verifiable or scoring rows, or conversations that carry "answers".

    Args:
        path: A `.jsonl` file.
        fields: What the rewards read of them, besides the prompt.
        kinds: Only rows of these kinds.

    Raises:
        UserError: If the file is missing, a line is malformed, or no row has what the rewards read.
    """
    rows = []
    for number, row in iterate_jsonl(path):
        if isinstance(row, dict) and "messages" in row:
            if problem := row_problem(row, "messages"):
                raise UserError(f"{path}, line {number}: {problem}.")
            row = {**row, "prompt": row["messages"][:-1]}
        shape = "scoring" if isinstance(row, dict) and "choices" in row else "verifiable"
        judged = isinstance(row, dict) and all(field in row for field in fields)
        if judged and (problem := row_problem({"answers": ["-"], **row}, shape)):
            raise UserError(f"{path}, line {number}: {problem}.")
        if judged and (kinds is None or row.get("kind") in kinds):
            rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows{_of_kinds(kinds)} with {_needed(fields)}")
    return rows


def _of_kinds(kinds: list[str] | None) -> str:
    return f" of kind {', '.join(kinds)}" if kinds else ""


def _needed(fields: Sequence[str]) -> str:
    """What rewards read of a row, in words, and how a row gets it."""
    if "answer" in fields:
        return (
            '"answer", which the reward letter reads: the index of the right one of the "choices", '
            'as in {"prompt": ..., "choices": ["no", "yes"], "answer": 1}.'
        )
    if "answers" in fields:
        return (
            '"answers", which the rewards read: a list of texts that count as right, as in '
            '{"question": ..., "answers": ["18"]}. Add them to your file, or call the field with the right answer '
            r'"answer" or "solution" (`#### 18` or \boxed{18} at its end is found there), and run `make data` again.'
        )
    return "a prompt."


def encode_questions(rows: list[Row], template: ChatTemplate, room: int, name: str) -> tuple[list[Question], str]:
    """Encode prompts.

    Args:
        rows: Rows with a "prompt".
        template: The checkpoint's.
        room: The most tokens of a prompt; longer ones are dropped, and counted.
        name: What the rows are.

    Returns:
        The questions, and what became of the rows, in words.
    """
    questions = []
    for number, row in enumerate(rows, start=1):
        try:
            questions.append(Question(row, template.prompt_ids(row["prompt"], row.get("tools"))))
        except UserError as e:
            raise UserError(f"{name}, row {number} ({row['prompt'][0]['content'][:60]!r}): {e}") from None
    kept = [question for question in questions if len(question.prompt) <= room]
    return (
        kept,
        f"{name}: {len(kept):,} of {len(rows):,} questions; {len(rows) - len(kept):,} dropped: over {room} tokens",
    )
