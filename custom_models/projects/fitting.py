"""Training by Lightning's Trainer: early stopping, the best epoch kept, what each epoch gave."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader

from custom_models.projects.keeping import Keeper, Resumable, folder_of, keep_done, read_done, restore_chances
from workflows.errors import UserError
from workflows.training.processes import Accelerator, choose_accelerator, default_precision


@dataclass
class FitArgs:
    """How a project trains."""

    batch_size: int = 64
    """Texts in a batch."""
    learning_rate: float = 5e-4
    """At its highest."""
    warmup: float = 0.1
    """The share of steps in which the rate rises; then it falls to nothing."""
    weight_decay: float = 0.01
    """Of matrices."""
    max_norm: float = 1.0
    """Gradients are clipped to this norm."""
    max_epochs: int = 10
    """The most epochs."""
    patience: int = 4
    """So many epochs that are no better than the best one end the training."""
    ema_decay: float = 0.0
    """Above 0, validate and keep a moving average of the weights: so much of it stays in each step."""
    accelerator: Accelerator = "auto"
    """What computes."""
    precision: Literal["32-true", "bf16-mixed"] | None = "32-true"
    """What it computes in; null: "bf16-mixed", which is faster, where the processor or the GPU knows bfloat16."""

    def problems(self, group: str = "fit") -> list[str]:
        """Everything that is wrong with them, as messages that name the group of options they are."""
        found = [f"--{group}.{name} must be at least 1, not {getattr(self, name)}."
                 for name in ("batch_size", "max_epochs", "patience") if getattr(self, name) < 1]  # fmt: skip
        found += [f"--{group}.{name} must be positive, not {getattr(self, name)}."
                  for name in ("learning_rate", "max_norm") if not getattr(self, name) > 0]  # fmt: skip
        found += (
            [] if 0 <= self.ema_decay < 1 else [f"--{group}.ema_decay must be from 0 to below 1, not {self.ema_decay}."]
        )
        found += [] if 0 <= self.warmup < 1 else [f"--{group}.warmup must be from 0 to below 1, not {self.warmup}."]
        found += (
            [] if self.weight_decay >= 0 else [f"--{group}.weight_decay must be at least 0, not {self.weight_decay}."]
        )
        return found

    def optimizer(self, module: nn.Module, total_steps: int) -> Any:
        """AdamW and its schedule for a module's parameters, as Lightning takes them; biases and norms do not decay."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        rising = max(1, round(self.warmup * total_steps))

        def share_of_rate(step: int) -> float:
            return min((step + 1) / rising, max(0.0, (total_steps - step) / max(1, total_steps - rising)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next(module.parameters()).device


def fast_precision(accelerator: Accelerator) -> Literal["32-true", "bf16-mixed"]:
    """bfloat16 beside float32 weights where the device multiplies in it, else float32."""
    fast = default_precision(on_gpu=choose_accelerator(accelerator) == "cuda") != "32-true"
    return "bf16-mixed" if fast else "32-true"


def seed_problems(*seeds: int) -> list[str]:
    """What is wrong with seeds, as messages: there must be one, and NumPy and Lightning take 32 bits."""
    if not seeds:
        return ["--seeds needs at least one."]
    return [f"--seed must be from 0 to {(1 << 32) - 1}, not {seed}." for seed in seeds if not 0 <= seed < 1 << 32]


def too_small(**options: tuple[float | None, int]) -> list[str]:
    """Messages about options (value, least) that are below their least; null is none."""
    return [
        f"--{name} must be at least {least}, not {value}."
        for name, (value, least) in options.items()
        if value is not None and value < least
    ]


def no_shares(**options: float) -> list[str]:
    """Messages about options that are not from 0 to 1."""
    return [f"--{name} must be from 0 to 1, not {value}." for name, value in options.items() if not 0 <= value <= 1]


class _History(Callback):
    """The numbers of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # A score may be finite where the weights are not: an answer is found among scores that are no numbers, too.
        finite = all(math.isfinite(value) for value in numbers.values())
        if not finite or not all(parameter.isfinite().all() for parameter in pl_module.parameters()):
            raise UserError(
                f"The training diverged: after epoch {trainer.current_epoch + 1} its numbers are not finite. Lower the "
                "learning rate. What was there before is as it was."
            )
        self.epochs.append({"epoch": trainer.current_epoch, **numbers})


def fit_best(
    task: L.LightningModule,
    train: DataLoader[Any],
    validation: DataLoader[Any],
    out_dir: Path,
    fit: FitArgs,
    monitor: str = "val_accuracy",
) -> list[dict[str, float]]:
    """Train until epochs are no better any more; the task is left with its best epoch's weights, where it was trained.

    A training that was stopped goes on, and one that is done already is not repeated (`keeping.py`).

    Args:
        task: What is trained.
        train: Training batches, all drawn in this process.
        validation: Validation batches.
        out_dir: The project's folder, which keeps it until the project is done.
        fit: How.
        monitor: The number that decides, to fall if it is a loss and else to rise.

    Returns:
        The numbers of each epoch.

    Raises:
        UserError: If the training diverges.
    """
    device = choose_accelerator(fit.accelerator)
    folder = folder_of(task, [train, validation], out_dir)
    if (done := read_done(folder)) is not None:
        task.load_state_dict(done["weights"])
        restore_chances(done["chances"])
        task.eval().to(device)
        epochs: list[dict[str, float]] = done["epochs"]
        return epochs
    mode = "min" if "loss" in monitor else "max"
    history, batches = _History(), Resumable(train)
    keeper = Keeper(folder, batches)
    checkpoint = keeper.checkpoint()
    # before the epoch's end, where the keeper's checkpoint is to know of it
    best = ModelCheckpoint(folder, "best", monitor=monitor, mode=mode, save_weights_only=True,
                           save_on_train_epoch_end=False)  # fmt: skip
    callbacks = [history, best, EarlyStopping(monitor, patience=fit.patience, mode=mode), TQDMProgressBar()]
    callbacks += [EMAWeightAveraging(decay=fit.ema_decay)] if fit.ema_decay else []
    callbacks += [keeper]
    trainer = L.Trainer(
        max_epochs=fit.max_epochs,
        callbacks=callbacks,
        gradient_clip_val=fit.max_norm,
        accelerator=fit.accelerator,
        devices=1,
        precision=fit.precision or fast_precision(fit.accelerator),
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*does not have many workers.*|.*LeafSpec.*|.*not resumable.*|.*is not empty.*"
        )
        try:
            trainer.fit(task, batches, validation, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
    weights: dict[str, Tensor] = torch.load(best.best_model_path, weights_only=True, map_location="cpu")["state_dict"]
    task.load_state_dict(weights)
    task.eval().to(device)  # what is scored now is scored there
    keep_done(folder, weights, history.epochs)
    if keeper.asked():  # in the last moments
        raise KeyboardInterrupt
    return history.epochs
