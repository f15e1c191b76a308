"""The feed-forward layer, and what newer Transformers put in its place and in that of layer norm.

Llama, DeepSeek, T5 v1.1 and the modern GPT of this folder are made of the newer ones. Beside them stands the question
that every model asks of what it is given: whether its tokens are tokens at all.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workflows.errors import UserError

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: layer norm without its mean and bias.

    Zhang and Sennrich 2019, arXiv 1910.07467, equation 4. The mean is taken in float32, as Llama's own code does.

    Args:
        width: Of what is normalised.
        eps: Added to the mean of the squares.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(.., width) -> (.., width)."""
        wide = x.float()  # (.., width)
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)  # (.., width)
        return self.weight * normed.to(x.dtype)  # (.., width)


class FeedForward(nn.Module):
    """FFN(x) = act(x W_1 + b_1) W_2 + b_2, for each token by itself (arXiv 1706.03762, equation 2).

    Args:
        width: Of the tokens' vectors.
        inner_width: Between the matrices.
        activation: Between them, too.
        bias: Whether they have one.
    """

    def __init__(
        self, width: int, inner_width: int, activation: Callable[[Tensor], Tensor] = F.relu, bias: bool = True
    ) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner_width, bias=bias)
        self.down = nn.Linear(inner_width, width, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(.., width) -> (.., width)."""
        return self.down(self.activation(self.up(x)))  # (.., width), by way of (.., inner_width)


class GatedFeedForward(nn.Module):
    """FFN(x) = (act(x W_gate) * x W_up) W_down: one product opens and closes the other.

    Shazeer 2020, arXiv 2002.05202, equation 6. With SiLU it is SwiGLU (Llama, DeepSeek); with GELU, GEGLU (T5 v1.1).

    Args:
        width: Of the tokens' vectors.
        inner_width: Between the matrices; usually 2/3 of what two matrices would have, for as many parameters.
        activation: Of the gate.
        bias: Whether the matrices have one.

    Raises:
        UserError: If there is no such activation.
    """

    def __init__(self, width: int, inner_width: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        if activation not in GATES:
            raise UserError(f"There is no gate {activation!r}; there are {', '.join(GATES)}.")
        self.gate = nn.Linear(width, inner_width, bias=bias)
        self.up = nn.Linear(width, inner_width, bias=bias)
        self.down = nn.Linear(inner_width, width, bias=bias)
        self.activation = GATES[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(.., width) -> (.., width)."""
        return self.down(self.activation(self.gate(x)) * self.up(x))  # (.., width), by way of (.., inner_width)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Make sure that every id, (B, T), is one of `vocab_size` tokens.

    Raises:
        UserError: If one is not.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise UserError(
            f"Token ids must be from 0 to {vocab_size - 1}, and these go from {int(ids.min())} to {int(ids.max())}. "
            "Does the tokenizer belong to this model?"
        )
