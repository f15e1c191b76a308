"""The first signal waits for the step's end, the second does not; in several processes all stop at one step."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from workflows import lifetime
from workflows.training.stopping import Stopping

ALONE = SimpleNamespace(world_size=1, global_rank=0, device=torch.device("cpu"))


def press(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def no_earlier_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test sends is no repetition of what another sent."""
    monkeypatch.setattr(lifetime.received, "_at", -float("inf"))


@pytest.mark.parametrize("number", lifetime.ENDING)
def test_the_first_one_is_kept_and_the_second_one_raised(number, capfd, monkeypatch):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Stopping(ALONE) as stop:
        assert not stop.asked()
        press(number)
        assert stop.asked()
        assert "stopping when this step is done" in capfd.readouterr().err
        if number != signal.SIGINT:
            press(number)  # at once: make and the shell pass on what the process got already
            monkeypatch.setattr(lifetime, "_SAME_EVENT", 0.0)  # as if a second had gone by
        press(number)
    assert signal.getsignal(number) is before


def test_ctrl_c_is_a_second_request_at_any_time():
    with pytest.raises(KeyboardInterrupt), Stopping(ALONE):
        press(signal.SIGTERM)
        press(signal.SIGINT)


def test_afterwards_ctrl_c_is_as_ever():
    with Stopping(ALONE):
        pass
    with pytest.raises(KeyboardInterrupt):
        press()


@pytest.mark.parametrize("number", lifetime.ENDING)
def test_a_job_that_ignores_a_signal_goes_on(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with lifetime.interruptible(), Stopping(ALONE) as stop:
            press(number)
            assert not stop.asked()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def body() -> None:
        with Stopping(ALONE) as stop:
            seen.append((stop.asked(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


@pytest.mark.parametrize("others", [0.0, 1.0])
def test_one_process_that_was_told_stops_them_all(others):
    fabric = SimpleNamespace(**{**vars(ALONE), "world_size": 2}, all_reduce=lambda value, reduce_op: value + others)
    with Stopping(fabric) as stop:
        assert stop.asked() == bool(others)
