"""`make plan STEP=…`: what a step would take, before anything loads: memory by part, operations, disk, and what fits.

    python -m workflows plan lora --config workflows/recipes/llama-3.1-8b-instruct/lora.yaml \
        --checkpoint_dir llama-3.1-8b-instruct --accelerator cuda --memory 24GB

The step's own options mean what they mean to the step; beside a checkpoint directory, `--checkpoint_dir` takes a name
that the registry or LitGPT knows. The steps of `planning.PLANNED` are planned before they run, too, and refused where
the machine has too little (`require_room`).
"""

import copy
import importlib
import inspect
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from workflows.__main__ import STEPS, parse_all
from workflows.errors import UserError, did_you_mean
from workflows.files import write_json
from workflows.measure import duration, gigabytes, tree_bytes
from workflows.planning import PLANNED
from workflows.planning.steps import Plan, plan_step
from workflows.training.step import is_finished

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_LEAST_ROW = 256
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Options:
    """What is asked of a plan; see `setup` for the fields, the memory in bytes."""

    memory: int | None
    tflops: float | None
    json_file: Path | None
    read_data: bool


def setup(
    memory: str | None = None,
    tflops: float | None = None,
    json_file: Path | None = None,
    read_data: bool = True,
) -> Options:
    """Say what a step would take; its name and its own options stand beside these.

    Args:
        memory: What there is on each device, e.g. 24GB; this machine's by default.
        tflops: Trillions of operations a second that the device really does, for a time.
        json_file: Write the plan there, too.
        read_data: Look at the data, where it is here, for the length of rows; false takes them as full as can be.

    Raises:
        UserError: If one of them cannot be.
    """
    if tflops is not None and not 0 < tflops < math.inf:
        raise UserError(f"--tflops must be positive, not {tflops}.")
    return Options(None if memory is None else parse_size(memory), tflops, json_file, read_data)


def run(arguments: list[str]) -> None:
    """The command line: the step's name, its options and those of `setup`, in any order.

    Raises:
        UserError: If there is no such step or model, or an option cannot be.
    """
    own, step, rest = split_arguments(arguments)
    options = setup(**parse_all(setup, own, "plan"))
    if step is None:
        raise UserError(f"Name the step to plan, e.g. `python -m workflows plan lora …`: {', '.join(PLANNED)}.")
    module, function, _ = STEPS[step]
    settings = vars(parse_all(getattr(importlib.import_module(module), function), rest, step))
    settings.pop("ignore_plan")
    libraries = tree_bytes(psutil.Process())
    plan = plan_step(step, settings, libraries, options.read_data)
    limit = memory_here(plan) if options.memory is None else options.memory
    print(report(plan, options.tflops))
    if limit is not None:
        print(verdict(plan, limit, settings, libraries, options.read_data))
    if options.json_file is not None:
        write_json(options.json_file, as_json(plan))


