"""`make reward`: a reward model (Bradley-Terry) from preferences, the trunk with a scalar head.

The result is a checkpoint directory with `reward_head.safetensors` beside the weights; `grpo` takes it as a reward. A
reward is read at the token that ends the answer; of an answer that was truncated, at its last token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from data_prep.rows import read_rows
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import check_checkpoint_dir, share_metric
from workflows.errors import report_all
from workflows.training import losses
from workflows.training.answers import encode_answers
from workflows.training.batch import PackedBatch, Tree
from workflows.training.loop import Objective, Report, TrainArgs, step_indices
from workflows.training.scalar_heads import RewardModel, pack_scored, save_reward_head, with_head
from workflows.training.step import RunArgs, decided, done_before, row_limit_problems, run_step


class BradleyTerry(Objective):
    """The objective: the mean over pairs of `losses.bradley_terry`."""

    def __init__(
        self,
        train_pairs: list[Tree],
        validation_pairs: list[Tree],
        train: TrainArgs,
        seed: int,
        test_pairs: Sequence[Tree] = (),
    ) -> None:
        """Keep what a run needs: trees of two completions, chosen and rejected."""
        self.pairs, self.train, self.seed, self.epoch_rows = train_pairs, train, seed, len(train_pairs)
        self.validation, self.test = (
            [batch for _, batch in pack_scored(pairs, train.row_tokens)] for pairs in (validation_pairs, test_pairs)
        )

    def adapt(self, model: Any) -> RewardModel:
        """The model with a reward head. A matrix that only predicts tokens stays as it is: no reward depends on it."""
        if not model.has_tied_head:
            model.lm_head.linear.weight.requires_grad_(False)
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
        return [batch for _, batch in pack_scored([self.pairs[i] for i in indices], self.train.row_tokens)]

    def units(self, batch: PackedBatch) -> int:
        """Every pair counts the same."""
        return batch.completions // 2

    def loss(self, model: Any, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The row's losses summed over its pairs, and what tells how training goes, likewise."""
        chosen, rejected = model(batch).view(-1, 2).T  # (pairs,) each
        return self._compared(chosen, rejected)

    def _compared(self, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        told = {
            "margin": (chosen - rejected).detach().sum(),
            "accuracy": losses.pairs_won(chosen.detach(), rejected.detach()),
        }
        return losses.bradley_terry(chosen, rejected).sum(), told

    @torch.no_grad()
    def validate(self, model: Any) -> dict[str, float]:
        """Means over the validation pairs; every process computes all of them."""
        rewards = self._rewards(model, self.validation)
        loss, told = self._compared(*rewards.T)
        means = {f"val_{name}": float(total) / len(rewards) for name, total in {"loss": loss.sum(), **told}.items()}
        spread = max(float(rewards.std(correction=0)), 1e-6)
        return {**means, "val_reward_mean": float(rewards.mean()), "val_reward_std": spread}

    @torch.no_grad()
    def _rewards(self, model: Any, batches: list[PackedBatch]) -> torch.Tensor:
        """Of chosen and rejected answers, (pairs, 2)."""
        model.eval()
        device = next(model.parameters()).device
        rewards = torch.cat([model(batch.to(device)) for batch in batches])
        model.train()
        return rewards.view(-1, 2)

    def report(self, model: Any) -> Report:
        """The share of the test's pairs whose chosen answer gets the larger reward."""
        if not self.test:
            return Report()
        rewards = self._rewards(model, self.test)
        share = float(losses.pairs_won(*rewards.T)) / len(rewards)
        return Report([share_metric("pair_accuracy", share, len(rewards))])


def setup(
    checkpoint_dir: Path,
    data: Path = Path("data/hpo_pairs"),
    out_dir: Path = Path("out/reward"),
    max_val_rows: int = 200,
    max_test_rows: int = 1000,
    train: TrainArgs = TrainArgs(learning_rate=2e-4),
    **run: Any,
) -> None:
    """Train a reward model on preferences.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory whose trunk it is.
        data: A data directory of {"prompt", "chosen", "rejected"} rows.
        out_dir: Where logs and checkpoints go; the result is its `final` folder.
        max_val_rows: At most this many validation pairs are scored each time.
        max_test_rows: At most this many test pairs are scored at the end; 0 for none.
        train: Training settings; a sample is a pair.
        **run: What all training steps take (`workflows.training.step.RunArgs`).

    Raises:
        UserError: If an argument, the checkpoint or the data is not usable.
    """
    own = {name: value for name, value in locals().items() if name != "run"}
    own["checkpoint_dir"] = checkpoint_dir = check_checkpoint_dir(checkpoint_dir)
    common = RunArgs(**run)
    problems = common.problems(train, checkpoint_dir)
    problems += row_limit_problems(max_val_rows, max_test_rows)
    if common.lora_head:
        problems.append("--lora_head adapts what predicts tokens; a reward model predicts none.")
    report_all(problems)
    settings = decided(own, common)
    if done_before(settings):
        return

    def make_objective(fabric: L.Fabric) -> BradleyTerry:
        template = ChatTemplate.from_checkpoint(checkpoint_dir).with_reasoning(common.reasoning)
        pairs: dict[str, list[Tree]] = {"test": []}
        for split, most in (("train", None), ("validation", max_val_rows), ("test", max_test_rows)):
            if split == "test" and not (max_test_rows and (data / "test.jsonl").is_file()):
                continue
            rows = read_rows(data / f"{split}.jsonl", "preference")[:most]
            answers, told = encode_answers(rows, template, train.max_seq_length, str(data / split))
            pairs[split] = [answer.tree for answer in answers]
            fabric.print(told)
        return BradleyTerry(pairs["train"], pairs["validation"], train, common.seed, pairs["test"])

    run_step("reward", settings, common, make_objective)
