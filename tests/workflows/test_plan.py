"""`make plan`: every recipe has a plan, what it suggests fits, and a step is refused by it before anything loads."""

import json
import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from tests.workflows.alignment import question, write
from workflows import plan
from workflows.__main__ import main
from workflows.errors import UserError
from workflows.files import read_json
from workflows.planning import PLANNED

RECIPES = [
    path for path in sorted(Path("workflows/recipes").glob("*/*.yaml")) if path.stem != "deepseek"
]  # which loads nothing


def planned(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def options_of(recipe: Path) -> list[str]:
    step = max((name for name in PLANNED if f"{recipe.stem}-".startswith(f"{name}-")), key=len)
    model = "smollm2-135m" if recipe.parent.name == "default" else recipe.parent.name
    rewards = ["--rewards", "[{reward: out/rlhf/reward/final}]"] if step == "ppo" else []
    return [step, "--config", str(recipe), "--checkpoint_dir", model, *rewards]


@pytest.mark.parametrize(
    ("accelerator", "recipe"),
    [
        pytest.param(accelerator, recipe, id=f"{accelerator}-{recipe.parent.name}-{recipe.stem}")
        for recipe in RECIPES
        for accelerator in (("cuda",) if recipe.stem.endswith("gb") else ("cpu", "cuda"))  # those name their GPUs
    ],
)
def test_every_recipe_has_a_plan(accelerator: str, recipe: Path, tmp_path: Path, capsys):
    arguments = [*options_of(recipe), "--read_data", "false", "--json_file", str(tmp_path / "plan.json")]
    if arguments[0] in ("evaluate", "export"):
        arguments += ["--device", accelerator]
    elif arguments[0] not in ("shrink", "merge"):
        arguments += ["--accelerator", accelerator]
    told = planned(capsys, *arguments, "--memory", "100TB", "--tflops", "100")
    assert "fits in 100,000.00 GB" in told and "together" in told
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["peak_bytes"] == max(sum(parts.values()) for parts in written["moments"].values())
    assert all(size >= 0 for parts in written["moments"].values() for size in parts.values())
    assert written["disk_bytes"] and all(size >= 0 for size in written["disk_bytes"].values())


@pytest.mark.parametrize("step", PLANNED)
def test_every_step_that_loads_a_model_has_a_plan_of_its_defaults(step: str, capsys):
    rewards = ["--rewards", "[{reward: letter}]"] if step == "ppo" else []
    more = ["--divergence", "none"] if step == "distill-lm" else []
    told = planned(capsys, step, "--checkpoint_dir", "smollm2-135m", *rewards, *more, "--read_data=false")
    assert told.startswith(f"{step} of smollm2-135m: 134,515,008 parameters")


@pytest.mark.parametrize(
    "arguments",
    [
        ["lora", "--checkpoint_dir", "llama-3.1-8b-instruct", "--accelerator", "cuda", "--train.row_tokens", "8192"],
        ["lora", "--checkpoint_dir", "llama-3.1-8b-instruct", "--accelerator", "cuda", "--lora_r", "0"],
        ["evaluate", "--checkpoint_dir", "llama-3.2-3b-instruct", "--device", "cuda", "--row_tokens", "65536"],
        ["grpo", "--checkpoint_dir", "llama-3.1-8b-instruct", "--accelerator", "cuda", "--sampling_batch", "512",
         "--group_size", "64"],
    ],
    ids=["lora", "full", "evaluate", "grpo"],
)  # fmt: skip
def test_what_it_suggests_fits(arguments: list[str], capsys):
    # all weights of 8B: float32 masters, moments and gradients take 145 GB, an eighth of them is not all of a GPU of 24
    memory = "9GB" if arguments[0] == "evaluate" else "48GB" if "--lora_r" in arguments else "24GB"
    limit = ["--memory", memory, "--read_data", "false"]
    told = planned(capsys, *arguments, *limit)
    assert "does not fit in" in told
    (line,) = (line for line in told.splitlines() if line.startswith("with --"))
    changes = line.removeprefix("with ").partition(" it fits")[0].split()
    assert "\nfits in" in planned(capsys, *arguments, *changes, *limit)


def test_what_nothing_makes_fit_is_said(capsys):
    told = planned(capsys, "merge", "--checkpoint_dir", "llama-3.1-8b-instruct", "--memory", "1MB")
    assert "no change of its settings alone makes it fit" in told


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24gb", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("16G", 16 * 10**9), ("512", 512)],
)
def test_sizes(text: str, size: int):
    assert plan.parse_size(text) == size


