"""Sentences with marked entities: abstracts, tweets, news, any IOB2 file, and definitions that we mark ourselves.

Rows are {"tokens": [...], "tags": [...]} in IOB2. Official splits stay as they are, the test untouched: sentences of
training and validation that a later split has, too, are left out ("Methods :" stands in every abstract).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import regex

from data_prep.dataset import DataSet, Source
from data_prep.hpo import ontology_source, read_files
from data_prep.iob import Dictionary, Entity, read_iob, tags_of
from data_prep.ontology import read_obo
from data_prep.rows import Row, row_problem
from data_prep.splits import Item, key, random_splits, without_shared
from data_prep.tables import hub_splits
from workflows.errors import UserError, listed, report_all
from workflows.files import sha256

WORD = regex.compile(r"[\w\p{N}]+|[^\w\p{N}\s]")  # to `re`, a vowel sign of Hindi is no part of its word
"""Words as BC5CDR's files have them: letters and digits, or one sign."""
_SUFFIXES = (".tsv", ".txt", ".iob", ".iob2", ".bio", ".conll")
_SPLITS = {"train": "train", "training": "train", "devel": "validation", "dev": "validation", "valid": "validation",
           "validation": "validation", "test": "test", "testing": "test"}  # fmt: skip
OFFICIAL = {
    "bc5cdr": ("bigbio/bc5cdr", "bc5cdr_bigbio_kb", "BioCreative V chemical-disease relations",
               "public domain as stated by BigBio; CC BY 4.0 as stated by MTL-Bioinformatics-2016 (IOB2 files)",
               "Li J et al.: BioCreative V CDR task corpus: a resource for chemical disease relation extraction. "
               "Database 2016, baw068."),
    "ncbi_disease": ("ncbi/ncbi_disease", "ncbi_disease", "NCBI disease corpus", "not stated",
                     "Doğan RI, Leaman R, Lu Z: NCBI disease corpus: A resource for disease name recognition and "
                     "concept normalization. Journal of Biomedical Informatics 47 (2014), 1-10."),
    "wnut_17": ("leondz/wnut_17", "wnut_17", "WNUT 2017: emerging and rare entities", "CC BY 4.0",
                "Derczynski L et al.: Results of the WNUT2017 Shared Task on Novel and Emerging Entity Recognition. "
                "W-NUT 2017, 140-147."),
    "conll2003": ("eriktks/conll2003", "conll2003", "CoNLL-2003, English", "Reuters, for research",
                  "Tjong Kim Sang EF, De Meulder F: Introduction to the CoNLL-2003 Shared Task. CoNLL 2003, 142-147."),
}  # fmt: skip
"""Name -> id on the Hub, configuration, title, licence, what to cite."""


