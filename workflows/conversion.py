"""From a model in Hugging Face's terms to a LitGPT checkpoint directory, one tensor at a time.

Readers (`hf_reader.py`, `gguf_reader.py`) describe a model as a `Source`: its configuration, its small files, and its
tensors as promises that are kept one by one. Each output tensor is read, brought into LitGPT's shape by LitGPT's own
name maps, written to `lit_model.pth` and forgotten, so that memory holds little more than the largest tensor.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config
from tokenizers import Tokenizer
from tqdm import tqdm

from workflows import litgpt_api
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import SIZES, WEIGHTS, checked, write_config
from workflows.checkpoint_checks import checkpoint_problems, unembedded_tokens, unnamed_turn_end
from workflows.errors import UserError, report_all
from workflows.files import write_json, write_text
from workflows.prompt_style import write_prompt_files
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
_EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
HF_EMBEDDING = "model.embed_tokens.weight"


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


def tie_by_tensors(source: Source) -> Source:
    """Return the model with its head and embedding tied exactly where their weights are the same.

    `tie_word_embeddings` in `config.json` can be wrong. As in transformers, two tensors that differ are not tied, and
    where only one of the two is in the file it serves as both. In the result the flag is right, and a tied model has no
    `lm_head.weight`.

    Raises:
        UserError: If the flag is not a boolean.
    """
    tied = source.config.get("tie_word_embeddings")
    if not isinstance(tied, bool | None):
        raise UserError(
            f"{source.place}: config.json is damaged: tie_word_embeddings is {tied!r:.40}, not true or false."
        )
    tensors = dict(source.tensors)
    if not tied or HEAD not in tensors:
        return source
    if HF_EMBEDDING not in tensors:
        tensors[HF_EMBEDDING] = tensors.pop(HEAD)
    elif _same(tensors[HEAD], tensors[HF_EMBEDDING]):
        del tensors[HEAD]
    else:
        tied = False
        print(
            f"{source.place}: the weights of the head (lm_head) differ from the embedding's, although config.json "
            "says that they are tied. Both are kept, and the checkpoint is untied."
        )
    return dataclasses.replace(source, config={**source.config, "tie_word_embeddings": tied}, tensors=tensors)


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    """Return whether two tensors hold the same values; they are read only if their shapes are equal."""
    if one.shape != other.shape:
        return False
    read = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (one, other)]
    for tensor, values in zip((one, other), read, strict=True):
        tensor.read_into(values)
    return torch.equal(*read)


def write_checkpoint(
    source: Source, output: Path, name: str, dtype: torch.dtype | None = None, stop: Sequence[str] = ()
) -> None:
    """Write a complete LitGPT checkpoint directory, but for `provenance.json`.

    Args:
        source: The model to convert.
        output: An existing folder, empty.
        name: The model's name for `model_config.yaml`.
        dtype: The type of the weights; None keeps the stored one (float32 for quantized or mixed matrices).
        stop: Tokens that end an answer, besides those that the source names.

    Raises:
        UserError: If the model cannot be converted or trained afterwards. Architecture, shapes, tokenizer and template
            are checked before the first byte of the weights is written.
    """
    source = tie_by_tensors(source)
    config = litgpt_config(source.config, name, source.place)
    tied = bool(source.config.get("tie_word_embeddings", False))
    dtype = dtype or _stored_dtype(source)
    outputs = _plan(source, config, tied)

    write_config(config, output)
    write_json(output / "config.json", _with_dtype(source.config, dtype))
    write_text(output / "tokenizer.json", source.tokenizer_json)
    try:
        _write_prompt_files(source, output, stop)
        problems = checkpoint_problems(output, place=source.place, needs_template=source.chat_template is not None)
        report_all(problems.training)
    except UserError as e:  # the unfinished folder's name would mean nothing to a reader
        raise UserError(str(e).replace(str(output), source.place)) from None
    if notes := problems.notes_on(source.place):
        print(notes)
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
    tensors = {n: t for n, t in source.tensors.items() if not (tied and n == HEAD) and not n.endswith(".inv_freq")}
    copy = _COPY[source.config["architectures"][0]]
    outputs, problems = [], []
    for group in _groups(list(tensors)):
        # LitGPT's functions tie the head at the end of every call if it is absent; the two None keep them from it.
        converted: dict[str, Any] = {_EMBEDDING: None, HEAD: None}
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
        del expected[HEAD]
    made = {output.name for output in outputs}
    problems += [f"{name} is missing" for name in expected if name not in made]
    problems += [
        f"{output.name} has shape {output.shape}, expected {expected[output.name]}"
        if output.name in expected
        else f"{output.name} has no place in a model of this config.json"
        for output in outputs
        if output.shape != expected.get(output.name)
    ]
    if problems:
        problems = _contradictions(source, config) + problems
        shown = "\n".join(f"  - {problem}" for problem in problems[:8])
        more = f"\n  - and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{source.place}: the weights do not fit config.json; is a file missing?\n{shown}{more}")
    return outputs


def _contradictions(source: Source, config: Config) -> list[str]:
    """List what `config.json` says otherwise than the weights do, in its own terms."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    layers = [int(layer[1]) for name in shapes if (layer := re.match(r"model\.layers\.(\d{1,6})\.", name))]
    first = f"model.layers.{min(layers, default=0)}."
    rows = {
        "vocab_size": (config.vocab_size, HF_EMBEDDING, 0),
        "hidden_size": (config.n_embd, HF_EMBEDDING, 1),
        "intermediate_size": (config.intermediate_size, f"{first}mlp.gate_proj.weight", 0),
        "num_attention_heads * head_dim": (config.n_head * config.head_size, f"{first}self_attn.q_proj.weight", 0),
        "num_key_value_heads * head_dim": (
            config.n_query_groups * config.head_size,
            f"{first}self_attn.k_proj.weight",
            0,
        ),
    }
    found = [
        f"{key} is {wanted} in the configuration, but {shapes[name][dimension]} by the shape of {name}"
        for key, (wanted, name, dimension) in rows.items()
        if len(shapes.get(name, ())) == 2 and shapes[name][dimension] != wanted
    ]
    if layers and max(layers) + 1 != config.n_layer:
        found.append(
            f"num_hidden_layers is {config.n_layer} in the configuration, but the weights have {max(layers) + 1}"
        )
    if HEAD not in shapes and not source.config.get("tie_word_embeddings", False):
        found.append(
            f"the configuration says that the head is not tied to the embedding, but the weights have no {HEAD}; if "
            "this model is tied, set tie_word_embeddings to true in its config.json"
        )
    biases = [name for name in shapes if re.search(r"_proj\.bias$", name)]
    if biases and not config.attn_bias:
        found.append(f"the weights have biases ({biases[0]}, …), which a model of this configuration does not have")
    return found


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
            if not all(math.isfinite(end) for end in torch.aminmax(tensor)):
                cure = (
                    "Use --dtype bfloat16 or float32, whose range is larger."
                    if dtype == torch.float16
                    else "The file is damaged, or the model's training diverged; get another copy or version of it."
                )
                raise UserError(f"{output.name} has values that are not finite numbers in {dtype}. {cure}")
            writer.store(output.name, tensor)
        if tied:
            writer.tie(HEAD, _EMBEDDING)


