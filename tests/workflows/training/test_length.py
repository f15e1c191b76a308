"""Epochs and steps decide a run's length together, and both are printed."""

from dataclasses import replace

import pytest

from workflows.errors import UserError
from workflows.training.length import length_text, limited_to, validation_text
from workflows.training.loop import TrainArgs

TRAIN = TrainArgs(max_steps=500, global_batch_size=16, lr_warmup_steps=2)


@pytest.mark.parametrize(
    ("max_steps", "epochs", "rows", "updates", "steps"),
    [
        (500, None, 200, 1, 500),
        (500, 3, 200, 1, 38),  # 37.5
        (0, 3, 30_000, 1, 5625),
        (500, 3, 30_000, 1, 500),  # whichever comes first
        (0, 0.5, 320, 1, 10),
        (0, 1.1, 800, 1, 55),  # 1.1 * 800 is above 880 in binary
        (500, 1, 32, 3, 6),  # two steps' questions, three updates on each
    ],
)
def test_the_number_of_steps(max_steps, epochs, rows, updates, steps):
    train = replace(TRAIN, max_steps=max_steps, epochs=epochs)
    assert train.problems() == []
    assert limited_to(train, rows, updates) == replace(train, max_steps=steps)


def text_of(rows: int, updates: int = 1, **changes: object) -> str:
    train = replace(TRAIN, **changes)
    return length_text(train, limited_to(train, rows, updates), rows, updates)


def test_epochs_are_printed_with_a_hint_where_they_are_many():
    assert text_of(8000) == "500 steps of 16 = 1.0 epochs of 8,000 rows"
    many = text_of(200)
    assert many.startswith("500 steps of 16 = 40.0 epochs of 200 rows. That is often too many: ")
    assert "--train.epochs 3 would be 38 steps" in many and "--train.patience 3" in many
    assert text_of(200, epochs=3) == "38 steps of 16 = 3.0 epochs of 200 rows"
    assert text_of(200, 2, max_steps=50) == "50 steps of 16 = 2.0 epochs of 200 rows, 2 steps on the same rows"


def test_a_limit_that_comes_before_the_epochs_is_named():
    assert text_of(30_000, epochs=3) == (
        "500 steps of 16 = 0.3 epochs of 30,000 rows: --train.max_steps 500 comes before --train.epochs 3; "
        "--train.max_steps 0 trains for all of them"
    )


def test_a_warm_up_longer_than_the_epochs_is_refused():
    with pytest.raises(UserError, match=r"epochs 1 of 200 rows are 13 steps of 16, fewer than .*warmup_steps 20"):
        limited_to(replace(TRAIN, epochs=1, lr_warmup_steps=20), 200)


def test_what_cannot_be_is_refused():
    for changes, message in (
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"max_steps": -1, "epochs": 1}, "max_steps must be at least 1"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"epochs": float("nan")}, "epochs must be positive"),
        ({"patience": 0}, "patience must be at least 1"),
    ):
        assert message in replace(TRAIN, lr_warmup_steps=0, **changes).problems()[0]


def test_no_warm_up_is_no_problem_of_a_run_without_steps():
    for changes in ({"max_steps": -1}, {"max_steps": 0}, {"max_steps": -1, "epochs": 1}):
        assert len(replace(TRAIN, lr_warmup_steps=0, **changes).problems()) == 1
    assert replace(TRAIN, max_steps=0, epochs=1).problems() == []


def test_one_step_is_no_plural():
    assert text_of(160, max_steps=1) == "1 step of 16 = 0.1 epochs of 160 rows"


@pytest.mark.parametrize(
    ("changes", "updates", "notes"),
    [
        ({"eval_interval": 50}, 1, []),
        ({"eval_interval": 50, "patience": 8}, 1, []),
        ({"eval_interval": 50, "patience": 9}, 1, ["patience 9 cannot end this run early"]),
        ({"eval_interval": 501}, 1, ["takes the last of 500 steps"]),
        ({"eval_interval": 500}, 1, []),
        ({"eval_interval": 500, "keep": "last"}, 1, []),
        ({"eval_interval": 250, "keep": "last", "patience": 1}, 1, ["patience 1 cannot end this run early"]),
        (
            {"eval_interval": 25},
            4,
            ["go by validations every 100 steps: --train.eval_interval 25 is no multiple of --updates 4"],
        ),
        ({"eval_interval": 25, "keep": "last"}, 4, []),
        ({"eval_interval": 24}, 4, []),
    ],
)
def test_validations_that_cannot_choose_a_step_are_reported(changes, updates, notes):
    lines = validation_text(replace(TRAIN, **changes), updates).splitlines()
    assert len(lines) == len(notes)
    for line, note in zip(lines, notes, strict=True):
        assert note in line
