"""What is told of steps that run, were stopped or have ended."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.workflows.alignment import TRAIN, pair, write
from workflows import lora
from workflows.__main__ import main
from workflows.files import write_json
from workflows.progress import HOST, PROGRESS
from workflows.status import StepStatus, status_of, step_folders

LOG = "step,loss,tokens_per_second\n1,3.5,100\n2,3.0,\n3,2.5,200\n4,2.0,300\n"


def told(folder: Path, **changes: Any) -> None:
    """Write what a running step has written: this very process, 4 of 10 steps after 8 seconds."""
    now = time.time()
    facts = {"command": "python -m workflows lora --out_dir x", "host": HOST, "pid": os.getpid()}
    facts |= {"born": psutil.Process().create_time(), "what": "", "unit": "step", "done": 4, "total": 10, "first": 0}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRESS).write_text(json.dumps({**facts, "began": now - 8, "updated": now, "told": "", **changes}))


def checkpoint(folder: Path, step: int) -> None:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / f"step-{step:08d}.pth").touch()


@pytest.fixture
def step(tmp_path: Path) -> Path:
    folder = tmp_path / "out" / "demo" / "lora"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(LOG)
    return folder


def status(step: Path) -> StepStatus:
    return status_of(step, step.parents[1])


def test_a_step_that_runs(step):
    told(step)
    checkpoint(step, 2)
    found = status(step)
    assert (found.name, found.state, found.done, found.total) == ("demo/lora", "running", 4, 10)
    assert (found.loss, found.tokens_per_second, found.checkpoint, found.keeps) == (2.0, 200.0, 2, "")
    assert found.left == pytest.approx(12, abs=0.5)  # 6 steps at 2 seconds


def test_speed_is_this_sessions(step):
    told(step, done=40, total=50, first=38)  # two steps in eight seconds
    assert status(step).left == pytest.approx(40, abs=0.5)


@pytest.mark.parametrize(("steps", "keeps"), [([], "begins anew"), ([2, 4], "goes on from step 4")])
def test_a_step_that_was_stopped(step, capsys, steps, keeps):
    told(step, pid=2**22 + 1)  # above the largest number that Linux gives out
    for number in steps:
        checkpoint(step, number)
    found = status(step)
    assert (found.state, found.keeps, found.left) == ("stopped", keeps, None)
    assert main(["status", "--out_dir", str(step.parents[1])]) == 0
    out = capsys.readouterr().out
    assert f"demo/lora {keeps}:\n  python -m workflows lora --out_dir x\n" in out


def test_a_process_number_that_was_given_out_anew_is_another_process(step):
    told(step, born=psutil.Process().create_time() - 1000)
    assert status(step).state == "stopped"


def test_a_step_on_another_machine_is_judged_by_its_last_sign(step):
    told(step, host="elsewhere", pid=2**22 + 1)
    assert status(step).state == "running"
    told(step, host="elsewhere", updated=time.time() - 3600)
    assert status(step).state == "stopped"


def test_a_step_that_does_something_else_first_says_so(step, capsys):
    told(step, what="reference", unit="row", done=30, total=40)
    assert main(["status", "--out_dir", str(step.parents[1]), "--run", "demo"]) == 0
    assert "running (reference)" in (out := capsys.readouterr().out) and "30 of 40 rows" in out


def test_a_step_that_has_just_begun_has_no_numbers_yet(step):
    (step / "metrics.csv").unlink()
    told(step)
    facts = json.loads((step / PROGRESS).read_text())
    (step / PROGRESS).write_text(
        json.dumps({name: facts[name] for name in ("command", "host", "pid", "born", "updated")})
    )
    found = status(step)
    assert (found.state, found.done, found.total, found.left) == ("running", None, None, None)


def test_half_a_line_of_a_growing_log_is_left_out(step):
    (step / "metrics.csv").write_text(LOG + "5,1.")
    assert (status(step).loss, status(step).done) == (2.0, 4)


def test_evaluations_exports_and_answers_are_steps_too(tmp_path):
    out = tmp_path / "out"
    told(out / "demo" / "evaluate" / "base", pid=2**22 + 1, unit="row")
    (out / "demo" / "evaluate" / "base" / "unfinished.jsonl").touch()
    write_json(out / "demo" / "ollama" / "metrics.json", {"metrics": [], "seconds": 1.0})
    told(out / "demo" / "taught.unfinished", pid=2**22 + 1, unit="answer")
    (out / "demo" / "taught.unfinished" / "answers.jsonl").touch()
    write_json(out / "demo" / "lora" / "final" / "provenance.json", {})
    (out / "demo" / "ollama" / "hf").mkdir()
    found = {s.name: s for s in (status_of(folder, out) for folder in step_folders(out))}
    states = {name: (s.state, s.keeps) for name, s in found.items()}
    assert states == {
        "demo/evaluate/base": ("stopped", "keeps what is answered"),
        "demo/lora": ("finished", ""),
        "demo/ollama": ("finished", ""),
        "demo/taught.unfinished": ("stopped", "keeps what is answered"),
    }


@pytest.mark.long
def test_a_real_run_that_has_ended(tiny_llama, tmp_path, capsys):
    rows = [{"messages": [*pair(n)["prompt"], *pair(n)["chosen"]]} for n in range(12)]
    data = write(tmp_path / "chats", train=rows, validation=rows[:2])
    lora.setup(tiny_llama, data, tmp_path / "out" / "mine" / "lora", train=TRAIN, precision="32-true", lora_r=2)
    capsys.readouterr()
    assert main(["status", "--out_dir", str(tmp_path / "out")]) == 0
    head, line = capsys.readouterr().out.splitlines()
    made = json.loads((tmp_path / "out" / "mine" / "lora" / "final" / "metrics.json").read_text())
    assert head.split()[:3] == ["step", "state", "done"]
    assert line.startswith("mine/lora  finished  6 of 6 steps")
    assert f"{made['metrics'][0]['value']:.3f}" in line and f"{made['tokens_per_second']:,.0f}" in line


def test_nothing_there_is_said(tmp_path, capsys):
    assert main(["status", "--out_dir", str(tmp_path / "out")]) == 1
    assert "nothing has run yet. Begin with `make demo`" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert main(["status", "--out_dir", str(tmp_path / "out")]) == 0
    assert "No step has left anything" in capsys.readouterr().out


def test_a_run_that_is_not_there_is_told_with_those_that_are(step, capsys):
    (step.parents[1] / "other").mkdir()
    assert main(["status", "--out_dir", str(step.parents[1]), "--run", "dmo"]) == 1
    assert re.search(
        r"There is no run in .*dmo\. Did you mean demo\? In .* there are: demo, other\.", capsys.readouterr().err
    )


DAMAGED = [
    ("metrics.csv", b"step,loss\none,2\n", "is not a log of training steps"),
    ("metrics.csv", b"loss\n2\n", "is not a log of training steps"),
    ("metrics.csv", b"step,loss\n1,2,3\n", "is not a log of training steps"),
    ("metrics.csv", b"step,loss\nnan,2\n", "is not a log of training steps"),
    ("metrics.csv", b"step,loss\ninf,2\n", "is not a log of training steps"),
    ("metrics.csv", b"step,loss\n1,2\xff\n", "is not UTF-8 text"),
    (PROGRESS, b"{", "not valid JSON"),
    (PROGRESS, b"{}", "is not what a step writes (command: field required)"),
    (PROGRESS, {"updated": None}, "(updated: input should be a valid number)"),
    (PROGRESS, {"updated": 1e300}, "(updated: input should be less than"),
    (PROGRESS, {"pid": -5}, "(pid: input should be greater than 0)"),
    (PROGRESS, {"pid": "5"}, "(pid: input should be a valid integer)"),
    (PROGRESS, {"done": "4"}, "(done: input should be a valid integer)"),
    (PROGRESS, {"first": 10**400}, "(first: input should be less than"),
    ("final/metrics.json", b'{"metrics": null, "seconds": 1}', "(metrics: input should be a valid list)"),
    ("final/metrics.json", b'{"metrics": [{"value": 1}], "seconds": 1}', "(metrics.0.name: field required)"),
    ("final/metrics.json", b'{"metrics": [], "seconds": 1, "tokens_per_second": "x"}', "(tokens_per_second: "),
]
"""A step's file, what stands in it (or what is different there), and what is told of it."""


