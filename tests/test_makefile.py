"""What make decides: which step gets ARGS, which step is stale, which recipe and which tasks belong to MODEL and DATA.

The real Makefile runs in a folder of its own; a script stands in for Python, notes how it was called, and writes the
file that make waits for.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import yaml

from data_prep import prepare
from tests.conftest import ROOT

pytestmark = pytest.mark.long

STAND_IN = """
import json, sys
from pathlib import Path
from typing import get_args

assert sys.argv[1] == "-m" and sys.argv[2] in ("workflows", "custom_models"), sys.argv
step, *args = sys.argv[3:]
with open("calls.jsonl", "a") as f:
    f.write(json.dumps([step, *args]) + "\\n")
if "--fail" in args:
    sys.exit(1)
made = {
    "download": ("--path_file", ""),
    **{name: ("--out_dir", "final/provenance.json") for name in "lora dpo reward ppo grpo shrink distill-lm".split()},
    "teach": ("--out_dir", "manifest.json"),
    **{name: ("--out_dir", "final/config.json") for name in "sentiment gpt gpt-dpo summarize qa ner translate".split()},
    "evaluate": ("--out_dir", "metrics.json"),
    "export": ("--out_dir", "verification.json"),
}
if step == "data":
    name = args[args.index("--data") + 1]
    file = Path("data", name, "manifest.json")
    if name == "hpo":
        pairs = Path("data", "hpo_pairs", "manifest.json")
        pairs.parent.mkdir(parents=True, exist_ok=True)
        pairs.touch()
elif step == "demo" and "--show" not in args:
    file = Path(args[args.index("--run_dir") + 1], "summary.json")
elif step in made:
    option, name = made[step]
    file = Path(args[args.index(option) + 1], name)
else:
    sys.exit(0)
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text("checkpoints/made/up")
"""


@dataclass
class Project:
    """A folder with the Makefile and what it reads."""

    root: Path

    def make(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run make; `make test` hands its own flags and variables down in the environment, which is left out here."""
        python = f"PY={sys.executable} stand_in.py"
        return subprocess.run(
            ["make", python, "INSTALLED=installed", *args],
            cwd=self.root,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, *args: str) -> list[list[str]]:
        """The steps that `make ARGS` runs, each with its arguments."""
        log = self.root / "calls.jsonl"
        log.unlink(missing_ok=True)
        result = self.make(*args)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def steps(self, *args: str) -> list[str]:
        """The names of the steps that `make ARGS` runs."""
        return [step for step, *_ in self.calls(*args)]

    def refusal(self, *args: str) -> str:
        """What make says when it refuses, before any step has run."""
        (self.root / "calls.jsonl").unlink(missing_ok=True)
        result = self.make(*args)
        assert result.returncode != 0 and not (self.root / "calls.jsonl").exists(), result.stdout
        return result.stderr


@pytest.fixture
def project(tmp_path: Path) -> Project:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("workflows", "custom_models"):
        shutil.copytree(ROOT / folder / "recipes", tmp_path / folder / "recipes")
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(ROOT / "checkpoints" / "registry.yaml", tmp_path / "checkpoints")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    for name in ("pyproject.toml", "constraints.txt", "installed"):
        (tmp_path / name).touch()
    return Project(tmp_path)


def option(call: list[str], name: str) -> str:
    return call[call.index(name) + 1]


DEMO = ["data", "download", "lora", "dpo", "grpo", *["evaluate"] * 4, "export", "demo", "demo"]


