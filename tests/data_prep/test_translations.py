"""Parallel text: the packages' catalogues and one's own, the Hub's books; what is left out, what stays together."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_prep import translations
from data_prep.prepare import setup
from data_prep.rows import read_rows
from data_prep.tables import Table
from data_prep.translations import PLACEHOLDER
from tests.data_prep.conftest import write_table
from workflows.errors import UserError

SPLITS = ("train", "validation", "test")
HEADER = """msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\\n"
"Plural-Forms: nplurals=2; plural=(n > 1);\\n"
"""


def catalogue(folder: Path, text: str, name: str = "mine.po") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"{HEADER}\n{text}", encoding="utf-8")
    return folder


def plain(count: int) -> str:
    return "".join(f'msgid "word {chr(97 + i)}"\nmsgstr "mot {chr(97 + i)}"\n\n' for i in range(count))


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return read_rows(folder / f"{split}.jsonl", "translated")


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", re.sub(r"%\(\w+\)[a-z]|\{\w*\}|%[sd]\b", " ", text).casefold()))


@pytest.mark.long
def test_the_catalogues_of_django_and_wagtail(tmp_path):
    setup(data="catalogues_de", out_dir=tmp_path)
    folder = tmp_path / "catalogues_de"
    manifest, rows = manifest_of(folder), {split: rows_of(folder, split) for split in SPLITS}
    assert manifest["dropped"] == {"no words": 24, "not translated": 17, "repeated": 315}
    assert sum(map(len, rows.values())) == 2720 and manifest["notes"]["catalogues"] == 32
    assert manifest["notes"]["rows whose translation has other placeholders"] == 2
    known = {row["source"]: row["target"] for split in SPLITS for row in rows[split]}
    assert known["Enter two whole numbers."] == "Bitte zwei ganze Zahlen eingeben."
    for side in ("source", "target"):
        seen = [{words(row[side]) for row in rows[split]} for split in SPLITS]
        assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_plurals_give_two_rows_and_what_is_not_translated_is_counted(tmp_path):
    raw = catalogue(
        tmp_path / "raw",
        plain(20)
        + '#, python-format\nmsgid "%(n)s page"\nmsgid_plural "%(n)s pages"\n'
        + 'msgstr[0] "%(n)s page"\nmsgstr[1] "%(n)s pages, beaucoup"\nmsgstr[2] "%(n)s  pages\\n"\n\n'
        + '#, fuzzy\nmsgid "guess"\nmsgstr "supposition"\n\n'
        + 'msgid "later"\nmsgstr ""\n\n'
        + 'msgctxt "verb"\nmsgid "word a"\nmsgstr "mot a"\n\n'
        + 'msgid "{}: %s"\nmsgstr "{} : %s"\n\n'
        + 'msgid "Hello {name}"\nmsgstr "Bonjour"\n\n'
        + '#~ msgid "old"\n#~ msgstr "vieux"\n',
    )
    setup(data="catalogues_fr", raw_dir=raw, out_dir=tmp_path, validation_size=3, test_size=4)
    manifest = manifest_of(tmp_path / "catalogues_fr")
    assert manifest["dropped"] == {
        "fuzzy: a guess that nobody has checked": 1, "not translated": 1, "repeated": 1, "no words": 1, "obsolete": 1
    }  # fmt: skip
    notes = manifest["notes"]
    assert notes["rows with placeholders"] == 3 and notes["rows whose translation has other placeholders"] == 1
    found = {row["source"]: row for split in SPLITS for row in rows_of(tmp_path / "catalogues_fr", split)}
    assert found["%(n)s page"]["target"] == "%(n)s page" and found["%(n)s page"]["kind"] == "message"
    # The header announces two forms; the file has three, and the last is that of all other numbers.
    assert found["%(n)s pages"]["target"] == "%(n)s pages" and found["%(n)s pages"]["kind"] == "plural"
    assert found["%(n)s page"]["group"] == found["%(n)s pages"]["group"]  # what a translation memory must not show
    assert len(found) == 23


def test_what_shares_a_source_or_a_target_stays_on_one_side(tmp_path):
    more = (
        'msgid "Edit"\nmsgstr "Changer"\n\nmsgid "Edit %(x)s!"\nmsgstr "Modifier"\n\nmsgid "Alter"\nmsgstr "modifier"\n'
    )
    raw = catalogue(tmp_path / "raw", plain(24) + more)
    for seed in range(8):
        setup(data="catalogues_fr", raw_dir=raw, out_dir=tmp_path, validation_size=6, test_size=6, seed=seed)
        of = {row["source"]: split for split in SPLITS for row in rows_of(tmp_path / "catalogues_fr", split)}
        assert of["Edit"] == of["Edit %(x)s!"] == of["Alter"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("%(name)s has %d of %s.", ["%(name)s", "%d", "%s"]),
        ("{name} and {} and {{ user.name }}", ["{name}", "{}", "{{ user.name }}"]),
        ("100% sure, 5 % less, 20%discount", []),
        ("{value:.2f} {0!r} {x!s:>10} {a.b[0]} ${name}", ["{value:.2f}", "{0!r}", "{x!s:>10}", "{a.b[0]}", "${name}"]),
        ("%.1f, %2d, %1$s, %-5s %(size).1f%%", ["%.1f", "%2d", "%1$s", "%-5s", "%(size).1f"]),
        ("{an aside: this} 50%-100%, 3%.a", []),
    ],
)
def test_placeholders(text: str, found: list[str]):
    assert PLACEHOLDER.findall(text) == found


def test_books_of_the_hub_and_of_a_folder(tmp_path, monkeypatch):
    rows = [{"id": str(i), "translation": {"en": f"word {i}", "fr": f"mot {i}"}} for i in range(30)]
    asked = []

    def read_hub(*args: str) -> Any:
        asked.append(args)
        return {"train": [Table("hub (train)", rows)]}, "commit"

    monkeypatch.setattr(translations, "read_hub", read_hub)
    setup(data="opus_books_fr", out_dir=tmp_path)
    assert asked == [("Helsinki-NLP/opus_books", "en-fr")]
    assert [len(rows_of(tmp_path / "opus_books_fr", split)) for split in SPLITS] == [24, 3, 3]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    setup(data="opus_books_fr", raw_dir=tmp_path / "raw", out_dir=tmp_path)
    assert manifest_of(tmp_path / "opus_books_fr")["revision"] == "raw files"
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: the translation has no text for en and de"):
        setup(data="opus_books_de", raw_dir=tmp_path / "raw", out_dir=tmp_path)


def test_pairs_of_ones_own_stay_as_they_are(tmp_path):
    rows = [{"source": f"open file {i}", "target": f"ouvrir le fichier {i}\n  {{page}}"} for i in range(8)]
    file = write_table(tmp_path / "mine.jsonl", [*rows, {"source": "open it", "target": " "}, rows[0]])
    setup("jsonl", tmp_path, file=file, name="mine")
    found = {split: rows_of(tmp_path / "mine", split) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in found.items()} == {"train": 6, "validation": 1, "test": 1}
    assert sorted(row["target"] for part in found.values() for row in part) == [row["target"] for row in rows]
    assert manifest_of(tmp_path / "mine")["dropped"] == {"not translated": 1, "repeated": 1}
    write_table(file, [*rows, {"source": "open it", "target": ["x"]}])
    with pytest.raises(UserError, match=r"mine\.jsonl, line 9.*target"):
        setup("jsonl", tmp_path, file=file, name="mine")
    write_table(file, [{"source": ["A text.", f"Number {i}."], "target": [f"Summary {i}."]} for i in range(9)])
    setup("jsonl", tmp_path, file=file, name="summaries")  # lists of texts, as SciTLDR has them
    assert manifest_of(tmp_path / "summaries")["shape"] == "summarised"


def test_bad_catalogues_are_named(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(UserError, match=r"holds no \.po file"):
        setup(data="catalogues_fr", raw_dir=tmp_path / "raw", out_dir=tmp_path)
    for text, message in {
        'msgid "open\nmsgstr "ouvert"': r'line 66: neither a comment nor a text in quotes\. Mend it: msgid "open',
        'msgid "a"\nmsgstr "un "a" dit"': "line 67: neither a comment nor a text",
        'msgid "a"\nmsgid "b"\nmsgstr "c"': r"mine\.po: .*line 67.*msgfmt --check",
    }.items():
        catalogue(tmp_path / "raw", f"{plain(20)}{text}\n")
        with pytest.raises(UserError, match=message):
            setup(data="catalogues_fr", raw_dir=tmp_path / "raw", out_dir=tmp_path)
    (tmp_path / "raw" / "mine.po").write_bytes(b'msgid "a"\nmsgstr "\xe9t\xe9"\n')
    with pytest.raises(UserError, match=r"mine\.po is not UTF-8 text"):
        setup(data="catalogues_fr", raw_dir=tmp_path / "raw", out_dir=tmp_path)
    catalogue(tmp_path / "raw", 'msgid "a"\nmsgstr ""\n')
    with pytest.raises(UserError, match=r"the train split is empty \(0 usable items"):
        setup(data="catalogues_fr", raw_dir=tmp_path / "raw", out_dir=tmp_path)
    assert not (tmp_path / "catalogues_fr").exists()
