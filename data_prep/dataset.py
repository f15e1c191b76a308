"""A prepared data set and its folder: three JSONL files and manifest.json; beside it NAME_mcq for scoring."""

import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.rows import Row, row_problem, write_rows
from data_prep.splits import Item, check_splits
from workflows.errors import UserError
from workflows.files import atomic_dir, sha256, write_json


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
        splits: Items of train, validation and test.
        source: Where they came from.
        split_rule: How the split was made, in words.
        dropped: Numbers of what was left out, by reason.
        notes: Further numbers worth knowing, by what they count.
    """

    name: str
    splits: dict[str, list[Item]]
    source: Source
    split_rule: str
    dropped: dict[str, int]
    notes: dict[str, int] = field(default_factory=dict)


def choose_kinds(dataset: DataSet, kinds: list[str] | None) -> None:
    """Keep only training rows of the given kinds.

    Raises:
        UserError: If the data set has no rows of a kind; the message lists those it has.
    """
    if kinds is None:
        return
    items = [item for split in dataset.splits.values() for item in split]
    present = sorted({str(row["kind"]) for item in items for row in item.rows})
    if unknown := [kind for kind in kinds if kind not in present]:
        raise UserError(f"{dataset.name} has no rows of kind {', '.join(unknown)}; it has {', '.join(present)}.")
    for split, members in dataset.splits.items():
        dataset.splits[split] = [
            Item(item.keys, tuple(row for row in item.rows if row["kind"] in kinds), item.scoring) for item in members
        ]


def write_dataset(dataset: DataSet, out_dir: Path, seed: int) -> list[Path]:
    """Write a data set's folder, and NAME_mcq if it has scoring rows; each appears whole or not at all.

    Training rows are shuffled by `seed`; two runs with the same input and seed write the same bytes.

    Returns:
        The folders written.

    Raises:
        UserError: If a split is empty or there is no room on the disk.
    """
    check_splits(dataset.name, dataset.splits)
    rows = {split: [row for item in items for row in item.rows] for split, items in dataset.splits.items()}
    random.Random(seed).shuffle(rows["train"])
    scoring = {
        split: [item.scoring for item in dataset.splits[split] if item.scoring] for split in ("validation", "test")
    }
    written = []
    if any(scoring.values()):
        # Written first: whoever finds NAME/manifest.json may rely on NAME_mcq too.
        written.append(_write(out_dir / f"{dataset.name}_mcq", dataset, scoring, "scoring", seed))
    written.append(_write(out_dir / dataset.name, dataset, rows, "messages", seed))
    return written


def _write(directory: Path, dataset: DataSet, rows: dict[str, list[Row]], shape: str, seed: int) -> Path:
    for split, members in rows.items():
        if not members:
            raise UserError(f"{directory.name}: the {split} split has no rows. Choose other --kinds or sizes.")
        for row in members:
            if problem := row_problem(row, shape):
                raise ValueError(f"{directory.name}, {split}: a row {problem}: {row}")
    with atomic_dir(directory) as temporary:
        files: dict[str, Any] = {}
        for split, members in rows.items():
            path = temporary / f"{split}.jsonl"
            write_rows(path, members)
            files[path.name] = {"rows": len(members), "kinds": _kinds(members), "sha256": sha256(path)}
        manifest = {
            "name": directory.name,
            "shape": shape,
            **asdict(dataset.source),
            "seed": seed,
            "split": dataset.split_rule,
            "splits": files,
            "dropped": dataset.dropped,
            "notes": dataset.notes,
        }
        write_json(temporary / "manifest.json", manifest)
    return directory


def _kinds(rows: list[Row]) -> dict[str, int]:
    return dict(sorted(Counter(row["kind"] for row in rows if "kind" in row).items()))
