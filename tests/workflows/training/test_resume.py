"""A run can be made longer, ends with its best step and stops early, equal to the bit to one that was never stopped."""

import csv
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.workflows.training.test_loop import TRAIN, Net, StopHere, Toy, weights
from workflows.checkpoint import plain
from workflows.errors import UserError
from workflows.training.identity import STEPS, result_settings
from workflows.training.loop import FitResult, TrainArgs, fit
from workflows.training.processes import make_fabric
from workflows.training.resume import clear, clear_finished, may_be_longer, trained_weights

CONSTANT = replace(TRAIN, lr_schedule="constant", keep="last")
VAL_LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 7: 0.9, 8: 2.5, 10: 0.5, 12: 0.6}


class Judged(Toy):
    """A toy whose validation loss is written down for each step."""

    def __init__(self, stop_at: int | None = None, losses: dict[int, float] | None = None) -> None:
        super().__init__()
        self.stop_at, self.losses = stop_at, VAL_LOSSES if losses is None else losses

    def batches(self, step: int, rank: int, world_size: int) -> list[Any]:
        if step == self.stop_at:
            raise StopHere
        self.step = step
        return super().batches(step, rank, world_size)

    def validate(self, model: Any) -> dict[str, float]:
        return {"val_loss": self.losses[self.step + 1], "val_step": float(self.step + 1)}


def run(out_dir, train, objective=None, resume="auto") -> tuple[list[torch.Tensor], FitResult]:
    model = Net()
    identity = {**result_settings({"train": plain(train)}), STEPS: train.max_steps}
    objective = objective or Judged()
    result = fit(make_fabric(), model, objective, train, out_dir, seed=3, identity=identity, resume=resume)
    return weights(model), result


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def names(out_dir) -> list[str]:
    return sorted(path.name for path in (out_dir / "checkpoints").iterdir())


def steps_logged(out_dir) -> list[str]:
    return [row["step"] for row in csv.DictReader((out_dir / "metrics.csv").read_text().splitlines())]


@pytest.mark.parametrize("stop_at", [None, 3, 5])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_longer_run_equals_one_that_was_as_long_from_the_start(keep, stop_at, tmp_path):
    train = replace(CONSTANT, keep=keep, max_steps=12)
    expected, whole = run(tmp_path / "whole", train)
    short = replace(train, max_steps=7)
    if stop_at is not None:
        with pytest.raises(StopHere):
            run(tmp_path / "grown", short, Judged(stop_at))
    else:
        _, first = run(tmp_path / "grown", short)
        assert first.kept_step == 7  # validation between two intervals, at the end: a longer run has no such
    grown, result = run(tmp_path / "grown", train)
    assert equal(grown, expected)
    assert (result.steps, result.kept_step, result.metrics) == (12, whole.kept_step, whole.metrics)
    assert whole.kept_step == (10 if keep == "best" else 12)
    assert steps_logged(tmp_path / "grown") == [str(step) for step in range(1, 13)]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_that_depends_on_the_end_forbids_another_one(schedule, tmp_path):
    train = replace(CONSTANT, lr_schedule=schedule)
    with pytest.raises(StopHere):
        run(tmp_path, train, Judged(3))
    message = rf"train\.max_steps: 6, now 8; a {schedule} schedule depends on it[\s\S]*--resume false[\s\S]*constant"
    with pytest.raises(UserError, match=message):
        run(tmp_path, replace(train, max_steps=8))


def test_a_run_does_not_end_before_its_checkpoint(tmp_path):
    with pytest.raises(StopHere):
        run(tmp_path, CONSTANT, Judged(5))
    with pytest.raises(UserError, match=r"it is of step 4, and the run is to end at 3"):
        run(tmp_path, replace(CONSTANT, max_steps=3))
    _, result = run(tmp_path, replace(CONSTANT, max_steps=4))
    assert result.steps == 4
    _, result = run(tmp_path, replace(CONSTANT, max_steps=2), resume="matching")  # of a finished run: trained again
    assert len(result.losses) == 2


BEST = replace(TRAIN, keep="best", max_steps=8, lr_warmup_steps=0)


def test_the_best_step_is_kept_with_its_metrics(tmp_path):
    until_best, _ = run(tmp_path / "short", replace(BEST, max_steps=4, lr_schedule="constant"))
    kept, result = run(tmp_path / "long", replace(BEST, lr_schedule="constant"))
    assert (result.steps, result.kept_step) == (8, 4)
    assert result.metrics == {"val_loss": 1.0, "val_step": 4.0} and equal(kept, until_best)
    last, result = run(tmp_path / "last", replace(BEST, keep="last", lr_schedule="constant"))
    assert result.kept_step == 8 and result.metrics["val_loss"] == 2.5 and not equal(last, kept)
    assert names(tmp_path / "long") == ["step-00000004.pth", "step-00000006.pth", "step-00000008.pth"]
    assert names(tmp_path / "last") == ["step-00000006.pth", "step-00000008.pth"]
    saved = trained_weights(tmp_path / "long" / "checkpoints", 4)
    assert equal([saved["linear.weight"], saved["linear.bias"]], kept)


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5, 6, 7])
@pytest.mark.parametrize("save_interval", [1, 3, 100])
def test_stopped_and_resumed_keeps_the_same_step(save_interval, stop_at, tmp_path):
    train = replace(BEST, save_interval=save_interval)
    expected, whole = run(tmp_path / "whole", train)
    with pytest.raises(StopHere):
        run(tmp_path / "stopped", train, Judged(stop_at))
    kept, result = run(tmp_path / "stopped", train)
    assert equal(kept, expected) and result.metrics == whole.metrics and result.kept_step == whole.kept_step == 4
    kept, result = run(tmp_path / "stopped", train)  # stopped after its last step, before its result was written
    assert equal(kept, expected) and result.metrics == whole.metrics and result.losses == []