def prepare(name: str, raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """A data set that comes in three splits.

    Args:
        name: A key of `OFFICIAL`.
        raw_dir: A folder with its splits as IOB2 files, or None for the Hub.
        validation_size: Must be None, as `test_size`: the splits are official.
        test_size: Likewise.
        seed: Unused.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    hub_id, config, title, licence, attribution = OFFICIAL[name]
    report_all([f"{name} has official splits, so --{option} cannot be chosen."
                for option, size in (("validation_size", validation_size), ("test_size", test_size))
                if size is not None])  # fmt: skip
    dropped: Counter[str] = Counter()
    files: dict[str, str] = {}
    if raw_dir is not None:
        rows, files = _read_splits(raw_dir)
        revision = "raw files"
    else:
        loaded, revision = hub_splits(hub_id, config)
        of_split = _bigbio_rows if name == "bc5cdr" else _tagged_rows
        rows = {str(split): of_split(table, f"{hub_id} ({split})", dropped) for split, table in loaded.items()}
    if missing := [split for split in ("train", "validation", "test") if not rows.get(split)]:
        raise UserError(f"{name}: there is no {', '.join(missing)} split in {raw_dir or hub_id}.")
    source = Source(title, hub_id if raw_dir is None else str(raw_dir), revision, licence, attribution, files)
    items = {split: _items(found) for split, found in rows.items()}
    test = items["test"]
    validation, shared = without_shared(items["validation"], test)
    train, shared_too = without_shared(items["train"], test, validation)
    dropped["sentences that a later split has, too"] = shared + shared_too
    return DataSet(
        name=name,
        splits={"train": train, "validation": validation, "test": test},
        source=source,
        split_rule="the official one",
        dropped=dict(dropped),
        shape="tagged",
    )


def prepare_iob(
    file: Path, validation_size: int | None, test_size: int | None, seed: int, skip_broken: bool = False
) -> DataSet:
    """A file of one's own in IOB2.

    Args:
        file: See `iob.read_iob`.
        validation_size: Number of sentences held out for validation; a tenth by default.
        test_size: Number of sentences held out for the test; a tenth by default.
        seed: Seed of the split.
        skip_broken: Leave out sentences with a line that is no word and tag, instead of refusing the file.

    Raises:
        UserError: If the file is missing or malformed, or has too few sentences.
    """
    broken: list[str] = []
    unused: Counter[str] = Counter()
    sentences = read_iob(file, broken, unused)
    if broken:
        told = listed(broken, f"sentences of {file} cannot be read")
        if not skip_broken:
            raise UserError(f"{told}\nFix these lines, or leave their sentences out: --skip_broken true.")
        print(told)
    items = _items([_row(words, tags) for words, tags in sentences])
    source = Source(file.name, str(file), "raw files", "yours", "yours", {file.name: sha256(file)})
    dataset = _random_data_set(file.stem, items, source, validation_size, test_size, seed)
    dataset.fields_not_used = dict(unused)
    if broken:
        dataset.dropped["broken sentence"] = len(broken)
    return dataset


def prepare_definitions(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """The Human Phenotype Ontology's definitions, in which its own names and synonyms are marked: silver labels.

    Nobody has checked them. A name is marked wherever it occurs, the longest one first, and what the ontology calls
    otherwise is not marked; names of under four letters are left alone.

    Args:
        raw_dir: A folder with `hp.obo` and `phenotype.hpoa`; None takes those in the wheel.
        validation_size: Number of definitions held out for validation; a tenth by default.
        test_size: Number of definitions held out for the test; a tenth by default.
        seed: Seed of the split.

    Raises:
        UserError: If a file is missing or malformed.
    """
    texts, origin = read_files(raw_dir)
    version, terms = read_obo(texts["hp.obo"].splitlines(), "hp.obo")
    labels = [label for term in terms.values() for label in term.labels if len(label) >= 4]
    names = Dictionary({tuple(word.casefold() for word in WORD.findall(label)): "Finding" for label in labels})
    rows = []
    for term in terms.values():
        if words := WORD.findall(term.definition):
            rows.append(_row(words, tags_of(names.find(words), len(words))))
    title = "Human Phenotype Ontology: definitions with its own names marked"
    source = replace(ontology_source(version, origin, texts["hp.obo"]), title=title)
    items = _items(rows)
    return _random_data_set("hpo_entities", items, source, validation_size, test_size, seed)


def _random_data_set(
    name: str,
    items: list[Item],
    source: Source,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
) -> DataSet:
    sizes = [max(1, len(items) // 10) if size is None else size for size in (validation_size, test_size)]
    return DataSet(
        name=name,
        splits=random_splits(items, sizes[0], sizes[1], seed),
        source=source,
        split_rule="at random by seed; sentences that differ only in case or punctuation stay together",
        dropped={},
        shape="tagged",
    )


def _items(rows: Iterable[Row]) -> list[Item]:
    """One item a sentence, also where it is repeated."""
    items = []
    for row in rows:
        items.append(Item(frozenset({key("text", " ".join(row["tokens"]))}), (row,)))
    return items


def _row(words: list[str], tags: list[str]) -> Row:
    return {"tokens": words, "tags": tags}


def _read_splits(raw_dir: Path) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Rows by split of a folder's IOB2 files, and the files' hashes."""
    rows: dict[str, list[Row]] = {}
    files = {}
    for path in sorted(raw_dir.iterdir()):
        split = _SPLITS.get(path.stem.lower())
        if split is not None and path.suffix in _SUFFIXES:
            rows.setdefault(split, []).extend(_row(words, tags) for words, tags in read_iob(path))
            files[path.name] = sha256(path)
    if not files:
        raise UserError(f"{raw_dir} holds no train, devel and test file ({', '.join(_SUFFIXES)}). Name their folder by "
                        "--raw_dir.")  # fmt: skip
    return rows, files


def _tagged_rows(table: Any, place: str, dropped: Counter[str]) -> list[Row]:
    """Rows of a Hub table with the columns tokens and ner_tags, numbers that its features name."""
    try:
        names = table.features["ner_tags"].feature.names
        rows = [_row([str(t) for t in row["tokens"]], [names[i] for i in row["ner_tags"]]) for row in table]
    except (KeyError, AttributeError, IndexError) as e:
        raise UserError(f"{place} has no tokens with named ner_tags ({type(e).__name__}: {e}).") from None
    kept = []
    for number, row in enumerate(rows, start=1):
        if not row["tokens"]:
            dropped["empty sentences"] += 1
            continue
        row = _row(["_".join(token.split()) or "_" for token in row["tokens"]], row["tags"])
        if problem := row_problem(row, "tagged"):
            raise UserError(f"{place}, row {number}: {problem}.")
        kept.append(row)
    return kept


def _bigbio_rows(table: Any, place: str, dropped: Counter[str]) -> list[Row]:
    """Sentences of a Hub table in BigBio's knowledge-base form: passages and entities by offsets into the document."""
    from custom_models.tokenization.words import sentences

    documents = list(table)
    try:
        passages = [
            (" ".join(p["text"]), p["offsets"][0][0], document["entities"])
            for document in documents for p in document["passages"]
        ]  # fmt: skip
    except (KeyError, IndexError, TypeError) as e:
        raise UserError(f"{place} is not in BigBio's knowledge-base form ({type(e).__name__}: {e}).") from None
    everything = "\n".join(text for text, _, _ in passages)
    rows = []
    for text, begin, marked in passages:
        spans = _spans(marked, begin, begin + len(text), dropped)
        cursor = 0
        for sentence in sentences(text, learn_from=everything) if text.strip() else []:
            cursor = text.index(sentence, cursor)
            words = list(WORD.finditer(sentence))
            places = [(begin + cursor + word.start(), begin + cursor + word.end()) for word in words]
            cursor += len(sentence)
            if words:
                entities = _entities_at(places, spans, dropped)
                rows.append(_row([word[0] for word in words], tags_of(entities, len(words))))
    return rows


def _spans(marked: list[Any], begin: int, end: int, dropped: Counter[str]) -> list[tuple[int, int, str]]:
    """Begin, end and type of a passage's entities without overlaps, the longest kept."""
    inside = []
    for entity in marked:
        offsets = entity["offsets"]
        if begin <= offsets[0][0] < end:
            if len(offsets) > 1:
                dropped["entities of several pieces"] += 1
            else:
                inside.append((offsets[0][0], offsets[0][1], entity["type"]))
    kept: list[tuple[int, int, str]] = []
    for span in sorted(inside, key=lambda s: s[0] - s[1]):
        if any(span[0] < other[1] and other[0] < span[1] for other in kept):
            dropped["entities within others"] += 1
        else:
            kept.append(span)
    return sorted(kept)


def _entities_at(
    places: list[tuple[int, int]], spans: list[tuple[int, int, str]], dropped: Counter[str]
) -> list[Entity]:
    """The entities of a sentence whose words stand at these places; those that begin or end within a word are none."""
    starts = {start: i for i, (start, _) in enumerate(places)}
    ends = {end: i + 1 for i, (_, end) in enumerate(places)}
    found = []
    for start, end, kind in spans:
        if places[0][0] <= start < places[-1][1]:
            if start in starts and end in ends:
                found.append(Entity(kind, starts[start], ends[end]))
            else:
                dropped["entities that cut a word or a sentence"] += 1
    return found
