"""A plan for each step: which moments it has, from the settings that it would be run with."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from data_prep.chat_data import replay_number
from data_prep.rows import iterate_jsonl
from workflows.errors import UserError, report_all
from workflows.planning import PLANNED, TRAINING
from workflows.planning.architecture import Architecture, find_architecture
from workflows.planning.memory import (
    Device,
    Moment,
    activations,
    forward_only,
    has_masters,
    kernels,
    sampling,
    trained_state,
    weights,
    whole_copy,
)
from workflows.planning.rows import RowShape, find_rows, scored_rows
from workflows.planning.work import Disk, Work, decoding_flops, forward_flops, training_flops
from workflows.shrink import choice_problems, evenly_spaced
from workflows.training.length import limited_to
from workflows.training.loop import TrainArgs
from workflows.training.model import DTYPES
from workflows.training.processes import choose_accelerator, default_precision
from workflows.training.resume import Checkpoints
from workflows.training.step import RunArgs

CUDA_CONTEXT = 800_000_000
"""What a process takes of a GPU before its first tensor: context, kernels, cuBLAS's workspace. Usual, not measured."""
_TOKENIZER_BYTES = 800
"""Of a token of the vocabulary: 39 MB for 49,152 tokens with their merges, as measured."""
_DATA_FACTOR = 8
"""Rows as Python objects with their tokens, beside the bytes of their file: 88 MB for 11 MB, as measured."""
_HEAP_BYTES = 1 << 25
"""glibc gives larger blocks back to the system at once; smaller ones that are free stay with the process."""
_COUNTS = ("devices", "num_nodes", "group_size", "max_new_tokens", "sampling_batch", "updates", "batch_size", "samples",
           "row_tokens", "limit")  # fmt: skip
"""Settings of which there is at least one, where a step has them and gives a number."""
_PASSING = ("gathered shards", "gradients on their way")
"""Parts of the trained state that are there in a row's forward and backward pass only."""
_QUESTION = 100
"""Tokens of a question with its options, where the task's data is not looked at."""
_CONVERTED = 2**24
"""Weights that an export converts at a time (`ollama/gguf_writer.py`)."""
_GGUF_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.0625, "q4_K_M": 0.61, "q4_K_S": 0.57}
"""Bytes of a weight on the disk."""


@dataclass(frozen=True)
class Plan:
    """What a step would take.

    Attributes:
        step: Its name.
        model: The model.
        device: One of its devices.
        moments: What is in memory when, on one device.
        mapped: Bytes of weights that stay in the file's pages: not in the peak, but better in memory.
        row: The largest row, for steps with rows.
        work: Floating-point operations by part, over all devices.
        disk: Bytes to be written.
        local: Processes that share this machine's memory.
    """

    step: str
    model: Architecture
    device: Device
    moments: list[Moment]
    mapped: int
    row: RowShape | None
    work: Work
    disk: Disk
    local: int = 1

    @property
    def peak(self) -> Moment:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def beside(self) -> int:
        """Bytes of the device that are in no measured peak, since no tensor has them: CUDA's context."""
        return CUDA_CONTEXT if self.device.on_gpu else 0

    @property
    def needed(self) -> int:
        """Bytes of memory for all processes that share it, mapped weights included once."""
        return self.peak.bytes * self.local + self.mapped + self.beside


def plan_step(step: str, settings: dict[str, Any], libraries: int = 0, read_data: bool = True) -> Plan:
    """Plan a step.

    Args:
        step: Its name.
        settings: Its arguments by name, as its `setup` takes them.
        libraries: Bytes that Python and the libraries hold; read by whoever plans, from a process that imported them.
        read_data: Look at the data for the length of rows, where it is here.

    Raises:
        UserError: If the step has no plan, a setting cannot be, or the model is not known.
    """
    report_all(_problems(settings))
    if step in TRAINING:
        return _training(step, settings, libraries, read_data)
    makers: dict[str, Callable[..., Plan]] = {
        "evaluate": _evaluate,
        "export": _export,
        "teach": _teach,
        "merge": _merge,
        "shrink": _shrink,
    }
    if step not in makers:
        raise UserError(f"There is no plan for {step!r}; there are some for {', '.join(PLANNED)}.")
    return makers[step](settings, libraries, read_data)


