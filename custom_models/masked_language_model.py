"""Masked-language-model pretraining: hide some of a text's tokens, and let the encoder say what stood there.

* BERT's way (arXiv 1810.04805, section 3.1): of 15% of the tokens, 8 in 10 become [MASK], 1 in 10 another token, 1 in
  10 stays; texts are pairs of sentences, and the first token's vector says whether the second one really followed.
* RoBERTa's way (arXiv 1907.11692, section 4): the same masks, but drawn anew each time a text is read (dynamic
  masking), and no sentence pairs.

The heads read the weights of Hugging Face's checkpoints; `projects/pretrain.py` trains.

Run it: python -m custom_models pretrain
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.encoder import ACTIVATIONS, Encoder
from custom_models.encoder_checkpoint import load_hf
from custom_models.weights import fill
from workflows.errors import UserError
from workflows.files import read_json

IGNORED = -100
"""The target where nothing is asked: `torch.nn.functional.cross_entropy` leaves it out."""

_HEADS = {
    "bert": {
        "cls.predictions.transform.dense": "transform",
        "cls.predictions.transform.LayerNorm": "norm",
        "cls.predictions": "",
        "cls.seq_relationship": "next_sentence",
    },
    "roberta": {"lm_head.dense": "transform", "lm_head.layer_norm": "norm", "lm_head": ""},
    "distilbert": {"vocab_transform": "transform", "vocab_layer_norm": "norm", "vocab_projector": ""},
}
"""For each family its names of the heads' parts -> ours."""


class MaskedLanguageModel(nn.Module):
    """An encoder with the head that names hidden tokens and, if wanted, the one that tells whether a sentence follows.

    The matrix that names tokens is the one that embeds them (weights tied), with a bias of its own.

    Args:
        encoder: What reads the text.
        next_sentence: Whether there is the second head; it needs an encoder with a pooler.

    Raises:
        UserError: If the second head is wanted from an encoder without a pooler.
    """

    def __init__(self, encoder: Encoder, next_sentence: bool = False) -> None:
        super().__init__()
        config = encoder.config
        if next_sentence and not config.pooler:
            raise UserError("Next-sentence prediction reads the pooled vector; this encoder has no pooler.")
        self.encoder = encoder
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.next_sentence = nn.Linear(config.width, 2) if next_sentence else None

    def name(self, states: Tensor) -> Tensor:
        """Scores of the whole vocabulary: states (.., width) -> logits (.., vocab_size)."""
        x = self.norm(ACTIVATIONS[self.encoder.config.activation](self.transform(states)))  # (.., width)
        return F.linear(x, self.encoder.tokens.weight, self.bias)  # (.., vocab_size)

    def forward(self, ids: Tensor, lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Logits at every position: (B, T) -> (B, T, vocab_size)."""
        return self.name(self.encoder(ids, lengths, segments).last)  # (B, T, vocab_size)

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        lengths: Tensor | None = None,
        segments: Tensor | None = None,
        follows: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over hidden tokens of -log p(token), and that over pairs of -log p(whether it follows).

        The vocabulary's scores are computed where a token is hidden and nowhere else.

        Args:
            ids: Token ids, some of them hidden, (B, T).
            targets: What stood there, and IGNORED where nothing is asked, (B, T).
            lengths: How many tokens of each text are real, (B,).
            segments: Segment of each token, (B, T).
            follows: Whether the second segment followed the first, (B,), booleans; for next-sentence prediction.

        Returns:
            The sum of both, and each, with the share of hidden tokens that were named right.
        """
        encoded = self.encoder(ids, lengths, segments)
        asked = targets != IGNORED  # (B, T)
        logits, wanted = self.name(encoded.last[asked]), targets[asked]  # (N, vocab_size), (N,)
        loss = F.cross_entropy(logits, wanted) if len(wanted) else logits.sum()
        told = {"masked_loss": loss.detach(), "masked_accuracy": (logits.argmax(-1) == wanted).float().mean()}
        if self.next_sentence is not None and follows is not None:
            pair_logits = self.next_sentence(encoded.pooled)  # (B, 2); BERT's class 0 is "it follows"
            pair_loss = F.cross_entropy(pair_logits, (~follows).long())
            told |= {
                "next_sentence_loss": pair_loss.detach(),
                "next_sentence_accuracy": (pair_logits.argmax(-1) == (~follows).long()).float().mean(),
            }
            loss = loss + pair_loss
        return loss, told


def mask_tokens(
    ids: Tensor, maskable: Tensor, mask_id: int, vocab_size: int, generator: torch.Generator | None, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Hide tokens, BERT's way: of those chosen 80% become the mask, 10% a random token, 10% stay.

    Args:
        ids: Token ids, (B, T).
        maskable: Which of them may be chosen, (B, T): no padding, no special tokens.
        mask_id: The mask's id.
        vocab_size: Random tokens are below it.
        generator: Decides; torch's own if None.
        share: How many are chosen.

    Returns:
        The ids with some hidden, and the targets, both (B, T).
    """
    fate = torch.rand(ids.shape, generator=generator, device=ids.device)  # (B, T)
    chosen = maskable & (fate < share)  # (B, T)
    targets = ids.masked_fill(~chosen, IGNORED)  # (B, T)
    hidden = ids.masked_fill(chosen & (fate < 0.8 * share), mask_id)  # (B, T)
    other = torch.randint(vocab_size, ids.shape, generator=generator, device=ids.device)  # (B, T)
    return torch.where(chosen & (fate >= 0.9 * share), other, hidden), targets


def load_masked_language_model(directory: Path) -> MaskedLanguageModel:
    """Read a Hugging Face checkpoint of BERT, RoBERTa or DistilBERT with its heads.

    Raises:
        UserError: If it is none, or has no head for masks.
    """
    encoder, heads = load_hf(directory)
    names = _HEADS[read_json(directory / "config.json")["model_type"]]
    found = {}
    for name, tensor in heads.items():
        stem, _, kind = name.replace("gamma", "weight").replace("beta", "bias").rpartition(".")
        if stem in names:
            found[f"{names[stem]}.{kind}".lstrip(".")] = tensor
    if "transform.weight" not in found:
        raise UserError(f"{directory} has no head that fills masks; it is an encoder alone.")
    next_sentence = "next_sentence.weight" in found and encoder.config.pooler
    model = MaskedLanguageModel(encoder, next_sentence)
    ours = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    fill(
        model,
        {**ours, **{name: tensor for name, tensor in found.items() if name in model.state_dict()}},
        str(directory),
    )
    return model
