"""Which steps make runs, which of them are stale, and which one gets ARGS."""

import re

import pytest

from tests.make.project import Project, option

pytestmark = pytest.mark.long

DEMO = ["data", "download", "lora", "panel", "dpo", "grpo", *["evaluate"] * 4, "export", "demo", "demo"]


def test_the_demo_runs_each_step_once_and_then_only_shows_its_summary(project: Project):
    calls = project.calls("demo")
    assert [call[0] for call in calls] == DEMO
    by_step = {call[0]: call for call in calls}
    assert option(by_step["dpo"], "--checkpoint_dir") == "out/demo/lora/final"
    assert option(by_step["dpo"], "--data") == "data/hpo_pairs"
    assert option(by_step["grpo"], "--checkpoint_dir") == "out/demo/dpo/final"
    assert option(by_step["grpo"], "--data") == "data/hpo" and option(by_step["grpo"], "--kinds") == "[name]"
    assert option(by_step["export"], "--checkpoint_dir") == "out/demo/grpo/final"
    assert option(calls[-2], "--stages") == "[lora,dpo,grpo]"
    assert project.calls("demo") == [["demo", "--run_dir", "out/demo", "--show", "true"]]


def test_a_later_step_of_a_demo_keeps_its_short_settings_until_it_is_asked_for_itself(project: Project):
    short = next(call for call in project.calls("demo") if call[0] == "grpo")
    assert "--train.max_steps" in short
    assert project.steps("evaluate") == project.steps("export") == []
    (again,) = project.calls("grpo")
    assert again[0] == "grpo" and "--train.max_steps" not in again


@pytest.mark.parametrize(
    ("goals", "steps", "origins"),
    [
        (["dpo"], ["lora", "dpo"], {"dpo": "out/demo/lora/final"}),
        (["dpo", "STAGES=dpo"], ["dpo"], {"dpo": "checkpoints/made/up"}),
        (["grpo"], ["lora", "grpo"], {"grpo": "out/demo/lora/final"}),
        (["dpo", "grpo"], ["lora", "dpo", "grpo"], {"grpo": "out/demo/dpo/final"}),
        (["reward"], ["lora", "reward"], {"reward": "out/demo/lora/final"}),
        (["ppo"], ["lora", "reward", "ppo"], {"ppo": "out/demo/lora/final"}),
        (["dpo", "PAIRS=orca"], ["lora", "dpo"], {}),
        (["dpo", "DATA=orca"], ["dpo"], {"dpo": "checkpoints/made/up"}),
        (["shrink"], ["lora", "shrink"], {"shrink": "out/demo/lora/final"}),
        (["distill-lm"], ["lora", "shrink", "distill-lm"], {"distill-lm": "out/demo/shrink/final"}),
        (["distill-lm", "STAGES="], ["shrink", "distill-lm"], {"shrink": "checkpoints/made/up"}),
        (["teach"], ["lora", "teach"], {"teach": "out/demo/lora/final"}),
        (
            ["export", "STAGES=lora distill-lm"],
            ["lora", "shrink", "distill-lm", "export"],
            {"export": "out/demo/distill-lm/final"},
        ),
        (["merge", "STAGES=lora dpo"], ["lora", "dpo", "merge"], {"merge": "out/demo/dpo/final"}),
    ],
)
def test_a_training_step_goes_on_from_the_one_before_it(project: Project, goals, steps, origins):
    calls = {call[0]: call for call in project.calls(*goals)}
    assert [step for step in calls if step not in ("data", "download")] == steps
    for step, origin in origins.items():
        assert option(calls[step], "--checkpoint_dir") == origin


def test_a_step_that_has_run_stays_part_of_its_run(project: Project):
    project.calls("dpo")
    assert project.steps("evaluate") == ["evaluate"] * 3
    assert option(project.calls("export")[0], "--checkpoint_dir") == "out/demo/dpo/final"


