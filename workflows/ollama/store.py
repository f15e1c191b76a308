"""The folder of models that the servers we start share, and the lock that keeps one from deleting another's upload.

A starting Ollama deletes every file that no model names, and so the weights that another server has just been sent and
not yet named. Only a server that is alone may do that.
"""

from pathlib import Path
from typing import IO

STATE = Path(".tools/ollama-state")
"""Models, keys and logs of the servers that we start, relative to the project's root."""


class StoreLock:
    """Held by the process that owns a server, from before its start until it has ended.

    Attributes:
        is_alone: Whether no other server of ours uses the folder; decided at the start.
    """

    def __init__(self, state: Path) -> None:
        self._file: IO[bytes] = open(state / ".lock", "wb")  # noqa: SIM115
        self.is_alone = self._take(exclusive=True)
        if not self.is_alone:
            self._take(exclusive=False)  # waits while another one starts

    def _take(self, exclusive: bool) -> bool:
        try:
            import fcntl
        except ImportError:  # Windows: no lock there, and nothing is deleted
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except BlockingIOError:
            return False
        return True

    def started(self) -> None:
        """The server answers: it has done its deleting, and others may start."""
        if self.is_alone:
            self._take(exclusive=False)

    def release(self) -> None:
        """The server has ended."""
        self._file.close()
