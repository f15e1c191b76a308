"""The user's own file, in any of the forms in common use (`data_prep.formats`), as a data set."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep import preferences, spans, summaries, translations
from data_prep.dataset import MOST_HELD_OUT, SHARE_HELD_OUT, DataSet, Source
from data_prep.fields import plain_name
from data_prep.formats import Intake, Shape
from data_prep.rows import SPLITS, Row
from data_prep.splits import Item, conversation_key, groups_of, random_splits
from data_prep.tables import read_table
from workflows.errors import UserError, listed
from workflows.files import sha256


def prepare(
    file: Path,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
    shape: Shape | None = None,
    skip_broken: bool = False,
    ignore_fields: list[str] | None = None,
) -> DataSet:
    """Make the data set.

    Args:
        file: The file; see `data_prep.tables` for the formats.
        validation_size: Number of rows held out for validation; default a tenth, at most 500.
        test_size: Number of rows held out for the test; default a tenth, at most 500.
        seed: Seed of the split.
        shape: What the rows are; by default that of the first row whose form is known.
        skip_broken: Leave out rows that cannot be read, instead of refusing the file.
        ignore_fields: Names of fields to leave out.

    Raises:
        UserError: If the file is missing or empty or a row is malformed; with its line.
    """
    intake = Intake(shape, frozenset(map(plain_name, ignore_fields or ())))
    rows, problems, total = _read(file, intake)
    if not total:
        raise UserError(f"{file} holds no rows.")
    if broken := total - len(rows):
        told = listed(problems, f"of {total:,} rows of {file} cannot be read", number=broken)
        if not skip_broken or not rows:
            go_on = " Fix these rows, or leave them out: --skip_broken true." if rows else ""
            decided = " (the shape of the first row; --shape names another)" if rows and shape is None else ""
            raise UserError(f"{told}\nA row is {intake.accepted()}{decided}.{go_on}")
        print(told)
    dropped: Counter[str] = Counter({"broken row": broken} if broken else {})
    source = Source(file.name, str(file), "raw files", "the user's own", "none", {file.name: sha256(file)})
    sizes = (validation_size, test_size)
    match intake.shape:
        case "preference":
            dataset = preferences.of_rows(rows, source, *sizes, seed, dropped)
        case "translated":
            dataset = translations.of_rows(rows, source, *sizes, seed, dropped)
        case "summarised":
            dataset = summaries.of_rows(rows, source, *sizes, seed, dropped)
        case "spans":
            dataset = spans.of_rows(rows, source, *sizes, seed, dropped)
        case _:
            dataset = _of_rows(rows, str(intake.shape), source, *sizes, seed, dropped)
    dataset.read_as = intake.read_as()
    dataset.notes |= dict(intake.notes)
    dataset.fields_not_used = dict(intake.unused)
    return dataset


def _read(file: Path, intake: Intake) -> tuple[list[Row], list[str], int]:
    """The rows of a file in our form, what is wrong with the others, and the number of all."""
    unreadable: list[str] = []
    table = read_table(file, unreadable)
    rows = []
    broken: dict[str, list[int]] = {}
    for index, raw in enumerate(table.rows):
        try:
            rows.append(intake.read(_without_nulls(raw) if file.suffix.lower() == ".parquet" else raw))
        except ValueError as e:
            broken.setdefault(str(e), []).append(index)
    problems = [f"{table.places(indices)}: {problem}." for problem, indices in broken.items()]
    return rows, [*unreadable, *problems], len(table.rows) + len(unreadable)


def _without_nulls(value: Any) -> Any:
    """A value without an object's null fields: Parquet has each field of a column in each of its objects.

    NaN is null, too: pandas writes a number that is missing so.
    """
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None and part == part}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _of_rows(
    rows: list[Row],
    shape: str,
    source: Source,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
    dropped: Counter[str],
) -> DataSet:
    """Conversations, or prompts with what is to be judged."""
    items: dict[str, Item] = {}
    asked: dict[str, frozenset[str]] = {}
    for row in rows:
        told = json.dumps({name: value for name, value in row.items() if name not in ("id", "kind")}, sort_keys=True)
        whole = hashlib.sha256(told.encode()).hexdigest()
        if whole in items:
            dropped["repeated row"] += 1
            continue
        turns = row["messages"][:-1] if shape == "messages" else row["prompt"]
        items[whole] = Item(frozenset({conversation_key(turns, row.get("tools"))}), (row,))
        asked[whole] = frozenset({json.dumps([turns, row.get("tools")], sort_keys=True)})
    rule = "at random by seed; rows with the same question stay together"
    if len(groups_of(list(items.values()))) < len(SPLITS) <= len(set(asked.values())):
        items = {whole: replace(item, keys=asked[whole]) for whole, item in items.items()}
        rule += ", compared exactly: ignoring case and punctuation leaves fewer questions than splits"
        print("Ignoring case and punctuation leaves fewer questions than splits: only equal texts stay in one split.")
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
        source=source,
        split_rule=rule,
        dropped=dict(dropped),
    )
