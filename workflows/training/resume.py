"""Checkpoints that a stopped run goes on from.

A checkpoint holds trained weights, optimizer state and counters: one file, or a folder of shards (`shards.py`) where
the model is sharded. Either is gone on with by any number of processes, sharded or not. Data order, dropout and
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
"""True goes on from the newest checkpoint and needs one, "auto" does so if there is one, False starts anew."""
ResumeMode = Resume | Literal["matching"]
"""For a run that has a finished result of other settings: "matching" goes on from a checkpoint of its own settings and
deletes others."""


class Checkpoints:
    """Checkpoints to resume from: written whole or not at all, the newest two kept."""

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
            The run's counters: step, seconds, real_tokens, metrics, loss_scale.

        Raises:
            UserError: If the checkpoint belongs to a run with other settings, or there is none and `resume` is True, or
                none of them can be read.
        """
        optional = {"loss_scale": LOSS_SCALE, "steps_without_signal": 0}  # earlier checkpoints lack them
        fresh = {"step": 0, "seconds": 0.0, "real_tokens": 0, "metrics": {}, **optional}
        path, identity = (None, {}) if resume is False else self._newest()
        if path is None and resume is True:
            raise UserError(f"--resume true, but there is no checkpoint in {self.directory}.")
        if path is not None and identity != self.identity and resume not in (False, "matching"):
            changed = [k for k in {**identity, **self.identity} if identity.get(k) != self.identity.get(k)]
            raise UserError(
                f"{path} belongs to a run with other settings ({', '.join(sorted(changed))}). "
                "Give another --out_dir, or --resume false to start this one anew."
            )
        if path is None or identity != self.identity:
            self.fabric.barrier()
            if self.fabric.global_rank == 0:
                for old in self.found():
                    _delete(old)
            return fresh
        try:
            if path.is_dir():
                read_shards(path, self._tensors())
                rest = read_run(path)
            elif self.is_sharded:
                rest = read_file(path, self._tensors())
            else:
                rest = self.fabric.load(path, {"optimizer": self.optimizer}, strict=False, weights_only=True)
                copy_weights(rest["model"], self.weights)
            rest = {**optional, **rest}
            counters = {name: rest[name] for name in fresh}
            if odd := [name for name, value in counters.items() if type(value) is not type(fresh[name])]:
                raise TypeError(f"{odd[0]} is {counters[odd[0]]!r:.40}")
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as e:
            if isinstance(e, RuntimeError) and "loading state_dict" not in str(e) and _is_whole(path):
                raise  # the device's or the connection's
            raise UserError(
                f"{path} is damaged ({first_line(e)}). Delete it to go on from the one before it, or start anew with "
                "--resume false."
            ) from None
        self.fabric.print(f"resuming from {path}")
        return counters

    def _newest(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest checkpoint that can be read, with its identity; one that cannot is passed over, and said.

        Raises:
            UserError: If there are checkpoints, and none can be read.
        """
        found = self.found()
        for path in reversed(found):
            try:
                return path, _read_identity(path)
            except Exception as e:  # RuntimeError, UnpicklingError, EOFError, KeyError, ...: torch has no class for it
                self.fabric.print(f"{path} is damaged and passed over ({first_line(e)})")
        if found:
            raise UserError(f"No checkpoint in {self.directory} can be read; start anew with --resume false.")
        return None, {}

    def save(self, counters: dict[str, Any]) -> None:
        """Write one checkpoint: trained weights, optimizer state and the run's counters.

        Raises:
            UserError: If there is no room for it; the older ones stay.
        """
        path = self.directory / f"step-{counters['step']:08d}.pth"
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
                    for old in self.found()[: -self.KEEP]:
                        _delete(old)
        finally:
            if self.fabric.global_rank == 0:
                _delete(temporary)
        self.fabric.barrier()

    def _tensors(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.weights, self.optimizer.optimizer)


def trained_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The trained parameters of a run's newest checkpoint by name, whole ones, whether it is one file or shards.

    They are float32; where the model has fewer bits, its parameters are these, rounded.

    Args:
        directory: Where checkpoints are kept.
    """
    newest = max(directory.glob("step-*.pth"))
    return read_whole(newest) if newest.is_dir() else load_weights(directory, newest.name)


def discard(directory: Path, identity: dict[str, Any]) -> None:
    """Delete the checkpoints of a run that is finished but was killed before it had deleted them itself.

    Args:
        directory: Where checkpoints are kept. Those of another run, which may still be gone on with, stay.
        identity: What the finished run's result depends on.
    """
    for path in directory.glob("step-*.pth"):
        try:
            other = _read_identity(path) != identity
        except Exception:  # as in `_newest`: damaged, and of no use to any run
            continue
        if other:
            return
    shutil.rmtree(directory, ignore_errors=True)


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


def _read_identity(checkpoint: Path) -> dict[str, Any]:
    if checkpoint.is_dir():
        identity = read_run(checkpoint)["identity"]
    else:
        identity = torch.load(checkpoint, mmap=True, weights_only=True, map_location="cpu")["identity"]
    if not isinstance(identity, dict) or plain(identity) != identity:
        raise TypeError("its identity is not made of settings")
    return identity
