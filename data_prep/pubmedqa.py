"""PubMedQA, its 1,000 labelled questions: does this abstract answer the question with yes, no or maybe?

The split is the official one: 500 questions for the test, named in `test_ground_truth.json`; where that file is absent
(the Hub does not have it), the authors' procedure is repeated and its result checked by hash.
"""

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.dataset import DataSet, Source
from data_prep.rows import Row, question_row, scoring_row
from data_prep.splits import Item, hold_out, key, without_shared
from data_prep.tables import Table, read_folder, read_hub
from workflows.errors import UserError
from workflows.files import read_json, sha256

HUB_ID = "qiaojin/PubMedQA"
CHOICES = ["yes", "no", "maybe"]
# The authors' file -> the Hub's columns.
_ORIGINAL_NAMES = {
    "QUESTION": "question",
    "CONTEXTS": "context",
    "LONG_ANSWER": "long_answer",
    "final_decision": "final_decision",
}
OFFICIAL_TEST_SHA256 = "406e3b89eff577ed38571eca5a5819734a6f49ac0437d171b6c64e5c3cd195f8"
"""sha256 of the 500 official ids, sorted as texts, one per line."""


def prepare(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Make the data set.

    Args:
        raw_dir: A folder with `ori_pqal.json` and `test_ground_truth.json` as the authors publish them, or with the
            Hub's columns as JSONL, JSON or Parquet; None for the Hub.
        validation_size: Number of questions held out for validation, of those that are not in the test; default 50.
        test_size: Must be None: the test is the official one.
        seed: Seed of the choice of validation questions.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    return _data_set("pubmedqa", raw_dir, validation_size, seed, _item)


def prepare_decisions(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """The same questions as texts to classify: question and abstract, and yes, no or maybe; see `prepare`."""
    return _data_set("pubmedqa_decisions", raw_dir, validation_size, seed, _decision_item, "classified")


def _data_set(
    name: str,
    raw_dir: Path | None,
    validation_size: int | None,
    seed: int,
    make: Callable[[Row], Item],
    shape: str = "messages",
) -> DataSet:
    raw = read(raw_dir)
    items = {str(row["pubid"]): make(row) for row in raw.table.rows}
    test = [item for pubid, item in items.items() if pubid in raw.test_ids]
    rest, shared = without_shared([item for pubid, item in items.items() if pubid not in raw.test_ids], test)
    validation, train = hold_out(rest, 50 if validation_size is None else validation_size, seed)
    return DataSet(
        name=name,
        splits={"train": train, "validation": validation, "test": test},
        source=source(raw_dir, raw),
        split_rule="test: the official 500 questions; validation: at random by seed from the other 500",
        dropped={"shares its question or abstract with the test": shared},
        shape=shape,
    )


@dataclass(frozen=True)
class Raw:
    """The labelled questions as they were read.

    Attributes:
        table: A row for each, in the Hub's columns.
        test_ids: Those of the official test.
        revision: What was read.
        files: sha256 of the raw files by name.
    """

    table: Table
    test_ids: set[str]
    revision: str
    files: dict[str, str]


def read(raw_dir: Path | None) -> Raw:
    """Read and check the labelled questions; see `prepare`."""
    files: dict[str, str] = {}
    test_ids: set[str] | None = None
    if raw_dir is None:
        hub_tables, revision = read_hub(HUB_ID, "pqa_labeled")
        table = _single(hub_tables, HUB_ID)
    else:
        revision = "raw files"
        original, ground_truth = raw_dir / "ori_pqal.json", raw_dir / "test_ground_truth.json"
        if original.is_file():
            table, files = _read_original(original), {original.name: sha256(original)}
        else:
            tables, files = read_folder(raw_dir, ignore=[ground_truth.name])
            table = _single(tables, str(raw_dir))
        if ground_truth.is_file():
            test_ids = _read_ground_truth(ground_truth)
            files[ground_truth.name] = sha256(ground_truth)
    labels = _check(table)
    if test_ids is None:
        test_ids = official_test_ids(labels)
    elif unknown := sorted(test_ids - set(labels)):
        raise UserError(f"{table.name} lacks {len(unknown)} of the test's questions, {unknown[0]} among them.")
    return Raw(table, test_ids, revision, files)


def source(raw_dir: Path | None, raw: Raw) -> Source:
    """Where the questions came from."""
    return Source(
        title="PubMedQA, labelled subset (PQA-L)",
        origin=f"{HUB_ID}, pqa_labeled" if raw_dir is None else str(raw_dir),
        revision=raw.revision,
        licence="MIT",
        attribution="Jin Q et al.: PubMedQA: A Dataset for Biomedical Research Question Answering. EMNLP 2019. "
        "https://pubmedqa.github.io",
        files=raw.files,
    )


def official_test_ids(labels: dict[str, str]) -> set[str]:
    """The official test ids, found by the authors' procedure.

    Half of each answer's questions are taken, shuffled by Python's generator with seed 0
    (https://github.com/pubmedqa/pubmedqa, preprocess/split_dataset.py).

    Args:
        labels: Answer by id, in the order of the original file.

    Raises:
        UserError: If the result is not the official one: other questions, or another order.
    """
    rng = random.Random(0)
    test_ids: set[str] = set()
    for choice in CHOICES:
        ids = [pubid for pubid, label in labels.items() if label == choice]
        rng.shuffle(ids)
        test_ids |= set(ids[math.ceil(len(ids) / 2) :])
    if hashlib.sha256("\n".join(sorted(test_ids)).encode()).hexdigest() != OFFICIAL_TEST_SHA256:
        raise UserError(
            "These are not the 1,000 labelled questions of PubMedQA in their original order, so the official test "
            "cannot be told from the rest. Put test_ground_truth.json (https://github.com/pubmedqa/pubmedqa, data/) "
            "beside them under --raw_dir."
        )
    return test_ids


def _single(tables: dict[str, list[Table]], name: str) -> Table:
    found = [table for members in tables.values() for table in members]
    if len(found) != 1:
        raise UserError(f"{name}: expected one table of labelled questions, found {len(found)}.")
    return found[0]


def _read_original(path: Path) -> Table:
    rows = []
    for pubid, fields in read_json(path).items():
        if not isinstance(fields, dict) or not fields.keys() >= set(_ORIGINAL_NAMES):
            raise UserError(f"{path}, question {pubid}: not an object with {', '.join(_ORIGINAL_NAMES)}.")
        row = {name: fields[original] for original, name in _ORIGINAL_NAMES.items()}
        rows.append({**row, "pubid": pubid, "context": {"contexts": fields["CONTEXTS"]}})
    return Table(str(path), rows)


def _read_ground_truth(path: Path) -> set[str]:
    answers = read_json(path)
    if not answers or not all(answer in CHOICES for answer in answers.values()):
        raise UserError(f"{path} is not an object of ids with yes, no or maybe. Get test_ground_truth.json again.")
    return set(answers)


def _check(table: Table) -> dict[str, str]:
    """Answer by id; every row is checked."""
    table.require({"pubid": (int, str), "question": str, "context": dict, "long_answer": str, "final_decision": str})
    labels: dict[str, str] = {}
    for index, row in enumerate(table.rows):
        passages = row["context"].get("contexts")
        if not isinstance(passages, list) or not passages or not all(isinstance(text, str) for text in passages):
            raise UserError(f"{table.place(index)}: 'context' has no list of texts named 'contexts'.")
        if row["final_decision"] not in CHOICES:
            raise UserError(
                f"{table.place(index)}: 'final_decision' is {row['final_decision']!r}, not yes, no or maybe."
            )
        if str(row["pubid"]) in labels:
            raise UserError(f"{table.place(index)}: question {row['pubid']} is there twice.")
        labels[str(row["pubid"])] = row["final_decision"]
    return labels


def _decision_item(row: Row) -> Item:
    text = " ".join([row["question"].strip(), *row["context"]["contexts"]])
    return Item(_item(row).keys, ({"text": text, "label": row["final_decision"]},))


def _item(row: Row) -> Item:
    abstract = "\n".join(row["context"]["contexts"])
    question, decision, pubid = row["question"].strip(), row["final_decision"], str(row["pubid"])
    asked = f"Abstract: {abstract}\n\nQuestion: {question}\nAnswer yes, no or maybe."
    explain = f"Abstract: {abstract}\n\nQuestion: {question}\nAnswer in one or two sentences."
    rows = [question_row(asked, decision, "decision", id=pubid)]
    if conclusion := row["long_answer"].strip():
        rows.append(question_row(explain, conclusion, "conclusion", id=pubid))
    keys = frozenset({key("question", question), key("passage", abstract), f"id:{pubid}"})
    return Item(keys, tuple(rows), scoring_row(asked, CHOICES, CHOICES.index(decision), id=pubid))
