"""MedQuAD: consumer health questions with answers from sites of the US National Institutes of Health and the CDC."""

from collections import Counter
from pathlib import Path

from data_prep.dataset import DataSet, Source
from data_prep.rows import Row, question_row
from data_prep.splits import Item, key, random_splits
from data_prep.tables import Table, read_folder, read_hub

HUB_ID = "lavita/MedQuAD"
# Names of the columns in the raw files and, after them, on the Hub.
_FOCUS, _DOCUMENT = ("focus", "question_focus"), ("url", "document_url")


def prepare(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Make the data set; a document, and a focus (the disease that is asked about), stay in one split.

    Args:
        raw_dir: A folder with the questions as JSONL, JSON or Parquet, or None for the Hub.
        validation_size: Number of questions held out for validation; default 300.
        test_size: Number of questions held out for the test; default 500.
        seed: Seed of the split.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    files: dict[str, str] = {}
    if raw_dir is None:
        tables, revision = read_hub(HUB_ID)
    else:
        tables, files = read_folder(raw_dir)
        revision = "raw files"
    dropped: Counter[str] = Counter()
    items = [item for split in sorted(tables) for table in tables[split] for item in _items(table, dropped)]
    unique = list(
        {
            item.rows[0]["messages"][0]["content"] + item.rows[0]["messages"][1]["content"]: item for item in items
        }.values()
    )
    dropped["repeated question and answer"] = len(items) - len(unique)
    return DataSet(
        name="medquad",
        splits=random_splits(
            unique, 300 if validation_size is None else validation_size, 500 if test_size is None else test_size, seed
        ),
        source=Source(
            title="MedQuAD: Medical Question Answering Dataset",
            origin=HUB_ID if raw_dir is None else str(raw_dir),
            revision=revision,
            licence="CC BY 4.0",
            attribution="Ben Abacha A, Demner-Fushman D: A Question-Entailment Approach to Question Answering. "
            "BMC Bioinformatics 20 (2019), 511. https://github.com/abachaa/MedQuAD",
            files=files,
        ),
        split_rule="at random by seed; questions about the same focus, from the same document, or with the same "
        "question or answer stay together",
        dropped=dict(dropped),
    )


def _items(table: Table, dropped: Counter[str]) -> list[Item]:
    table.require({"question": str, "answer": (str, type(None))})
    items = []
    for row in table.rows:
        question, answer = row["question"].strip(), (row["answer"] or "").strip()
        if not answer:
            dropped["empty answer"] += 1
        elif not question:
            dropped["empty question"] += 1
        else:
            keys = {key("question", question), key("passage", answer)}
            keys |= {key("focus", focus) for focus in _values(row, _FOCUS)}
            keys |= {f"document:{url}" for url in _values(row, _DOCUMENT)}
            items.append(Item(frozenset(keys), (question_row(question, answer, "answer"),)))
    return items


def _values(row: Row, columns: tuple[str, ...]) -> list[str]:
    return [text for column in columns if (text := str(row.get(column) or "").strip())]
