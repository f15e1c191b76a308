"""Training a text-to-text model: pairs of token ids as batches, and the loss of writing the second from the first."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from custom_models.encoder_decoder import EncoderDecoder
from custom_models.encoder_decoder_config import EncoderDecoderConfig, t5_v1_1
from custom_models.projects.fitting import FitArgs
from custom_models.projects.texts import LengthBatches
from custom_models.projects.vocabulary import END, PAD, learn_vocabulary
from custom_models.span_corruption import SENTINELS, Pair, corrupt, sentinel


@dataclass
class T5Shape:
    """A small T5 v1.1 that is trained from nothing."""

    vocab_size: int = 6000
    """Tokens of its vocabulary, 100 sentinels among them."""
    width: int = 192
    """Of the tokens' vectors."""
    n_layer: int = 3
    """Layers of the encoder, and of the decoder."""
    n_head: int = 4
    """Attention heads."""
    inner_width: int = 384
    """Of the feed-forward layers."""
    dropout: float = 0.1
    """Share of activations set to zero in training."""

    def config(self, tokenizer: Tokenizer) -> EncoderDecoderConfig:
        """The whole configuration.

        Embeddings are multiplied by sqrt(width), as the paper's are, and the head is tied: T5's own function, written
        so that AdamW's steps, which are alike for all weights, are not too small for embeddings.
        """
        pad_id, end_id = tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)
        return t5_v1_1(
            self.vocab_size,
            width=self.width,
            n_layer=self.n_layer,
            n_decoder_layer=self.n_layer,
            n_head=self.n_head,
            head_size=None,
            inner_width=self.inner_width,
            dropout=self.dropout,
            attention_dropout=0.0,
            scale_embeddings=True,
            tied=True,
            pad_id=pad_id,
            start_id=pad_id,
            end_id=end_id,
        )


def learn_t5_vocabulary(texts: Sequence[str], size: int) -> Tokenizer:
    """A vocabulary with padding, end and sentinels; arguments and errors as for `learn_vocabulary`."""
    return learn_vocabulary(texts, size, [PAD, END, *(sentinel(i) for i in range(SENTINELS))])


def begin_by_copying(model: EncoderDecoder) -> None:
    """Let cross-attention begin as the identity: what a decoder looks at in the source, it writes.

    The encoder hands each token's embedding on, and the head is the embeddings. So a decoder whose values and outputs
    are the identity gives the token that it attends to a high score, and where the answer is made of words of the
    source, only where to look is left to learn.

    Args:
        model: With heads that together are as wide as the model, and a tied head.
    """
    for layer in model.decoder:
        cross: Any = layer.cross
        torch.nn.init.eye_(cross.v.weight)  # (width, width)
        torch.nn.init.eye_(cross.out.weight)  # (width, width)


def begin_by_looking_near(model: EncoderDecoder, strength: float = 3.0) -> None:
    """Let heads begin with an eye on a neighbour: the token before, the one after, the token itself; some stay free.

    What a word is, its neighbours tell most of all, and some thousand sentences are few to find that out from.

    Args:
        model: With T5's bias.
        strength: Added to the scores of that neighbour; e^3 = 20 times the weight of each other token.
    """
    for bias, places in ((model.encoder_bias, (-1, 1, 0, None)), (model.decoder_bias, (-1, 0, None, None))):
        assert bias is not None
        for head in range(bias.weight.shape[1]):
            place = places[head % len(places)]
            if place is not None:
                bias.weight.data[bias.buckets(torch.tensor(place)), head] += strength


@dataclass(frozen=True)
class PairBatch:
    """Pairs, padded at their ends.

    Attributes:
        source: (B, Ts).
        lengths: How many tokens of each source are real, (B,).
        target: (B, T).
        tags: A class for each source token that has one, else `IGNORED`, (B, Ts); None without.
    """

    source: Tensor
    lengths: Tensor
    target: Tensor
    tags: Tensor | None = None

    def to(self, device: torch.device) -> "PairBatch":
        """The same on a device (Lightning calls it)."""
        return PairBatch(*(None if part is None else part.to(device) for part in vars(self).values()))  # type: ignore[arg-type]


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Rows of ids as one tensor, (B, T)."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])  # (B, T)


