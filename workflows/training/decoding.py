"""Decoding's matrix products: a few rows at a time, so that they cost what reading the weights costs.

On a CPU oneDNN reads weights that it has laid out itself half as fast again as torch's, and an adapter's A matrix,
stacked below the weights, is read along with them. The copies are made for one call of `rollouts.generate`, since
training changes the adapters, and let go after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import litgpt.lora
import torch

WORTH_STEPS = 12
"""Decoding steps from which on laying out pays."""


class PackedLinear:
    """A linear layer with its adapter, laid out for few rows."""

    def __init__(self, layer: Any) -> None:
        """Copy the layer's weights, and its adapter if that is on."""
        weight, bias = layer.linear.weight.detach(), layer.linear.bias
        self.out, self.up = len(weight), None
        if hasattr(layer, "lora_A") and not layer.merged:
            lora_B = layer.block_diagonal_B() if isinstance(layer, litgpt.lora.LoRAQKVLinear) else layer.lora_B
            self.up, self.scaling = lora_B.detach().to(weight.dtype).T.contiguous(), layer.scaling  # (r, out)
            weight = torch.cat([weight, layer.lora_A.detach().to(weight.dtype)])  # (out + r, in)
            bias = None if bias is None else torch.cat([bias, bias.new_zeros(len(self.up))])
        self.bias = bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, in_features). Returns (B, T, out_features)."""
        y = torch.ops.mkldnn._linear_pointwise(x.flatten(0, -2), self.weight, self.bias, "none", [], "")  # (N, out + r)
        if self.up is not None:
            y = torch.addmm(y[:, : self.out], y[:, self.out :].mul_(self.scaling), self.up)  # (N, out)
        return y.view(*x.shape[:-1], -1)


@contextmanager
def laid_out(model: torch.nn.Module, steps: int) -> Iterator[None]:
    """The model with its linear layers laid out for decoding, where that is possible and pays.

    Args:
        model: Bare, on a CPU for this to do anything.
        steps: How many times about as many rows as there are answers will go through it.
    """
    layers: list[Any] = []
    if steps >= WORTH_STEPS and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        layers = [m for m in model.modules() if isinstance(m, litgpt.lora.LoRALinear) and _is_plain(m)]
    try:
        for layer in layers:
            layer.packed = PackedLinear(layer)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def _is_plain(layer: Any) -> bool:
    """Whether the weights are torch's own, not 4-bit ones, on a CPU that multiplies in their precision."""
    if type(layer.linear) is not torch.nn.Linear or layer.linear.weight.device.type != "cpu":
        return False
    dtype = layer.linear.weight.dtype
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
