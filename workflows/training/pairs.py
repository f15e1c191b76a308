"""Objective of preferences over pairs, DPO and its variants: a tree is a prompt with a chosen and a rejected answer."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from workflows.checkpoint import metric, share_metric
from workflows.training import losses
from workflows.training.batch import PackedBatch, Tree, pack
from workflows.training.drift import DriftCheck
from workflows.training.loop import Objective, Report, TrainArgs, rows_used, step_indices
from workflows.training.losses import per_completion
from workflows.training.model import GPT
from workflows.training.reference import key_of, reference_logprobs

PairLoss = Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo"]
WITHOUT_REFERENCE = ("simpo", "orpo")


@dataclass(frozen=True)
class PairSettings:
    """What the loss of a pair depends on; see `setup` for the fields."""

    loss: PairLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    per_token: bool = False
    gamma: float = 0.5
    sft_weight: float = 0.0

    def problems(self) -> list[str]:
        """Everything that is wrong with them, as messages."""
        found = []
        if not self.beta > 0:
            found.append(f"--beta must be positive, not {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            found.append(f"--label_smoothing must be from 0 to below 0.5, not {self.label_smoothing}.")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            found.append(f"--label_smoothing belongs to --loss sigmoid and robust, not to {self.loss}.")
        if self.per_token and self.loss in WITHOUT_REFERENCE:
            found.append(f"--per_token: {self.loss} is defined per token; leave it out.")
        if self.sft_weight < 0:
            found.append(f"--sft_weight must be at least 0, not {self.sft_weight}.")
        return found


@dataclass(frozen=True)
class PairBatch:
    """A packed row of pairs; of its completions the even ones are chosen, the odd ones rejected.

    Attributes:
        rows: The row.
        reference: log pi_ref of its learned tokens, shape (N,); None where the loss needs none.
    """

    rows: PackedBatch
    reference: torch.Tensor | None

    @property
    def real_tokens(self) -> int:
        """Tokens of the samples, a prompt counted for each of its two answers."""
        return self.rows.real_tokens

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on a device."""
        return PairBatch(self.rows.to(device), None if self.reference is None else self.reference.to(device))


