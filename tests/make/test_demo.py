"""The chain of `make demo` as one finds it: its stages in turn, what it goes on from, and what other data lacks."""

import json

import pytest

from tests.make.project import Project, option

pytestmark = pytest.mark.long

REPLAY = "data/general-smollm2-135m_taught"
CHAIN = [
    ("data", "assistant"), ("data", "general"), ("download", "smollm2-135m"), ("teach", REPLAY),
    ("lora", "data/assistant"), ("panel", "[base,lora]"), ("dpo", "data/assistant_pairs"),
    ("grpo", "data/assistant_questions"), ("data", "hpo"), *[("evaluate", f"out/demo/evaluate/{stage}") for stage in
    ("base", "lora", "dpo", "grpo")], ("export", "out/demo/grpo/final"), ("demo", "[lora,dpo,grpo]"), ("demo", "true"),
]  # fmt: skip
"""The steps in turn, each with an argument that it must have."""


def test_the_demo_teaches_an_assistant_stage_by_stage(default_project: Project):
    calls = default_project.calls("demo")
    assert [call[0] for call in calls] == [step for step, _ in CHAIN]
    for call, (_, argument) in zip(calls, CHAIN, strict=True):
        assert argument in call
    by_step = {call[0]: call for call in calls}
    assert option(by_step["teach"], "--data") == "data/general"
    assert option(by_step["lora"], "--replay") == REPLAY and "--kinds" not in by_step["lora"]
    for step in ("lora", "dpo", "grpo", "evaluate"):
        assert option(by_step[step], "--config") == f"workflows/recipes/smollm2-135m/{step}-assistant.yaml"
    tasks = {option(call, "--out_dir"): option(call, "--tasks") for call in calls if call[0] == "evaluate"}
    exam = f"assistant_questions,{REPLAY.removeprefix('data/')}"
    assert tasks["out/demo/evaluate/base"] == tasks["out/demo/evaluate/grpo"] == f"[{exam},hpo_mcq]"
    assert tasks["out/demo/evaluate/lora"] == tasks["out/demo/evaluate/dpo"] == f"[{exam}]"
    prepared = f"[data/assistant,data/general,{REPLAY},data/hpo_mcq]"
    assert option(calls[-2], "--prepared") == prepared and "--scored" not in calls[-2]
    assert default_project.calls("demo") == [["demo", "--run_dir", "out/demo", "--show", "true"]]


def test_each_stage_is_announced_once_before_it_begins(default_project: Project):
    default_project.calls("demo")
    announced = default_project.announced()
    names = ["data", "download", "replay", "lora", "dpo", "grpo", "evaluate", "export"]
    assert [option(call, "--name") for call in announced] == names
    assert {option(call, "--stages") for call in announced} == {f"[{','.join(names)}]"}
    default_project.calls("lora", "RUN=other")
    assert default_project.announced() == announced  # a step alone is no stage of a demo


@pytest.mark.parametrize("number", range(len(CHAIN)), ids=[f"{step}-{argument}" for step, argument in CHAIN])
def test_a_demo_that_was_stopped_in_any_step_goes_on_with_it(default_project: Project, number: int):
    stopped = default_project.root / "fails.json"
    stopped.write_text(json.dumps(CHAIN[number]))
    assert default_project.make("demo").returncode != 0
    stopped.unlink()
    assert default_project.steps("demo") == [step for step, _ in CHAIN[number:]]
    assert default_project.steps("demo") == ["demo"]


def test_another_model_answers_the_general_prompts_itself(default_project: Project):
    default_project.calls("demo")
    model = "MODEL=org/it's mine"
    calls = {call[0]: call for call in default_project.calls("demo", model, "RUN=other")}
    replay = "data/general-org--it-s-mine_taught"
    assert option(calls["teach"], "--out_dir") == option(calls["lora"], "--replay") == replay
    assert f"[assistant_questions,{replay.removeprefix('data/')},hpo_mcq]" in calls["evaluate"]
    assert option(calls["grpo"], "--config") == "workflows/recipes/default/grpo-assistant.yaml"  # rewards for its rules
    assert "data" not in calls
    assert default_project.calls("lora", "RUN=third") and not default_project.steps("lora", "RUN=third")


def test_the_models_own_answers_are_made_again_when_the_prompts_or_the_model_are_others(default_project: Project):
    default_project.calls("lora")
    assert default_project.steps("lora", "RUN=second") == ["lora"]  # runs of a model share its answers
    (default_project.root / "data" / "general" / "manifest.json").touch()
    assert default_project.steps("lora") == ["teach", "lora"]
    (default_project.root / "checkpoints" / ".paths" / "smollm2-135m").touch()
    assert default_project.steps("lora") == ["teach", "lora"]


@pytest.mark.parametrize(
    ("arguments", "steps", "replay"),
    [
        (["REPLAY="], ["data", "download", "lora"], None),
        (["TRAINER=litgpt"], ["data", "download", "lora"], None),
        (["DATA=hpo"], ["data", "download", "lora"], None),
        (["DATA=hpo", "REPLAY=general"], ["data", "download", "data", "teach", "lora"], REPLAY),
        (["REPLAY=mine"], ["data", "download", "lora"], "data/mine"),
    ],
)
def test_replay_is_chosen(default_project: Project, arguments: list[str], steps: list[str], replay: str | None):
    (default_project.root / "data" / "mine").mkdir(parents=True)
    (default_project.root / "data" / "mine" / "manifest.json").touch()
    calls = default_project.calls("lora", *arguments)
    assert [call[0] for call in calls] == steps
    assert (option(calls[-1], "--replay") if "--replay" in calls[-1] else None) == replay
    assert default_project.steps("lora", *arguments) == []


def test_replay_that_is_not_there_is_asked_for(default_project: Project):
    result = default_project.make("lora", "REPLAY=yours")
    assert result.returncode != 0 and "there is no data/yours" in result.stderr
    (default_project.root / "fails.json").write_text(json.dumps(["teach", REPLAY]))
    result = default_project.make("lora")
    assert result.returncode != 0 and "`make ... REPLAY=` trains without such answers" in result.stderr


def test_a_demo_of_own_data_leaves_out_what_it_lacks(default_project: Project):
    (default_project.root / "data" / "mine").mkdir(parents=True)
    (default_project.root / "data" / "mine" / "manifest.json").touch()
    calls = default_project.calls("demo", "DATA=mine", "RUN=mine")
    assert [call[0] for call in calls] == ["download", "lora", "panel", "export", "demo", "demo"]
    assert option(calls[-2], "--prepared") == "[data/mine]" and option(calls[-2], "--scored") == "false"
    (first, *_) = default_project.announced()
    assert option(first, "--stages") == "[data,download,lora,export]"


def test_other_scores_take_the_place_of_all_that_the_demo_asks(default_project: Project):
    calls = default_project.calls("evaluate", "TASKS=medical")
    assert {option(call, "--tasks") for call in calls if call[0] == "evaluate"} == {"[medical]"}
    assert ["data", "--data", "hpo"] not in calls


def test_what_ollama_serves_is_scored_on_questions_with_options(default_project: Project):
    calls = default_project.calls("evaluate-ollama", "NAME=other")
    assert option(calls[-1], "--tasks") == "[hpo_mcq]" and ["data", "--data", "hpo"] in calls


def test_set_up_says_what_it_installs_before_it_does(default_project: Project):
    (default_project.root / "pyproject.toml").write_text("x")
    shown = default_project.make("-n", "setup", "INSTALLED=missing").stdout
    assert shown.index("setup: builds .venv") < shown.index("pip install") and "GB" in shown
