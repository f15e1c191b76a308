"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): frozen weights in 4 bits under adapters in full precision.

bitsandbytes holds and multiplies the weights, on a CUDA GPU or a CPU. Fabric's plugin of it is for GPUs only, so the
layers are replaced here.
"""

import logging
from typing import Any, Literal

import litgpt.lora
import torch

from workflows.errors import UserError

Quantize = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq"]
"""LitGPT's names: the 4-bit type, and whether the blocks' scales are quantized too ("double quantization")."""

_BLOCK = 64
"""Weights that share a scale. bitsandbytes 0.50.2 restores wrong values on a CPU where a block crosses rows."""


def quantize_frozen(model: torch.nn.Module, kind: Quantize, device: torch.device) -> None:
    """Put the weights under the adapters into 4 bits and onto a device.

    The head keeps its precision, as LitGPT and QLoRA's authors keep it, and so do embedding and norms.

    Args:
        model: A model with adapters, on the CPU; it is changed.
        kind: The 4-bit type.
        device: Where the weights go.

    Raises:
        UserError: If the model has a width that bitsandbytes gets wrong on a CPU.
    """
    import bitsandbytes

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a package that downloads kernels

    quant_type, _, double = kind.removeprefix("bnb.").partition("-")
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, litgpt.lora.LoRALinear) and name != "lm_head"
    ]
    odd = [layer.linear.in_features for layer in layers if layer.linear.in_features % _BLOCK]
    if odd and device.type == "cpu":
        raise UserError(
            f"--quantize on a CPU needs layers of a multiple of {_BLOCK} inputs, not {odd[0]}; leave it out."
        )
    for layer in layers:
        plain = layer.linear
        options: dict[str, Any] = {"compress_statistics": double == "dq", "quant_type": quant_type}
        packed = bitsandbytes.nn.Linear4bit(
            plain.in_features, plain.out_features, False, plain.weight.dtype, device="meta", **options
        )
        # On some CPUs an evaluation would leave the weights in a layout that has no backward pass.
        packed.support_avx512bf16_for_cpu = False
        packed.bias = plain.bias
        packed.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, module=packed, **options)
        layer.linear = packed.to(device)  # this quantizes
