"""Mixed-precision training (Micikevicius et al. 2018, arXiv 1710.03740): float32 master weights of trained 16-bit
parameters, and loss scaling for float16.

A 16-bit parameter cannot take most of AdamW's updates: bfloat16 has 8 significant bits, so an update below 1/512 of a
weight rounds to nothing, and a second moment that decays by 0.1% a step never decays. The optimizer therefore steps
float32 copies, with float32 moments and gradients; after each step the model gets them rounded to its own type. The
model that is validated, sampled from and written at the end is that 16-bit one.

Rounded to nearest, a weight of a 16-bit checkpoint would rest until its copy has moved by half of its last bit (12 to
24 steps of 1e-5 for a weight of 0.1 in bfloat16). `dithered` rounds up or down in proportion to where the copy lies
between its two neighbours, as stochastic rounding does (Gupta et al. 2015, arXiv 1502.02551), so that on average the
weights move as far as their copies, from the first step on.
"""

import math
from functools import partial
from typing import Any

import lightning as L
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from workflows.training.whole import is_sharded

_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}
_CHUNK = 1 << 18
_GOLDEN = 0x9E3779B1 - (1 << 32)
"""2^32 by the golden ratio, as int32 holds it: multiples of it modulo 2^32 are spread evenly over all strides."""
LOSS_SCALE = 64.0
"""Initial and largest factor of the loss of one unit (a token, a pair) in a float16 backward pass."""
SMALLEST_LOSS_SCALE = 2.0**-16
"""A gradient that overflows even with this factor is none."""
_BACKOFF = 4.0
_GROWTH = 2.0
_GROWTH_INTERVAL = 500


class MasterWeights:
    """The tensors that the optimizer steps: trained parameters in float32, copies of those that have fewer bits.

    Each row's gradient is moved from a 16-bit parameter to its copy as soon as autograd (or FSDP2, after its reduction)
    has it, so that rows are summed in float32.

    Attributes:
        weights: Name to tensor, in the model's order; a DTensor where the model is sharded. A parameter of 32 bits is
            itself here, and nothing is different from training without this class.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Copy what has to be copied.

        Args:
            model: The bare model on its device, sharded already if it is to be.
        """
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.weights = {name: _master_of(parameter) for name, parameter in trained.items()}
        self._copied = [(p, self.weights[name]) for name, p in trained.items() if self.weights[name] is not p]
        self._offsets = [_offset_of(parameter) for parameter, _ in self._copied]
        self._sharded, self._model = is_sharded(model), model
        for parameter, master in self._copied:
            parameter.register_post_accumulate_grad_hook(partial(_move_gradient, master))

    def is_synchronized(self, last: bool) -> bool:
        """Return whether the processes of a run sum the gradient of a row in its backward pass.

        FSDP2 sums and shards each row's gradient where there are copies: unsharded, a step's gradient would take 4
        bytes for each parameter on each device. DDP sums in the parameters' own type, so `reduce` does it instead.

        Args:
            last: Whether the row is the step's last one.
        """
        return self._sharded if self._copied else last

    @torch.no_grad()
    def reduce(self, world_size: int) -> None:
        """Average the gradients of a step over data-parallel processes, where their backward passes did not."""
        if self._copied and not self._sharded and world_size > 1:
            for weight in self.weights.values():
                if weight.grad is not None:
                    torch.distributed.all_reduce(weight.grad)
                    weight.grad /= world_size

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients."""
        for weight in self.weights.values():
            if weight.grad is not None:
                weight.grad *= factor

    @torch.no_grad()
    def publish(self) -> None:
        """Round the copies into the model; called after each optimizer step, and when a checkpoint was loaded."""
        if self._copied and isinstance(self._model, FSDPModule):
            self._model.reshard()  # after a forward pass alone, the outermost unit stays gathered, with the old weights
        for (parameter, master), offset in zip(self._copied, self._offsets, strict=True):
            _dither(_local(master), _local(parameter), offset)


def dithered(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of a tensor in a training precision; in 16 bits exactly what `MasterWeights.publish` gives to the model.

    Whether a number is rounded up or down depends on itself and on its place in the tensor alone (a Weyl sequence by
    the golden ratio), so each device and each shard rounds alike, and a number that 16 bits can hold stays as it is.
    """
    if dtype not in _MANTISSA:
        return weight.to(dtype, copy=True)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _dither(weight.float(), out, 0)
    return out


