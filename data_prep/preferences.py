"""Preferences: a prompt with an answer that people (or a stronger model) chose and one that they rejected.

Read are the Hub's data sets in their own columns, raw files of the same columns, and the user's own files; all become
{"prompt": [...], "chosen": [...], "rejected": [...]} rows. The pairs of `hpo` (`data/hpo_pairs`) are made here, too:
chosen is a finding's definition, rejected that of its nearest relative in the same split.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.dataset import MOST_HELD_OUT, SHARE_HELD_OUT, DataSet, Source
from data_prep.formats import Intake
from data_prep.ontology import Ontology
from data_prep.rows import Row, normalise
from data_prep.splits import Item, conversation_key, hold_out, random_splits, without_shared
from data_prep.tables import Table, read_folder, read_hub
from workflows.errors import UserError


@dataclass(frozen=True)
class Collection:
    """A published set of preferences.

    Attributes:
        hub_id: Its id on the Hub, or None where it is published elsewhere.
        title: Its full name.
        licence: Its licence.
        attribution: The paper to cite.
        place: Where its files are, for the message that asks for them.
        splits: How its splits on the Hub are to be read; those that are not named here are left out. None reads all.
        ignored: Fields that nothing is made of although they look like a part of the row.
    """

    hub_id: str | None
    title: str
    licence: str
    attribution: str
    place: str
    splits: dict[str, str] | None = None
    ignored: frozenset[str] = frozenset()


COLLECTIONS = {
    "instruction_preference": Collection(
        hub_id=None,
        title="Instructions with a polite and an impolite answer",
        licence="Apache-2.0 (the repository's); synthetic",
        attribution="Raschka S: Build a Large Language Model (From Scratch). Manning 2024, chapter 7.",
        place="https://github.com/rasbt/LLMs-from-scratch, ch07/04_preference-tuning-with-dpo",
        ignored=frozenset({"output"}),  # the answer from which both were made
    ),
    "orca": Collection(
        hub_id="Intel/orca_dpo_pairs",
        title="Orca DPO pairs: answers of GPT-4 or 3.5 against those of Llama-2-13b-chat",
        licence="Apache-2.0",
        attribution="Intel; prompts of OpenOrca (Mukherjee et al. 2023, arXiv 2306.02707).",
        place="https://huggingface.co/datasets/Intel/orca_dpo_pairs",
    ),
    "ultrafeedback_binarized": Collection(
        hub_id="HuggingFaceH4/ultrafeedback_binarized",
        title="UltraFeedback, best-rated answer against another one",
        licence="MIT",
        attribution="Cui G et al.: UltraFeedback: Boosting Language Models with Scaled AI Feedback. ICML 2024, "
        "arXiv 2310.01377; binarized for Zephyr (Tunstall et al. 2023, arXiv 2310.16944).",
        place="https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized",
        splits={"train_prefs": "train", "test_prefs": "test"},
    ),
    "ultramedical_preference": Collection(
        hub_id="TsinghuaC3I/UltraMedical-Preference",
        title="UltraMedical: preferences over biomedical answers",
        licence="MIT as stated on the Hub; parts come from data sets with licences of their own",
        attribution="Zhang K et al.: UltraMedical: Building Specialized Generalists in Biomedicine. NeurIPS 2024, "
        "arXiv 2406.03949.",
        place="https://huggingface.co/datasets/TsinghuaC3I/UltraMedical-Preference",
    ),
}


def prepare(name: str, raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Make one of `COLLECTIONS`.

    Args:
        name: Its name.
        raw_dir: A folder with its files in JSONL, JSON or Parquet, or None for the Hub.
        validation_size: Number of pairs held out for validation; default a tenth, at most 500.
        test_size: Number of pairs held out for the test, where the collection has none of its own; likewise.
        seed: Seed of the split.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    collection = COLLECTIONS[name]
    files: dict[str, str] = {}
    if raw_dir is not None:
        tables, files = read_folder(raw_dir)
        revision = "raw files"
    elif collection.hub_id is None:
        raise UserError(
            f"{name} is not on the Hub. Get its files from {collection.place} and name their folder by --raw_dir."
        )
    else:
        found, revision = read_hub(collection.hub_id)
        tables = {}
        for split, read in found.items():
            if collection.splits is None or split in collection.splits:
                kind = split if collection.splits is None else collection.splits[split]
                tables.setdefault(kind, []).extend(read)
    source = Source(
        collection.title,
        collection.hub_id if raw_dir is None and collection.hub_id else str(raw_dir),
        revision,
        collection.licence,
        collection.attribution,
        files,
    )
    intake, dropped = Intake("preference", collection.ignored), Counter[str]()
    items: dict[str, list[Item]] = {}
    for split in sorted(tables):
        items[split] = list(_distinct(_rows(tables[split], intake, dropped), dropped, set()))
    dataset = _dataset(name, items, source, validation_size, test_size, seed, dropped)
    dataset.notes, dataset.fields_not_used = dict(intake.notes), dict(intake.unused)
    return dataset


def of_rows(
    rows: list[Row],
    source: Source,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
    dropped: Counter[str],
) -> DataSet:
    """A data set of the pairs of the user's own file; see `prepare`."""
    items = {"train": list(_distinct(rows, dropped, set()))}
    return _dataset("jsonl", items, source, validation_size, test_size, seed, dropped)


