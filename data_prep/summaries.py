"""Documents with their summaries: sentences to choose from, and what people wrote in few words.

Rows are {"sentences": [TEXT, ...], "summaries": [TEXT, ...]}: a document's sentences in their order, and one or more
summaries, each of which counts as right. `scitldr`, `meqsum`, `pubmedqa_conclusions` read raw files, `scitldr`,
`pubmedqa_conclusions`, `cnn_dailymail` and `xsum` the Hub, `docstrings` the packages that are installed here.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from custom_models.tokenization.words import splitter
from data_prep import pubmedqa
from data_prep.dataset import DataSet, Source
from data_prep.rows import Row
from data_prep.splits import Item, hold_out, key, random_splits, without_shared
from data_prep.tables import Table, hub_splits, read_folder, read_hub
from workflows.errors import UserError
from workflows.files import sha256

SCITLDR_HUB_ID = "allenai/scitldr"
MOST_FROM_HUB = 20_000
"""Documents read of each split on the Hub: CNN/DailyMail has 300,000, which would take hours on a CPU."""
_LEARN_FROM = 1_000_000
"""Characters from which a collection's sentence ends are learned where nltk's own parameters are not installed."""


@dataclass(frozen=True)
class Document:
    """A document as it was read.

    Attributes:
        text: Whole, or its sentences where they are known.
        summaries: Texts, each a summary.
        keys: What no other split may hold besides the document.
    """

    text: str | list[str]
    summaries: list[str]
    keys: frozenset[str] = frozenset()


@dataclass(frozen=True)
class NewsCollection:
    """Articles on the Hub with official splits.

    Attributes:
        hub_id: Its id.
        config: Its configuration there.
        columns: Those of the article and of its summary.
        title: Its full name.
        licence: As stated.
        attribution: The paper.
    """

    hub_id: str
    config: str | None
    columns: tuple[str, str]
    title: str
    licence: str
    attribution: str


NEWS = {
    "cnn_dailymail": NewsCollection(
        "abisee/cnn_dailymail", "3.0.0", ("article", "highlights"), "CNN/DailyMail 3.0.0", "Apache-2.0",
        "See A, Liu PJ, Manning CD: Get To The Point: Summarization with Pointer-Generator Networks. ACL 2017.",
    ),
    "xsum": NewsCollection(
        "EdinburghNLP/xsum", None, ("document", "summary"), "XSum: extreme summarization of BBC articles", "not stated",
        "Narayan S, Cohen SB, Lapata M: Don't Give Me the Details, Just the Summary! EMNLP 2018.",
    ),
}  # fmt: skip


def prepare_scitldr(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """SciTLDR-A: abstracts of papers, each with one or more one-sentence summaries; the splits are the official ones.

    Args:
        raw_dir: A folder with train, dev and test as JSONL, or None for the Hub.
        validation_size: Must be None.
        test_size: Must be None.
        seed: Not used: nothing is drawn.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    _official("scitldr", validation_size, test_size)
    tables, files, revision = _tables(raw_dir, SCITLDR_HUB_ID, "Abstract")
    dropped: Counter[str] = Counter()
    documents: dict[str, list[Document]] = {}
    for split, found in tables.items():
        documents[split] = []
        for table in found:
            table.require({"source": list, "target": list})
            documents[split] += [
                Document(
                    _texts(row["source"], "source", table.place(i)), _texts(row["target"], "target", table.place(i))
                )
                for i, row in enumerate(table.rows)
            ]
    source = Source(
        title="SciTLDR-A: one-sentence summaries of scientific papers, from their abstracts",
        origin=SCITLDR_HUB_ID if raw_dir is None else str(raw_dir),
        revision=revision,
        licence="Apache-2.0",
        attribution="Cachola I et al.: TLDR: Extreme Summarization of Scientific Documents. Findings of EMNLP 2020.",
        files=files,
    )
    return _with_official_splits("scitldr", documents, source, dropped)


