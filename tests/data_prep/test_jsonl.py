"""`make data DATA=jsonl`: a user's file as a data directory, with everything that was left out in its manifest."""

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.prepare import setup
from data_prep.rows import SPLITS, read_rows
from tests.data_prep.conftest import write_table
from workflows.__main__ import main
from workflows.errors import UserError


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def all_rows(folder: Path, shape: str = "messages") -> list[dict[str, Any]]:
    return [row for split in SPLITS for row in read_rows(folder / f"{split}.jsonl", shape)]


def pair(number: int, **fields: Any) -> dict[str, Any]:
    return {"question": f"Q{number}", "answer": f"A{number}", **fields}


def test_what_was_read_and_what_was_not_is_printed_and_in_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [pair(i, score=i, id=i, context="" if i else "C") for i in range(20)]
    rows += [{"instruction": "I", "output": "O"}, rows[3]]
    setup("jsonl", tmp_path, file=write_table(tmp_path / "mine.jsonl", rows))
    told = manifest(tmp_path / "jsonl")
    assert told["read_as"] == (
        "messages (21 questions with answers: question, answer; 1 questions with answers: instruction, output)"
    )
    assert told["notes"] == {"contexts put before their question": 1}
    assert told["fields_not_used"] == {"score": 20 + 1}
    assert told["dropped"] == {"repeated row": 1}
    out = capsys.readouterr().out
    assert f"read as: {told['read_as']}" in out and "field not used, score: 21 rows" in out


def test_all_broken_rows_are_listed_and_can_be_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [pair(i, answer="" if i % 3 == 0 else "A") for i in range(60)]
    file = write_table(tmp_path / "mine.jsonl", rows)
    with open(file, "a") as f:
        f.write("{broken\n")
    with pytest.raises(UserError) as e:
        setup("jsonl", tmp_path / "data", file=file)
    told = str(e.value)
    assert told.startswith("21 of 61 rows of") and "line 61: not valid JSON" in told and "--skip_broken true" in told
    assert told.count("\n  - ") == 2 and 'lines 1, 4, 7, 10, 13, …: "answer" is empty' in told
    assert not (tmp_path / "data").exists()
    setup("jsonl", tmp_path / "data", file=file, skip_broken=True)
    assert "21 of 61 rows" in capsys.readouterr().out
    assert manifest(tmp_path / "data/jsonl")["dropped"] == {"broken row": 21}
    assert len(all_rows(tmp_path / "data/jsonl")) == 40


