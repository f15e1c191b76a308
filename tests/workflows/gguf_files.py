"""Tiny models as GGUF files, in the way of llama.cpp's own converter."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant
from safetensors.torch import load_file

from tests.conftest import CHATML

GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def gguf_name(name: str) -> str:
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{GGUF_NAMES['.'.join(part)]}.{kind}"


def quantized(values: np.ndarray, quant: Quant) -> np.ndarray:
    """The bytes of a matrix. The library cannot write k-quants: those get random blocks with modest scales."""
    if values.ndim == 1 or quant == Quant.F32:
        return values
    if quant not in (Quant.Q4_K, Quant.Q6_K):
        return gguf.quants.quantize(values, quant)
    block, size = gguf.GGML_QUANT_SIZES[quant]
    generator = np.random.default_rng(values.size)
    blocks = generator.integers(0, 256, (values.shape[0], values.shape[1] // block, size), dtype=np.uint8)
    scale = np.array([0.002], dtype=np.float16).view(np.uint8)
    if quant == Quant.Q4_K:  # the two 16-bit scales come first
        blocks[..., 0:4] = np.tile(scale, 2)
    else:  # Q6_K: one 16-bit scale at the end, after 16 signed 8-bit ones
        blocks[..., -2:] = scale // 4
        blocks[..., -18:-2] //= 16
    return blocks.reshape(values.shape[0], -1)


def write_gguf(
    hf_dir: Path,
    file: Path,
    quant: Quant = Quant.F32,
    pre: str = "llama-bpe",
    edit: Callable[[gguf.GGUFWriter, dict[str, np.ndarray]], None] | None = None,
) -> Path:
    """A tiny Hugging Face model as GGUF, in the way of llama.cpp's own converter."""
    config = json.loads((hf_dir / "config.json").read_text())
    tokenizer = json.loads((hf_dir / "tokenizer.json").read_text())
    arch = config["model_type"]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])

    specials = {token["content"] for token in tokenizer["added_tokens"]}
    vocab = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    rows = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(len(tokens), rows))])
    types = [CONTROL if token in specials else NORMAL for token in tokens]
    writer.add_token_types([*types, *[UNUSED] * (rows - len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocab["<|im_start|>"])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_chat_template(CHATML)

    weights = {name: tensor.float().numpy() for name, tensor in load_file(hf_dir / "model.safetensors").items()}
    if edit is not None:
        edit(writer, weights)
    for name, values in weights.items():
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        data = np.ascontiguousarray(quantized(values, quant))
        writer.add_tensor(
            gguf_name(name) if "model." in name or "lm_head" in name else name,
            data,
            raw_dtype=Quant.F32 if values.ndim == 1 else quant,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
