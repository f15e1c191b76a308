"""Runs of two CPU processes: they follow one process, can be gone on with by one, and end when one of them dies."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.workflows import alignment
from tests.workflows.test_lora import write_rows
from workflows import dpo as dpo_step
from workflows import grpo as grpo_step
from workflows import lora as lora_step
from workflows import ppo as ppo_step
from workflows import reward as reward_step
from workflows.errors import UserError
from workflows.training.loop import TrainArgs
from workflows.training.processes import device_problems, make_fabric
from workflows.training.rewards import WeightedReward

pytestmark = pytest.mark.long

STEPS = 40
TRAIN = TrainArgs(
    max_steps=STEPS,
    global_batch_size=8,
    row_tokens=1,  # one sample a row: eight accumulations in one process, four in each of two
    max_seq_length=256,
    lr_warmup_steps=2,
    learning_rate=1e-3,
    eval_interval=STEPS,
    save_interval=5,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "toy"
    directory.mkdir()
    write_rows(directory / "train.jsonl", 30)
    write_rows(directory / "validation.jsonl", 6, offset=100)
    (directory / "manifest.json").write_text("{}")
    return directory


def losses(out_dir: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader((out_dir / "metrics.csv").read_text().splitlines())]


def settings_of(checkpoint: Path, data: Path, out_dir: Path) -> dict:
    return {"checkpoint_dir": checkpoint, "data": data, "out_dir": out_dir, "precision": "32-true", "lora_r": 4}


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    out_dir = tmp_path_factory.mktemp("alone")
    lora_step.setup(**settings_of(tiny_llama, data, out_dir), train=TRAIN)
    return losses(out_dir)


def start(checkpoint: Path, data: Path, out_dir: Path, strategy: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "workflows", "lora", "--devices", "2", "--strategy", strategy]
    for name, value in settings_of(checkpoint, data, out_dir).items():
        command += [f"--{name}", str(value)]
    command += ["--train", json.dumps(vars(TRAIN))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SHARDED = pytest.mark.slow
"""Sharded runs have quick tests of their own, on a Llama (test_sharded.py)."""


@pytest.mark.parametrize(("strategy", "victim"), [("ddp", "second"), pytest.param("fsdp", "first", marks=SHARDED)])
def test_a_process_dies_and_one_process_goes_on(strategy, victim, alone, tiny_llama, data, tmp_path):
    run = start(tiny_llama, data, tmp_path, strategy)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/step-*.pth")):
        assert run.poll() is None and time.monotonic() < until, run.communicate()[1]
        time.sleep(0.005)
    first = psutil.Process(run.pid)
    (second,) = [p for p in first.children(recursive=True) if "lora" in p.cmdline()]
    killed_at = time.monotonic()
    (second if victim == "second" else first).kill()
    _, said = run.communicate(timeout=60)
    assert psutil.wait_procs([first, second], timeout=60 - (time.monotonic() - killed_at))[1] == []
    if victim == "second":  # if it is the first, the shell tells
        assert run.returncode == 1
        assert "Another process of this run (of 2) died" in said and "Run the same command again" in said
    assert "Traceback" not in said
    assert not (tmp_path / "final").exists()
    done = len(losses(tmp_path))
    assert 5 <= done < STEPS

    lora_step.setup(**settings_of(tiny_llama, data, tmp_path), train=TRAIN)  # one process
    assert losses(tmp_path)[: done // 5 * 5][:20] == pytest.approx(alone[: done // 5 * 5][:20], abs=1e-4)
    assert losses(tmp_path) == pytest.approx(alone, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "number"), [("ddp", signal.SIGINT), ("fsdp", signal.SIGINT), ("ddp", signal.SIGTERM)]
)
def test_a_signal_to_one_process_stops_both_at_the_same_step(strategy, number, alone, tiny_llama, data, tmp_path):
    run = start(tiny_llama, data, tmp_path, strategy)
    until = time.monotonic() + 120
    while not (tmp_path / "metrics.csv").is_file() or len(losses(tmp_path)) < 2:
        assert run.poll() is None and time.monotonic() < until, run.communicate()[1]
        time.sleep(0.01)
    first = psutil.Process(run.pid)
    family = [first, *(p for p in first.children(recursive=True) if "lora" in p.cmdline())]
    first.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert psutil.wait_procs(family, timeout=20)[1] == [] and len(family) == 2
    assert (
        run.returncode == 128 + number
        and said.count("run the same command again to resume:") == 1
        and "Traceback" not in said
    )
    done = len(losses(tmp_path))
    assert (tmp_path / "checkpoints" / f"step-{done:08d}.pth").is_file() and done < STEPS

    lora_step.setup(**settings_of(tiny_llama, data, tmp_path), train=TRAIN)  # one process
    assert losses(tmp_path) == pytest.approx(alone, abs=1e-3)


@pytest.mark.slow  # the run that loses a process, above, follows one process too
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_with_half_the_accumulations_follow_one(strategy, alone, tiny_llama, data, tmp_path):
    run = start(tiny_llama, data, tmp_path, strategy)
    _, said = run.communicate(timeout=200)
    assert run.returncode == 0, said
    assert losses(tmp_path)[:20] == pytest.approx(alone[:20], abs=1e-4)
    assert losses(tmp_path) == pytest.approx(alone, abs=1e-3)
    assert (tmp_path / "final" / "lit_model.pth").is_file()


@pytest.mark.parametrize(
    ("step", "strategy"),
    [
        pytest.param("dpo", "ddp", marks=pytest.mark.slow),  # rows of pairs are shared out as grpo's are
        pytest.param("dpo", "fsdp", marks=SHARDED),
        pytest.param("reward", "fsdp", marks=SHARDED),
        ("grpo", "ddp"),
        pytest.param("grpo", "fsdp", marks=SHARDED),
        pytest.param("ppo", "ddp", marks=pytest.mark.slow),  # its rollouts are grpo's
    ],
)
def test_alignment_in_two_processes_follows_one(step, strategy, tiny_llama, pairs, questions, tmp_path):
    # small steps: a number that rounds the other way must not sample another token
    train = replace(alignment.TRAIN, max_steps=6, max_seq_length=128, learning_rate=1e-3)
    data = pairs if step in ("dpo", "reward") else questions
    options: dict[str, Any] = {"precision": "32-true", "lora_r": 4}
    if step != "reward":
        options["max_new_tokens"] = 10
    if data is questions:
        options["rewards"] = [WeightedReward(f"{alignment.__name__}.early_letters")]
    if step == "grpo":
        options |= {"group_size": 4, "updates": 2, "flat_groups": "resample", "missing_eos_penalty": 0.1}
    module = {"dpo": dpo_step, "reward": reward_step, "grpo": grpo_step, "ppo": ppo_step}[step]
    module.setup(checkpoint_dir=tiny_llama, data=data, out_dir=tmp_path / "one", train=train, **options)
    command = [sys.executable, "-m", "workflows", step, "--devices", "2", "--strategy", strategy]
    given = {**options, "checkpoint_dir": tiny_llama, "data": data, "out_dir": tmp_path / "two"}
    if "rewards" in given:
        given["rewards"] = json.dumps([vars(entry) for entry in options["rewards"]])
    command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
    run = subprocess.run([*command, "--train", json.dumps(vars(train))], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    if step == "grpo":  # the old policy is computed as the updates compute theirs, by each process with its part
        assert all(row["log_ratio_max"] == 0 for row in alignment.log_of(tmp_path / "two")[::2])
    one, two = (alignment.on_test_split(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) >= (1 if step == "reward" else 3)
    for name, row in one.items():
        assert two[name]["value"] == pytest.approx(row["value"], abs=5e-3)


def test_device_problems_are_all_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_problems("auto", "auto", 1, "auto", 8) == []
    assert "--devices 3: this machine has 2 GPUs" in device_problems("cuda", 3, 1, "ddp", 8)[0]
    assert "at least 1, not 0" in device_problems("cuda", 0, 1, "ddp", 8)[0]
    assert "4 processes" in device_problems("auto", 2, 2, "fsdp", 3)[0]
    assert device_problems("cpu", 4, 1, "ddp", 8) == []


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "lora"}
SLURM |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "12345"}


@pytest.mark.parametrize("launcher", [TORCHRUN, SLURM])
@pytest.mark.parametrize(("devices", "num_nodes"), [(4, 1), (2, 2), (1, 1)])
def test_a_launcher_that_started_other_processes_is_told(launcher, devices, num_nodes, monkeypatch):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=rf"--nproc_per_node {devices} --nnodes {num_nodes}, SLURM --ntasks-per-node={devices}"
    ):
        make_fabric(devices, num_nodes, accelerator="cpu")


def test_slurm_without_tasks_per_node_is_told(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UserError, match="--ntasks-per-node=2"):
        make_fabric(2, 1, "fsdp", "cpu")