def test_the_demo_runs_each_step_once_and_then_only_shows_its_summary(project: Project):
    calls = project.calls("demo")
    assert sorted(call[0] for call in calls) == sorted(DEMO)
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
        ("demo", "DATA=medquad", ["lora", "export", "demo", "demo"]),
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


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("smollm2-135m", "smollm2-135m"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("embedded", "smollm2-135m"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct"),
        ("llama-3.3-8b", "llama-3.1-8b-instruct"),  # the same weights
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "deepseek-r1-distill-llama-8b"),
        ("llama-3.2-3b-instruct", "llama-3.2-3b-instruct"),
        ("smollm2-1.7b-instruct", "default"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "default"),
        ("models/it's mine.gguf", "default"),
    ],
)
def test_the_recipe_follows_the_model_however_it_is_named(project: Project, model: str, recipe: str):
    shown = project.make("-n", "lora", f"MODEL={model}").stdout
    assert re.findall(r"lora --config workflows/recipes/(\S+)/lora.yaml", shown) == [recipe]


def test_hardware_chooses_the_recipe_and_the_number_of_devices(project: Project):
    run = ("MODEL=llama-3.1-8b-instruct", "DATA=medqa")
    for hardware, devices in (("24gb", "1"), ("80gb", "1"), ("8x80gb", "8")):
        *_, lora = project.calls("lora", *run, f"HARDWARE={hardware}")  # other hardware's settings: done again
        assert option(lora, "--config") == f"workflows/recipes/llama-3.1-8b-instruct/lora-{hardware}.yaml"
        assert option(lora, "--devices") == devices
    assert project.calls("lora", *run, "HARDWARE=8x80gb", "NODES=2", "DEVICES=4") == []  # how fast, not which result
    *_, dpo = project.calls("dpo", *run, "HARDWARE=24gb", "PAIRS=ultramedical_preference", "STAGES=dpo")
    assert option(dpo, "--config") == "workflows/recipes/llama-3.1-8b-instruct/dpo.yaml"  # there is no other


def test_hardware_that_a_model_has_no_recipes_for_is_refused(project: Project):
    said = project.refusal("lora", "HARDWARE=80gb")
    assert "smollm2-135m has no recipes for HARDWARE=80gb" in said and "llama-3.1-8b-instruct/lora-80gb" in said
    assert "has no recipes for HARDWARE=4x4gb" in project.refusal("lora", "MODEL=llama-3.3-8b", "HARDWARE=4x4gb")
    assert project.make("help", "HARDWARE=80gb").returncode == 0


def test_a_models_path_may_have_spaces_and_quotes(project: Project):
    model = "my models/it's mine.gguf"
    _, download, lora = project.calls("lora", f"MODEL={model}")
    assert download == ["download", "--model", model, "--path_file", "checkpoints/.paths/my-models--it-s-mine.gguf"]
    assert lora[lora.index("--checkpoint_dir") + 1] == "checkpoints/made/up"


def test_a_changed_gguf_is_downloaded_again(project: Project):
    model = project.root / "mine.gguf"
    model.write_text("first")
    assert project.steps("lora", "MODEL=mine.gguf") == ["data", "download", "lora"]
    assert project.steps("lora", "MODEL=mine.gguf") == []
    newer = time.time() + 10
    os.utime(model, (newer, newer))
    assert project.steps("lora", "MODEL=mine.gguf")[0] == "download"


@pytest.mark.parametrize("variable", ["RUN", "DATA", "NAME"])
def test_names_of_files_take_no_spaces(project: Project, variable: str):
    result = project.make("lora", f"{variable}=my own")
    assert result.returncode != 0 and "no spaces" in result.stderr


def test_several_tasks_and_kinds_become_lists(project: Project):
    calls = {step: args for step, *args in project.calls("evaluate", "TASKS=hpo_mcq medical", "KINDS=name signs")}
    assert calls["evaluate"][calls["evaluate"].index("--tasks") + 1] == "[hpo_mcq,medical]"
    assert calls["lora"][calls["lora"].index("--kinds") + 1] == "[name,signs]"


def test_recipes_are_named_after_models_of_the_registry():
    registry = yaml.safe_load((ROOT / "checkpoints" / "registry.yaml").read_text())
    first: dict[str, str] = {}
    for name, entry in registry.items():
        first.setdefault(entry["hub_id"], name)
    names = {path.name for path in (ROOT / "workflows" / "recipes").iterdir()}
    assert names - {"default"} <= set(first.values())


