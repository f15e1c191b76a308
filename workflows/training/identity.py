"""Settings that decide a run's result: what forbids a stopped run to resume, and what makes a finished one stale.

Every setting decides the result unless it is named here, so a new one is safe until its class is known:

* without any effect on the result: places, devices, loggers, intervals of logging and saving;
* rounding only: how samples fall into rows and batches changes the order of sums, and with it their last bits;
* measured at the end only: a stopped run resumes, a finished one is measured again;
* the run's length: it may grow where no earlier step depends on it, which is where the learning rate does not;
* validation: it decides something only where it chooses the step that is kept, or the one that is the last.
"""

from collections.abc import Iterator
from typing import Any

PLACES = ("checkpoint_dir", "teacher_dir", "data", "replay", "out_dir", "chat_template")
"""Where things are; their contents are compared by hashes."""
NEUTRAL = (*PLACES, "resume", "loggers", "accelerator", "devices", "num_nodes", "strategy")
NEUTRAL_TRAIN = ("log_interval", "save_interval")
ROUNDING = ("train.row_tokens", "sampling_batch")
MEASURED = ("max_test_rows", "frozen_reference")
"""Where a frozen reference would change the training (full weights with a KL), a step demands one."""
LENGTH = ("train.max_steps", "train.epochs")
STEPS = "steps"
"""The number of optimizer steps that the settings of `LENGTH` come to for the data at hand."""
VALIDATION = ("train.eval_interval", "max_val_rows")
_HASH_DIGITS = 12

Settings = dict[str, Any]


def result_settings(settings: Settings) -> Settings:
    """The settings, as plain values, without those that have no effect on the result."""
    train = {name: value for name, value in settings.get("train", {}).items() if name not in NEUTRAL_TRAIN}
    idle = () if settings.get("replay") else ("replay_share",)
    others = {name: value for name, value in settings.items() if name not in NEUTRAL and name not in idle}
    return {**others, "train": train}


def result_changes(before: Settings, now: Settings) -> list[str]:
    """Return the settings that make a finished result differ from the one asked for, a line each with both values.

    Args:
        before: `result_settings` of the finished run.
        now: Those of the command.
    """
    validates = _validation_decides(before) or _validation_decides(now)
    free = ROUNDING if validates else (*ROUNDING, "train.eval_interval")
    why = _schedule_reason(now)
    return [text + why * (name in LENGTH) for name, text in _differences(before, now) if name not in free]


def resume_changes(before: Settings, now: Settings, plateau: int = 0) -> tuple[list[str], list[str]]:
    """Return what has changed since a checkpoint was written: what forbids resuming from it, and what does not.

    Args:
        before: The run's identity as the checkpoint has it.
        now: The identity of the run that is to resume.
        plateau: The largest number of validations in a row without improvement that the run has gone through.

    Returns:
        Two lists of lines, each with both values and, where it is not plain, the reason.
    """
    forbidding, harmless = [], []
    found = dict(_differences(before, now))
    if before.get(STEPS) == now.get(STEPS) or STEPS not in before or STEPS not in now:
        harmless += [found[name] for name in LENGTH if name in found]
    else:
        said = "; ".join(found[name] for name in LENGTH if name in found) or found[STEPS]
        if why := _schedule_reason(now):
            forbidding.append(said + why)
        else:
            harmless.append(said)
    for name, text in found.items():
        if name in LENGTH or name == STEPS:
            continue
        if name in ROUNDING:
            harmless.append(f"{text}; sums may differ in their last bits")
        elif name in MEASURED or (name == "max_new_tokens" and "rewards" not in now):  # dpo: of answers to be read
            harmless.append(text)
        elif name in VALIDATION:
            if _validation_decides(now):
                forbidding.append(f"{text}; with --train.keep best or --train.patience it decides which step is kept")
            else:
                harmless.append(text)
        elif name == "train.keep":
            if now["train"]["keep"] == "last":
                harmless.append(text)
            else:
                forbidding.append(f"{text}; the weights of earlier steps were not kept")
        elif name == "train.patience":
            wanted = now["train"].get("patience")
            if wanted is None or wanted > plateau or _is_more_patient(before, now):
                harmless.append(text)
            else:
                forbidding.append(f"{text}; the run already has {plateau} validations in a row without improvement")
        else:
            forbidding.append(text)
    return forbidding, harmless


def _schedule_reason(settings: Settings) -> str:
    """Return why the number of steps decides the result of each of them; nothing where it does not."""
    schedule = settings.get("train", {}).get("lr_schedule")
    return "" if schedule == "constant" else f"; a {schedule} schedule depends on it"


def _validation_decides(settings: Settings) -> bool:
    train = settings.get("train", {})
    return train.get("keep") == "best" or train.get("patience") is not None


def _is_more_patient(before: Settings, now: Settings) -> bool:
    was = before["train"].get("patience")
    return was is not None and now["train"]["patience"] > was


def _differences(before: Settings, now: Settings) -> Iterator[tuple[str, str]]:
    """Names of settings that differ, each with a line that names both values."""
    old, new = dict(_flat(before)), dict(_flat(now))
    for name in {**old, **new}:
        if name in old and name in new and (old[name] == new[name] or (_is_idle(name, old) and _is_idle(name, new))):
            continue
        was, value = (_shown(values[name]) if name in values else "not set" for values in (old, new))
        yield name, f"{name}: {was}, now {value}"


def _is_idle(name: str, settings: Settings) -> bool:
    """Return whether a setting has no effect, given the others."""
    if name.startswith("lora_") and name != "lora_r":
        return settings.get("lora_r") == 0
    if name == "train.min_lr":
        return settings.get("train.lr_schedule") == "constant"
    return name in ("alpha", "temperature") and settings.get("divergence") == "none"


def _flat(values: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and all(digit in "0123456789abcdef" for digit in value):
        return f"sha256 {value[:_HASH_DIGITS]}…"
    return "null" if value is None else str(value)
