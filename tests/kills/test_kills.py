"""Steps killed at random moments end like undisturbed ones, and what they leave meanwhile is whole."""

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.kills.engine import Bench, Step, differences, files_of
from tests.kills.server import STOPPED, Server
from tests.kills.steps import STEPS, make_steps
from workflows.progress import PROGRESS
from workflows.status import StepStatus, status_of

pytestmark = [
    pytest.mark.rough,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the steps are forked, which Windows cannot do"),
]
SEED = 1


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def steps(work: Path) -> dict[str, Step]:
    return make_steps(work)


@pytest.fixture(scope="module")
def server(work: Path) -> Iterator[Server]:
    with Server(work / "log.txt") as server:
        yield server


def kill(server: Server, step: Step, work: Path, kills: int, seed: int, sent: signal.Signals = signal.SIGKILL) -> None:
    tally = Bench(server, step, work).kill(kills, seed, sent)
    assert not tally.problems, "\n".join(tally.problems)
    assert (tally.kills, tally.identical) == (kills, tally.ended)


# Of the trainings, which share a loop, one that reads rows and one that writes its own, and of what keeps answers
# evaluate; `make test-slow` kills all.
@pytest.mark.parametrize("name", ("lora", "grpo", "shrink", "evaluate", "export", "download", "data"))
def test_a_killed_step_ends_like_an_undisturbed_one(server, steps, tmp_path, name):
    kill(server, steps[name], tmp_path, 2, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_twenty_kills(server, steps, tmp_path, name):
    kill(server, steps[name], tmp_path, 20, SEED + 1)


@pytest.mark.parametrize("name", ("lora", "export"))  # one that trains and one that does not
def test_a_step_that_ctrl_c_stopped_ends_like_an_undisturbed_one(server, steps, tmp_path, name):
    kill(server, steps[name], tmp_path, 1, SEED, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_ten_times_ctrl_c(server, steps, tmp_path, name):
    kill(server, steps[name], tmp_path, 10, SEED + 2, signal.SIGINT)


@pytest.mark.parametrize(("name", "updates"), [("lora", 1), ("ppo", 2)])
def test_ctrl_c_keeps_the_step_that_was_reached(server, steps, tmp_path, name, updates):
    command = [*steps[name].command, "--out_dir", str(tmp_path), "--train.save_interval", "1000"]
    command[command.index("--train.max_steps") + 1] = "1000"
    log, progress = tmp_path / "metrics.csv", tmp_path / PROGRESS
    seen: list[StepStatus] = []

    def press_ctrl_c() -> None:
        until = time.monotonic() + 100
        while not (log.is_file() and log.read_text().count("\n") > 2) and time.monotonic() < until:
            time.sleep(0.01)
        seen.append(status_of(tmp_path, tmp_path.parent))
        os.kill(json.loads(progress.read_text())["pid"], signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    run = server.run(command, tmp_path)
    thread.join()
    assert run.code == STOPPED
    checkpoint = max((tmp_path / "checkpoints").iterdir())  # beside it is that of the best step so far
    step = int(checkpoint.stem.removeprefix("step-"))
    rows = [int(row["step"]) for row in csv.DictReader(log.read_text().splitlines())]
    assert rows == list(range(1, step + 1)) and step >= 2 and step % updates == 0
    (running,) = seen
    assert running.state == "running" and running.total == 1000 and running.done >= 1
    stopped = status_of(tmp_path, tmp_path.parent)
    assert (stopped.state, stopped.keeps) == ("stopped", f"goes on from step {step}")
    told = server.log.read_text()
    assert "stopping when this step is done" in told
    assert "run the same command again to resume:\n  " in told


def test_what_is_not_whole_is_found(server, steps, tmp_path):
    bench = Bench(server, steps["data"], tmp_path)
    folder = bench.step.folder
    bench._reset(over=True)
    assert bench._problems_after_kill(bench.old) == []

    rows = folder / "medqa" / "train.jsonl"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-1])
    assert len(bench._problems_after_kill(bench.old)) == 2  # the file, and so the folder
    rows.write_bytes(whole)
    (folder / "medqa" / "manifest.json").rename(folder / "medqa" / ".manifest.1.part.json")
    assert bench._problems_after_kill(bench.old) == ["medqa is neither absent nor all old nor all new"]
    assert "medqa/.manifest.1.part.json is too much" in differences(bench.new, files_of(folder))


def test_litgpts_trainer_does_not_outlive_the_step(server, steps, tmp_path):
    step = steps["lora"]
    command = [*step.command, "--trainer", "litgpt", "--out_dir", str(tmp_path)]
    found: list[psutil.Process] = []

    def kill_when_it_is_there() -> None:
        until = time.monotonic() + 60
        while not found and time.monotonic() < until:
            time.sleep(0.05)
            for process in psutil.Process().children(recursive=True):
                if "finetune_lora" in process.cmdline() and str(tmp_path / "litgpt") in process.cmdline():
                    found.append(process)
                    process.parent().kill()

    thread = threading.Thread(target=kill_when_it_is_there)
    thread.start()
    run = server.run(command, tmp_path)
    thread.join()
    assert run.killed
    assert psutil.wait_procs(found, timeout=10)[1] == []