def _dataset(
    name: str,
    items: dict[str, list[Item]],
    source: Source,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
    dropped: Counter[str],
) -> DataSet:
    everything = [item for members in items.values() for item in members]
    size = max(1, min(MOST_HELD_OUT, round(SHARE_HELD_OUT * len(everything))))
    validation_size = size if validation_size is None else validation_size
    if "test" in items and test_size is None:
        test = items.pop("test")
        rest, shared = without_shared([item for members in items.values() for item in members], test)
        dropped["pair whose prompt is also in the test"] += shared
        validation, train = hold_out(rest, validation_size, seed)
        splits, rule = {"train": train, "validation": validation, "test": test}, "test: its own; validation: "
    else:
        splits = random_splits(everything, validation_size, size if test_size is None else test_size, seed)
        rule = ""
    return DataSet(
        name=name,
        shape="preference",
        splits=splits,
        source=source,
        split_rule=f"{rule}at random by seed; pairs with the same prompt stay together",
        dropped=dict(dropped),
    )


def _rows(tables: list[Table], intake: Intake, dropped: Counter[str]) -> Iterator[Row]:
    """The pairs of a collection's tables; malformed rows are counted."""
    for table in tables:
        if not table.rows:
            raise UserError(f"{table.name} holds no rows. Is it the right file, and whole?")
        for index, raw in enumerate(table.rows):
            if not isinstance(raw, dict) or (missing := [side for side in ("chosen", "rejected") if side not in raw]):
                problem = f"it has no {missing[0]!r}" if isinstance(raw, dict) else "it is not an object"
                raise UserError(f"{table.place(index)}: {problem}. A row is {intake.accepted()}.")
            try:
                yield intake.read(raw)
            except ValueError:
                dropped["malformed or empty prompt or answer"] += 1


def _distinct(rows: Iterable[Row], dropped: Counter[str], seen: set[str]) -> Iterator[Item]:
    """An item for each pair; pairs without a difference and repetitions are counted."""
    for row in rows:
        whole = repr([row.get(field) for field in ("prompt", "chosen", "rejected", "tools")])
        if _stripped(row["chosen"]) == _stripped(row["rejected"]):
            dropped["chosen and rejected answer are the same"] += 1
        elif whole in seen:
            dropped["repeated pair"] += 1
        else:
            seen.add(whole)
            yield Item(frozenset({conversation_key(row["prompt"], row.get("tools"))}), (row,))


def _stripped(messages: list[Row]) -> list[Row]:
    return [{**message, "content": message["content"].strip()} for message in messages]


def with_kin_pairs(
    items: list[Item], ontology: Ontology, seed: int, notes: Counter[str], dropped: Counter[str]
) -> list[Item]:
    """Give each term of `hpo` its pair: its own definition, and that of its nearest relative among these items.

    Both definitions are of one split, so that of a held-out pair neither was seen in training.

    Args:
        items: Terms of one split, as `hpo` makes them: a `definition` row each.
        ontology: Their kinship.
        seed: Decides among relatives that are equally near.
        notes: Counts the pairs with a sibling's definition, and those with a remoter one's.
        dropped: Counts the terms without a pair.
    """
    rng = random.Random(seed)
    rows = {item.rows[0]["id"]: _definition_row(item) for item in items}
    paired = []
    for item in items:
        term_id = item.rows[0]["id"]
        question, answer = rows[term_id]["messages"]
        for distance, generation in enumerate(ontology.kin(term_id)):
            near = sorted(generation & rows.keys())
            other = [i for i in near if normalise(rows[i]["messages"][1]["content"]) != normalise(answer["content"])]
            if other:
                rejected = rows[rng.choice(other)]["messages"][1]
                notes[
                    "pairs with a sibling's definition"
                    if distance == 0
                    else "pairs with a more distant relative's definition"
                ] += 1
                pair = {
                    "prompt": [question],
                    "chosen": [answer],
                    "rejected": [rejected],
                    "kind": "definition",
                    "id": term_id,
                }
                paired.append(replace(item, pair=pair))
                break
        else:
            dropped["terms without a relative to pair them with"] += 1
            paired.append(item)
    return paired


def _definition_row(item: Item) -> Row:
    (row,) = (row for row in item.rows if row["kind"] == "definition")
    return row
