"""A checkpoint as a complete Hugging Face directory: `from_pretrained` loads it and gives the same logits.

Weights go into sharded safetensors under Hugging Face's names; one shard at a time is in memory. A tied head stays tied
(no `lm_head` tensor) unless its weights have come to differ from the embedding's.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from workflows.checkpoint import is_tied, load_config, load_weights
from workflows.errors import UserError
from workflows.files import atomic_dir, read_json, write_json, write_text
from workflows.progress import brief

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def hf_module_names(name: str) -> tuple[str, ...]:
    """Hugging Face's module names for a LitGPT module of Llama or Qwen2.

    Args:
        name: As in `transformer.h.3.attn.qkv`, without `.weight` or `.bias`.

    Returns:
        One name; three (query, key, value) for the fused projection.

    Raises:
        UserError: If the module is of another architecture.
    """
    if name in _NAMES:
        return (_NAMES[name],)
    prefix, _, rest = name.partition("transformer.h.")
    layer, _, inner = rest.partition(".")
    if not prefix and inner == "attn.qkv":
        return tuple(f"model.layers.{layer}.{module}" for module in QKV)
    if prefix or inner not in _NAMES:
        raise UserError(f"{name}: not a weight of the Llama or Qwen2 architecture; such a model cannot be exported.")
    return (f"model.layers.{layer}.{_NAMES[inner]}",)


def qkv_sizes(config: Any) -> tuple[int, int, int]:
    """Output rows of query, key and value in LitGPT's fused projection."""
    groups = config.n_query_groups * config.head_size
    return config.n_head * config.head_size, groups, groups


def check_architecture(checkpoint_dir: Path) -> None:
    """Refuse a checkpoint whose weights have no names in Hugging Face's form that we know.

    Raises:
        UserError: If the architecture is not Llama or Qwen2.
    """
    architectures = read_json(checkpoint_dir / "config.json").get("architectures") or ["?"]
    if architectures[0] not in ARCHITECTURES:
        raise UserError(f"{checkpoint_dir}: {architectures[0]} cannot be exported, only {' and '.join(ARCHITECTURES)}.")


def hf_tensors(checkpoint_dir: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """A checkpoint's weights under Hugging Face's names, as views of the mapped file: nothing is read yet.

    Args:
        checkpoint_dir: A LitGPT checkpoint directory.

    Returns:
        The tensors, without `lm_head.weight` where it is the embedding; and whether it is.

    Raises:
        UserError: If the architecture is not Llama or Qwen2.
    """
    check_architecture(checkpoint_dir)
    config, weights, tied = load_config(checkpoint_dir), load_weights(checkpoint_dir), is_tied(checkpoint_dir)
    vocab_size = read_json(checkpoint_dir / "config.json")["vocab_size"]
    tensors: dict[str, torch.Tensor] = {}
    for full_name, tensor in weights.items():
        module, _, kind = full_name.rpartition(".")
        if module == "lm_head" and tied:
            continue
        if module in ("lm_head", "transformer.wte"):
            tensor = tensor[:vocab_size]  # LitGPT may pad the vocabulary
        names = hf_module_names(module)
        parts = tensor.split(qkv_sizes(config)) if len(names) == 3 else (tensor,)
        tensors |= {f"{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    return tensors, tied


def write_hf(checkpoint_dir: Path, out_dir: Path, card: str, shard_bytes: int = 2_000_000_000) -> None:
    """Write a complete Hugging Face directory, whole or not at all.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory.
        out_dir: The folder to write; replaced if it exists.
        card: The model card, for README.md.
        shard_bytes: The largest shard, unless one tensor alone is larger.

    Raises:
        UserError: If the architecture is not supported or there is no room.
    """
    tensors, tied = hf_tensors(checkpoint_dir)
    with atomic_dir(out_dir) as temporary:
        config = read_json(checkpoint_dir / "config.json")
        dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
        config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        write_json(temporary / "config.json", {**config, "tie_word_embeddings": tied, "torch_dtype": dtype})
        for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
            if (checkpoint_dir / name).is_file():
                (temporary / name).write_bytes((checkpoint_dir / name).read_bytes())
        write_json(temporary / "tokenizer_config.json", _tokenizer_config(checkpoint_dir))
        write_text(temporary / "README.md", card)
        _write_shards(tensors, temporary, shard_bytes)


def tokenizer_adds_bos(checkpoint_dir: Path) -> bool:
    """Whether tokenizer.json by itself (its post-processor) writes a BOS token before plain text."""
    tokenizer = Tokenizer.from_file(str(checkpoint_dir / "tokenizer.json"))
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    return tokenizer.encode("a").ids[: -len(plain)] != []


def _tokenizer_config(checkpoint_dir: Path) -> dict[str, Any]:
    """tokenizer_config.json with `add_bos_token` as Hugging Face means it; a checkpoint sets it for LitGPT's rules."""
    config = read_json(checkpoint_dir / "tokenizer_config.json")
    return {**config, "add_bos_token": tokenizer_adds_bos(checkpoint_dir)}


def _write_shards(tensors: dict[str, torch.Tensor], folder: Path, shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(brief(shards, "safetensors", "file"), start=1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _alone(tensors[name]) for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes files for their owner alone
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own; safetensors refuses views that share one, as those of a mapped file."""
    return torch.from_numpy(tensor.contiguous().view(torch.uint8).numpy()).view(tensor.dtype)
