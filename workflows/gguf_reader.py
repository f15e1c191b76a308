"""Read a GGUF file (Llama or Qwen2) as a model in Hugging Face's terms.

llama.cpp stores the query and key matrices of a Llama with the two halves of every head interleaved, because its rotary
embedding turns neighbouring pairs; Hugging Face and LitGPT turn the two halves. Qwen2 is stored as it is. Quantized
matrices are dequantized a few rows at a time.
"""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize

from workflows.conversion import LazyTensor, Source
from workflows.errors import UserError
from workflows.gguf_header import GGUFTensor, read_header
from workflows.gguf_tokenizer import build_tokenizer

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names (between `blk.N.` and `.weight`) to Hugging Face's."""
_ROPE_FACTORS = "rope_freqs.weight"
_FIELDS: dict[str, Any] = {
    "tokenizer.chat_template": str,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.tokens": list[str],
    "tokenizer.ggml.token_type": list[int],
    "tokenizer.ggml.merges": list[str],
    "tokenizer.ggml.add_bos_token": bool,
    **{f"tokenizer.ggml.{role}_token_id": int for role in ("bos", "eos", "eot", "unknown", "padding")},
    "*.expert_count": int,
    "*.embedding_length": int,
    "*.feed_forward_length": int,
    "*.block_count": int,
    "*.context_length": int,
    "*.attention.key_length": int,
    "*.attention.layer_norm_rms_epsilon": float,
    "*.rope.dimension_count": int,
    "*.rope.freq_base": float,
    "*.rope.scaling.type": str,
    "*.rope.scaling.factor": float,
}
"""Types of the fields that are read; a star stands for the architecture."""
_TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 20  # elements dequantized at once; the temporaries of k-quants are several times as large


