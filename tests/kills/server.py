"""Steps in processes of their own that begin with everything imported, so that a kill costs a step and not its imports.

A server process imports the steps once, then forks a child for each request; the child runs the command line of a step
as `python -m workflows` does. The server itself never computes: a fork of a process whose OpenMP threads have run
would hang.
"""

import contextlib
import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2
TIME_LIMIT = 120.0  # seconds; a step on a tiny model takes two
POLL = 0.0005  # seconds between two looks at the step's folder
STOPPED = 130
"""The exit code of a step that Ctrl-C stopped."""
_PRELOADED = (
    "workflows.__main__",
    "workflows.lora",
    "workflows.dpo",
    "workflows.grpo",
    "workflows.evaluate",
    "workflows.export",
    "workflows.download",
    "data_prep.prepare",
    "transformers.models.llama.configuration_llama",
    "transformers.models.qwen2.configuration_qwen2",
)
_TEMPORARY = re.compile(r"\..+\.(part(\.\w+)?|old)")
_CHANGES = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}
"""Audit events of changes to a folder, and which of their arguments is the descriptor that a path is relative to."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Kill:
    """When to send SIGKILL or SIGINT: at a moment, at a change to the step's folder, or while some file is there.

    Attributes:
        seconds: After the start; with `temporary`, after it was first seen.
        temporary: The name of a temporary file or folder to wait for, as `temporaries` gives it.
        sent: The signal; SIGINT is sent once.
        change: The number of the change (from 1) that is not made any more; the child then kills itself.
    """

    seconds: float = 0.0
    temporary: str | None = None
    sent: signal.Signals = signal.SIGKILL
    change: int | None = None

    def __str__(self) -> str:
        if self.change is not None:
            return f"before change {self.change}"
        return f"by {self.sent.name} {self.seconds:.4f} s after {self.temporary or 'the start'}"

    def is_due(self, age: float, present: dict[str, float]) -> bool:
        """Whether the parent is to kill now.

        Args:
            age: Seconds since the start.
            present: Temporary names that are there, and since how many seconds.
        """
        if self.change is not None:
            return False
        return (age if self.temporary is None else present.get(self.temporary, -1.0)) >= self.seconds


@dataclass
class Run:
    """What became of a step's process.

    Attributes:
        code: Its exit code, -9 after a kill, 130 after Ctrl-C.
        seconds: How long it lived.
        changes: The changes to its folder, in words, if it was not killed.
        temporaries: The temporary names seen, and for how many seconds each was there.
    """

    code: int
    seconds: float
    changes: list[str]
    temporaries: dict[str, float] = field(default_factory=dict)

    @property
    def killed(self) -> bool:
        return self.code in (-signal.SIGKILL, STOPPED)


def is_temporary(name: str) -> bool:
    """Whether a path has a temporary name, or is in a folder that has one."""
    return any(_TEMPORARY.fullmatch(part) for part in Path(name).parts)


def temporaries(folder: Path) -> dict[str, Path]:
    """Temporary files and folders below a folder: names without process numbers, and their paths. What is inside a
    temporary folder does not count."""
    found: dict[str, Path] = {}
    for parent, folders, files in os.walk(folder):
        for name in filter(is_temporary, [*folders, *files]):
            path = Path(parent, name)
            found[re.sub(r"\.\d+\.part", ".PID.part", str(path.relative_to(folder)))] = path
        folders[:] = [name for name in folders if not is_temporary(name)]
    return found


class Server:
    """The parent's side: start a step, kill it when it is time, say what became of it."""

    def __init__(self, log: Path) -> None:
        """Start the server process.

        Args:
            log: Where the steps' output goes, one after the other.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "TOKENIZERS_PARALLELISM": "false"}
        self.log = log
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        self._answer()  # it has imported everything

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, command: list[str], folder: Path, kill: Kill | None = None) -> Run:
        """Run a step to its end, or to the kill.

        Args:
            command: The step and its options, as after `python -m workflows`.
            folder: The folder that it writes to.
            kill: When to kill it; None lets it end.

        Raises:
            TimeoutError: If it does not end.
        """
        request = {"command": command, "folder": str(folder), "log": str(self.log)}
        request["kill_at"] = kill.change if kill is not None else None
        began = time.monotonic()
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        pid = int(self._answer())
        first: dict[str, float] = {}  # when each temporary name appeared
        lasted: dict[str, float] = {}
        late = sent = False
        while not select.select([self._process.stdout], [], [], POLL)[0]:
            now = time.monotonic()
            first = {name: first.get(name, now) for name in temporaries(folder)}
            lasted |= {name: max(lasted.get(name, 0.0), now - since) for name, since in first.items()}
            late = now - began > TIME_LIMIT
            ages = {name: now - first[name] for name in first}
            due = kill is not None and not sent and kill.is_due(now - began, ages)
            if late or due:
                sent = due and kill.sent == signal.SIGINT
                with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
                    os.kill(pid, signal.SIGKILL if late else kill.sent)
        answer = json.loads(self._answer())
        if late:
            raise TimeoutError(
                f"{' '.join(command)} did not end within {TIME_LIMIT:.0f} s; its output is in {self.log}"
            )
        return Run(answer["code"], time.monotonic() - began, answer["changes"], lasted)

    def _answer(self) -> bytes:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The server of steps ended; see {self.log}")
        return line


def serve() -> None:
    """Import the steps, then run one request after the other (JSON lines on stdin), each in a forked child."""
    for module in _PRELOADED:
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reading)
            _run(json.loads(line), writing)
        os.close(writing)
        print(pid, flush=True)
        with open(reading, encoding="utf-8") as pipe:
            changes = pipe.read().splitlines()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, "changes": changes}), flush=True)


def _run(request: dict[str, Any], writing: int) -> None:
    """Run a step in this process, which then ends."""
    from workflows.__main__ import main

    for descriptor, name, flags in ((0, os.devnull, os.O_RDONLY), (1, request["log"], os.O_WRONLY | os.O_APPEND)):
        os.dup2(os.open(name, flags), descriptor)
    os.dup2(1, 2)
    changes: list[str] = []
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
        sys.addaudithook(_watch(request["folder"], changes, request["kill_at"]))
        code = main(request["command"])
    except KeyboardInterrupt:  # as Python itself ends by it
        code = STOPPED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(writing, "\n".join(changes).encode())
        os._exit(code)


def _watch(folder: str, changes: list[str], kill_at: int | None) -> Any:
    """An audit hook that notes each change to a folder before it is made, and kills the process at one of them."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(arguments[0], int) or not arguments[2] & _WRITING:
                return
        elif event not in _CHANGES:
            return
        path = os.fspath(arguments[0])
        # rmtree names files relative to a folder's descriptor
        if not str(path).startswith(folder) and (event == "open" or arguments[_CHANGES[event]] == -1):
            return
        changes.append(f"{event} {path}")
        if len(changes) == kill_at:
            os.write(2, f"killed before: {changes[-1]}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


if __name__ == "__main__":
    serve()
