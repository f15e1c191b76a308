"""Checkpoints that a stopped run goes on from.

A checkpoint holds trained weights, optimizer state and counters. Data order, dropout and learning rate are functions of
the seed and the step alone, so nothing else is needed for a resumed run to end bit-identical to one that never stopped.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from workflows.checkpoint import plain
from workflows.errors import UserError, first_line
from workflows.files import no_room_explained

Resume = bool | Literal["auto"]
"""True goes on from the newest checkpoint and needs one, "auto" does so if there is one, False starts anew."""
ResumeMode = Resume | Literal["matching"]
"""For a run that has a finished result of other settings: "matching" goes on from a checkpoint of its own settings and
deletes others."""


class Checkpoints:
    """Checkpoints to resume from: written whole or not at all, the newest two kept."""

    KEEP = 2

    def __init__(
        self, fabric: L.Fabric, directory: Path, model: Any, optimizer: Any, names: set[str], identity: dict[str, Any]
    ) -> None:
        """Say what a checkpoint holds.

        Args:
            fabric: A launched Fabric.
            directory: Where checkpoints are kept.
            model: The model as Fabric set it up.
            optimizer: Its optimizer.
            names: The trained parameters' names; only these are saved.
            identity: What the run's result depends on.
        """
        self.fabric, self.directory, self.identity = fabric, directory, identity
        self.state = {"model": model, "optimizer": optimizer}
        self.filter = {"model": lambda name, _: name in names}

    def found(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self.directory.glob("step-*.pth"))

    def restore(self, resume: ResumeMode) -> dict[str, Any]:
        """Load the newest checkpoint into the model and the optimizer, if `resume` says so.

        Returns:
            The run's counters: step, seconds, real_tokens, metrics.

        Raises:
            UserError: If the checkpoint belongs to a run with other settings, or there is none and `resume` is True, or
                none of them can be read.
        """
        fresh = {"step": 0, "seconds": 0.0, "real_tokens": 0, "metrics": {}}
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
                    old.unlink()
            return fresh
        try:
            rest = self.fabric.load(path, self.state, strict=False, weights_only=True)
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
        temporary = self.directory / f".{path.name}.part"  # one name for all processes: sharded saves write it together
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with no_room_explained(path):
                self.fabric.save(temporary, {**self.state, **counters, "identity": self.identity}, filter=self.filter)
                self.fabric.barrier()
                if self.fabric.global_rank == 0:
                    with open(temporary, "rb") as f:
                        os.fsync(f.fileno())
                    temporary.replace(path)
                    for old in self.found()[: -self.KEEP]:
                        old.unlink()
        finally:
            if self.fabric.global_rank == 0:
                temporary.unlink(missing_ok=True)
        self.fabric.barrier()


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


def _is_whole(checkpoint: Path) -> bool:
    """Whether torch can read all of a file."""
    try:
        torch.load(checkpoint, weights_only=True, map_location="cpu")
    except Exception:  # as in `_newest`
        return False
    return True


def _read_identity(checkpoint: Path) -> dict[str, Any]:
    identity = torch.load(checkpoint, mmap=True, weights_only=True, map_location="cpu")["identity"]
    if not isinstance(identity, dict) or plain(identity) != identity:
        raise TypeError("its identity is not made of settings")
    return identity
