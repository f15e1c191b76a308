"""The feed-forward layer, and what newer Transformers put in its place and in that of layer norm.

Llama, DeepSeek, T5 v1.1 and the modern GPT of this folder are made of the newer ones. Beside them stands the question
that every model asks of what it is given: whether its tokens are tokens at all.

Run it: python -m custom_models.layers
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workflows.errors import UserError, run_file

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


def main(width: int = 512) -> None:
    """Show what the two norms do to the same vectors, and that a gate costs no parameters.

    Args:
        width: Of the vectors.
    """
    torch.manual_seed(0)
    norms = {"layer norm": nn.LayerNorm(width), "RMSNorm": RMSNorm(width)}
    print(f"{'vectors':<28}" + "".join(f"{f'{name}: mean':>18}{'root of squares':>18}" for name in norms))
    for title, x in {"mean 0, size 1": torch.randn(width), "ten times as large": 10 * torch.randn(width),
                     "moved by 3": torch.randn(width) + 3}.items():  # fmt: skip
        normed = [norm(x) for norm in norms.values()]  # (width,) each
        print(f"{title:<28}" + "".join(f"{y.mean():>18.2f}{y.square().mean().sqrt():>18.2f}" for y in normed))
    plain = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False))
    layers = {"two matrices, 4 widths": plain, "gated, 8/3 widths": GatedFeedForward(width, 8 * width // 3)}
    for title, layer in layers.items():
        print(f"{title:<28}{sum(p.numel() for p in layer.parameters()):>18,} parameters")


if __name__ == "__main__":
    run_file(main)