@pytest.mark.parametrize(
    ("data", "task"),
    [("hpo", "hpo_mcq"), ("pubmedqa", "pubmedqa_local"), ("medqa", "medqa_local"), ("medmcqa", "medmcqa_local")],
)
def test_data_with_scoring_questions_is_scored_on_them(project: Project, data: str, task: str):
    from workflows.evaluation.tasks import local_file

    evaluated = [call for call in project.calls("evaluate", f"DATA={data}") if call[0] == "evaluate"]
    assert [option(call, "--tasks") for call in evaluated] == [f"[{task}]"] * 2
    assert local_file(task, Path("data")) == Path(f"data/{data}_mcq/test.jsonl")


def test_own_data_with_scoring_questions_is_scored_on_them(project: Project):
    for name in ("mine/manifest.json", "mine_mcq/test.jsonl"):
        (project.root / "data" / name).parent.mkdir(parents=True)
        (project.root / "data" / name).touch()
    calls = project.calls("evaluate", "DATA=mine")
    assert {option(call, "--tasks") for call in calls if call[0] == "evaluate"} == {"[mine_mcq]"}


def test_the_demo_works_on_data_without_scoring_questions(project: Project):
    calls = project.calls("demo", "DATA=medquad")
    assert [call[0] for call in calls] == ["data", "download", "lora", "export", "demo", "demo"]
    assert option(calls[-2], "--scored") == "false"
    assert "--scored" not in [arg for call in project.calls("demo", "RUN=x") for arg in call]


def test_evaluate_says_beforehand_that_there_is_nothing_to_score_on(project: Project):
    assert "medquad has no questions with options" in project.refusal("lora", "evaluate", "DATA=medquad")
    assert "evaluate" in project.steps("evaluate", "DATA=medquad", "TASKS=medical")


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


def test_projects_read_reviews_and_write_folders_of_their_own(project):
    data, scratch = project.calls("sentiment", "TEXT=it's")
    assert data == ["data", "--data", "movie_snippets"]
    assert option(scratch, "--config").endswith("sentiment-scratch.yaml")
    assert option(scratch, "--data") == "data/movie_snippets"
    assert option(scratch, "--out_dir") == "out/sentiment/movie_snippets/scratch"
    (bert,) = project.calls("sentiment", "ENCODER=google-bert/bert-base-uncased", "ARGS=--seeds [1,2]")
    assert option(bert, "--config").endswith("sentiment-pretrained.yaml") and bert[-2:] == ["--seeds", "[1,2]"]
    assert option(bert, "--out_dir") == "out/sentiment/movie_snippets/google-bert--bert-base-uncased"
    assert project.steps("predict", "ENCODER=minilm", "TEXT=good") == ["sentiment", "predict"]  # trained, then asked
    (asked,) = project.calls("predict", "TEXT=it's bad")
    assert option(asked, "--text") == "it's bad"
    assert option(asked, "--checkpoint_dir") == "out/sentiment/movie_snippets/scratch/final"


def test_a_gpt_is_trained_by_its_recipe_and_asked_once_it_is_there(project):
    (call,) = project.calls("gpt", "DEVICES=2", "RECIPE=gpt-shakespeare", "ARGS=--fit.max_steps 9")
    assert option(call, "--config") == "custom_models/recipes/gpt-shakespeare.yaml" and option(call, "--devices") == "2"
    assert option(call, "--out_dir") == "out/gpt-shakespeare" and call[-2:] == ["--fit.max_steps", "9"]
    trained, asked = project.calls("gpt-sample", "PROMPT=it's", "ARGS=--temperature 0")
    assert trained[0] == "gpt" and option(trained, "--out_dir") == "out/gpt" and "--temperature" not in trained
    assert option(asked, "--prompt") == "it's" and option(asked, "--checkpoint_dir") == "out/gpt/final"
    assert project.steps("gpt-sample", "PROMPT=more") == ["gpt-sample"]
    assert project.steps("gpt-sample", "RECIPE=gpt-dpo") == ["data", "gpt-dpo", "gpt-sample"]


