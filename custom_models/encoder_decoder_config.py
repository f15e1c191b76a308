"""The shape of an encoder-decoder: the Transformer, T5 and T5 v1.1 as configurations of one class.

The Transformer is that of "Attention Is All You Need" (Vaswani et al. 2017, arXiv 1706.03762, section 3), T5 that of
Raffel et al. 2019 (arXiv 1910.10683, section 2.1):

    ==============  ================  ===========================  =================
                    the Transformer   T5                           T5 v1.1
    ==============  ================  ===========================  =================
    positions       sine waves        a bias on the scores for     the same
                                      each bucket of distances;
                                      a stack's layers share it
    norm            layer, last       RMS, first                   the same
    scores          over sqrt(d)      as they are: the queries'    the same
                                      initialisation is smaller
    feed-forward    ReLU              ReLU                         gated GELU
    biases          everywhere        none                         none
    embeddings      times sqrt(width) as they are                  as they are
    head            the embeddings    the embeddings, what they    a matrix of its
                                      read over sqrt(width)        own
    ==============  ================  ===========================  =================
"""

from dataclasses import dataclass
from typing import Any, Literal

from custom_models.attention import Backend
from workflows.errors import report_all

_CHOICES = {"positions": ("sinusoidal", "relative"), "norm": ("layer", "rms"), "feed_forward": ("relu", "gated_gelu")}
_SIZES = ("vocab_size", "width", "n_layer", "n_decoder_layer", "n_head", "inner_width", "n_bucket", "max_length")


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """The shape of an encoder-decoder; the defaults are the base model of "Attention Is All You Need" (table 3).

    Attributes:
        vocab_size: Token ids are below it; both stacks read the same tokens.
        width: Of the tokens' vectors.
        n_layer: Layers of the encoder.
        n_decoder_layer: Layers of the decoder.
        n_head: Attention heads.
        head_size: Of each head; width / n_head if None.
        inner_width: Of the feed-forward layers, between their matrices.
        positions: "sinusoidal", or "relative": T5's bias.
        n_bucket: Buckets of T5's bias.
        max_distance: The distance from which on all share T5's last bucket.
        max_length: How far the sine waves reach, in tokens; relative positions have no end.
        norm: "layer" or "rms".
        norm_first: Whether a layer normalises what it reads (T5) and not, as in the paper, what it writes.
        norm_eps: Added to variances.
        feed_forward: "relu" or "gated_gelu".
        bias: Whether matrices have biases.
        scale_scores: Whether scores are divided by the square root of head_size.
        scale_embeddings: Whether token embeddings are multiplied by sqrt(width) (the paper, section 3.4: yes).
        tied: Whether the embeddings are the head, too.
        scale_head: Whether what the head reads is divided by sqrt(width) (T5, where the head is tied).
        pad_id: The id of padding.
        start_id: What every written text begins after.
        end_id: What ends it.
        dropout: Share of activations set to zero in training.
        attention_dropout: Share of attention weights set to zero in training.
        backend: Who computes attention, see `attention.attend`.
    """

    vocab_size: int
    width: int = 512
    n_layer: int = 6
    n_decoder_layer: int = 6
    n_head: int = 8
    head_size: int | None = None
    inner_width: int = 2048
    positions: Literal["sinusoidal", "relative"] = "sinusoidal"
    n_bucket: int = 32
    max_distance: int = 128
    max_length: int = 512
    norm: Literal["layer", "rms"] = "layer"
    norm_first: bool = False
    norm_eps: float = 1e-5
    feed_forward: Literal["relu", "gated_gelu"] = "relu"
    bias: bool = True
    scale_scores: bool = True
    scale_embeddings: bool = True
    tied: bool = True
    scale_head: bool = False
    pad_id: int = 0
    start_id: int = 0
    end_id: int = 1
    dropout: float = 0.1
    attention_dropout: float = 0.0
    backend: Backend = "sdpa"

    def __post_init__(self) -> None:
        problems = [f"The encoder-decoder's {name} must be at least 1, not {getattr(self, name)}."
                    for name in _SIZES if getattr(self, name) < 1]  # fmt: skip
        problems += [
            f"The encoder-decoder's {name} must be one of {', '.join(known)}, not {getattr(self, name)!r}."
            for name, known in _CHOICES.items()
            if getattr(self, name) not in known
        ]
        problems += [f"The encoder-decoder's {name} {getattr(self, name)} is no token of {self.vocab_size}."
                     for name in ("pad_id", "start_id", "end_id")
                     if not 0 <= getattr(self, name) < max(1, self.vocab_size)]  # fmt: skip
        problems += [f"The encoder-decoder's {name} must be from 0 to below 1, not {getattr(self, name)}."
                     for name in ("dropout", "attention_dropout") if not 0 <= getattr(self, name) < 1]  # fmt: skip
        if not self.norm_eps > 0:
            problems.append(f"The encoder-decoder's norm_eps must be above 0, not {self.norm_eps}.")
        if self.positions == "relative" and self.n_bucket < 4:
            problems.append(f"Relative positions need at least 4 buckets (n_bucket), not {self.n_bucket}.")
        elif self.positions == "relative" and self.max_distance <= self.n_bucket // 2:
            problems.append(
                f"The encoder-decoder's max_distance must be above {self.n_bucket // 2}, half of its buckets, not "
                f"{self.max_distance}: each lesser distance has a bucket of its own."
            )
        report_all(problems)


def transformer(vocab_size: int = 37000, **changes: Any) -> EncoderDecoderConfig:
    """The base model of "Attention Is All You Need"; `changes` are fields of `EncoderDecoderConfig`."""
    return EncoderDecoderConfig(vocab_size, **changes)


T5: dict[str, Any] = {"positions": "relative", "norm": "rms", "norm_first": True, "norm_eps": 1e-6, "bias": False,
                      "scale_scores": False, "scale_embeddings": False, "scale_head": True,
                      "attention_dropout": 0.1}  # fmt: skip
"""In what T5 small differs from the defaults."""


def t5(vocab_size: int = 32128, **changes: Any) -> EncoderDecoderConfig:
    """T5 small; `changes` are fields of `EncoderDecoderConfig`."""
    return EncoderDecoderConfig(vocab_size, **{**T5, **changes})


def t5_v1_1(vocab_size: int = 32128, **changes: Any) -> EncoderDecoderConfig:
    """T5 v1.1 small: GEGLU, and a head of its own; `changes` are fields of `EncoderDecoderConfig`."""
    fields: dict[str, Any] = {"n_layer": 8, "n_decoder_layer": 8, "n_head": 6, "head_size": 64, "inner_width": 1024,
                              "feed_forward": "gated_gelu", "tied": False, "scale_head": False}  # fmt: skip
    return t5(vocab_size, **{**fields, **changes})
