"""What a token is chosen with: no float64 on a device that has none."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from workflows.training.sampling import choose


class Watch(TorchDispatchMode):
    """Collects the device and the type of each tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = found if isinstance(found, tuple | list) else (found,)
        self.made |= {(each.device.type, each.dtype) for each in tensors if isinstance(each, torch.Tensor)}
        return found


@pytest.mark.parametrize("settings", [(0.0, None, 1.0), (1.0, None, 1.0), (0.7, 5, 0.9)], ids=str)
@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_mps_gets_no_float64(device, settings):
    """Tensors without numbers that say they are there: no Mac is needed."""
    with FakeTensorMode() as mode:
        logits = FakeTensor(mode, torch.empty(3, 20, device="meta"), torch.device(device))
        draws = torch.rand(3, dtype=torch.float64)
        with Watch() as watch:
            tokens, logprobs = choose(logits, draws, *settings)
    assert tokens.shape == logprobs.shape == (3,)
    assert tokens.device.type == logprobs.device.type == "cpu"
    assert ("mps", torch.float64) not in watch.made
    assert (("cpu", torch.float64) in watch.made) == (settings[0] > 0)
