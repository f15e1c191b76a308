"""The objective of preferences without pairs, KTO: each answer is labelled good or bad by itself.

KTO weighs an answer by how far it is from the reference, measured in units of the policy's KL to it. That KL is
estimated from mismatched completions, answers that belong to other prompts (Ethayarajh et al. 2024, arXiv 2402.01306,
sec. 4.1): each row has those of one row of another prompt, good and bad ones alike, so that together they are the
answers of the data, and the reference's log-probabilities of them are computed once, too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from workflows.checkpoint import metric, share_metric
from workflows.errors import UserError
from workflows.training import losses
from workflows.training.answers import Labelled
from workflows.training.batch import PackedBatch, Tree, pack
from workflows.training.drift import DriftCheck
from workflows.training.loop import Objective, Report, TrainArgs, rows_used, step_indices
from workflows.training.losses import per_completion
from workflows.training.model import GPT
from workflows.training.reference import key_of, reference_logprobs


@dataclass(frozen=True)
class KTOSettings:
    """What the loss of an answer depends on; see `workflows.dpo.setup` for the fields."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def problems(self) -> list[str]:
        """Everything that is wrong with them, as messages."""
        if min(self.beta, self.desirable_weight, self.undesirable_weight) > 0:
            return []
        return ["--beta, --desirable_weight and --undesirable_weight must be positive."]


@dataclass(frozen=True)
class AnswerBatch:
    """A packed row of labelled answers.

    Attributes:
        rows: The row.
        desirable: Whether each of its completions is a good one, shape (completions,).
        reference: log pi_ref of its learned tokens, shape (N,).
        kl: The policy's KL to the reference, estimated on all of the step's mismatched completions, a scalar.
    """

    rows: PackedBatch
    desirable: torch.Tensor
    reference: torch.Tensor
    kl: torch.Tensor

    @property
    def real_tokens(self) -> int:
        """Tokens of the labelled samples."""
        return self.rows.real_tokens

    def to(self, device: torch.device) -> "AnswerBatch":
        """The same batch on a device."""
        return AnswerBatch(**{name: value.to(device) for name, value in vars(self).items()})


