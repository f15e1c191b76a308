"""Rows of the Hub's data sets in their own columns, small enough to read."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL, as a JSON list, or as Parquet, by the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def medqa_row(number: int, **changes: Any) -> dict[str, Any]:
    options = {letter: f"drug {letter}{number}" for letter in "ABCD"}
    letter = "ABCD"[number % 4]
    row = {
        "question": f"Patient {number} has a fever. What helps?",
        "answer": options[letter],
        "options": options,
        "meta_info": "step1",
        "answer_idx": letter,
        "metamap_phrases": ["fever"],
    }
    return {**row, **changes}


def medmcqa_row(number: int, first: int = 0, **changes: Any) -> dict[str, Any]:
    row = {
        "id": f"q{number}",
        "question": f"Which nerve is number {number}?",
        **{f"op{letter}": f"nerve {letter}{number}" for letter in "abcd"},
        "cop": first + number % 4,
        "choice_type": "single",
        "exp": None,
        "subject_name": "Anatomy",
        "topic_name": None,
    }
    return {**row, **changes}


def medquad_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "document_id": f"{number:07}",
        "document_source": "GARD",
        "document_url": f"https://example.org/{number}",
        "question_focus": f"Disease {number}",
        "question_type": "information",
        "question": f"What is disease {number} ?",
        "answer": f"Disease {number} is rare.",
    }
    return {**row, **changes}


def pubmedqa_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "pubid": 1000 + number,
        "question": f"Does drug {number} help?",
        "context": {"contexts": [f"Trial {number}.", "Half got it."], "labels": ["A", "B"], "meshes": ["M"]},
        "long_answer": f"Drug {number} helps.",
        "final_decision": ("yes", "no", "maybe")[number % 3],
    }
    return {**row, **changes}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the Hub: `ORG/NAME` is read from there by the real `datasets`, without a network."""
    import datasets
    import huggingface_hub

    folder = tmp_path / "hub"
    real = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, *, revision: str, data_dir: str | None = None) -> Any:
        branch = "parquet" if revision == "sha-of-parquet" else "main"
        assert revision.startswith("sha-of-")
        return real(str(folder / path / branch), name, data_dir=data_dir, cache_dir=str(tmp_path / "cache"))

    class Api:
        def dataset_info(self, repo_id: str, revision: str | None = None) -> Any:
            assert revision in (None, "refs/convert/parquet")
            return type("Info", (), {"sha": "sha-of-main" if revision is None else "sha-of-parquet"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return folder
