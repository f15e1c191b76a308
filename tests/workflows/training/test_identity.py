"""Every setting of every training step has a class: what it decides, and what a change of it means for a run."""

import inspect
from dataclasses import fields
from typing import Any

import pytest

from workflows import distill_lm, dpo, grpo, lora, ppo, reward
from workflows.checkpoint import plain
from workflows.training import identity
from workflows.training.identity import STEPS, result_changes, result_settings, resume_changes
from workflows.training.loop import TrainArgs
from workflows.training.step import RunArgs

STEP_SETTINGS = {step.__name__.rpartition(".")[2]: step.setup for step in (lora, dpo, reward, grpo, ppo, distill_lm)}


def settings_of(step: str, **changes: Any) -> dict[str, Any]:
    """A step's arguments with their defaults."""
    own = {name: p.default for name, p in inspect.signature(STEP_SETTINGS[step]).parameters.items() if name != "run"}
    run = {field.name: field.default for field in fields(RunArgs)}
    return result_settings(plain({**run, **own, **changes}))


def with_train(step: str, **changes: Any) -> dict[str, Any]:
    found = settings_of(step)
    return {**found, "train": {**found["train"], **changes}}


def test_the_names_of_the_classes_are_names_of_settings():
    known = {f"train.{field.name}" for field in fields(TrainArgs)} | {field.name for field in fields(RunArgs)}
    known |= {name for setup in STEP_SETTINGS.values() for name in inspect.signature(setup).parameters}
    named = (identity.ROUNDING, identity.MEASURED, identity.LENGTH, identity.VALIDATION, identity.NEUTRAL)
    assert {name for names in named for name in names} <= known
    assert {f"train.{name}" for name in identity.NEUTRAL_TRAIN} <= known


@pytest.mark.parametrize("step", STEP_SETTINGS)
def test_any_other_setting_forbids_to_go_on_and_is_named_with_both_values(step):
    free = {*identity.ROUNDING, *identity.MEASURED, *identity.LENGTH, "train.patience"}
    free |= {"max_new_tokens"} if step == "dpo" else set()
    before = settings_of(step, lora_r=4)
    names = [name for name in before if name != "train"] + [f"train.{name}" for name in before["train"]]
    for name in names:
        now = {**before, "train": dict(before["train"])}
        where = now["train"] if name.startswith("train.") else now
        where[name.removeprefix("train.")] = 2 if name == "train.patience" else "another"
        forbidding, harmless = resume_changes(before, now)
        if name in free:
            assert not forbidding and all(line.startswith(f"{name}: ") for line in harmless), name
        else:
            assert len(forbidding) == 1 and forbidding[0].startswith(f"{name}: "), name
            assert ", now another" in forbidding[0] and harmless == []


@pytest.mark.parametrize(
    ("step", "before", "now"),
    [
        ("lora", {"devices": 1, "strategy": "auto", "data": "a"}, {"devices": 2, "strategy": "fsdp", "data": "b"}),
        ("lora", {"lora_r": 0, "lora_alpha": 32}, {"lora_r": 0, "lora_alpha": 16}),
        ("distill_lm", {"divergence": "none", "alpha": 0.9}, {"divergence": "none", "alpha": 0.5}),
    ],
)
def test_what_has_no_effect_is_no_change(step, before, now):
    before, now = settings_of(step, **before), settings_of(step, **now)
    assert result_changes(before, now) == [] and resume_changes(before, now) == ([], [])


def test_the_least_learning_rate_of_a_constant_schedule_has_no_effect():
    before, now = (with_train("lora", lr_schedule="constant", min_lr=rate) for rate in (0.0, 1e-5))
    assert result_changes(before, now) == []


def test_the_length_may_grow_under_a_constant_schedule_only():
    for schedule, forbids in (("constant", False), ("cosine", True), ("linear", True)):
        before, now = (
            with_train("lora", lr_schedule=schedule, max_steps=0, epochs=epochs) | {STEPS: 10 * epochs}
            for epochs in (3, 5)
        )
        forbidding, harmless = resume_changes(before, now)
        assert bool(forbidding) == forbids and bool(harmless) != forbids
        assert (forbidding + harmless)[0].startswith("train.epochs: 3, now 5")
        # epochs or steps: what they come to counts
        other = with_train("lora", lr_schedule=schedule, max_steps=30) | {STEPS: 30}
        assert resume_changes(before, other)[0] == []


def test_a_finished_result_is_another_where_more_than_rounding_differs():
    base = settings_of("grpo")
    assert result_changes(base, settings_of("grpo", sampling_batch=3)) == []
    assert result_changes(base, settings_of("grpo", max_test_rows=3)) == ["max_test_rows: 1000, now 3"]
    assert result_changes(base, with_train("grpo", row_tokens=3)) == []
    assert result_changes(base, with_train("grpo", patience=3)) == ["train.patience: null, now 3"]
    assert result_changes(base, with_train("grpo", eval_interval=3)) == ["train.eval_interval: 50, now 3"]
    last = [with_train("grpo", keep="last", eval_interval=interval) for interval in (50, 3)]
    assert result_changes(*last) == []
    before = {name: value for name, value in base.items() if name != "top_p"}  # of a version without it
    assert result_changes(before, base) == ["top_p: not set, now 1.0"]


@pytest.mark.parametrize(
    ("was", "now", "plateau", "forbids"),
    [(None, 3, 2, False), (None, 3, 3, True), (5, 3, 2, False), (5, 3, 4, True), (3, 5, 3, False), (3, None, 3, False)],
)
def test_patience_may_change_as_long_as_no_earlier_end_is_missed(was, now, plateau, forbids):
    before, wanted = (with_train("lora", patience=patience) for patience in (was, now))
    forbidding, harmless = resume_changes(before, wanted, plateau)
    assert bool(forbidding) == forbids and len(forbidding + harmless) == 1


def test_a_hash_is_shortened():
    before, now = ({"data": {"train": digit * 64}} for digit in "ab")
    assert resume_changes(before, now)[0] == [f"data.train: sha256 {'a' * 12}…, now sha256 {'b' * 12}…"]
