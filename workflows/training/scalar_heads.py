"""LitGPT's GPT with a number for an output: a reward for each answer, or a value before each of its tokens.

A reward model is a checkpoint directory with one file more, `reward_head.safetensors`: the head's weight, and the mean
and standard deviation of its rewards over the answers that it was validated on, by which they are normalised.

A reward is read where the token that ends the answer is the input (Huang et al. 2024, arXiv 2403.17031), so that it
depends on whether the answer ended; that of a truncated answer is read at its last token.
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


READ_AT = "end token"
"""Where rewards are read, in the metadata of `reward_head.safetensors`; earlier files have none."""


def scored(tree: Tree) -> Tree:
    """A tree whose completions are inputs to their last token, where a row's single learned position of each is.

    A tree's last tokens are predicted but no inputs; so each completion gets one token more, which nothing looks at.
    """
    return Tree(
        tree.prompt,
        [[*completion, completion[-1]] for completion in tree.completions],
        [[False] * len(completion) + [True] for completion in tree.completions],
    )


def pack_scored(trees: Sequence[Tree], row_tokens: int) -> list[tuple[list[int], PackedBatch]]:
    """As `pack`, for trees whose completions a `RewardModel` is to score."""
    rows = pack([scored(tree) for tree in trees], row_tokens)
    for _, batch in rows:
        batch.real_tokens -= batch.completions  # the tokens that were added
    return rows


class RewardModel(GPT):
    """A model that gives each completion of a packed row one number."""

    reward_head: torch.nn.Linear

    def forward(self, idx: torch.Tensor | PackedBatch, *args: Any, **kwargs: Any) -> Any:
        """Rewards of the completions of a row of `pack_scored`, float32, shape (completions,); for a tensor, LitGPT's
        own forward."""
        if not isinstance(idx, PackedBatch):
            return super().forward(idx, *args, **kwargs)
        states = self.hidden(idx)[0].index_select(0, idx.predictors)  # (completions, n_embd)
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
        tensors = {"weight": weight.float().contiguous(), **numbers}
        safetensors.torch.save_file(tensors, temporary, metadata={"read_at": READ_AT})


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
            with safetensors.safe_open(file, "pt") as opened:
                read_at = (opened.metadata() or {}).get("read_at")
            weight, mean, std = tensors["weight"], float(tensors["mean"]), float(tensors["std"])
        except FileNotFoundError:
            raise UserError(
                f"{directory} is no reward model, without {REWARD_HEAD}; `make reward` makes one."
            ) from None
        except (safetensors.SafetensorError, KeyError, ValueError) as e:
            raise UserError(f"{file} cannot be read ({e}). Run `make reward` again.") from None
        if read_at != READ_AT:
            raise UserError(
                f"{file} was trained by an earlier version, which read rewards before the token that ends an answer; "
                'now they are read at that token. Train it again: `make reward ARGS="--resume false"`, or the same '
                "command with --resume false."
            )
        model = load_model(directory, None, precision, device=device)
        if weight.shape != (1, model.config.n_embd) or not std > 0:
            raise UserError(f"{file} does not fit the model beside it. Run `make reward` again.")
        self.model: RewardModel = with_head(model, RewardModel, "reward_head").eval().requires_grad_(False)
        self.model.reward_head.weight.copy_(weight.to(device))
        self.mean, self.std, self.device = mean, std, torch.device(device)
        self.template = ChatTemplate.from_checkpoint(directory)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[list[Message]],
        answers: Sequence[str],
        truncated: Sequence[bool] | None = None,
        tools: Sequence[list[Any] | None] | None = None,
        row_tokens: int = 2048,
    ) -> list[float]:
        """Rewards of answers in units of the reward model's standard deviation, 0 being its mean.

        An answer that exceeds the reward model's context is judged by its beginning.

        Args:
            prompts: Conversations that end with the user's turn.
            answers: The assistant's, as text.
            truncated: Whether an answer did not end; it is scored without the token that ends a turn. None if all did.
            tools: The tools that each conversation may call; None if there are none.
            row_tokens: Capacity of a packed row.
        """
        longest = self.model.max_seq_length
        trees = []
        cuts, offered = truncated or [False] * len(answers), tools or [None] * len(answers)
        for prompt, answer, cut, callable_tools in zip(prompts, answers, cuts, offered, strict=True):
            messages = [*prompt, {"role": "assistant", "content": answer}]
            chat = self.template.encode_chat(messages, len(prompt), callable_tools)
            completion = chat.completion[: max(1, longest - len(chat.prompt))]
            ids = [*chat.prompt[-longest + 1 :], *completion]
            if cut and ids[-1] in self.template.stop_ids:
                ids.pop()
            trees.append(Tree(ids[:-1], [ids[-1:]]))
        found = torch.empty(len(trees))
        for indices, batch in pack_scored(trees, row_tokens):
            found[indices] = self.model(batch.to(self.device)).cpu()
        return ((found - self.mean) / self.std).tolist()
