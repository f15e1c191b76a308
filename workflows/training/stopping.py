"""Ctrl-C during training: the step is finished and kept before the run stops."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import lightning as L
import torch

_TOLD = b"\nstopping when this step is done, with a checkpoint; Ctrl-C again stops at once, without one\n"


class Stopping:
    """Keeps the first Ctrl-C of the `with` block until the loop asks for it; the second one is raised as ever.

    A run of several processes stops at the same step in all of them, whichever was told.
    """

    def __init__(self, fabric: L.Fabric | None = None) -> None:
        """Nothing is changed before the block is entered.

        Args:
            fabric: A launched Fabric; None if there is no other process.
        """
        self._fabric, self._told = fabric, False
        self._before: Any = None

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():  # Python handles signals there only
            self._before = signal.getsignal(signal.SIGINT)
        if callable(self._before):  # a job that ignores Ctrl-C goes on doing so
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if callable(self._before):
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._told:
            raise KeyboardInterrupt
        self._told = True
        if self._fabric is None or self._fabric.global_rank == 0:
            os.write(2, _TOLD)  # print may be interrupted by this very signal

    def asked(self) -> bool:
        """Whether Ctrl-C was pressed, here or in another process of the run; all of them are to ask together."""
        if self._fabric is None or self._fabric.world_size == 1:
            return self._told
        told: Any = self._fabric.all_reduce(
            torch.tensor(float(self._told), device=self._fabric.device), reduce_op="sum"
        )
        return bool(told > 0)