def _problems(settings: dict[str, Any]) -> list[str]:
    """What no plan can be made of, as messages; the step itself may find more."""
    counts = {name: settings[name] for name in _COUNTS if isinstance(settings.get(name), int)}
    found = [f"--{name} must be at least 1, not {count}." for name, count in counts.items() if count < 1]
    return found + (_run_args(settings).problems_anywhere(settings["train"]) if "train" in settings else [])


def _run_args(settings: dict[str, Any]) -> RunArgs:
    return RunArgs(**{name.name: settings[name.name] for name in fields(RunArgs) if name.name in settings})


def _host(model: Architecture, libraries: int, data: Path | None = None) -> dict[str, int]:
    """What a process holds besides the model."""
    parts = {"Python and libraries": libraries, "tokenizer": _TOKENIZER_BYTES * model.config.padded_vocab_size}
    file = data / "train.jsonl" if data else None
    if file and file.is_file():
        parts["data"] = _DATA_FACTOR * file.stat().st_size
    return parts


def _rotary(model: Architecture, length: int) -> int:
    """Cosines and sines in float32 for so many positions."""
    return 2 * 4 * length * model.config.rope_n_elem


def _training(step: str, settings: dict[str, Any], libraries: int, read_data: bool) -> Plan:
    run = _run_args(settings)
    train = _with_steps(settings)
    settings = {**settings, "train": train}
    model = find_architecture(settings["checkpoint_dir"], run.lora)
    on_gpu = run.on_gpu
    devices = _count(run.devices, on_gpu)
    device = Device(
        DTYPES[run.precision or _precision(on_gpu)],
        on_gpu,
        run.quantize,
        devices * run.num_nodes,
        run.strategy == "fsdp",
    )
    row = find_rows(step, settings, Path(settings["checkpoint_dir"]), device.processes, read_data)
    held, mapped = weights(model, device, written=run.lora_r == 0)
    held["rotary table"] = _rotary(model, train.max_seq_length)
    if not on_gpu:
        held = {**_host(model, libraries, Path(settings["data"])), **held}
    loading = {**held}
    if model.tied and not mapped and not on_gpu:
        loading["the head's copy, until it is tied"] = model.embedding * device.dtype.itemsize
    others, other_mapped, judged = _other_models(step, settings, device, row)
    held |= others
    stepping = trained_state(model, device)
    # with one row the gradients come while the activations go
    state = {name: size for name, size in stepping.items() if name != "gradients" or row.rows > 1}
    if "gradients" in state and not has_masters(model, device):
        state["gradients"] *= device.shards  # they are shared out after a step's last row only
    compiled = kernels(device, row.lengths)
    passing = activations(model, device, row)
    if step == "reward":
        passing["logits of a chunk"] = 0
    if step == "distill-lm" and settings["divergence"] != "none":
        passing["logits of a chunk"] = _compared_chunk(model, device)
    update = Moment("a row's forward and backward pass", {**held, **state, **compiled, **passing})
    stepping = {name: size for name, size in stepping.items() if name not in _PASSING}
    moments = [Moment("loading", loading), update, Moment("the optimizer's step", {**held, **stepping, **compiled})]
    work = Work({"training": training_flops(model, row) * train.max_steps})
    if step in ("grpo", "ppo"):
        group, new = settings.get("group_size", 1), settings["max_new_tokens"]
        answers = math.ceil(train.global_batch_size / device.processes) * group
        batch = min(settings["sampling_batch"], answers)
        answering = sampling(model, device, batch, row.prompt, new, math.ceil(batch / group))
        compiled = kernels(device, math.ceil(batch / group) + new)  # each step sees one token more
        resting = {name: size for name, size in state.items() if name not in _PASSING}
        moments.append(
            Moment("sampling answers", {**held, **resting, **whole_copy(model, device), **compiled, **answering})
        )
        updates = settings["updates"]
        rounds = max(1, train.max_steps // updates)  # of sampling
        total = train.global_batch_size * group * rounds
        work.parts["sampling"] = decoding_flops(model, total, row.prompt / group, new)
        scored = forward_flops(model, row.step_tokens, total * new / rounds) * rounds
        if step == "ppo" or updates > 1:
            work.parts["old policy"] = scored
        if settings["beta"]:
            work.parts["reference"] = scored
    if step == "dpo" and settings["loss"] not in ("simpo", "orpo"):
        share = row.learned / row.tokens
        work.parts["reference"] = forward_flops(model, row.step_tokens, row.step_tokens * share) * train.max_steps
    if judged:
        work.parts["teacher or judge"] = judged * train.max_steps
    moments.append(_writing(model, device, update))
    disk = _training_disk(step, model, row, train, device.dtype)
    local = 1 if on_gpu else devices
    return Plan(step, model, device, moments, mapped + other_mapped, row, work, disk, local)


def _with_steps(settings: dict[str, Any]) -> TrainArgs:
    """Training settings with the number of steps that their epochs come to.

    Raises:
        UserError: If the data is not here, and nothing else says how many steps there are.
    """
    train: TrainArgs = settings["train"]
    file = Path(settings["data"]) / "train.jsonl"
    if train.epochs is None:
        return train
    if file.is_file():
        kinds = settings.get("kinds")
        rows = [row for _, row in iterate_jsonl(file) if isinstance(row, dict)]
        count = sum(kinds is None or row.get("kind") in kinds for row in rows)
        count += replay_number(count, settings["replay_share"]) if settings.get("replay") else 0
        return limited_to(train, max(1, count), settings.get("updates", 1))
    if not train.max_steps:
        raise UserError(
            f"--train.epochs {train.epochs:g}: the number of rows is unknown, {file} does not exist. Run `make data`, "
            "or plan with --train.max_steps."
        )
    return train


def _writing(model: Architecture, device: Device, update: Moment) -> Moment:
    """`training/step.py`, `write_final`: beside what training has left stand the buffers that weights are merged in."""
    parts = {**update.parts}
    if device.on_gpu:  # these buffers are the host's
        return Moment("writing the result", parts)
    if parts["logits of a chunk"] > _HEAP_BYTES:
        del parts["logits of a chunk"]
    parts["merging" if model.lora.r > 0 else "copies of the weights"] = (
        model.embedding * model.stored.itemsize + model.largest_linear * 4
        if model.lora.r > 0
        else model.weights * device.dtype.itemsize
    )
    return Moment("writing the result", parts)


def _other_models(
    step: str, settings: dict[str, Any], device: Device, row: RowShape
) -> tuple[dict[str, int], int, float]:
    """Teacher, frozen reference and reward models: their weights, what of them is mapped, and their work in a step."""
    found: dict[str, int] = {}
    mapped, flops = 0, 0.0
    others: list[tuple[str, Any]] = []
    if step == "distill-lm" and settings["divergence"] != "none":
        others.append(("the teacher's weights", settings["teacher_dir"] or settings["checkpoint_dir"]))
    if settings.get("frozen_reference"):
        others.append(("the frozen reference's weights", settings["checkpoint_dir"]))
    for entry in settings.get("rewards") or []:
        if "/" in entry.reward:
            place = entry.reward if Path(entry.reward).is_dir() else settings["checkpoint_dir"]
            others.append((f"the weights of {entry.reward}", place))
    for name, place in others:
        other = find_architecture(place)
        parts, more = weights(other, Device(device.dtype, device.on_gpu))  # whole, however sharded the trained one is
        found[name] = sum(parts.values())
        mapped += more
        flops += forward_flops(other, row.step_tokens, 0)
    return found, mapped, flops


def _compared_chunk(model: Architecture, device: Device) -> int:
    """`training/student.py`: half a dozen tables of a chunk's size, in float32."""
    from workflows.training.student import CHUNK

    return 6 * CHUNK * model.config.padded_vocab_size * 4


def _training_disk(step: str, model: Architecture, row: RowShape, train: TrainArgs, dtype: torch.dtype) -> Disk:
    parts = {
        "final/lit_model.pth": model.weights * (model.stored if model.lora.r > 0 else dtype).itemsize,
        # the trained weights and two moments of each, in float32; a new one is written before the oldest goes, the best
        # one stays
        "checkpoints to resume from": (Checkpoints.KEEP + 1 + (train.keep == "best")) * 3 * model.trained * 4,
    }
    if model.lora.r > 0:
        parts["final/lit_model.pth.lora"] = 4 * model.adapters
    if step == "dpo":
        parts["reference.safetensors"] = 4 * row.step_tokens * train.max_steps
    return Disk(parts)


def _evaluate(settings: dict[str, Any], libraries: int, read_data: bool) -> Plan:
    model, device = _inference(settings)
    held, mapped = _loaded(model, device, libraries, model.config.block_size)
    tokens = learned = settings["row_tokens"]
    questions = settings["limit"] or 1000
    total, predicted, lengths = questions * _QUESTION, questions * _QUESTION / 2, questions * _QUESTION // tokens + 1
    if read_data and (rows := scored_rows(settings)):
        tokens = max(row.input_ids.size(1) for row in rows)
        learned = max(row.targets.numel() for row in rows)
        total, predicted = sum(row.input_ids.size(1) for row in rows), sum(row.targets.numel() for row in rows)
        lengths = len(rows)
    scoring = {**held, **kernels(device, lengths, forward=True), **forward_only(model, device, tokens, learned)}
    moments = [Moment("scoring a row", scoring)]
    work = Work({"scoring": forward_flops(model, total, predicted)})
    if written := settings["written"]:
        batch, new = min(settings["batch_size"], written), settings["max_new_tokens"]
        answering = sampling(model, device, batch, _QUESTION, new, batch)
        moments.append(Moment("writing answers", {**held, **kernels(device, new), **answering}))
        work.parts["answers"] = decoding_flops(model, written, _QUESTION, new)
    disk = Disk({"results": questions * 5_000})
    return Plan("evaluate", model, device, moments, mapped, None, work, disk)


def _inference(settings: dict[str, Any]) -> tuple[Architecture, Device]:
    model = find_architecture(settings["checkpoint_dir"])
    on_gpu = str(settings.get("device") or choose_accelerator(settings.get("accelerator", "auto"))).startswith("cuda")
    return model, Device(DTYPES[settings.get("precision") or _precision(on_gpu)], on_gpu)


def _loaded(model: Architecture, device: Device, libraries: int, length: int) -> tuple[dict[str, int], int]:
    held, mapped = weights(model, device)
    held["rotary table"] = _rotary(model, length)
    return (held if device.on_gpu else {**_host(model, libraries), **held}), mapped


def _teach(settings: dict[str, Any], libraries: int, read_data: bool) -> Plan:
    model, device = _inference(settings)
    held, mapped = _loaded(model, device, libraries, model.config.block_size)
    prompt, new, batch = 128, settings["max_new_tokens"], settings["batch_size"]
    answering = {**held, **kernels(device, new), **sampling(model, device, batch, prompt, new, batch)}
    answers = ((settings["max_rows"] or 10_000) + settings["max_val_rows"]) * settings["samples"]
    work = Work({"sampling": decoding_flops(model, answers, prompt, new)})
    disk = Disk({"answers": answers * new * 5})
    return Plan("teach", model, device, [Moment("answering", answering)], mapped, None, work, disk)


def _export(settings: dict[str, Any], libraries: int, read_data: bool) -> Plan:
    from workflows.ollama.verify import ANSWER_TOKENS

    model = find_architecture(settings["checkpoint_dir"])
    on_gpu = str(settings["device"] or choose_accelerator()).startswith("cuda")
    device = Device(DTYPES[settings["verify_precision"]], on_gpu)
    host = _host(model, libraries)
    kinds = settings["quantize"] if isinstance(settings["quantize"], list) else [settings["quantize"]]
    largest = max(model.embedding, model.largest_linear)
    block = min(largest, _CONVERTED)
    moments = []
    for kind in dict.fromkeys("f32" if kind.startswith("q4") else kind for kind in kinds):
        written = _GGUF_BYTES[kind]
        # a block in float32 where it is not stored so, its absolute values, then what it becomes, by groups and whole
        working = int(block * ((0 if model.stored == torch.float32 else 4) + max(4.0, 2 * written)))
        moments.append(
            Moment(f"writing {kind}", {**host, "the largest matrix": int(largest * written), "a block of it": working})
        )
    held, mapped = _loaded(model, device, libraries, 4096)
    asks = settings["create"] and settings["verify_prompts"]
    if asks:
        # `rollouts.generate` decodes 16 at a time; Ollama's own memory is a server's, which may be there already
        answering = sampling(model, device, 16, 128, ANSWER_TOKENS, 16)
        moments.append(
            Moment("answering, to compare with Ollama", {**held, **kernels(device, ANSWER_TOKENS), **answering})
        )
    disk = {f"{kind} GGUF": int(model.weights * _GGUF_BYTES[kind]) for kind in kinds}
    if any(kind.startswith("q4") for kind in kinds):
        disk["what Ollama quantizes"] = model.weights * 4
    if settings["create"]:
        disk["Ollama's copies"] = sum(disk.values())
    if settings["hf"]:
        disk["hf/"] = model.weights * model.stored.itemsize
    prompts = settings["verify_prompts"] if asks else 0
    work = Work({"answering": decoding_flops(model, prompts, 128, ANSWER_TOKENS)})
    return Plan("export", model, device, moments, mapped if asks else 0, None, work, Disk(disk))


def _merge(settings: dict[str, Any], libraries: int, read_data: bool) -> Plan:
    model = find_architecture(settings["checkpoint_dir"])
    device = Device(model.stored)
    buffers = model.embedding * model.stored.itemsize + model.largest_linear * 4
    moment = Moment("merging", {"Python and libraries": libraries, "buffers": buffers})
    disk = Disk({"lit_model.pth": model.weights * model.stored.itemsize})
    return Plan("merge", model, device, [moment], 0, None, Work({}), disk)


def _shrink(settings: dict[str, Any], libraries: int, read_data: bool) -> Plan:
    model = find_architecture(settings["checkpoint_dir"])
    layers = model.config.n_layer
    report_all(choice_problems(layers, settings["layers"], settings["keep"]))
    kept = settings["keep"] or evenly_spaced(settings["layers"] or max(1, layers // 2), layers)
    block = sum(size for name, size in model.sizes.items() if name.startswith("transformer.h.0."))
    left = model.weights - (layers - len(kept)) * block
    size = model.stored.itemsize
    moment = Moment("copying", {"Python and libraries": libraries, "layers": left * size})
    return Plan(
        "shrink", model, Device(model.stored), [moment], 0, None, Work({}), Disk({"lit_model.pth": left * size})
    )


def _precision(on_gpu: bool) -> str:
    """What null stands for: of a GPU that is not here, bfloat16."""
    return "bf16-true" if on_gpu and not torch.cuda.is_available() else default_precision(on_gpu)


def _count(devices: int | str, on_gpu: bool) -> int:
    if devices == "auto":
        return max(1, torch.cuda.device_count()) if on_gpu else 1
    try:
        return max(1, int(devices))
    except ValueError:
        raise UserError(f"--devices must be a number or auto, not {devices!r}.") from None
