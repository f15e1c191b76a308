"""The processes of a training run: which device, how many, joined how (Lightning Fabric's own strategies), and what
happens when one of them dies."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh

from workflows.errors import UserError, first_line
from workflows.lifetime import end_with_parent
from workflows.training.model import Precision
from workflows.training.whole import keep_skeleton

Accelerator = Literal["auto", "cpu", "cuda", "mps"]
StrategyName = Literal["auto", "ddp", "fsdp"]


def choose_accelerator(accelerator: Accelerator = "auto") -> Literal["cpu", "cuda", "mps"]:
    """CUDA where there is a GPU, else the CPU; Apple's MPS only when asked for, since it is untried here."""
    if accelerator != "auto":
        return accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"


def unusable_device(device: str | None) -> list[str]:
    """Return what is wrong with `--device`, if anything."""
    try:
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        return [f"--device {device} cannot be used here: {first_line(e)}"]
    return []


def default_precision(on_gpu: bool) -> Precision:
    """bfloat16 where the device multiplies in it, else float32 (emulation is slow, on CPUs and older GPUs alike)."""
    if on_gpu:
        return "bf16-true" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-true" if fast else "32-true"


def device_problems(
    accelerator: Accelerator, devices: int | str, num_nodes: int, strategy: StrategyName, global_batch_size: int
) -> list[str]:
    """Everything that is wrong with a run's devices, as messages.

    Args:
        accelerator: What to run on.
        devices: Devices of each machine, or "auto".
        num_nodes: Machines.
        strategy: How processes are joined.
        global_batch_size: Samples of a step; every process needs one.
    """
    chosen = choose_accelerator(accelerator)
    if chosen == "cuda" and not torch.cuda.is_available():
        return ["--accelerator cuda: torch sees no CUDA GPU here."]
    if chosen == "mps" and not torch.backends.mps.is_available():
        return ["--accelerator mps: this machine, or this build of torch, has no MPS."]
    try:
        count = _count(chosen, devices)
    except ValueError:
        return [f"--devices must be a number or auto, not {devices!r}."]
    problems = []
    present = torch.cuda.device_count() if chosen == "cuda" else 1 if chosen == "mps" else None
    if count < 1:
        problems.append(f"--devices must be at least 1, not {count}.")
    if present is not None and count > present:
        problems.append(
            f"--devices {count}: this machine has {present} {'GPUs' if present > 1 else 'GPU'} that torch sees. Give "
            f"--devices {present} (make: DEVICES={present}), or for more machines --num_nodes."
        )
    if num_nodes < 1:
        problems.append(f"--num_nodes must be at least 1, not {num_nodes}.")
    if chosen == "mps" and (strategy != "auto" or num_nodes > 1):
        problems.append("--strategy, --num_nodes: MPS is one device; leave them out.")
    if count * num_nodes > global_batch_size:
        problems.append(
            f"--train.global_batch_size {global_batch_size} is fewer samples than the {count * num_nodes} processes."
        )
    return problems


def make_fabric(
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: StrategyName = "auto",
    accelerator: Accelerator = "auto",
) -> L.Fabric:
    """Fabric for this machine: one process per device, data-parallel (`ddp`) or sharded (`fsdp`).

    Weights are put into their precision by `load_model`, so Fabric itself casts nothing.

    Args:
        devices: Devices per machine, or "auto".
        num_nodes: Machines.
        strategy: "auto" (DDP where there are several processes), "ddp" or "fsdp" (FSDP2, one shard per block).
        accelerator: What to run on.

    Raises:
        UserError: If torchrun or SLURM has started another number of processes.
    """
    chosen = choose_accelerator(accelerator)
    count = _count(chosen, devices)
    joined: Strategy | str = "auto"
    if strategy == "fsdp":
        joined = ModelParallelStrategy(
            parallelize_fn=_shard,
            # by default Fabric would take a node's devices for tensor parallelism
            data_parallel_size=count * num_nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend="nccl" if chosen == "cuda" else "gloo",
        )
    elif strategy == "ddp" or count * num_nodes > 1:
        joined = "ddp"
    try:
        # Fabric checks this only where it starts processes itself; others would wait for more, or not know of theirs
        for launcher in (TorchElasticEnvironment, SLURMEnvironment):
            if launcher.detect():
                launcher().validate_settings(num_devices=count, num_nodes=num_nodes)
    except (ValueError, RuntimeError) as e:
        raise UserError(
            f"--devices {count} and --num_nodes {num_nodes} do not fit what started this run ({first_line(e)}). For "
            f"them torchrun takes --nproc_per_node {count} --nnodes {num_nodes}, SLURM --ntasks-per-node={count} "
            f"--nodes={num_nodes}; or change the settings (make: DEVICES, NODES)."
        ) from None
    return L.Fabric(accelerator=chosen, devices=count, num_nodes=num_nodes, strategy=joined)


def _count(accelerator: str, devices: int | str) -> int:
    if devices == "auto":
        return torch.cuda.device_count() if accelerator == "cuda" else 1
    return int(devices)


def _shard(model: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    """FSDP2: every block is a unit of its own, gathered when it runs and freed after.

    A 16-bit gradient is summed over processes in float32. A float32 head beside 16-bit weights (a reward's, a value's)
    is a unit, too: a unit's trained parameters are of one type.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    keep_skeleton(model)
    heads = [head for name in ("reward_head", "value_head") if (head := getattr(model, name, None)) is not None]
    for unit in [*model.transformer.h, *heads, model]:  # type: ignore[union-attr, misc]
        fully_shard(unit, mesh=mesh["data_parallel"], mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return model


@contextmanager
def launched(fabric: L.Fabric) -> Iterator[None]:
    """Start the run's processes; if one of them dies, the others end too, with one clear message.

    A dead process shows in the next collective of the others: gloo's fails at once. Where a backend would wait instead
    (NCCL), Lightning's observer ends the first process within seconds of another's death, and the kernel ends the
    others when the first one is gone.

    Raises:
        UserError: If another process of the run died.
    """
    # The observer's only words, at INFO: which process died.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    fabric.launch()
    if fabric.local_rank > 0 and not _started_by_torchrun():
        end_with_parent(signal.SIGKILL)()
    try:
        yield
    except RuntimeError as e:  # torch.distributed has a class for NCCL's failures only; gloo raises a bare one
        if fabric.world_size == 1 or not _is_lost_connection(e):
            raise
        raise UserError(
            f"Another process of this run (of {fabric.world_size}) died or could not be reached any more "
            f"({str(e).splitlines()[0][:160]}). Run the same command again to resume from the last checkpoint."
        ) from None


def _started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _is_lost_connection(error: RuntimeError) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("gloo", "connection closed by peer", "connection reset by peer", "nccl", "broken pipe")
    return any(word in str(error).lower() for word in words)
