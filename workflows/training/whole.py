"""A sharded model put together for a while: sampling takes hundreds of small steps, and processes that are not in step.

Gathering the weights for each of these steps would cost more than the steps, so each process gets all of the weights
once, in a second model that shares nothing with the first, and lets them go when it is done. TRL does the same for
answers that it samples from sharded models.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from workflows.training.model import GPT

_SKELETON = "_skeleton"


def bare(model: Any) -> GPT:
    """The model itself, out of Fabric's wrapper."""
    inner: GPT = getattr(model, "module", model)
    return inner


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether each process holds a part of the model only (FSDP2)."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def keep_skeleton(model: torch.nn.Module) -> None:
    """Keep what a model is without its weights, to be filled by `whole`; called before it is sharded."""
    meta = {id(p): torch.nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    # in the dict alone: it is no part of the model
    model.__dict__[_SKELETON] = copy.deepcopy(model, meta)


@contextmanager
@torch.no_grad()
def whole(model: Any) -> Iterator[GPT]:
    """The bare model with all its weights in this process, not to be trained; if it is sharded, a copy.

    All processes must enter it together; inside, each is on its own.

    Args:
        model: A model, bare or as Fabric set it up.
    """
    sharded = bare(model)
    if not is_sharded(sharded):
        yield sharded
        return
    copied: GPT = copy.deepcopy(sharded.__dict__[_SKELETON])
    gathered: dict[torch.Tensor, torch.Tensor] = {}
    for parameter in sharded.parameters():
        gathered[parameter] = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
    weights = {name: gathered[parameter] for name, parameter in sharded.named_parameters(remove_duplicate=False)}
    copied.load_state_dict(weights, assign=True)
    if sharded.has_tied_head:
        copied.lm_head.linear.weight = copied.transformer.wte.weight
    copied.cos, copied.sin = sharded.cos, sharded.sin  # the sharded ones are on the device
    yield copied.train(sharded.training)
