"""Documents with summaries as batches: sentences as tokens, and which of them the oracle would choose."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from custom_models.bertsum import DocumentBatch, batch_documents
from custom_models.projects.rouge import oracle
from custom_models.projects.texts import LengthBatches, drawn
from data_prep.rows import read_rows


@dataclass(frozen=True)
class Document:
    """A document with its summaries.

    Attributes:
        sentences: Its text.
        summaries: What people wrote; empty for a document that is to be summarised.
        ids: The tokens of its sentences, with those that begin and end every text of the tokenizer.
        chosen: The sentences that the oracle chooses; empty where it was not asked.
    """

    sentences: list[str]
    summaries: list[str]
    ids: list[list[int]]
    chosen: list[int]


@dataclass(frozen=True)
class Batch:
    """Documents of a batch.

    Attributes:
        tokens: What the model reads.
        labels: 1 for the sentences that the oracle chooses, (B, S).
        documents: The documents themselves.
    """

    tokens: DocumentBatch
    labels: Tensor
    documents: list[Document]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device (Lightning calls it)."""
        return Batch(self.tokens.to(device), self.labels.to(device), self.documents)


def encode_documents(
    texts: Sequence[tuple[list[str], list[str]]], tokenizer: Tokenizer, longest: int
) -> tuple[list[Document], int]:
    """Documents as tokens.

    Args:
        texts: For each document its sentences and its summaries.
        tokenizer: Whose ids; it puts [CLS] before and [SEP] behind every text, or its own tokens in their place.
        longest: The most tokens of a sentence, those two included; a longer one is read without its end, and counted.

    Returns:
        The documents, and how many sentences were cut.
    """
    flat = tokenizer.encode_batch([sentence for sentences, _ in texts for sentence in sentences])
    cut = sum(len(encoded.ids) > longest for encoded in flat)
    ids = iter([e.ids if len(e.ids) <= longest else [*e.ids[: longest - 1], e.ids[-1]] for e in flat])
    return [Document(s, summaries, [next(ids) for _ in s], []) for s, summaries in texts], cut


def read_documents(
    data: Path, split: str, tokenizer: Tokenizer, longest: int, max_rows: int | None = None
) -> list[Document]:
    """Read a split of a data directory, and say what in it is out of the ordinary.

    Raises:
        UserError: If the file is missing or malformed.
    """
    file = data / f"{split}.jsonl"
    rows = drawn(read_rows(file, "summarised"), max_rows)
    found, cut = encode_documents([(row["sentences"], row["summaries"]) for row in rows], tokenizer, longest)
    long = sum(sum(map(len, document.ids)) > longest for document in found)
    single = sum(len(document.sentences) == 1 for document in found)
    print(f"{file}: {len(found):,} documents; {long:,} over {longest} tokens, read in windows; "
          f"{single:,} of one sentence; {cut:,} sentences cut: over {longest} tokens")  # fmt: skip
    return found


def with_oracle(documents: Sequence[Document], most: int) -> list[Document]:
    """Documents to learn from, with what the oracle chooses; those of one sentence teach nothing and are left out."""
    several = [document for document in documents if len(document.sentences) > 1]
    return [replace(d, chosen=oracle(d.sentences, d.summaries, most)) for d in several]


def loader(
    documents: Sequence[Document], longest: int, pad_id: int, batch_size: int, seed: int | None = None
) -> DataLoader[Document]:
    """Batches of documents, shuffled by a seed (training) or in the order of their lengths."""

    def collate(found: Sequence[Document]) -> Batch:
        tokens = batch_documents([document.ids for document in found], longest, pad_id)
        labels = torch.zeros(len(found), int(tokens.n_sentences.max()))  # (B, S)
        for i, document in enumerate(found):
            labels[i, document.chosen] = 1.0
        return Batch(tokens, labels, list(found))

    order = LengthBatches([sum(map(len, document.ids)) for document in documents], batch_size, seed)
    return DataLoader(documents, batch_sampler=order, collate_fn=collate)  # type: ignore[arg-type]
