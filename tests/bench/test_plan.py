"""The bench of `make plan`: its cells are whole steps, small data is made once, and what is off is said."""

import json
from pathlib import Path

import pytest

from bench import plan
from data_prep.rows import read_rows
from tests.workflows.alignment import pair, question, write
from workflows.errors import UserError


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rows = [
        {"messages": [*question(n)["prompt"], *pair(n)["chosen"]], "kind": k} for n in range(3) for k in ("name", "x")
    ]
    write(tmp_path / "data" / "hpo", train=rows, validation=rows, test=rows)
    pairs = [{**pair(n), "kind": "definition"} for n in range(3)]
    write(tmp_path / "data" / "hpo_pairs", train=pairs, validation=pairs, test=pairs)
    return tmp_path / "data"


@pytest.mark.slow  # two steps of real processes, for a bench that is run by hand
def test_a_cell_is_a_plan_and_a_step_in_processes_of_their_own(tiny_llama: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(plan, "REPORTS", tmp_path / "bench")
    cell = plan.measured("shrink", tiny_llama, ["--layers", "1"])
    assert cell["measured_bytes"] > 10**8 and cell["parameters"] > 50_000
    assert cell["predicted_bytes"] / cell["measured_bytes"] == cell["ratio"] == pytest.approx(1, abs=plan.TOLERANCE)
    with pytest.raises(UserError, match="no checkpoint at"):
        plan.measured("shrink", tmp_path / "nothing", [])


def run_with(ratio: float, data_dir: Path, tiny_llama: Path, monkeypatch) -> None:
    asked = []

    def measured(step: str, checkpoint_dir: Path, options: list[str]) -> dict:
        asked.append((step, options))
        return {"predicted_bytes": int(1e9 * ratio), "measured_bytes": 10**9, "parameters": 1, "ratio": ratio}

    monkeypatch.setattr(plan, "REPORTS", data_dir.parent / "bench")
    monkeypatch.setattr(plan, "measured", measured)
    plan.setup(tiny_llama, data_dir, sizes=["135m"])
    assert [step for step, _ in asked] == ["lora", "dpo", "grpo", "evaluate", "export"]


def test_the_report_has_every_cell(data_dir: Path, tiny_llama: Path, monkeypatch, capsys):
    run_with(1.02, data_dir, tiny_llama, monkeypatch)
    report = json.loads((data_dir.parent / "bench" / "plan.json").read_text())
    assert [cell["step"] for cell in report["cells"]] == ["lora", "dpo", "grpo", "evaluate", "export"]
    assert report["ours"]["median"] == 1.02 and report["peers"] == {}
    assert "dpo       135m  predicted   1,020 MB, measured   1,000 MB, ratio 1.02" in capsys.readouterr().out
    rows = read_rows(data_dir.parent / "bench" / "plan-data" / "hpo" / "train.jsonl", "messages")
    assert len(rows) == 3 and {row["kind"] for row in rows} == {"name"}
    assert len(read_rows(data_dir.parent / "bench" / "plan-data" / "hpo_pairs" / "train.jsonl", "preference")) == 3


def test_a_plan_that_is_off_fails_the_bench(data_dir: Path, tiny_llama: Path, monkeypatch):
    with pytest.raises(UserError, match="off by more than 15% for lora 135m"):
        run_with(1.2, data_dir, tiny_llama, monkeypatch)
    assert (data_dir.parent / "bench" / "plan.json").is_file()
