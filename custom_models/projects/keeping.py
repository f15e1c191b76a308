"""Trainings of a project that Ctrl-C, a crash or a power cut only interrupts: run again, they go on where they were.

A checkpoint is written when Ctrl-C is pressed, and every minute: Lightning's, with the state of random numbers in it.
What it does not hold is how far the data is; the batches that were learned from are drawn again, and thrown away, so
that whatever a loader draws from (an order, words in ever other pieces) is where it was. So weights and validation end
bit-identical to those of a training that was never interrupted. What `metrics.json` says of time and memory is the last
session's, and the mean training loss of the epoch that was interrupted that of its second part.

A project may train several times (for each seed; first this, then that): each training has a folder of its own, named
by what decides it, and keeps its result there until the whole project is done.
"""

import hashlib
import inspect
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from workflows.errors import UserError, first_line
from workflows.files import atomic_file
from workflows.measure import gigabytes
from workflows.progress import PROGRESS, note, watched
from workflows.shapes import Progress, read_shape
from workflows.status import lives
from workflows.training.stopping import Stopping

KEPT = ".fitting"
"""The folder of all trainings in a project's own; a name that nothing of a user has."""
LAST, DONE = "last.ckpt", "done.pt"
INTERVAL = 60.0
"""Seconds between checkpoints: what a crash may cost."""

F = TypeVar("F", bound=Callable[..., None])


@dataclass
class _Project:
    """The project that runs.

    Attributes:
        settings: All that it was asked for, in words.
        watching: Lets `status` see it, from its first training on.
        trainings: How many have begun; they come in the same order each time.
    """

    settings: str
    watching: Callable[[], None]
    trainings: int = 0


_current: _Project | None = None


def kept_until_done(setup: F) -> F:
    """Let a project's trainings be kept when it is stopped, and deleted when it has ended well.

    Args:
        setup: The project, with an argument `out_dir`: its folder, in which `status` sees how far it is.
    """
    signature = inspect.signature(setup)

    @wraps(setup)
    def keeping(*args: Any, **options: Any) -> None:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        with project(Path(bound.arguments["out_dir"]), repr(bound.arguments)):
            setup(*args, **options)

    return keeping  # type: ignore[return-value]


@contextmanager
def project(out_dir: Path, settings: str) -> Iterator[None]:
    """What `kept_until_done` puts around a project.

    Args:
        out_dir: Its folder.
        settings: All that it was asked for, in words.

    Raises:
        UserError: If another process is at work in that folder.
    """
    global _current
    _require_alone(out_dir)
    kept = [path for path in (out_dir / KEPT).glob("**/*") if path.is_file()]
    if kept:
        size = gigabytes(sum(path.stat().st_size for path in kept))
        print(f"{out_dir / KEPT} keeps what was trained before ({size}); delete it to begin anew")
    with ExitStack() as stack:
        watch = watched(out_dir, keeps="goes on from its last checkpoint")
        before, _current = _current, _Project(settings, lambda: stack.enter_context(watch))
        try:
            yield
        finally:
            _current = before
    shutil.rmtree(out_dir / KEPT, ignore_errors=True)


def _require_alone(out_dir: Path) -> None:
    file = out_dir / PROGRESS
    if not file.is_file():
        return
    try:
        told = read_shape(file, Progress)
    except UserError:  # it is damaged, so its process does not write it any more
        return
    if told.pid != os.getpid() and lives(told, time.time() - told.updated):
        raise UserError(f"Process {told.pid} is at work in {out_dir}. Wait for it, or give another --out_dir.")


def folder_of(task: L.LightningModule, loaders: list[DataLoader[Any]], out_dir: Path) -> Path:
    """Where a training is kept: in a folder named by all that the project was asked for, which of its trainings this
    is, its weights before it, and its data."""

    def deciding() -> Iterator[bytes]:
        for name, tensor in task.state_dict().items():
            yield name.encode()
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for loader in loaders:
            data: Any = loader.dataset
            for row in data.documents if hasattr(data, "documents") else (data[i] for i in range(len(data))):
                yield repr(_given(row)).encode()

    return folder_named(deciding(), out_dir)


def folder_named(deciding: Iterable[bytes], out_dir: Path) -> Path:
    """The folder of the project's next training, which all this decides beside the project's settings."""
    digest = hashlib.sha256()
    if _current is not None:
        if not _current.trainings:
            _current.watching()
        _current.trainings += 1
        digest.update(f"{_current.settings} {_current.trainings}".encode())
    for part in deciding:
        digest.update(part)
    return out_dir / KEPT / digest.hexdigest()[:16]


