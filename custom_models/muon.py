"""Muon: a step for matrices in which every direction counts the same.

A gradient, and its running mean, are matrices in which few directions are large and many small. Muon (Jordan et al.
2024, https://kellerjordan.github.io/posts/muon/) replaces the mean's singular values by ones before it steps:

    M_t = mu M_(t-1) + (1 - mu) G_t,   M = U S V^T,   W_t = W_(t-1) - rate * U V^T

so that rare directions are learned as fast as common ones. U V^T, the orthogonal matrix nearest to M, would take an
SVD; five rounds of a polynomial in M M^T (Newton-Schulz) come near enough, with matrix products alone.

That is for matrices that turn one vector into another. Embeddings, the head, norms and biases are for AdamW;
`split_parameters` tells the two apart, and `Together` makes one optimizer of both.

Run it: python -m custom_models.muon
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workflows.errors import UserError, report_all, run_file

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of p(s) = a s + b s^3 + c s^5. It grows tiny singular values as fast as it can (a is p's slope at 0), at the
price that they end anywhere from 0.7 to 1.2 and not at 1, which harms nothing."""


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Set the singular values of matrices to about 1: U S V^T -> U S' V^T, S' from 0.7 to 1.2.

    X_0 = M / |M|_F, then X_(k+1) = a X_k + (b X_k X_k^T + c (X_k X_k^T)^2) X_k, which does p(s) to each singular
    value s and leaves U and V alone.

    Args:
        matrices: (B, rows, columns).
        steps: Rounds; singular values of X_0 below about 1 / a^steps stay small.

    Returns:
        (B, rows, columns).
    """
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # (B, n, m) with n <= m: X X^T is then the smaller of the two squares
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # (B, n, m); no singular value exceeds the norm, now 1
    if x.dtype == torch.float32 and multiplies_in_bfloat16(x.device):
        x = x.bfloat16()  # (B, n, m); what is a step's direction to be need not be known to more than two digits
    for _ in range(steps):
        gram = x @ x.mT  # (B, n, n)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # (B, n, n); b X X^T + c (X X^T)^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # (B, n, m)
    return (x.mT if tall else x).to(matrices.dtype)  # (B, rows, columns)


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16, which are then twice as fast as of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Muon(Optimizer):
    """SGD with momentum whose step is made orthogonal.

    Args:
        parameters: Matrices, or groups of them.
        lr: How far each singular direction of a square matrix moves in a step.
        momentum: mu.
        weight_decay: W shrinks by rate * weight_decay in each step.
        steps: Rounds of Newton-Schulz.

    Raises:
        UserError: If a parameter is no matrix, or a setting makes no sense.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        report_all(
            ([] if lr >= 0 else [f"Muon's lr must be at least 0, not {lr}."])
            + ([] if 0 <= momentum < 1 else [f"Muon's momentum must be from 0 to below 1, not {momentum}."])
            + ([] if weight_decay >= 0 else [f"Muon's weight_decay must be at least 0, not {weight_decay}."])
        )
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise UserError(
                        f"Muon steps matrices; a parameter of shape {tuple(parameter.shape)} is none. Give it to AdamW "
                        "(split_parameters does so)."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moved:
                self._step_group(moved, group)
        return loss

    def _step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        mu, rate = group["momentum"], group["lr"]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]  # all have one
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)  # (rows, columns)
        means = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(means, grads, 1 - mu)
        # Nesterov's way: the mean as it will be if the next gradient is like this one.
        looked_ahead = torch._foreach_lerp(grads, means, mu)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        # Matrices of one shape, or of its transpose, are made orthogonal together: one large product for many small.
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, parameter in enumerate(parameters):
            alike[(min(parameter.shape), max(parameter.shape))].append(i)
        for members in alike.values():
            wide = [g.mT if g.shape[0] > g.shape[1] else g for g in (looked_ahead[i] for i in members)]
            made = orthogonalise(torch.stack(wide), group["steps"])  # (members, n, m), n <= m
            for i, update in zip(members, made, strict=True):
                rows, columns = parameters[i].shape
                # A step as large for each output's vector: rows of a tall orthogonal matrix are short.
                scale = max(1.0, rows / columns) ** 0.5
                parameters[i].add_(update.mT if rows > columns else update, alpha=-rate * scale)


class Together(Optimizer):
    """Several optimizers as one, for a trainer that knows of one: their groups side by side, each stepped its own way.

    Args:
        optimizers: What it is made of, over different parameters.
    """

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Groups and state are the parts' own, so that a schedule that sets a rate here sets it there."""
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.state = defaultdict(dict)
        for optimizer in self.optimizers:
            self.state.update(optimizer.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The parts' states, in their order."""
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the parts' states."""
        for optimizer, state in zip(self.optimizers, state_dict["parts"], strict=True):
            optimizer.load_state_dict(state)
        self._share()


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """A model's parameters by what should step them.

    Returns:
        Matrices of layers (for Muon); tables: embeddings, positions and the head (for AdamW, with weight decay);
        vectors: norms and biases (for AdamW, without).
    """
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif name.startswith("blocks."):
            matrices.append(parameter)
        else:
            tables.append(parameter)
    return matrices, tables, vectors


def main(rows: int = 128, columns: int = 512, steps: int = 5) -> None:
    """Show what the rounds do to singular values that lie far apart."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)  # (rows, n), (n,), (n, columns)
    values = torch.logspace(0, -3, len(vt))  # (n,)
    matrix = u * values @ vt  # (rows, columns)
    print(f"singular values of a {rows} x {columns} matrix: the largest, the middle one, the smallest")
    for step in range(steps + 1):
        found = torch.linalg.svdvals(orthogonalise(matrix[None], step)[0])  # (n,)
        print(f"after {step} rounds  {found[0]:.3f}  {found[len(found) // 2]:.3f}  {found[-1]:.4f}")


if __name__ == "__main__":
    run_file(main)
