"""Packed rows of sampled answers: what one forward and backward pass of GRPO and PPO is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from workflows.training import losses
from workflows.training.batch import PackedBatch, Tree, pack
from workflows.training.group_settings import GroupSettings
from workflows.training.losses import Normalisation
from workflows.training.questions import Question
from workflows.training.rollouts import Rollout

Judged = list[tuple[Question, list[tuple[Rollout, float]]]]
"""Questions with answers to learn from, each with its advantage (PPO: its reward)."""


@dataclass
class Asked:
    """A process's questions of a step with their answers, group by group, and the rewards of these."""

    group_size: int
    questions: list[Question] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    given: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def totals(self) -> torch.Tensor:
        """Rewards, shape (questions, group_size)."""
        return torch.tensor([found["total"] for found in self.given]).view(-1, self.group_size)

    def groups(self) -> list[tuple[Question, list[Rollout]]]:
        """Each question with its answers."""
        size = self.group_size
        return [(question, self.rollouts[g * size : (g + 1) * size]) for g, question in enumerate(self.questions)]


@dataclass(frozen=True)
class GroupBatch:
    """A packed row of groups. N learned tokens.

    Attributes:
        rows: The row.
        sampled: Log-probabilities of its learned tokens as sampling recorded them, shape (N,); only logged.
        old: log pi_old of these tokens, which the ratio is taken to, computed as training computes them, shape (N,);
            None where the policy of this update is the old one.
        advantages: The advantage of each token's answer, shape (N,).
        weights: The weight of each token, before the step's sum is divided by its units, shape (N,).
        units: The row's units (its share of the normaliser); the first row of a step has those of the answers without
            a forward pass, too.
        units_per_token: Units of the process divided by its learned tokens. The loop divides logged sums by the units,
            so a sum over tokens times this is logged as a mean over tokens.
        reference: log pi_ref of the tokens, shape (N,); None where no KL is asked for.
    """

    rows: PackedBatch
    sampled: torch.Tensor
    old: torch.Tensor | None
    advantages: torch.Tensor
    weights: torch.Tensor
    units: int
    units_per_token: float
    reference: torch.Tensor | None

    @property
    def real_tokens(self) -> int:
        """Tokens of the samples, a prompt counted for each of its answers."""
        return self.rows.real_tokens

    def to(self, device: torch.device) -> "GroupBatch":
        """The same batch on a device."""
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, torch.Tensor | PackedBatch) else v for k, v in vars(self).items()
        }
        return type(self)(**moved)


def has_signal(totals: torch.Tensor) -> torch.Tensor:
    """Return whether a group's rewards differ, (groups,), from rewards (groups, G)."""
    return totals.amax(dim=1) > totals.amin(dim=1)


def judged_groups(asked: Asked, settings: GroupSettings) -> tuple[Judged, int]:
    """The answers of a step that need a forward pass, with their advantages.

    Args:
        asked: The step's questions and answers.
        settings: Which groups and answers count.

    Returns:
        The groups, and the units of all other answers that count: those of flat groups where no KL is asked for, and
        truncated ones under `--mask_truncated` (as answers, not as tokens, which is what TRL's denominators do).
    """
    advantages = losses.group_advantages(asked.totals, settings.scale).tolist()
    groups: Judged = []
    others = 0
    for (question, rollouts), signal, values in zip(
        asked.groups(), has_signal(asked.totals).tolist(), advantages, strict=True
    ):
        if not signal and settings.flat_groups != "keep":
            continue
        answers = [answer for answer in zip(rollouts, values, strict=True) if settings.learns(answer[0].stopped)]
        if settings.normalisation != "token":
            others += len(rollouts) - len(answers)
        if not signal and not settings.beta:
            others += answer_units([rollout for rollout, _ in answers], settings.normalisation)
        elif answers:
            groups.append((question, answers))
    return groups, others


def pack_groups(
    groups: Judged, others: int, row_tokens: int, normalisation: Normalisation, longest: int
) -> list[GroupBatch]:
    """Pack questions with answers and advantages into rows; of a large group some answers to a tree.

    Args:
        groups: At least one question with at least one answer.
        others: Units of the step's answers that are not among them and count all the same.
        row_tokens: Capacity of a row.
        normalisation: See `losses.token_weights`.
        longest: The maximum number of new tokens that sampling allows.

    Returns:
        The rows, without log-probabilities of the old policy and the reference.
    """
    groups = [part for group in groups for part in _parts(*group, row_tokens)]
    trees = [Tree(question.prompt, [rollout.ids for rollout, _ in answers]) for question, answers in groups]
    total = others + answer_units([rollout for _, answers in groups for rollout, _ in answers], normalisation)
    tokens = sum(len(rollout.ids) for _, answers in groups for rollout, _ in answers)
    batches: list[GroupBatch] = []
    for row, packed in pack(trees, row_tokens):
        answers = [answer for i in row for answer in groups[i][1]]
        lengths = torch.tensor([len(rollout.ids) for rollout, _ in answers])
        weights, units = losses.token_weights(lengths, normalisation, longest)
        batches.append(
            GroupBatch(
                rows=packed,
                sampled=torch.tensor([logprob for rollout, _ in answers for logprob in rollout.logprobs]),
                old=None,
                advantages=torch.tensor([advantage for _, advantage in answers])[packed.owners],
                weights=weights[packed.owners],
                units=units + (0 if batches else others),
                units_per_token=total / tokens,
                reference=None,
            )
        )
    return batches


def answer_units(rollouts: Sequence[Rollout], normalisation: Normalisation) -> int:
    """Units that answers add to a step's normaliser: their tokens, or their number."""
    return sum(len(rollout.ids) for rollout in rollouts) if normalisation == "token" else len(rollouts)


def _parts(question: Question, answers: list[tuple[Rollout, float]], room: int) -> Judged:
    """A group's answers in parts that fit, each with the prompt, into so many tokens (one answer may exceed them)."""
    parts: Judged = []
    used = 0
    for answer in answers:
        length = len(answer[0].ids)
        if not parts or used + length > room:
            parts.append((question, []))
            used = len(question.prompt)
        parts[-1][1].append(answer)
        used += length
    return parts
