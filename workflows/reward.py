"""`python -m workflows reward`: a reward model (Bradley-Terry) from preferences, the trunk with a scalar head.

The result is a checkpoint directory with `reward_head.safetensors` beside the weights; `grpo` takes it as a reward.
"""

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch

from data_prep.rows import read_rows
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import report_all
from workflows.training import losses
from workflows.training.answers import encode_answers
from workflows.training.batch import PackedBatch, Tree, pack
from workflows.training.loop import Objective, TrainArgs, step_indices
from workflows.training.scalar_heads import RewardModel, save_reward_head, with_head
from workflows.training.step import RunArgs, decided, done_before, run_step


class BradleyTerry(Objective):
    """The objective: the mean over pairs of `losses.bradley_terry`."""

    def __init__(self, train_pairs: list[Tree], validation_pairs: list[Tree], train: TrainArgs, seed: int) -> None:
        """Keep what a run needs: trees of two completions, chosen and rejected."""
        self.pairs, self.train, self.seed = train_pairs, train, seed
        self.validation = [batch for _, batch in pack(validation_pairs, train.row_tokens)]

    def adapt(self, model: Any) -> RewardModel:
        """The model with a reward head."""
        adapted: RewardModel = with_head(model, RewardModel, "reward_head")
        return adapted

    def write_heads(
        self, folder: Path, trained: dict[str, torch.Tensor], metrics: dict[str, float]
    ) -> dict[str, torch.Tensor]:
        """Write the reward head, with the rewards' mean and deviation on the validation pairs."""
        save_reward_head(folder, trained["reward_head.weight"], metrics["val_reward_mean"], metrics["val_reward_std"])
        return {name: tensor for name, tensor in trained.items() if name != "reward_head.weight"}

    def batches(self, step: int, rank: int, world_size: int) -> list[PackedBatch]:
        """The rows of one step for one process; pairs are dealt out in turn."""
        indices = step_indices(step, len(self.pairs), self.train.global_batch_size, self.seed)[rank::world_size]
        return [batch for _, batch in pack([self.pairs[i] for i in indices], self.train.row_tokens)]

    def units(self, batch: PackedBatch) -> int:
        """Every pair counts the same."""
        return batch.completions // 2

    def loss(self, model: Any, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The row's losses summed over its pairs, and what tells how training goes, likewise."""
        chosen, rejected = model(batch).view(-1, 2).T  # (pairs,) each
        told = {
            "margin": (chosen - rejected).detach().sum(),
            "accuracy": losses.pairs_won(chosen.detach(), rejected.detach()),
        }
        return losses.bradley_terry(chosen, rejected).sum(), told

    @torch.no_grad()
    def validate(self, model: Any) -> dict[str, float]:
        """Means over the validation pairs; every process computes all of them."""
        model.eval()
        device = next(model.parameters()).device
        totals: Counter[str] = Counter()
        rewards: list[float] = []
        for batch in self.validation:
            batch = batch.to(device)
            loss, told = self.loss(model, batch)
            totals.update({"loss": float(loss), **{name: float(value) for name, value in told.items()}})
            rewards += model(batch).tolist()
        model.train()
        means = {f"val_{name}": 2 * total / len(rewards) for name, total in totals.items()}
        spread = max(statistics.pstdev(rewards), 1e-6)
        return {**means, "val_reward_mean": statistics.fmean(rewards), "val_reward_std": spread}


def setup(
    checkpoint_dir: Path,
    data: Path = Path("data/hpo_pairs"),
    out_dir: Path = Path("out/reward"),
    max_val_rows: int = 200,
    train: TrainArgs = TrainArgs(learning_rate=2e-4),
    **run: Any,
) -> None:
    """Train a reward model on preferences.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory whose trunk it is.
        data: A data directory of {"prompt", "chosen", "rejected"} rows.
        out_dir: Where logs and checkpoints go; the result is its `final` folder.
        max_val_rows: At most this many validation pairs are scored each time.
        train: Training settings; a sample is a pair.
        **run: What all training steps take (`workflows.training.step.RunArgs`).

    Raises:
        UserError: If an argument, the checkpoint or the data is not usable.
    """
    own = {name: value for name, value in locals().items() if name != "run"}
    own["checkpoint_dir"] = checkpoint_dir = check_checkpoint_dir(checkpoint_dir)
    common = RunArgs(**run)
    problems = common.problems(train, checkpoint_dir)
    if max_val_rows < 1:
        problems.append(f"--max_val_rows must be at least 1, not {max_val_rows}.")
    report_all(problems)
    settings = decided(own, common)
    if done_before(settings):
        return

    def make_objective(fabric: L.Fabric) -> BradleyTerry:
        template = ChatTemplate.from_checkpoint(checkpoint_dir)
        pairs = {}
        for split, most in (("train", None), ("validation", max_val_rows)):
            rows = read_rows(data / f"{split}.jsonl", "preference")[:most]
            answers, told = encode_answers(rows, template, train.max_seq_length, str(data / split))
            pairs[split] = [answer.tree for answer in answers]
            fabric.print(told)
        return BradleyTerry(pairs["train"], pairs["validation"], train, common.seed)

    run_step("reward", settings, common, make_objective)
