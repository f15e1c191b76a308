"""How far a long step has come: a bar in the terminal, and a small file in the step's folder that `status` reads.

The file is there while the step runs, and stays when it was stopped: it says by which command the step goes on. A step
that ends well deletes it.
"""

import contextlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
from tqdm import tqdm

PROGRESS = "progress.json"
HOST = platform.node()
_INTERVAL = 1.0
"""Seconds between two writes of the file."""


_PATIENCE = 2.0
"""Seconds that work may take before it gets a bar, where most of it takes less."""

T = TypeVar("T")


class Bar(tqdm):
    """tqdm's bar, which `status` sees too where the step is `watched`."""

    def update(self, n: float | None = 1) -> bool | None:
        """Count n more units as done."""
        shown = super().update(n)
        if not self.disable:
            note(self.n, self.total, unit=self.unit, what=self.desc.removesuffix(": "), first=self.initial,
                 began=self.start_t)  # fmt: skip
        return shown


def note(
    done: float,
    total: float | None,
    *,
    unit: str,
    first: float,
    began: float,
    what: str = "",
    loss: float | None = None,
) -> None:
    """Let `status` see how far the step is, where it is `watched`.

    Args:
        done: Units that are done.
        total: Units in all.
        unit: What is counted.
        first: Units that were done before this process.
        began: When it began, in seconds since the epoch.
        what: What it is doing, if that is not its main work.
        loss: The training loss, where no `metrics.csv` of the step has it.
    """
    if _current is not None:
        _current.note(done, total, unit=unit, what=what, first=first, began=began, loss=loss)


def brief(items: Collection[T], what: str, unit: str) -> Iterator[T]:
    """The items, with a bar if they take long, which is gone afterwards."""
    return iter(Bar(items, desc=what, unit=unit, leave=False, delay=_PATIENCE))


class _Watch:
    """The file of the step that this process runs."""

    def __init__(self, folder: Path, keeps: str) -> None:
        self.file = folder / PROGRESS
        self.facts: dict[str, Any] = {
            "keeps": keeps,
            "command": command(),
            "host": HOST,
            "pid": os.getpid(),
            "born": psutil.Process().create_time(),
        }
        self._written = 0.0
        self._noted = False

    def note(self, done: float, total: float | None, **facts: Any) -> None:
        """Keep how far the step is, if that is the end, or it was not written a moment ago."""
        now = time.time()
        if (total is not None and done >= total) or not self._noted or now - self._written >= _INTERVAL:
            self._noted = True
            self.write({**facts, "done": done, "total": total, "updated": now})

    def write(self, numbers: dict[str, Any]) -> None:
        """Write the file whole. It is not flushed to the disk, and no run ends because there is no room for it."""
        self._written = time.time()
        temporary = self.file.with_name(f".{self.file.stem}.{os.getpid()}.part.json")
        with contextlib.suppress(OSError):
            try:
                temporary.write_text(json.dumps({**self.facts, **numbers}), encoding="utf-8")
                temporary.replace(self.file)
            finally:
                temporary.unlink(missing_ok=True)


_current: _Watch | None = None


@contextlib.contextmanager
def watched(folder: Path, active: bool = True, keeps: str = "") -> Iterator[None]:
    """Let `status` see the bars of the body.

    Args:
        folder: The step's folder; made if needed.
        active: Whether this process is the one that tells (the first of several).
        keeps: What the step goes on from when it was stopped, in words, where its folder does not show it.
    """
    global _current
    if not active:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    before, _current = _current, _Watch(folder, keeps)
    _current.write({"updated": time.time()})
    try:
        yield
        _current.file.unlink(missing_ok=True)
    finally:
        _current = before


def result_is_there(folder: Path) -> None:
    """Delete the progress file of a process that was killed between writing its result and deleting this file."""
    (folder / PROGRESS).unlink(missing_ok=True)


def command() -> str:
    """The command line that started this process, as one would type it."""
    return shlex.join(sys.orig_argv)