@pytest.mark.parametrize("text", ["lots", "-3GB", "0GB", "24XB", "24 GBs", ""])
def test_what_is_no_size_is_told(text: str):
    with pytest.raises(UserError, match="must be a size such as 24GB"):
        plan.parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Name the step to plan"),
        (["chat"], "There is no plan for 'chat'"),
        (["loar"], "There is no plan for 'loar'. Did you mean lora?"),
        (["lora", "--checkpoint_dir", "smollm2-135", "--read_data", "false"], "Did you mean smollm2-135m"),
        (["lora", "--checkpoint_dir", "smollm2-135m", "--memory", "much"], "must be a size"),
        (["lora", "--checkpoint_dir", "smollm2-135m", "--tflops", "-1"], "--tflops must be positive"),
        (["lora", "--checkpoint_dir", "smollm2-135m", "--devices", "many"], "--devices must be a number or auto"),
        (["lora", "--checkpoint_dir", "smollm2-135m", "--devices", "-4"], "--devices must be at least 1"),
        (
            ["lora", "--checkpoint_dir", "smollm2-135m", "--train.max_steps", "-5"],
            "--train.max_steps must be at least 1",
        ),
        (
            ["lora", "--checkpoint_dir", "smollm2-135m", "--quantize", "bnb.nf4", "--strategy", "fsdp"],
            "cannot be sharded",
        ),
        (["grpo", "--checkpoint_dir", "smollm2-135m", "--group_size", "0"], "--group_size must be at least 1"),
        (["grpo", "--checkpoint_dir", "smollm2-135m", "--updates", "0"], "--updates must be at least 1"),
        (
            ["lora", "--checkpoint_dir", "smollm2-135m", "--train.max_seq_length", "0"],
            "max_seq_length must be at least 1",
        ),
        (["evaluate", "--checkpoint_dir", "smollm2-135m", "--row_tokens", "0"], "--row_tokens must be at least 1"),
        (
            ["teach", "--checkpoint_dir", "smollm2-135m", "--max_new_tokens", "-1"],
            "--max_new_tokens must be at least 1",
        ),
        (["shrink", "--checkpoint_dir", "smollm2-135m", "--layers", "99"], "--layers must be from 1 to the model's 30"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], told: str, capsys):
    assert main(["plan", *arguments]) == 1
    assert told in capsys.readouterr().err


def test_own_options_may_stand_anywhere():
    found = plan.split_arguments(["--memory", "2GB", "lora", "--tflops=3", "--train.max_steps", "5"])
    assert found == (["--memory", "2GB", "--tflops=3"], "lora", ["--train.max_steps", "5"])


TINY = ["--train.max_steps", "1", "--train.lr_warmup_steps", "0", "--train.global_batch_size", "2", "--lora_r", "4"]


@pytest.fixture
def lora(tiny_llama: Path, tmp_path: Path) -> list[str]:
    """A LoRA run of one step on made-up data."""
    rows: list[dict[str, Any]] = [
        {"messages": [*question(n)["prompt"], {"role": "assistant", "content": "It is."}]} for n in range(4)
    ]
    data = write(tmp_path / "data", train=rows, validation=rows)
    out = ["--out_dir", str(tmp_path / "out"), "--train.max_seq_length", "256"]
    return ["lora", "--checkpoint_dir", str(tiny_llama), "--data", str(data), *out, *TINY]


@pytest.mark.long
def test_too_little_memory_is_refused_before_anything_is_read_and_may_be_overridden(
    lora, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(plan, "memory_here", lambda _: 1_000_000)
    assert main(lora) == 1
    told = capsys.readouterr().err
    assert "The memory is too little" in told and "--ignore_plan true" in told
    assert not (tmp_path / "out").exists()
    assert main([*lora, "--ignore_plan", "true"]) == 0
    assert (tmp_path / "out" / "final" / "lit_model.pth").is_file()
    capsys.readouterr()
    assert main(lora) == 0  # there is nothing to do any more
    assert "already there" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["lora", "evaluate", "export", "shrink"])
