"""Writing a checkpoint's weights one tensor at a time: a model larger than the memory can be converted and merged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from workflows.litgpt_api import incremental_save


class WeightWriter:
    """Takes tensors by name; each is in the file before the next one is asked for.

    All of them pass through one buffer: made and freed one by one, tensors would leave holes in the heap.
    """

    def __init__(self, saver: incremental_save, largest: int) -> None:
        self._saver = saver
        self._buffer = bytearray(largest)
        self.written: dict[str, Any] = {}

    def blank(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor to fill and store; good until the next one is asked for."""
        size = torch.Size(shape)
        return torch.frombuffer(self._buffer, dtype=dtype, count=size.numel()).view(size)

    def store(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor that `blank` gave."""
        self.written[name] = self._saver.store_early(tensor)

    def copy(self, name: str, tensor: torch.Tensor) -> None:
        """Write a copy: tensors mapped from a file share one storage, which would be written whole for each of them."""
        self.store(name, self.blank(tensor.shape, tensor.dtype).copy_(tensor))

    def tie(self, name: str, to: str) -> None:
        """Let a name stand for a tensor that another one has, too."""
        self.written[name] = self.written[to]


@contextmanager
def weight_writer(file: Path, largest: int) -> Iterator[WeightWriter]:
    """Write a checkpoint's weights.

    Args:
        file: Where, as LitGPT's `lit_model.pth`.
        largest: The bytes of the largest tensor.
    """
    with incremental_save(file) as saver, torch.no_grad():
        writer = WeightWriter(saver, largest)
        yield writer
        saver.save(writer.written)
