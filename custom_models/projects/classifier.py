"""An encoder that names the class of a text: the mean of its tokens' vectors, and one matrix over that."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from custom_models.encoder import Encoder, mean_over_tokens
from custom_models.encoder_checkpoint import read_own, save_encoder, tokenizer_of
from custom_models.projects.fitting import FitArgs, fit_best
from custom_models.projects.texts import Batch, Labelled, encode, loader
from custom_models.weights import fill
from workflows.checkpoint import metric
from workflows.errors import UserError


class TextClassifier(nn.Module):
    """A class for each text.

    Args:
        encoder: What reads the text.
        labels: The classes' names.
        dropout: Share of the text's vector set to zero in training; the encoder's if None.
    """

    def __init__(self, encoder: Encoder, labels: Sequence[str], dropout: float | None = None) -> None:
        super().__init__()
        self.encoder, self.labels = encoder, list(labels)
        self.dropout = nn.Dropout(encoder.config.dropout if dropout is None else dropout)
        self.head = nn.Linear(encoder.config.width, len(self.labels))

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Token ids (B, T) and lengths (B,) -> logits (B, n_label)."""
        return self.from_states(self.encoder(ids, lengths).last, lengths)  # (B, n_label)

    def from_states(self, states: Tensor, lengths: Tensor | None) -> Tensor:
        """The last layer's states (B, T, width) -> logits (B, n_label)."""
        return self.from_vectors(mean_over_tokens(states, lengths))  # (B, n_label)

    def from_vectors(self, vectors: Tensor) -> Tensor:
        """The texts' vectors (B, width) -> logits (B, n_label)."""
        return self.head(self.dropout(vectors))  # (B, n_label)

    def save(self, tokenizer: Tokenizer, folder: Path, data: str) -> None:
        """Write a checkpoint, whole or not at all; `data` is the name of what it learned from."""
        save_encoder(self, self.encoder.config, tokenizer, folder, labels=self.labels, data=data)

    @torch.no_grad()
    def predict(self, texts: Sequence[str], tokenizer: Tokenizer) -> tuple[list[dict[str, float]], int]:
        """The probability of each class for each text, and how many texts were too long to be read to their end.

        Raises:
            UserError: If a text is empty.
        """
        for text in texts:
            if not text.strip():
                raise UserError("There is nothing to classify in an empty text.")
        self.eval()
        rows, cut = encode([(text, 0) for text in texts], tokenizer, self.encoder.config.n_position)
        found = self.logits(rows).softmax(dim=-1)  # (texts, n_label)
        return [dict(zip(self.labels, row, strict=True)) for row in found.tolist()], cut

    @torch.no_grad()
    def logits(self, rows: Sequence[Labelled], batch_size: int = 64) -> Tensor:
        """Logits of encoded texts in their order, (texts, n_label)."""
        device = self.head.weight.device
        batches = loader(rows, self.encoder.config.pad_id, batch_size)
        found = torch.cat([self(batch.ids.to(device), batch.lengths.to(device)) for batch in batches]).cpu()
        order = torch.tensor([i for batch in batches.batch_sampler for i in batch])  # type: ignore[union-attr]
        return torch.empty_like(found).index_copy_(0, order, found)  # (texts, n_label)


def load_classifier(folder: Path) -> tuple[TextClassifier, Tokenizer]:
    """Read what `TextClassifier.save` wrote.

    Raises:
        UserError: If it is no classifier of ours, or damaged.
    """
    config, shape, weights = read_own(folder)
    labels = config.get("labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{folder} is an encoder without classes. Train one with `make sentiment`.")
    model = TextClassifier(Encoder(shape), labels)
    fill(model, weights, str(folder))
    return model.eval(), tokenizer_of(folder)


