"""Every recipe of a training step: its step takes all of it, and the model it is for can be built with its adapters (on
the meta device, so that 8 billion parameters take no memory)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from litgpt.config import Config

from tests.conftest import ROOT, write_tokenizer
from workflows.__main__ import STEPS, main, parse_all
from workflows.checkpoint import REQUIRED, WEIGHTS, write_config
from workflows.download import find_model
from workflows.training.model import LoRAArgs, empty_model
from workflows.training.whole import keep_skeleton

RECIPES = Path("workflows/recipes")
REGISTRY = yaml.safe_load(Path("checkpoints/registry.yaml").read_text())
TRAINING = ("lora", "dpo", "grpo", "ppo", "reward", "distill-lm")
LITGPT = {"smollm2-135m": "SmolLM2-135M-Instruct", "deepseek-r1-distill-llama-8b": "R1-Distill-Llama-8B"}
"""LitGPT's names where they are not the Hub's."""
LARGE = (
    "llama-3.1-8b-instruct", "deepseek-r1-distill-llama-8b", "llama-3.2-3b-instruct", "llama-3.2-1b-instruct"
)  # fmt: skip


def step_of(recipe: Path) -> str:
    return max((name for name in STEPS if f"{recipe.stem}-".startswith(f"{name}-")), key=len)


def recipes(*steps: str) -> list[Any]:
    found = [path for path in sorted(RECIPES.glob("*/*.yaml")) if step_of(path) in steps]
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in found]


def checkpoint_of(name: str, folder: Path) -> Path:
    """A model's configuration, and empty files for all the rest."""
    known = LITGPT.get(name) or REGISTRY[name]["hub_id"].split("/")[1]
    for file in (*REQUIRED, WEIGHTS):
        (folder / file).write_text("{}")
    write_config(Config.from_name(known), folder)
    return folder


@pytest.mark.parametrize("recipe", recipes(*TRAINING))
def test_a_training_recipe_is_valid_and_its_model_can_be_built(recipe, tmp_path, monkeypatch):
    name = recipe.parent.name if recipe.parent.name != "default" else "llama-3.2-3b-instruct"
    step = step_of(recipe)
    checkpoint = checkpoint_of(name, tmp_path)
    arguments = ["--config", str(recipe), "--checkpoint_dir", str(checkpoint)]
    for option in ("data", "out_dir"):
        arguments += [f"--{option}", str(tmp_path / option)]
    if step == "ppo":
        arguments += ["--rewards", "[{reward: out/x/reward/final}]"]
    if step in ("lora", "distill-lm"):
        write_tokenizer(checkpoint)  # the template is tried with it; the teacher's and the student's are compared
    if step == "distill-lm":
        arguments += ["--teacher_dir", str(checkpoint)]
    module = __import__(STEPS[step][0], fromlist=["setup"])
    begun: list[Any] = []
    monkeypatch.setattr(module, "run_step", lambda *args: begun.append(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # recipes are for such machines
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("workflows.training.step.find_spec", lambda _: True)  # bitsandbytes is an extra

    settings = parse_all(module.setup, arguments, step)
    assert settings.pop("ignore_plan") is False  # of all steps, and not of its own
    module.setup(**settings)

    ((_, settings, run, _),) = begun
    assert settings["precision"] == "bf16-true"
    model = empty_model(checkpoint, run.lora)
    keep_skeleton(model)  # what a sharded run is put together in
    plain = empty_model(checkpoint, LoRAArgs(r=0))
    parameters = sum(p.numel() for p in plain.parameters())
    head = plain.lm_head.linear.weight.numel()
    assert REGISTRY[name]["parameters"] in (parameters, parameters - head)  # tied ones are counted once
    assert all(p.device.type == "meta" for p in model.parameters())
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert (adapters > 0) == (run.lora_r > 0)


def test_a_rows_answers_fit_into_it():
    """A longer tree gets a row of its own, which takes more memory than the recipe says."""
    for path in RECIPES.glob("*/*.yaml"):
        train = yaml.safe_load(path.read_text()).get("train")
        if train is not None and path.parent.name in LARGE:
            longest = train["max_seq_length"] * (2 if step_of(path) == "dpo" else 1)
            assert longest <= train["row_tokens"], path


@pytest.mark.parametrize("hardware", ["", "-80gb", "-8x80gb"])
@pytest.mark.parametrize("step", ["lora", "dpo", "grpo"])
def test_large_models_are_planned_to_fit_their_hardware(step, hardware, capsys):
    recipe = RECIPES / "llama-3.1-8b-instruct" / f"{step}{hardware}.yaml"
    asked = ["plan", step, "--config", str(recipe), "--checkpoint_dir", "llama-3.1-8b-instruct", "--read_data", "false"]
    memory = "80GB" if hardware else "24GB"
    assert main([*asked, "--data", "data/none", "--accelerator", "cuda", "--memory", memory]) == 0
    assert f"fits in {memory[:-2]}.00 GB" in capsys.readouterr().out


@pytest.mark.parametrize("model", LARGE)
def test_large_models_have_recipes_for_each_hardware(model):
    there = {path.stem for path in (RECIPES / model).glob("*.yaml")}
    assert there >= {f"{step}{size}" for step in ("lora", "dpo", "grpo") for size in ("", "-80gb", "-8x80gb")}


@pytest.mark.parametrize("recipe", [p for p in sorted(RECIPES.glob("*/*.yaml")) if p.parent.name.startswith(LARGE)])
def test_recipes_of_large_models_say_what_they_need(recipe):
    lines = recipe.read_text().splitlines()
    head = " ".join(line[2:] for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    step, hardware = step_of(recipe), recipe.stem.partition("-")[2]
    assert head.startswith(f"make {step} MODEL={recipe.parent.name}")
    assert re.search(rf"HARDWARE={hardware}\b", head) if hardware else "HARDWARE=" not in head
    if step != "export":
        assert re.search(r"Planned(, not measured)?: weights|Planned for each, not measured", head)
        assert "Doesn't fit?" in head and re.search(r"\d GB\b", head)
    settings = yaml.safe_load(recipe.read_text())
    if hardware.startswith("8x"):
        assert settings["devices"] == 8 and settings["strategy"] == "fsdp" and "docs/large-models.md" in head
        assert settings["train"]["global_batch_size"] % 16 == 0  # two machines, each process as much as another


@pytest.mark.parametrize("recipe", [p for p in recipes("lora", "dpo", "grpo") if "llama" in p.id])
def test_recipes_state_the_memory_that_is_planned(recipe, tmp_path):
    head = " ".join(line[2:] for line in recipe.read_text().splitlines() if line.startswith("#"))
    stated = max(float(size) for size in re.findall(r": (\d+\.\d) GB", head.partition("Doesn't fit?")[0]))
    asked = ["plan", step_of(recipe), "--config", str(recipe), "--checkpoint_dir", recipe.parent.name]
    asked += ["--read_data", "false", "--data", "data/none", "--accelerator", "cuda"]
    assert main([*asked, "--json_file", str(tmp_path / "plan.json")]) == 0
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert stated == pytest.approx((planned["peak_bytes"] + planned["beside_bytes"]) / 1e9, rel=0.06)


def test_launch_lines_of_the_docs_name_the_folder_that_a_download_makes():
    text = (ROOT / "docs" / "large-models.md").read_text()
    named = set(re.findall(r"--checkpoint_dir checkpoints/(\S+)", text))
    origin = find_model("llama-3.1-8b-instruct")
    assert named == {f"{origin.org}/{origin.name.lower()}"}
