"""Peak memory, time and hardware: measured, and written, the same way by every step and bench."""

import os
import platform
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import psutil
import torch

YOUNGEST_CHILD = 1.0  # seconds; a busy machine may keep a new process waiting that long before its exec


class PeakMemory:
    """Peak memory of this process and its children while the `with` block runs.

    On Linux: the largest RssAnon + RssShmem of the process tree, sampled every 50 ms. Pages of mapped files (weights
    that are read from the disk) can be dropped by the kernel at any time and do not count. Elsewhere the resident set
    is used, which does count them. With a CUDA device it is torch's `max_memory_allocated`.
    """

    INTERVAL = 0.05  # seconds

    def __init__(self) -> None:
        self.bytes = 0
        self._lap = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if torch.cuda.is_available():
            self.lap()
        else:
            self._stop.set()
            self._thread.join()

    def lap(self) -> int:
        """The peak since the last lap, or since the beginning, in bytes."""
        if torch.cuda.is_available():
            self._lap = torch.cuda.max_memory_allocated()
            self.bytes = max(self.bytes, self._lap)
            torch.cuda.reset_peak_memory_stats()
        else:
            self._see()
        lap, self._lap = self._lap, 0
        return lap

    def _see(self) -> None:
        now = tree_bytes(psutil.Process())
        self._lap = max(self._lap, now)
        self.bytes = max(self.bytes, now)

    def _watch(self) -> None:
        while True:
            self._see()
            if self._stop.wait(self.INTERVAL):
                return


def tree_bytes(process: psutil.Process) -> int:
    """Private and shared memory of a process and all its descendants, in bytes.

    Descendants younger than `YOUNGEST_CHILD` seconds do not count: between fork and exec they show their parent's
    memory as theirs.

    Args:
        process: The root of the tree.
    """
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        try:
            if member == process or time.time() - member.create_time() >= YOUNGEST_CHILD:
                total += _resident_bytes(member)
        except (psutil.Error, OSError):  # it ended between the listing and the reading
            continue
    return total


def _resident_bytes(process: psutil.Process) -> int:
    if platform.system() != "Linux":
        return process.memory_info().rss
    status = Path(f"/proc/{process.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem") if key in fields)


def hardware() -> dict[str, str | int]:
    """The machine in a few words, for every table of measurements."""
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    described: dict[str, str | int] = {
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": platform.system(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def step_began() -> float:
    """Unix time at which this step began: under `python -m workflows` the start of the process, so that loading the
    libraries counts; else now."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return psutil.Process().create_time() if spec is not None and spec.name == "workflows.__main__" else time.time()


def seconds_of_step(began: float) -> float:
    """Wall seconds since `step_began` gave its answer."""
    return time.time() - began


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    for size, name, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // below} {smaller}"
    return f"{whole} s"


def gigabytes(size: float) -> str:
    """A size in units of 10^9 or 10^6 bytes."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
