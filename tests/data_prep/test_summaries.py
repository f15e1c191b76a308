"""Documents with summaries: from raw files, from a folder in place of the Hub, docstrings, one's own file."""

import json
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from custom_models.tokenization.words import splitter
from data_prep.docstrings import parts_of
from data_prep.prepare import setup
from data_prep.rows import normalise, row_problem
from data_prep.summaries import split_sentences
from tests.data_prep.conftest import pubmedqa_row, write_table
from workflows.errors import UserError


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def paper(number: int, **changes: Any) -> dict[str, Any]:
    sentences = [f"We study problem {number}. ", "It is\nhard.", ""]
    return {
        "source": sentences,
        "source_labels": [1, 0, 0],
        "paper_id": "x",
        "target": [f"Problem {number}."],
        **changes,
    }


def scitldr(folder: Path) -> None:
    write_table(
        folder / "train.jsonl",
        [paper(1), paper(2), paper(2), paper(3, source=["", " "]), paper(5), paper(6, target=[""])],
    )
    write_table(folder / "dev.jsonl", [paper(4), paper(7, source=["One only."])])
    write_table(folder / "test.jsonl", [paper(5), paper(8, target=["a.", "b."])])


def test_scitldr_keeps_its_splits_and_counts_what_it_leaves_out(tmp_path, capsys):
    scitldr(tmp_path / "raw")
    setup("scitldr", tmp_path, raw_dir=tmp_path / "raw")
    folder = tmp_path / "scitldr"
    found = {split: rows_of(folder, split) for split in ("train", "validation", "test")}
    assert [len(rows) for rows in found.values()] == [2, 2, 2]
    assert found["test"][0] == {"sentences": ["We study problem 5.", "It is hard."], "summaries": ["Problem 5."]}
    assert found["test"][1]["summaries"] == ["a.", "b."]
    told = manifest(folder)
    assert told["dropped"] == {
        "repeated document": 1, "empty document": 1, "empty summary": 1, "also in a later split": 1
    }  # fmt: skip
    assert told["notes"]["documents of one sentence, in which there is nothing to choose"] == 1
    assert "left out, empty document: 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="official splits"):
        setup("scitldr", tmp_path, raw_dir=tmp_path / "raw", test_size=3)
    write_table(tmp_path / "raw" / "test.jsonl", [paper(5, target="a.")])
    with pytest.raises(UserError, match=r"test\.jsonl, line 1: 'target' is a text"):
        setup("scitldr", tmp_path, raw_dir=tmp_path / "raw")
    assert rows_of(folder, "test") == found["test"]  # what was there is still there


def test_scitldr_comes_from_the_hub(hub, tmp_path):
    """Its repository holds a script, which nothing runs any more: the Hub's own Parquet copy is read."""
    (hub / "allenai/scitldr" / "main").mkdir(parents=True)
    (hub / "allenai/scitldr" / "main" / "main.py").write_text("raise SystemExit('must not run')")
    for number, split in enumerate(("train", "validation", "test")):
        write_table(hub / f"allenai/scitldr/parquet/Abstract/{split}/0000.parquet", [paper(number)])
    setup("scitldr", tmp_path)
    assert manifest(tmp_path / "scitldr")["revision"] == "sha-of-parquet"
    assert rows_of(tmp_path / "scitldr", "test")[0]["summaries"] == ["Problem 2."]