def test_ppo_is_judged_by_the_runs_reward_model(project: Project):
    calls = project.calls("ppo")
    assert option(calls[-1], "--rewards") == "[{reward: out/demo/reward/final}]"
    assert option(calls[-1], "--data") == "data/hpo_pairs"


def test_a_student_learns_beside_its_teacher_or_from_answers_that_it_wrote(project: Project):
    calls = {call[0]: call for call in project.calls("distill-lm")}
    assert option(calls["distill-lm"], "--teacher_dir") == "out/demo/lora/final"
    assert option(calls["distill-lm"], "--data") == "data/hpo" and option(calls["distill-lm"], "--kinds") == "[name]"
    assert "--divergence" not in calls["distill-lm"] and project.steps("distill-lm") == []
    calls = {call[0]: call for call in project.calls("distill-lm", "ANSWERS=teacher")}
    assert list(calls) == ["teach", "distill-lm"]
    assert option(calls["teach"], "--data") == "data/hpo" and option(calls["teach"], "--out_dir") == "out/demo/taught"
    assert (
        option(calls["distill-lm"], "--data") == "out/demo/taught"
        and option(calls["distill-lm"], "--divergence") == "none"
    )
    assert project.steps("distill-lm", "ANSWERS=teacher") == []
    assert 'ANSWERS is data or teacher, not "mine"' in project.refusal("distill-lm", "ANSWERS=mine")


def test_a_teacher_that_is_no_stage_is_the_model(project: Project):
    (call,) = (call for call in project.calls("distill-lm", "STAGES=") if call[0] == "distill-lm")
    assert option(call, "--teacher_dir") == "checkpoints/made/up"


def test_a_teacher_that_was_trained_anew_makes_its_student_stale(project: Project):
    project.calls("distill-lm")
    assert project.steps("distill-lm", "TRAINER=litgpt") == ["lora", "shrink", "distill-lm"]


def test_without_preferences_dpo_says_where_they_come_from(project: Project):
    for goal in ("dpo", "ppo", "reward"):
        message = project.refusal(goal, "DATA=medquad")
        assert "medquad has no preferences" in message and "PAIRS=orca" in message


@pytest.mark.parametrize("step", ["lora", "evaluate", "export"])
def test_args_reach_only_the_step_that_is_named(project: Project, step: str):
    calls = project.calls(step, "ARGS=--limit=100 --note 'a \"b\"'")
    given = [call for call in calls if "--limit=100" in call]
    assert {call[0] for call in given} == {step} and {call[0] for call in calls} > {step}
    assert all(call[-3:] == ["--limit=100", "--note", 'a "b"'] for call in given)
    assert len(given) == (2 if step == "evaluate" else 1)  # base and tuned model are scored alike


def test_a_dry_run_shows_the_same(project: Project):
    commands = project.make("-n", "evaluate", "ARGS=--limit=100").stdout.replace("\\\n", " ").splitlines()
    steps = [line for line in commands if "-m workflows" in line]
    assert ["--limit=100" in line for line in steps] == [" evaluate " in line for line in steps]
    assert sum("-m workflows lora" in line for line in steps) == 1
    project.calls("evaluate")
    assert "-m workflows" not in project.make("-n", "evaluate").stdout


@pytest.mark.parametrize(
    ("goals", "message"),
    [
        (["demo"], r"`make demo` takes no ARGS.*MODEL, DATA, KINDS, PAIRS, STAGES, TASKS.*make lora ARGS="),
        (["lora", "demo"], r"`make demo` takes no ARGS"),
        (["lora", "evaluate"], r"exactly one of: download data lora dpo reward ppo grpo merge evaluate"),
        (["clean"], r"exactly one of: download data lora"),
    ],
)
def test_args_for_several_steps_or_none_are_refused(project: Project, goals: list[str], message: str):
    assert re.search(message, project.refusal(*goals, "ARGS=--train.max_steps 50"))


