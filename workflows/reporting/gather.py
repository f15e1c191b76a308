"""What a run has left on the disk, read for its report. Nothing is computed anew, and what is not there is left out."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workflows.checkpoint import PROVENANCE
from workflows.errors import UserError
from workflows.evaluation.compare import ANSWERS
from workflows.files import read_json, read_text
from workflows.shapes import (
    Answer,
    Evaluated,
    PanelAnswer,
    Provenance,
    Sampled,
    Shape,
    Trained,
    TrainedFrom,
    Verification,
    shaped,
)
from workflows.status import StepStatus, no_run, status_of, step_folders
from workflows.training.logs import read_log
from workflows.untrusted import parse_json

ORDER = ("base", "shrink", "lora", "distill-lm", "reward", "dpo", "ppo", "grpo")
"""The stages of the road, in turn; others follow by name."""
_SAMPLED = 3
"""Sampled answers of the first logged step, and as many of the last one."""


@dataclass(frozen=True)
class Step:
    """A training step, finished or not.

    Attributes:
        name: lora, dpo, grpo, ...
        status: How far it is.
        log: The rows of metrics.csv.
        provenance: The result's provenance.json; empty while there is none.
        metrics: The result's metrics.json; empty while there is none.
        sampled: The first and the last answers that it sampled on the way.
    """

    name: str
    status: StepStatus
    log: list[dict[str, float]]
    provenance: dict[str, Any]
    metrics: dict[str, Any]
    sampled: list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """All that a run has left.

    Attributes:
        name: The name of its folder.
        steps: Its training steps in turn.
        scores: Each stage's evaluation: a metrics.json.
        answers: Each stage's answers to the first questions.
        export: The export's provenance.json; empty without one.
        verified: The export's verification.json; empty without one.
        panel: Each stage's answers to the demo's prompts, from Ollama.
        base: What is known of the checkpoint that the run began with: its path, and its provenance.json.
        data: The manifests of the data directories, by path.
    """

    name: str
    steps: list[Step]
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    verified: dict[str, Any] = field(default_factory=dict)
    panel: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Args:
        folder: out/RUN.

    Raises:
        UserError: If there is no such folder, no step has left anything in it, or a file is damaged.
    """
    if not folder.is_dir():
        raise no_run(folder)
    scored = {path.parent.name: path for path in folder.glob("evaluate/*/metrics.json")}
    stages = in_turn(scored)
    asked = {path.stem: path for path in folder.glob("panel/*.jsonl")}
    steps = [_read_step(path, folder) for path in step_folders(folder) if path.parent in (folder, folder.parent)]
    by_name = {step.name: step for step in steps if step.log or step.provenance}
    ollama = folder / "ollama"
    run = Run(
        name=folder.resolve().name,
        steps=[by_name[name] for name in in_turn(by_name)],
        scores={stage: _read(scored[stage], Evaluated) for stage in stages},
        answers={stage: _read_lines(scored[stage].with_name(ANSWERS), Answer) for stage in stages},
        export=_read(ollama / PROVENANCE, Provenance),
        verified=_read(ollama / "verification.json", Verification),
        panel={stage: _read_lines(asked[stage], PanelAnswer) for stage in in_turn(asked)},
    )
    if not run.steps and not run.scores and not run.export:
        raise UserError(f"{folder} holds no step of a run yet. `make lora RUN={folder.name}` makes one.")
    for step in run.steps:
        settings = step.provenance.get("settings", {})
        if (data := settings.get("data")) and data not in run.data:
            run.data[data] = _read(Path(data) / "manifest.json", Shape)
    start = next((step.provenance["settings"]["checkpoint_dir"] for step in run.steps if step.provenance), None)
    start = run.scores.get("base", {}).get("checkpoint_dir", start)
    if start is not None:
        run.base.update({"path": start, **_read(Path(start) / PROVENANCE, Provenance)})
    return run


def in_turn(names: Iterable[str]) -> list[str]:
    """Names of stages in the order of the road."""
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def _read_step(folder: Path, run: Path) -> Step:
    sampled = _read_lines(folder / "completions.jsonl", Sampled)
    steps = sorted({row["step"] for row in sampled})
    ends = [row for end in dict.fromkeys(steps[:1] + steps[-1:]) for row in _of_step(sampled, end)]
    final = folder / "final"
    made = (_read(final / PROVENANCE, TrainedFrom), _read(final / "metrics.json", Trained))
    return Step(folder.name, status_of(folder, run), read_log(folder / "metrics.csv"), *made, ends)


def _of_step(rows: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    return [row for row in rows if row["step"] == step][:_SAMPLED]


def _read(file: Path, shape: type[Shape]) -> dict[str, Any]:
    """A JSON file that has a shape; empty if it is not there.

    Raises:
        UserError: If it has not.
    """
    if not file.is_file():
        return {}
    shaped(value := read_json(file), shape, file)
    return value


def _read_lines(file: Path, shape: type[Shape]) -> list[dict[str, Any]]:
    """The lines of a JSONL file; none if it is not there. Half a line at its end, of a run that goes on, is left out.

    Raises:
        UserError: If another line is no JSON object, or not of the shape.
    """
    rows = []
    lines = read_text(file).split("\n")[:-1] if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        try:
            shaped(row := parse_json(line), shape, where)
        except ValueError:
            raise UserError(f"{where}: not valid JSON. Run the step that writes it again.") from None
        rows.append(row)
    return rows
