"""Checkpoints of sharded runs: every process writes its own shards, and any number of processes reads them.

torch's distributed checkpoint (`torch.distributed.checkpoint`) in its safetensors form: the header of each file says
where in the whole tensors its pieces belong, so a process reads just what it needs, and nothing is ever unpickled.
Beside the shards stands `run.json`: the run's counters, what its result depends on, and the size of each file.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from workflows.errors import UserError
from workflows.files import read_json, write_json

RUN = "run.json"
WEIGHT, MOMENTS = "model.", "optimizer."
"""What the names of trained parameters, and of what AdamW keeps of them, begin with."""


def tensors_of(weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The trained weights and AdamW's state of them by name, this process's parts of them (DTensors) if sharded.

    A weight that AdamW has not stepped yet gets the state that a first step would give it.

    Args:
        weights: What the optimizer steps, by name.
        optimizer: AdamW, out of Fabric's wrapper.
    """
    found = {}
    for name, weight in weights.items():
        if not (state := optimizer.state[weight]):
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        found[WEIGHT + name] = weight.detach()
        found |= {f"{MOMENTS}{name}.{key}": value.detach() for key, value in state.items()}
    return found


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], rest: dict[str, Any], is_first: bool) -> None:
    """Write a checkpoint; called in every process.

    Args:
        directory: The folder to make.
        tensors: From `tensors_of`.
        rest: The run's counters and identity, plain values.
        is_first: Whether this is the process that writes what there is once.

    Raises:
        UserError: If the shards of other machines are not in the folder.
        OSError: If a file could not be written.
    """
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True))
    except CheckpointException as e:  # a BaseException that holds each process's own
        raise next(iter(e.failures.values()))[0] from None
    if is_first:
        if missing := _incomplete(_metadata(directory), {name: tensor.shape for name, tensor in tensors.items()}):
            raise UserError(
                f"The shards of other machines are not in {directory.parent} ({missing}). --out_dir must be a folder "
                "that all machines share."
            )
        files = {file.name: file.stat().st_size for file in sorted(directory.glob("*.safetensors"))}
        write_json(directory / RUN, {**rest, "files": files})


def read_run(directory: Path) -> dict[str, Any]:
    """The counters and the identity of a checkpoint whose files are all there.

    Raises:
        UserError: If a file is missing or is not of the size that it was written with.
    """
    run = read_json(directory / RUN)
    files = run.get("files")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{RUN} names no files")
    for name, size in files.items():
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"{name} is missing")
        if file.stat().st_size != size:
            raise UserError(f"{name} has {file.stat().st_size:,} bytes instead of {size:,}")
    return run


def read_shards(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors with what a checkpoint holds under their names, whatever number of processes wrote it.

    Args:
        directory: The checkpoint.
        tensors: Whole ones, or this process's parts of them (then all processes call this).

    Raises:
        ValueError: If the checkpoint holds others.
    """
    if missing := _incomplete(_metadata(directory), {name: tensor.shape for name, tensor in tensors.items()}):
        raise ValueError(missing)
    _load(directory, tensors, alone=not torch.distributed.is_initialized())


def read_file(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Fill a sharded run's tensors with the checkpoint that unsharded processes wrote into one file.

    Fabric's own reader takes the optimizer's numbers for places among all parameters; ours has the trained ones only.

    Args:
        file: The checkpoint.
        tensors: From `tensors_of`, in that order; each process keeps its parts.

    Returns:
        The run's counters.

    Raises:
        ValueError: If the file holds other tensors.
    """
    saved = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    names = [name.removeprefix(WEIGHT) for name in tensors if name.startswith(WEIGHT)]
    found = {WEIGHT + name: tensor for name, tensor in saved["model"].items()}
    for number, state in saved["optimizer"]["state"].items():
        found |= {f"{MOMENTS}{names[number]}.{key}": value for key, value in state.items()}
    copy_weights(found, tensors)
    counters: dict[str, Any] = saved
    return counters


@torch.no_grad()
def copy_weights(found: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill tensors with whole ones of the same names; each process keeps its parts of a DTensor.

    Raises:
        ValueError: If one is missing or of another shape.
    """
    for name, tensor in tensors.items():
        value = found.get(name)
        if not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
            raise ValueError(f"no {name} of {list(tensor.shape)}")
        if isinstance(tensor, DTensor):
            value = distribute_tensor(
                value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
            ).to_local()
            tensor = tensor.to_local()
        tensor.copy_(value)


def read_whole(directory: Path, prefix: str = WEIGHT) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names begin so, each put together from its shards; on the CPU.

    Raises:
        ValueError: If a piece is missing.
    """
    wanted = {name: found for name, found in _metadata(directory).items() if name.startswith(prefix)}
    tensors = {name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in wanted.items()}
    if missing := _incomplete(wanted, {name: tensor.shape for name, tensor in tensors.items()}):
        raise ValueError(missing)
    _load(directory, tensors, alone=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _metadata(directory: Path) -> dict[str, TensorStorageMetadata]:
    """What the headers of a checkpoint's files say they hold."""
    try:
        found: dict[str, Any] = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    except safetensors.SafetensorError as e:
        raise ValueError(str(e)) from None
    return found


def _load(directory: Path, tensors: dict[str, torch.Tensor], alone: bool) -> None:
    try:
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=alone)
    except CheckpointException as e:
        raise ValueError(str(next(iter(e.failures.values()))[0])) from None


def _incomplete(found: dict[str, TensorStorageMetadata], wanted: dict[str, torch.Size]) -> str:
    """What is missing of the wanted tensors, or nothing; the reader itself would leave a gap as it is."""
    for name, shape in wanted.items():
        if name not in found:
            return f"no {name}"
        pieces = sum(math.prod(chunk.sizes) for chunk in found[name].chunks)
        if found[name].size != shape or pieces != math.prod(shape):
            return f"{name} is {pieces:,} numbers of {list(found[name].size)} instead of {list(shape)}"
    return ""
