"""`make grpo`: align a checkpoint with rewards, by GRPO and its variants (GSPO, DAPO, Dr. GRPO).

Answers are sampled from the policy, a group to each question, and judged by the rewards of `training/rewards.py`. The
reference policy of the KL is the model without its adapters.
"""

from pathlib import Path
from typing import Any

import lightning as L

from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import report_all
from workflows.training.drift import drift_of_questions
from workflows.training.group_settings import FlatGroups, GroupSettings, ratio_defaults
from workflows.training.groups import GRPO
from workflows.training.loop import TrainArgs
from workflows.training.losses import Normalisation, Scale
from workflows.training.questions import questions_of
from workflows.training.reference import frozen_reference_of
from workflows.training.rewards import Rewards, WeightedReward
from workflows.training.step import RunArgs, decided, done_before, row_limit_problems, run_step


def setup(
    checkpoint_dir: Path,
    data: Path = Path("data/hpo"),
    out_dir: Path = Path("out/grpo"),
    kinds: list[str] | None = None,
    rewards: list[WeightedReward] | None = None,
    group_size: int = 8,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    beta: float = 0.02,
    kl_correction: bool = True,
    clip_low: float | None = None,
    clip_high: float | None = None,
    scale: Scale = "group",
    normalisation: Normalisation | None = None,
    sequence_ratio: bool = False,
    updates: int = 1,
    flat_groups: FlatGroups = "keep",
    mask_truncated: bool = False,
    missing_eos_penalty: float = 0.0,
    sampling_batch: int = 64,
    frozen_reference: bool = False,
    max_val_rows: int = 100,
    max_test_rows: int = 1000,
    train: TrainArgs = TrainArgs(global_batch_size=4, learning_rate=1e-4, max_norm=1.0),
    **run: Any,
) -> None:
    """Align a checkpoint with rewards.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory to start from; it is the reference, too.
        data: A data directory whose rows have a prompt and what the rewards read ("answers", say).
        out_dir: Where logs and checkpoints go; the result is its `final` folder.
        kinds: Ask only rows whose `kind` is one of these; all that have what the rewards read if null.
        rewards: Reward of an answer, a weighted sum; [{reward: finding}] if null.
        group_size: Answers to each question.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: Sampling temperature; log-probabilities are of the policy at this temperature.
        top_k: Sample among the k most likely tokens only.
        top_p: Nucleus sampling: sample among the smallest set of most likely tokens whose probabilities reach this sum.
        beta: KL coefficient: larger values keep the policy closer to the reference.
        kl_correction: Multiply the KL estimate of each token by its ratio, which makes the gradient that of the KL
            (DeepSeek-V3.2, arXiv 2512.02556; TRL's default); false is the GRPO paper's.
        clip_low: Lower clip range: a ratio counts down to 1 minus this; null is 0.2, with sequence_ratio 3e-4.
        clip_high: Upper clip range: a ratio counts up to 1 plus this (DAPO: 0.28); null is 0.2, with sequence_ratio
            4e-4.
        scale: "group" divides advantages by their group's standard deviation, "none" does not (Dr. GRPO).
        normalisation: Loss aggregation: every token ("token", DAPO) or every answer ("sequence", GRPO) counts the same,
            or a constant divides ("constant", Dr. GRPO); null is token, with sequence_ratio sequence.
        sequence_ratio: Sequence-level importance sampling: one ratio for each answer, of its mean log-probability
            (GSPO), with GSPO's aggregation and clip range.
        updates: Optimizer steps on the same answers. With more than one, the ratio is to log-probabilities that are
            computed before the first.
        flat_groups: Groups whose answers all got the same reward: "keep" counts them with advantage 0, and in the KL
            (GRPO's paper, TRL), "drop" leaves them out of the loss and its denominator, "resample" asks further
            questions until the step has its groups (DAPO), in at most ten rounds.
        mask_truncated: Learn nothing from answers that did not end. They stay in the denominator of normalisation
            sequence and constant, and leave that of token.
        missing_eos_penalty: Penalty subtracted from the reward of an answer that did not end.
        sampling_batch: Number of answers that are sampled side by side; bounds the memory of the cache.
        frozen_reference: With full weights, keep a frozen copy of the checkpoint as the reference.
        max_val_rows: At most this many validation questions are asked each time, greedily.
        max_test_rows: At most this many test questions are asked at the end, before and after training; 0 for none.
        train: Training settings; a sample is a question.
        **run: What all training steps take (`workflows.training.step.RunArgs`).

    Raises:
        UserError: If an argument, the checkpoint, the data or a reward is not usable.
    """
    own = {name: value for name, value in locals().items() if name != "run"}
    own["checkpoint_dir"] = checkpoint_dir = check_checkpoint_dir(checkpoint_dir)
    own["rewards"] = chosen = [WeightedReward("finding")] if rewards is None else rewards
    own["normalisation"], own["clip_low"], own["clip_high"] = ratio_defaults(
        sequence_ratio, normalisation, clip_low, clip_high
    )
    common = RunArgs(**run)
    group_settings = GroupSettings(**{name: own[name] for name in vars(GroupSettings())})
    problems = common.problems(train, checkpoint_dir) + group_settings.problems(train, common)
    problems += row_limit_problems(max_val_rows, max_test_rows)
    report_all(problems)
    settings = decided(own, common)
    if done_before(settings):
        return

    def make_objective(fabric: L.Fabric) -> GRPO:
        composed = Rewards(chosen, settings["precision"], fabric.device)
        template, questions = questions_of(fabric, settings, composed)
        asked = (questions["train"], questions["validation"])
        frozen = frozen_reference_of(settings, fabric)
        drift = drift_of_questions(questions["test"], template, composed, settings)
        return GRPO(*asked, template, composed, train, common.seed, group_settings, questions["test"], frozen, drift)

    run_step("grpo", settings, common, make_objective)
