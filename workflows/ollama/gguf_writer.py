"""A checkpoint as one GGUF file, for llama.cpp and Ollama: Llama and Qwen2 architectures; f32, f16, bf16, q8_0.

The header is written first, from shapes alone; then one tensor at a time is read, converted, written and forgotten.
Matrices get the asked-for type; vectors stay float32, as in llama.cpp's own converter.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
)
from gguf.quants import quant_shape_to_byte_shape, quantize

from workflows.chat_template import ChatTemplate
from workflows.checkpoint import COMPANIONS, WEIGHTS, load_config
from workflows.errors import UserError
from workflows.files import atomic_file, read_json, sha256
from workflows.gguf_header import read_header
from workflows.hf_export import hf_tensors
from workflows.ollama.client import OURS
from workflows.ollama.tokenizer_fields import read_tokenizer
from workflows.progress import brief

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "source"]
"""`source` is what Ollama is given to quantize by itself: float32, under float16's name. It refuses files that call
themselves float32 (their type number, 0, reads as "unknown" to it), and the private copy of 0.9.3 turns every float16
matrix into zeros on the way."""
_TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "source": (GGMLQuantizationType.F32, LlamaFileType.MOSTLY_F16),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_ARCHITECTURES = {"LlamaForCausalLM": MODEL_ARCH.LLAMA, "Qwen2ForCausalLM": MODEL_ARCH.QWEN2}
_ROPE_FREQS = "rope_freqs.weight"


_BLOCK_WEIGHTS = 2**24
"""Weights that are converted at a time: 64 MB of float32."""


def write_gguf(
    checkpoint_dir: Path, file: Path, kind: GGUFType, name: str, checkpoint_sha256: str, licence: str | None = None
) -> None:
    """Write a checkpoint as a GGUF file, whole or not at all.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory.
        file: The file to write.
        kind: Type of the matrices; one whose rows do not fill q8_0's blocks of 32 is written as f16.
        name: The model's name in the file's header.
        checkpoint_sha256: From `fingerprint`, kept in the header: by it a finished file is known again.
        licence: The weights' licence (SPDX identifier), if known.

    Raises:
        UserError: If architecture or tokenizer have no counterpart in llama.cpp, a weight exceeds float16's range, or
            there is no room.
    """
    tensors, _ = hf_tensors(checkpoint_dir)
    config, hf_config = load_config(checkpoint_dir), read_json(checkpoint_dir / "config.json")
    arch = _ARCHITECTURES[hf_config["architectures"][0]]
    names = get_tensor_name_map(arch, config.n_layer)
    ggml_type, file_type = _TYPES[kind]

    plan: list[tuple[str, str, GGMLQuantizationType]] = []  # name in GGUF, in Hugging Face's terms, type
    for hf_name, tensor in tensors.items():
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UserError(f"{checkpoint_dir}: llama.cpp has no place for {hf_name} in a {arch.name} model.")
        plan.append((gguf_name, hf_name, _type_of(tensor, ggml_type)))
    factors = rope_factors(config)

    with atomic_file(file) as temporary:
        writer = GGUFWriter(temporary, MODEL_ARCH_NAMES[arch])
        try:
            writer.add_type("model")
            writer.add_name(name)
            writer.add_string(OURS, checkpoint_sha256)
            if licence:
                writer.add_license(licence)
            writer.add_quantization_version(GGML_QUANT_VERSION)
            writer.add_file_type(file_type)
            _add_architecture(writer, config, hf_config["vocab_size"])
            _add_tokenizer(writer, checkpoint_dir, hf_config["vocab_size"])
            if factors is not None:
                writer.add_tensor_info(_ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
            for gguf_name, hf_name, tensor_type in plan:
                _announce(writer, gguf_name, tuple(tensors[hf_name].shape), tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            for _, hf_name, tensor_type in brief(plan, file.name, "tensor"):
                tensor = tensors[hf_name]
                if arch == MODEL_ARCH.LLAMA:
                    tensor = _interleave(tensor, hf_name, config)
                writer.write_tensor_data(_convert(tensor, tensor_type, hf_name))
        finally:
            writer.close()


def fingerprint(checkpoint_dir: Path) -> str:
    """One hash over everything in a checkpoint that a GGUF file is made from."""
    files = (WEIGHTS, *COMPANIONS)
    hashes = {name: sha256(checkpoint_dir / name) for name in files if (checkpoint_dir / name).is_file()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def is_gguf_of(file: Path, checkpoint_sha256: str, kind: GGUFType) -> bool:
    """Whether a file is our finished GGUF of this checkpoint and type, so that it need not be written again."""
    if not file.is_file():
        return False
    try:
        fields, _ = read_header(file)
    except UserError:  # another program's file, or half of one
        return False
    return (fields.get(OURS), fields.get("general.file_type")) == (checkpoint_sha256, _TYPES[kind][1])


def rope_factors(config: Any) -> np.ndarray | None:
    """Divisors of the rotary frequencies for Llama 3.1's long context, float32, shape (head_size / 2,).

    llama.cpp keeps them as a tensor. The formula is that of `transformers.modeling_rope_utils` (rope type llama3).
    """
    if (scaling := config.rope_adjustments) is None:
        return None
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context, factor = scaling["original_max_seq_len"], scaling["factor"]
    factors = []
    for i in range(0, config.head_size, 2):
        wavelength = 2 * math.pi * config.rope_base ** (i / config.head_size)
        smooth = (context / wavelength - low) / (high - low)
        factors.append(1 / ((1 - smooth) / factor + smooth) if 0 < smooth < 1 else 1.0 if smooth >= 1 else factor)
    return np.array(factors, dtype=np.float32)


def _type_of(tensor: torch.Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if tensor.dim() == 1:
        return GGMLQuantizationType.F32
    if wanted == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32 != 0:
        return GGMLQuantizationType.F16
    return wanted


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], tensor_type: GGMLQuantizationType) -> None:
    if tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        dtype = np.dtype(np.float32 if tensor_type == GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
    else:
        byte_shape = quant_shape_to_byte_shape(shape, tensor_type)
        writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), math.prod(byte_shape), raw_dtype=tensor_type)


def _convert(tensor: torch.Tensor, tensor_type: GGMLQuantizationType, name: str) -> np.ndarray:
    """A tensor in its type for the file, made in blocks of rows: in float32 an embedding alone can be a gigabyte."""
    rows = max(1, _BLOCK_WEIGHTS // max(1, math.prod(tensor.shape[1:])))
    converted: np.ndarray | None = None
    for begin in range(0, len(tensor), rows):
        block = tensor[begin : begin + rows].float().contiguous().numpy()
        largest = float(np.abs(block).max(initial=0.0))
        if tensor_type == GGMLQuantizationType.F16 and largest > float(np.finfo(np.float16).max):
            raise UserError(f"{name} has values beyond float16's range (65504). Use --quantize bf16.")
        made = quantize(block, tensor_type)
        if converted is None:
            converted = np.empty((len(tensor), *made.shape[1:]), made.dtype)
        converted[begin : begin + len(block)] = made
    assert converted is not None, f"{name} is empty"
    return converted


def _interleave(tensor: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs of a Llama's query and key; Hugging Face rotates halves."""
    heads = {"q_proj": config.n_head, "k_proj": config.n_query_groups}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _add_architecture(writer: GGUFWriter, config: Any, vocab_size: int) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_query_groups)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(vocab_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(float(config.rope_base))
    if config.head_size * config.n_head != config.n_embd:
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
    if config.rope_condense_ratio != 1:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(config.rope_condense_ratio))


def _add_tokenizer(writer: GGUFWriter, checkpoint_dir: Path, vocab_size: int) -> None:
    tokenizer = read_tokenizer(checkpoint_dir / "tokenizer.json", vocab_size)
    template = ChatTemplate.from_checkpoint(checkpoint_dir)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    if (bos := template.tokenizer.token_to_id(template.bos_token)) is not None:
        writer.add_bos_token_id(bos)
    (turn_end,) = template.encode(template.turn_end)[-1:]
    eos = template.tokenizer.token_to_id(template.eos_token)
    writer.add_eos_token_id(turn_end if eos is None else eos)
    writer.add_eot_token_id(turn_end)
    # The template writes BOS as text where the model wants one; a second one from the tokenizer would be one too many.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(template.source)
