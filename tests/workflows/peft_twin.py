"""A Hugging Face model with PEFT's adapters that are the same as ours, for comparing trainers."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from workflows.training.model import LoRAArgs

_NAMES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}


def peft_twin(hf_dir: Path, adapters: dict[str, torch.Tensor], lora: LoRAArgs) -> Any:
    """Load a model in float32 and give it adapters.

    Args:
        hf_dir: The model in Hugging Face's form.
        adapters: Our `lora_A` tensors by name; `lora_B` is zero.
        lora: Their rank and scale.
    """
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32),
        LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear"),
    )
    copied = {}
    for name, tensor in adapters.items():  # transformer.h.0.attn.qkv.lora_A
        layer, module = name.removeprefix("transformer.h.").removesuffix(".lora_A").split(".", 1)
        if module == "attn.qkv":
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.split(lora.r), strict=True)
            targets = {f"self_attn.{part}": rows for part, rows in parts}
        else:
            targets = {_NAMES[module]: tensor}
        for target, rows in targets.items():
            copied[f"base_model.model.model.layers.{layer}.{target}.lora_A.default.weight"] = rows
    expected = {name for name, p in model.named_parameters() if "lora_A" in name}
    assert set(copied) == expected
    model.load_state_dict(copied, strict=False)
    return model
