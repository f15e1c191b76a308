"""What the tests of the alignment steps share: made-up pairs, a reward that a random model can learn, settings."""

import csv
import json
from pathlib import Path
from typing import Any

from workflows.training.loop import TrainArgs
from workflows.training.rewards import Sample

WORDS = ["fever", "cough", "pain", "rash", "chill", "ache", "sweat", "spasm"]
TRAIN = TrainArgs(
    max_steps=6,
    global_batch_size=4,
    row_tokens=256,
    max_seq_length=256,
    lr_warmup_steps=0,
    lr_schedule="constant",
    learning_rate=1e-2,
    eval_interval=3,
    save_interval=2,
)


def pair(number: int) -> dict[str, Any]:
    word = WORDS[number % 8]
    return {
        "prompt": [{"role": "user", "content": f"What is {word} number {number}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {word}, a finding."}],
        "rejected": [{"role": "assistant", "content": f"It is {WORDS[(number + 3) % 8]} or so {number % 5}."}],
    }


def question(number: int) -> dict[str, Any]:
    return {"prompt": pair(number)["prompt"], "answers": [f"finding {number}"]}


def write(directory: Path, **splits: list[dict[str, Any]]) -> Path:
    """A data directory."""
    directory.mkdir(parents=True)
    for split, rows in splits.items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "manifest.json").write_text("{}")
    return directory


def log_of(out_dir: Path) -> list[dict[str, float]]:
    """The rows of a run's log."""
    rows = csv.DictReader((out_dir / "metrics.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def on_test_split(out_dir: Path) -> dict[str, dict[str, Any]]:
    """What a run measured on the test split, by name."""
    rows = json.loads((out_dir / "final" / "metrics.json").read_text())["metrics"]
    return {row["name"]: row for row in rows if row["split"] == "test"}


def early_letters(sample: Sample) -> float:
    """The share of letters of the alphabet's first half."""
    letters = [c for c in sample.text.lower() if c.isalpha() and c.isascii()]
    return sum(c <= "m" for c in letters) / max(1, len(letters))
