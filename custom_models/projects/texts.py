"""Texts as batches: encoded by a tokenizer, cut where a model cannot read on, sorted by length and padded."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from data_prep.rows import read_rows
from workflows.errors import UserError

Row = TypeVar("Row")
_POOL = 20
"""So many batches are drawn together and sorted by length: little padding, and yet a new mixture in each epoch."""


def drawn(rows: Sequence[Row], most: int | None) -> list[Row]:
    """So many rows, in their order, drawn at random and always the same: the first ones may all be of one source."""
    if most is None or most >= len(rows):
        return [*rows]
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), most))]


@dataclass(frozen=True)
class Labelled:
    """A text with its class.

    Attributes:
        text: As it was written.
        ids: Its tokens.
        label: The number of its class.
    """

    text: str
    ids: list[int]
    label: int


@dataclass(frozen=True)
class Batch:
    """Texts of a batch, padded at their ends.

    Attributes:
        ids: (B, T).
        lengths: How many tokens of each are real, (B,).
        labels: (B,).
    """

    ids: Tensor
    lengths: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device (Lightning calls it)."""
        return Batch(self.ids.to(device), self.lengths.to(device), self.labels.to(device))


def read_labelled(data: Path, split: str, labels: list[str] | None = None) -> tuple[list[tuple[str, int]], list[str]]:
    """Texts and numbers of their classes.

    Args:
        data: A data directory of {"text", "label"} rows.
        split: Which file of it.
        labels: The classes' names; those that occur, in alphabetical order, if None.

    Returns:
        The texts with their classes, and the classes' names.

    Raises:
        UserError: If the file is missing or malformed, or a label is none of `labels`.
    """
    file = data / f"{split}.jsonl"
    rows = read_rows(file, "classified")
    names = sorted({row["label"] for row in rows}) if labels is None else labels
    if len(names) < 2:
        raise UserError(f"{file} has one class only, {names[0]!r}; there is nothing to tell apart.")
    for number, row in enumerate(rows, start=1):
        if row["label"] not in names:
            raise UserError(f"{file}, row {number}: the label {row['label']!r} is none of {', '.join(names)}.")
    return [(row["text"], names.index(row["label"])) for row in rows], names


def encode(texts: Sequence[tuple[str, int]], tokenizer: Tokenizer, longest: int) -> tuple[list[Labelled], int]:
    """Encode texts; one that is longer than a model can read keeps its beginning.

    What a tokenizer ends every text with (BERT's [SEP]) stays its end.

    Args:
        texts: Texts with their classes.
        tokenizer: Whose ids.
        longest: The most tokens.

    Returns:
        The texts encoded, and how many were cut.
    """
    found, cut = [], 0
    for (text, label), encoded in zip(texts, tokenizer.encode_batch([text for text, _ in texts]), strict=True):
        ids = encoded.ids
        if len(ids) > longest:
            ends = ids[-1:] if encoded.special_tokens_mask[-1] else []
            ids, cut = [*ids[: longest - len(ends)], *ends], cut + 1
        if not ids:
            raise UserError(f"The text {text!r} has no tokens.")
        found.append(Labelled(text, ids, label))
    return found, cut


class LengthBatches(Sampler[list[int]]):
    """Batches of texts of similar length, in an order that changes from epoch to epoch and is the same for a seed.

    Args:
        lengths: Of the texts.
        batch_size: Texts in a batch; the last may have fewer.
        seed: Of the order; None for the order of lengths.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int | None) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.lengths)))
        pool = len(order)
        chance = random.Random(f"{self.seed} {self.epoch}")
        if self.seed is not None:
            chance.shuffle(order)
            pool = self.batch_size * _POOL
        batches = []
        for begin in range(0, len(order), pool):
            drawn = sorted(order[begin : begin + pool], key=self.lengths.__getitem__)
            batches += [drawn[i : i + self.batch_size] for i in range(0, len(drawn), self.batch_size)]
        if self.seed is not None:
            chance.shuffle(batches)
        self.epoch += 1
        yield from batches


def padded(rows: Sequence[Labelled], pad_id: int) -> Batch:
    """Texts as one batch."""
    lengths = torch.tensor([len(row.ids) for row in rows])  # (B,)
    ids = torch.full((len(rows), int(lengths.max())), pad_id)  # (B, T)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
    return Batch(ids, lengths, torch.tensor([row.label for row in rows]))


def loader(rows: Sequence[Labelled], pad_id: int, batch_size: int, seed: int | None = None) -> DataLoader[Labelled]:
    """Batches of texts, shuffled by a seed (training) or in the order of their lengths."""
    batches = LengthBatches([len(row.ids) for row in rows], batch_size, seed)
    return DataLoader(rows, batch_sampler=batches, collate_fn=lambda found: padded(found, pad_id))  # type: ignore[arg-type]