def prepare_news(
    name: str, raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int
) -> DataSet:
    """CNN/DailyMail or XSum in their official splits; of each at most `MOST_FROM_HUB` documents.

    Args:
        name: A key of `NEWS`.
        raw_dir: A folder with its tables, or None for the Hub.
        validation_size: Must be None.
        test_size: Must be None.
        seed: Not used: nothing is drawn.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    _official(name, validation_size, test_size)
    collection, dropped = NEWS[name], Counter[str]()
    article, summary = collection.columns
    if raw_dir is None:
        loaded, revision = hub_splits(collection.hub_id, collection.config)
        files: dict[str, str] = {}
        tables = {}
        for split, rows in loaded.items():
            kept = rows.select(range(min(MOST_FROM_HUB, len(rows))))
            dropped[f"beyond the first {MOST_FROM_HUB:,} of a split"] += len(rows) - len(kept)
            tables[str(split)] = [Table(f"{collection.hub_id} ({split})", kept.to_list())]
    else:
        tables, files, revision = _tables(raw_dir, collection.hub_id, collection.config)
    documents: dict[str, list[Document]] = {}
    for split, found in tables.items():
        documents[split] = []
        for table in found:
            table.require({article: str, summary: str})
            documents[split] += [Document(row[article], [row[summary]]) for row in table.rows]
    source = Source(
        collection.title,
        collection.hub_id if raw_dir is None else str(raw_dir),
        revision,
        collection.licence,
        collection.attribution,
        files,
    )
    return _with_official_splits(name, documents, source, dropped)


def prepare_meqsum(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """MeQSum: consumers' questions about health, each with a short question that asks the same.

    Args:
        raw_dir: A folder with the authors' spreadsheet (https://github.com/abachaa/MeQSum); it is not on the Hub.
        validation_size: Number of questions held out for validation; a tenth by default.
        test_size: Number of questions held out for the test; a tenth by default.
        seed: Seed of the split.

    Raises:
        UserError: If the spreadsheet is missing or has other columns.
    """
    sheets = [] if raw_dir is None else sorted(raw_dir.glob("*.xlsx"))
    if len(sheets) != 1:
        raise UserError(
            "meqsum is not on the Hub. Get its spreadsheet from https://github.com/abachaa/MeQSum and name its folder "
            "by --raw_dir" + (f"; {raw_dir} holds {len(sheets)} .xlsx files." if raw_dir else ".")
        )
    documents = [Document(asked, [short]) for asked, short in _spreadsheet(sheets[0], ("CHQ", "Summary"))]
    source = Source(
        title="MeQSum: summaries of consumer health questions",
        origin=str(raw_dir),
        revision="raw files",
        licence="CC BY 4.0",
        attribution="Ben Abacha A, Demner-Fushman D: On the Summarization of Consumer Health Questions. ACL 2019.",
        files={sheets[0].name: sha256(sheets[0])},
    )
    return with_random_splits("meqsum", documents, source, validation_size, test_size, seed)


def prepare_pubmedqa(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """PubMedQA: abstracts without their conclusion, which is the summary; the test is PubMedQA's.

    Args:
        raw_dir: See `pubmedqa.prepare`.
        validation_size: Number of abstracts held out for validation, of those that are not in the test; default 50.
        test_size: Must be None.
        seed: Seed of the choice of validation abstracts.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    _official("pubmedqa_conclusions", None, test_size)
    raw = pubmedqa.read(raw_dir)
    dropped: Counter[str] = Counter()
    documents: dict[str, list[Document]] = {"rest": [], "test": []}
    for row in raw.table.rows:
        pubid = str(row["pubid"])
        document = Document(
            "\n\n".join(row["context"]["contexts"]),
            [row["long_answer"]],
            frozenset({f"id:{pubid}", key("question", row["question"])}),
        )
        documents["test" if pubid in raw.test_ids else "rest"].append(document)
    learn_from = _learn_from(documents)
    items = {part: _items(found, learn_from, dropped) for part, found in documents.items()}
    rest, shared = without_shared(items["rest"], items["test"])
    dropped["shares its question or abstract with the test"] = shared
    validation, train = hold_out(rest, 50 if validation_size is None else validation_size, seed)
    return _data_set(
        "pubmedqa_conclusions",
        {"train": train, "validation": validation, "test": items["test"]},
        pubmedqa.source(raw_dir, raw),
        "test: the official 500 questions; validation: at random by seed from the other 500",
        dropped,
    )


def of_rows(
    rows: list[Row],
    source: Source,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
    dropped: Counter[str],
) -> DataSet:
    """A data set of the user's own documents with summaries; empty ones are left out and counted.

    Args:
        rows: "text" or "sentences", and "summaries".
        source: Where they are from.
        validation_size: Number of documents held out for validation; a tenth by default.
        test_size: Number of documents held out for the test; a tenth by default.
        seed: Seed of the split.
        dropped: Counts what is left out.
    """
    documents = [Document(row["text"] if "text" in row else row["sentences"], row["summaries"]) for row in rows]
    return with_random_splits("jsonl", documents, source, validation_size, test_size, seed, dropped)