def batch_of(pairs: Sequence[Pair], pad_id: int) -> PairBatch:
    """Pairs as one batch."""
    lengths = torch.tensor([len(pair.source) for pair in pairs])  # (B,)
    return PairBatch(
        padded([pair.source for pair in pairs], pad_id), lengths, padded([pair.target for pair in pairs], pad_id)
    )


class Rows(Dataset[Any]):
    """A list as a data set."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def row_loader(
    rows: Sequence[Any], lengths: Sequence[int], batch_size: int, collate: Callable[[list[Any]], Any], seed: int | None
) -> DataLoader[Any]:
    """Batches of rows of similar length, shuffled by a seed (training) or in the order of their lengths."""
    return DataLoader(Rows(rows), batch_sampler=LengthBatches(lengths, batch_size, seed), collate_fn=collate)


def corruption_loader(
    texts: Sequence[list[int]], tokenizer: Tokenizer, batch_size: int, seed: int, fixed: bool = False
) -> DataLoader[Any]:
    """Texts whose spans are cut out anew each time, or, `fixed`, the same ones each time."""
    pad_id, end_id = tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)
    marks = [tokenizer.token_to_id(sentinel(i)) for i in range(SENTINELS)]
    chance = random.Random(seed)

    def collate(rows: list[list[int]]) -> PairBatch:
        drawn = random.Random(f"{seed} {rows[0]}") if fixed else chance
        return batch_of([corrupt(ids, marks, end_id, drawn) for ids in rows], pad_id)

    return row_loader(texts, [len(ids) for ids in texts], batch_size, collate, None if fixed else seed)


def pieces_of(ids: list[int], longest: int) -> list[list[int]]:
    """A text in pieces of about one length, at most `longest`, which is 3 or more; one of a single token has none."""
    n = -(-len(ids) // longest)
    bounds = [len(ids) * i // max(1, n) for i in range(n + 1)]
    return [ids[a:b] for a, b in pairwise(bounds) if b - a > 1]


class Seq2SeqTask(L.LightningModule):
    """How a text-to-text model is trained: each token of the target from the source and the tokens before it.

    Args:
        model: The encoder-decoder.
        fit: Rate and schedule.
        total_steps: Optimizer steps in all.
        label_smoothing: See `text_loss`; only in training.
    """

    def __init__(self, model: EncoderDecoder, fit: FitArgs, total_steps: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.fit_args, self.total_steps = model, fit, total_steps
        self.label_smoothing = label_smoothing

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """The loss, logged."""
        loss, _, _ = text_loss(self.model, batch, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.source))
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """The loss, and the share of tokens that are likeliest where they stand."""
        loss, right, n = text_loss(self.model, batch)
        self.log("val_loss", loss, batch_size=n, prog_bar=True)
        self.log("val_accuracy", right / n, batch_size=n, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with the rate's schedule."""
        return self.fit_args.optimizer(self, self.total_steps)


def text_loss(
    model: EncoderDecoder, batch: PairBatch, context: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, int]:
    """-log p(target token), the mean over a batch's tokens, in nats.

    Args:
        model: The encoder-decoder.
        batch: The pairs.
        context: The encoder's output for them, (B, Ts, width), if it is known.
        label_smoothing: So much of a target's probability is spread over the whole vocabulary (Szegedy et al. 2015,
            arXiv 1512.00567, section 7).

    Returns:
        The loss, how many tokens are the likeliest ones at their places, and how many there are.
    """
    pad_id = model.config.pad_id
    if context is None:
        context = model.encode(batch.source, batch.lengths)  # (B, Ts, width)
    logits = model.decode(model.shift(batch.target), context, batch.lengths).float()  # (B, T, vocab_size)
    real = batch.target != pad_id  # (B, T)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=pad_id,
                           label_smoothing=label_smoothing)  # fmt: skip
    right = ((logits.argmax(dim=-1) == batch.target) & real).sum()
    return loss, right, int(real.sum())
