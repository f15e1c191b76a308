"""The command line of `python -m workflows data`."""

import json
from pathlib import Path

import pytest

from tests.data_prep.conftest import write_table
from workflows.__main__ import main


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"question": f"Q{i}", "answer": f"A{i}", "kind": "odd" if i % 2 else "even"} for i in range(40)]
    return write_table(tmp_path / "mine.jsonl", rows)


def test_it_says_what_it_wrote(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "--data", "jsonl", "--file", str(file), "--out_dir", str(tmp_path / "data")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/data/jsonl/train.jsonl: 32 rows (" in out and "validation.jsonl: 4 rows" in out


def test_a_step_that_is_killed_leaves_no_folder_without_its_numbers(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    args = ["data", "--data", "jsonl", "--file", str(file), "--out_dir", str(tmp_path / "data")]
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.dataset.write_metrics", killed)
        assert main(args) == 130
    assert list((tmp_path / "data").iterdir()) == []
    assert main(args) == 0
    metrics = json.loads((tmp_path / "data/jsonl/metrics.json").read_text())
    counts = {row["split"]: row["value"] for row in metrics["metrics"]}
    assert counts == {"train": 32, "validation": 4, "test": 4} and metrics["seconds"] > 0


def test_kinds_choose_rows_and_unknown_ones_are_named(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]):
    args = ["data", "--data", "jsonl", "--file", str(file), "--out_dir", str(tmp_path / "data")]
    args += ["--validation_size", "9", "--test_size", "9"]
    assert main([*args, "--kinds", '["even"]']) == 0
    assert '"odd"' not in (tmp_path / "data/jsonl/train.jsonl").read_text()
    before = (tmp_path / "data/jsonl/train.jsonl").read_bytes()
    assert main([*args, "--kinds", '["evn"]']) == 1
    assert "no rows of kind evn; it has even, odd" in capsys.readouterr().err
    assert (tmp_path / "data/jsonl/train.jsonl").read_bytes() == before


def test_all_problems_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = ["data", "--data", "pubmedqa", "--file", "x", "--raw_dir", str(tmp_path / "none"), "--test_size", "0"]
    assert main([*args, "--validation_size", "-1", "--name", "a/b"]) == 1
    message = capsys.readouterr().err
    for words in ("--file belongs", "none is not a folder", "--test_size must", "--validation_size must", "official"):
        assert words in message
    assert "'a/b'" in message and message.startswith("error: 6 problems")


def test_jsonl_needs_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "--data", "jsonl"]) == 1
    assert "--data jsonl needs --file" in capsys.readouterr().err
    assert main(["data", "--data", "jsonl", "--file", str(tmp_path / "no.jsonl")]) == 1
    assert "no.jsonl does not exist" in capsys.readouterr().err


def test_an_unknown_data_set_is_refused():
    with pytest.raises(SystemExit, match="2"):
        main(["data", "--data", "imagenet"])
