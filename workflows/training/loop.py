"""The one training loop (Lightning Fabric): what SFT, DPO, GRPO and reward modelling share.

In here: gradient clipping, the learning-rate schedule, progress bar; beside it `accumulation.py` (a step's forward and
backward passes), `processes.py` (devices and strategies), `resume.py` (checkpoints), `stopping.py` (signals) and
`logs.py`. A step file supplies an `Objective`: its batches, its loss, its validation.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import lightning as L
import torch

from workflows.checkpoint import plain
from workflows.errors import UserError
from workflows.measure import PeakMemory
from workflows.progress import Bar
from workflows.training.accumulation import accumulate, mean_over_processes
from workflows.training.logs import MetricsLog
from workflows.training.mixed_precision import LOSS_SCALE, LossScaler, MasterWeights
from workflows.training.resume import Checkpoints, ResumeMode
from workflows.training.stopping import Stopping

MOST_SAMPLES = 1 << 20
"""Maximum number of samples of an optimizer step: their indices are kept in memory."""


@dataclass
class TrainArgs:
    """Training settings; names are LitGPT's where LitGPT has them."""

    max_steps: int = 200
    """Maximum number of optimizer steps; 0 for no maximum, if epochs is given."""
    epochs: float | None = None
    """Number of passes over the training rows; the run ends at max_steps where that comes first. null for max_steps
    alone."""
    keep: Literal["best", "last"] = "best"
    """Step whose weights are the result: "best" is that of the best validation (every eval_interval, and the last
    step), since a run over few rows overfits before it ends; "last" takes the last step."""
    patience: int | None = None
    """Early-stopping patience: the run stops after this many validations (every eval_interval) in a row without
    improvement. null never stops."""
    global_batch_size: int = 8
    """Samples per optimizer step, over all devices."""
    row_tokens: int = 512
    """Capacity of a packed row in tokens. A row is one forward and backward pass, so this bounds the memory; a single
    sample (a pair) that is longer gets a row of its own."""
    max_seq_length: int = 512
    """Maximum length of a sample in tokens; longer ones are truncated (and counted) before training."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    lr_warmup_steps: int = 10
    """Steps of linear warm-up."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.999
    """AdamW's decay of the gradient's square."""
    max_norm: float | None = 1.0
    """Gradients are clipped to this norm; null for no clipping."""
    log_interval: int = 1
    """Steps between rows of metrics.csv."""
    eval_interval: int = 50
    """Steps between validations; the last step always validates."""
    save_interval: int = 50
    """Steps between checkpoints to resume from."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, as messages."""
        positive = ("global_batch_size", "row_tokens", "max_seq_length")
        intervals = ("log_interval", "eval_interval", "save_interval")
        found = [
            f"--train.{name} must be at least 1, not {getattr(self, name)}."
            for name in positive + intervals
            if getattr(self, name) < 1
        ]
        if self.max_steps < (1 if self.epochs is None else 0):
            found.append(f"--train.max_steps must be at least 1 (0 with --train.epochs), not {self.max_steps}.")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            found.append(f"--train.epochs must be positive, not {self.epochs}.")
        if self.patience is not None and self.patience < 1:
            found.append(f"--train.patience must be at least 1, or null, not {self.patience}.")
        if self.global_batch_size > MOST_SAMPLES:
            found.append(f"--train.global_batch_size {self.global_batch_size} exceeds {MOST_SAMPLES:,} samples a step.")
        if not 0 < self.learning_rate < math.inf:
            found.append(f"--train.learning_rate must be positive, not {self.learning_rate}.")
        for name, most in (("min_lr", math.inf), ("weight_decay", math.inf), ("beta1", 1), ("beta2", 1)):
            if not 0 <= (value := getattr(self, name)) < most:
                found.append(
                    f"--train.{name} must be 0 or more" + (f", and below {most}" * (most == 1)) + f", not {value}."
                )
        longest = math.inf if self.epochs is not None and self.max_steps == 0 else max(0, self.max_steps)
        if not 0 <= self.lr_warmup_steps <= longest:
            found.append(f"--train.lr_warmup_steps must be between 0 and max_steps, not {self.lr_warmup_steps}.")
        if self.max_norm is not None and not self.max_norm > 0:
            found.append("--train.max_norm must be positive, or null for no clipping.")
        return found


class Batch(Protocol):
    """What the loop needs of a batch: one row, one forward and backward pass."""

    @property
    def real_tokens(self) -> int:
        """Tokens of the samples, without padding or sharing."""

    def to(self, device: torch.device) -> Any:
        """The same batch on a device."""