def _write_prompt_files(source: Source, output: Path, stop: Sequence[str]) -> None:
    """Write tokenizer_config.json, generation_config.json, the chat template and LitGPT's prompt style."""
    config = dict(source.tokenizer_config)
    config["tokenizer_class"] = config.get("tokenizer_class") or "PreTrainedTokenizerFast"
    config.pop("chat_template", None)
    write_json(output / "tokenizer_config.json", config)
    generation = dict(source.generation_config)
    if stop:
        generation["eos_token_id"] = _with_stops(generation, source.tokenizer_json, stop)
    write_json(output / "generation_config.json", generation)
    if source.chat_template is None:
        print(
            f"{source.place} has no chat template: it is a base model. Training and export need one: give a Jinja file "
            "with --chat_template, here or to `lora`."
        )
        return
    write_text(output / "chat_template.jinja", source.chat_template)
    template = ChatTemplate.from_checkpoint(output)
    report_all(unembedded_tokens(template))
    if (token := unnamed_turn_end(template)) is not None:
        print(
            f"{source.place}: the chat template ends a turn with {token}, which is none of the checkpoint's stop "
            "tokens; it becomes one (in generation_config.json)."
        )
        generation["eos_token_id"] = _with_stops(generation, source.tokenizer_json, [token])
        write_json(output / "generation_config.json", generation)
        template = ChatTemplate.from_checkpoint(output)
    write_prompt_files(output, template)


def _with_stops(generation: dict[str, Any], tokenizer_json: str, stop: Sequence[str]) -> int | list[int]:
    """Return `eos_token_id` of generation_config.json with the ids of more tokens."""
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as e:  # tokenizers raises bare Exception for every malformed text
        raise UserError(f"tokenizer.json is not a readable tokenizer ({e}). Download the model again.") from None
    ids = generation.get("eos_token_id")
    ids = list(ids) if isinstance(ids, list) else [] if ids is None else [ids]
    for text in stop:
        if (token_id := tokenizer.token_to_id(text)) is None:
            specials = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
            raise UserError(
                f"--stop {text!r} is not one token of this tokenizer. Its special tokens: {', '.join(specials[:40])}."
            )
        ids.append(token_id)
    ids = list(dict.fromkeys(ids))
    return ids if len(ids) > 1 else ids[0]
