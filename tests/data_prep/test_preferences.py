"""Preferences: the published collections in their own columns, one's own file, and what is dropped or refused."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.formats import Intake
from data_prep.preferences import COLLECTIONS
from data_prep.prepare import setup
from data_prep.rows import read_rows
from tests.data_prep.conftest import write_table
from workflows.errors import UserError

SPLITS = ("train", "validation", "test")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def orca_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {"system": "Be exact.", "question": f"Q{number}?", "chosen": f"good {number}", "rejected": f"bad {number}"}
    return {**row, **changes}


def ultrafeedback_row(number: int, **changes: Any) -> dict[str, Any]:
    question = user(f"Q{number}?")
    row = {
        "prompt": question["content"],
        "prompt_id": f"{number:064}",
        "chosen": [question, assistant(f"good {number}")],
        "rejected": [question, assistant(f"bad {number}")],
        "messages": [question, assistant(f"good {number}")],
        "score_chosen": 8.0,
        "score_rejected": 5.0,
    }
    return {**row, **changes}


def pairs(directory: Path, split: str) -> list[dict[str, Any]]:
    return read_rows(directory / f"{split}.jsonl", "preference")


def questions(directory: Path, split: str) -> set[str]:
    return {row["prompt"][-1]["content"] for row in pairs(directory, split)}


def test_the_real_instruction_preferences(tmp_path: Path):
    if not os.environ.get("WORKFLOW_DATA"):
        pytest.skip("WORKFLOW_DATA is not set; it names the folder with raw data sets (see README)")
    raw = Path(os.environ["WORKFLOW_DATA"]).resolve() / "instruction_preference"
    setup(data="instruction_preference", raw_dir=raw, out_dir=tmp_path)
    manifest = json.loads((tmp_path / "instruction_preference" / "manifest.json").read_text())
    assert manifest["shape"] == "preference"
    assert manifest["dropped"]["chosen and rejected answer are the same"] == 6
    sizes = [len(pairs(tmp_path / "instruction_preference", split)) for split in SPLITS]
    assert sum(sizes) + sum(manifest["dropped"].values()) == 1100 and min(sizes) > 100
    asked = [questions(tmp_path / "instruction_preference", split) for split in SPLITS]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    train = pairs(tmp_path / "instruction_preference", "train")
    assert any(
        "freind --> friend" in row["prompt"][0]["content"]
        for split in SPLITS
        for row in pairs(tmp_path / "instruction_preference", split)
    )
    assert all(row["chosen"] != row["rejected"] for row in train)


@pytest.mark.parametrize("name", ["orca", "ultramedical_preference"])
def test_a_collection_of_the_hub_is_split_by_prompt(name: str, hub: Path, tmp_path: Path):
    make = orca_row if name == "orca" else ultrafeedback_row
    rows = [make(number // 2) for number in range(60)]  # two pairs for each prompt
    for number, row in enumerate(rows[::2]):
        row["rejected"] = json.loads(json.dumps(row["rejected"]).replace("bad", f"worse {number}"))
    write_table(hub / COLLECTIONS[name].hub_id / "main" / "train.parquet", rows)
    setup(data=name, out_dir=tmp_path / "data")
    counts = Counter({split: len(pairs(tmp_path / "data" / name, split)) for split in SPLITS})
    assert counts == {"train": 48, "validation": 6, "test": 6}
    asked = [questions(tmp_path / "data" / name, split) for split in SPLITS]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    row = pairs(tmp_path / "data" / name, "train")[0]
    assert [m["role"] for m in row["prompt"]] == (["system", "user"] if name == "orca" else ["user"])
    assert [m["role"] for m in row["chosen"]] == ["assistant"]


def test_ultrafeedback_keeps_its_own_test_and_reads_no_other_splits(hub: Path, tmp_path: Path):
    folder = hub / COLLECTIONS["ultrafeedback_binarized"].hub_id / "main" / "data"
    for split, numbers in (("train_prefs", range(30)), ("test_prefs", range(25, 35)), ("train_sft", range(90, 95))):
        write_table(folder / f"{split}-00000-of-00001.parquet", [ultrafeedback_row(n) for n in numbers])
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train_prefs", "test_prefs", "train_sft")
    )
    (folder.parent / "README.md").write_text(readme + "---\n")
    setup(data="ultrafeedback_binarized", out_dir=tmp_path / "data", validation_size=5)
    directory = tmp_path / "data" / "ultrafeedback_binarized"
    assert questions(directory, "test") == {f"Q{n}?" for n in range(25, 35)}
    assert questions(directory, "train") | questions(directory, "validation") == {f"Q{n}?" for n in range(25)}
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["dropped"]["pair whose prompt is also in the test"] == 5


def test_ones_own_pairs(tmp_path: Path):
    rows = [{"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": f"bad {n}", "kind": "mine"} for n in range(20)]
    rows += [rows[0], {**rows[1], "rejected": " good 1 "}]
    setup("jsonl", file=write_table(tmp_path / "mine.jsonl", rows), out_dir=tmp_path / "data", name="mine")
    manifest = json.loads((tmp_path / "data" / "mine" / "manifest.json").read_text())
    assert manifest["dropped"] == {"repeated pair": 1, "chosen and rejected answer are the same": 1}
    assert sum(split["rows"] for split in manifest["splits"].values()) == 20
    assert manifest["splits"]["train.jsonl"]["kinds"] == {"mine": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": " "}, 'line 3: "chosen" is empty'),
        ({"rejected": []}, 'line 3: "rejected" must be a list of at least one message'),
        ({"prompt": ""}, 'line 3: "prompt" is empty'),
        ({"rejected": True}, "line 3: 'rejected' must be a text or a list of messages, but is true or false; write"),
        ({"chosen": [user("what?")]}, "line 3: 'chosen' does not begin with the assistant's message"),
        ({"chosen": [user("what?"), assistant("so")]}, "line 3: 'chosen' does not begin with the assistant's message"),
    ],
)
def test_a_malformed_row_of_ones_own_is_named(tmp_path: Path, change: dict, message: str):
    rows = [{"prompt": f"Q{n}", "chosen": "good", "rejected": "bad"} for n in range(20)]
    rows[2] |= change
    with pytest.raises(UserError, match=r"mine.jsonl, ") as e:
        setup("jsonl", file=write_table(tmp_path / "mine.jsonl", rows), out_dir=tmp_path / "data")
    assert message in str(e.value)
    assert not (tmp_path / "data").exists()


def test_empty_answers_of_a_collection_are_counted(hub: Path, tmp_path: Path):
    rows = [orca_row(n) for n in range(20)] + [orca_row(20, chosen=""), orca_row(21, rejected=None)]
    write_table(hub / COLLECTIONS["orca"].hub_id / "main" / "train.parquet", rows)
    setup(data="orca", out_dir=tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "orca" / "manifest.json").read_text())
    assert manifest["dropped"]["malformed or empty prompt or answer"] == 2


def test_other_columns_than_a_collections_are_refused(hub: Path, tmp_path: Path):
    write_table(hub / COLLECTIONS["orca"].hub_id / "main" / "train.parquet", [{"question": "a", "answer": "b"}])
    with pytest.raises(UserError, match=r"row 1: it has no 'chosen'"):
        setup(data="orca", out_dir=tmp_path / "data")


def test_without_its_files_a_collection_off_the_hub_says_where_they_are(tmp_path: Path):
    with pytest.raises(UserError, match=r"not on the Hub.*LLMs-from-scratch.*--raw_dir"):
        setup(data="instruction_preference", out_dir=tmp_path / "data")


def test_a_prompt_may_be_what_both_conversations_begin_with():
    talk = [user("a"), assistant("b"), user("c")]
    row = Intake().read({"chosen": [*talk, assistant("good")], "rejected": [*talk, assistant("bad")]})
    assert row == {"prompt": talk, "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    again = Intake().read({"prompt": talk, "chosen": [assistant("good")], "rejected": [assistant("bad")], "id": 7})
    assert again == {**row, "id": 7}
