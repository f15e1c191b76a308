"""The loop on a toy objective: schedule, data order, token-exact accumulation, resume, logs, refusals."""

import csv
import math
from dataclasses import dataclass, replace

import pytest
import torch

from workflows.errors import UserError
from workflows.training.loop import TrainArgs, fit, learning_rate, make_fabric, step_indices

TRAIN = TrainArgs(max_steps=6, lr_warmup_steps=2, learning_rate=0.1, eval_interval=2, save_interval=2, max_norm=None)


@dataclass
class ToyBatch:
    x: torch.Tensor  # (n, 3)
    y: torch.Tensor  # (n,)

    @property
    def real_tokens(self):
        return len(self.x)

    def to(self, device):
        return self


class Toy:
    """Linear regression; a step's samples fall into rows of given sizes."""

    def __init__(self, sizes=(8,)):
        self.sizes = sizes

    def batches(self, step, rank, world_size):
        g = torch.Generator().manual_seed(step)
        x, noise = torch.randn(8, 3, generator=g), torch.randn(8, generator=g)
        y = x @ torch.tensor([1.0, -2.0, 3.0]) + noise
        return [ToyBatch(a, b) for a, b in zip(x.split(self.sizes), y.split(self.sizes), strict=True)]

    def units(self, batch):
        return len(batch.x)

    def loss(self, model, batch):
        error = (model(batch.x)[:, 0] - batch.y) ** 2
        return error.sum(), {"mean_y": batch.y.sum()}

    def validate(self, model):
        return {"val_loss": float(sum(p.detach().abs().sum() for p in model.parameters()))}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 1)
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, x):
        return self.linear(self.dropout(x))


class StopHere(Exception):
    pass


def run(out_dir, objective=None, train=TRAIN, resume="auto", identity=None):
    model = Net()
    result = fit(
        make_fabric(1, 1, "auto"),
        model,
        objective or Toy(),
        train,
        out_dir,
        seed=3,
        identity=identity or {"name": "toy"},
        resume=resume,
    )
    return model, result


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def test_learning_rate_warms_up_and_decays_to_the_minimum():
    train = TrainArgs(max_steps=12, lr_warmup_steps=4, learning_rate=1.0, min_lr=0.1)
    rates = [learning_rate(step, train) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.55)
    assert rates[12] == pytest.approx(0.1)
    assert learning_rate(8, replace(train, lr_schedule="linear")) == pytest.approx(0.55)
    assert learning_rate(11, replace(train, lr_schedule="constant")) == 1.0


def test_every_epoch_is_a_new_permutation_of_all_rows():
    order = [i for step in range(5) for i in step_indices(step, rows=10, batch_size=4, seed=7)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert order == [i for step in range(5) for i in step_indices(step, rows=10, batch_size=4, seed=7)]


def test_rows_of_unequal_size_weigh_by_their_units(tmp_path):
    no_dropout = replace(TRAIN, max_steps=4)
    whole, split = Toy((8,)), Toy((5, 1, 2))
    models = []
    for name, objective in (("whole", whole), ("split", split)):
        model = Net()
        model.dropout = torch.nn.Identity()
        fit(make_fabric(1, 1, "auto"), model, objective, no_dropout, tmp_path / name, seed=3, identity={})
        models.append(weights(model))
    for a, b in zip(*models, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("stop_after", [2, 3, 5])
def test_stopped_and_resumed_ends_bit_identical(tmp_path, stop_after):
    class Stopping(Toy):
        def batches(self, step, rank, world_size):
            if step == stop_after:
                raise StopHere
            return super().batches(step, rank, world_size)

    expected, uninterrupted = run(tmp_path / "whole")
    with pytest.raises(StopHere):
        run(tmp_path / "stopped", Stopping())
    resumed, result = run(tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(weights(expected), weights(resumed), strict=True))
    assert result.real_tokens == uninterrupted.real_tokens == 48
    steps = [row["step"] for row in csv.DictReader((tmp_path / "stopped" / "metrics.csv").read_text().splitlines())]
    assert steps == ["1", "2", "3", "4", "5", "6"]


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    first, _ = run(tmp_path)
    again, result = run(tmp_path)
    assert result.steps == 6 and result.losses == []
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match=r"other settings \(name\).*--resume false"):
        run(tmp_path, identity={"name": "other"})
    run(tmp_path, identity={"name": "other"}, resume=False)


def test_resume_true_needs_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        run(tmp_path, resume=True)


def test_only_the_newest_two_checkpoints_are_kept_and_no_parts(tmp_path):
    run(tmp_path)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004.pth", "step-00000006.pth"]


def test_metrics_csv_has_loss_extras_and_validation(tmp_path):
    run(tmp_path, train=replace(TRAIN, max_norm=1.0))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert set(rows[0]) == {"step", "loss", "mean_y", "grad_norm", "lr", "tokens_per_second", "val_loss"}
    assert [bool(row["val_loss"]) for row in rows] == [False, True] * 3
    assert float(rows[0]["lr"]) == pytest.approx(0.05)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    class Diverging(Toy):
        def loss(self, model, batch):
            value, extras = super().loss(model, batch)
            return value * math.nan, extras

    with pytest.raises(UserError, match=r"nan at step 0.*learning_rate"):
        run(tmp_path, Diverging())


def test_a_step_without_anything_to_learn_is_refused(tmp_path):
    class Empty(Toy):
        def units(self, batch):
            return 0

    with pytest.raises(UserError, match="nothing to learn"):
        run(tmp_path, Empty())


def test_all_problems_of_the_settings_are_found():
    problems = TrainArgs(max_steps=0, learning_rate=-1, max_norm=0, lr_warmup_steps=5).problems()
    assert len(problems) == 4
    assert TrainArgs().problems() == []
