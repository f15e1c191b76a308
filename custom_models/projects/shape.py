"""The shape of an encoder that a project trains from nothing."""

from dataclasses import dataclass
from typing import Any

from custom_models.encoder import EncoderConfig


@dataclass
class Shape:
    """A small encoder."""

    vocab_size: int = 12000
    """Tokens of its vocabulary."""
    width: int = 128
    """Of the tokens' vectors."""
    n_layer: int = 1
    """Layers."""
    n_head: int = 4
    """Attention heads."""
    inner_width: int = 256
    """Of the feed-forward layers."""
    n_position: int = 128
    """The longest text, in tokens."""
    dropout: float = 0.4
    """Share of activations set to zero in training."""

    def config(self, **more: Any) -> EncoderConfig:
        """The whole configuration, with what the project decides."""
        return EncoderConfig(**vars(self), **more)