def split_arguments(arguments: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Own options, the step's name and the step's options.

    Raises:
        UserError: If what stands for the step is none.
    """
    names = inspect.signature(setup).parameters
    own: list[str] = []
    others: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, given, _ = argument.partition("=")
        if name.removeprefix("--") not in names or not name.startswith("--"):
            others.append(argument)
            continue
        own.append(argument)
        if not given and waiting:
            own.append(waiting.pop(0))
    if not others or others[0] in ("-h", "--help"):
        return own + others, None, []
    if others[0] not in PLANNED:
        known = f"{did_you_mean(others[0], PLANNED)} The step comes first, one of {', '.join(PLANNED)}."
        raise UserError(f"There is no plan for {others[0]!r}.{known}")
    return own, others[0], others[1:]


def parse_size(text: str) -> int:
    """Bytes of a size such as 24GB (10^9) or 24GiB (2^30).

    Raises:
        UserError: If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", text.strip(), flags=re.IGNORECASE)
    unit = found[2].upper() if found else "?"
    unit = unit + "B" if unit and not unit.endswith("B") else unit
    if found is None or _UNITS.get(unit) is None or not float(found[1]) > 0:
        raise UserError(f"--memory must be a size such as 24GB or 16GiB, not {text!r}.")
    return int(float(found[1]) * _UNITS[unit])


def memory_here(plan: Plan) -> int | None:
    """Bytes that are free on this machine for such a step; None for a GPU that is not here."""
    if plan.device.on_gpu:
        # CUDA's context is this process's, and taken already
        return torch.cuda.mem_get_info()[0] + plan.beside if torch.cuda.is_available() else None
    free = psutil.virtual_memory().available
    try:  # a container may have less than the machine
        most = int((_CGROUP / "memory.max").read_text())
        return min(free, most - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no such limit
        return free


def report(plan: Plan, tflops: float | None = None) -> str:
    """The plan as text."""
    model = plan.model
    lines = [f"{plan.step} of {model.name}: {model.weights:,} parameters"]
    if plan.row is not None:
        lines[0] += f", {model.trained:,} trained"
        lines.append(f"rows: {plan.row.source}, {plan.row.rows} a step and device")
    if not model.sure:
        lines.append("whether its head is tied to the embedding is known once it is downloaded; planned as if not")
    where = "of each GPU" if plan.device.on_gpu else "of each process" if plan.local > 1 else ""
    lines.append(f"\npeak memory {where}, in {plan.peak.name}".replace("  ", " ").replace(" ,", ","))
    shown = {name: size for name, size in plan.peak.parts.items() if size}
    lines += [f"  {name:<36}{gigabytes(size):>12}" for name, size in shown.items()]
    lines.append(f"  {'together':<36}{gigabytes(plan.peak.bytes):>12}")
    others = [moment for moment in plan.moments if moment is not plan.peak]
    lines += [f"  in {moment.name + ':':<33}{gigabytes(moment.bytes):>12}" for moment in others]
    if plan.mapped:
        lines.append(f"  {'weights mapped from the file, beside':<36}{gigabytes(plan.mapped):>12}")
    if plan.beside:
        lines.append(f"  {'context of CUDA, beside':<36}{gigabytes(plan.beside):>12}")
    if plan.work.parts:
        lines.append(f"\noperations: {plan.work.flops:.3g}")
        lines[-1] += f" ({', '.join(f'{name} {flops:.3g}' for name, flops in plan.work.parts.items())})"
    if plan.work.parts and tflops:
        seconds = plan.work.flops / (tflops * 1e12 * plan.device.processes)
        lines.append(f"time at {tflops:g} TFLOP/s on each of {plan.device.processes}: {duration(seconds)}")
    lines.append(f"disk: {gigabytes(plan.disk.bytes)}")
    lines[-1] += f" ({', '.join(f'{name} {gigabytes(size)}' for name, size in plan.disk.parts.items())})"
    return "\n".join(lines)


def verdict(plan: Plan, limit: int, settings: dict[str, Any], libraries: int, read_data: bool) -> str:
    """Whether a plan fits into so many bytes, and what to change if not."""
    if plan.needed <= limit:
        return f"\nfits in {gigabytes(limit)}"
    told = f"\ndoes not fit in {gigabytes(limit)}: it needs {gigabytes(plan.needed)}"
    found = changes_that_fit(plan, limit, settings, libraries, read_data)
    if found is None:
        return told + "; no change of its settings alone makes it fit: take a smaller model or more memory."
    changes, better = found
    options = " ".join(f"--{name} {value}" for name, value in changes.items())
    return f"{told}\nwith {options} it fits: {gigabytes(better.needed)}"


def changes_that_fit(
    plan: Plan, limit: int, settings: dict[str, Any], libraries: int, read_data: bool
) -> tuple[dict[str, Any], Plan] | None:
    """Changed settings by name with which a step fits, the dear ones last, and the plan with them; None if there are
    none."""

    def planned(changes: dict[str, Any]) -> Plan:
        changed = copy.deepcopy(settings)
        for name, value in changes.items():
            if (field := name.removeprefix("train.")) != name:
                setattr(changed["train"], field, value)
            else:
                changed[name] = value
        return plan_step(plan.step, changed, libraries, read_data)

    changes: dict[str, Any] = {}
    least = plan.needed
    for candidate in _candidates(plan, settings):
        better = planned({**changes, **candidate})
        if better.needed >= least:
            continue
        changes, least = {**changes, **candidate}, better.needed
        if least <= limit:
            for needless in set(changes) - set(candidate):
                fewer = {name: value for name, value in changes.items() if name != needless}
                if (without := planned(fewer)).needed <= limit:
                    changes, better = fewer, without
            return changes, better
    return None


def _candidates(plan: Plan, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings that lower the memory, one value after the other: those that cost nothing but time come first."""
    for precision in ("precision", "verify_precision"):
        if precision in settings and plan.device.dtype == torch.float32:
            yield {precision: "bf16-true"}
    for name, least in (("sampling_batch", 1), ("batch_size", 1), ("row_tokens", _LEAST_ROW)):
        value = settings.get(name)
        while value is not None and value > least:
            value = max(least, value // 2)
            yield {name: value}
    train = settings.get("train")
    if train is None:
        return
    tokens = train.row_tokens
    while tokens > _LEAST_ROW:
        tokens = max(_LEAST_ROW, tokens // 2)
        yield {"train.row_tokens": tokens}
    adapted, sampled = settings["lora_r"] > 0, plan.step in ("grpo", "ppo")
    if adapted and settings["quantize"] is None and not plan.device.sharded:
        yield {"quantize": "bnb.nf4"}
    length = train.max_seq_length
    while length > _LEAST_ROW and length // 2 > (settings["max_new_tokens"] if sampled else 0):
        length //= 2
        yield {"train.max_seq_length": length}
    devices = plan.device.processes
    while (
        settings["quantize"] is None and not sampled and plan.device.on_gpu and 2 * devices <= train.global_batch_size
    ):
        devices *= 2
        yield {"strategy": "fsdp", "devices": devices}


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    return {
        "step": plan.step,
        "model": plan.model.name,
        "parameters": plan.model.weights,
        "trained_parameters": plan.model.trained if plan.row is not None else 0,
        "peak_bytes": plan.peak.bytes,
        "mapped_bytes": plan.mapped,
        "beside_bytes": plan.beside,
        "moments": {moment.name: moment.parts for moment in plan.moments},
        "row_tokens": plan.row.tokens if plan.row is not None else None,
        "flops": plan.work.flops,
        "disk_bytes": plan.disk.parts,
    }


def require_room(step: str, settings: dict[str, Any]) -> None:
    """Refuse a step for which memory or disk are too little, before it loads anything.

    What cannot be planned is left to the step, which says better what is wrong with it.

    Raises:
        UserError: If they are too little; with what would fit, and how to run it all the same.
    """
    libraries = tree_bytes(psutil.Process())
    try:
        plan = plan_step(step, settings, libraries, read_data=False)
        if not (problem := _too_little(plan, settings)):
            return
        plan = plan_step(step, settings, libraries)  # the rows as they really are
        problem = _too_little(plan, settings)
    except (UserError, OSError, ArithmeticError, ValueError, TypeError):
        return
    if not problem or _is_done(settings):
        return
    limit = memory_here(plan)
    cure = verdict(plan, limit, settings, libraries, True).strip() if limit is not None and plan.needed > limit else ""
    raise UserError("\n".join(filter(None, [problem, cure, "To run it all the same: --ignore_plan true."])))


def _too_little(plan: Plan, settings: dict[str, Any]) -> str | None:
    """What there is too little of, in words."""
    limit = memory_here(plan)
    if limit is not None and plan.needed > limit:
        return (
            f"The memory is too little: {plan.step} needs about {gigabytes(plan.needed)} at its peak (in "
            f"{plan.peak.name}), and {gigabytes(limit)} are free."
        )
    folder = settings.get("out_dir") or Path("out")
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if plan.disk.bytes > (room := shutil.disk_usage(folder).free):
        return (
            f"The disk is too full: {plan.step} writes about {gigabytes(plan.disk.bytes)}, and {gigabytes(room)} are "
            f"free where {settings.get('out_dir') or 'out'} is. Free some space, or give another --out_dir."
        )
    return None


def _is_done(settings: dict[str, Any]) -> bool:
    """Whether a training step has nothing to do: its result is there."""
    from workflows.training.step import RunArgs, decided

    if "train" not in settings:
        return False
    names = vars(RunArgs())
    own = {name: value for name, value in settings.items() if name not in names}
    run = RunArgs(**{name: value for name, value in settings.items() if name in names})
    return settings["resume"] is not False and is_finished(Path(settings["out_dir"]) / "final", decided(own, run))
