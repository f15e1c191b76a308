"""Signals that end a command, with its exit code; a child that one stops gets the time that its checkpoint takes."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from workflows import __main__, lifetime
from workflows.lifetime import run_child

CHILD = """
import signal, sys, time
from pathlib import Path
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
Path(sys.argv[1], "began").touch()
while not asked:
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))
Path(sys.argv[1], "checkpoint").write_text(str(len(asked)))
"""


def press_ctrl_c(folder: Path, times: int) -> threading.Thread:
    def press() -> None:
        until = time.monotonic() + 120
        while not (folder / "began").exists() and time.monotonic() < until:
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6)  # `Popen.wait` itself waits 0.25 s before it passes the first one on

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_a_child_is_waited_for_after_ctrl_c(tmp_path: Path) -> None:
    pressing = press_ctrl_c(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", CHILD, str(tmp_path), "1"])
    assert (tmp_path / "checkpoint").read_text() == "1"  # it was told once
    pressing.join()


def test_a_second_ctrl_c_kills_it(tmp_path: Path) -> None:
    pressing = press_ctrl_c(tmp_path, 2)
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", CHILD, str(tmp_path), "30"])
    assert not (tmp_path / "checkpoint").exists()  # which it writes 30 seconds after the first one
    pressing.join()


def test_its_exit_code_is_told() -> None:
    assert run_child([sys.executable, "-c", "raise SystemExit(3)"]) == 3


@pytest.fixture(autouse=True)
def no_earlier_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test sends is no repetition of what another sent."""
    monkeypatch.setattr(lifetime.received, "_at", -float("inf"))


def receive(number: int) -> None:
    """A command that gets a signal, and cleans up."""
    try:
        os.kill(os.getpid(), number)
        time.sleep(5)
    finally:
        cleaned.append(number)


cleaned: list[int] = []


@pytest.mark.parametrize("number", lifetime.ENDING)
def test_every_command_ends_by_a_signal_as_by_ctrl_c(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned.clear()
    before = signal.getsignal(number)
    code = __main__.main(["receive", "--number", str(int(number))], {"receive": (__name__, "receive", "")})
    assert code == 128 + number and cleaned == [number]
    assert "run the same command again to resume" in capsys.readouterr().err
    assert signal.getsignal(number) is before and not lifetime.is_terminated()


def test_a_signal_that_is_passed_on_twice_is_one(tmp_path: Path) -> None:
    """A child that gets time for its checkpoint is not killed by the second SIGTERM of one event."""

    def end() -> None:
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(KeyboardInterrupt), lifetime.interruptible():
        run_child([sys.executable, "-c", CHILD, str(tmp_path), "1"])
    thread.join()
    assert (tmp_path / "checkpoint").read_text() == "1"
