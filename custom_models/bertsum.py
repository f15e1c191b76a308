"""BERTSum: an encoder that says how much each sentence of a document belongs in its summary.

Liu 2019, arXiv 1903.10318 (section 2); Liu and Lapata 2019, arXiv 1908.08345 (section 3.2). Three things make a BERT,
which reads one sentence or two, read a document:

* each sentence has its own [CLS] before it, whose state stands for the sentence, and its [SEP] behind it;
* sentences belong to the two segments by turns, so that neighbours are told apart (RoBERTa and DistilBERT have no two
  segments and go without);
* Transformer layers over the sentences' states, with sine waves for their places, in which sentences see each other.

What is added here: a document over the encoder's positions is read in windows that overlap and begin and end with a
sentence (`windows`). A sentence that stands in several has the mean of its states there; the layers over the sentences
see the document whole. So the encoder's work grows with a document's length and not with its square.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from custom_models.attention import real_tokens
from custom_models.encoder import Encoder, EncoderLayer
from custom_models.positions import sinusoidal_table
from workflows.errors import UserError


@dataclass(frozen=True)
class DocumentBatch:
    """Documents as windows of tokens. B documents of at most S sentences are read in W windows of at most T tokens, in
    which sentences begin N times.

    Attributes:
        ids: (W, T), padded at the ends.
        lengths: How many tokens of each window are real, (W,).
        segments: 0 for the tokens of even sentences, 1 for those of odd ones, (W, T).
        windows: The window of each sentence's beginning, (N,).
        starts: Its place there, (N,).
        places: Whose it is, document * S + sentence, (N,).
        n_sentences: How many sentences each document has, (B,).
    """

    ids: Tensor
    lengths: Tensor
    segments: Tensor
    windows: Tensor
    starts: Tensor
    places: Tensor
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
    parts: list[list[int]] = []
    beginnings: list[tuple[int, int, int]] = []  # window, place in it, document * S + sentence
    for number, document in enumerate(documents):
        for begin, end in windows([len(sentence) for sentence in document], longest):
            ids: list[int] = []
            segments: list[int] = []
            for i in range(begin, end):
                beginnings.append((len(rows), len(ids), number * most + i))
                ids += document[i]
                segments += [i % 2] * len(document[i])
            rows.append(ids)
            parts.append(segments)
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])  # (W,)
    ids_of = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])  # (W, T)
    segments_of = torch.tensor([part + [0] * (width - len(part)) for part in parts])  # (W, T)
    n_sentences = torch.tensor([len(document) for document in documents])  # (B,)
    in_window, starts, places = torch.tensor(beginnings).unbind(dim=1)  # (N,) each
    return DocumentBatch(ids_of, lengths, segments_of, in_window, starts, places, n_sentences)


class BertSum(nn.Module):
    """A score for each sentence of a document.

    Args:
        encoder: What reads the tokens: a BERT, RoBERTa or DistilBERT.
        n_layer: Layers over the sentences; the paper's best has two.
    """

    def __init__(self, encoder: Encoder, n_layer: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
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
        states = self.encoder(batch.ids, batch.lengths, segments).last  # (W, T, width)
        found = states[batch.windows, batch.starts]  # (N, width)
        n_document, most = len(batch.n_sentences), int(batch.n_sentences.max())
        total = found.new_zeros(n_document * most, found.shape[-1]).index_add(0, batch.places, found)  # (B * S, width)
        times = torch.bincount(batch.places, minlength=len(total)).clamp(min=1)  # (B * S,)
        x = (total / times[:, None]).view(n_document, most, -1)  # (B, S, width), the mean over windows
        x = self.dropout(x + sinusoidal_table(most, x.shape[-1]).to(x))  # (B, S, width)
        for layer in self.between:
            x, _ = layer(x, batch.n_sentences, False)  # (B, S, width)
        logits = self.head(self.norm(x))[..., 0]  # (B, S)
        return logits.float().masked_fill(~real_tokens(batch.n_sentences, most), float("-inf"))  # (B, S)
