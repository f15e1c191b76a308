"""Rows that are asked: read, checked for what the rewards need, and encoded as prompts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from data_prep.rows import Row, iterate_jsonl, row_problem
from workflows.chat_spans import UNKNOWN, prompt_notes
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
        rows, left_out = read_and_count(path, rewards.fields, settings["kinds"])
        rows = rows[:most]
        rewards.check(rows, path)
        questions[split], told = encode_questions(rows, template, room, str(path))
        fabric.print(told + left_out)
        if not questions[split]:
            raise UserError(f"No question is left to ask. {told}\nRaise --train.max_seq_length.")
    return template, questions


def read_questions(path: Path, fields: Sequence[str], kinds: list[str] | None) -> list[Row]:
    """Return the rows of `read_and_count`."""
    return read_and_count(path, fields, kinds)[0]


def read_and_count(path: Path, fields: Sequence[str], kinds: list[str] | None) -> tuple[list[Row], str]:
    """Read rows that can be asked and judged: verifiable or scoring rows, or conversations that carry "answers".

    Args:
        path: A `.jsonl` file.
        fields: What the rewards read of them, besides the prompt.
        kinds: Only rows of these kinds.

    Returns:
        The rows, and how many of these kinds are left out because they lack what the rewards read, in words.

    Raises:
        UserError: If the file is missing, a line is malformed, or no row has what the rewards read.
    """
    rows = []
    others: Counter[str] = Counter()
    lacking = 0
    for number, row in iterate_jsonl(path):
        if not isinstance(row, dict) or "messages" in row:
            if problem := row_problem(row, "messages"):
                raise UserError(f"{path}, line {number}: {problem}.")
            row = {**row, "prompt": row["messages"][:-1]}
        shape = "scoring" if "choices" in row else "verifiable"
        judged = all(field in row for field in fields)
        if judged and (problem := row_problem({"answers": ["-"], **row}, shape)):
            raise UserError(f"{path}, line {number}: {problem}.")
        if kinds is not None and row.get("kind") not in kinds:
            others[str(row.get("kind"))] += 1
        elif judged:
            rows.append(row)
        else:
            lacking += 1
    if others and kinds is not None and not rows and not lacking:
        found = ", ".join(f"{kind} ({count:,})" for kind, count in others.most_common(10))
        raise UserError(f"{path} has no rows of kind {', '.join(kinds)}. Its kinds are {found}. Choose by --kinds.")
    if not rows:
        raise UserError(f"{path} has no rows with {_needed(fields)}")
    named = " or ".join(f'"{field}"' for field in fields)
    return rows, f"\n  {lacking:,} more rows have no {named} and are not asked" if lacking else ""


def _needed(fields: Sequence[str]) -> str:
    """Return in words what rewards read of a row, and how a row gets it."""
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
    notes: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        try:
            questions.append(Question(row, template.prompt_ids(row["prompt"], row.get("tools"))))
            notes.update(prompt_notes(template, row["prompt"], row.get("tools")))
            notes.update([UNKNOWN] if template.unknown_id in questions[-1].prompt else [])
        except UserError as e:
            raise UserError(f"{name}, row {number} ({row['prompt'][0]['content'][:60]!r}): {e}") from None
    kept = [question for question in questions if len(question.prompt) <= room]
    told = f"{name}: {len(kept):,} of {len(rows):,} questions; {len(rows) - len(kept):,} dropped: over {room} tokens"
    return kept, told + "".join(f"\n  {count:,} {note}" for note, count in notes.items())