B = TypeVar("B", bound=Batch, contravariant=True)


class Objective(ABC):
    """What a step trains on. The loss of a step is the sum over its units divided by their number."""

    train: TrainArgs
    """The training settings; `limited_to` has decided their number of steps before the first one."""
    epoch_rows: int
    """Rows of the training split: an epoch is one pass over them."""
    updates = 1
    """Optimizer steps on the same rows."""
    best_by: tuple[str, Literal["min", "max"]] = ("val_loss", "min")
    """Validation metric by which the best step is chosen, and its direction: the smallest or the largest is best."""
    may_rest = False
    """True if a step may have nothing to learn from (answers that are all alike, say): its gradient is zero then."""
    without_signal = "the gradient was zero"
    """The usual reason of a step that had nothing to learn from."""

    def adapt(self, model: Any) -> Any:
        """The loaded model with what the objective needs besides: a head, say."""
        return model

    def write_heads(
        self, folder: Path, trained: dict[str, torch.Tensor], metrics: dict[str, float]
    ) -> dict[str, torch.Tensor]:
        """Write what `adapt` added into the final folder, and give the trained parameters without it."""
        return trained

    def begin(self, fabric: L.Fabric, model: Any, out_dir: Path) -> None:  # noqa: B027 (most need nothing)
        """Called once, with the model as it was loaded (a resumed run's trained weights come after that)."""

    def step_metrics(self) -> dict[str, float]:
        """Further metrics of a step's row of the log, besides the sums that `loss` gives; the mean over processes.

        NaN is a metric that does not exist in this step.
        """
        return {}

    def may_pause(self, steps: int) -> bool:
        """Whether a run may be stopped and gone on with after so many steps."""
        return True

    @abstractmethod
    def batches(self, step: int, rank: int, world_size: int) -> list[Any]:
        """The rows of one optimizer step for one process; a function of its arguments alone."""

    @abstractmethod
    def units(self, batch: Any) -> int:
        """How many units (tokens, pairs) a row adds to the loss."""

    @abstractmethod
    def loss(self, model: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The row's loss summed over its units, and further sums to log (divided by the units, too)."""

    @abstractmethod
    def validate(self, model: Any) -> dict[str, float]:
        """Validation metrics, the same on every process."""

    def report(self, model: Any) -> "Report":
        """What the trained model does with the test split; measured once, at the end."""
        return Report()


@dataclass
class Report:
    """What a step says of itself at its end.

    Attributes:
        metrics: Rows of metrics.json.
        gain: Rows of `evaluation.compare`, the trained model against the one it started from.
        shown: A few held-out questions with greedy answers: {"question", "before", "after", "wanted"}.
        warnings: What got worse than it was before training, and what to do about it.
    """

    metrics: list[dict[str, Any]] = field(default_factory=list)
    gain: list[dict[str, Any]] = field(default_factory=list)
    shown: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: "Report") -> "Report":
        """This report with what another one measured behind it."""
        pairs = {name: [*mine, *getattr(other, name)] for name, mine in vars(self).items()}
        return Report(**pairs)


@dataclass
class FitResult:
    """What a run of the loop did.

    Attributes:
        steps: Optimizer steps in all, those before a resume included.
        seconds: Time in training steps alone (no validation, no saving), those before a resume included.
        real_tokens: Tokens trained on, without padding or sharing.
        metrics: The last validation's metrics; at the end those of the step that is kept.
        best: The best validation at a multiple of eval_interval so far: {"step", "metrics"}; empty if there was none.
        stale: Validations since then.
        plateau: The largest number of validations in a row without improvement.
        kept_step: The step whose weights are the result.
        losses: Training loss of each step since the start or the resume.
        report: What the objective says of the trained model.
        loss_scale: float16's (`mixed_precision.LossScaler`).
        steps_without_signal: Steps that had nothing to learn from: a gradient of zero, or rewards that are all alike.
    """

    steps: int
    seconds: float
    real_tokens: int
    metrics: dict[str, float]
    best: dict[str, Any] = field(default_factory=dict)
    stale: int = 0
    plateau: int = 0
    kept_step: int = 0
    losses: list[float] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    loss_scale: float = LOSS_SCALE
    steps_without_signal: int = 0

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "step": self.steps,
            "seconds": self.seconds,
            "real_tokens": self.real_tokens,
            "metrics": self.metrics,
            "best": self.best,
            "stale": self.stale,
            "plateau": self.plateau,
            "loss_scale": self.loss_scale,
            "steps_without_signal": self.steps_without_signal,
        }

    def is_best(self, by: tuple[str, Literal["min", "max"]]) -> bool:
        """Return whether the last validation is better than the best one before it."""
        name, direction = by
        if not self.best or name not in self.metrics:
            return name in self.metrics
        value, best = self.metrics[name], self.best["metrics"][name]
        return value < best if direction == "min" else value > best