def test_questions_with_options_are_named_so_that_evaluate_finds_them(tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = [{"prompt": f"Q{i}", "choices": ["a", "b"], "answer": 0} for i in range(20)]
    file = write_table(tmp_path / "mine.jsonl", rows)
    setup("jsonl", tmp_path / "data", name="mine", file=file)
    assert "--name mine_mcq" in capsys.readouterr().out
    setup("jsonl", tmp_path / "data", name="mine_mcq", file=file)
    assert "--name" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "good", "bad"),
    [
        ("messages", {"messages": [{"role": "user", "content": "Q{}"}, {"role": "assistant", "content": "A"}]},
         {"messages": [{"role": "user", "content": "Q"}]}),
        ("preference", {"prompt": "Q{}", "chosen": "A", "rejected": "B"},
         {"prompt": "Q", "chosen": "A", "rejected": ""}),
        ("labelled", {"prompt": "Q{}", "completion": "A", "label": True},
         {"prompt": "Q", "completion": "A", "label": 3}),
        ("scoring", {"prompt": "Q{}", "choices": ["a", "b"], "answer": 0},
         {"prompt": "Q", "choices": ["a"], "answer": 0}),
        ("verifiable", {"prompt": "Q{}", "answers": ["a"]}, {"prompt": "", "answers": ["a"]}),
        ("translated", {"source": "S{}", "target": "T{}"}, {"source": "S", "target": 3}),
        ("summarised", {"document": "D{}", "summary": "S{}"}, {"document": "D", "summary": 3}),
        ("spans", {"question": "Q{}", "context": "C{}", "answers": {"text": ["C"], "answer_start": [0]}},
         {"question": "Q", "context": "C", "answers": {"text": ["D"], "answer_start": [0]}}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_broken_rows_of_every_shape_and_format_can_be_skipped(
    tmp_path: Path, shape: str, good: dict[str, Any], bad: dict[str, Any], suffix: str
):
    if suffix == ".parquet" and shape in ("labelled", "translated", "summarised"):
        pytest.skip("a column of Parquet has one type, so that such a row cannot be in it")
    rows = [json.loads(json.dumps(good).replace("{}", str(i))) for i in range(20)] + [bad]
    file = write_table(tmp_path / f"mine{suffix}", rows)
    with pytest.raises(UserError, match=r"1 of 21 rows of .*\n.*(line|row) 21: "):
        setup("jsonl", tmp_path / "data", file=file)
    setup("jsonl", tmp_path / "data", file=file, skip_broken=True)
    assert manifest(tmp_path / "data/jsonl")["shape"] == shape
    assert manifest(tmp_path / "data/jsonl")["dropped"]["broken row"] == 1
    assert len(all_rows(tmp_path / "data/jsonl", shape)) == 20


def test_a_file_without_one_good_row_is_refused_even_so(tmp_path: Path):
    file = write_table(tmp_path / "mine.jsonl", [{"text": f"page {i}"} for i in range(30)])
    with pytest.raises(UserError, match=r"30 of 30 rows.*(?s:.)*continued pretraining") as e:
        setup("jsonl", tmp_path, file=file, skip_broken=True)
    assert "--skip_broken" not in str(e.value)


@pytest.mark.parametrize("where", ["system", "context", "tools"])
def test_rows_whose_users_say_the_same_are_told_apart_by_what_else_is_shown(tmp_path: Path, where: str):
    tools = [[{"type": "function", "function": {"name": f"f{i}"}}] for i in range(20)]
    rows = [pair(0, **{where: tools[i] if where == "tools" else f"Describe product {i}."}) for i in range(20)]
    setup("jsonl", tmp_path, file=write_table(tmp_path / "mine.jsonl", rows))
    assert [split["rows"] for split in manifest(tmp_path / "jsonl")["splits"].values()] == [16, 2, 2]


def test_one_question_for_all_rows_cannot_be_split_and_sizes_are_no_cure(tmp_path: Path):
    rows = [{"question": "Q", "answer": f"A{i}"} for i in range(20)]
    with pytest.raises(UserError, match=r"20 usable items in all, 1 groups.*stay in one split, whatever its size") as e:
        setup("jsonl", tmp_path, file=write_table(tmp_path / "mine.jsonl", rows))
    assert "--validation_size" not in str(e.value)


def test_questions_that_differ_in_punctuation_only_are_split_to_the_letter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"prompt": f"Balanced? {'(' * (1 + i // 2)}", "completion": f"A{i}"} for i in range(20)]
    setup("jsonl", tmp_path, file=write_table(tmp_path / "mine.jsonl", rows))
    assert "Ignoring case and punctuation leaves fewer questions than splits" in capsys.readouterr().out
    assert "compared exactly" in manifest(tmp_path / "jsonl")["split"]
    prompts = [{row["messages"][0]["content"] for row in read_rows(tmp_path / f"jsonl/{s}.jsonl")} for s in SPLITS]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 10


def test_an_object_with_a_field_twice_is_broken(tmp_path: Path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Q", "prompt": "R", "completion": "A"}\n')
    with pytest.raises(UserError, match=r"line 1: not valid JSON \(an object has 'prompt' twice\)"):
        setup("jsonl", tmp_path, file=tmp_path / "mine.jsonl")


def test_repeated_rows_of_every_shape_are_left_out(tmp_path: Path):
    for row in ({"prompt": "Q{}", "completion": "A", "label": True}, {"prompt": "Q{}", "answers": ["a"]}):
        rows = [json.loads(json.dumps({**row, "id": i}).replace("{}", str(i % 20))) for i in range(25)]
        setup("jsonl", tmp_path, file=write_table(tmp_path / "mine.jsonl", rows))
        assert manifest(tmp_path / "jsonl")["dropped"] == {"repeated row": 5}


def test_parquet_leaves_no_nulls_in_messages_and_tools(tmp_path: Path):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Q{i}"},
                {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
                {"role": "tool", "content": "1", "tool_call_id": "c"},
                {"role": "assistant", "content": "A"},
            ],
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "int"}}}},
                {"type": "function", "function": {"name": "g", "parameters": {"b": {"type": "str"}}}},
            ],
        }
        for i in range(20)
    ]
    file = tmp_path / "mine.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    setup("jsonl", tmp_path, file=file)
    for row in all_rows(tmp_path / "jsonl"):
        assert row["tools"] == rows[0]["tools"]
        assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
        assert row["messages"][1]["train"] is False and "train" not in row["messages"][3]
        assert row["messages"][3] == {"role": "assistant", "content": "A"}


