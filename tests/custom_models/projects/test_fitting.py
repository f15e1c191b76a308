"""What the projects' trainings share, and that a project without its recipe is the recipe."""

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader

from custom_models.projects import distill, ner, pretrain, sentiment
from custom_models.projects.fitting import FitArgs, fast_precision, fit_best, seed_problems
from workflows.errors import UserError

RECIPES = Path("custom_models/recipes")


@pytest.mark.parametrize(
    ("recipe", "setup"),
    [
        ("sentiment-scratch", sentiment.setup),
        ("distill", distill.setup),
        ("pretrain", pretrain.setup),
        ("ner-scratch", ner.setup),
    ],
)
def test_the_defaults_of_the_command_line_are_the_recipes(recipe, setup):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(setup)
    assert parser.parse_path(str(RECIPES / f"{recipe}.yaml")).as_dict() == parser.get_defaults().as_dict()


@pytest.mark.parametrize(("knows", "wanted"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_is_what_the_processor_is_fast_in(knows, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: knows)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert fast_precision("cpu") == wanted


def test_everything_wrong_with_the_settings_is_told_at_once():
    told = FitArgs(batch_size=0, learning_rate=float("nan"), warmup=1.0, ema_decay=-0.1, weight_decay=-1).problems()
    assert [line.split()[0] for line in told] == [
        "--fit.batch_size", "--fit.learning_rate", "--fit.ema_decay", "--fit.warmup", "--fit.weight_decay"
    ]  # fmt: skip


def test_seeds_are_those_that_numpy_takes():
    assert seed_problems(0, (1 << 32) - 1) == [] and seed_problems() == ["--seeds needs at least one."]
    assert seed_problems(-1, 1 << 32) == [
        "--seed must be from 0 to 4294967295, not -1.", "--seed must be from 0 to 4294967295, not 4294967296."
    ]  # fmt: skip


class Lost(L.LightningModule):
    """A model that a first step makes useless, and whose score does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum() * math.inf

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_accuracy", 0.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_a_training_that_diverges_is_told_whatever_its_score(tmp_path):
    rows = DataLoader(torch.ones(4, 2), batch_size=2)
    with pytest.raises(UserError, match="The training diverged: after epoch 1 its numbers are not finite"):
        fit_best(Lost(), rows, rows, tmp_path, FitArgs(max_epochs=2, accelerator="cpu"))