def learning_rate(step: int, train: TrainArgs) -> float:
    """Learning rate of a step (0-based): linear warm-up to the peak, then the decay of `lr_schedule` to `min_lr`."""
    if step < train.lr_warmup_steps:
        return train.learning_rate * (step + 1) / train.lr_warmup_steps
    if train.lr_schedule == "constant":
        return train.learning_rate
    done = (step - train.lr_warmup_steps) / max(1, train.max_steps - train.lr_warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * done)) if train.lr_schedule == "cosine" else 1 - done
    return train.min_lr + (train.learning_rate - train.min_lr) * share


def step_indices(step: int, rows: int, batch_size: int, seed: int) -> list[int]:
    """Which rows a step trains on: each epoch is a permutation drawn from the seed and the epoch's number.

    Args:
        step: The step's number, from 0.
        rows: Rows of the training split.
        batch_size: Rows a step.
        seed: The run's seed.
    """
    indices = []
    permutation: dict[int, list[int]] = {}
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, rows)
        if epoch not in permutation:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            permutation[epoch] = torch.randperm(rows, generator=generator).tolist()
        indices.append(permutation[epoch][offset])
    return indices


def rows_used(rows: int, train: TrainArgs, seed: int) -> list[int]:
    """Which rows a run trains on, in ascending order: all, or those of the one epoch that it does not finish."""
    total = min(rows, train.max_steps * train.global_batch_size)
    return sorted(step_indices(0, rows, total, seed))


