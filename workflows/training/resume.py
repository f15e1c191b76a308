"""Checkpoints that a stopped run resumes from, and the one of its best step.

A checkpoint holds trained weights, optimizer state and counters: one file, or a folder of shards (`shards.py`) where
the model is sharded. Any number of processes resumes from either, sharded or not. Data order, dropout and
learning rate are functions of the seed and the step alone, so nothing else is needed for a resumed run to end
bit-identical to one that never stopped.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from workflows.checkpoint import load_weights, plain
from workflows.errors import UserError, first_line
from workflows.files import no_room_explained
from workflows.training.identity import STEPS, result_changes, resume_changes
from workflows.training.mixed_precision import LOSS_SCALE
from workflows.training.shards import (
    copy_weights,
    read_file,
    read_run,
    read_shards,
    read_whole,
    tensors_of,
    write_shards,
)
from workflows.training.whole import is_sharded

Resume = bool | Literal["auto"]
"""True resumes from the newest checkpoint and needs one, "auto" does so if there is one, False trains from step 0."""
ResumeMode = Resume | Literal["matching"]
"""For a run that has a finished result of other settings: "matching" goes on from a checkpoint of its own settings, and
deletes others and says so."""


_LONGER = (
    " To train on from where this run ends, let it finish and give its `final` folder as the --checkpoint_dir of a run "
    "with another --out_dir. A run with --train.lr_schedule constant can be made longer at any time."
)

_FRESH: dict[str, Any] = {
    "step": 0,
    "seconds": 0.0,
    "real_tokens": 0,
    "metrics": {},
    "best": {},
    "stale": 0,
    "plateau": 0,
    "loss_scale": LOSS_SCALE,
    "steps_without_signal": 0,
}
"""The counters of a run that begins."""


class Checkpoints:
    """Checkpoints to resume from, whole or not there at all: the newest two, and those of the best step they name."""

    KEEP = 2

    def __init__(
        self,
        fabric: L.Fabric,
        directory: Path,
        model: Any,
        optimizer: Any,
        weights: Mapping[str, torch.Tensor],
        identity: dict[str, Any],
    ) -> None:
        """Say what a checkpoint holds.

        Args:
            fabric: A launched Fabric.
            directory: Where checkpoints are kept.
            model: The model as Fabric set it up.
            optimizer: Its optimizer.
            weights: The tensors that the optimizer steps, by name (`MasterWeights`); only these are saved.
            identity: What the run's result depends on.
        """
        self.fabric, self.directory, self.identity, self.weights = fabric, directory, identity, weights
        self.is_sharded = is_sharded(model)
        self.optimizer = optimizer

    def found(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self.directory.glob("step-*.pth"))

    def restore(self, resume: ResumeMode) -> dict[str, Any]:
        """Load the newest checkpoint into the model and the optimizer, if `resume` says so.

        Returns:
            The run's counters, as `FitResult.counters` gives them.

        Raises:
            UserError: If the checkpoint belongs to a run with other settings, or there is none and `resume` is True, or
                none of them can be read.
        """
        path, written = (None, {}) if resume is False else self._newest()
        if path is None and resume is True:
            raise UserError(f"--resume true, but there is no checkpoint in {self.directory}.")
        forbidding: list[str] = []
        harmless: list[str] = []
        if path is not None:
            forbidding, harmless = resume_changes(written["identity"], self.identity, written["plateau"])
            if written["step"] > self.identity.get(STEPS, written["step"]):
                forbidding.append(f"it is of step {written['step']}, and the run is to end at {self.identity[STEPS]}")
        if forbidding and resume != "matching":
            raise UserError(
                f"{path} belongs to a run with other settings:\n"
                + "".join(f"  - {line}\n" for line in forbidding)
                + "Give another --out_dir, or --resume false to train from step 0."
                + (_LONGER if any("schedule depends on it" in line for line in forbidding) else "")
            )
        if path is None or forbidding:
            if forbidding:
                lines = "".join(f"\n  - {line}" for line in forbidding)
                self.fabric.print(
                    f"{path} was written with other settings and is deleted; training begins at step 0:{lines}"
                )
            self.fabric.barrier()
            if self.fabric.global_rank == 0:
                for old in self.found():
                    _delete(old)
            return dict(_FRESH)
        self._load(path)
        self.fabric.print(f"resuming from {path}" + "".join(f"\n  {line}" for line in harmless))
        return {name: written[name] for name in _FRESH}

    def load(self, step: int) -> None:
        """Load the weights of a step whose checkpoint was kept.

        Raises:
            UserError: If it is damaged or gone.
        """
        path = self._path(step)
        if not path.exists():
            raise UserError(
                f"{path}, the checkpoint of the best step, does not exist any more. Take the last step instead: "
                "--train.keep last."
            )
        self._load(path)
        self.fabric.barrier()  # the first process deletes it when it has written the result

    def _load(self, path: Path) -> None:
        """Fill the model and the optimizer from a checkpoint."""
        try:
            if path.is_dir():
                read_shards(path, self._tensors())
            elif self.is_sharded:
                read_file(path, self._tensors())
            else:
                rest = self.fabric.load(path, {"optimizer": self.optimizer}, strict=False, weights_only=True)
                copy_weights(rest["model"], self.weights)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as e:
            if isinstance(e, RuntimeError) and "loading state_dict" not in str(e) and _is_whole(path):
                raise  # the device's or the connection's
            raise _damaged(path, first_line(e)) from None

    def last_good(self) -> str:
        """Return a sentence that names the newest checkpoint, for a run that must stop."""
        found = self.found()
        return f"The last good checkpoint is {found[-1]}." if found else "No checkpoint was written yet."

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.pth"

    def _newest(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest checkpoint that can be read, with its counters and identity; others are skipped, which is printed.

        Raises:
            UserError: If there are checkpoints, and none can be read.
        """
        found = self.found()
        for path in reversed(found):
            try:
                return path, _read_rest(path)
            except Exception as e:  # RuntimeError, UnpicklingError, EOFError, KeyError, ...: torch has no class for it
                self.fabric.print(f"{path} is damaged and skipped ({first_line(e)})")
        if found:
            raise UserError(f"No checkpoint in {self.directory} can be read; train from step 0 with --resume false.")
        return None, {}

    def save(self, counters: dict[str, Any], keep_best: bool = False) -> None:
        """Write one checkpoint: trained weights, optimizer state and the run's counters.

        Args:
            counters: The run's.
            keep_best: Keep the checkpoints of the best steps that the newest ones name, too.

        Raises:
            UserError: If there is no room for it; the older ones stay.
        """
        path = self._path(counters["step"])
        temporary = self.directory / f".{path.name}.part"  # one name for all processes: they write shards together
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with no_room_explained(path):
                rest = {**counters, "identity": self.identity}
                if self.is_sharded:
                    if self.fabric.global_rank == 0:
                        _delete(temporary)  # a killed run's, which may have had more processes
                    self.fabric.barrier()
                    write_shards(temporary, self._tensors(), rest, is_first=self.fabric.global_rank == 0)
                else:
                    weights = {name: weight.detach() for name, weight in self.weights.items()}
                    self.fabric.save(temporary, {"model": weights, "optimizer": self.optimizer, **rest})
                self.fabric.barrier()
                if self.fabric.global_rank == 0:
                    if not self.is_sharded:  # shards are flushed by those who write them
                        with open(temporary, "rb") as f:
                            os.fsync(f.fileno())
                    _delete(path)  # one that was passed over
                    temporary.replace(path)
                    keep_newest(self.directory, self.KEEP, keep_best)
        finally:
            if self.fabric.global_rank == 0:
                _delete(temporary)
        self.fabric.barrier()

    def _tensors(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.weights, self.optimizer.optimizer)


