"""Prompts with answers, and pairs of answers, as batches for a GPT."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from custom_models.gpt import GPT
from custom_models.gpt_checkpoint import Tokenizer
from custom_models.projects.texts import LengthBatches
from custom_models.tokenization.bpe import SpecialBPE
from custom_models.tokenization.gpt2_files import END_OF_TEXT
from data_prep.rows import Row
from workflows.errors import UserError
from workflows.training import losses


@dataclass(frozen=True)
class Answered:
    """A prompt with an answer to it, as token ids; the answer ends with the token that ends a text."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        chosen: The better one.
        rejected: The other.
        reference: The log-probabilities of both under the reference, (2,).
    """

    chosen: Answered
    rejected: Answered
    reference: Tensor

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Batch:
    """Texts, padded at their ends; what stands there is seen by no token before it.

    Attributes:
        ids: (B, T).
        targets: The token after each, (B, T).
        learned: Whether that one belongs to an answer, (B, T).
        reference: The log-probability of each answer under the reference, (B,); of pairs only.
    """

    ids: Tensor
    targets: Tensor
    learned: Tensor
    reference: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same on a device (Lightning calls it)."""
        return Batch(*(None if part is None else part.to(device) for part in vars(self).values()))  # type: ignore[arg-type]


def padded(texts: Sequence[Answered], reference: Tensor | None = None) -> Batch:
    """Texts as one batch."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)  # (B, T + 1)
    learned = torch.zeros(len(texts), longest, dtype=torch.bool)  # (B, T + 1)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text.prompt + text.answer)
        learned[i, len(text.prompt) : len(text)] = True
    return Batch(ids[:, :-1], ids[:, 1:], learned[:, 1:], reference)


def padded_pairs(pairs: Sequence[Pair]) -> Batch:
    """Pairs as one batch, in which each chosen answer is followed by its rejected one."""
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    return padded(texts, torch.cat([pair.reference for pair in pairs]))


def token_logprobs(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """log pi of each answer's tokens, (N,), and which text each of them belongs to, (N,)."""
    logits = model(batch.ids)[batch.learned]  # (N, vocab_size)
    logprobs = -F.cross_entropy(logits.float(), batch.targets[batch.learned], reduction="none")  # (N,)
    return logprobs, batch.learned.nonzero()[:, 0]


def answer_logprobs(model: GPT, batch: Batch) -> Tensor:
    """log pi(answer | prompt), the sum over its tokens, (B,)."""
    logprobs, owners = token_logprobs(model, batch)  # (N,) each
    return losses.per_completion(logprobs, owners, len(batch.ids))


def encoded(tokenizer: Tokenizer, turns: Sequence[Row], answer: str) -> Answered:
    """A conversation's turns, each on a line of its own, and the answer to them."""
    assert isinstance(tokenizer, SpecialBPE)
    prompt = "".join(f"{turn['content']}\n" for turn in turns)
    end = tokenizer.special_tokens[END_OF_TEXT]
    return Answered(tokenizer.encode(prompt, special="text"), [*tokenizer.encode(answer, special="text"), end])


def fitting(texts: list[Any], context: int, what: str) -> list[Any]:
    """Those texts that the model can read; the last token is predicted and not read.

    Raises:
        UserError: If there is none.
    """
    kept = [text for text in texts if len(text) <= context + 1]
    if not kept:
        raise UserError(f"None of the {what} fits into {context} tokens. Take a model with a longer context.")
    if len(kept) < len(texts):
        print(f"{len(texts) - len(kept):,} of {len(texts):,} {what} are longer than {context} tokens: left out")
    return kept


def loader(items: Sequence[Any], batch_size: int, collate: Any, seed: int | None = None) -> DataLoader[Any]:
    """Batches of items of similar length, in an order that a seed decides, or by length."""
    batches = LengthBatches([len(item) for item in items], batch_size, seed)
    return DataLoader(items, batch_sampler=batches, collate_fn=collate)  # type: ignore[arg-type]


def mismatched(rows: Sequence[Row], seed: int) -> list[Row]:
    """Preferences for a question's own answer over one that belongs to another question of the same kind.

    Every answer is as often the better one as the worse, so what is to be learned is which belongs to what: how likely
    an answer is by itself says nothing.

    Args:
        rows: {"messages"} rows.
        seed: Decides whose answers are exchanged.

    Returns:
        {"prompt", "chosen", "rejected"} rows; a row whose partner has the same answer is left out.
    """
    chance = random.Random(seed)
    by_kind: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row.get("kind")].append(row)
    found = []
    for members in by_kind.values():
        drawn = chance.sample(members, len(members))
        for row, other in zip(drawn, drawn[1:] + drawn[:1], strict=True):
            *prompt, chosen = row["messages"]
            if chosen["content"] != other["messages"][-1]["content"]:
                found.append({"prompt": prompt, "chosen": [chosen], "rejected": [other["messages"][-1]]})
    return chance.sample(found, len(found))
