"""The adapter of a LoRA step in PEFT's format: `PeftModel.from_pretrained(base, folder)` equals the merged checkpoint.

LitGPT adapts query, key and value as one fused layer: its A holds the adapted ones' (r, in) matrices one above the
other, its B their (out, r) matrices likewise. PEFT adapts three layers.

An adapted head of a tied model is written whole (`modules_to_save`). As LoRA, PEFT would apply it to the head alone
while the adapter is loaded, but `merge_and_unload` would add it to the matrix that head and embedding share.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from workflows.checkpoint import LORA_WEIGHTS, WEIGHTS, check_checkpoint_dir, is_tied, load_config, load_weights
from workflows.errors import UserError
from workflows.files import atomic_dir, write_json, write_text
from workflows.hf_export import hf_module_names, qkv_sizes
from workflows.merge import read_hyperparameters
from workflows.model_card import lineage

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to, as `transformers` finds it.

    Attributes:
        name: A Hub id, or a folder.
        revision: The commit on the Hub.
        made_by: For a folder, the command that makes it.
    """

    name: str
    revision: str | None = None
    made_by: str | None = None

    @property
    def usage(self) -> str:
        """Markdown: how to load base and adapter."""
        revision = f', revision="{self.revision}"' if self.revision else ""
        code = (
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{self.name}"{revision})\n'
            'model = PeftModel.from_pretrained(base, "FOLDER_OF_THIS_FILE")\n```'
        )
        if self.made_by is None:
            return code
        return (
            "The base model is not on the Hugging Face Hub. Make it in Hugging Face's form first, in the project's "
            f"folder:\n\n```\n{self.made_by}\n```\n\n{code}"
        )


def find_base(checkpoint_dir: Path, folder: Path) -> Base:
    """What a LoRA step's adapter belongs to.

    Args:
        checkpoint_dir: The result of the step.
        folder: Where to suggest to export a base that did not come from the Hub as it is.
    """
    base_dir = read_hyperparameters(checkpoint_dir)["checkpoint_dir"]
    steps = lineage(Path(base_dir))
    source = (steps[0].get("sources") or {}).get("model", {}) if steps else {}
    if source.get("kind") == "hub" and "base" not in source:  # a merged adapter is on the Hub in two parts only
        return Base(source["place"], source.get("commit"))
    command = (
        f'python -m workflows export --checkpoint_dir {base_dir} --create false --quantize "[]" --out_dir {folder}'
    )
    return Base(str(folder / "hf"), made_by=command)


def write_adapter(checkpoint_dir: Path, out_dir: Path, base: Base, card: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, whole or not at all.

    Args:
        checkpoint_dir: The result of a LoRA step, with `lit_model.pth.lora`.
        out_dir: The folder to write; replaced if it exists.
        base: What the adapter belongs to.
        card: The model card, for README.md.

    Raises:
        UserError: If the checkpoint has no adapter, it does not fit its settings, or PEFT has none of its kind.
    """
    config, tensors = adapter_contents(checkpoint_dir)
    with atomic_dir(out_dir) as temporary:
        weights = temporary / "adapter_model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # safetensors makes files for their owner alone
        named = {"base_model_name_or_path": base.name, "revision": base.revision}
        write_json(temporary / "adapter_config.json", {**named, **config})
        write_text(temporary / "README.md", card)


def adapter_contents(checkpoint_dir: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the fields of `adapter_config.json`, without the base, and the tensors under PEFT's names.

    Args:
        checkpoint_dir: The result of a LoRA step, with `lit_model.pth.lora`.

    Raises:
        UserError: If the checkpoint has no adapter, it does not fit its settings, or PEFT has none of its kind.
    """
    directory = check_checkpoint_dir(checkpoint_dir, LORA_WEIGHTS)
    settings = read_hyperparameters(directory)
    rank = settings["lora_r"]
    enabled = [bool(settings.get(f"lora_{name}")) for name in ("query", "key", "value")]
    adapters = load_weights(directory, LORA_WEIGHTS)
    whole: dict[str, torch.Tensor] = {}
    base_dir = Path(settings["checkpoint_dir"])
    if "lm_head.lora_A" in adapters and (not (base_dir / WEIGHTS).is_file() or is_tied(base_dir)):
        adapters = {name: tensor for name, tensor in adapters.items() if not name.startswith("lm_head.")}
        whole = {f"{_PREFIX}lm_head.weight": load_weights(directory)["lm_head.weight"].clone()}
        if not adapters:
            raise UserError(
                f"{directory}: only the head was adapted, and the base ties it to the embedding; PEFT has no adapter "
                "for that. Export the model without --adapter, or train more layers than --lora_head."
            )
    tensors = peft_tensors(adapters, load_config(directory), rank, enabled)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": settings.get("lora_alpha", 1),
        "lora_dropout": settings.get("lora_dropout", 0.0),
        "target_modules": sorted({name.split(".lora_")[0].split(".")[-1] for name in tensors}),
        "modules_to_save": ["lm_head"] if whole else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return config, tensors | whole


def peft_tensors(
    adapters: dict[str, torch.Tensor], config: Any, rank: int, enabled: list[bool]
) -> dict[str, torch.Tensor]:
    """LitGPT's adapter tensors under PEFT's names.

    Args:
        adapters: `….lora_A` (r, in) and `….lora_B` (out, r); for the fused layer A is (r * number adapted, in).
        config: LitGPT's configuration of the model.
        rank: r.
        enabled: Whether query, key, value are adapted.

    Raises:
        UserError: If a tensor's shape does not fit.
    """
    converted: dict[str, torch.Tensor] = {}
    for full_name, tensor in adapters.items():
        module, _, kind = full_name.rpartition(".")
        names: tuple[str, ...] = hf_module_names(module)
        parts: tuple[torch.Tensor, ...] = (tensor,)
        if len(names) == 3:
            names = tuple(name for name, on in zip(names, enabled, strict=True) if on)
            rows = [rank] * len(names)
            if kind == "lora_B":
                rows = [size for size, on in zip(qkv_sizes(config), enabled, strict=True) if on]
            if sum(rows) != tensor.shape[0]:
                raise UserError(f"{full_name} has {tensor.shape[0]} rows where its settings ask for {sum(rows)}.")
            parts = tensor.split(rows)
        for name, part in zip(names, parts, strict=True):
            converted[f"{_PREFIX}{name}.{kind}.weight"] = part.clone()
    return converted
