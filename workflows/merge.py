"""`make merge`: fold a LoRA step's adapters into a plain LitGPT checkpoint, tensor by tensor."""

from pathlib import Path
from typing import Any

import torch
import yaml
from litgpt.lora import LoRALinear

from workflows.checkpoint import (
    LORA_WEIGHTS,
    WEIGHTS,
    check_checkpoint_dir,
    copy_companions,
    describe_source,
    is_tied,
    load_weights,
    write_hyperparameters,
    write_metrics,
    write_provenance,
)
from workflows.errors import UserError
from workflows.files import atomic_dir, read_json, read_text, write_json
from workflows.measure import PeakMemory, seconds_of_step, step_began
from workflows.progress import brief
from workflows.training.model import LoRAArgs, LoRAQKVLinear, empty_model
from workflows.untrusted import parse_yaml
from workflows.weight_writer import weight_writer


def setup(checkpoint_dir: Path, out_dir: Path | None = None, base_dir: Path | None = None) -> None:
    """Merge LoRA weights into the checkpoint that they were trained on.

    Args:
        checkpoint_dir: A folder with `lit_model.pth.lora` and `hyperparameters.yaml`, of `make lora` or of LitGPT.
        out_dir: Where the plain checkpoint goes; `checkpoint_dir` with `-merged` added to its name by default.
        base_dir: The checkpoint that was fine-tuned; by default the one that `hyperparameters.yaml` names.

    Raises:
        UserError: If a file is missing or the adapters do not fit the base.
    """
    if (checkpoint_dir / WEIGHTS).is_file() and not (checkpoint_dir / LORA_WEIGHTS).is_file():
        raise UserError(f"{checkpoint_dir} holds no adapters, so there is nothing to merge: {WEIGHTS} is all of it.")
    directory = check_checkpoint_dir(checkpoint_dir, LORA_WEIGHTS)
    settings = read_hyperparameters(directory)
    base = check_checkpoint_dir(base_dir or settings["checkpoint_dir"])
    target = out_dir or directory.with_name(directory.name + "-merged")
    lora = LoRAArgs.from_settings(settings)
    began = step_began()
    with atomic_dir(target) as temporary, PeakMemory() as peak:
        copy_companions(directory, temporary)
        write_merged(base, load_weights(directory, LORA_WEIGHTS), lora, temporary)
        sources = {"base": describe_source(base), "adapters": describe_source(directory)}
        arguments = {"checkpoint_dir": directory, "base_dir": base}
        write_hyperparameters(temporary, arguments)
        write_metrics(temporary / "metrics.json", [], seconds=seconds_of_step(began), peak_bytes=peak.bytes)
        write_provenance(temporary, "merge", sources, arguments)
    print(f"merged checkpoint: {target}")


def read_hyperparameters(directory: Path) -> dict[str, Any]:
    """The settings of the step that made a checkpoint directory.

    Raises:
        UserError: If `hyperparameters.yaml` is missing or malformed.
    """
    file = directory / "hyperparameters.yaml"
    if not file.is_file():
        raise UserError(f"{file} does not exist: it says which base model and rank the adapters have.")
    try:
        settings = parse_yaml(read_text(file))
    except yaml.YAMLError as e:
        raise UserError(f"{file} is not valid YAML: {e}") from None
    named = isinstance(settings, dict) and "lora_r" in settings and isinstance(settings.get("checkpoint_dir"), str)
    if not named:
        raise UserError(f"{file} names no lora_r and checkpoint_dir; it is not of a LoRA step.")
    return settings


def write_merged(base_dir: Path, adapters: dict[str, torch.Tensor], lora: LoRAArgs, out_dir: Path) -> None:
    """Write `lit_model.pth` with W + (alpha / r) B A for each adapted layer, in the base's precision.

    One tensor at a time is in memory. The language-model head stays tied to the embedding unless it was adapted itself.

    Args:
        base_dir: The checkpoint that was fine-tuned.
        adapters: `lora_A` and `lora_B` tensors under LitGPT's names.
        lora: The settings they were trained with.
        out_dir: An unfinished checkpoint directory with the companions already in it.

    Raises:
        UserError: If adapters and base do not fit each other.
    """
    model = empty_model(base_dir, lora)
    expected = {name for name, _ in model.named_parameters() if "lora_" in name}
    if set(adapters) != expected:
        odd = sorted(set(adapters) ^ expected)
        raise UserError(f"The adapters do not fit {base_dir} with these lora settings; they differ in {odd[:3]}.")
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in adapters.items()}, strict=False, assign=True)
    except RuntimeError as e:
        raise UserError(f"The adapters do not fit {base_dir}: {e}") from None
    layers = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear) and hasattr(module, "lora_A")
    }
    tied = is_tied(base_dir)
    base = load_weights(base_dir)
    # One tensor for all, as in the writer: made and freed layer by layer they would leave holes in the heap.
    updated = torch.empty(max((base[name].numel() for name in layers), default=0))
    with weight_writer(out_dir / WEIGHTS, max((weight.nbytes for weight in base.values()), default=0)) as writer:
        for name, weight in brief(base.items(), "merging", "tensor"):
            if name == "lm_head.weight" and tied and name not in layers:
                continue
            merged = writer.blank(weight.shape, weight.dtype)
            if name in layers:
                weight = _updated(layers[name], weight, updated[: weight.numel()].view(weight.shape))
            writer.store(name, merged.copy_(weight))
        if "lm_head.weight" not in writer.written:
            writer.tie("lm_head.weight", "transformer.wte.weight")
    config = read_json(out_dir / "config.json")
    if config.get("tie_word_embeddings") and not (tied and "lm_head.weight" not in layers):
        write_json(out_dir / "config.json", {**config, "tie_word_embeddings": False})


def _updated(layer: LoRALinear, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """W + (alpha / r) B A in float32, in a tensor of W's shape that is there already."""
    lora_B = layer.block_diagonal_B() if isinstance(layer, LoRAQKVLinear) else layer.lora_B
    return torch.mm(lora_B, layer.lora_A, out=out).mul_(layer.scaling).add_(weight)
