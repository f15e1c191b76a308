"""Decoding's steps: a few rows at a time, so that they cost what reading the weights costs.

On a CPU oneDNN reads weights that it has laid out itself half as fast again as torch's, and an adapter's A matrix,
stacked below the weights, is read along with them. The copies are made for one call of `rollouts.generate`, since
training changes the adapters, and let go after it.

On a GPU a step is a thousand small kernels, which take less time than Python takes to launch them; so they are recorded
once, and played again.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import litgpt.lora
import torch

WORTH_STEPS = 12
"""Decoding steps from which on laying out pays, or recording."""
SEEN_MULTIPLE = 128
"""A recorded step looks at so many positions of the cache, or a multiple of it."""
Decode = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Tokens (B,), their positions (B,) and how much of the cache is looked at -> logits (B, padded_vocab_size)."""


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


class Steps:
    """Decoding steps of one batch, whose rows get fewer and whose positions grow.

    A recording has one shape: so many rows, so much of the cache. What it has more than a step needs is computed for
    nothing (rows that are done write where nobody looks); it is made anew where the cache's part is used up or half of
    its rows are done.
    """

    def __init__(self, decode: Decode, device: torch.device, length: int) -> None:
        """Nothing is run yet.

        Args:
            decode: One step.
            device: Where the model is; steps are recorded on a GPU only.
            length: The cache's.
        """
        self._decode, self._device, self._length = decode, device, length
        self._replay: Callable[[], None] | None = None
        self._rows = self._seen = 0
        self._warm = False

    def __call__(self, tokens: torch.Tensor, position: torch.Tensor, left: int) -> torch.Tensor:
        """Run a step.

        Args:
            tokens: One for each row, (B,).
            position: Theirs, on the CPU, (B,).
            left: How many steps may come, this one included.

        Returns:
            Logits, (B, padded_vocab_size), which the next step may overwrite.
        """
        rows, needed = len(tokens), int(position.max()) + 1
        tokens, position = tokens.to(self._device), position.to(self._device)
        usable = self._replay is not None and rows <= self._rows and needed <= self._seen
        worth = self._warm and left >= WORTH_STEPS and can_record(self._device)
        if worth and not (usable and 2 * rows > self._rows):
            self._record(tokens, position, min(self._length, math.ceil(needed / SEEN_MULTIPLE) * SEEN_MULTIPLE))
        elif not usable:
            self._warm = True  # what libraries set up at first use is not recorded
            return self._decode(tokens, position, needed)
        assert self._replay is not None
        self._tokens[:rows], self._position[:rows] = tokens, position
        self._replay()
        return self._logits[:rows]

    def _record(self, tokens: torch.Tensor, position: torch.Tensor, seen: int) -> None:
        self._replay = None  # lets the memory of the last one go
        self._rows, self._seen = len(tokens), seen
        self._tokens, self._position = tokens.clone(), position.clone()

        def run() -> None:
            self._logits = self._decode(self._tokens, self._position, seen)

        self._replay = record(run)


def can_record(device: torch.device) -> bool:
    """Whether `record` works there."""
    return device.type == "cuda"


def record(run: Callable[[], None]) -> Callable[[], None]:
    """Record what a function does on the GPU; what is returned does it again, with the same tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may ask the GPU something
        run()
    return graph.replay
