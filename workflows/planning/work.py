"""How much there is to compute and to write."""

from dataclasses import dataclass, field

from workflows.planning.architecture import Architecture
from workflows.planning.rows import RowShape


@dataclass
class Work:
    """Floating-point operations by part; a multiplication with its addition counts as two."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """All of them."""
        return sum(self.parts.values())


@dataclass
class Disk:
    """Bytes that are written, by what they are."""

    parts: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """All of them, at the moment when all are there."""
        return sum(self.parts.values())


def forward_flops(model: Architecture, tokens: float, predicted: float) -> float:
    """A forward pass: two operations for each weight and token, of the head's matrix for each predicted token.

    Attention's products are left out: in rows of short samples they are a few percent.
    """
    return 2.0 * (model.linears * tokens + model.embedding * predicted)


def training_flops(model: Architecture, row: RowShape) -> float:
    """One optimizer step over all devices, forward and backward.

    A frozen matrix is multiplied twice (forward, and back to its input), a trained one three times. The frozen head's
    gradient is taken with its logits (`training/fused.py`); a trained head's chunks are computed twice.
    """
    tokens, learned = row.step_tokens, row.step_tokens * row.learned / row.tokens
    adapters = 6.0 * model.adapters * tokens
    if model.lora.r > 0:
        return 4.0 * (model.linears * tokens + model.embedding * learned) + adapters
    return 6.0 * model.linears * tokens + 8.0 * model.embedding * learned


def decoding_flops(model: Architecture, answers: int, prompt: float, new_tokens: int) -> float:
    """Answers of full length: their prompts once, then token by token with the head each time."""
    return forward_flops(model, answers * (prompt + new_tokens), answers * new_tokens)
