"""Training that a scheduler or a closed terminal ends: real signals, a checkpoint first, the conventional exit code."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workflows.test_lora import TRAIN, adapters, train, write_rows
from workflows import lifetime
from workflows.__main__ import main
from workflows.lora import SFT

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "toy"
    directory.mkdir()
    write_rows(directory / "train.jsonl", 30)
    write_rows(directory / "validation.jsonl", 6, offset=100)
    (directory / "manifest.json").write_text("{}")
    return directory


def command(checkpoint: Path, data: Path, out_dir: Path, max_steps: int) -> list[str]:
    settings = {"checkpoint_dir": checkpoint, "data": data, "out_dir": out_dir, "precision": "32-true", "lora_r": 4}
    settings |= {f"train.{name}": value for name, value in vars(TRAIN).items() if value is not None}
    settings |= {"train.max_steps": max_steps, "ignore_plan": True}
    return ["lora", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def rows_logged(out_dir: Path) -> int:
    file = out_dir / "metrics.csv"
    return len(list(csv.DictReader(file.read_text().splitlines()))) if file.is_file() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_training_after_its_step_with_a_checkpoint(
    number: int, tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(lifetime.received, "_at", -float("inf"))
    batches = SFT.batches

    def with_signal(self: SFT, step: int, rank: int, world_size: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), number)
        return batches(self, step, rank, world_size)

    with monkeypatch.context() as patch:
        patch.setattr(SFT, "batches", with_signal)
        assert main(command(tiny_llama, data, tmp_path / "stopped", TRAIN.max_steps)) == 128 + number
    said = capfd.readouterr().err
    assert "stopping when this step is done" in said and "run the same command again to resume" in said
    assert (tmp_path / "stopped" / "checkpoints" / "step-00000003.pth").is_file()
    assert main(command(tiny_llama, data, tmp_path / "stopped", TRAIN.max_steps)) == 0
    resumed, whole = (adapters(final) for final in (tmp_path / "stopped" / "final", train(tiny_llama, data, tmp_path)))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_closed_terminal_ends_training_with_a_checkpoint(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    """The terminal is gone when SIGHUP comes: every write to it fails from then on."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    terminal, inside = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-m", "workflows", *command(tiny_llama, data, tmp_path, 100_000)],
        stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(inside)
    try:
        os.set_blocking(terminal, False)
        until = time.monotonic() + 240
        while rows_logged(tmp_path) < 3:
            try:
                os.read(terminal, 1 << 16)  # else the bar fills the terminal, and waits
            except BlockingIOError:
                time.sleep(0.02)
            assert run.poll() is None and time.monotonic() < until
        os.close(terminal)
        assert run.wait(timeout=120) == 128 + signal.SIGHUP
    finally:
        run.kill()
        run.wait()
    done = rows_logged(tmp_path)
    assert (tmp_path / "checkpoints" / f"step-{done:08d}.pth").is_file()