def test_a_full_disk_is_refused(step: str, lora: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage(1, 1, 0))
    others = [step, "--checkpoint_dir", str(tiny_llama), "--out_dir", str(tmp_path / "out")]
    others += ["--create", "false"] if step == "export" else []
    assert main(lora if step == "lora" else others) == 1
    assert "The disk is too full" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_told_by_the_step_itself(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "memory_here", lambda _: 1)
    assert main(["lora", "--checkpoint_dir", str(tmp_path / "nothing")]) == 1
    assert "There is no checkpoint at" in capsys.readouterr().err


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch):
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(plan, "_CGROUP", tmp_path)
    settings = {"checkpoint_dir": "smollm2-135m", "out_dir": None, "base_dir": None}
    found = plan.plan_step("merge", settings)
    assert plan.memory_here(found) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert plan.memory_here(found) > 2000


def test_sampling_of_a_sharded_run_takes_all_the_weights_besides(capsys):
    grpo = ["grpo", "--config", "workflows/recipes/llama-3.1-8b-instruct/grpo-8x80gb.yaml", "--read_data", "false"]
    grpo += ["--checkpoint_dir", "llama-3.1-8b-instruct", "--accelerator", "cuda", "--data", "data/none"]
    (sampling,) = re.findall(r"in sampling answers: +(\d+\.\d+) GB", planned(capsys, *grpo))
    assert float(sampling) == pytest.approx(2.0 + 16.1 + 17.2, abs=2)  # shards, all weights, the answers' cache


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_gradients_of_a_sharded_run_are_sharded_row_by_row_or_after_its_last_row(precision, tmp_path):
    """Row by row where there are float32 masters, since whole ones would take 4 bytes for each weight on each GPU."""
    lora = ["lora", "--config", "workflows/recipes/llama-3.1-8b-instruct/lora-8x80gb.yaml", "--read_data", "false"]
    lora += ["--checkpoint_dir", "llama-3.1-8b-instruct", "--accelerator", "cuda", "--data", "data/none"]
    lora += ["--lora_r", "0", "--train.row_tokens", "4096", "--precision", precision]
    assert main(["plan", *lora, "--json_file", str(tmp_path / "plan.json")]) == 0
    moments = json.loads((tmp_path / "plan.json").read_text())["moments"]
    masters = precision == "bf16-true"
    passing, stepping = moments["a row's forward and backward pass"], moments["the optimizer's step"]
    assert passing["gradients"] == 4 * 8_030_261_248 // (8 if masters else 1)
    assert stepping["gradients"] == 4 * 8_030_261_248 // 8
    assert stepping["optimizer (AdamW)"] == 8 * 8_030_261_248 // 8
    assert stepping.get("master weights in float32") == (4 * 8_030_261_248 // 8 if masters else None)
    assert ("gradients on their way" in passing) == masters and "gradients on their way" not in stepping


def test_a_head_that_may_be_tied_is_said(capsys):
    told = planned(capsys, "lora", "--checkpoint_dir", "Qwen/Qwen2.5-0.5B-Instruct", "--read_data", "false")
    assert "whether its head is tied to the embedding is known once it is downloaded" in told


def test_an_evaluation_that_writes_answers_needs_room_for_them(capsys):
    asked = ["evaluate", "--checkpoint_dir", "smollm2-135m", "--read_data", "false"]
    # matrices laid out for decoding take more than a row of options
    assert "in writing answers" in planned(capsys, *asked)
    assert "writing answers" not in planned(capsys, *asked, "--written", "0")


def test_epochs_are_planned_as_the_steps_that_they_come_to(tmp_path: Path, capsys):
    data = write(tmp_path / "data", train=[question(number) for number in range(40)])
    options = ["lora", "--checkpoint_dir", "smollm2-135m", "--train.global_batch_size", "8", "--read_data", "false"]
    epochs, steps = ["--train.max_steps", "0", "--train.epochs", "2"], ["--train.max_steps", "10"]
    work = []
    for length in (epochs, steps):
        planned(capsys, *options, "--data", str(data), *length, "--json_file", str(tmp_path / "plan.json"))
        work.append(read_json(tmp_path / "plan.json")["flops"])
    assert work[0] == work[1]
    with pytest.raises(UserError, match=r"--train\.epochs 2: the number of rows is unknown, .*does not exist"):
        plan.run([*options, "--data", str(tmp_path / "nowhere"), *epochs])


def test_the_best_steps_checkpoint_takes_a_place_on_the_disk(capsys):
    options = ["lora", "--checkpoint_dir", "smollm2-135m", "--read_data", "false"]
    sizes = []
    for keep in ("best", "last"):
        (line,) = (line for line in planned(capsys, *options, "--train.keep", keep).splitlines() if "to resume" in line)
        sizes.append(line)
    assert sizes[0] != sizes[1]
