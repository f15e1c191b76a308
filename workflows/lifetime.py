"""Processes that end when the process that started them does, even if that one is killed outright (Linux only)."""

import ctypes
import signal
import sys
from collections.abc import Callable

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
