"""One's own file: conversations, or pairs of a question and an answer under the names in common use."""

from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.dataset import DataSet, Source
from data_prep.rows import Row, row_problem
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
    for index, raw in enumerate(table.rows):
        try:
            row = _conversation(raw)
        except ValueError as e:
            raise UserError(f"{table.place(index)}: {e}. A row is {ACCEPTED}.") from None
        whole = repr(row["messages"])
        if whole in items:
            dropped["repeated row"] += 1
        asked = [message["content"] for message in row["messages"][:-1] if message["role"] != "system"]
        items.setdefault(whole, Item(frozenset({key("question", "\n".join(asked))}), (row,)))
    size = max(1, min(MOST_HELD_OUT, round(SHARE_HELD_OUT * len(items))))
    return DataSet(
        name="jsonl",
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
    if "kind" in extra:
        extra["kind"] = str(extra["kind"])  # kinds are named on the command line
    return extra
