"""LitGPT's GPT with a number for an output: a reward for each answer, or a value before each of its tokens.

A reward model is a checkpoint directory with one file more, `reward_head.safetensors`: the head's weight, and the mean
and standard deviation of its rewards over the answers that it was validated on, by which they are normalised.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from workflows.chat_template import ChatTemplate, Message
from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import UserError
from workflows.files import atomic_file
from workflows.training.batch import PackedBatch, Tree, pack
from workflows.training.model import GPT, Precision, load_model

REWARD_HEAD = "reward_head.safetensors"


def ends(batch: PackedBatch) -> torch.Tensor:
    """For each completion the index in 0..T-1 of the input that its last learned token follows, (completions,).

    That state has seen all of the answer but the token that ends it.
    """
    counts = torch.bincount(batch.owners, minlength=batch.completions)
    return batch.predictors[counts.cumsum(0) - 1]


class RewardModel(GPT):
    """A model that gives each completion of a packed row one number."""

    reward_head: torch.nn.Linear

    def forward(self, idx: torch.Tensor | PackedBatch, *args: Any, **kwargs: Any) -> Any:
        """Rewards of a packed row's completions, float32, shape (completions,); for a tensor, LitGPT's own forward."""
        if not isinstance(idx, PackedBatch):
            return super().forward(idx, *args, **kwargs)
        states = self.hidden(idx)[0].index_select(0, ends(idx))  # (completions, n_embd)
        return self.reward_head(states.float())[:, 0]


class ActorCritic(GPT):
    """A policy that also values the state before each token.

    The value head reads the trunk's states and does not move them: at first its gradient is larger than the policy's.
    """

    value_head: torch.nn.Linear

    def forward(self, idx: torch.Tensor | PackedBatch, *args: Any, **kwargs: Any) -> Any:
        """Log-probabilities and values of a packed row's learned tokens, float32, (N,) each.

        Args:
            idx: A packed row, or token ids for LitGPT's own forward.
            *args: LitGPT's.
            **kwargs: LitGPT's, or `temperature` for a packed row.
        """
        if not isinstance(idx, PackedBatch):
            return super().forward(idx, *args, **kwargs)
        states = self.hidden(idx)[0].index_select(0, idx.predictors)  # (N, n_embd)
        logprobs = self.head_logprobs(states, idx.targets, **kwargs)
        return logprobs, self.value_head(states.detach().float())[:, 0]


def with_head(model: GPT, kind: type[GPT], name: str) -> Any:
    """Turn a loaded model into one of the above; the new head begins at zero, in float32, and is trained."""
    model.__class__ = kind
    head = torch.nn.Linear(model.config.n_embd, 1, bias=False)
    torch.nn.init.zeros_(head.weight)
    setattr(model, name, head.to(model.transformer.wte.weight.device))
    return model


def save_reward_head(checkpoint_dir: Path, weight: torch.Tensor, mean: float, std: float) -> None:
    """Add a reward model's head to its checkpoint directory.

    Args:
        checkpoint_dir: An unfinished checkpoint directory.
        weight: Shape (1, n_embd).
        mean: Of its rewards.
        std: Their standard deviation.
    """
    with atomic_file(checkpoint_dir / REWARD_HEAD) as temporary:
        numbers = {"mean": torch.tensor(mean), "std": torch.tensor(std)}
        safetensors.torch.save_file({"weight": weight.float().contiguous(), **numbers}, temporary)


class LearnedReward:
    """A reward model that judges answers given as text."""

    def __init__(self, checkpoint_dir: Path, precision: Precision, device: torch.device | str = "cpu") -> None:
        """Load it.

        Raises:
            UserError: If the folder is no reward model, or its head does not fit.
        """
        directory = check_checkpoint_dir(checkpoint_dir)
        file = directory / REWARD_HEAD
        try:
            tensors = safetensors.torch.load_file(file)
            weight, mean, std = tensors["weight"], float(tensors["mean"]), float(tensors["std"])
        except FileNotFoundError:
            raise UserError(
                f"{directory} is no reward model, without {REWARD_HEAD}; `make reward` makes one."
            ) from None
        except (safetensors.SafetensorError, KeyError, ValueError) as e:
            raise UserError(f"{file} cannot be read ({e}). Run `make reward` again.") from None
        model = load_model(directory, None, precision, device=device)
        if weight.shape != (1, model.config.n_embd) or not std > 0:
            raise UserError(f"{file} does not fit the model beside it. Run `make reward` again.")
        self.model: RewardModel = with_head(model, RewardModel, "reward_head").eval().requires_grad_(False)
        self.model.reward_head.weight.copy_(weight.to(device))
        self.mean, self.std, self.device = mean, std, torch.device(device)
        self.template = ChatTemplate.from_checkpoint(directory)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[Message]], answers: Sequence[str], row_tokens: int = 2048) -> list[float]:
        """Rewards of answers in units of the reward model's standard deviation, 0 being its mean.

        An answer that exceeds the reward model's context is judged by its beginning.
        """
        trees = []
        for prompt, answer in zip(prompts, answers, strict=True):
            chat = self.template.encode_chat([*prompt, {"role": "assistant", "content": answer}], len(prompt))
            room = max(1, self.model.max_seq_length - len(chat.prompt))
            trees.append(Tree(chat.prompt[-self.model.max_seq_length + 1 :], [chat.completion[:room]]))
        found = torch.empty(len(trees))
        for indices, batch in pack(trees, row_tokens):
            found[indices] = self.model(batch.to(self.device)).cpu()
        return ((found - self.mean) / self.std).tolist()
