"""A child process that runs functions for the tests, under limits of time, memory and file size.

It is started once and reused, since importing the libraries takes seconds; one that hangs or dies is replaced. What is
run and its arguments are sent by pickle: functions of a module, plain values.
"""

import contextlib
import io
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import pytest

from workflows.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """How a function ended.

    Attributes:
        how: "returned"; "refused", by a UserError or a message with exit code 2; "raised" anything else; "hung" or
            "died", and the process with it.
        text: The message, or the traceback.
        value: What the function returned.
    """

    how: Literal["returned", "refused", "raised", "hung", "died"]
    text: str = ""
    value: Any = None

    @property
    def is_graceful(self) -> bool:
        """Whether it gave a result or a message."""
        return self.how in ("returned", "refused")


class Child:
    """The process, and the connection to it."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._connection: Any = None

    def run(
        self, function: Callable[..., Any], *args: Any, seconds: float = 20, memory: int = 1 << 31, file_size: int = -1
    ) -> Outcome:
        """Run a function.

        Args:
            function: A function of a module.
            *args: Its arguments.
            seconds: It is killed after that time.
            memory: How many bytes of address space it may add.
            file_size: The size in bytes that no file may exceed, as if the disk were full; -1 for no limit.
        """
        if self._process is None:
            self._connection, other = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(other,), daemon=True)
            self._process.start()
            other.close()
            self._connection.recv()  # it is ready: libraries imported
        self._connection.send((function, args, memory, file_size))
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self.stop()
            return Outcome("died", f"exit code {code}")
        self.stop()
        return Outcome("hung", f"no answer within {seconds} s")

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _serve(connection: Connection) -> None:
    import workflows.lora  # noqa: F401  (imports what most functions need)

    connection.send("ready")
    while True:
        try:
            function, args, memory, file_size = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(function, args, memory, file_size))


def _outcome(function: Callable[..., Any], args: tuple[Any, ...], memory: int, file_size: int) -> Outcome:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), limits(memory, file_size):
            value = function(*args)
        return Outcome("returned", said.getvalue(), value)
    except UserError as e:
        return Outcome("refused", str(e))
    except SystemExit as e:
        if e.code == 2 and said.getvalue().strip() and "Traceback" not in said.getvalue():
            return Outcome("refused", said.getvalue())
        return Outcome("raised", f"SystemExit({e.code!r})\n{said.getvalue()}")
    except BaseException:  # a panic in Rust code is a BaseException
        return Outcome("raised", traceback.format_exc(limit=-12)[-6000:])


@contextlib.contextmanager
def limits(memory: int, file_size: int) -> Iterator[None]:
    """Let this process add only so many bytes of address space, and write no file larger than so many bytes."""
    resource = pytest.importorskip("resource", reason="limits on memory and file sizes are a Unix thing")
    before = {kind: resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)}
    statm = Path("/proc/self/statm")
    if statm.is_file():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[resource.RLIMIT_AS][1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, before[resource.RLIMIT_FSIZE][1]))
    try:
        yield
    finally:
        for kind, limit in before.items():
            resource.setrlimit(kind, limit)
