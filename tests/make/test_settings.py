"""Which recipe, tasks, data and names follow from MODEL, DATA, HARDWARE and NAME."""

import os
import re
import time
from pathlib import Path
from typing import get_args

import pytest
import yaml

from data_prep import prepare
from tests.conftest import ROOT
from tests.make.project import Project, option

pytestmark = pytest.mark.long


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
    assert [call[0] for call in calls] == ["data", "download", "lora", "panel", "export", "demo", "demo"]
    assert option(calls[-2], "--scored") == "false"
    assert "--scored" not in [arg for call in project.calls("demo", "RUN=x") for arg in call]


def test_evaluate_says_beforehand_that_there_is_nothing_to_score_on(project: Project):
    assert "medquad has no questions with options" in project.refusal("lora", "evaluate", "DATA=medquad")
    assert "evaluate" in project.steps("evaluate", "DATA=medquad", "TASKS=medical")


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
    assert option(exported, "--data") == "data/hpo"
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


def test_a_plan_has_the_options_that_the_step_would_have(project: Project):
    def planned(*args: str) -> list[str]:
        ((_, _, *options),) = project.calls("plan", *args)
        return options

    for step in ("lora", "grpo", "distill-lm"):
        assert option(planned(f"PLANNED={step}", "KINDS=name"), "--kinds") == "[name]"
    assert option(planned("PLANNED=evaluate", "TASKS=hpo_mcq medical"), "--tasks") == "[hpo_mcq,medical]"
    assert "--rewards" in planned("PLANNED=ppo") and "--teacher_dir" not in planned("PLANNED=distill-lm")
    project.calls("shrink")
    (project.root / "checkpoints" / "made" / "up").mkdir(parents=True, exist_ok=True)
    student = planned("PLANNED=distill-lm")
    assert option(student, "--checkpoint_dir") == "out/demo/shrink/final"
    assert option(student, "--teacher_dir") == "out/demo/lora/final"


def test_a_downloaded_model_is_planned_by_its_folder(project: Project):
    project.calls("download")
    (project.root / "checkpoints" / "made" / "up").mkdir(parents=True)
    ((_, about, *options),) = project.calls("plan", "PLANNED=merge")
    assert (about, option(options, "--checkpoint_dir")) == ("merge", "checkpoints/made/up")
    assert "--config" not in options


def test_make_knows_the_names_of_all_that_can_be_prepared(project: Project):
    listed = project.make("--eval", "list: ; @echo $(PREPARED) $(PROJECT_DATA)", "list").stdout.split()
    assert sorted({*listed} - {"hpo_thoughts"}) == sorted({*get_args(prepare.Name)} - {"jsonl", "iob"})
