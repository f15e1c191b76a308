"""Parallel text: the message catalogues of Django and Wagtail, the books of OPUS, one's own file.

Rows are {"source": TEXT, "target": TEXT, "group": NUMBER}; no split tears a group apart. A catalogue (`.po`) holds what
a program says, message by message, with placeholders such as %(name)s or {name} that a translation must keep. A message
with a plural gives two rows, its singular and its plural; of a language's several plural forms the last is taken,
gettext's for "all other numbers".
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import polib

from data_prep.dataset import DataSet, Source
from data_prep.normalisation import words_of
from data_prep.rows import Row
from data_prep.splits import Item, groups_of, key, random_splits
from data_prep.tables import Table, read_folder, read_hub
from workflows.errors import UserError
from workflows.files import read_text
from workflows.wheels import DJANGO, WAGTAIL, open_wheel

Language = Literal["fr", "de"]
NAMES: dict[Language, str] = {"fr": "French", "de": "German"}
PLACEHOLDER = re.compile(
    r"%(?:\(\w+\)[-+#]*\d*(?:\.\d+)?[a-zA-Z]|(?:\d+\$)?[-+#]*\d*(?:\.\d+)?[a-zA-Z](?!\w))"
    r"|\$?\{\{ *[\w.]+ *\}\}|\$?\{[\w.]*(?:\[\w+\])?(?:![rsa])?(?::[^{}\s]*)?\}"
)
"""What a program puts values into: %(name)s, %s, %.1f, %1$s, {{ name }}, {name}, {}, {value:.2f}, {0!r}, ${name}."""
_CATALOGUE_LINE = re.compile(
    r"""\s*(\#.*|((msgctxt|msgid|msgid_plural|msgstr(\[\d+\])?)\s*)?"(\\.|[^"\\])*"\s*)?""", re.VERBOSE
)
"""A comment, or a text in quotes; polib takes what lacks a quote for a text, less its last letter."""
BOOKS_HUB_ID = "Helsinki-NLP/opus_books"
MOST_HELD_OUT = 1000
_BOOKS_CONFIG: dict[Language, str] = {"fr": "en-fr", "de": "de-en"}


def prepare_catalogues(
    language: Language, raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int
) -> DataSet:
    """English messages of programs and their translations.

    Args:
        language: Of the translations.
        raw_dir: A folder with `.po` files of your own, whose msgid is English; None takes Django's and Wagtail's.
        validation_size: Number of messages held out for validation; a tenth by default.
        test_size: Number of messages held out for the test; a tenth by default.
        seed: Seed of the split.

    Raises:
        UserError: If there is no catalogue, or one is malformed; with its line.
    """
    catalogues = _packaged(language) if raw_dir is None else _from_folder(raw_dir)
    dropped: Counter[str] = Counter()
    notes: Counter[str] = Counter({"catalogues": len(catalogues)})
    groups = [pairs for place, text in catalogues.items() for pairs in _messages(place, text, dropped)]
    files = {place: hashlib.sha256(text.encode()).hexdigest() for place, text in catalogues.items()}
    packages = f"{DJANGO.requirement}, {WAGTAIL.requirement}"
    source = Source(
        title=f"Messages of Django and Wagtail, English and {NAMES[language]}" if raw_dir is None else "Messages",
        origin=packages if raw_dir is None else str(raw_dir),
        revision=packages if raw_dir is None else "raw files",
        licence="BSD-3-Clause" if raw_dir is None else "not stated",
        attribution="" if raw_dir else "Django Software Foundation, Torchbox, and the translators named in the files.",
        files=files,
    )
    return _data_set(f"catalogues_{language}", groups, source, validation_size, test_size, seed, dropped, notes)


def prepare_books(
    language: Language, raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int
) -> DataSet:
    """Sentences of out-of-copyright books and their published translations, aligned (OPUS Books).

    Args:
        language: Of what is translated into; from English.
        raw_dir: A folder with its tables (a column "translation" of {"en": TEXT, LANGUAGE: TEXT}), or None for the Hub.
        validation_size: Number of sentences held out for validation; a tenth by default, at most 1,000.
        test_size: Number of sentences held out for the test; likewise.
        seed: Seed of the split.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    files: dict[str, str] = {}
    if raw_dir is None:
        tables, revision = read_hub(BOOKS_HUB_ID, _BOOKS_CONFIG[language])
    else:
        (tables, files), revision = read_folder(raw_dir), "raw files"
    dropped: Counter[str] = Counter()
    groups = [
        [row]
        for split in sorted(tables)
        for table in tables[split]
        for row in _aligned(table, language)
        if _usable(row, dropped)
    ]
    source = Source(
        title=f"OPUS Books, English and {NAMES[language]}",
        origin=f"{BOOKS_HUB_ID}, {_BOOKS_CONFIG[language]}" if raw_dir is None else str(raw_dir),
        revision=revision,
        licence="the texts are out of copyright; for personal, educational and research use, as stated by OPUS",
        attribution="Tiedemann J: Parallel Data, Tools and Interfaces in OPUS. LREC 2012. Texts by Andras Farkas, "
        "https://farkastranslations.com",
        files=files,
    )
    return _data_set(f"opus_books_{language}", groups, source, validation_size, test_size, seed, dropped, Counter())


def of_rows(
    rows: list[Row],
    source: Source,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
    dropped: Counter[str],
) -> DataSet:
    """A data set of the user's own parallel text; it stays as it is written, line breaks included.

    Args:
        rows: Texts and their translations.
        source: Where they are from.
        validation_size: Number of pairs held out for validation; a tenth by default, at most 1,000.
        test_size: Number of pairs held out for the test; likewise.
        seed: Seed of the split.
        dropped: Counts what is left out.
    """
    groups = [[row] for row in rows if _usable(row, dropped)]
    return _data_set("jsonl", groups, source, validation_size, test_size, seed, dropped, Counter())


PREPARE = {
    **{f"catalogues_{language}": partial(prepare_catalogues, language) for language in NAMES},
    **{f"opus_books_{language}": partial(prepare_books, language) for language in NAMES},
}
"""By the data sets' names, for `make data`."""


