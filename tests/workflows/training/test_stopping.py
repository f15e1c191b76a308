"""The first Ctrl-C waits for the step's end, the second does not; in several processes all stop at one step."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from workflows.training.stopping import Stopping

ALONE = SimpleNamespace(world_size=1, global_rank=0, device=torch.device("cpu"))


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_one_is_kept_and_the_second_one_raised(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Stopping(ALONE) as stop:
        assert not stop.asked()
        press()
        assert stop.asked()
        assert "stopping when this step is done" in capfd.readouterr().err
        press()
    assert signal.getsignal(signal.SIGINT) is before


def test_afterwards_ctrl_c_is_as_ever():
    with Stopping(ALONE):
        pass
    with pytest.raises(KeyboardInterrupt):
        press()


def test_a_job_that_ignores_ctrl_c_goes_on():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopping(ALONE) as stop:
            press()
            assert not stop.asked()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


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
