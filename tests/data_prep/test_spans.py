"""Questions about texts: the ontology's entries, SQuAD from a folder in place of the Hub, one's own file."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import setup
from data_prep.rows import row_problem
from tests.data_prep.conftest import pubmedqa_row, write_table
from workflows.errors import UserError


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def ontology(folder: Path, terms: int) -> Path:
    folder.mkdir(exist_ok=True)
    stanzas = ["format-version: 1.2\ndata-version: hp/test\n", "[Term]\nid: HP:0000118\nname: Phenotypic abnormality\n"]
    for number in range(terms):
        parent = "HP:0000118" if number < 4 else f"HP:{1000 + number % 4:07}"
        stanzas.append(
            f"[Term]\nid: HP:{1000 + number:07}\nname: Sign{number}\n"
            f'def: "A long description with the word w{number}x that tells what is meant by it." []\n'
            f'synonym: "Mark{number}" EXACT []\nis_a: {parent} ! x\n'
        )
    (folder / "hp.obo").write_text("\n".join(stanzas))
    return folder


def squad_row(number: int, **changes: Any) -> dict[str, Any]:
    context = f"Town {number} lies on river R{number}."
    answers = {"text": [f"R{number}"], "answer_start": [context.index(f"R{number}")]}
    row = {"id": str(number), "title": f"Town {number}", "question": f"Where is {number}?", "context": context}
    return {**row, "answers": answers, **changes}


def test_an_entry_is_asked_for_by_its_definition_which_no_context_holds(tmp_path):
    setup("hpo_spans", tmp_path, raw_dir=ontology(tmp_path / "raw", 60), validation_size=5, test_size=10)
    folder = tmp_path / "hpo_spans"
    asked = {split: rows_of(folder, split) for split in ("train", "validation", "test")}
    assert [len(rows) for rows in asked.values()] == [45, 5, 10]
    for row, terms in ((row, len(rows)) for rows in asked.values() for row in rows):
        (name,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        number = name.removeprefix("Sign")
        assert f"w{number}x" in row["question"] and "description" not in row["context"]
        assert row["context"][start:].startswith(f"{name} (also Mark{number})") and row["context"].count(
            "(also"
        ) == min(8, terms)
    names = [{row["answers"]["text"][0] for row in rows} for rows in asked.values()]
    assert len(set.union(*names)) == 60  # none is asked for in two splits
    told = [{*re.findall(r"\b(?:Sign|Mark)\d+", " ".join(row["context"] for row in rows))} for rows in asked.values()]
    assert len(set.union(*told)) == sum(map(len, told)) == 120  # nor told of
    before = (folder / "train.jsonl").read_bytes()
    setup("hpo_spans", tmp_path, raw_dir=tmp_path / "raw", validation_size=5, test_size=10)
    assert (folder / "train.jsonl").read_bytes() == before


def test_squad_comes_from_the_hub_with_its_validation_as_the_test(hub, tmp_path):
    rows = [squad_row(i) for i in range(20)] + [squad_row(99), squad_row(3), squad_row(50, answers={"text": []})]
    write_table(hub / "rajpurkar/squad/main/train.jsonl", rows)
    write_table(hub / "rajpurkar/squad/main/validation.jsonl", [squad_row(99), squad_row(98)])
    setup("squad", tmp_path, validation_size=4)
    folder = tmp_path / "squad"
    assert [len(rows_of(folder, split)) for split in ("train", "validation", "test")] == [16, 4, 2]
    told = json.loads((folder / "manifest.json").read_text())
    assert told["dropped"] == {"also in the test": 1, "repeated question": 1, "without an answer": 1}
    assert told["revision"] == "sha-of-main"
    with pytest.raises(UserError, match="squad has an official test"):
        setup("squad", tmp_path, test_size=4)


def test_ones_own_questions(tmp_path):
    file = write_table(tmp_path / "mine.jsonl", [squad_row(i) for i in range(20)])
    setup("jsonl", tmp_path, file=file, name="mine")
    assert [len(rows_of(tmp_path / "mine", split)) for split in ("train", "validation", "test")] == [16, 2, 2]
    write_table(file, [squad_row(0), squad_row(1, answers={"text": ["R7"], "answer_start": [4]})])
    with pytest.raises(UserError, match=r"mine\.jsonl, line 2: the answer 'R7' does not stand in the context at 4"):
        setup("jsonl", tmp_path, file=file, name="mine")


def test_pubmedqas_decisions_are_texts_to_classify(tmp_path):
    rows = [pubmedqa_row(i) for i in range(12)]
    write_table(tmp_path / "raw" / "pqa.jsonl", rows)
    (tmp_path / "raw" / "test_ground_truth.json").write_text(json.dumps({str(r["pubid"]): "yes" for r in rows[:4]}))
    setup("pubmedqa_decisions", tmp_path, raw_dir=tmp_path / "raw", validation_size=2)
    found = rows_of(tmp_path / "pubmedqa_decisions", "test")
    assert found[1] == {"text": "Does drug 1 help? Trial 1. Half got it.", "label": "no"} and len(found) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " "}, '"question" must be a text that is not empty'),
        ({"context": None}, '"context" must be'),
        ({"answers": {"text": []}}, '"answers" must hold "text"'),
        ({"answers": {"text": ["R1"], "answer_start": []}}, '"answer_start" must say'),
        ({"answers": {"text": ["R1"], "answer_start": [-2]}}, "does not stand in the context at -2"),
        ({"answers": {"text": ["R1"], "answer_start": ["0"]}}, "does not stand in the context at '0'"),
    ],
)
def test_rows_are_checked(changes, message):
    assert message in (row_problem(squad_row(1, **changes), "spans") or "")
    assert row_problem(squad_row(1), "spans") is None
