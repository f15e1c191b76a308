"""The command line: every wrong argument is named at once, and a user's mistake is no traceback."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from custom_models.__main__ import PROJECTS
from workflows.__main__ import STEPS, explain, main, parse_all


@dataclass
class TrainArgs:
    max_steps: int = 3
    """Number of steps."""
    lr: float = 1e-3
    """Learning rate."""


def setup(
    checkpoint_dir: Path, data: Path = Path("x"), train: TrainArgs = TrainArgs(), kind: str | None = None
) -> None:
    """Do it.

    Args:
        checkpoint_dir: The checkpoint.
        data: The data.
        train: Training settings.
        kind: A kind.
    """


def test_signature_is_the_interface():
    parsed = parse_all(setup, ["--checkpoint_dir", "c", "--train.lr", "0.5"], "step")
    assert parsed["checkpoint_dir"] == Path("c")
    assert parsed["train"] == TrainArgs(3, 0.5)


def test_config_file_with_overrides(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({"checkpoint_dir": "c", "train": {"lr": 0.5, "max_steps": 9}}))
    parsed = parse_all(setup, ["--config", str(config), "--train.max_steps", "4"], "step")
    assert parsed["train"] == TrainArgs(4, 0.5)


def test_every_wrong_argument_is_reported_at_once(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_all(setup, ["--train.lr", "much", "--train.max_steps=few", "--wrong", "3", "--data", "d"], "step")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert all(part in said for part in ("train.lr", "much", "train.max_steps", "few", "--wrong", "checkpoint_dir"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data", "--data", "mine"], '"data": must be one of hpo, assistant, general'),
        (
            ["lora", "--checkpoint_dir", "c", "--precision", "8"],
            '"precision": must be one of 32-true, bf16-true, 16-true, null',
        ),
        (["lora", "--checkpoint_dir", "c", "--train.lr_schedule", "step"], "must be one of cosine, linear, constant"),
    ],
)
def test_a_value_that_is_no_choice_gets_the_choices(arguments, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("text", ["train:\n  lr: abc\ncheckpoint_dir: c", "train: [", "nonsense: 1"])
def test_bad_config_file_is_refused(tmp_path, capsys, text):
    config = tmp_path / "recipe.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse_all(setup, ["--config", str(config), "--checkpoint_dir", "c"], "step")
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_print_config_prints_yaml(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_all(setup, ["--checkpoint_dir", "c", "--print_config"], "step")
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"] == {"max_steps": 3, "lr": 0.001}


@pytest.mark.parametrize("step", STEPS)
def test_every_step_explains_itself(step, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([step, "--help"])
    assert "usage: python -m workflows " + step in capsys.readouterr().out


RECIPES = sorted(Path("workflows/recipes").glob("*/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_is_understood_by_its_step(recipe, capsys):
    step = max((name for name in STEPS if f"{recipe.stem}-".startswith(f"{name}-")), key=len)
    needed = {"evaluate": ["--tasks", "[hpo_mcq]"], "export": ["--name", "x"]}.get(step, [])
    if step == "ppo":
        needed = ["--rewards", "[{reward: out/x/reward/final}]"]
    needed = needed if step == "deepseek" else ["--checkpoint_dir", "x", *needed]
    command = [step, "--config", str(recipe), *needed, "--print_config"]
    with pytest.raises(SystemExit) as e:
        main(command)
    assert e.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(recipe.read_text())
    assert all(shown[name] == value for name, value in given.items() if not isinstance(value, dict | list))
    assert f"make {step}" in recipe.read_text().splitlines()[0]


def test_unknown_step_lists_the_known_ones(capsys):
    assert main(["trian"]) == 2
    assert "no step 'trian'" in (said := capsys.readouterr().err) and "lora" in said
    assert main(["deepsek"]) == 2
    assert "no step 'deepsek'. Did you mean deepseek?\n" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


def test_a_command_line_that_is_no_text_is_one_message(capsys):
    for steps, program in ((STEPS, "workflows"), (PROJECTS, "custom_models")):
        assert main([*steps][:1] + ["--text", "a \udcff"], steps, program) == 2
        assert capsys.readouterr().err.startswith("error: not UTF-8 text: 'a \\udcff'.")


@pytest.mark.long
def test_users_mistake_is_one_message_without_traceback(tmp_path):
    command = [sys.executable, "-m", "workflows", "lora", "--checkpoint_dir", str(tmp_path / "nowhere")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: There is no checkpoint at") and "Traceback" not in result.stderr


def test_a_place_that_cannot_be_written_is_one_message(tmp_path, capsys, tiny_llama):
    (tmp_path / "file").write_text("")
    assert main(["merge", "--checkpoint_dir", str(tmp_path / "file" / "below")]) == 1
    assert main(["download", "--model", str(tiny_llama.parent), "--checkpoints_dir", str(tmp_path / "file")]) == 1
    assert main(["evaluate", "--checkpoint_dir", str(tiny_llama), "--out_dir", str(tmp_path / "file" / "x")]) == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 3 and "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(20, "Not a directory", "out/x"), "Not a directory: out/x"),
        (MemoryError(), "Lower --train.row_tokens"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "Lower --train.row_tokens",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "--quantize bnb.nf4"),
        (OSError("a fault of the program's"), None),
        (RuntimeError("shape mismatch"), None),
    ],
)
def test_what_the_machine_lacks_is_explained_and_faults_are_not_hidden(error, message):
    explained = explain(error)
    assert explained is None if message is None else message in explained
