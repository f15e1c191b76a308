"""Processes that end when the process that started them does, even if that one is killed outright (Linux only)."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

PR_SET_PDEATHSIG = 1


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
    """Run a command to its end, or, after Ctrl-C, to its checkpoint.

    `subprocess.run` gives a child a quarter of a second before it kills it. Here it has a process group of its own, so
    that it gets the signal once, from here, and is waited for; a second Ctrl-C kills it.

    Returns:
        Its exit code.

    Raises:
        KeyboardInterrupt: If Ctrl-C was pressed, once the child has ended.
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
