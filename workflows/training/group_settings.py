"""How a step samples groups of answers and what it makes of their rewards: the settings that GRPO and PPO share."""

import math
from dataclasses import dataclass
from typing import Literal

from workflows.training.loop import TrainArgs
from workflows.training.losses import Normalisation, Scale
from workflows.training.step import RunArgs

FlatGroups = Literal["keep", "drop", "resample"]

SAMPLING_ROUNDS = 10
"""Maximum rounds of sampling in a step, the first included, while groups with a signal are missing."""


def ratio_defaults(
    sequence_ratio: bool, normalisation: Normalisation | None, clip_low: float | None, clip_high: float | None
) -> tuple[Normalisation, float, float]:
    """The aggregation and the clip range, each as it was given, else as the ratio's level wants it.

    Ratios of whole answers move far less than those of tokens; GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 5 and
    sec. 5.1) averages over answers and clips at 3e-4 and 4e-4.
    """
    aggregation, low, high = ("sequence", 3e-4, 4e-4) if sequence_ratio else ("token", 0.2, 0.2)
    return (
        normalisation or aggregation,  # type: ignore[return-value]
        low if clip_low is None else clip_low,
        high if clip_high is None else clip_high,
    )


@dataclass(frozen=True)
class GroupSettings:
    """How answers are sampled and what is made of their rewards; see `workflows.grpo.setup` for the fields."""

    group_size: int = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    beta: float = 0.02
    kl_correction: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    scale: Scale = "group"
    normalisation: Normalisation = "token"
    sequence_ratio: bool = False
    updates: int = 1
    flat_groups: FlatGroups = "keep"
    mask_truncated: bool = False
    missing_eos_penalty: float = 0.0
    sampling_batch: int = 64
    frozen_reference: bool = False

    def learns(self, stopped: bool) -> bool:
        """Return whether an answer that ended, or did not, is learned from."""
        return stopped or not self.mask_truncated

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
        if self.sequence_ratio and self.normalisation != "sequence":
            found.append(
                f"--sequence_ratio true with --normalisation {self.normalisation} weighs an answer's one ratio by its "
                "length, which is not GSPO. Leave --normalisation out, or use sequence."
            )
        if not 0 <= self.missing_eos_penalty < math.inf:
            found.append(f"--missing_eos_penalty must be 0 or more, not {self.missing_eos_penalty}.")
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