def test_a_translator_is_trained_by_the_recipe_of_its_texts(project):
    data, french = project.calls("translate", "ARGS=--seeds [1,2]")
    assert data == ["data", "--data", "catalogues_fr"] and french[-2:] == ["--seeds", "[1,2]"]
    assert option(french, "--data") == "data/catalogues_fr" and option(french, "--config").endswith("/translate.yaml")
    for parallel, recipe in {
        "catalogues_de": "translate",
        "python_javascript": "translate-python_javascript",
        "opus_books_fr": "translate-opus_books",
    }.items():
        _, call = project.calls("translate", f"PARALLEL={parallel}")
        assert option(call, "--config") == f"custom_models/recipes/{recipe}.yaml"
        assert option(call, "--out_dir") == f"out/translate/{parallel}"
    assert project.steps("translate-text", "TEXT=x") == ["translate-text"]  # of the French one, trained above
    assert project.steps("translate-text", "TEXT=x", "PARALLEL=opus_books_de") == [
        "data",
        "translate",
        "translate-text",
    ]
    (project.root / "it's.py").touch()
    program = project.calls("translate-text", "PARALLEL=python_javascript", "FILE=it's.py")[-1]
    assert option(program, "--file") == "it's.py" and "--text" not in program
    (asked,) = project.calls("translate-text", "PARALLEL=catalogues_de", "TEXT=it's %(name)s")
    assert option(asked, "--text") == "it's %(name)s"
    assert option(asked, "--checkpoint_dir") == "out/translate/catalogues_de/final"


def test_entities_are_named_by_the_t5_that_is_asked_for(project, tmp_path):
    data, ner = project.calls("ner", "ARGS=--head tokens")
    assert data == ["data", "--data", "hpo_entities"] and ner[-2:] == ["--head", "tokens"]
    assert option(ner, "--config") == "custom_models/recipes/ner-scratch.yaml"
    assert option(ner, "--data") == "data/hpo_entities" and option(ner, "--out_dir") == "out/ner/hpo_entities/scratch"
    (tmp_path / "bc5cdr").mkdir()
    data, ner = project.calls("ner", f"WORKFLOW_DATA={tmp_path}", "T5=google-t5/t5-small")
    assert option(data, "--raw_dir") == str(tmp_path / "bc5cdr") and option(ner, "--model") == "google-t5/t5-small"
    assert option(ner, "--config") == "custom_models/recipes/ner-pretrained.yaml"
    assert option(ner, "--out_dir") == "out/ner/bc5cdr/google-t5--t5-small"
    assert project.steps("ner-predict", "T5=some/t5", "TEXT=x") == ["ner", "ner-predict"]
    (asked,) = project.calls("ner-predict", "TEXT=it's lithium")
    assert option(asked, "--text") == "it's lithium"
    assert option(asked, "--checkpoint_dir") == "out/ner/hpo_entities/scratch/final"
    (auto,) = project.calls("ner-autotrain", "ARGS=--seeds [1,2]", "PIP_ARGS=--extra-index-url it's")
    assert option(auto, "--config") == "custom_models/recipes/ner-autotrain-scratch.yaml"
    assert option(auto, "--out_dir") == "out/ner-autotrain/hpo_entities/scratch" and auto[-2:] == ["--seeds", "[1,2]"]
    assert "--pip_args=--extra-index-url it's" in auto
    (auto,) = project.calls("ner-autotrain", f"WORKFLOW_DATA={tmp_path}", "T5=google-t5/t5-small")
    assert option(auto, "--model") == "google-t5/t5-small" and option(auto, "--data") == "data/bc5cdr"
    assert option(auto, "--config") == "custom_models/recipes/ner-autotrain-pretrained.yaml"
    assert project.calls("data", "DATA=ncbi_disease") == [["data", "--data", "ncbi_disease"]]
    (pretrained,) = project.calls("pretrain-t5", "ARGS=--file mine.txt")
    assert option(pretrained, "--config") == "custom_models/recipes/pretrain-t5.yaml"
    assert pretrained[-2:] == ["--file", "mine.txt"]


