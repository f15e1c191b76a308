"""The objective of PPO: answers sampled from the policy, judged token by token with the help of a value head.

Beside GRPO, whose baseline is the group's mean, PPO learns what to expect before each token (the critic), so that one
answer to a question is enough. A token earns what it costs to leave the reference, the last one the answer's reward too
(Stiennon et al. 2020, arXiv 2009.01325; Ouyang et al. 2022, arXiv 2203.02155, eq. 2).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from workflows.training import losses
from workflows.training.batch import PackedBatch
from workflows.training.group_batch import Asked, GroupBatch, Judged
from workflows.training.groups import GRPO
from workflows.training.scalar_heads import ActorCritic, with_head


@dataclass(frozen=True)
class CriticSettings:
    """What PPO needs besides sampling and clipping; see `workflows.ppo.setup` for the fields."""

    gamma: float = 1.0
    lam: float = 1.0
    value_weight: float = 0.1
    value_clip: float = 0.2

    def problems(self) -> list[str]:
        """Everything that is wrong with them, as messages."""
        shares = [f"--{n} must be from 0 to 1, not {getattr(self, n)}." for n in ("gamma", "lam")
                  if not 0 <= getattr(self, n) <= 1]  # fmt: skip
        if self.value_weight < 0 or not self.value_clip > 0:
            shares.append("--value_weight must be at least 0, --value_clip above 0.")
        return shares


@dataclass(frozen=True)
class CriticBatch(GroupBatch):
    """A packed row of answers.

    Attributes:
        old_values: The values at sampling, shape (N,).
        returns: What the values are to learn, shape (N,).
    """

    old_values: torch.Tensor
    returns: torch.Tensor


class PPO(GRPO):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) with a value head on the same trunk."""

    without_signal = "all answers got the same reward"

    def __init__(self, *args: Any, critic: CriticSettings, **kwargs: Any) -> None:
        """Keep what a run needs: GRPO's, and the critic's settings."""
        super().__init__(*args, **kwargs)
        self.critic = critic

    def adapt(self, model: Any) -> ActorCritic:
        """The model with a value head."""
        adapted: ActorCritic = with_head(model, ActorCritic, "value_head")
        return adapted

    def write_heads(
        self, folder: Path, trained: dict[str, torch.Tensor], metrics: dict[str, float]
    ) -> dict[str, torch.Tensor]:
        """The value head has done its work: the result is a policy like any other."""
        return {name: tensor for name, tensor in trained.items() if name != "value_head.weight"}

    def _judged(self, asked: Asked) -> tuple[Judged, int]:
        """Every answer with its reward: an answer that is no better than others still says what to expect."""
        rewards = iter(asked.totals.flatten().tolist())
        groups = [
            (question, [(rollout, next(rewards)) for rollout in rollouts]) for question, rollouts in asked.groups()
        ]
        learned = [(q, [answer for answer in group if self.settings.learns(answer[0].stopped)]) for q, group in groups]
        return [(question, answers) for question, answers in learned if answers], 0

    def _evaluated(self, batches: list[GroupBatch]) -> list[GroupBatch]:
        """The rows with the old policy's log-probabilities and values, and with each token's advantage.

        Until here an answer's reward is in the place of its tokens' advantages.
        """
        critic, beta = self.critic, self.settings.beta
        judged = []
        for batch, outputs in zip(batches, self._outputs(batches), strict=True):
            old, values = (output.cpu() for output in outputs)  # (N,) each
            earned = -beta * (old - batch.reference) if batch.reference is not None else torch.zeros_like(values)
            advantages = torch.empty_like(values)
            begin = 0
            for length in torch.bincount(batch.rows.owners, minlength=batch.rows.completions).tolist():
                part = slice(begin, begin + length)
                earned[begin + length - 1] += batch.advantages[begin]
                advantages[part] = losses.gae(earned[part], values[part], critic.gamma, critic.lam)
                begin += length
            fields = {**vars(batch), "old": old, "advantages": advantages}
            judged.append(CriticBatch(**fields, old_values=values, returns=advantages + values))
        counted = torch.cat([batch.advantages[batch.weights > 0] for batch in judged]).double()
        sums = torch.stack([counted.new_tensor(len(counted)), counted.sum(), counted.square().sum()])
        if self._fabric.world_size > 1:
            sums = self._fabric.all_reduce(sums.to(self._device), reduce_op="sum").cpu()  # type: ignore[union-attr]
        count = sums[0].clamp_min(1)
        mean = sums[1] / count
        deviation = (sums[2] / count - mean.square()).clamp_min(0).sqrt() + 1e-8
        return [replace(b, advantages=((b.advantages - mean) / deviation).float()) for b in judged]

    def _logprobs(self, rows: PackedBatch) -> torch.Tensor:
        logprobs: torch.Tensor = self._policy(rows.to(self._device), temperature=self.settings.temperature)[0]
        return logprobs.cpu()

    def loss(self, model: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The row's weighted sum over tokens of the clipped policy loss and the value head's."""
        logprobs, values = model(batch.rows, temperature=self.settings.temperature)  # (N,) each
        _, loss, told = self.policy_loss(logprobs, batch)
        if batch.reference is not None:  # its KL is in the advantages; here it is only logged
            told["kl"] = losses.k3(logprobs.detach(), batch.reference).sum() * batch.units_per_token
        value_loss = losses.clipped_value_loss(values, batch.old_values, batch.returns, self.critic.value_clip)
        told["value_loss"] = value_loss.detach().sum() * batch.units_per_token
        return loss + (batch.weights * self.critic.value_weight * value_loss).sum(), told