def test_parquets_missing_numbers_are_no_values_and_its_decimals_are_numbers(tmp_path: Path):
    rows = [{"prompt": f"Q{i}", "completion": Decimal("1.50"), "score": math.nan if i else 1.0} for i in range(20)]
    setup("jsonl", tmp_path, file=write_table(tmp_path / "mine.parquet", rows))
    assert manifest(tmp_path / "jsonl")["fields_not_used"] == {"score": 1}
    assert {row["messages"][1]["content"] for row in all_rows(tmp_path / "jsonl")} == {"1.50"}
    rows = [{"prompt": b"Q", "completion": "A"}]
    with pytest.raises(UserError, match="'prompt' must be a text or a list of messages, but is of type bytes"):
        setup("jsonl", tmp_path, file=write_table(tmp_path / "mine.parquet", rows))


def test_a_table_may_hold_messages_as_text(tmp_path: Path):
    import csv

    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    with open(tmp_path / "mine.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["prompt", "chosen", "rejected", ""])
        for i in range(20):
            side = [{**talk[0], "content": f"Q{i}"}]
            writer.writerow(
                [f"Q{i}", json.dumps([*side, talk[1]]), json.dumps([*side, {**talk[1], "content": "B"}]), i]
            )
    setup("jsonl", tmp_path, file=tmp_path / "mine.csv")
    assert all(row["chosen"] == [talk[1]] for row in all_rows(tmp_path / "jsonl", "preference"))
    told = manifest(tmp_path / "jsonl")
    assert told["notes"] == {"messages written as JSON texts": 40}
    assert told["fields_not_used"] == {"(a column without a name)": 20}


def test_a_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parsed: list[str] = []

    def parse(text: str, unique_names: bool = False) -> Any:
        parsed.append(text)
        return json.loads(text)

    monkeypatch.setattr("data_prep.rows.parse_json", parse)
    monkeypatch.setattr("data_prep.tables.parse_json", parse)
    rows = [pair(i) for i in range(20)]
    setup("jsonl", tmp_path, file=write_table(tmp_path / "mine.jsonl", rows))
    assert len(parsed) == 20 + 1  # the first line, to see whether a line is a row
    parsed.clear()
    setup("jsonl", tmp_path, file=write_table(tmp_path / "mine.json", rows))
    assert len(parsed) == 1


def test_the_command_line_names_a_shape_and_fields_to_ignore(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [pair(i, label="medical") for i in range(20)]
    args = ["data", "--data", "jsonl", "--file", str(write_table(tmp_path / "mine.jsonl", rows))]
    args += ["--out_dir", str(tmp_path / "data")]
    assert main(args) == 1
    assert "--ignore_fields+=label" in capsys.readouterr().err
    assert main([*args, "--ignore_fields+=label"]) == 0
    assert "field not used, label: 20 rows" in capsys.readouterr().out
    assert main([*args, "--ignore_fields", '["label"]', "--shape", "verifiable"]) == 0
    assert "read as: verifiable" in capsys.readouterr().out
    assert main([*args, "--shape", "preference"]) == 1
    assert "not of the shape preference" in capsys.readouterr().err
    assert main(["data", "--data", "hpo", "--shape", "messages", "--skip_broken", "true"]) == 1
    told = capsys.readouterr().err
    assert "--shape belongs to --data jsonl" in told and "--skip_broken belongs to --data jsonl or iob" in told


def test_broken_sentences_of_an_iob_file_can_be_skipped(tmp_path: Path):
    lines = [f"word{i}\tNN\tB-X\nis\tO\n" for i in range(20)]
    lines[3], lines[7] = "word\tI-X\nis\tO\n", "alone\n"
    (tmp_path / "mine.iob").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"(?s)2 sentences.*line 10: 'I-X' must follow.*line 22: 'alone' is not a word"):
        setup("iob", tmp_path / "data", file=tmp_path / "mine.iob")
    setup("iob", tmp_path / "data", file=tmp_path / "mine.iob", skip_broken=True)
    told = manifest(tmp_path / "data" / "mine")
    assert told["dropped"] == {"broken sentence": 2}
    assert told["fields_not_used"] == {"columns between a word and its tag": 18}
    assert sum(split["rows"] for split in told["splits"].values()) == 18
