"""Sentences of movie reviews, each positive or negative: from a package on PyPI, from raw files, from the Hub.

The three have the same origin, Pang and Lee's sentences from reviews at Rotten Tomatoes. `sentence_polarity` has the
label of the review that a sentence stood in, `movie_snippets` the mean of twenty people's ratings, of which the sign is
the label (who rated 0 on average could not tell), `sst2` labels by people, too.
"""

import io
import tarfile
from collections import Counter
from pathlib import Path

from data_prep.dataset import DataSet, Source
from data_prep.rows import Row
from data_prep.splits import Item, hold_out, key, random_splits, without_shared
from data_prep.tables import read_folder, read_hub
from workflows.errors import UserError
from workflows.files import sha256
from workflows.wheels import VADER, open_source

LABELS = ("negative", "positive")
POLARITY_HUB_ID, SST2_HUB_ID = "cornell-movie-review-data/rotten_tomatoes", "stanfordnlp/sst2"
_RAW_FILES = {"rt-polarity.neg": "negative", "rt-polarity.pos": "positive"}
_INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

_PANG_LEE = (
    "Pang B, Lee L: Seeing stars: Exploiting class relationships for sentiment categorization with respect to rating "
    "scales. ACL 2005, 115-124. https://www.cs.cornell.edu/people/pabo/movie-review-data"
)


def prepare_snippets(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Sentences with the mean of twenty people's ratings, from the source archive of vaderSentiment.

    Args:
        raw_dir: A folder with `movieReviewSnippets_GroundTruth.txt`, or None for the package.
        validation_size: Number of sentences held out for validation; a tenth by default.
        test_size: Number of sentences held out for the test; a tenth by default.
        seed: Seed of the split.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    files = {}
    if raw_dir is None:
        with open_source(VADER) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, _INNER_ARCHIVE))) as inner:
            raw = _member(inner, _SNIPPETS)
    else:
        path = _existing(raw_dir / Path(_SNIPPETS).name)
        raw, files = path.read_bytes(), {path.name: sha256(path)}
    dropped: Counter[str] = Counter()
    rows = []
    for number, line in enumerate(raw.decode("utf-8", errors="replace").splitlines(), start=1):
        parts = line.split("\t")
        try:
            rating, text = float(parts[1]), parts[2]
        except (IndexError, ValueError):
            raise UserError(f"{Path(_SNIPPETS).name}, line {number}: not an id, a rating and a text.") from None
        if rating == 0:
            dropped["neither: rated 0"] += 1
        else:
            rows.append(_row(text, LABELS[rating > 0]))
    source = Source(
        title="Movie review snippets with human ratings",
        origin=VADER.requirement if raw_dir is None else str(raw_dir),
        revision=f"sha256 {VADER.sha256}" if raw_dir is None else "raw files",
        licence="MIT (vaderSentiment)",
        attribution="Hutto CJ, Gilbert E: VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social "
        f"Media Text. ICWSM 2014. The sentences: {_PANG_LEE}",
        files=files,
    )
    return _data_set("movie_snippets", rows, source, validation_size, test_size, seed, dropped)