def _with_official_splits(
    name: str, documents: dict[str, list[Document]], source: Source, dropped: Counter[str]
) -> DataSet:
    learn_from = _learn_from(documents)
    items = {split: _items(documents.get(split, []), learn_from, dropped) for split in ("train", "validation", "test")}
    items["validation"], in_test = without_shared(items["validation"], items["test"])
    items["train"], held = without_shared(items["train"], items["validation"], items["test"])
    dropped["also in a later split"] += in_test + held
    return _data_set(name, items, source, "the official one", dropped)


def with_random_splits(
    name: str,
    documents: list[Document],
    source: Source,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
    dropped: Counter[str] | None = None,
) -> DataSet:
    """A data set of documents that have no official splits; a tenth each is held out by default."""
    dropped = Counter[str]() if dropped is None else dropped
    documents = [replace(d, keys=d.keys | {key("summary", text) for text in d.summaries}) for d in documents]
    items = _items(documents, _learn_from({"": documents}), dropped)
    sizes = [max(1, len(items) // 10) if size is None else size for size in (validation_size, test_size)]
    rule = "at random by seed; documents that share their text, a summary or their origin stay together"
    return _data_set(name, random_splits(items, sizes[0], sizes[1], seed), source, rule, dropped)


def _data_set(name: str, splits: dict[str, list[Item]], source: Source, rule: str, dropped: Counter[str]) -> DataSet:
    rows = [row for items in splits.values() for item in items for row in item.rows]
    notes = {
        "documents of one sentence, in which there is nothing to choose": sum(
            len(row["sentences"]) == 1 for row in rows
        ),
        "sentences": sum(len(row["sentences"]) for row in rows),
    }
    return DataSet(name, splits, source, rule, dict(dropped), notes, shape="summarised")


def _items(documents: Iterable[Document], learn_from: str, dropped: Counter[str]) -> list[Item]:
    """One item a document; empty ones, those without a summary and repetitions are left out."""
    items: dict[str, Item] = {}
    split = splitter(learn_from)
    for document in documents:
        found = document.text if isinstance(document.text, list) else split_sentences(document.text, split)
        cleaned = [text for text in (" ".join(sentence.split()) for sentence in found) if text]
        summaries = [text for text in (" ".join(summary.split()) for summary in document.summaries) if text]
        name = key("document", " ".join(cleaned))
        if not cleaned:
            dropped["empty document"] += 1
        elif not summaries:
            dropped["empty summary"] += 1
        elif name in items:
            dropped["repeated document"] += 1
        else:
            keys = {name, *document.keys}
            items[name] = Item(frozenset(keys), ({"sentences": cleaned, "summaries": summaries},))
    return list(items.values())


def split_sentences(text: str, split: Callable[[str], list[str]]) -> list[str]:
    """A text's sentences; a blank line ends one, too. None of an empty text.

    Args:
        text: The text.
        split: What splits a paragraph (`custom_models.tokenization.words.splitter`).
    """
    paragraphs = [part for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]
    return [sentence for part in paragraphs for sentence in split(part)]


def _learn_from(documents: dict[str, list[Document]]) -> str:
    """Text from which the ends of sentences are learned: documents, the training split's first."""
    parts: list[str] = []
    size = 0
    for split in sorted(documents, key=lambda name: name == "test"):
        for document in documents[split]:
            if isinstance(document.text, str) and size < _LEARN_FROM:
                parts.append(document.text)
                size += len(document.text)
    return "\n\n".join(parts)


def _official(name: str, validation_size: int | None, test_size: int | None) -> None:
    if validation_size is not None or test_size is not None:
        raise UserError(f"{name} has official splits, so --validation_size and --test_size cannot be chosen.")


def _tables(
    raw_dir: Path | None, hub_id: str, config: str | None
) -> tuple[dict[str, list[Table]], dict[str, str], str]:
    if raw_dir is None:
        tables, revision = read_hub(hub_id, config)
        return tables, {}, revision
    return *read_folder(raw_dir), "raw files"


def _texts(value: Any, name: str, place: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{place}: {name!r} must be a list of texts.")
    return value


def _spreadsheet(file: Path, columns: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Two columns of a spreadsheet's first sheet, found by their names in its first row."""
    import zipfile

    import openpyxl

    try:
        rows = openpyxl.load_workbook(file, read_only=True).worksheets[0].iter_rows(values_only=True)
        header = [str(value).strip() for value in next(rows, ())]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as e:
        raise UserError(f"{file} is no readable spreadsheet ({e}). Get it again.") from None
    if missing := [name for name in columns if name not in header]:
        raise UserError(f"{file}: no column {', '.join(missing)} in the first row.")
    first, second = map(header.index, columns)
    for row in rows:
        yield str(row[first] or ""), str(row[second] or "")
