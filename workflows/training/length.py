"""Length of a run: optimizer steps from max_steps and epochs, once the number of its rows is known."""

import math
from dataclasses import replace

from workflows.errors import UserError
from workflows.training.loop import TrainArgs

MANY_EPOCHS = 10
"""Epochs above which a run's length is printed with a hint on how to train for fewer."""


def limited_to(train: TrainArgs, rows: int, updates: int = 1) -> TrainArgs:
    """The settings with the number of steps that max_steps and epochs come to, whichever ends first.

    Args:
        train: Training settings.
        rows: Rows of the training split.
        updates: Optimizer steps on the same rows.

    Raises:
        UserError: If the warm-up is longer than the run.
    """
    if train.epochs is None:
        return train
    batches = round(train.epochs * rows / train.global_batch_size, 9)  # 1.1 * 800 is above 880
    steps = math.ceil(batches) * updates
    limited = replace(train, max_steps=min(steps, train.max_steps or steps))
    if limited.lr_warmup_steps > limited.max_steps:
        raise UserError(
            f"--train.epochs {train.epochs:g} of {rows:,} rows are {_steps(limited.max_steps)} of "
            f"{train.global_batch_size}, fewer than --train.lr_warmup_steps {train.lr_warmup_steps}. Lower it, e.g. to "
            f"{limited.max_steps // 10}."
        )
    return limited


def length_text(train: TrainArgs, limited: TrainArgs, rows: int, updates: int = 1) -> str:
    """Return the length of a run in steps and epochs, and what to do where the epochs are many.

    Args:
        train: Training settings as they were given.
        limited: `limited_to` of them.
        rows: Rows of the training split.
        updates: Optimizer steps on the same rows.
    """
    epochs = limited.max_steps * train.global_batch_size / (rows * updates)
    text = f"{_steps(limited.max_steps)} of {train.global_batch_size} = {epochs:.1f} epochs of {rows:,} rows"
    if updates > 1:
        text += f", {updates} steps on the same rows"
    if train.epochs is not None and epochs + 1 / rows < train.epochs:
        text += (
            f": --train.max_steps {train.max_steps} comes before --train.epochs {train.epochs:g}; --train.max_steps 0 "
            "trains for all of them"
        )
    elif epochs > MANY_EPOCHS:
        fewer = replace(train, epochs=3, max_steps=0, lr_warmup_steps=0)
        text += (
            ". That is often too many: --train.epochs 3 would be "
            f"{_steps(limited_to(fewer, rows, updates).max_steps)}; --train.patience 3 stops when validation no longer "
            "improves"
        )
    return text


def validation_text(train: TrainArgs, updates: int = 1) -> str:
    """Return what keeping the best step and early stopping cannot do in a run as it is set; nothing where they can.

    Args:
        train: Training settings with the number of steps decided.
        updates: Optimizer steps on the same rows.
    """
    if train.keep != "best" and train.patience is None:
        return ""
    interval = math.lcm(train.eval_interval, updates)  # a checkpoint is possible between updates on other rows only
    lines = []
    if interval != train.eval_interval:
        lines.append(
            f"the best step and --train.patience go by validations every {interval} steps: --train.eval_interval "
            f"{train.eval_interval} is no multiple of --updates {updates}"
        )
    if train.keep == "best" and interval > train.max_steps:
        lines.append(
            f"--train.keep best takes the last of {_steps(train.max_steps)}, the only one that is validated for it. "
            f"Lower --train.eval_interval ({train.eval_interval}) to choose among several"
        )
    if train.patience is not None and (train.patience + 1) * interval >= train.max_steps:
        lines.append(
            f"--train.patience {train.patience} cannot end this run early: it is validated every {interval} of "
            f"{_steps(train.max_steps)}. Lower --train.eval_interval or --train.patience"
        )
    return "\n".join(lines)


def _steps(number: int) -> str:
    return f"{number:,} step" + "s" * (number != 1)
