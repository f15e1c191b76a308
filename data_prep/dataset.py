"""A prepared data set and its folder: three JSONL files, manifest.json and metrics.json; NAME_mcq for scoring,
NAME_pairs for preferences, NAME_thoughts for answers that think first, NAME_questions for answers that are verified."""

import random
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.rows import SPLITS, Row, row_problem, write_rows
from data_prep.splits import Item, check_splits
from workflows.checkpoint import metric, write_metrics
from workflows.errors import UserError
from workflows.files import atomic_dir, sha256, write_json
from workflows.measure import seconds_of_step

SHARE_HELD_OUT, MOST_HELD_OUT = 0.1, 500
"""Default share of the rows held out for validation and for the test, and maximum number."""


@dataclass(frozen=True)
class Source:
    """Where data came from, as `manifest.json` tells it.

    Attributes:
        title: The data set's full name.
        origin: The package, Hub id or folder it was read from.
        revision: Its version there; "raw files" are told by their hashes in `files`.
        licence: The licence stated by the source.
        attribution: What the licence asks users to say, and the paper to cite.
        files: sha256 of the raw files by name.
    """

    title: str
    origin: str
    revision: str
    licence: str
    attribution: str
    files: dict[str, str] = field(default_factory=dict)


@dataclass
class DataSet:
    """Items in their splits, and the story of how they got there.

    Attributes:
        name: The folder's name under the output folder.
        splits: Items of train, validation and test; a further split is a further file of the data set's folder.
        source: Where they came from.
        split_rule: How the split was made, in words.
        dropped: Numbers of what was left out, by reason.
        notes: Further numbers worth knowing, by what they count.
        shape: What the items' rows are (a key of `data_prep.rows.SHAPES`).
        read_as: What a file of the user's was taken for; empty for data sets by name.
        fields_not_used: Numbers of rows by the name of a field that nothing was made of.
    """

    name: str
    splits: dict[str, list[Item]]
    source: Source
    split_rule: str
    dropped: dict[str, int]
    notes: dict[str, int] = field(default_factory=dict)
    shape: str = "messages"
    read_as: str = ""
    fields_not_used: dict[str, int] = field(default_factory=dict)


def choose_kinds(dataset: DataSet, kinds: list[str] | None) -> None:
    """Keep only training rows of the given kinds.

    Raises:
        UserError: If the data set has no rows of a kind; the message lists those it has.
    """
    if kinds is None:
        return
    items = [item for split in dataset.splits.values() for item in split]
    present = sorted({row["kind"] for item in items for row in item.rows if "kind" in row})
    if unknown := [kind for kind in kinds if kind not in present]:
        has = ", ".join(present) or "no kinds"
        raise UserError(f"{dataset.name} has no rows of kind {', '.join(unknown)}; it has {has}.")
    for split, members in dataset.splits.items():
        dataset.splits[split] = [
            replace(item, rows=tuple(row for row in item.rows if row.get("kind") in kinds)) for item in members
        ]


def write_dataset(dataset: DataSet, out_dir: Path, seed: int, began: float) -> list[Path]:
    """Write a data set's folder; NAME_mcq, NAME_pairs, NAME_thoughts and NAME_questions if it has such rows.

    Each is written whole or not at all.

    Training rows are shuffled by `seed`; two runs with the same input and seed write the same bytes, the seconds in
    metrics.json aside.

    Args:
        dataset: What to write.
        out_dir: The folder of data directories.
        seed: Seed of the order of training rows.
        began: When the step began (`workflows.measure.step_began`).

    Returns:
        The folders written.

    Raises:
        UserError: If a split is empty or there is no room on the disk.
    """
    check_splits(dataset.name, dataset.splits)
    rows = {split: [row for item in items for row in item.rows] for split, items in dataset.splits.items()}
    scoring = {
        split: [item.scoring for item in dataset.splits[split] if item.scoring] for split in ("validation", "test")
    }
    pairs = {split: [item.pair for item in dataset.splits[split] if item.pair] for split in SPLITS}
    thoughts = {split: [item.thought for item in dataset.splits[split] if item.thought] for split in SPLITS}
    questions = {split: [item.question for item in dataset.splits[split] if item.question] for split in SPLITS}
    beside = [
        ("mcq", "scoring", scoring),
        ("pairs", "preference", pairs),
        ("thoughts", "messages", thoughts),
        ("questions", "verifiable", questions),
        ("", dataset.shape, rows),
    ]
    written = []
    # All are filled before one takes its place, so that no kill leaves one of them beside an older other: with another
    # seed that one's test questions may be training rows here. NAME comes last in place: whoever finds it has all.
    with ExitStack() as stack:
        for suffix, shape, split_rows in reversed(beside):  # the stack is unwound from its end
            if not any(split_rows.values()):
                continue
            if "train" in split_rows:
                random.Random(seed).shuffle(split_rows["train"])
            folder = out_dir / "_".join(filter(None, (dataset.name, suffix)))
            _fill(stack.enter_context(atomic_dir(folder)), folder.name, dataset, split_rows, shape, seed, began)
            written.append(folder)
    return written[::-1]


def _fill(
    folder: Path, name: str, dataset: DataSet, rows: dict[str, list[Row]], shape: str, seed: int, began: float
) -> None:
    """Write one data directory's files into a folder."""
    for split, members in rows.items():
        if not members:
            raise UserError(f"{name}: the {split} split has no rows. Choose other --kinds or sizes.")
        for row in members:
            if problem := row_problem(row, shape):
                raise ValueError(f"{name}, {split}: a row {problem}: {row}")
    files: dict[str, Any] = {}
    for split, members in rows.items():
        path = folder / f"{split}.jsonl"
        write_rows(path, members)
        files[path.name] = {"rows": len(members), "kinds": _kinds(members), "sha256": sha256(path)}
    manifest = {
        "name": name,
        "shape": shape,
        **({"read_as": dataset.read_as} if dataset.read_as else {}),
        **asdict(dataset.source),
        "seed": seed,
        "split": dataset.split_rule,
        "splits": files,
        "dropped": dataset.dropped,
        "notes": dataset.notes,
        "fields_not_used": dataset.fields_not_used,
    }
    write_json(folder / "manifest.json", manifest)
    counts = [metric("rows", len(members), split=split) for split, members in rows.items()]
    write_metrics(folder / "metrics.json", counts, seconds=seconds_of_step(began))


def _kinds(rows: list[Row]) -> dict[str, int]:
    return dict(sorted(Counter(row["kind"] for row in rows if "kind" in row).items()))
