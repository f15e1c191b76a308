"""How a step samples groups of answers and what it makes of their rewards: the settings that GRPO and PPO share."""

import math
from dataclasses import dataclass

from workflows.training.loop import TrainArgs
from workflows.training.losses import Normalisation, Scale
from workflows.training.step import RunArgs


@dataclass(frozen=True)
class GroupSettings:
    """How answers are sampled and what is made of their rewards; see `workflows.grpo.setup` for the fields."""

    group_size: int = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    beta: float = 0.02
    clip_low: float = 0.2
    clip_high: float = 0.2
    scale: Scale = "group"
    normalisation: Normalisation = "token"
    sequence_ratio: bool = False
    updates: int = 1
    mask_truncated: bool = False
    sampling_batch: int = 64
    frozen_reference: bool = False

    def problems(self, train: TrainArgs, run: RunArgs, least_group: int = 2) -> list[str]:
        """Everything that is wrong with them, as messages."""
        found = []
        if run.lora_r == 0 and self.beta and not self.frozen_reference:
            found.append(
                "--beta needs a reference. With adapters (--lora_r) it is the model without them; for full weights ask "
                "for a frozen copy, a second model in memory: --frozen_reference true. Or use --beta 0."
            )
        if run.lora_r and self.frozen_reference:
            found.append(
                "--frozen_reference is for full weights: with adapters the model without them is the reference."
            )
        if self.group_size < least_group:
            found.append(
                f"--group_size must be at least 2, not {self.group_size}: one answer is no better than its mean."
            )
        for name, least in (("max_new_tokens", 1), ("updates", 1), ("sampling_batch", 1)):
            if getattr(self, name) < least:
                found.append(f"--{name} must be at least {least}, not {getattr(self, name)}.")
        if not 0 < self.temperature < math.inf:
            found.append(f"--temperature must be positive, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            found.append(f"--top_p must be above 0 and at most 1, not {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"--top_k must be at least 1, not {self.top_k}.")
        if self.beta < 0:
            found.append(f"--beta must be at least 0, not {self.beta}.")
        if not 0 < self.clip_low < 1 or not self.clip_high > 0:
            found.append("--clip_low must be between 0 and 1, --clip_high above 0.")
        if self.max_new_tokens >= train.max_seq_length:
            found.append(
                f"--max_new_tokens {self.max_new_tokens} leaves no room for a prompt in --train.max_seq_length "
                f"{train.max_seq_length}."
            )
        if self.updates >= 1 and (train.save_interval % self.updates or train.max_steps % self.updates):
            found.append(
                f"--train.max_steps and --train.save_interval must be multiples of --updates {self.updates}: "
                "checkpoints do not keep answers."
            )
        return found