def fit(
    fabric: L.Fabric,
    model: Any,
    objective: Objective,
    train: TrainArgs,
    out_dir: Path,
    *,
    seed: int,
    identity: dict[str, Any],
    resume: ResumeMode = "auto",
    loggers: Iterable[str] = (),
    peak: PeakMemory | None = None,
) -> FitResult:
    """Train a model.

    Args:
        fabric: A launched Fabric.
        model: The bare model; the parameters with `requires_grad` are trained.
        objective: Data and loss.
        train: Settings.
        out_dir: Where `metrics.csv` and `checkpoints/` go.
        seed: Seeds dropout, by step and rank.
        identity: What the run's result depends on (model and data hashes, settings). `identity.resume_changes` says
            with which others a checkpoint is resumed.
        resume: "auto" resumes from the newest checkpoint if there is one, True needs one, False trains from step 0;
            "matching" resumes from one of this run and deletes others.
        loggers: "tensorboard" and "wandb" write there besides `metrics.csv`.
        peak: A memory watch that is running; each row of the log has its peak since the row before.

    Returns:
        Steps, seconds, tokens and the validation metrics of the step that is kept, whose weights the model has then.

    Raises:
        UserError: If loss or gradient stop being numbers, a file cannot be written, or `resume` finds none that fits.
        KeyboardInterrupt: After Ctrl-C, SIGTERM or SIGHUP, once the step is finished and its checkpoint written.
    """
    wrapped = fabric.setup_module(model)
    masters = MasterWeights(wrapped.module)
    optimizer: Any = fabric.setup_optimizers(
        torch.optim.AdamW(
            masters.weights.values(),
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay,
            fused=True,  # one kernel for each parameter's update, where the plain form has a dozen
        )
    )
    objective.begin(fabric, wrapped, out_dir)
    saver = Checkpoints(fabric, out_dir / "checkpoints", wrapped, optimizer, masters.weights, plain(identity))
    start = saver.restore(resume)
    masters.publish()
    result = FitResult(start.pop("step"), **start)
    scaler = LossScaler(fabric, wrapped, result.loss_scale)
    log = MetricsLog(fabric, out_dir, result.steps, loggers)
    fabric.print(
        f"{sum(weight.numel() for weight in masters.weights.values()):,} trained parameters, "
        f"steps {result.steps} to {train.max_steps}"
    )

    def require_finite(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise UserError(f"The {name} is {value} at step {step}. {_remedy(name)} {saver.last_good()}")

    def stops_early() -> bool:
        return train.patience is not None and result.stale >= train.patience

    bar = Bar(total=train.max_steps, initial=result.steps, disable=fabric.global_rank != 0, unit="step")
    with log, bar, Stopping(fabric) as stop:
        for step in range(result.steps, train.max_steps):
            if stops_early():
                break
            began = time.perf_counter()
            torch.manual_seed(hash((seed, step, fabric.global_rank)) % 2**63)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, train)
            batches = objective.batches(step, fabric.global_rank, fabric.world_size)
            waited = time.perf_counter() - began  # where answers are sampled and judged first
            while True:
                logged = accumulate(fabric, wrapped, objective, batches, masters, scaler)
                logged |= mean_over_processes(fabric, objective.step_metrics()) | scaler.metrics()
                require_finite(logged, step)
                # Without a limit the norm is still wanted: a step along a gradient that is no number would be saved.
                norm: Any = fabric.clip_gradients(
                    wrapped, optimizer, max_norm=train.max_norm or math.inf, error_if_nonfinite=False
                )
                logged["grad_norm"] = float(norm)
                if not scaler.backed_off(logged["grad_norm"], step):
                    break
                optimizer.zero_grad()
            require_finite({"gradient's norm": logged["grad_norm"]}, step)
            optimizer.step()
            optimizer.zero_grad()
            masters.publish()

            result.steps = step + 1
            scaler.grow(result.steps)
            result.loss_scale = scaler.scale
            seconds = time.perf_counter() - began
            tokens = logged.pop("real_tokens")
            result.seconds += seconds
            result.real_tokens += int(tokens)
            result.losses.append(logged["loss"])
            result.steps_without_signal += logged["grad_norm"] == 0 or logged.get("no_signal") == 1
            last, improved = result.steps == train.max_steps, False
            if last or result.steps % train.eval_interval == 0:
                result.metrics = objective.validate(wrapped)
                require_finite(result.metrics, step)
                logged |= result.metrics
            # a longer run would validate here, too, and its checkpoint can be gone on from
            if result.steps % train.eval_interval == 0 and objective.may_pause(result.steps):
                improved, result.stale = result.is_best(objective.best_by), result.stale + 1
                if improved:
                    result.best, result.stale = {"step": result.steps, "metrics": result.metrics}, 0
                result.plateau = max(result.plateau, result.stale)
                last = last or stops_early()
            if last or result.steps % train.log_interval == 0 or result.steps % train.eval_interval == 0:
                rates = {"tokens_per_second": tokens / seconds, "updated_per_second": tokens / (seconds - waited)}
                memory = {} if peak is None else {"peak_bytes": peak.lap()}
                log.write(result.steps, {**logged, "lr": learning_rate(step, train), **rates, **memory})
            stopping = stop.asked() and objective.may_pause(result.steps)
            is_kept = improved and train.keep == "best"
            if last or stopping or is_kept or result.steps % train.save_interval == 0:
                saver.save(result.counters(), keep_best=train.keep == "best")
            bar.set_postfix_str(
                f"loss {logged['loss']:.3f}, {result.real_tokens / result.seconds:,.0f} tokens/s"
                + "".join(f", {name} {value:.3f}" for name, value in result.metrics.items())
            )
            bar.update()
            if stopping:
                raise KeyboardInterrupt
    result.kept_step = result.steps
    if result.steps < train.max_steps:
        fabric.print(
            f"stopped after step {result.steps:,} of {train.max_steps:,}: {objective.best_by[0]} has not improved in "
            f"{result.stale} validation{'s' * (result.stale != 1)} (--train.patience)"
        )
    if train.keep == "best" and result.best and not result.is_best(objective.best_by):
        result.kept_step, result.metrics = result.best["step"], result.best["metrics"]
        if result.kept_step < result.steps:
            saver.load(result.kept_step)
            masters.publish()
            name = objective.best_by[0]
            fabric.print(f"step {result.kept_step:,} is kept, with the best {name}: {result.metrics[name]:.4f}")
    result.report = objective.report(wrapped)
    if result.steps_without_signal:
        fabric.print(signal_report(result, objective.without_signal))
    return result


def signal_report(result: FitResult, reason: str) -> str:
    """Return the number of steps of a run that had nothing to learn from, and what to do where that is all of them."""
    count = f"{result.steps_without_signal} of {result.steps} steps had nothing to learn from ({reason})"
    if result.steps_without_signal < result.steps:
        return count
    return f"{count}: the model has learned nothing in this run. Change the data, the reward or the loss's settings."


def _remedy(name: str) -> str:
    """Return what to do about a metric of a training step that is not finite."""
    if name.startswith(("reward", "val_reward")):
        return "The rewards are too large to be summed. Scale them down, e.g. with a smaller `weight` in --rewards."
    return "Lower --train.learning_rate, or use --precision 32-true."
