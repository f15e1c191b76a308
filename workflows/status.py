"""`make status`: what is under out/, how far it is, and how a step that was stopped goes on."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from workflows.errors import UserError, did_you_mean, report_all
from workflows.measure import duration
from workflows.progress import HOST, PROGRESS
from workflows.shapes import Metrics, Progress, read_shape
from workflows.training.logs import read_log

State = Literal["running", "stopped", "finished"]
_RESULTS = ("final/provenance.json", "metrics.json", "manifest.json")
"""What a finished step leaves in its folder: a checkpoint, scores or an export, data."""
_LOG = "metrics.csv"
_CHECKPOINTS = f"step-{'[0-9]' * 8}.pth"
"""What training calls them; others' files may lie beside them."""
_INSIDE = ("final", "checkpoints", "hf", "adapter", "logs", "tensorboard", "wandb")
"""Folders of a step that hold no further steps."""
_SILENT = 600.0
"""Seconds after which a step on another machine, which cannot be asked, is taken for stopped."""
_RECENT = 5
"""Rows of the log that the speed is the mean of."""


@dataclass(frozen=True)
class StepStatus:
    """What is known of one step.

    Attributes:
        name: Its folder, relative to the folder of all runs: RUN/STEP.
        state: Whether its process runs, has ended before its time, or has done all.
        done: Units that are done; None where none was counted.
        total: Units in all.
        unit: What is counted: steps, questions, answers.
        what: What it is doing just now, if that is not its main work.
        loss: The last training loss; a finished step's last validation loss, if it has one.
        tokens_per_second: The speed, in the samples' tokens.
        left: Seconds that are left, if it goes on at this session's speed.
        checkpoint: The step of the newest checkpoint.
        age: Seconds since it last said something; below 0 where the clock that wrote this is ahead.
        command: How it was started, and goes on.
        keeps: What a stopped step goes on from, in words.
    """

    name: str
    state: State
    done: int | None = None
    total: int | None = None
    unit: str = "step"
    what: str = ""
    loss: float | None = None
    tokens_per_second: float | None = None
    left: float | None = None
    checkpoint: int | None = None
    age: float = 0.0
    command: str | None = None
    keeps: str = ""


def setup(out_dir: Path = Path("out"), run: str | None = None) -> None:
    """Print the steps under out/, running, stopped and finished.

    Args:
        out_dir: The folder of all runs.
        run: Only this run's steps; all runs' if null.

    Raises:
        UserError: If there is no such folder or, once the others are shown, for each step that has a damaged file.
    """
    folder = out_dir / run if run else out_dir
    if run and out_dir.is_dir() and not folder.is_dir():
        raise no_run(folder)
    if not folder.is_dir():
        raise UserError(f"There is no {folder}: nothing has run yet. Begin with `make demo` or `make lora`.")
    found, problems = [], []
    for step in step_folders(folder):
        try:
            found.append(status_of(step, out_dir))
        except (UserError, OSError) as e:
            problems.append(str(e))
    if found:
        print(as_text(found))
    elif not problems:
        print(f"No step has left anything in {folder} yet.")
    report_all(problems)


def no_run(folder: Path) -> UserError:
    """What to say where a run is not there: which runs are, the nearest by name first."""
    others = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
    there = f" In {folder.parent} there are: {', '.join(others)}." if others else ""
    meant = did_you_mean(folder.name, others)
    return UserError(f"There is no run in {folder}.{meant}{there} `make demo RUN={folder.name}` makes it.")