def test_the_best_step_of_a_checkpoint_that_is_passed_over_is_no_loss(tmp_path, capfd):
    """The newest checkpoint may be damaged: what the one before it calls the best step must still be there."""
    losses = {2: 1.0, 4: 2.0, 6: 0.5, 8: 0.9}
    expected, _ = run(tmp_path / "whole", BEST, Judged(losses=losses))
    with pytest.raises(StopHere):
        run(tmp_path / "hurt", BEST, Judged(6, losses))
    newest = tmp_path / "hurt" / "checkpoints" / "step-00000006.pth"
    assert names(tmp_path / "hurt") == ["step-00000002.pth", "step-00000004.pth", newest.name]
    newest.write_bytes(newest.read_bytes()[:-200])
    worse = {**losses, 6: 1.5, 8: 1.5}  # another machine may round otherwise
    _, result = run(tmp_path / "hurt", BEST, Judged(losses=worse))
    assert result.kept_step == 2 and result.metrics["val_loss"] == 1.0
    kept, result = run(tmp_path / "again", BEST, Judged(losses=losses))
    assert equal(kept, expected) and result.kept_step == 6


def test_patience_ends_a_run_and_more_of_it_goes_on(tmp_path, capfd):
    patient = replace(BEST, max_steps=12, patience=2)
    kept, result = run(tmp_path / "two", patient)
    assert (result.steps, result.kept_step) == (8, 4)
    assert "stopped after step 8 of 12: val_loss has not improved in 2 validations" in "".join(capfd.readouterr())
    again, result = run(tmp_path / "two", patient)
    assert equal(again, kept) and result.losses == []
    expected, whole = run(tmp_path / "three", replace(patient, patience=3))
    assert (whole.steps, whole.kept_step) == (12, 10)
    more, result = run(tmp_path / "two", replace(patient, patience=3))
    assert equal(more, expected) and (result.steps, result.kept_step) == (12, 10)
    with pytest.raises(
        UserError, match=r"train\.patience: 3, now 2; the run already has 2 validations in a row without"
    ):
        run(tmp_path / "two", patient)


def test_a_tie_is_no_improvement_and_the_largest_reward_is_best(tmp_path):
    class Rewarded(Judged):
        best_by = ("val_reward", "max")

        def validate(self, model):
            return {"val_reward": {2: 0.5, 4: 0.7, 6: 0.7, 8: 0.1}[self.step + 1]}

    _, result = run(tmp_path, BEST, Rewarded())
    assert result.kept_step == 4 and result.stale == 2


def test_between_updates_on_the_same_answers_no_step_is_kept(tmp_path):
    class TwoUpdates(Judged):
        def may_pause(self, steps):
            return steps % 4 == 0

    _, result = run(tmp_path, replace(BEST, save_interval=4), TwoUpdates(losses={2: 0.1, 4: 1.0, 6: 0.2, 8: 2.0}))
    assert result.kept_step == 4 and names(tmp_path) == ["step-00000004.pth", "step-00000008.pth"]


def test_what_a_finished_run_leaves(tmp_path):
    train = replace(BEST, lr_schedule="constant")
    run(tmp_path, train)
    folder = tmp_path / "checkpoints"
    assert may_be_longer("constant", 8, 8) and may_be_longer("cosine", 6, 8) and not may_be_longer("cosine", 8, 8)
    identity = {**result_settings({"train": plain(train)}), "name": "other"}
    clear_finished(folder, identity)
    assert len(names(tmp_path)) == 3  # they are another run's
    clear_finished(folder, result_settings({"train": plain(train)}))
    assert names(tmp_path) == ["step-00000004.pth", "step-00000008.pth"]  # to go on from, and the best one
    _, result = run(tmp_path, replace(train, max_steps=12))
    assert result.kept_step == 10 and len(result.losses) == 4
    clear(folder, may_grow=False, keep_best=True)
    assert not folder.exists()


def test_settings_that_change_no_result_do_not_forbid_to_go_on(tmp_path, capfd):
    expected, _ = run(tmp_path / "whole", CONSTANT)
    with pytest.raises(StopHere):
        run(tmp_path / "other", CONSTANT, Judged(4))
    changed = replace(CONSTANT, row_tokens=7, save_interval=3, eval_interval=6, log_interval=2)
    resumed, _ = run(tmp_path / "other", changed)
    assert equal(resumed, expected)
    assert "train.row_tokens: 512, now 7; sums may differ in their last bits" in "".join(capfd.readouterr())


def test_all_settings_that_forbid_it_are_named_with_both_values(tmp_path):
    with pytest.raises(StopHere):
        run(tmp_path, CONSTANT, Judged(4))
    other = replace(CONSTANT, learning_rate=0.2, max_norm=1.0, keep="best", eval_interval=3)
    with pytest.raises(UserError) as e:
        run(tmp_path, other)
    for line in (
        "train.learning_rate: 0.1, now 0.2",
        "train.max_norm: null, now 1.0",
        "train.keep: last, now best; the weights of earlier steps were not kept",
        "train.eval_interval: 2, now 3; with --train.keep best or --train.patience it decides which step is kept",
    ):
        assert f"  - {line}\n" in str(e.value)
    assert TrainArgs().keep == "best"
