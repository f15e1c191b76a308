"""From a model in Hugging Face's terms to a LitGPT checkpoint directory, one tensor at a time.

Readers (`hf_reader.py`, `gguf_reader.py`) describe a model as a `Source`: its configuration, its small files, and its
tensors as promises that are kept one by one. Each output tensor is read, brought into LitGPT's shape by LitGPT's own
name maps, written to `lit_model.pth` and forgotten, so that memory holds little more than the largest tensor.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config
from tqdm import tqdm

from workflows import litgpt_api
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import SIZES, WEIGHTS, checked, write_config
from workflows.errors import UserError, report_all
from workflows.files import write_json, write_text
from workflows.prompt_style import write_prompt_style
from workflows.weight_writer import weight_writer

_COPY = {
    "LlamaForCausalLM": litgpt_api.copy_weights_hf_llama,
    "Qwen2ForCausalLM": litgpt_api.copy_weights_qwen_2_5,
}
"""The architectures we convert, and LitGPT's function that holds the map of names."""
_READ = (
    *SIZES,
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
)
"""The keys of `config.json` that matter here; transformers acts on others too (`num_labels` makes so many names)."""
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read only when asked for.

    Attributes:
        shape: Its shape, known from the file's header.
        dtype: The type that it is stored in (float32 if it is quantized).
        read_into: Reads it into a contiguous tensor of the same shape, converting to that one's type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_into: Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class Source:
    """A model in Hugging Face's terms.

    Attributes:
        place: Where it came from, for messages.
        config: The contents of `config.json`.
        tensors: Weights under Hugging Face's names.
        tokenizer_json: The text of `tokenizer.json`.
        tokenizer_config: The contents of `tokenizer_config.json`.
        generation_config: The contents of `generation_config.json`.
        chat_template: The Jinja text, or None for a base model.
    """

    place: str
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]
    chat_template: str | None