def step_folders(folder: Path) -> Iterator[Path]:
    """The folders of steps in a folder or below it, in order."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _INSIDE and not name.startswith("."))
        here = Path(parent)
        results = (here / name for name in _RESULTS)  # a link shows the figures of a step that has its own folder
        if {PROGRESS, _LOG} & set(files) or any(result.is_file() and not result.is_symlink() for result in results):
            yield here


def status_of(folder: Path, out_dir: Path) -> StepStatus:
    """What a step's folder says of it.

    Args:
        folder: The step's.
        out_dir: The folder of all runs, for the name.

    Raises:
        UserError: If a file is damaged.
    """
    name = str(folder.relative_to(out_dir)) if folder != out_dir else folder.name
    log = read_log(folder / _LOG)
    checkpoints = sorted(int(path.stem.removeprefix("step-")) for path in (folder / "checkpoints").glob(_CHECKPOINTS))
    rates = [row["tokens_per_second"] for row in log[-_RECENT:] if "tokens_per_second" in row]
    facts: dict[str, Any] = {
        "loss": log[-1].get("loss") if log else None,
        "tokens_per_second": sum(rates) / len(rates) if rates else None,
        "checkpoint": checkpoints[-1] if checkpoints else None,
        "done": int(log[-1]["step"]) if log else None,
    }
    if (folder / PROGRESS).is_file():
        return _unfinished(name, folder, read_shape(folder / PROGRESS, Progress), facts)
    if any((folder / result).is_file() for result in _RESULTS):
        return _finished(name, folder, facts)
    return StepStatus(name, "stopped", **facts, age=_age(folder / _LOG), keeps=_keeps(folder, facts["checkpoint"]))


def _unfinished(name: str, folder: Path, told: Progress, facts: dict[str, Any]) -> StepStatus:
    age = time.time() - told.updated
    state: State = "running" if lives(told, age) else "stopped"
    facts["loss"] = facts["loss"] if told.loss is None else told.loss
    if told.total is not None:
        facts |= {"done": told.done, "total": told.total, "unit": told.unit, "what": told.what}
        seconds, done = told.updated - told.began, told.done - told.first
        if state == "running" and done > 0:
            facts["left"] = max(0.0, seconds / done * (told.total - told.done) - age)
    if state == "stopped" and facts["checkpoint"] is not None:
        facts["done"] = facts["checkpoint"]
    keeps = (told.keeps or _keeps(folder, facts["checkpoint"])) if state == "stopped" else ""
    return StepStatus(name, state, **facts, age=age, command=told.command, keeps=keeps)


def lives(told: Progress, age: float) -> bool:
    """Whether the process that wrote this, so many seconds ago, lives; numbers of processes are given out anew."""
    if told.host != HOST:
        return abs(age) < _SILENT  # clocks may differ
    try:
        return abs(psutil.Process(told.pid).create_time() - told.born) < 1
    except psutil.NoSuchProcess:
        return False


def _keeps(folder: Path, checkpoint: int | None) -> str:
    if checkpoint is not None:
        return f"goes on from step {checkpoint}"
    if list(folder.glob("unfinished*.jsonl")) + list(folder.glob("answers.jsonl")):
        return "keeps what is answered"
    if any((folder / ".update.part").glob("*.gguf")):
        return "keeps finished GGUF files"
    return "begins anew"


def _finished(name: str, folder: Path, facts: dict[str, Any]) -> StepStatus:
    file = folder / "final" / "metrics.json"
    file = file if file.is_file() else folder / "metrics.json"
    if file.is_file():
        made = read_shape(file, Metrics)
        losses = [row.value for row in made.metrics if row.name == "val_loss"]
        facts["loss"] = losses[0] if losses else facts["loss"]
        facts["tokens_per_second"] = made.tokens_per_second or facts["tokens_per_second"]
    facts["total"] = facts["done"]
    result = next(folder / result for result in _RESULTS if (folder / result).is_file())
    return StepStatus(name, "finished", **facts, age=_age(result))


def _age(file: Path) -> float:
    return time.time() - file.stat().st_mtime


def as_text(steps: list[StepStatus]) -> str:
    """The steps as a table, then how the stopped ones go on."""
    head = ["step", "state", "done", "loss", "tokens/s", "left", "checkpoint", "last sign"]
    table = [head, *map(_cells, steps)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    for step in steps:
        if step.state == "stopped":
            lines += ["", f"{step.name} {step.keeps}:", f"  {step.command or 'run the command that started it again'}"]
    return "\n".join(lines)


def _cells(step: StepStatus) -> list[str]:
    done = "" if step.done is None else f"{step.done:,}"
    if step.total is not None:
        done += f" of {step.total:,}"
    return [
        step.name,
        step.state + (f" ({step.what})" if step.what else ""),
        f"{done} {step.unit}s" if done else "",
        "" if step.loss is None else f"{step.loss:.3f}",
        "" if step.tokens_per_second is None else f"{step.tokens_per_second:,.0f}",
        "" if step.left is None else duration(step.left),
        "" if step.checkpoint is None else f"step {step.checkpoint}",
        f"{duration(abs(step.age))} {'ago' if step.age > -1 else 'ahead'}",
    ]
