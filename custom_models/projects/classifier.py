"""An encoder that names the class of a text: the mean of its tokens' vectors, and one matrix over that."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from custom_models.encoder import Encoder, mean_over_tokens
from custom_models.encoder_checkpoint import encoder_directory, fill, read_own, save_encoder, tokenizer_of
from custom_models.projects.texts import Batch, Labelled, encode, loader
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
        return self.head(self.dropout(mean_over_tokens(states, lengths)))  # (B, n_label)

    def save(self, tokenizer: Tokenizer, folder: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        save_encoder(self, self.encoder.config, tokenizer, folder, labels=self.labels)

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
    """How a classifier is trained: AdamW, a rate that warms up and then falls to nothing, some tokens hidden.

    Args:
        model: The classifier.
        learning_rate: At its highest.
        total_steps: Optimizer steps in all.
        warmup: The share of steps in which the rate rises.
        weight_decay: Of matrices.
        hidden_tokens: Share of tokens that are hidden from the model in training (word dropout).
        hidden_id: What they become.
    """

    def __init__(
        self,
        model: TextClassifier,
        learning_rate: float,
        total_steps: int,
        warmup: float = 0.1,
        weight_decay: float = 0.01,
        hidden_tokens: float = 0.0,
        hidden_id: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate, self.total_steps, self.weight_decay = learning_rate, total_steps, weight_decay
        self.warmup_steps = max(1, round(warmup * total_steps))
        self.hidden_tokens, self.hidden_id = hidden_tokens, hidden_id

    def hide(self, ids: Tensor) -> Tensor:
        """Hide some tokens: (B, T) -> (B, T)."""
        if not self.hidden_tokens:
            return ids
        return ids.masked_fill(torch.rand(ids.shape, device=ids.device) < self.hidden_tokens, self.hidden_id)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """-log p(class), the mean over the batch."""
        loss = F.cross_entropy(self.model(self.hide(batch.ids), batch.lengths), batch.labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same, and the share of right classes."""
        logits = self.model(batch.ids, batch.lengths)  # (B, n_label)
        right = (logits.argmax(dim=-1) == batch.labels).float().mean()
        self.log("val_loss", F.cross_entropy(logits, batch.labels), batch_size=len(batch.labels))
        self.log("val_accuracy", right, batch_size=len(batch.labels), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW; biases and norms do not decay."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _share_of_rate(self, step: int) -> float:
        left = (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)
        return min((step + 1) / self.warmup_steps, max(0.0, left))


def predict(checkpoint_dir: Path, text: str) -> None:
    """Name the class of a text.

    Args:
        checkpoint_dir: A classifier's folder, such as out/sentiment/scratch/final.
        text: What to classify.

    Raises:
        UserError: If the folder holds no classifier, or the text is empty.
    """
    model, tokenizer = load_classifier(encoder_directory(checkpoint_dir))
    (found,), cut = model.predict([text], tokenizer)
    for label, probability in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{label:<12}{probability:7.1%}")
    if cut:
        print(f"only the first {model.encoder.config.n_position} tokens were read")
