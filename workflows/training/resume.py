"""Checkpoints that a stopped run goes on from.

A checkpoint holds trained weights, optimizer state and counters. Data order, dropout and learning rate are functions of
the seed and the step alone, so nothing else is needed for a resumed run to end bit-identical to one that never stopped.
"""

from pathlib import Path
from typing import Any, Literal

import lightning as L

from workflows.errors import UserError
from workflows.files import no_room_explained

Resume = bool | Literal["auto"]
"""True goes on from the newest checkpoint and needs one, "auto" does so if there is one, False starts anew."""


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

    def restore(self, resume: Resume) -> dict[str, Any]:
        """Load the newest checkpoint into the model and the optimizer, if `resume` says so.

        Returns:
            The run's counters: step, seconds, real_tokens, metrics.

        Raises:
            UserError: If the checkpoint belongs to a run with other settings, or there is none and `resume` is True.
        """
        fresh = {"step": 0, "seconds": 0.0, "real_tokens": 0, "metrics": {}}
        found = self.found()
        if resume is False:
            self.fabric.barrier()
            if self.fabric.global_rank == 0:
                for path in found:
                    path.unlink()
            return fresh
        if not found:
            if resume is True:
                raise UserError(f"--resume true, but there is no checkpoint in {self.directory}.")
            return fresh
        rest = self.fabric.load(found[-1], self.state, strict=False, weights_only=True)
        if rest["identity"] != self.identity:
            changed = [
                k for k in {**rest["identity"], **self.identity} if rest["identity"].get(k) != self.identity.get(k)
            ]
            raise UserError(
                f"{found[-1]} belongs to a run with other settings ({', '.join(sorted(changed))}). "
                "Give another --out_dir, or --resume false to start this one anew."
            )
        self.fabric.print(f"resuming from {found[-1]}")
        return {name: rest[name] for name in fresh}

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
                    temporary.replace(path)
                    for old in self.found()[: -self.KEEP]:
                        old.unlink()
        finally:
            if self.fabric.global_rank == 0:
                temporary.unlink(missing_ok=True)
        self.fabric.barrier()