class DPO(Objective):
    """The objective: the mean over pairs of one of `training/losses.py`'s losses."""

    def __init__(
        self,
        train_pairs: list[Tree],
        validation_pairs: list[Tree],
        train: TrainArgs,
        seed: int,
        settings: PairSettings,
        model_identity: dict[str, Any],
        test_pairs: Sequence[Tree] = (),
        drift: DriftCheck | None = None,
    ) -> None:
        """Keep what a run needs.

        Args:
            train_pairs: Trees of two completions, chosen and rejected.
            validation_pairs: Likewise.
            train: Training settings.
            seed: Of the order of pairs.
            settings: The loss.
            model_identity: What the reference's log-probabilities depend on besides the pairs.
            test_pairs: What the trained model is tested on at the end.
            drift: What the step must not break, measured before and after; None for a run that is not tested.
        """
        self.drift = drift
        self.pairs = [*train_pairs, *validation_pairs, *test_pairs]
        self.trained, self.validated = len(train_pairs), len(train_pairs) + len(validation_pairs)
        self.train, self.seed, self.settings, self.identity = train, seed, settings, model_identity
        self.epoch_rows = self.trained
        self.reference: dict[int, torch.Tensor] = {}

    def begin(self, fabric: L.Fabric, model: GPT, out_dir: Path) -> None:
        """Get the reference's log-probabilities of all pairs that the run meets, and measure the model as it is."""
        if self.drift is not None:
            self.drift.begin(fabric, model, out_dir)
        met = [*range(self.validated, len(self.pairs))]
        if self.settings.loss not in WITHOUT_REFERENCE:
            met = [*rows_used(self.trained, self.train, self.seed), *range(self.trained, self.validated), *met]
        if not met:
            return
        trees = [self.pairs[i] for i in met]
        key, file = key_of(trees, self.identity), out_dir / "reference.safetensors"
        found = reference_logprobs(fabric, model, trees, self.train.row_tokens, file, key)
        self.reference = dict(zip(met, found, strict=True))

    def batches(self, step: int, rank: int, world_size: int) -> list[PairBatch]:
        """The rows of one step for one process; pairs are dealt out in turn."""
        indices = step_indices(step, self.trained, self.train.global_batch_size, self.seed)[rank::world_size]
        return self._packed(indices)

    def _packed(self, indices: Sequence[int]) -> list[PairBatch]:
        found = []
        for row, batch in pack([self.pairs[i] for i in indices], self.train.row_tokens):
            needed = self.settings.loss not in WITHOUT_REFERENCE
            reference = torch.cat([self.reference[indices[i]] for i in row]) if needed else None
            found.append(PairBatch(batch, reference))
        return found

    def units(self, batch: PairBatch) -> int:
        """Every pair counts the same."""
        return batch.rows.completions // 2

    def loss(self, model: GPT, batch: PairBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The row's losses summed over its pairs, and what tells how training goes, likewise."""
        logprobs = model(batch.rows)  # (N,)
        owners, count = batch.rows.owners, batch.rows.completions
        sums = per_completion(logprobs, owners, count)  # (2 * pairs,)
        lengths = per_completion(torch.ones_like(logprobs), owners, count)
        settings = self.settings
        told: dict[str, torch.Tensor] = {}
        if batch.reference is None:
            scores = sums / lengths
        else:
            scores = sums - per_completion(batch.reference, owners, count)  # log-ratios
            told["kl"] = losses.k2(logprobs.detach(), batch.reference).sum() / 2
            if settings.per_token:
                scores = scores / lengths
        loss = pair_loss(scores[0::2], scores[1::2], settings)  # (pairs,)
        if settings.loss == "orpo":
            loss = settings.beta * loss - scores[0::2]  # eq. 6: the chosen answer's mean negative log-likelihood
        if settings.sft_weight:
            loss = loss - settings.sft_weight * (sums / lengths)[0::2]

        chosen, rejected = (settings.beta * scores.detach()).view(-1, 2).T  # rewards, (pairs,) each
        logp_chosen, logp_rejected = sums.detach().view(-1, 2).T
        told |= {
            "rewards_chosen": chosen.sum(),
            "rewards_rejected": rejected.sum(),
            "margin": (chosen - rejected).sum(),
            "accuracy": losses.pairs_won(chosen, rejected),
            "logprobs_chosen": logp_chosen.sum(),
            "logprobs_rejected": logp_rejected.sum(),
            "logprob_accuracy": losses.pairs_won(logp_chosen, logp_rejected),
        }
        return loss.sum(), told

    @torch.no_grad()
    def validate(self, model: GPT) -> dict[str, float]:
        """Means over the validation pairs; every process computes all of them."""
        means = self._means(model, range(self.trained, self.validated))
        return {f"val_{name}": means[name] for name in ("loss", "margin", "accuracy", "logprob_accuracy")}

    def _means(self, model: GPT, indices: Sequence[int]) -> dict[str, float]:
        """Loss and what else is logged, the mean over some pairs."""
        model.eval()
        device = next(model.parameters()).device
        totals: Counter[str] = Counter()
        for batch in self._packed(indices):
            loss, told = self.loss(model, batch.to(device))
            totals.update({"loss": float(loss), **{name: float(value) for name, value in told.items()}})
        model.train()
        return {name: total / len(indices) for name, total in totals.items()}

    @torch.no_grad()
    def report(self, model: GPT) -> Report:
        """The share of held-out pairs that are ranked correctly, and what the step must not break."""
        indices = range(self.validated, len(self.pairs))
        if not indices:
            return Report()
        means, count = self._means(model, indices), len(indices)
        before = 0.0
        for i in indices:
            chosen, rejected = self.reference[i].split([sum(mask) for mask in self.pairs[i].loss_masks or []])
            before += float(losses.pairs_won(chosen.sum()[None], rejected.sum()[None]))
        shares = {
            "pair_accuracy": means["accuracy"],
            "logprob_accuracy_before": before / count,
            "logprob_accuracy": means["logprob_accuracy"],
        }
        rows = [share_metric(name, share, count) for name, share in shares.items()]
        rows += [metric(name, means[name], n=count, split="test") for name in ("margin", "kl") if name in means]
        return Report(rows).add(self.drift.report(model) if self.drift is not None else Report())


def pair_loss(chosen: torch.Tensor, rejected: torch.Tensor, settings: PairSettings) -> torch.Tensor:
    """The loss of each pair, (pairs,), from its answers' scores (log-ratios, or log-probabilities per token)."""
    margin = chosen - rejected
    by_name: dict[str, Callable[[], torch.Tensor]] = {
        "sigmoid": partial(losses.dpo, margin, settings.beta, settings.label_smoothing),
        "robust": partial(losses.robust_dpo, margin, settings.beta, settings.label_smoothing),
        "ipo": partial(losses.ipo, margin, settings.beta),
        "hinge": partial(losses.hinge, margin, settings.beta),
        "simpo": partial(losses.simpo, chosen, rejected, settings.beta, settings.gamma),
        "orpo": partial(losses.orpo, chosen, rejected),
    }
    return by_name[settings.loss]()
