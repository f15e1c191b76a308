"""Training by Lightning's Trainer: early stopping, the best epoch kept, what each epoch gave."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from torch.utils.data import DataLoader


class _History(Callback):
    """The numbers of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.epochs.append({"epoch": trainer.current_epoch, **numbers})


def fit_best(
    task: L.LightningModule,
    train: DataLoader[Any],
    validation: DataLoader[Any],
    out_dir: Path,
    *,
    max_epochs: int,
    patience: int,
    monitor: str = "val_accuracy",
    max_norm: float = 1.0,
    accelerator: str = "auto",
    devices: int | str = 1,
) -> list[dict[str, float]]:
    """Train until `patience` epochs in a row were no better; the task is left with the weights of its best epoch.

    Args:
        task: What is trained.
        train: Training batches.
        validation: Validation batches.
        out_dir: Where Lightning keeps its checkpoint meanwhile.
        max_epochs: The most epochs.
        patience: So many epochs without a better one end the training.
        monitor: The number that decides, to rise if it is an accuracy and to fall if it is a loss.
        max_norm: Gradients are clipped to this norm.
        accelerator: "auto", "cpu", "cuda", "mps".
        devices: How many of them.

    Returns:
        The numbers of each epoch.
    """
    mode = "max" if "accuracy" in monitor else "min"
    history, folder = _History(), out_dir / "checkpoints"
    best = ModelCheckpoint(
        folder, "best", monitor=monitor, mode=mode, save_weights_only=True, enable_version_counter=False
    )
    trainer = L.Trainer(
        max_epochs=max_epochs,
        callbacks=[history, best, EarlyStopping(monitor, patience=patience, mode=mode), TQDMProgressBar(leave=True)],
        gradient_clip_val=max_norm,
        accelerator=accelerator,
        devices=devices,
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*|.*exists and is not empty.*|.*LeafSpec.*")
        trainer.fit(task, train, validation)
    task.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    shutil.rmtree(folder)
    task.eval()
    return history.epochs
