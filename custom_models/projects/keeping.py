"""Trainings of a project that Ctrl-C, a crash or a power cut only interrupts: run again, they go on where they were.

A checkpoint is written when Ctrl-C is pressed, and every minute: Lightning's, with the state of random numbers in it.
What it does not hold is how far the data is; the batches that were learned from are drawn again, and thrown away, so
that whatever a loader draws from (an order, words in ever other pieces) is where it was. So weights and validation end
bit-identical to those of a training that was never interrupted; only the mean training loss of the epoch it happened in
is that of its second part.

A project may train several times (for each seed; first this, then that): each training has a folder of its own, named
by what decides it, and keeps its result there until the whole project is done.
"""

import hashlib
import math
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from workflows.errors import first_line
from workflows.files import atomic_file
from workflows.progress import note, watched
from workflows.training.stopping import Stopping

KEPT = ".fitting"
"""The folder of all trainings in a project's own; a name that nothing of a user has."""
LAST, DONE = "last.ckpt", "done.pt"
INTERVAL = 60.0
"""Seconds between checkpoints: what a crash may cost."""


@contextmanager
def kept_until_done(out_dir: Path) -> Iterator[None]:
    """A project's trainings, and what it does with them: kept when it is stopped, deleted when it ends well.

    Args:
        out_dir: The project's folder, in which `status` sees how far it is.
    """
    with watched(out_dir, keeps="goes on from its last checkpoint"):
        yield
    shutil.rmtree(out_dir / KEPT, ignore_errors=True)


def folder_of(task: L.LightningModule, loaders: list[DataLoader[Any]], settings: Any, out_dir: Path) -> Path:
    """Where a training is kept: in a folder named by its weights before it, its data and its settings."""

    def deciding() -> Iterator[bytes]:
        yield repr(settings).encode()
        for name, tensor in task.state_dict().items():
            yield name.encode()
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for loader in loaders:
            data: Any = loader.dataset
            for row in data.documents if hasattr(data, "documents") else (data[i] for i in range(len(data))):
                yield repr(row).encode()

    return folder_named(deciding(), out_dir)


def folder_named(deciding: Iterable[bytes], out_dir: Path) -> Path:
    """The folder, in a project's own, of a training that all this decides."""
    digest = hashlib.sha256()
    for part in deciding:
        digest.update(part)
    return out_dir / KEPT / digest.hexdigest()[:16]


def keep_done(folder: Path, weights: dict[str, torch.Tensor], epochs: list[dict[str, float]]) -> None:
    """Keep a training's result: the weights of its best epoch, and the numbers of each."""
    with atomic_file(folder / DONE) as file:
        torch.save({"weights": weights, "epochs": epochs, "chances": chances()}, file)
    for other in folder.iterdir():
        if other.name != DONE:
            other.unlink()


def read_done(folder: Path) -> dict[str, Any] | None:
    """What `keep_done` kept of a training, or None if it was never done."""
    file = folder / DONE
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        found["weights"], found["epochs"], found["chances"]
    except Exception as e:  # as in `Keeper.checkpoint`
        print(f"{file} is damaged ({first_line(e)}); the training begins anew")
        file.unlink()
        return None
    print(f"trained before: {len(found['epochs'])} epochs")
    return found


class Resumable:
    """A loader that can begin at any batch of any epoch."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.epochs, self.batches = loader, 0, 0

    def begin_at(self, epoch: int, batch: int) -> None:
        """Let the next epoch that is drawn be this one, from this batch on."""
        self.epochs, self.batches = epoch, batch

    def __len__(self) -> int:
        return len(self.loader)  # which may not know it, and says so

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.epochs):
            for _ in self.loader:
                pass
        batches = iter(self.loader)
        for _ in range(self.batches):
            next(batches)
        self.epochs = self.batches = 0
        yield from batches


class Keeper(Callback):
    """Writes the checkpoints; to be given after all callbacks that act at a batch's end.

    Args:
        folder: The training's.
        loader: What it draws batches from.
    """

    def __init__(self, folder: Path, loader: Resumable) -> None:
        self.folder, self.loader = folder, loader
        self._chances: dict[str, Any] | None = None

    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from, if there is one that is whole; the loader is told where that is."""
        file = self.folder / LAST
        if not file.is_file():
            return None
        try:
            kept = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["kept"]
            epoch, batch = int(kept["epoch"]), int(kept["batch"])
        except Exception as e:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ... for what is none
            print(f"{file} is damaged ({first_line(e)}); the training begins anew")
            file.unlink()
            return None
        self.loader.begin_at(epoch, batch)
        print(f"going on from epoch {epoch}, batch {batch}, of a training that was stopped")
        return file

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop = Stopping().__enter__()
        self._saved = self._began = time.time()
        self._first = trainer.global_step
        steps = trainer.estimated_stepping_batches  # infinite, where a loader does not know its length
        self._total = int(steps) if math.isfinite(steps) else None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop.__exit__(None, None, None)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_stop"):
            self._stop.__exit__(None, None, None)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._chances is not None:
            restore_chances(self._chances)
            self._chances = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        told = ", ".join(f"{name} {value:.3f}" for name, value in trainer.progress_bar_metrics.items()
                         if isinstance(value, float))  # fmt: skip
        note(trainer.global_step, self._total, unit="step", first=self._first, began=self._began, told=told)
        if trainer.is_last_batch:
            return  # the epoch's validation comes first
        if self._stop.asked() or time.time() - self._saved >= INTERVAL:
            self._saved = time.time()
            self._place = {"epoch": trainer.current_epoch, "batch": batch_idx + 1}
            with atomic_file(self.folder / LAST) as file:
                trainer.save_checkpoint(file)
            if self._stop.asked():
                raise KeyboardInterrupt

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if hasattr(self, "_place"):
            checkpoint["kept"] = {**self._place, "chances": chances()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._chances = checkpoint["kept"]["chances"]


def chances() -> dict[str, Any]:
    """The state of all that is drawn from: torch's, Python's and NumPy's random numbers."""
    version, words, gauss = random.getstate()
    drawn: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = drawn
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def restore_chances(state: dict[str, Any]) -> None:
    """Set what `chances` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
