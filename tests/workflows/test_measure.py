"""Peak memory sees what is allocated, children included, and not what is mapped from a file."""

import gc
import mmap
import platform
import subprocess
import sys
import time

import psutil
import pytest
import torch

from workflows.measure import YOUNGEST_CHILD, PeakMemory, duration, gigabytes, hardware, tree_bytes

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or torch.cuda.is_available(), reason="reads /proc; on a GPU torch's own count is used"
)
MIB = 2**20


def test_peak_sees_an_allocation_that_is_gone_again():
    gc.collect()  # what earlier tests left must not go meanwhile
    with PeakMemory() as before:
        pass
    # From the system: malloc may give out memory that earlier tests have freed, and that is resident already.
    pages = mmap.mmap(-1, 200 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # none of it is there yet
    with PeakMemory() as peak:
        for page in range(0, len(pages), 4096):
            pages[page] = 1
        peak._stop.wait(0.2)
        pages.close()
    assert 190 * MIB < peak.bytes - before.bytes < 260 * MIB


def test_a_lap_has_its_own_peak():
    with PeakMemory() as peak:
        peak.lap()
        pages = mmap.mmap(-1, 100 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, len(pages), 4096):
            pages[page] = 1
        large = peak.lap()
        pages.close()
        peak.lap()  # in which they may still have been seen
        small = peak.lap()
    assert large - small > 90 * MIB
    assert peak.bytes >= large


@pytest.mark.long
def test_peak_counts_children():
    script = "b = bytearray(150 * 2**20); b[::4096] = b'x' * len(b[::4096]); import time; time.sleep(1.5)"
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        subprocess.run([sys.executable, "-c", script], check=True)
    assert peak.bytes - before.bytes > 145 * MIB


def test_a_child_that_was_there_before_counts_from_the_first_sample():
    script = "b = bytearray(150 * 2**20); b[::4096] = b'x' * len(b[::4096]); print(1, flush=True); input()"
    alone = tree_bytes(psutil.Process())
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        child.stdout.readline()
        time.sleep(max(0.0, psutil.Process(child.pid).create_time() + YOUNGEST_CHILD + 0.1 - time.time()))
        with PeakMemory() as at_once:
            pass
        child.communicate("\n")
    assert at_once.bytes - alone > 145 * MIB


def test_a_child_about_to_start_is_not_its_parent_twice(monkeypatch):
    monkeypatch.setattr(PeakMemory, "INTERVAL", 0.0005)
    block = bytearray(200 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        for _ in range(100):
            subprocess.run([sys.executable, "--version"], check=True, stdout=subprocess.DEVNULL)
    assert peak.bytes - before.bytes < 50 * MIB


def test_mapped_weights_do_not_count(tmp_path):
    torch.save({"a": torch.ones(50 * MIB)}, tmp_path / "a.pth")  # 200 MiB
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        total = torch.load(tmp_path / "a.pth", mmap=True, weights_only=True)["a"].sum()
    assert total == 50 * MIB
    assert peak.bytes - before.bytes < 50 * MIB


def test_hardware_names_the_processor():
    assert hardware()["cpu"] and hardware()["cores"] >= 1


def test_durations_have_two_units():
    assert [duration(s) for s in (0.4, 45, 200, 7500, 273600)] == ["0 s", "45 s", "3 min 20 s", "2 h 5 min", "3 d 4 h"]


def test_sizes_are_written_in_units_of_a_thousand():
    assert [gigabytes(size) for size in (4e5, 145_000_000, 1e9, 19_876e6)] == ["0 MB", "145 MB", "1.00 GB", "19.88 GB"]
