"""The loop on a toy objective: schedule, data order, token-exact accumulation, resume, logs, refusals."""

import csv
import math
from dataclasses import dataclass, replace

import pytest
import torch

from tests.workflows.conftest import file_size_limit
from workflows.errors import UserError
from workflows.training.logs import MetricsLog
from workflows.training.loop import Objective, TrainArgs, fit, learning_rate, step_indices
from workflows.training.processes import make_fabric

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


class Toy(Objective):
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
        make_fabric(),
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
        fit(make_fabric(), model, objective, no_dropout, tmp_path / name, seed=3, identity={})
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
    with pytest.raises(UserError, match=r"other settings:\n  - name: toy, now other\n.*--resume false"):
        run(tmp_path, identity={"name": "other"})
    run(tmp_path, identity={"name": "other"}, resume=False)


def test_resume_true_needs_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        run(tmp_path, resume=True)


def test_only_the_newest_two_checkpoints_are_kept_and_no_parts(tmp_path):
    run(tmp_path)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004.pth", "step-00000006.pth"]


@pytest.mark.parametrize("damage", [b"step,loss\nx,1\n", b"step,loss\n1,2,3\n2\n", b"\xff\xfe\n\n", b"loss\n3\n"])
def test_a_damaged_log_is_told_and_the_run_goes_on(damage, tmp_path, capsys):
    (tmp_path / "metrics.csv").write_bytes(damage)
    with MetricsLog(make_fabric(), tmp_path, 5, ()) as log:
        log.write(6, {"loss": 1.0})
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss", "6,1"]
    assert "is damaged: the steps before step 5" in capsys.readouterr().out


def test_metrics_csv_has_loss_extras_and_validation(tmp_path):
    run(tmp_path, train=replace(TRAIN, max_norm=1.0))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert set(rows[0]) == {
        "step",
        "loss",
        "mean_y",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "updated_per_second",
        "val_loss",
    }
    assert [bool(row["val_loss"]) for row in rows] == [False, True] * 3
    assert float(rows[0]["lr"]) == pytest.approx(0.05)


def test_a_gradient_that_is_no_number_stops_the_run_before_it_is_applied(tmp_path):
    class Exploding(Toy):
        def loss(self, model, batch):
            value, extras = super().loss(model, batch)
            nothing = model(batch.x).sum() * 0
            return value + nothing.sqrt(), extras  # the square root of 0 has a value, and no slope

    for max_norm in (1.0, None):
        with pytest.raises(UserError, match=r"gradient's norm is (nan|inf) at step 0"):
            run(tmp_path, Exploding(), replace(TRAIN, max_norm=max_norm))
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_validation_that_is_no_number_stops_the_run_before_it_is_saved(tmp_path):
    class Blind(Toy):
        def validate(self, model):
            return {"val_loss": math.inf}

    with pytest.raises(UserError, match=r"val_loss is inf at step 1\..*No checkpoint was written yet"):
        run(tmp_path, Blind())
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize(("name", "remedy"), [("reward", "The rewards are too large"), ("kl", "Lower --train")])
def test_a_sum_that_is_not_finite_stops_the_run_before_its_step(name, remedy, tmp_path):
    class Measured(Toy):
        def step_metrics(self):
            return {name: math.inf}

    with pytest.raises(UserError, match=rf"The {name} is inf at step 0\. {remedy}.*No checkpoint was written yet"):
        run(tmp_path, Measured())
    assert not list(tmp_path.glob("checkpoints/*"))


def test_no_limit_on_the_norm_changes_no_gradient(tmp_path):
    plain, _ = run(tmp_path / "none")
    huge, _ = run(tmp_path / "huge", train=replace(TRAIN, max_norm=1e9))
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(huge), strict=True))


def test_a_damaged_checkpoint_is_passed_over_for_the_older_one(tmp_path, capfd):
    class Stopping(Toy):
        def batches(self, step, rank, world_size):
            if step == 5:
                raise StopHere
            return super().batches(step, rank, world_size)

    expected, _ = run(tmp_path / "whole")
    with pytest.raises(StopHere):
        run(tmp_path / "hurt", Stopping())
    older, newest = sorted((tmp_path / "hurt" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-200])
    model, _ = run(tmp_path / "hurt")
    told = capfd.readouterr()
    assert f"{newest} is damaged" in told.out + told.err and f"resuming from {older}" in told.out + told.err
    assert all(torch.equal(a, b) for a, b in zip(weights(expected), weights(model), strict=True))
    for path in (tmp_path / "hurt" / "checkpoints").iterdir():
        path.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"No checkpoint in .* can be read.*--resume false"):
        run(tmp_path / "hurt")
    model, _ = run(tmp_path / "hurt", resume=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(expected), weights(model), strict=True))


def test_matching_goes_on_with_its_own_run_and_drops_others(tmp_path, capfd):
    class Stopping(Toy):
        def batches(self, step, rank, world_size):
            if step == 3:
                raise StopHere
            return super().batches(step, rank, world_size)

    with pytest.raises(StopHere):
        run(tmp_path, Stopping())
    _, result = run(tmp_path, resume="matching")
    assert len(result.losses) == 4  # from step 2 on
    assert "deleted" not in capfd.readouterr().out
    _, result = run(tmp_path, resume="matching", identity={"name": "other"})
    assert len(result.losses) == 6
    said = capfd.readouterr().out
    assert (
        "step-00000006.pth was written with other settings and is deleted; training begins at step 0:\n  - name: toy"
        in said
    )


def test_loggers_hold_every_step_when_the_run_ends(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(make_fabric(), Net(), Toy(), TRAIN, tmp_path, seed=3, identity={}, loggers=["tensorboard"])
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in logged] == [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in logged] == pytest.approx([float(row["loss"]) for row in rows], rel=1e-4)


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


def test_a_full_disk_while_logging_is_one_message(tmp_path):
    log = MetricsLog(make_fabric(), tmp_path, 0, ())
    with file_size_limit(200), pytest.raises(UserError, match=r"Could not write .*metrics\.csv.*Free some space"):
        for step in range(100):
            log.write(step, {"loss": 1.0})
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows[:2] == ["step,loss", "0,1"]
