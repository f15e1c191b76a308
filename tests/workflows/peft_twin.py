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
        adapters: Our `lora_A` tensors by name, perhaps with the `lora_B` ones, which are zero otherwise.
        lora: Their rank and scale.
    """
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32),
        LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear"),
    )
    copied = to_peft(adapters, lora, model.config)
    kinds = {name.rpartition(".")[2] for name in adapters}
    expected = {name for name, _ in model.named_parameters() if any(kind in name for kind in kinds)}
    assert set(copied) == expected
    model.load_state_dict(copied, strict=False)
    return model


def to_peft(adapters: dict[str, torch.Tensor], lora: LoRAArgs, config: Any) -> dict[str, torch.Tensor]:
    """Our adapters (or their gradients) under PEFT's names, the fused query, key and value taken apart.

    Args:
        adapters: Tensors by our names, e.g. transformer.h.0.attn.qkv.lora_A.
        lora: Their rank.
        config: Hugging Face's configuration of the model.
    """
    head_size = config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    found = {}
    for name, tensor in adapters.items():
        path, _, kind = name.removeprefix("transformer.h.").rpartition(".")
        layer, module = path.split(".", 1)
        if module == "attn.qkv":
            sizes = [lora.r] * 3 if kind == "lora_A" else [head_size * count for count in heads]
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.split(sizes), strict=True)
            targets = {f"self_attn.{part}": rows for part, rows in parts}
        else:
            targets = {_NAMES[module]: tensor}
        for target, rows in targets.items():
            found[f"base_model.model.model.layers.{layer}.{target}.{kind}.default.weight"] = rows
    return found