def prepare_polarity(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """The sentence polarity data set, version 1.0.

    Args:
        raw_dir: A folder with `rt-polarity.neg` and `rt-polarity.pos`, or None for the Hub.
        validation_size: Number of sentences held out for validation; a tenth by default.
        test_size: Number of sentences held out for the test; a tenth by default.
        seed: Seed of the split.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    files, rows = {}, []
    if raw_dir is None:
        tables, revision = read_hub(POLARITY_HUB_ID)
        for split in sorted(tables):
            for table in tables[split]:
                table.require({"text": str, "label": int})
                rows += [_row(row["text"], _label(row["label"], table.place(i))) for i, row in enumerate(table.rows)]
    else:
        revision = "raw files"
        for name, label in _RAW_FILES.items():
            path = _existing(raw_dir / name)
            files[name] = sha256(path)
            rows += [_row(line, label) for line in path.read_text(encoding="latin-1").splitlines()]
    source = Source(
        title="Sentence polarity data set 1.0",
        origin=POLARITY_HUB_ID if raw_dir is None else str(raw_dir),
        revision=revision,
        licence="CC BY 4.0 as stated by NLTK",
        attribution=_PANG_LEE,
        files=files,
    )
    return _data_set("sentence_polarity", rows, source, validation_size, test_size, seed, Counter())


def prepare_sst2(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """The Stanford Sentiment Treebank with two classes; its validation split, whose labels are public, is the test.

    Args:
        raw_dir: A folder with its tables (columns sentence and label; splits by the files' names), or None for the Hub.
        validation_size: Number of training phrases held out for validation; default 1,000.
        test_size: Must be None: the test is the official validation split.
        seed: Seed of what is held out.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    if test_size is not None:
        raise UserError("sst2 has an official test, so --test_size cannot be chosen.")
    files: dict[str, str] = {}
    if raw_dir is None:
        tables, revision = read_hub(SST2_HUB_ID)
    else:
        (tables, files), revision = read_folder(raw_dir), "raw files"
    dropped: Counter[str] = Counter()
    items = {}
    for split in ("train", "validation"):
        rows = []
        for table in tables.get(split, []):
            table.require({"sentence": str, "label": int})
            rows += [_row(row["sentence"], _label(row["label"], table.place(i))) for i, row in enumerate(table.rows)]
        items[split] = _items(rows, dropped)
    train, shared = without_shared(items["train"], items["validation"])
    dropped["also in the test"] = shared
    validation, train = hold_out(train, 1000 if validation_size is None else validation_size, seed)
    return DataSet(
        name="sst2",
        splits={"train": train, "validation": validation, "test": items["validation"]},
        source=Source(
            title="Stanford Sentiment Treebank, two classes",
            origin=SST2_HUB_ID if raw_dir is None else str(raw_dir),
            revision=revision,
            licence="not stated",
            attribution="Socher R et al.: Recursive Deep Models for Semantic Compositionality Over a Sentiment "
            "Treebank. EMNLP 2013, 1631-1642.",
            files=files,
        ),
        split_rule="the official validation split is the test; validation at random from the training phrases",
        dropped=dict(dropped),
        shape="classified",
    )


def _data_set(
    name: str,
    rows: list[Row],
    source: Source,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
    dropped: Counter[str],
) -> DataSet:
    items = _items(rows, dropped)
    sizes = [len(items) // 10 if size is None else size for size in (validation_size, test_size)]
    return DataSet(
        name=name,
        splits=random_splits(items, sizes[0], sizes[1], seed),
        source=source,
        split_rule="at random by seed; sentences that differ only in case or punctuation stay together",
        dropped=dict(dropped),
        shape="classified",
    )


def _items(rows: list[Row], dropped: Counter[str]) -> list[Item]:
    """One item a sentence; empty ones and repetitions are left out, those with both labels altogether."""
    labels: dict[str, set[str]] = {}
    for row in rows:
        labels.setdefault(key("text", row["text"]), set()).add(row["label"])
    items: dict[str, Item] = {}
    for row in rows:
        name = key("text", row["text"])
        if not row["text"]:
            dropped["empty"] += 1
        elif len(labels[name]) > 1:
            dropped["of both labels"] += 1
        elif name in items:
            dropped["repeated"] += 1
        else:
            items[name] = Item(frozenset({name}), (row,))
    return list(items.values())


def _row(text: str, label: str) -> Row:
    return {"text": " ".join(text.split()), "label": label}


def _label(number: int, place: str) -> str:
    if not 0 <= number < len(LABELS):
        raise UserError(f"{place}: the label {number} is none of 0 (negative) and 1 (positive).")
    return LABELS[number]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(name)
    if found is None:
        raise UserError(f"{archive.name!r} has no file {name}.")
    return found.read()


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} does not exist. Name the folder with the raw files by --raw_dir.")
    return path