class KTO(Objective):
    """The objective: the mean over answers of `losses.kto`."""

    def __init__(
        self,
        train_answers: list[Labelled],
        validation_answers: list[Labelled],
        train: TrainArgs,
        seed: int,
        settings: KTOSettings,
        model_identity: dict[str, Any],
        test_answers: Sequence[Labelled] = (),
        drift: DriftCheck | None = None,
    ) -> None:
        """Keep what a run needs.

        Args:
            train_answers: Prompts with labelled answers, of at least two different prompts.
            validation_answers: Likewise.
            train: Training settings.
            seed: Of the order of prompts.
            settings: The loss.
            model_identity: What the reference's log-probabilities depend on besides the answers.
            test_answers: Answers to be tested on at the end.
            drift: What the step must not break, measured before and after; None for a run that is not tested.

        Raises:
            UserError: If there is no second prompt, from whose answers the KL could be estimated.
        """
        splits = (train_answers, validation_answers, test_answers)
        self.answers = [answer for answers in splits for answer in answers]
        self.trained, self.validated = len(train_answers), len(train_answers) + len(validation_answers)
        self.drift = drift
        self.mismatched = [
            tree
            for answers in splits
            for tree in add_mismatched_completions(answers, train_answers, train.max_seq_length)
        ]
        self.train, self.seed, self.settings, self.identity = train, seed, settings, model_identity
        self.epoch_rows = self.trained
        self.reference: dict[int, torch.Tensor] = {}

    def begin(self, fabric: L.Fabric, model: GPT, out_dir: Path) -> None:
        """Get the reference's log-probabilities of all answers that the run trains or is tested on, and of their
        mismatched completions; and measure the model as it is."""
        if self.drift is not None:
            self.drift.begin(fabric, model, out_dir)
        self._model, self._device, count = model, fabric.device, len(self.answers)
        met = [*rows_used(self.trained, self.train, self.seed), *range(self.trained, count)]
        trees = [*(self.answers[i].tree for i in met), *(self.mismatched[i] for i in met)]
        key, file = key_of(trees, self.identity), out_dir / "reference.safetensors"
        found = reference_logprobs(fabric, model, trees, self.train.row_tokens, file, key)
        self.reference = dict(zip([*met, *(count + i for i in met)], found, strict=True))

    def batches(self, step: int, rank: int, world_size: int) -> list[AnswerBatch]:
        """The rows of one step for one process; prompts are dealt out in turn."""
        indices = step_indices(step, self.trained, self.train.global_batch_size, self.seed)
        return self._packed(indices[rank::world_size], self._kl(indices))

    @torch.no_grad()
    def _kl(self, indices: Sequence[int]) -> torch.Tensor:
        """The mean log-ratio of mismatched completions, at least 0; every process computes all of a step's."""
        total = torch.zeros((), device=self._device)
        count = 0
        for row, batch in pack([self.mismatched[i] for i in indices], self.train.row_tokens):
            reference = sum(self.reference[len(self.answers) + indices[i]].sum() for i in row)
            total += self._model(batch.to(self._device)).sum() - reference
            count += batch.completions
        return (total / count).clamp_min(0).cpu()

    def _packed(self, indices: Sequence[int], kl: torch.Tensor) -> list[AnswerBatch]:
        found = []
        for row, batch in pack([self.answers[i].tree for i in indices], self.train.row_tokens):
            chosen = [indices[i] for i in row]
            found.append(
                AnswerBatch(
                    batch,
                    torch.tensor([good for i in chosen for good in self.answers[i].desirable]),
                    torch.cat([self.reference[i] for i in chosen]),
                    kl,
                )
            )
        return found

    def units(self, batch: AnswerBatch) -> int:
        """Every answer counts the same."""
        return batch.rows.completions

    def loss(self, model: GPT, batch: AnswerBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The row's losses summed over its answers, and what tells how training goes, likewise."""
        rows = batch.rows
        logprobs = model(rows)  # (N,)
        ratios = per_completion(logprobs - batch.reference, rows.owners, rows.completions)  # (completions,)
        settings = self.settings
        loss = losses.kto(
            ratios, batch.desirable, batch.kl, settings.beta, settings.desirable_weight, settings.undesirable_weight
        )
        rewards = settings.beta * ratios.detach()
        told = {
            "signed_reward": torch.where(batch.desirable, rewards, -rewards).sum(),  # to rise
            "kl_mismatched": batch.kl * rows.completions,
            # a good answer should have gained on the reference, a bad one lost
            "accuracy": ((rewards > 0) == batch.desirable).float().sum(),
            "kl": losses.k2(logprobs.detach(), batch.reference).sum(),
        }
        return loss.sum(), told

    @torch.no_grad()
    def validate(self, model: GPT) -> dict[str, float]:
        """Means over the validation answers; every process computes all of them."""
        means = self._means(model, range(self.trained, self.validated))
        return {f"val_{name}": means[name] for name in ("loss", "accuracy")}

    @torch.no_grad()
    def _means(self, model: GPT, indices: Sequence[int]) -> dict[str, float]:
        model.eval()
        device = next(model.parameters()).device
        totals: Counter[str] = Counter()
        count = 0
        for batch in self._packed(indices, self._kl(indices)):
            loss, told = self.loss(model, batch.to(device))
            totals.update({"loss": float(loss), **{name: float(value) for name, value in told.items()}})
            count += self.units(batch)
        model.train()
        return {**{name: total / count for name, total in totals.items()}, "answers": count}

    def report(self, model: GPT) -> Report:
        """The share of held-out answers that moved the right way from the reference, and what the step must not
        break."""
        if self.validated == len(self.answers):
            return Report()
        means = self._means(model, range(self.validated, len(self.answers)))
        count = int(means["answers"])
        rows = [share_metric("accuracy", means["accuracy"], count)]
        rows += [metric(name, means[name], n=count, split="test") for name in ("signed_reward", "kl")]
        return Report(rows).add(self.drift.report(model) if self.drift is not None else Report())


def add_mismatched_completions(
    answers: Sequence[Labelled], train_answers: Sequence[Labelled], longest: int
) -> list[Tree]:
    """Give each row's prompt the completions of a row of another prompt, as far as both together fit.

    The rows, ordered by prompt, are shifted by as many as the most frequent prompt has, so that each row's completions
    are taken once (TRL shifts them within a batch, by one). Where more than half of the rows have one prompt, the
    completions of the others are taken in turn; where all have, those of the training rows.

    Args:
        answers: Rows of a split.
        train_answers: Those of the training split.
        longest: Maximum number of tokens of a prompt with a completion.

    Raises:
        UserError: If no row has another prompt.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, answer in enumerate(answers):
        groups.setdefault(tuple(answer.tree.prompt), []).append(i)
    order = [i for group in groups.values() for i in group]
    largest = max(groups.values(), key=len, default=[])
    partners = {i: answers[order[(place + len(largest)) % len(order)]] for place, i in enumerate(order)}
    if 2 * len(largest) > len(order):  # only then a shifted row may have the same prompt
        prompt = answers[largest[0]].tree.prompt
        others = [row for row in answers if row.tree.prompt != prompt]
        others = others or [row for row in train_answers if row.tree.prompt != prompt]
        if not others:
            raise UserError(
                "KTO estimates its KL from answers to other prompts, but all rows have the same prompt. Add rows with "
                "other prompts, or use a loss of pairs (--loss sigmoid) on data of pairs."
            )
        partners |= {i: others[number % len(others)] for number, i in enumerate(largest)}
    trees = []
    for i, answer in enumerate(answers):
        prompt, other = answer.tree.prompt, partners[i].tree
        room = longest - len(prompt)
        masks = [mask[:room] for mask in other.loss_masks] if other.loss_masks else None
        trees.append(Tree(prompt, [completion[:room] for completion in other.completions], masks))
    return trees


def label_balance(answers: Sequence[Labelled], settings: KTOSettings) -> str:
    """The number of good and of bad answers and, where they are out of balance, weights that balance them.

    The ratio of desirable_weight times good answers to undesirable_weight times bad ones should be from 1 to 4/3
    (Ethayarajh et al. 2024, arXiv 2402.01306).
    """
    good = sum(sum(answer.desirable) for answer in answers)
    bad = sum(len(answer.desirable) for answer in answers) - good
    found = f"{good:,} desirable and {bad:,} undesirable answers"
    if not good or not bad:
        return f"{found}: KTO learns from one label only, and no weight can balance that"
    ratio = settings.desirable_weight * good / (settings.undesirable_weight * bad)
    if 1 - 1e-6 <= ratio <= 4 / 3 + 1e-6:
        return f"{found}, weighted {ratio:.2f} to 1"
    least = settings.undesirable_weight * bad / good
    most = settings.desirable_weight * good / bad
    return (
        f"{found}, weighted {ratio:.2g} to 1; from 1 to 1.33 is balanced. Use --desirable_weight {least:.4g} (up to "
        f"{least * 4 / 3:.4g}) or --undesirable_weight {most:.4g} (down to {most * 3 / 4:.4g}), not both."
    )