def read_gguf(file: Path) -> Source:
    """Read the header of a GGUF file; weights follow when asked for.

    Raises:
        UserError: If the file is missing, cut short, not GGUF, or of an architecture or tokenizer we do not convert.
    """
    fields, tensors = read_header(file)
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise UserError(
            f"{file}: GGUF architecture {architecture!r:.40} is not supported. Supported: {', '.join(_ARCHITECTURES)}."
        )
    for name, kind in _FIELDS.items():
        if (name := name.replace("*", architecture)) in fields and not _is(fields[name], kind):
            raise UserError(
                f"{file} is damaged: its field {name} is not of the type {getattr(kind, '__name__', kind)}."
            )
    if "token_embd.weight" not in tensors:
        raise UserError(f"{file} has no token_embd.weight: it is not a language model (an adapter, or a split file?).")

    tokenizer_json, tokenizer_config = build_tokenizer(fields, str(file))
    config = _config(file, architecture, fields, tensors)
    return Source(
        place=str(file),
        config=config,
        tensors=_lazy_tensors(config, tensors),
        tokenizer_json=tokenizer_json,
        tokenizer_config=tokenizer_config,
        generation_config={"bos_token_id": config["bos_token_id"], "eos_token_id": _stops(fields)},
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _is(value: Any, kind: Any) -> bool:
    if kind in (list[str], list[int]):
        return isinstance(value, list) and all(type(item) is kind.__args__[0] for item in value)
    return type(value) is kind and (kind is not float or math.isfinite(value))


def _stops(fields: dict[str, Any]) -> int | list[int]:
    """The ids that end an answer: the text's end and, where it is another (Llama 3), the turn's."""
    found = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    stops = list(dict.fromkeys(token_id for token_id in found if token_id is not None))
    return stops if len(stops) > 1 else stops[0]


def _config(file: Path, architecture: str, fields: dict[str, Any], tensors: dict[str, GGUFTensor]) -> dict[str, Any]:
    """The `config.json` that the model has, or would have, on the Hub."""

    def field(key: str, default: Any = None) -> Any:
        value = fields.get(f"{architecture}.{key}", default)
        if value is None:
            raise UserError(f"{file} lacks the field {architecture}.{key}; it is damaged or of an unknown kind.")
        return value

    if field("expert_count", 0) > 0:
        raise UserError(f"{file} is a mixture of experts, which is not supported.")
    width, heads = field("embedding_length"), field("attention.head_count")
    if not isinstance(heads, int) or not isinstance(field("attention.head_count_kv", heads), int):
        raise UserError(f"{file}: the number of heads differs from layer to layer, which is not supported.")
    if heads < 1:
        raise UserError(f"{file} is damaged: it has {heads} heads.")
    head_dim = field("attention.key_length", width // heads)
    if field("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{file} rotates a part of each head only, which is not supported.")

    rope = {"rope_type": "default", **_rope_scaling(file, fields, architecture, head_dim, tensors)}
    theta = float(field("rope.freq_base", 10000.0))
    is_qwen2 = architecture == "qwen2"
    return {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": field("context_length"),
        # float32 in the file; eight digits give back the decimal number that was meant
        "rms_norm_eps": float(f"{field('attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": theta},
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        **({"use_sliding_window": False} if is_qwen2 else {"attention_bias": False, "mlp_bias": False}),
    }


def _rope_scaling(
    file: Path, fields: dict[str, Any], architecture: str, head_dim: int, tensors: dict[str, GGUFTensor]
) -> dict[str, Any]:
    """Rotary scaling. Llama 3's is not a field: the file holds its result, one divisor per frequency."""
    kind = fields.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "linear":
        if (key := f"{architecture}.rope.scaling.factor") not in fields:
            raise UserError(f"{file} lacks the field {key} of its linear rotary scaling; it is damaged.")
        return {"rope_type": "linear", "factor": fields[key]}
    if kind != "none":
        raise UserError(f"{file}: rotary scaling of type {kind!r} is not supported (known: linear, Llama 3's).")
    if _ROPE_FACTORS not in tensors:
        return {}

    stored = dequantize(tensors[_ROPE_FACTORS].data, tensors[_ROPE_FACTORS].kind).astype(np.float64)
    theta = float(fields.get(f"{architecture}.rope.freq_base", 10000.0))
    unknown = UserError(f"{file}: its rope_freqs.weight is not Llama 3's rotary scaling, which is the one supported.")
    if 2 * stored.size != head_dim or stored.ndim != 1:
        raise unknown
    # Every Llama 3.1 to 3.3 has these three; the factor is 8 or 32, the divisor of the slowest frequencies.
    low, high, original = 1.0, 4.0, 8192
    factor = float(stored.max())
    turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(stored, expected, rtol=1e-3):
        raise unknown
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _lazy_tensors(config: dict[str, Any], tensors: dict[str, GGUFTensor]) -> dict[str, LazyTensor]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    lazy = {}
    for name, tensor in tensors.items():
        if name == _ROPE_FACTORS:  # already in the configuration
            continue
        stem, _, kind = name.rpartition(".")
        prefix, _, part = stem.rpartition(".")  # blk.N
        hf_part = _NAMES.get(part, part)
        hf_name = f"model.layers.{prefix.removeprefix('blk.')}.{hf_part}.{kind}" if prefix else f"{hf_part}.{kind}"
        dtype = _TORCH_DTYPES.get(tensor.kind.name, torch.float32)
        interleaved = heads.get(part, 0) if config["model_type"] == "llama" else 0
        lazy[hf_name] = LazyTensor(tensor.shape, dtype, functools.partial(_read_into, tensor, interleaved))
    return lazy


def _read_into(tensor: GGUFTensor, interleaved_heads: int, out: torch.Tensor) -> None:
    """Dequantize a tensor into `out`, a few rows at a time; undo llama.cpp's permutation of the rows if asked."""
    rows = out.view(out.shape[0], -1) if out.dim() > 1 else out.view(1, -1)
    if interleaved_heads:  # row (head, i, half) of the file is row (head, half, i) of the matrix
        size = len(rows) // interleaved_heads
        order = torch.arange(len(rows)).view(interleaved_heads, 2, size // 2).transpose(1, 2).flatten()
    data = tensor.data.reshape(len(rows), -1)  # each row of a quantized matrix is whole blocks of bytes
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        chunk = dequantize(np.array(data[start : start + step]), tensor.kind)
        values = torch.from_numpy(chunk.astype(np.float32, copy=False)).view(-1, rows.shape[1])
        if interleaved_heads:
            rows[order[start : start + step]] = values.to(rows.dtype)
        else:
            rows[start : start + step] = values
