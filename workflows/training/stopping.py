"""Signals during training: the step is finished and kept before the run stops."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import lightning as L
import torch

from workflows.lifetime import ENDING, received

_NOTICE = b"\nstopping when this step is done, with a checkpoint; a second signal stops at once, without one\n"


class Stopping:
    """Keeps the first signal of the `with` block until the loop asks for it; the second one raises KeyboardInterrupt.

    A run of several processes stops at the same step in all of them, whichever got the signal.
    """

    def __init__(self, fabric: L.Fabric | None = None) -> None:
        """Nothing is changed before the block is entered.

        Args:
            fabric: A launched Fabric; None if there is no other process.
        """
        self._fabric, self._told = fabric, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():  # Python handles signals there only
            before = {number: signal.getsignal(number) for number in ENDING}
            # what is ignored stays so; without a handler of Python's, Ctrl-C is another's
            if before[signal.SIGINT] is signal.SIG_DFL:
                del before[signal.SIGINT]
            self._before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_new = received.take(number)
        if self._told and is_new:
            raise KeyboardInterrupt
        if not self._told and (self._fabric is None or self._fabric.global_rank == 0):
            with contextlib.suppress(OSError):
                os.write(2, _NOTICE)  # print may be interrupted by this very signal
        self._told = True

    def asked(self) -> bool:
        """Return whether a signal came, here or in another process of the run; all of them are to ask together."""
        if self._fabric is None or self._fabric.world_size == 1:
            return self._told
        told: Any = self._fabric.all_reduce(
            torch.tensor(float(self._told), device=self._fabric.device), reduce_op="sum"
        )
        return bool(told > 0)