def test_our_own_lora_learns_what_the_roads_does(project):
    data, download, scratch = project.calls("lora-scratch", "ARGS=--method lora")
    assert (data[0], download[0], scratch[-2:]) == ("data", "download", ["--method", "lora"])
    assert option(scratch, "--config") == "custom_models/recipes/lora-scratch.yaml"
    assert option(scratch, "--data") == "data/hpo" and option(scratch, "--kinds") == "[name]"
    assert option(scratch, "--checkpoint_dir") == "checkpoints/made/up"
    (mine,) = project.calls("lora-scratch", "KINDS=")
    assert "--kinds" not in mine and "--method" not in mine
    assert "exactly one of" in project.refusal("lora", "lora-scratch", "ARGS=--method lora")


def test_a_student_of_reviews_needs_its_teacher_once(project, tmp_path):
    (tmp_path / "sentence_polarity").mkdir()
    raw = f"WORKFLOW_DATA={tmp_path}"
    calls = project.calls("distill", raw, "ARGS=--seeds [1,2]")
    assert [call[0] for call in calls] == ["data", "sentiment", "distill"]
    assert option(calls[0], "--raw_dir") == str(tmp_path / "sentence_polarity")
    assert "--seeds" not in calls[1] and option(calls[1], "--encoder") == "minilm"
    assert option(calls[2], "--seeds") == "[1,2]"
    assert project.steps("distill", raw) == ["distill"]
    # other reviews need their data; what WORKFLOW_DATA lacks comes from elsewhere
    assert project.calls("distill", raw, "REVIEWS=sst2")[0] == ["data", "--data", "sst2"]
    assert "exactly one of" in project.refusal("sentiment", "distill", "ARGS=--seeds [1,2]")