def litgpt_config(hf_config: dict[str, Any], name: str, place: str) -> Config:
    """LitGPT's configuration of a model, computed from its `config.json` and not from a name that LitGPT knows.

    Args:
        hf_config: The contents of `config.json`.
        name: The model's name, for LitGPT's messages; adapted where LitGPT would read more into it.
        place: Where the file came from, for messages.

    Returns:
        A `Config` with the context length, rotary base, head size and vocabulary of the checkpoint (no padding).

    Raises:
        UserError: If the architecture, or something in it, is not one that we convert.
    """
    from transformers import LlamaConfig, Qwen2Config

    architectures = hf_config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    architecture = first if isinstance(first, str) else f"of type {hf_config.get('model_type')!r:.40}"
    if architecture not in _COPY:
        raise UserError(
            f"{place}: the architecture {architecture} is not supported. Supported are "
            f"{' and '.join(_COPY)} (Llama 2 and 3, SmolLM2, Qwen2 and 2.5, and models distilled into them)."
        )
    if "quantization_config" in hf_config:
        raise UserError(f"{place} holds quantized weights; use the model's unquantized checkpoint (bf16 safetensors).")
    report_all(
        [
            f"{place}: config.json is damaged: {key} is {hf_config[key]!r:.40}, not a whole number from 1 to {most:,}."
            for key, (_, most) in SIZES.items()
            if hf_config.get(key) is not None and not (type(hf_config[key]) is int and 0 < hf_config[key] <= most)
        ]
    )
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    # transformers' own classes fill in the defaults and bring both generations of rotary settings into one form.
    try:
        hf = (Qwen2Config if is_qwen2 else LlamaConfig)(**{key: hf_config[key] for key in _READ if key in hf_config})
    except Exception as e:  # huggingface_hub's strict dataclasses raise several classes for a field of the wrong type
        raise UserError(f"{place}: config.json is not a valid configuration of {architecture}: {e}") from None
    try:
        return _from_hf(hf, name, place, is_qwen2)
    except (AssertionError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as e:
        raise UserError(f"{place}: the settings in config.json do not fit together ({e}).") from None


def _from_hf(hf: Any, name: str, place: str, is_qwen2: bool) -> Config:
    rope = hf.rope_parameters
    rope_type = rope.get("rope_type", "default")
    problems = []
    for setting, bad in {
        f"activation {hf.hidden_act!r} (only silu)": hf.hidden_act != "silu",
        "attention_bias in a Llama": not is_qwen2 and getattr(hf, "attention_bias", False),
        "mlp_bias": getattr(hf, "mlp_bias", False),
        "use_sliding_window": getattr(hf, "use_sliding_window", False),
        "partial rotary embeddings": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"rope scaling of type {rope_type!r} (only default, linear, llama3)": rope_type
        not in ("default", "linear", "llama3"),
    }.items():
        if bad:
            problems.append(f"{place}: config.json asks for {setting}, which is not supported.")
    report_all(problems)

    adjustments = None
    if rope_type == "llama3":
        adjustments = {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
        adjustments["original_max_seq_len"] = rope["original_max_position_embeddings"]
    base = float(rope["rope_theta"])
    factor = rope["factor"] if rope_type == "linear" else 1
    numbers = [base, hf.rms_norm_eps, factor, *(adjustments or {}).values()]
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ValueError(f"rotary settings {rope}, rms_norm_eps {hf.rms_norm_eps}")
    config = Config(
        name=_litgpt_name(name, is_qwen2),
        block_size=hf.max_position_embeddings,
        n_layer=hf.num_hidden_layers,
        n_embd=hf.hidden_size,
        n_head=hf.num_attention_heads,
        n_query_groups=hf.num_key_value_heads,
        head_size=getattr(hf, "head_dim", None),
        vocab_size=hf.vocab_size,
        padded_vocab_size=hf.vocab_size,
        padding_multiple=1,
        norm_class_name="RMSNorm",
        norm_eps=hf.rms_norm_eps,
        parallel_residual=False,
        bias=False,
        attn_bias=is_qwen2,
        mlp_class_name="LLaMAMLP",
        intermediate_size=hf.intermediate_size,
        rotary_percentage=1.0,
        rope_base=int(base) if base.is_integer() and base < 1 << 63 else base,
        rope_condense_ratio=factor,
        rope_adjustments=adjustments,
    )
    return checked(config)


def _litgpt_name(name: str, is_qwen2: bool) -> str:
    """A name in which LitGPT's code, which branches on parts of names, finds the right architecture and no other."""
    tame = re.sub("gemma|olmo|falcon", lambda found: found[0].upper(), name, flags=re.IGNORECASE)
    starts_as_qwen2 = name.lower().startswith("qwen2.5")
    if is_qwen2:
        return tame if starts_as_qwen2 else f"Qwen2.5-{tame}"
    return f"Llama-{tame}" if name.lower().startswith(("qw", "phi")) else tame


def write_checkpoint(source: Source, output: Path, name: str, dtype: torch.dtype | None = None) -> None:
    """Write a complete LitGPT checkpoint directory, but for `provenance.json`.

    Args:
        source: The model to convert.
        output: An existing folder, empty.
        name: The model's name for `model_config.yaml`.
        dtype: The type of the weights; None keeps the stored one (float32 for quantized or mixed matrices).

    Raises:
        UserError: If the model cannot be converted; the weights are checked against the architecture before the first
            byte is written.
    """
    config = litgpt_config(source.config, name, source.place)
    tied = bool(source.config.get("tie_word_embeddings", False))
    dtype = dtype or _stored_dtype(source)
    outputs = _plan(source, config, tied)

    write_config(config, output)
    write_json(output / "config.json", _with_dtype(source.config, dtype))
    write_json(output / "generation_config.json", source.generation_config)
    write_text(output / "tokenizer.json", source.tokenizer_json)
    _write_prompt_files(source, output)
    _write_weights(output / WEIGHTS, outputs, dtype, tied)


def _stored_dtype(source: Source) -> torch.dtype:
    stored = {tensor.dtype for tensor in source.tensors.values() if len(tensor.shape) > 1}
    kept = len(stored) == 1 and stored <= {torch.float16, torch.bfloat16}
    return stored.pop() if kept else torch.float32


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    return {**kept, "torch_dtype": str(dtype).removeprefix("torch.")}  # the older key, which every version reads


@dataclass(frozen=True)
class _Output:
    """One tensor of `lit_model.pth`, and the source tensors that are stacked along its rows to make it."""

    name: str
    shape: tuple[int, ...]
    parts: list[LazyTensor]


def _plan(source: Source, config: Config, tied: bool) -> list[_Output]:
    """Rehearse the conversion without data: every name known, none missing, every shape right.

    LitGPT's functions get tensors without contents and so reveal where each one goes.
    """
    tensors = {n: t for n, t in source.tensors.items() if not (tied and n == _HEAD) and not n.endswith(".inv_freq")}
    copy = _COPY[source.config["architectures"][0]]
    outputs, problems = [], []
    for group in _groups(list(tensors)):
        # LitGPT's functions tie the head at the end of every call if it is absent; the two None keep them from it.
        converted: dict[str, Any] = {_EMBEDDING: None, _HEAD: None}
        try:
            copy(config, {}, converted, {name: torch.empty(tensors[name].shape, device="meta") for name in group})
            ((name, tensor),) = ((name, tensor) for name, tensor in converted.items() if tensor is not None)
        except (KeyError, ValueError, IndexError, RuntimeError):  # no such name; query without key; widths differ
            problems.append(f"{', '.join(group)}: not the weights of a layer of this architecture")
            continue
        outputs.append(_Output(name, tuple(tensor.shape), [tensors[name] for name in group]))

    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    if tied:
        del expected[_HEAD]
    made = {output.name for output in outputs}
    problems += [f"{name} is missing" for name in expected if name not in made]
    problems += [
        f"{output.name} has shape {output.shape}, expected {expected.get(output.name)}"
        for output in outputs
        if output.shape != expected.get(output.name)
    ]
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:8])
        more = f"\n  - and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{source.place}: the weights do not fit config.json; is a file missing?\n{shown}{more}")
    return outputs