def _packaged(language: str) -> dict[str, str]:
    """The catalogues in the two wheels, by their names."""
    found = {}
    for wheel in (DJANGO, WAGTAIL):
        with open_wheel(wheel) as archive:
            for name in sorted(archive.namelist()):
                if f"/locale/{language}/" in name and name.endswith(".po"):
                    found[name] = archive.read(name).decode()
    return found


def _from_folder(raw_dir: Path) -> dict[str, str]:
    files = sorted(raw_dir.rglob("*.po"))
    if not files:
        raise UserError(f"{raw_dir} holds no .po file. Name the folder with the catalogues by --raw_dir.")
    return {str(file.relative_to(raw_dir)): read_text(file) for file in files}


def _messages(place: str, text: str, dropped: Counter[str]) -> Iterator[list[Row]]:
    """The rows of each message of a catalogue that is translated."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not _CATALOGUE_LINE.fullmatch(line):
            raise UserError(f"{place}, line {number}: neither a comment nor a text in quotes. Mend it: {line:.60}")
    try:
        # Babel's reader, the other one in wide use, drops the plural forms that a header forgot to announce.
        catalogue = polib.pofile(text)
    except OSError as e:
        raise UserError(f"{place}: {e}. Mend that line (`msgfmt --check` shows more), or leave the file out.") from None
    for entry in catalogue:
        rows = [_row(entry.msgid, entry.msgstr, "message")]
        if entry.msgid_plural:
            forms = [form for _, form in sorted(entry.msgstr_plural.items())] or [""]
            rows = [_row(entry.msgid, forms[0], "message"), _row(entry.msgid_plural, forms[-1], "plural")]
        if entry.obsolete:
            dropped["obsolete"] += len(rows)
        elif entry.fuzzy:
            dropped["fuzzy: a guess that nobody has checked"] += len(rows)
        else:
            yield [row for row in rows if _usable(row, dropped)]


def _aligned(table: Table, language: str) -> Iterator[Row]:
    table.require({"translation": dict})
    for index, raw in enumerate(table.rows):
        pair = raw["translation"]
        if not all(isinstance(pair.get(name), str) for name in ("en", language)):
            raise UserError(f"{table.place(index)}: the translation has no text for en and {language}.")
        yield _row(pair["en"], pair[language], "sentence")


def _row(source: str, target: str, kind: str) -> Row:
    """A row; line breaks are layout of the page on which a message stands, and become spaces."""
    return {"source": " ".join(source.split()), "target": " ".join(target.split()), "kind": kind}


def _usable(row: Row, dropped: Counter[str]) -> bool:
    """Whether there is something to learn from a row; if not, it is counted."""
    if not row["target"]:
        dropped["not translated"] += 1
    elif not _words(row["source"]) or not _words(row["target"]):
        dropped["no words"] += 1
    else:
        return True
    return False


def _words(text: str) -> str:
    """The words of a text, so that texts that differ in case, punctuation, signs or placeholders only are the same."""
    return " ".join(words_of(PLACEHOLDER.sub(" ", text)))


def _data_set(
    name: str,
    groups: list[list[Row]],
    source: Source,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
    dropped: Counter[str],
    notes: Counter[str],
) -> DataSet:
    """The data set of groups of rows; repetitions are left out, what shares a source or a target stays together."""
    known: set[tuple[str, str]] = set()
    items = []
    for rows in groups:
        new = [row for row in rows if (row["source"], row["target"]) not in known]
        dropped["repeated"] += len(rows) - len(new)
        known |= {(row["source"], row["target"]) for row in new}
        if new:
            keys = {key(side, _words(row[side])) for row in new for side in ("source", "target")}
            items.append(Item(frozenset(keys), tuple(new)))
    for number, group in enumerate(groups_of(items)):  # what stays together; a translation memory must know of it
        for item in group:
            for row in item.rows:
                row["group"] = number
    rows = [row for item in items for row in item.rows]
    notes["rows with placeholders"] = sum(bool(PLACEHOLDER.search(row["source"])) for row in rows)
    notes["rows whose translation has other placeholders"] = sum(map(_differ_in_placeholders, rows))
    size = min(MOST_HELD_OUT, max(1, len(items) // 10))
    return DataSet(
        name=name,
        splits=random_splits(
            items,
            size if validation_size is None else validation_size,
            size if test_size is None else test_size,
            seed,
        ),
        source=source,
        split_rule="at random by seed; rows whose source or target differ only in case, punctuation or placeholders, "
        "and the singular and plural of a message, stay together",
        dropped=dict(dropped),
        notes=dict(notes),
        shape="translated",
    )


def _differ_in_placeholders(row: Row) -> bool:
    return Counter(PLACEHOLDER.findall(row["source"])) != Counter(PLACEHOLDER.findall(row["target"]))
