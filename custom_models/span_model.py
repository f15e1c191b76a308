"""An encoder that finds the answer to a question in a text: where it begins, and where it ends.

Devlin et al. 2018, arXiv 1810.04805 (section 4.2): question and context are read together, and each token of the
context has two scores, as the answer's first token and as its last one. A context over the encoder's positions is read
in windows that overlap; in one that lacks the answer, both ends are at the first token, [CLS] (as section 4.3 does for
questions without an answer).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.encoder import Encoder, states_by_parts
from workflows.errors import UserError


@dataclass(frozen=True)
class SpanBatch:
    """Questions with windows of their contexts.

    Attributes:
        ids: [CLS] question [SEP] window [SEP], (B, T), padded at the ends.
        lengths: How many tokens are real, (B,).
        segments: 0 for the question, 1 for the context, (B, T).
        allowed: Where an answer may begin and end: at the context's tokens and at [CLS], (B, T).
        spans: The answer's first and last token, (B, 2); [CLS] where the window lacks it.
    """

    ids: Tensor
    lengths: Tensor
    segments: Tensor
    allowed: Tensor
    spans: Tensor

    def to(self, device: torch.device) -> "SpanBatch":
        """The same on a device (Lightning calls it)."""
        return SpanBatch(*(part.to(device) for part in vars(self).values()))


def stretches(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Cut a context into windows of `room` tokens, of which each begins `stride` tokens after the one before it.

    Returns:
        The first token of each window and the one after its last; together they hold all tokens.

    Raises:
        UserError: If there is no room.
    """
    if room < 1 or not 1 <= stride <= room:
        raise UserError(
            f"A question leaves room for {room} tokens of its context. Shorten it, or take a longer encoder."
        )
    found = [(0, min(room, length))]
    while found[-1][1] < length:
        begin = found[-1][0] + stride
        found.append((begin, min(begin + room, length)))
    return found


class SpanModel(nn.Module):
    """Two scores for each token of a context.

    Args:
        encoder: What reads question and context.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        # a pooler is not used, and a parameter without gradient is a nuisance on several devices
        encoder.pooler, encoder.config = None, replace(encoder.config, pooler=False)
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.width, 2)

    def forward(self, batch: SpanBatch) -> tuple[Tensor, Tensor]:
        """Logits of an answer's first and of its last token, (B, T) each; -inf where none may be."""
        segments = batch.segments if self.encoder.config.n_segment == 2 else None
        parts = states_by_parts(self.encoder, batch.ids, batch.lengths, segments)  # (part of B, T, width) each
        logits = torch.cat([self.head(states).float() for states in parts])  # (B, T, 2)
        logits = logits.masked_fill(~batch.allowed[..., None], float("-inf"))  # (B, T, 2)
        return logits[..., 0], logits[..., 1]

    def loss(self, batch: SpanBatch) -> Tensor:
        """-log p(first token) - log p(last token), halved; the mean over the batch."""
        first, last = self(batch)  # (B, T) each
        return (F.cross_entropy(first, batch.spans[:, 0]) + F.cross_entropy(last, batch.spans[:, 1])) / 2


@torch.no_grad()
def begin_by_matching(encoder: Encoder) -> None:
    """Let the first layer begin with an eye on equal tokens: those of a question and of its context find each other.

    Queries and keys begin as the same random projection, and tokens weigh more than their places, so a token's score is
    highest with its like, by some e^6 to any other. An answer stands where the words of its question are, and some
    thousand questions are few to find that out from.

    Args:
        encoder: An untrained one.
    """
    attention: Any = encoder.layers[0].attention
    torch.nn.init.normal_(attention.k.weight, std=encoder.config.width**-0.5)  # keys of the size of what is read
    attention.q.weight.copy_(1.5 * attention.k.weight)  # (width, width)
    encoder.tokens.weight.mul_(3.0)  # (vocabulary, width)


def best_span(first: Tensor, last: Tensor, most: int) -> tuple[float, int, int]:
    """The best answer in a window, whose score is set against that of having none.

    Args:
        first: Logits of its first token, (T,); the window's [CLS] is number 0.
        last: Logits of its last token, (T,).
        most: The most tokens of an answer.

    Returns:
        log of how much likelier the answer is than [CLS], and its first and last token.
    """
    scores = first[1:, None] + last[None, 1:]  # (T - 1, T - 1), first by row
    length = len(scores)
    apart = torch.arange(length)[None] - torch.arange(length)[:, None]  # (T - 1, T - 1)
    scores = scores.masked_fill((apart < 0) | (apart >= most), float("-inf"))  # (T - 1, T - 1)
    best = int(scores.argmax())
    return float(scores.flatten()[best] - first[0] - last[0]), best // length + 1, best % length + 1


def batch_spans(rows: Sequence[tuple[Sequence[int], int, tuple[int, int]]], pad_id: int) -> SpanBatch:
    """Windows as one batch.

    Args:
        rows: For each window its ids, where the context begins in them, and the answer's first and last token.
        pad_id: The id of padding.
    """
    lengths = torch.tensor([len(ids) for ids, _, _ in rows])  # (B,)
    width = int(lengths.max())
    ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids, _, _ in rows])  # (B, T)
    begins = torch.tensor([begin for _, begin, _ in rows])[:, None]  # (B, 1)
    at = torch.arange(width)  # (T,)
    context = (at >= begins) & (at < lengths[:, None] - 1)  # (B, T), without the [SEP] at the end
    spans = torch.tensor([span for _, _, span in rows])  # (B, 2)
    return SpanBatch(ids, lengths, (at >= begins).long(), context | (at == 0), spans)