def test_news_come_from_the_hub_no_more_than_a_machine_can_read(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.summaries.MOST_FROM_HUB", 4)
    for number, split in enumerate(("train", "validation", "test")):
        news = [{"document": f"Story {number} {i} here. It rained.", "summary": f"Rain {i}."} for i in range(6)]
        write_table(hub / "EdinburghNLP/xsum" / "main" / f"{split}.parquet", news)
    setup("xsum", tmp_path)
    assert len(rows_of(tmp_path / "xsum", "train")) == 4
    assert manifest(tmp_path / "xsum")["dropped"]["beyond the first 4 of a split"] == 6
    assert " ".join(rows_of(tmp_path / "xsum", "test")[0]["sentences"]) == "Story 2 0 here. It rained."


def test_meqsum_is_a_spreadsheet(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    with pytest.raises(UserError, match=r"meqsum is not on the Hub.*github.com/abachaa/MeQSum"):
        setup("meqsum", tmp_path)
    with pytest.raises(UserError, match=r"holds 0 \.xlsx files"):
        setup("meqsum", tmp_path, raw_dir=raw)
    book = openpyxl.Workbook()
    for row in [("File", "CHQ", "Summary", None), *((i, f"I have pain {i}. Why?", f"Why pain {i}?") for i in range(30)),
                ("x", None, "Lost?")]:  # fmt: skip
        book.active.append(row)
    book.save(raw / "MeQSum.xlsx")
    setup("meqsum", tmp_path, raw_dir=raw)
    assert [len(rows_of(tmp_path / "meqsum", split)) for split in ("train", "validation", "test")] == [24, 3, 3]
    assert manifest(tmp_path / "meqsum")["dropped"] == {"empty document": 1}
    (raw / "MeQSum.xlsx").write_bytes(b"no zip")
    with pytest.raises(UserError, match="no readable spreadsheet"):
        setup("meqsum", tmp_path, raw_dir=raw)


def test_pubmedqas_conclusions_keep_its_test(tmp_path):
    rows = [pubmedqa_row(i) for i in range(12)]
    write_table(tmp_path / "raw" / "pqa.jsonl", rows)
    (tmp_path / "raw" / "test_ground_truth.json").write_text(json.dumps({str(r["pubid"]): "yes" for r in rows[:4]}))
    setup("pubmedqa_conclusions", tmp_path, raw_dir=tmp_path / "raw", validation_size=2)
    test = rows_of(tmp_path / "pubmedqa_conclusions", "test")
    assert {row["summaries"][0] for row in test} == {f"Drug {i} helps." for i in range(4)}
    assert test[0]["sentences"] == ["Trial 0.", "Half got it."]


def test_ones_own_file(tmp_path):
    rows = [{"text": f"Cat {i} sat. It slept.", "summary": f"Cat {i} slept."} for i in range(20)]
    rows += [
        {"sentences": ["Dogs bark.", "Loudly."], "summaries": ["Dogs.", "Barking."]},
        {"text": " ", "summary": "x"},
    ]
    file = write_table(tmp_path / "mine.jsonl", rows)
    setup("jsonl", tmp_path, file=file, name="mine")
    everything = [row for split in ("train", "validation", "test") for row in rows_of(tmp_path / "mine", split)]
    assert (
        len(everything) == 21
        and {"sentences": ["Dogs bark.", "Loudly."], "summaries": ["Dogs.", "Barking."]} in everything
    )
    assert manifest(tmp_path / "mine")["dropped"] == {"empty document": 1}
    doubled = [*rows, *({"text": f"Cow {i} sat. It slept.", "summary": f"cat {i} slept"} for i in range(20))]
    setup("jsonl", tmp_path, file=write_table(file, doubled), name="mine", validation_size=5, test_size=6)
    sides = [{normalise(text) for row in rows_of(tmp_path / "mine", split) for text in row["summaries"]}
             for split in ("train", "validation", "test")]  # fmt: skip
    assert sum(map(len, sides)) == len(set.union(*sides)) == 22
    two = [{"text": f"Cow {i} sat.", "summary": f"Cow {i % 2}."} for i in range(30)]
    with pytest.raises(UserError, match=r"30 usable items in all, 2 groups that have something in common"):
        setup("jsonl", tmp_path, file=write_table(file, two), name="mine")
    write_table(file, [*rows[:2], {"text": "x"}])
    with pytest.raises(UserError, match=r"mine\.jsonl, line 3: it has the fields 'text'"):
        setup("jsonl", tmp_path, file=file, name="mine")
    write_table(file, [*rows[:2], {"text": 3, "summary": "x"}])
    with pytest.raises(UserError, match=r"line 3: 'text' must be a text or a list of texts"):
        setup("jsonl", tmp_path, file=file, name="mine")


DOCSTRING = """Compute the median of the given :class:`~numpy.ndarray` values.

The median is the value in the ``middle``. Half of the values
are smaller. It is robust.

    indented = code

>>> median([1, 2])
1.5

Parameters
----------
x : array
    Values. Many. Of them.
"""


def test_a_docstring_is_its_prose_and_its_first_line():
    summary, body = parts_of(DOCSTRING)
    assert summary == "Compute the median of the given numpy.ndarray values."
    assert body == "The median is the value in the middle. Half of the values are smaller. It is robust."
    assert parts_of("Short.\n\nOne. Two. Three.") is None  # a title
    assert parts_of("Compute the median of all these values.\n\nOne only.") is None
    assert parts_of("") is None


def test_docstrings_of_a_file_stay_in_one_split(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(30):
        functions = "".join(
            f"def f{i}():\n    '''Compute the value {i} of file {number}.\n\n    Is {i}. Is {number}. Odd.\n    '''\n\n"
            for i in range(2)
        )
        (raw / f"m{number}.py").write_text(functions)
    (raw / "broken.py").write_text("def (")
    setup("docstrings", tmp_path, raw_dir=raw)
    sides = [
        {row["summaries"][0].split()[-1] for row in rows_of(tmp_path / "docstrings", split)}
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 30
    # neither what the folder lies in nor what is called like a file, and is none, matters
    below = tmp_path / "tests"
    raw.rename(below)
    (below / "folder.py").mkdir()
    (below / "lost.py").symlink_to(below / "nowhere")
    (below / "long.py").write_text("x = " + "+".join("1" * 100_000))
    setup("docstrings", tmp_path / "again", raw_dir=below)
    assert rows_of(tmp_path / "again/docstrings", "test") == rows_of(tmp_path / "docstrings", "test")
    with pytest.raises(UserError, match="no docstring with a first line"):
        setup("docstrings", tmp_path, raw_dir=tmp_path / "docstrings")


def test_blank_lines_end_sentences_and_an_empty_text_has_none():
    split = splitter("It rains. It pours.")
    found = split_sentences("A heading\r\n\r\nIt rains. It pours.\n\n\n", split)
    assert found == ["A heading", "It rains.", "It pours."]
    assert split_sentences(" \n\n ", split) == []


@pytest.mark.parametrize("row", [{}, {"sentences": [], "summaries": ["a"]}, {"sentences": ["a"], "summaries": [" "]}])
def test_rows_are_checked(row):
    assert "must be a list of texts, none of them empty" in row_problem(row, "summarised")