class ClassifierTask(L.LightningModule):
    """How a classifier is trained: by cross-entropy, with two ways to keep it from learning the texts by heart.

    Some tokens are hidden from it (word dropout), and texts are mixed: of two texts' vectors the mean, weighted by a
    random share, is to be classified as both, by their shares (mixup of sentences, Guo et al. 2019, arXiv 1905.08941).

    Args:
        model: The classifier.
        fit: Rate and schedule.
        total_steps: Optimizer steps in all.
        hidden_tokens: Share of tokens that are hidden from the model in training.
        hidden_id: What they become.
        mixup: a: the share is drawn from Beta(a, a), at 1 any share alike; 0 mixes nothing.
    """

    def __init__(
        self,
        model: TextClassifier,
        fit: FitArgs,
        total_steps: int,
        hidden_tokens: float = 0.0,
        hidden_id: int = 0,
        mixup: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.fit_args, self.total_steps = model, fit, total_steps
        self.hidden_tokens, self.hidden_id, self.mixup = hidden_tokens, hidden_id, mixup

    def hide(self, ids: Tensor) -> Tensor:
        """Hide some tokens: (B, T) -> (B, T)."""
        if not self.hidden_tokens:
            return ids
        return ids.masked_fill(torch.rand(ids.shape, device=ids.device) < self.hidden_tokens, self.hidden_id)

    def loss(self, batch: Batch) -> Tensor:
        """-log p(class), the mean over the batch."""
        ids, lengths, labels = self.hide(batch.ids), batch.lengths, batch.labels
        if not self.mixup:
            return F.cross_entropy(self.model(ids, lengths), labels)
        share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
        other = torch.randperm(len(labels), device=labels.device)  # (B,), each text's partner
        vectors = mean_over_tokens(self.model.encoder(ids, lengths).last, lengths)  # (B, width)
        logits = self.model.from_vectors(share * vectors + (1 - share) * vectors[other])  # (B, n_label)
        return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels[other])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss, logged."""
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The classes' cross-entropy and the share of right classes."""
        logits = self.model(batch.ids, batch.lengths)  # (B, n_label)
        right = (logits.argmax(dim=-1) == batch.labels).float().mean()
        self.log("val_loss", F.cross_entropy(logits, batch.labels), batch_size=len(batch.labels))
        self.log("val_accuracy", right, batch_size=len(batch.labels), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with the rate's schedule."""
        return self.fit_args.optimizer(self, self.total_steps)


Rows = dict[str, list[Labelled]]
"""Encoded texts of the splits train, validation and test."""


def encode_splits(data: Path, texts: dict[str, list[tuple[str, int]]], tokenizer: Tokenizer, longest: int) -> Rows:
    """Encode the texts of all splits, and say how many had to be cut."""
    rows = {}
    for split, pairs in texts.items():
        rows[split], cut = encode(pairs, tokenizer, longest)
        print(f"{data / split}.jsonl: {len(pairs):,} texts; {cut:,} cut: over {longest} tokens")
    return rows


def fit_classifier(task: ClassifierTask, rows: Rows, out_dir: Path, seed: int) -> list[dict[str, float]]:
    """Train a classifier until it gets no better on the validation texts; returns the numbers of each epoch."""
    fit, pad_id = task.fit_args, task.model.encoder.config.pad_id
    train = loader(rows["train"], pad_id, fit.batch_size, seed)
    return fit_best(task, train, loader(rows["validation"], pad_id, 4 * fit.batch_size), out_dir, fit)


def steps_of(rows: Rows, fit: FitArgs) -> int:
    """Optimizer steps of all epochs."""
    return -(-len(rows["train"]) // fit.batch_size) * fit.max_epochs


def confusion(model: TextClassifier, rows: Sequence[Labelled]) -> Tensor:
    """How many texts of each class the model takes for which, (n_label, n_label), true class by row."""
    taken = model.eval().logits(rows).argmax(dim=-1)  # (texts,)
    wanted = torch.tensor([row.label for row in rows])  # (texts,)
    n_label = len(model.labels)
    return torch.bincount(wanted * n_label + taken, minlength=n_label**2).view(n_label, n_label)


def share_right(counts: Tensor) -> float:
    """Accuracy, of a table of `confusion`."""
    return float(counts.diagonal().sum() / counts.sum())


def macro_f1(counts: Tensor) -> float:
    """The mean of the classes' F1, of a table of `confusion`; a class that is neither there nor found counts as 0."""
    right = counts.diagonal().double()  # (classes,)
    either = (counts.sum(dim=0) + counts.sum(dim=1)).clamp(min=1)  # (classes,)
    return float((2 * right / either).mean())


def over_seeds(name: str, values: Sequence[float]) -> list[dict[str, Any]]:
    """The row of `metrics.json` for the mean of a number over several seeds; none for one seed."""
    if len(values) < 2:
        return []
    spread = statistics.stdev(values) / len(values) ** 0.5
    return [metric(f"{name}_mean_of_seeds", statistics.fmean(values), stderr=spread, n=len(values), split="test")]


def predict(checkpoint_dir: Path, text: str) -> None:
    """Name the class of a text.

    Args:
        checkpoint_dir: A classifier's folder, such as out/sentiment/movie_snippets/scratch/final.
        text: What to classify.

    Raises:
        UserError: If the folder holds no classifier, or the text is empty.
    """
    if not (checkpoint_dir / "config.json").is_file():
        raise UserError(f"{checkpoint_dir} holds no classifier. Train one with `make sentiment`, or name its folder.")
    model, tokenizer = load_classifier(checkpoint_dir)
    (found,), cut = model.predict([text], tokenizer)
    for label, probability in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{label:<12}{probability:7.1%}")
    if cut:
        print(f"only the first {model.encoder.config.n_position} tokens were read")