def test_several_goals_share_variables(project: Project):
    (project.root / "data" / "mine").mkdir(parents=True)
    (project.root / "data" / "mine" / "manifest.json").touch()
    calls = project.calls("lora", "export", "chat", "DATA=mine", "RUN=mine")
    assert [call[0] for call in calls] == ["download", "lora", "export", "chat"]
    assert option(calls[1], "--data") == "data/mine" and option(calls[2], "--out_dir") == "out/mine/ollama"
    assert "--kinds" not in calls[1] and calls[3] == ["chat", "--model", "mine"]


@pytest.mark.parametrize(
    ("goal", "variable", "expected"),
    [
        ("lora", "TRAINER=litgpt", ["lora"]),
        ("lora", "KINDS=", ["lora"]),
        ("lora", "DATA=medquad", ["lora"]),
        ("lora", "MODEL=llama-3.2-1b-instruct", ["lora"]),
        ("lora", "DEVICES=2", []),
        ("lora", "KINDS=name", []),
        ("evaluate", "TASKS=medical", ["evaluate"] * 4),
        ("evaluate", "MODEL=llama-3.2-1b-instruct", ["lora", "dpo", "grpo", *["evaluate"] * 4]),
        ("evaluate", "KINDS=name", []),
        ("grpo", "KINDS=", ["lora", "dpo", "grpo"]),
        ("export", "NAME=other", ["export"]),
        ("demo", "DATA=medquad", ["lora", "panel", "export", "demo", "demo"]),
    ],
)
def test_a_changed_variable_runs_what_it_changes(project: Project, goal: str, variable: str, expected: list[str]):
    # Prepared and downloaded before anything is trained: their files are older than all that follows.
    project.calls("data", "DATA=medquad")
    project.calls("lora", "RUN=earlier", "MODEL=llama-3.2-1b-instruct")
    project.calls("demo")
    assert sorted(project.steps(goal, variable)) == sorted(expected)
    again = project.steps(goal, variable)
    assert again == (["demo"] if goal == "demo" else [])


def test_args_of_a_step_hold_until_it_is_asked_for_without_them(project: Project):
    fewer = "ARGS=--train.max_steps 50"
    assert project.steps("lora", fewer)[-1] == "lora"
    assert project.steps("lora", fewer) == ["lora"]  # ARGS ask for it again
    assert project.steps("export") == ["export"]
    (project.root / "data" / "hpo" / "manifest.json").touch()
    calls = project.calls("export")
    assert [call[0] for call in calls] == ["lora", "export"] and calls[0][-2:] == ["--train.max_steps", "50"]
    calls = project.calls("demo")
    assert [call[0] for call in calls].count("lora") == 1
    assert not any("--train.max_steps" in call for call in calls if call[0] == "lora")
    assert project.steps("demo") == ["demo"]
    project.calls("lora", fewer)
    assert project.steps("lora") == ["lora"]


def test_a_step_that_failed_leaves_what_was_there(project: Project):
    project.calls("export")
    assert project.make("lora", "ARGS=--fail").returncode != 0
    assert project.steps("export") == []


def test_data_that_is_not_there_is_asked_for_before_a_model_is_downloaded(project: Project):
    message = project.refusal("lora", "DATA=mine")
    assert 'there is no data/mine. Prepare it from a file of yours: make data DATA=jsonl ARGS="--file' in message


def test_merge_has_the_run_trained_first(project: Project):
    assert project.steps("merge", "RUN=new")[-2:] == ["lora", "merge"]


def test_a_page_is_about_the_run_or_about_several(project: Project):
    assert project.calls("report", "RUN=mine") == [["report", "--runs", "[mine]"]]
    several = project.calls("report", "RUN=mine", "RUNS=mine other", "ARGS=--out_file page.html")
    assert several == [["report", "--runs", "[mine,other]", "--out_file", "page.html"]]
    assert project.calls("status", "ARGS=--run mine") == [["status", "--run", "mine"]]


def test_every_section_of_help_lists_targets(project: Project):
    sections = project.make("help").stdout.strip().split("\n\n")[1:-1]
    assert len(sections) >= 3 and all("\n  make " in section for section in sections)