def trained_weights(directory: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """The trained parameters of a run's checkpoint by name, whole ones, whether it is one file or shards.

    They are float32; where the model has fewer bits, its parameters are these, rounded.

    Args:
        directory: Where checkpoints are kept.
        step: The checkpoint's step; None for the newest.
    """
    path = max(directory.glob("step-*.pth")) if step is None else directory / f"step-{step:08d}.pth"
    return read_whole(path) if path.is_dir() else load_weights(directory, path.name)


def keep_newest(directory: Path, number: int, keep_best: bool = False) -> None:
    """Delete all checkpoints but the newest, and the best steps that these name.

    Args:
        directory: Where checkpoints are kept.
        number: How many of the newest stay.
        keep_best: Keep the best steps' checkpoints.
    """
    found = sorted(directory.glob("step-*.pth"))
    kept = {path.name for path in found[-number:]}
    if keep_best:
        kept |= {f"step-{step:08d}.pth" for path in found[-number:] if (step := _best_step(path)) is not None}
    for path in found:
        if path.name not in kept:
            _delete(path)


def _best_step(checkpoint: Path) -> int | None:
    try:
        step = _read_rest(checkpoint)["best"].get("step")
    except Exception:  # as in `_newest`: a damaged one names none
        return None
    return step if isinstance(step, int) else None


def clear(directory: Path, may_grow: bool, keep_best: bool) -> None:
    """Delete a finished run's checkpoints; where the run may be made longer, all but those that this takes.

    Args:
        directory: Where checkpoints are kept.
        may_grow: Whether the run can go on from its last step.
        keep_best: Whether it keeps its best step.
    """
    if not may_grow:
        shutil.rmtree(directory, ignore_errors=True)
        return
    keep_newest(directory, 1, keep_best)


def clear_finished(directory: Path, identity: dict[str, Any]) -> None:
    """`clear` for a run that is finished but was killed before it had done that itself.

    Args:
        directory: Where checkpoints are kept. Those of another run, which may still be gone on with, stay.
        identity: What the finished run's result depends on.
    """
    newest: dict[str, Any] | None = None
    for path in sorted(directory.glob("step-*.pth")):
        try:
            newest = _read_rest(path)
        except Exception:  # as in `_newest`: damaged, and of no use to any run
            continue
        if result_changes({name: value for name, value in newest["identity"].items() if name != STEPS}, identity):
            return
    train = identity["train"]
    may_grow = newest is not None and may_be_longer(train["lr_schedule"], newest["step"], newest["identity"][STEPS])
    clear(directory, may_grow, train["keep"] == "best")


def may_be_longer(lr_schedule: str, done: int, steps: int) -> bool:
    """Return whether a finished run resumes with a larger max_steps or patience: no step of it depends on the end.

    Args:
        lr_schedule: Its learning rate's schedule.
        done: Its steps.
        steps: The steps that it would have made without early stopping.
    """
    return lr_schedule == "constant" or done < steps


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is damaged ({why}). Delete it to resume from the one before it, or train from step 0: --resume false."
    )


def _delete(checkpoint: Path) -> None:
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def _is_whole(checkpoint: Path) -> bool:
    """Whether all of a checkpoint can be read."""
    try:
        if checkpoint.is_dir():
            read_run(checkpoint)
            return True
        torch.load(checkpoint, weights_only=True, map_location="cpu")
    except Exception:  # as in `_newest`
        return False
    return True


def _read_rest(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint holds besides its tensors, which stay on the disk: counters and identity."""
    rest: dict[str, Any]
    if checkpoint.is_dir():
        rest = read_run(checkpoint)
    else:
        rest = torch.load(checkpoint, mmap=True, weights_only=True, map_location="cpu")
    identity = rest["identity"]
    if not isinstance(identity, dict) or plain(identity) != identity:
        raise TypeError("its identity is not made of settings")
    if missing := [name for name in _FRESH if name not in rest]:
        raise TypeError(f"it was written by an earlier version, without {', '.join(missing)}")
    if odd := [name for name in _FRESH if type(rest[name]) is not type(_FRESH[name])]:
        raise TypeError(f"{odd[0]} is {rest[odd[0]]!r:.40}")
    return rest
