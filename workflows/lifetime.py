"""How processes end: by signals, and with the process that started them.

Ctrl-C, a scheduler's SIGTERM and a closed terminal's SIGHUP all raise KeyboardInterrupt, so that whatever cleans up
after the first does so after the others; training finishes its step and writes a checkpoint first
(`training/stopping.py`). A signal that the command was started to ignore (`nohup`) stays ignored. A child process ends
when its parent does, even if that one is killed outright (Linux only).
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

PR_SET_PDEATHSIG = 1
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_SAME_EVENT = 1.0
"""Seconds in which a further SIGTERM or SIGHUP is no second request: `make` passes on a signal that its whole group
gets, and of a closed terminal both the shell and the kernel send SIGHUP."""


class Received:
    """The signal that ends this command, if there was one, and the terminals that may be gone by then."""

    def __init__(self) -> None:
        self.terminals: list[int] = []
        self.number: int | None = None
        self.is_watched = False
        self._at = -float("inf")

    def take(self, number: int) -> bool:
        """Note a signal; False if it belongs to the one before it."""
        repeats = number != signal.SIGINT and time.monotonic() - self._at < _SAME_EVENT
        if self.is_watched and self.number is None:
            self.number = number
        if not repeats:
            self._at = time.monotonic()
        for file in [file for file in self.terminals if not os.isatty(file)]:  # closed: writing there would fail
            self.terminals.remove(file)
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, file)
                os.close(nowhere)
        return not repeats


received = Received()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt in the body, as Ctrl-C does."""
    received.number, received.is_watched = None, True
    received.terminals = [file for file in (1, 2) if os.isatty(file)]
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python handles signals there only
        before = {number: signal.getsignal(number) for number in ENDING if number != signal.SIGINT}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        received.number, received.is_watched = None, False
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if received.take(number):
        raise KeyboardInterrupt


def exit_code() -> int:
    """The exit code of a command that KeyboardInterrupt ended: 128 and the number of the signal, or of Ctrl-C's."""
    return 128 + (received.number or signal.SIGINT)


def is_terminated() -> bool:
    """Return whether a KeyboardInterrupt came from SIGTERM or SIGHUP, which end even a command that Ctrl-C does not."""
    return received.number not in (None, signal.SIGINT)


def end_with_parent(sent: signal.Signals) -> Callable[[], None]:
    """What a child is to call so that the kernel sends it a signal when its parent ends; nothing happens elsewhere.

    The library is looked up here and not in the child: between fork and exec nothing may take a lock.

    Args:
        sent: The signal.
    """
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None).prctl

    def apply() -> None:
        prctl(PR_SET_PDEATHSIG, int(sent))

    return apply


def run_child(command: Sequence[str]) -> int:
    """Run a command to its end, or, after Ctrl-C, SIGTERM or SIGHUP, to its checkpoint.

    `subprocess.run` gives a child a quarter of a second before it kills it. Here it has a process group of its own, so
    that it gets the signal once, from here, and is waited for; a second one kills it.

    Returns:
        Its exit code.

    Raises:
        KeyboardInterrupt: After one of these signals, once the child has ended.
    """
    posix = os.name == "posix"
    process = subprocess.Popen(
        command,
        preexec_fn=end_with_parent(signal.SIGKILL) if posix else None,
        process_group=0 if posix else None,
    )
    asked = False
    try:
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                if asked:
                    raise
                asked = True
                if posix:  # Windows sends it by itself
                    process.send_signal(signal.SIGINT)
                continue
            if asked:
                raise KeyboardInterrupt
            return code
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