def _groups(names: list[str]) -> list[list[str]]:
    """Names that make one output tensor: query, key and value of a layer (in this order) together, others alone."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: name.replace(".k_proj.", ".r_proj.")):  # q, r, v: key after query
        groups.setdefault(re.sub(r"\.[qkv]_proj\.", ".qkv.", name), []).append(name)
    return list(groups.values())


def _write_weights(file: Path, outputs: list[_Output], dtype: torch.dtype, tied: bool) -> None:
    with weight_writer(file, max(math.prod(output.shape) for output in outputs) * dtype.itemsize) as writer:
        for output in tqdm(outputs, desc="converting", unit="tensor", disable=None):
            tensor = writer.blank(output.shape, dtype)
            row = 0
            for part in output.parts:
                part.read_into(tensor[row : row + part.shape[0]])
                row += part.shape[0]
            writer.store(output.name, tensor)
        if tied:
            writer.tie(_HEAD, _EMBEDDING)


def _write_prompt_files(source: Source, output: Path) -> None:
    config = dict(source.tokenizer_config)
    config["tokenizer_class"] = config.get("tokenizer_class") or "PreTrainedTokenizerFast"
    config.pop("chat_template", None)
    if source.chat_template is None:
        write_json(output / "tokenizer_config.json", config)
        print(f"{source.place} has no chat template: it is a base model. Our steps need an instruction-tuned one.")
        return
    write_text(output / "chat_template.jinja", source.chat_template)
    write_json(output / "tokenizer_config.json", config)
    template = ChatTemplate.from_checkpoint(output)
    # LitGPT strips a leading BOS from every prompt when this is false, and adds it only where absent when true.
    opening = template.render([{"role": "user", "content": "?"}], add_generation_prompt=True)
    config["add_bos_token"] = bool(template.bos_token) and opening.startswith(template.bos_token)
    write_json(output / "tokenizer_config.json", config)
    write_prompt_style(output, template)