def _given(row: Any) -> Any:
    """A row of data without its tensors: those were computed, and may differ in a last digit."""
    if isinstance(row, torch.Tensor):
        return None
    if is_dataclass(row):
        return [_given(getattr(row, field.name)) for field in fields(row)]
    if isinstance(row, list | tuple):
        return [_given(part) for part in row]
    return row


def keep_done(folder: Path, weights: dict[str, torch.Tensor], epochs: list[dict[str, float]]) -> None:
    """Keep a training's result: the weights of its best epoch, and the numbers of each."""
    with atomic_file(folder / DONE) as file:
        torch.save({"weights": weights, "epochs": epochs, "chances": chances()}, file)
    for other in folder.iterdir():
        if other.name != DONE:
            other.unlink()


def read_done(folder: Path) -> dict[str, Any] | None:
    """What `keep_done` kept of a training, or None if it was never done."""
    found = _read(folder / DONE)
    if found is not None:
        print(f"trained before: {len(found['epochs'])} epochs")
    return found


def _read(file: Path) -> dict[str, Any] | None:
    """A file that this module wrote; None if there is none, or if it is damaged, which is said: then it is deleted."""
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ... for what is none
        print(f"{file} is damaged ({first_line(e)}); the training begins anew")
        file.unlink()
        return None
    return found


class Resumable:
    """A loader that can begin at any batch of any epoch."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.epochs, self.batches = loader, 0, 0
        self.chances: dict[str, Any] | None = None

    def begin_at(self, epoch: int, batch: int, chances: dict[str, Any]) -> None:
        """Let the next epoch that is drawn be this one, from this batch on, with random numbers as they were there."""
        self.epochs, self.batches, self.chances = epoch, batch, chances

    def __len__(self) -> int:
        return len(self.loader)  # which may not know it, and says so

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.epochs):
            for _ in self.loader:
                pass
        if not self.batches:  # an epoch begins by drawing a number
            self._restore()
        batches = iter(self.loader)
        for _ in range(self.batches):
            next(batches)
        self._restore()
        self.epochs = self.batches = 0
        yield from batches

    def _restore(self) -> None:
        if self.chances is not None:
            restore_chances(self.chances)
        self.chances = None


class Keeper(Callback):
    """Writes the checkpoints; to be given after all callbacks that act at a batch's end.

    Args:
        folder: The training's.
        loader: What it draws batches from.
    """

    def __init__(self, folder: Path, loader: Resumable) -> None:
        self.folder, self.loader = folder, loader
        self._stop = Stopping()

    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from, if there is one that is whole; the loader is told where that is."""
        found = _read(self.folder / LAST)
        if found is None:
            return None
        self.loader.begin_at(**found["kept"])
        print("going on from epoch {epoch}, batch {batch}, of a training that was stopped".format(**found["kept"]))
        return self.folder / LAST

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop.__enter__()
        self._saved = self._began = time.time()
        self._first = trainer.global_step
        steps = trainer.estimated_stepping_batches  # infinite, where a loader does not know its length
        self._total = int(steps) if math.isfinite(steps) else None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop.__exit__(None, None, None)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop.__exit__(None, None, None)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(outputs["loss"])
        note(trainer.global_step, self._total, unit="step", first=self._first, began=self._began,
             loss=loss if math.isfinite(loss) else None)  # fmt: skip
        if not trainer.is_last_batch:  # after that one the epoch's validation comes first
            self._keep(trainer, trainer.current_epoch, batch_idx + 1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.should_stop and trainer.current_epoch + 1 != trainer.max_epochs:
            self._keep(trainer, trainer.current_epoch + 1, 0)

    def asked(self) -> bool:
        """Whether Ctrl-C was pressed, maybe in the training's last moments."""
        return self._stop.asked()

    def _keep(self, trainer: L.Trainer, epoch: int, batch: int) -> None:
        """Write a checkpoint from which this batch comes next, if it is time for one; then stop, if Ctrl-C asked."""
        if not self.asked() and time.time() - self._saved < INTERVAL:
            return
        self._saved = time.time()
        self._place = {"epoch": epoch, "batch": batch}
        with atomic_file(self.folder / LAST) as file:
            trainer.save_checkpoint(file, weights_only=False)
        if self.asked():
            raise KeyboardInterrupt

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if hasattr(self, "_place"):
            checkpoint["kept"] = {**self._place, "chances": chances()}


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