def _dither(weight: torch.Tensor, out: torch.Tensor, offset: int) -> None:
    """Round a float32 tensor into one of 16 bits; `offset` is the place of its first element in the whole tensor."""
    dropped = 23 - _MANTISSA[out.dtype]  # bits of float32's mantissa
    flat, target = weight.detach().reshape(-1), out.detach().view(-1)
    places = torch.arange(min(len(flat), _CHUNK), dtype=torch.int32, device=flat.device).mul_(_GOLDEN)  # modulo 2^32
    for begin in range(0, len(flat), _CHUNK):
        part = flat[begin : begin + _CHUNK]
        noise = places[: len(part)] + _wrapped((offset + begin) * _GOLDEN)
        noise.bitwise_right_shift_(32 - dropped).bitwise_and_((1 << dropped) - 1)  # its highest bits
        bits = noise.add_(part.view(torch.int32)).bitwise_and_(-(1 << dropped))
        target[begin : begin + len(part)] = bits.view(torch.float32)


def _wrapped(number: int) -> int:
    """A whole number modulo 2^32, as int32 holds it."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _offset_of(parameter: torch.Tensor) -> int:
    """The place of a shard's first element in the whole tensor, which is sharded along its first dimension."""
    if not isinstance(parameter, DTensor) or not _local(parameter).numel():
        return 0
    rows = torch.arange(len(parameter), device=parameter.device)
    mine = distribute_tensor(rows, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    return int(mine[0]) * (parameter.numel() // len(parameter))


def _master_of(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    if parameter.dtype.itemsize >= torch.float32.itemsize:
        return parameter
    return torch.nn.Parameter(parameter.detach().float())


@torch.no_grad()
def _move_gradient(master: torch.Tensor, parameter: torch.Tensor) -> None:
    gradient = parameter.grad
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient
    parameter.grad = None


class LossScaler:
    """Dynamic loss scaling: without it, gradients of float16 activations below 6e-8 are zero.

    The factor is that of one unit's loss, whatever the number of units in a step, which is divided out in float32. A
    step whose gradient overflows is not skipped but computed again with a smaller factor, so no sample is lost.

    Attributes:
        scale: The factor; a power of two. Checkpoints keep it.
    """

    def __init__(self, fabric: L.Fabric, model: torch.nn.Module, scale: float) -> None:
        """Nothing is scaled where no weight is float16.

        Args:
            fabric: A launched Fabric.
            model: The model.
            scale: The factor to begin with.
        """
        self.is_active = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        self.scale, self._fabric = scale, fabric

    def backed_off(self, norm: float, step: int) -> bool:
        """Lower the factor if a step's gradient has overflowed; whether the step is to be computed again.

        Args:
            norm: The gradient's norm, the same in all processes.
            step: The step's number, from 0.
        """
        if not self.is_active or math.isfinite(norm) or self.scale <= SMALLEST_LOSS_SCALE:
            return False
        self.scale /= _BACKOFF
        self._fabric.print(
            f"the gradient of step {step} overflows float16; it is computed again with the loss scale {self.scale:g}"
        )
        return True

    def grow(self, steps: int) -> None:
        """Double the factor at regular steps, in case it was lowered for a short time."""
        if self.is_active and steps % _GROWTH_INTERVAL == 0:
            self.scale = min(LOSS_SCALE, self.scale * _GROWTH)

    def metrics(self) -> dict[str, Any]:
        """Return what a step's row of the log shows."""
        return {"loss_scale": self.scale} if self.is_active else {}
