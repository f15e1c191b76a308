"""One's own file: conversations, or questions with answers under the names in common use; or prompts with what is to be
judged: labelled answers (KTO), answers that count as right or options (GRPO)."""

from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.dataset import DataSet, Source
from data_prep.rows import SHAPES, Row, row_problem
from data_prep.splits import Item, key, random_splits
from data_prep.tables import read_table
from workflows.errors import UserError
from workflows.files import sha256

PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
"""Names of a question and its answer; beside "instruction", an "input" is appended to it as in Alpaca."""
ACCEPTED = 'one of {"messages": [...]}, ' + ", ".join(f'{{"{q}": ..., "{a}": ...}}' for q, a in PAIRS)
SHARE_HELD_OUT, MOST_HELD_OUT = 0.1, 500


def prepare(file: Path, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Make the data set.

    Args:
        file: A `.jsonl` file (`.json` and `.parquet` are read too).
        validation_size: Number of rows held out for validation; default a tenth, at most 500.
        test_size: Number of rows held out for the test; default a tenth, at most 500.
        seed: Seed of the split.

    Raises:
        UserError: If the file is missing or empty or a row is malformed; with its line.
    """
    table = read_table(file)
    if not table.rows:
        raise UserError(f"{file} holds no rows.")
    dropped: Counter[str] = Counter()
    items: dict[str, Item] = {}
    shape = _shape_of(table.rows[0])
    for index, raw in enumerate(table.rows):
        try:
            row = _conversation(raw) if shape == "messages" else _prompted(raw, shape)
        except ValueError as e:
            accepted = ACCEPTED if shape == "messages" else f"like the first, {SHAPES[shape]}"
            raise UserError(f"{table.place(index)}: {e}. A row is {accepted}.") from None
        whole = repr(row.get("messages", row))
        if whole in items:
            dropped["repeated row"] += 1
        turns = row["messages"][:-1] if shape == "messages" else row["prompt"]
        asked = [message["content"] for message in turns if message["role"] != "system"]
        items.setdefault(whole, Item(frozenset({key("question", "\n".join(asked))}), (row,)))
    size = max(1, min(MOST_HELD_OUT, round(SHARE_HELD_OUT * len(items))))
    return DataSet(
        name="jsonl",
        shape=shape,
        splits=random_splits(
            list(items.values()),
            size if validation_size is None else validation_size,
            size if test_size is None else test_size,
            seed,
        ),
        source=Source(file.name, str(file), "raw files", "the user's own", "none", {file.name: sha256(file)}),
        split_rule="at random by seed; rows with the same question stay together",
        dropped=dict(dropped),
    )


def _shape_of(first: Any) -> str:
    """The shape of a file's rows, told by the first: "messages", unless it has a prompt and what is to be judged."""
    fields = set(first) if isinstance(first, dict) else set()
    if "prompt" in fields and "messages" not in fields:
        telling = {"labelled": {"completion", "label"}, "scoring": {"choices"}, "verifiable": {"answers"}}
        return next((shape for shape, needed in telling.items() if needed <= fields), "messages")
    return "messages"


def _prompted(raw: Any, shape: str) -> Row:
    """A row of another shape than `messages`, its texts as turns.

    Raises:
        ValueError: If it is not of that shape.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"it is {raw!r:.40}, not an object")
    row = {name: value for name, value in raw.items() if value is not None}
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if name in row:
            row[name] = _turns(row[name], role, name)
    if problem := row_problem(row, shape):
        raise ValueError(problem)
    return row


def _conversation(raw: Any) -> Row:
    """Bring a row into the `messages` shape.

    Raises:
        ValueError: If it has none of the accepted forms; the message says what is wrong.
    """
    row = raw
    if isinstance(raw, dict) and "messages" not in raw:
        names = next((names for names in PAIRS if all(name in raw for name in names)), None)
        if names is None:
            raise ValueError(f"it has the fields {', '.join(map(repr, raw))}" if raw else "it is an empty object")
        prompt, answer = (raw[name] for name in names)
        if names[0] == "instruction" and isinstance(prompt, str) and isinstance(raw.get("input"), str) and raw["input"]:
            prompt = f"{prompt}\n\n{raw['input']}"
        row = {**_extra(raw), "messages": [*_turns(prompt, "user", names[0]), *_turns(answer, "assistant", names[1])]}
    if problem := row_problem(row, "messages"):
        raise ValueError(problem)
    return {**_extra(row), "messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}


def _turns(value: Any, role: str, name: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise ValueError(f"{name!r} must be a text or a list of messages")


def _extra(row: Row) -> Row:
    extra = {name: row[name] for name in ("kind", "id") if isinstance(row.get(name), str | int)}
    extra |= {name: row[name] for name in ("answers", "choices") if isinstance(row.get(name), list)}  # for rewards
    if "choices" in extra and isinstance(row.get("answer"), int):
        extra["answer"] = row["answer"]
    if "kind" in extra:
        extra["kind"] = str(extra["kind"])  # kinds are named on the command line
    return extra
