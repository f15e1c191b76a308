"""Gradient accumulation of one optimizer step, which weighs every token the same however samples fall into rows and
processes."""

import math
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from workflows.errors import UserError
from workflows.training.mixed_precision import LossScaler, MasterWeights

if TYPE_CHECKING:  # the loop imports this module
    from workflows.training.loop import Objective


def mean_over_processes(fabric: L.Fabric, metrics: dict[str, float]) -> dict[str, float]:
    """The mean of each metric over the processes that have it; those that no process has are left out.

    Args:
        fabric: A launched Fabric.
        metrics: The same names in all processes; NaN is a metric that this process does not have in this step.
    """
    if fabric.world_size > 1 and metrics:
        values = torch.tensor(list(metrics.values()), device=fabric.device)  # (metrics,)
        known = ~values.isnan()
        sums: Any = fabric.all_reduce(
            {"total": values.where(known, 0.0), "processes": known.float()}, reduce_op="sum"
        )  # (metrics,) each
        metrics = dict(zip(metrics, (sums["total"] / sums["processes"]).tolist(), strict=True))
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def accumulate(
    fabric: L.Fabric,
    model: Any,
    objective: "Objective",
    batches: list[Any],
    masters: MasterWeights,
    scaler: LossScaler,
) -> dict[str, float]:
    """Forward and backward of one optimizer step; returns the step's loss, logged sums and real tokens.

    The units of all rows and processes are counted first, so that each weighs the same. A process with fewer rows than
    another runs its last one again with weight zero: sharded models gather their weights together, row by row.
    """
    device = fabric.device
    units = sum(map(objective.units, batches))
    real_tokens = sum(batch.real_tokens for batch in batches)
    rounds = len(batches)
    if fabric.world_size > 1:
        gathered: Any = fabric.all_gather(torch.tensor([units, real_tokens, rounds], device=device))  # (processes, 3)
        units, real_tokens = gathered[:, :2].sum(dim=0).tolist()
        rounds = int(gathered[:, 2].max())
    if not units and not objective.may_rest:
        raise UserError(
            "A training step has nothing to learn from: all its completions are empty or masked. Remove such rows "
            "from the data, or raise --train.max_seq_length if they were truncated."
        )

    units = max(1, units)
    # DDP and FSDP average over processes; times world_size, the sum over all of them is left.
    weight = fabric.world_size / units
    sums: dict[str, torch.Tensor] = {}
    for index in range(rounds):
        idle = index >= len(batches)
        batch = batches[min(index, len(batches) - 1)].to(device)
        with fabric.no_backward_sync(model, enabled=not masters.is_synchronized(index == rounds - 1)):
            loss, extras = objective.loss(model, batch)
            fabric.backward(loss * (0.0 if idle else scaler.scale if scaler.is_active else weight))
        if not idle:
            for name, value in {"loss": loss, **extras}.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float()
    masters.reduce(fabric.world_size)
    if scaler.is_active:
        masters.scale_gradients(weight / scaler.scale)
    if fabric.world_size > 1:
        reduced: Any = fabric.all_reduce(sums, reduce_op="sum")
        sums = reduced
    return {**{name: value.item() / units for name, value in sums.items()}, "real_tokens": real_tokens}
