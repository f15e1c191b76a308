"""The card beside an export: the warning, the lineage, and only numbers of these very weights."""

import json
import shutil
from pathlib import Path

import pytest

from workflows.checkpoint import metric, write_metrics
from workflows.model_card import model_card


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Path:
    """out/RUN with a step's result and its scores."""
    final = shutil.copytree(tiny_llama, tmp_path / "run" / "lora" / "final")
    weights = json.loads((final / "provenance.json").read_text())["files"]
    write_metrics(
        tmp_path / "run" / "evaluate" / "lora" / "metrics.json",
        [metric("acc", 0.625, stderr=0.025, n=400, split="test")],
        seconds=1.0,
        model={"lit_model.pth": weights["lit_model.pth"]},
    )
    return tmp_path / "run"


def test_a_card_warns_and_shows_the_scores(run: Path) -> None:
    card = model_card(run / "lora" / "final", "mine", "run it")
    assert "Not medical advice" in card and "# mine" in card and "run it" in card
    assert "| acc | 0.6250 | 0.5760 to 0.6740 | 400 | test |" in card


def test_scores_of_earlier_weights_are_left_out(run: Path) -> None:
    file = run / "evaluate" / "lora" / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": {"lit_model.pth": "another"}}))
    assert "| acc |" not in model_card(run / "lora" / "final", "mine", "run it")