def test_a_text_is_summarised_by_a_model_that_is_trained_once(project, tmp_path):
    for name in ("it's mine.txt", "other.txt"):
        (project.root / name).touch()
    calls = project.calls("summarize", "TEXT=it's mine.txt", "ARGS=--n_sentences 2")
    assert [call[0] for call in calls] == ["data", "summarize", "summary"]
    assert calls[0] == ["data", "--data", "docstrings"] and option(calls[1], "--encoder") == "minilm"
    assert option(calls[1], "--config").endswith("summarize-minilm.yaml") and "--n_sentences" not in calls[1]
    assert option(calls[2], "--file") == "it's mine.txt" and calls[2][-2:] == ["--n_sentences", "2"]
    assert option(calls[1], "--out_dir") == "out/summarize/docstrings/minilm"
    assert option(calls[2], "--checkpoint_dir") == "out/summarize/docstrings/minilm/final"
    assert project.steps("summarize", "TEXT=other.txt") == ["summary"]
    assert project.steps("summarize") == ["summarize"]  # asked for by name it trains again
    (own,) = project.calls("summarize", "METHOD=abstractive", "ARGS=--max_rows 9")
    assert option(own, "--config").endswith("summarize-abstractive.yaml") and own[-2:] == ["--max_rows", "9"]
    assert option(own, "--out_dir") == "out/summarize/docstrings/minilm-abstractive"
    (bert,) = project.calls("summarize", "ENCODER=google-bert/bert-base-uncased")
    assert option(bert, "--config").endswith("summarize-pretrained.yaml")
    for name in ("scitldr", "pubmedqa"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    raw = f"WORKFLOW_DATA={tmp_path / 'raw'}"
    assert project.calls("summarize", raw)[0][2:] == ["scitldr", "--raw_dir", f"{tmp_path}/raw/scitldr"]
    data, _ = project.calls("summarize", raw, "DOCUMENTS=pubmedqa_conclusions")
    assert option(data, "--raw_dir") == f"{tmp_path}/raw/pubmedqa"


def test_a_question_is_answered_by_a_model_that_is_trained_once(project):
    (project.root / "a b.txt").touch()
    calls = project.calls("answer", "TEXT=What's that?", "CONTEXT=a b.txt", "ENCODER=minilm")
    assert [call[0] for call in calls] == ["data", "qa", "answer"]
    assert option(calls[0], "--data") == "hpo_spans" and option(calls[1], "--config").endswith("qa-pretrained.yaml")
    assert option(calls[2], "--question") == "What's that?" and option(calls[2], "--context") == "a b.txt"
    assert project.steps("answer", "TEXT=x", "CONTEXT=a b.txt", "ENCODER=minilm") == ["answer"]
    (scratch,) = project.calls("qa", "ARGS=--seeds [1,2]")
    assert option(scratch, "--config").endswith("qa-scratch.yaml") and scratch[-2:] == ["--seeds", "[1,2]"]


@pytest.mark.parametrize(
    ("asking", "variable", "others"),
    [
        (("predict", "TEXT=x"), "REVIEWS", ("movie_snippets", "sst2")),
        (("ner-predict", "TEXT=x"), "ENTITIES", ("hpo_entities", "bc5cdr")),
        (("answer", "TEXT=x", "CONTEXT=Makefile"), "QUESTIONS", ("hpo_spans", "squad")),
        (("summarize", "TEXT=Makefile"), "DOCUMENTS", ("docstrings", "xsum")),
        (("translate-text", "TEXT=x"), "PARALLEL", ("catalogues_fr", "catalogues_de")),
        (("distill",), "REVIEWS", ("movie_snippets", "sst2")),
    ],
)
def test_a_model_of_other_data_is_never_asked(project: Project, asking, variable, others):
    folders = []
    for name in others:
        data, trained, asked = project.calls(*asking, f"{variable}={name}")
        assert option(data, "--data") == name and option(trained, "--data") == f"data/{name}"
        folder = option(asked, "--teacher_dir" if asking == ("distill",) else "--checkpoint_dir")
        assert folder == option(trained, "--out_dir") + "/final"
        folders.append(folder)
        assert len(project.steps(*asking, f"{variable}={name}")) == 1
    assert len(set(folders)) == 2


@pytest.mark.parametrize(
    ("asking", "cure"),
    [
        (("predict",), 'make predict TEXT="'),
        (("ner-predict", "TEXT= "), 'make ner-predict TEXT="'),
        (("answer", "TEXT=x"), "CONTEXT=file"),
        (("answer", "CONTEXT=Makefile"), 'TEXT="question"'),
        (("answer", "TEXT=x", "CONTEXT=typo.txt"), "a file that can be read"),
        (("translate-text",), 'make translate-text TEXT="'),
        (("translate-text", "FILE=typo.py", "TEXT=x"), "a file that can be read"),
        (("summarize", "TEXT=typo.txt"), "a file that can be read"),
        (("summarize", "TEXT=workflows"), "a file that can be read"),
    ],
)
def test_nothing_is_trained_for_a_question_that_is_missing(project: Project, asking, cure):
    assert f"`make {asking[0]}` needs" in (message := project.refusal(*asking)) and cure in message


def test_make_knows_the_names_of_all_that_can_be_prepared(project: Project):
    listed = project.make("--eval", "list: ; @echo $(PREPARED) $(PROJECT_DATA)", "list").stdout.split()
    assert sorted({*listed} - {"hpo_thoughts"}) == sorted({*get_args(prepare.Name)} - {"jsonl", "iob"})


@pytest.mark.parametrize(
    ("goal", "variable", "form"),
    [
        ("sentiment", "REVIEWS", "jsonl"),
        ("ner", "ENTITIES", "iob"),
        ("summarize", "DOCUMENTS", "jsonl"),
        ("qa", "QUESTIONS", "jsonl"),
        ("translate", "PARALLEL", "jsonl"),
    ],
)
def test_a_projects_data_that_is_not_there_is_asked_for(project: Project, goal, variable, form):
    message = project.refusal(goal, f"{variable}=mine")
    assert f'there is no data/mine. Prepare it from a file of yours: make data DATA={form} ARGS="--file' in message


def test_pictures_are_drawn_with_the_options_that_were_given(project):
    assert project.calls("attention-map", "TEXT=it's") == [["attention-map", "--text", "it's"]]
    assert project.calls("expert-load", "ARGS=--steps 5") == [["expert-load", "--steps", "5"]]


def test_deepseek_is_a_tag_of_the_registry_unless_model_says_otherwise(project):
    (pulled,) = project.calls("deepseek")
    assert (option(pulled, "--model"), option(pulled, "--name")) == ("deepseek-r1:1.5b", "deepseek")
    assert option(pulled, "--config") == "workflows/recipes/default/deepseek.yaml"
    (tag,) = project.calls("deepseek", "MODEL=deepseek-r1:7b", "NAME=mine", "ARGS=--num_ctx 8192")
    assert (option(tag, "--model"), option(tag, "--name"), tag[-2:]) == (
        "deepseek-r1:7b",
        "mine",
        ["--num_ctx", "8192"],
    )
    (file,) = project.calls("deepseek", "MODEL=it's mine.gguf")
    assert option(file, "--model") == "it's mine.gguf"
    data, exported = project.calls("deepseek", "MODEL=deepseek-r1-distill-qwen-1.5b")
    assert data == ["data", "--data", "hpo"]  # questions to verify an export with
    assert option(exported, "--model") == "deepseek-r1-distill-qwen-1.5b"


def test_a_file_of_questions_is_asked(project):
    (call,) = project.calls("ask", "FILE=it's mine.jsonl", "NAME=mine", "ARGS=--parallel 2")
    assert call == ["ask", "--model", "mine", "--file", "it's mine.jsonl", "--parallel", "2"]
    assert "make ask FILE=questions.jsonl" in project.refusal("ask")


def test_a_served_model_is_scored_beside_the_checkpoint_of_its_run(project):
    data, alone = project.calls("evaluate-ollama", "NAME=deepseek", "ARGS=--limit 50")
    assert data[0] == "data" and option(alone, "--model") == "deepseek" and option(alone, "--tasks") == "[hpo_mcq]"
    assert "--checkpoint_dir" not in alone and alone[-2:] == ["--limit", "50"]
    project.calls("lora")
    (beside,) = project.calls("evaluate-ollama")
    assert option(beside, "--model") == "demo" and option(beside, "--checkpoint_dir") == "out/demo/lora/final"
    (other,) = project.calls("evaluate-ollama", "NAME=deepseek")  # another model than the run's
    assert "--checkpoint_dir" not in other
    assert "has no questions with options" in project.refusal("evaluate-ollama", "DATA=medquad")


def test_a_plan_needs_no_download_and_takes_the_recipe_of_its_step(project: Project):
    ((step, about, *options),) = project.calls(
        "plan", "MODEL=llama-3.1-8b-instruct", "PLANNED=grpo", "MEMORY=24 GB", "TFLOPS=200", "ARGS=--accelerator cuda"
    )
    assert (step, about) == ("plan", "grpo")
    assert option(options, "--config") == "workflows/recipes/llama-3.1-8b-instruct/grpo.yaml"
    assert option(options, "--checkpoint_dir") == "llama-3.1-8b-instruct"
    assert (option(options, "--memory"), option(options, "--tflops")) == ("24 GB", "200")
    assert options[-2:] == ["--accelerator", "cuda"]


def test_a_downloaded_model_is_planned_by_its_folder(project: Project):
    project.calls("download")
    (project.root / "checkpoints" / "made" / "up").mkdir(parents=True)
    ((_, about, *options),) = project.calls("plan", "PLANNED=merge")
    assert (about, option(options, "--checkpoint_dir")) == ("merge", "checkpoints/made/up")
    assert "--config" not in options
