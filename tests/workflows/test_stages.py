"""What `make demo` says before a stage: its number, and times by what was measured and how fast this machine is."""

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.make.project import Project
from workflows.__main__ import main
from workflows.checkpoint import write_metrics
from workflows.stages import ABOUT, SECONDS, WITHOUT, left_out, relative_speed, rough

ALL = list(SECONDS["assistant"])


def announced(capsys: pytest.CaptureFixture[str], name: str, run_dir: Path, *more: str, stages: list[str] = ALL) -> str:
    model = [] if "--model" in more else ["--model", "smollm2-135m"]
    arguments = ["stage", "--name", name, "--stages", f"[{','.join(stages)}]", "--run_dir", str(run_dir), *model]
    assert main([*arguments, "--data", "assistant", *more]) == 0
    return capsys.readouterr().out


def test_a_stage_has_its_number_and_the_time_that_is_left(tmp_path: Path, capsys):
    minutes = [round(sum(SECONDS["assistant"][stage] for stage in part) / 60) for part in (["lora"], ALL[3:])]
    told = announced(capsys, "lora", tmp_path)
    assert told == f"\nstage 4 of 8: lora, about {minutes[0]} minutes; {minutes[1]} minutes left\n  {ABOUT['lora']}\n"
    assert "stage 8 of 8: export, about 2 minutes, the last" in announced(capsys, "export", tmp_path)


def test_a_machine_that_was_twice_as_slow_so_far_is_taken_to_stay_so(tmp_path: Path, capsys):
    measured = SECONDS["assistant"]
    replay = tmp_path / "taught"
    write_metrics(replay / "metrics.json", [], seconds=2 * measured["replay"])
    lora = announced(capsys, "lora", tmp_path, "--replay", str(replay))
    assert f"about {round(2 * measured['lora'] / 60)} minutes; " in lora
    write_metrics(tmp_path / "lora" / "final" / "metrics.json", [], seconds=2 * measured["lora"])
    dpo = announced(capsys, "dpo", tmp_path, "--replay", str(replay))
    assert f"; {round(2 * sum(measured[stage] for stage in ALL[4:]) / 60)} minutes left" in dpo
    assert relative_speed({"data": 0.0, "lora": 3.0, "dpo": 1.0}, {"data": 9.0, "lora": 1.0, "dpo": 1.0}) == 2.0
    assert relative_speed({}, measured) == 1.0


def test_nothing_is_estimated_for_what_was_not_measured(tmp_path: Path, capsys):
    assert announced(capsys, "lora", tmp_path, "--model", "llama-3.2-1b").startswith("\nstage 4 of 8: lora\n")
    assert announced(capsys, "lora", tmp_path, "--data", "mine").startswith("\nstage 4 of 8: lora\n")
    assert announced(capsys, "ppo", tmp_path, stages=["data", "lora", "ppo"]).endswith(f": ppo\n  {ABOUT['ppo']}\n")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "10 seconds"), (44, "40 seconds"), (89, "90 seconds"), (90, "2 minutes"), (265, "4 minutes")],
)
def test_times_are_rough(seconds: float, said: str):
    assert rough(seconds) == said


def test_what_the_data_lacks_is_said_before_the_first_training(tmp_path: Path, capsys):
    stages = ["data", "download", "lora", "export"]
    assert "left out" not in announced(capsys, "data", tmp_path, stages=stages)
    told = announced(capsys, "lora", tmp_path, stages=stages)
    assert [line.split(",")[0] for line in told.splitlines()[1:5]] == [f"left out: {stage}" for stage in WITHOUT]
    assert left_out(ALL) == [] and len(left_out(stages)) == 4


@pytest.mark.long
def test_every_stage_of_the_makefile_is_known_here(tmp_path: Path):
    project = Project(ROOT)
    for data, arguments in {"assistant": [], "hpo": ["DATA=hpo"]}.items():
        listed = project.make("--eval", "list: ; @echo $(STAGED)", "list", "-s", "STAGES=lora dpo grpo", *arguments)
        assert listed.stdout.split() == list(SECONDS[data])