@pytest.mark.parametrize(("file", "content", "message"), DAMAGED)
def test_a_damaged_file_is_named_and_hides_no_other_step(step, capsys, file, content, message):
    told(step.with_name("dpo"), what="sampling")
    (damaged := step / file).parent.mkdir(exist_ok=True)
    if file.startswith("final"):
        write_json(step / "final" / "provenance.json", {})
    if isinstance(content, bytes):
        damaged.write_bytes(content)
    else:
        told(step, **content)
    assert main(["status", "--out_dir", str(step.parents[1])]) == 1
    shown = capsys.readouterr()
    assert "demo/dpo  running (sampling)" in shown.out and "demo/lora" not in shown.out
    (line,) = shown.err.splitlines()
    assert line.startswith(f"error: {damaged}") and message in line


def test_files_that_are_no_checkpoints_are_passed_over(step):
    checkpoint(step, 2)
    for name in ("step-x.pth", "step-00000004.part.pth", "step-00000005.pth.txt"):
        (step / "checkpoints" / name).touch()
    assert status(step).checkpoint == 2


def test_a_clock_that_is_ahead_is_said(step, capsys):
    told(step, updated=time.time() + 7200)
    assert main(["status", "--out_dir", str(step.parents[1])]) == 0
    assert re.search(r" (1 h 59|2 h 0) min ahead$", capsys.readouterr().out.rstrip())
    told(step, host="elsewhere", updated=time.time() + 7200)
    assert status(step).state == "stopped"


def test_numbers_that_are_none_are_shown_as_they_are(step, capsys):
    (step / "metrics.csv").write_text("step,loss,tokens_per_second\n1,nan,inf\n")
    assert main(["status", "--out_dir", str(step.parents[1])]) == 0
    assert re.search(r"nan +inf", capsys.readouterr().out)


def test_a_link_to_the_figures_of_a_step_is_no_step(tmp_path):
    model = tmp_path / "ner" / "bc5cdr" / "scratch"
    model.mkdir(parents=True)
    (model / "metrics.json").write_text("{}")
    (tmp_path / "ner" / "metrics.json").symlink_to("bc5cdr/scratch/metrics.json")
    assert list(step_folders(tmp_path)) == [model]
