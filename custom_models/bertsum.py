"""BERTSum: an encoder that says how much each sentence of a document belongs in its summary.

Liu 2019, arXiv 1903.10318 (section 2); Liu and Lapata 2019, arXiv 1908.08345 (section 3.2). Three things make a BERT,
which reads one sentence or two, read a document:

* each sentence has its own [CLS] before it, whose state stands for the sentence, and its [SEP] behind it
  (`pooling="mean"` takes the mean of its tokens' states instead, which is how MiniLM was trained);
* sentences belong to the two segments by turns, so that neighbours are told apart (RoBERTa and DistilBERT have no two
  segments and go without);
* Transformer layers over the sentences' states, with sine waves for their places, in which sentences see each other.

What is added here: a document over the encoder's positions is read in windows that overlap and begin and end with a
sentence (`windows`). A sentence that stands in several has the mean of its states there; the layers over the sentences
see the document whole. So the encoder's work grows with a document's length and not with its square.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from custom_models.attention import real_tokens
from custom_models.encoder import Encoder, EncoderLayer, states_by_parts
from custom_models.positions import sinusoidal_table
from workflows.errors import UserError

Pooling = Literal["cls", "mean"]


@dataclass(frozen=True)
class DocumentBatch:
    """Documents as windows of tokens: B documents of at most S sentences in W windows of at most T tokens.

    Attributes:
        ids: (W, T), padded at the ends.
        lengths: How many tokens of each window are real, (W,).
        segments: 0 for the tokens of even sentences, 1 for those of odd ones, (W, T).
        places: Each token's sentence, document * S + sentence, (W, T); B * S for padding.
        first: Whether a token is its sentence's [CLS], (W, T).
        n_sentences: How many sentences each document has, (B,).
    """

    ids: Tensor
    lengths: Tensor
    segments: Tensor
    places: Tensor
    first: Tensor
    n_sentences: Tensor

    def to(self, device: torch.device) -> "DocumentBatch":
        """The same on a device."""
        return DocumentBatch(*(part.to(device) for part in vars(self).values()))


def windows(lengths: Sequence[int], longest: int, overlap: float = 0.25) -> list[tuple[int, int]]:
    """Cut a row of sentences into windows that overlap; each begins and ends with a sentence.

    Args:
        lengths: The sentences' tokens, none above `longest`.
        longest: The most tokens of a window.
        overlap: The share of a window that the next one reads again, at most; whole sentences only.

    Returns:
        The first sentence of each window, and the one after its last. Every sentence is in a window, and each window
        has one that those before it lack.

    Raises:
        UserError: If a sentence is longer than a window.
    """
    if lengths and max(lengths) > longest:
        raise UserError(f"A sentence has {max(lengths)} tokens, and a window holds {longest}.")
    found: list[tuple[int, int]] = []
    begin = 0
    while begin < len(lengths):
        end, size = begin, 0
        while end < len(lengths) and size + lengths[end] <= longest:
            size += lengths[end]
            end += 1
        found.append((begin, end))
        if end == len(lengths):
            break
        again = 0  # tokens of this window's last sentences, which the next one reads again
        begin = end
        while begin - 1 > found[-1][0] and again + lengths[begin - 1] <= overlap * longest:
            begin -= 1
            again += lengths[begin]
        while again + lengths[end] > longest:  # the next sentence must fit beside them
            again -= lengths[begin]
            begin += 1
    return found


def batch_documents(documents: Sequence[Sequence[Sequence[int]]], longest: int, pad_id: int) -> DocumentBatch:
    """Documents as one batch.

    Args:
        documents: For each document its sentences' tokens, [CLS] first and [SEP] last.
        longest: The most tokens of a window.
        pad_id: The id of padding.

    Raises:
        UserError: If a document has no sentences, or a sentence is longer than a window.
    """
    if not all(documents):
        raise UserError("A document without sentences cannot be summarised.")
    most = max(map(len, documents))
    rows: list[list[int]] = []
    sentence_of: list[list[int]] = []  # of each token: the sentence in its document
    owners = []  # of each window: its document
    for number, document in enumerate(documents):
        for begin, end in windows([len(sentence) for sentence in document], longest):
            rows.append([i for sentence in document[begin:end] for i in sentence])
            sentence_of.append([i for i in range(begin, end) for _ in document[i]])
            owners.append(number)
    lengths = torch.tensor([len(row) for row in rows])  # (W,)
    width = int(lengths.max())
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])  # (W, T)
    inner = torch.tensor([row + [0] * (width - len(row)) for row in sentence_of])  # (W, T)
    places = torch.tensor(owners)[:, None] * most + inner  # (W, T)
    places = places.masked_fill(~real_tokens(lengths, width), len(documents) * most)  # (W, T)
    before = torch.nn.functional.pad(places[:, :-1], (1, 0), value=-1)  # (W, T), the place of the token before
    n_sentences = torch.tensor([len(document) for document in documents])  # (B,)
    return DocumentBatch(ids, lengths, inner % 2, places, places != before, n_sentences)


class BertSum(nn.Module):
    """A score for each sentence of a document.

    Args:
        encoder: What reads the tokens: a BERT, RoBERTa or DistilBERT.
        n_layer: Layers over the sentences; the paper's best has two.
        pooling: What stands for a sentence: the state of its [CLS], or the mean of its tokens' states.
    """

    def __init__(self, encoder: Encoder, n_layer: int = 2, pooling: Pooling = "cls") -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        # a pooler is not used, and a parameter without gradient is a nuisance on several devices
        encoder.pooler, encoder.config = None, replace(encoder.config, pooler=False)
        config = replace(encoder.config, norm_first=True)
        self.between = nn.ModuleList(EncoderLayer(config) for _ in range(n_layer))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, 1)

    def forward(self, batch: DocumentBatch) -> Tensor:
        """Documents -> logits of their sentences, (B, S); those behind a document's end are -inf."""
        segments = batch.segments if self.encoder.config.n_segment == 2 else None
        n_document, most = len(batch.n_sentences), int(batch.n_sentences.max())
        places = batch.places  # (W, T)
        if self.pooling == "cls":
            places = places.masked_fill(~batch.first, n_document * most)  # (W, T)
        # every state is added to its sentence's; the last row takes those that are no sentence's, and is left out
        total = torch.zeros(
            n_document * most + 1, self.encoder.config.width, device=places.device
        )  # (B * S + 1, width)
        begin = 0
        for states in states_by_parts(self.encoder, batch.ids, batch.lengths, segments):  # (part of W, T, width)
            at = places[begin : begin + len(states)].flatten()  # (part of W * T,)
            total, begin = total.index_add(0, at, states.float().flatten(0, 1)), begin + len(states)
        total = total[:-1]  # (B * S, width)
        times = torch.bincount(places.flatten(), minlength=len(total) + 1)[:-1].clamp(min=1)  # (B * S,)
        x = (total / times[:, None]).view(n_document, most, -1)  # (B, S, width), over a sentence's windows, too
        x = self.dropout(x + sinusoidal_table(most, x.shape[-1]).to(x))  # (B, S, width)
        for layer in self.between:
            x, _ = layer(x, batch.n_sentences, False)  # (B, S, width)
        logits = self.head(self.norm(x))[..., 0]  # (B, S)
        return logits.float().masked_fill(~real_tokens(batch.n_sentences, most), float("-inf"))  # (B, S)
