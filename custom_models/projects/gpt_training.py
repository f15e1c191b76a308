"""How a GPT is trained: its settings, the learning rate over the steps, and the task as Lightning takes it."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from custom_models.gpt import GPT, next_token_loss
from custom_models.muon import Muon, Together, split_parameters
from workflows.errors import UserError

Schedule = Literal["trapezoidal", "linear", "cosine", "constant"]
_NOT_THE_RESULT = ("eval_interval", "save_interval", "log_interval", "compile")
"""Settings that may change when a run goes on: they decide what is seen of it, not what comes out."""


@dataclass
class GPTFit:
    """How a GPT is trained."""

    max_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Rows of a step, over all devices."""
    accumulate: int = 1
    """Parts that a step's rows are cut into, for less memory."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """What steps the layers' matrices: "muon", or "adamw" as everything else."""
    learning_rate: float = 3e-3
    """AdamW's, at its highest."""
    matrix_rate: float = 0.02
    """Muon's, at its highest."""
    weight_decay: float = 0.0
    """Of matrices and tables."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.99
    """AdamW's decay of the gradient's square."""
    momentum: float = 0.95
    """Muon's decay of the gradient's mean."""
    schedule: Schedule = "trapezoidal"
    """The rate after the warm-up: "trapezoidal" (stays, then falls in a straight line), "linear", "cosine" or
    "constant"."""
    warmup_steps: int = 20
    """Steps in which the rate rises."""
    decay: float = 0.5
    """The share of steps in which a trapezoidal rate falls."""
    least: float = 0.0
    """What it falls to, as a share of its highest."""
    max_norm: float = 1.0
    """Gradients are clipped to this norm."""
    eval_interval: int = 100
    """Steps between validations."""
    save_interval: int = 100
    """Steps between checkpoints to resume from."""
    log_interval: int = 10
    """Steps between rows of the logs."""
    compile: bool = False
    """Let torch.compile fuse the model's operations: minutes of compiling that pay for long runs."""
    precision: Literal["32-true", "bf16-mixed"] | None = "32-true"
    """What it computes in; null: "bf16-mixed" where the processor or the GPU knows bfloat16."""

    def problems(self, group: str = "fit") -> list[str]:
        """Everything that is wrong with them, as messages that name the group of options they are."""
        found = [f"--{group}.{name} must be at least 1, not {getattr(self, name)}."
                 for name in ("max_steps", "batch_size", "accumulate", "eval_interval", "save_interval", "log_interval")
                 if getattr(self, name) < 1]  # fmt: skip
        found += [f"--{group}.{name} must be positive, not {getattr(self, name)}."
                  for name in ("learning_rate", "matrix_rate", "max_norm") if not getattr(self, name) > 0]  # fmt: skip
        found += [f"--{group}.{name} must be from 0 to below 1, not {getattr(self, name)}."
                  for name in ("beta1", "beta2", "momentum", "least") if not 0 <= getattr(self, name) < 1]  # fmt: skip
        if not self.weight_decay >= 0:
            found.append(f"--{group}.weight_decay must be at least 0, not {self.weight_decay}.")
        found += [] if 0 <= self.decay <= 1 else [f"--{group}.decay must be from 0 to 1, not {self.decay}."]
        if not 0 <= self.warmup_steps <= self.max_steps:
            found.append(f"--{group}.warmup_steps must be from 0 to max_steps, not {self.warmup_steps}.")
        if self.accumulate >= 1 and self.batch_size % self.accumulate:
            found.append(f"--{group}.batch_size {self.batch_size} cannot be cut into {self.accumulate} equal parts.")
        return found

    def identity(self) -> dict[str, Any]:
        """What decides the result."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_THE_RESULT}

    def share_of_rate(self, step: int) -> float:
        """The learning rate of a step, from 0 on, as a share of its highest.

        After w steps of rising, with x = (step - w) / (max_steps - w) from 0 to 1 and m the least share:

            linear       1 - (1 - m) x
            cosine       m + (1 - m) (1 + cos(pi x)) / 2                  (Loshchilov and Hutter 2016, arXiv 1608.03983)
            trapezoidal  1, then straight down to m in the last `decay` of all steps (warmup-stable-decay, Hu et al.
                         2024, arXiv 2404.06395, section 4; Hägele et al. 2024, arXiv 2405.18392)

        A trapezoid's flat part can be made longer, and the fall tried from any point of it: a cosine has one length.
        """
        risen = (step + 1) / (self.warmup_steps + 1) if step < self.warmup_steps else 1.0
        if risen < 1 and self.schedule != "trapezoidal":
            return risen
        x = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        falls = 1 - self.least
        if self.schedule == "cosine":
            return self.least + falls * (1 + math.cos(math.pi * min(1.0, x))) / 2
        if self.schedule == "constant":
            return 1.0
        falling = self.max_steps - self.warmup_steps if self.schedule == "linear" else self.decay * self.max_steps
        fallen = self.least + falls * min(1.0, max(0, self.max_steps - step) / max(1.0, falling))
        return min(risen, fallen)  # a trapezoid of few steps may fall before it has risen

    def make_optimizer(self, model: GPT) -> Optimizer:
        """The optimizer of a model's parameters; norms and biases do not decay."""
        matrices, tables, vectors = split_parameters(model)
        by_adamw = tables if self.optimizer == "muon" else matrices + tables
        groups = [{"params": by_adamw, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        adamw = AdamW(groups, lr=self.learning_rate, betas=(self.beta1, self.beta2), fused=True)
        if self.optimizer == "adamw":
            return adamw
        return Together([Muon(matrices, self.matrix_rate, self.momentum, self.weight_decay), adamw])


class GPTTask(L.LightningModule):
    """A GPT in training.

    Args:
        model: The model.
        fit: How it is trained.
        identity: What the run depends on, its `seed` among it; kept in checkpoints.
    """

    def __init__(self, model: GPT, fit: GPTFit, identity: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.fit_args, self.identity = model, fit, identity
        self.validated = torch.zeros(2, dtype=torch.float64)
        """The sum of the validation tokens' losses, and how many these are."""
        if fit.compile:
            self.model.compile()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of inputs and targets, (B, T) each."""
        ids, targets = batch
        loss = next_token_loss(self.model(ids), targets)
        if not torch.isfinite(loss):  # or the next checkpoint would be what a run goes on from
            raise UserError(
                f"The loss is not finite at step {self.global_step}: the training diverged. Lower the learning rate "
                "and the matrix rate. What was there before is as it was."
            )
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log the rate that this step takes; let dropout, too, depend on the seed and the batch's number alone."""
        self.log("rate", self.fit_args.share_of_rate(self.global_step))
        generator = np.random.default_rng((self.identity["seed"], batch_idx, self.global_rank))
        torch.manual_seed(int(generator.integers(1 << 62)))

    def on_validation_epoch_start(self) -> None:
        """Begin to sum anew."""
        self.validated = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add up the losses of all tokens: the mean over batches would weigh those of the last, shorter one more."""
        ids, targets = batch
        logits = self.model(ids)  # (B, T, vocab_size)
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        self.validated += torch.tensor([float(total), targets.numel()], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        """The mean over the whole split, over all processes."""
        summed = self.trainer.strategy.reduce(self.validated.to(self.device), reduce_op="sum")
        self.log("val_loss", (summed[0] / summed[1]).float(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """The optimizer with the rate's schedule."""
        optimizer = self.fit_args.make_optimizer(self.model)
        share: Callable[[int], float] = self.fit_args.share_of_rate
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, share), "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the run depends on."""
        checkpoint["run"] = self.identity
