"""`make ppo`: align a checkpoint with a reward model (RLHF), by PPO with a value head.

Beside it stands `make grpo` with the same reward model, which needs no critic. The reference policy of the KL is the
model without its adapters.
"""

from pathlib import Path
from typing import Any

import lightning as L

from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import report_all
from workflows.training.actor_critic import PPO, CriticSettings
from workflows.training.drift import drift_of_questions
from workflows.training.group_settings import GroupSettings
from workflows.training.loop import TrainArgs
from workflows.training.questions import questions_of
from workflows.training.reference import frozen_reference_of
from workflows.training.rewards import Rewards, WeightedReward
from workflows.training.step import RunArgs, decided, done_before, row_limit_problems, run_step


def setup(
    checkpoint_dir: Path,
    rewards: list[WeightedReward],
    data: Path = Path("data/hpo_pairs"),
    out_dir: Path = Path("out/ppo"),
    kinds: list[str] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    beta: float = 0.05,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    gamma: float = 1.0,
    lam: float = 1.0,
    value_weight: float = 0.1,
    value_clip: float = 0.2,
    updates: int = 2,
    mask_truncated: bool = False,
    missing_eos_penalty: float = 0.0,
    sampling_batch: int = 64,
    frozen_reference: bool = False,
    max_val_rows: int = 100,
    max_test_rows: int = 100,
    train: TrainArgs = TrainArgs(global_batch_size=16, learning_rate=1e-4, max_norm=1.0),
    **run: Any,
) -> None:
    """Align a checkpoint with rewards, token by token.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory to start from; it is the reference, too.
        rewards: Reward of an answer, a weighted sum, e.g. [{reward: out/demo/reward/final}].
        data: A data directory whose rows have a prompt (preferences, say), and what the rewards read.
        out_dir: Where logs and checkpoints go; the result is its `final` folder.
        kinds: Ask only rows whose `kind` is one of these; all that have what the rewards read if null.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: Sampling temperature; log-probabilities are of the policy at this temperature.
        beta: KL coefficient: larger values keep the policy closer to the reference.
        clip_low: Lower clip range: a ratio counts down to 1 minus this.
        clip_high: Upper clip range: a ratio counts up to 1 plus this.
        gamma: Discount of later rewards.
        lam: GAE's lambda: larger values trust rewards over values. With less than 1 an untrained critic makes late
            tokens matter more than early ones (Yuan et al. 2025, arXiv 2503.01491).
        value_weight: Weight of the value head's loss.
        value_clip: Clip range of a value around that at sampling.
        updates: Optimizer steps on the same answers.
        mask_truncated: Learn nothing from answers that did not end, neither the policy nor the value head.
        missing_eos_penalty: Penalty subtracted from the reward of an answer that did not end.
        sampling_batch: Number of answers that are sampled side by side; bounds the memory of the cache.
        frozen_reference: With full weights, keep a frozen copy of the checkpoint as the reference.
        max_val_rows: At most this many validation questions are asked each time, greedily.
        max_test_rows: At most this many test questions are asked at the end, before and after training; 0 for none.
        train: Training settings; a sample is a question, with one answer.
        **run: What all training steps take (`workflows.training.step.RunArgs`).

    Raises:
        UserError: If an argument, the checkpoint, the data or a reward is not usable.
    """
    own = {name: value for name, value in locals().items() if name != "run"}
    own["checkpoint_dir"] = checkpoint_dir = check_checkpoint_dir(checkpoint_dir)
    common = RunArgs(**run)
    group_settings = GroupSettings(
        group_size=1,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        beta=beta,
        clip_low=clip_low,
        clip_high=clip_high,
        updates=updates,
        mask_truncated=mask_truncated,
        missing_eos_penalty=missing_eos_penalty,
        sampling_batch=sampling_batch,
        frozen_reference=frozen_reference,
    )
    critic = CriticSettings(gamma, lam, value_weight, value_clip)
    problems = common.problems(train, checkpoint_dir) + critic.problems()
    problems += group_settings.problems(train, common, least_group=1)
    problems += row_limit_problems(max_val_rows, max_test_rows)
    report_all(problems)
    settings = decided(own, common)
    if done_before(settings):
        return

    def make_objective(fabric: L.Fabric) -> PPO:
        composed = Rewards(rewards, settings["precision"], fabric.device)
        template, questions = questions_of(fabric, settings, composed)
        return PPO(
            questions["train"],
            questions["validation"],
            template,
            composed,
            train,
            common.seed,
            group_settings,
            questions["test"],
            frozen_reference_of(settings, fabric),
            drift_of_questions(questions["test"], template, composed, settings),
            critic=critic,
        )

    run_step("ppo", settings, common, make_objective)
