"""A folder with a LoRA adapter in PEFT's format as a model: its base with the adapter merged into it.

Each adapted weight is read, updated in float32 and given in the base's type when the conversion asks for it, so that
memory holds no second model. What is understood: LoRA of any linear layer and of the embedding, ranks and alphas of
their own (`rank_pattern`, `alpha_pattern`), rsLoRA, DoRA of linear layers, trained biases, modules saved whole
(`modules_to_save`, resized embeddings among them) and trained tokens. Any other setting of `adapter_config.json` that
changes the model is refused by its name.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch

from workflows.conversion import HEAD, HF_EMBEDDING, LazyTensor, Source, tie_by_tensors
from workflows.errors import UserError, report_all
from workflows.files import read_json
from workflows.hf_reader import read_chat_template, read_tensors, read_tokenizer_config

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_READ = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "init_lora_weights",
}
_WITHOUT_EFFECT = {
    # the tensors' names say the same
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    # training only
    "lora_dropout",
    "inference_mode",
    "ensure_weight_tying",
    "eva_config",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
    # of PEFT itself, or of another setting that is refused
    "auto_mapping",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
}
_BASE_KEPT = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base's weights as they are; the others train against weights of their own."""
_LORA = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")


def is_adapter(directory: Path) -> bool:
    """Return whether a folder holds an adapter and no whole model; of a folder with both, the model is taken.

    Raises:
        UserError: If it holds neither, but subfolders with adapters.
    """
    more = sorted(file.parent.name for file in directory.glob(f"*/{ADAPTER_CONFIG}"))
    if not (directory / ADAPTER_CONFIG).is_file():
        if more and not (directory / "config.json").is_file():
            raise UserError(f"{directory} holds adapters in subfolders; give one of them: {', '.join(more[:20])}.")
        return False
    if any(directory.glob("model*.safetensors*")) or any(directory.glob("pytorch_model*.bin*")):
        print(f"{directory} holds a whole model and an adapter ({ADAPTER_CONFIG}); the adapter is left out.")
        return False
    if more:
        print(f"{directory} holds further adapters in subfolders ({', '.join(more[:20])}); they are left out.")
    return True


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Read `adapter_config.json`, and refuse an adapter that cannot be merged.

    Raises:
        UserError: If it is malformed, or asks for something that is not supported; all of it is named.
    """
    file = directory / ADAPTER_CONFIG
    config = read_json(file)
    base = config.get("base_model_name_or_path")
    if "peft_type" not in config:
        raise UserError(
            f"{file} names no peft_type, so the adapter is not in PEFT's format. Merge it into its base with the tool "
            "that made it (mlx-lm: `mlx_lm.fuse`), and give the saved model."
        )
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{directory} is a PEFT adapter of the type {config.get('peft_type')!r:.40} for {base!r:.200}; only LoRA "
            "adapters can be merged. Merge it with PEFT (merge_and_unload) and give the saved model."
        )
    bad = [
        f"{file}: {key} is {config.get(key)!r:.60}, not {wanted}."
        for key, wanted, fits in (
            ("task_type", "'CAUSAL_LM'", config.get("task_type") in (None, "CAUSAL_LM")),
            ("r", "a rank of at least 1", type(config.get("r")) is int and config["r"] >= 1),
            ("lora_alpha", "a number", _is_number(config.get("lora_alpha"))),
            ("rank_pattern", "ranks by module", _is_pattern(config.get("rank_pattern"))),
            ("alpha_pattern", "alphas by module", _is_pattern(config.get("alpha_pattern"))),
            ("modules_to_save", "a list of names", _is_names(config.get("modules_to_save"))),
            ("base_model_name_or_path", "a name", isinstance(base, str | None)),
            ("revision", "a name", isinstance(config.get("revision"), str | None)),
        )
        if not fits
    ]
    advice = "which is not supported. Merge it with PEFT (merge_and_unload) and give the saved model."
    bad += [
        f"{file} asks for {key} {value!r:.60}, {advice}"
        for key, value in config.items()
        if key not in _READ | _WITHOUT_EFFECT and value not in (None, False, {}, [])
    ]
    if config.get("init_lora_weights", True) not in _BASE_KEPT:
        bad.append(
            f"{file} asks for init_lora_weights {config['init_lora_weights']!r:.40}, which changes the base's weights, "
            + advice
        )
    report_all(bad)
    return config


def merge_adapter(directory: Path, base: Source) -> Source:
    """Return a base model with an adapter merged into it.

    Tokenizer and chat template are the adapter's where its folder has them: it was trained with those.

    Args:
        directory: The folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
        base: The model that it was trained on.

    Raises:
        UserError: If a file is missing or malformed, the adapter does not fit the base, or it cannot be merged.
    """
    config = read_adapter_config(directory)
    files = [directory / name for name in _WEIGHTS if (directory / name).is_file()]
    if not files:
        raise UserError(f"{directory} has an {ADAPTER_CONFIG}, but no {' or '.join(_WEIGHTS)}.")
    base = tie_by_tensors(base)
    loras, tokens, whole = _sort(directory, config, read_tensors(files[0]))
    tensors = _untied(directory, base, loras, tokens, whole)

    unknown = [name for name in whole if name not in tensors]
    unknown += [module for module in (*loras, *tokens) if f"{module}.weight" not in tensors]
    if unknown:
        raise UserError(
            f"{directory} does not fit its base {base.place}, which has no {', '.join(unknown[:5])}. Name the right "
            "base with --base."
        )
    # In the base's type: one matrix that the adapter keeps in float32 is no reason to make the model a float32 one.
    tensors |= {name: dataclasses.replace(tensor, dtype=tensors[name].dtype) for name, tensor in whole.items()}
    rows = tensors[HF_EMBEDDING].shape[0]
    for module, parts in loras.items():
        name = f"{module}.weight"
        tensors[name] = _with_lora(directory, module, tensors[name], parts, config)
    for module, delta in tokens.items():
        name = f"{module}.weight"
        tensors[name] = _with_tokens(directory, tensors[name], delta, _indices(directory, config, module))
    merged = dataclasses.replace(
        base,
        place=str(directory),
        config={**base.config, "vocab_size": rows},
        tensors=tensors,
        **_text_files(directory),
    )
    return tie_by_tensors(merged)


def _sort(
    directory: Path, config: dict[str, Any], tensors: dict[str, LazyTensor]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor], dict[str, LazyTensor]]:
    """Sort an adapter's tensors: LoRA's parts by module, trained tokens by module, and whole tensors by name."""
    loras: dict[str, dict[str, torch.Tensor]] = {}
    tokens: dict[str, torch.Tensor] = {}
    whole: dict[str, LazyTensor] = {}
    odd = []
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(_PREFIX)
        if name == full_name:
            odd.append(full_name)
        elif found := _LORA.fullmatch(name):
            loras.setdefault(found[1], {})[found[2]] = _read(tensor)
        elif found := _TOKENS.fullmatch(name):
            tokens[found[1]] = _read(tensor)
        else:
            whole[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor
    pairs = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
    odd += [module for module, parts in loras.items() if set(parts) - {"lora_magnitude_vector"} not in pairs]
    odd += [
        f"{module} (DoRA of an embedding)"
        for module, parts in loras.items()
        if {"lora_magnitude_vector", "lora_embedding_A"} <= set(parts)
    ]
    if config.get("use_dora"):
        odd += [f"{module} (no magnitudes)" for module, parts in loras.items() if "lora_magnitude_vector" not in parts]
    for module in config.get("modules_to_save") or []:
        if not any(f".{module}." in f".{name}" for name in whole):
            odd.append(f"{module} (in modules_to_save, but not in the file)")
    if config.get("trainable_token_indices") and not tokens:
        odd.append("trainable_token_indices (not in the file)")
    if odd or not (loras or tokens or whole):
        raise UserError(
            f"{directory}: its weights are not those of a LoRA adapter that can be merged: "
            f"{', '.join(odd[:5]) or 'there are none'}. Merge it with PEFT (merge_and_unload) and give the saved model."
        )
    return loras, tokens, whole


def _untied(
    directory: Path,
    base: Source,
    loras: dict[str, dict[str, torch.Tensor]],
    tokens: dict[str, torch.Tensor],
    whole: dict[str, LazyTensor],
) -> dict[str, LazyTensor]:
    """Return the base's tensors, with a head of its own where base ties it and the adapter changes one of the two.

    PEFT adapts the two apart, and leaves the other one as it was. Two cases stay tied: trained tokens, which PEFT
    shares between both, and an embedding with another number of rows, which an old head would not fit.
    """
    tensors = dict(base.tensors)
    embedding, head = HF_EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")
    if HEAD in tensors or HF_EMBEDDING not in tensors:
        return tensors
    resized = HF_EMBEDDING in whole and whole[HF_EMBEDDING].shape != tensors[HF_EMBEDDING].shape
    apart = HEAD in whole or head in loras or embedding in loras or (HF_EMBEDDING in whole and not resized)
    if tokens and (apart or head in tokens):
        raise UserError(
            f"{directory} trains tokens (trainable_token_indices) and the head or embedding of {base.place}, whose "
            "head is its embedding. Merge it with PEFT (merge_and_unload) and give the saved model."
        )
    return {**tensors, HEAD: tensors[HF_EMBEDDING]} if apart else tensors


def _with_lora(
    directory: Path, module: str, base: LazyTensor, parts: dict[str, torch.Tensor], config: dict[str, Any]
) -> LazyTensor:
    """Return W + s B A, with DoRA's magnitudes m scaled to rows of the lengths m (arXiv 2402.09353, eq. 5)."""
    is_embedding = "lora_embedding_A" in parts
    a, b = (parts[f"lora_embedding_{side}" if is_embedding else f"lora_{side}"] for side in "AB")
    magnitudes = parts.get("lora_magnitude_vector")
    shape = (*a.shape[1:], *b.shape[:1]) if is_embedding else (*b.shape[:1], *a.shape[1:])
    fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] and shape == base.shape
    if not fits or (magnitudes is not None and magnitudes.shape != base.shape[:1]):
        raise UserError(
            f"{directory}: {module} has an adapter of the shapes A {tuple(a.shape)} and B {tuple(b.shape)}, which do "
            f"not fit the base's weight of {base.shape}. Name the right base with --base."
        )
    rank = int(_by_pattern(directory, config.get("rank_pattern"), module, config["r"]))
    if a.shape[0] != rank:
        raise UserError(f"{directory}: {module} has an adapter of rank {a.shape[0]}, but {ADAPTER_CONFIG} says {rank}.")
    alpha = _by_pattern(directory, config.get("alpha_pattern"), module, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def read_into(out: torch.Tensor) -> None:
        weight = torch.empty(base.shape)
        base.read_into(weight)
        update = torch.mm(b, a).mul_(scaling)
        weight += update.T if is_embedding else update
        if magnitudes is not None:
            weight *= (magnitudes / weight.norm(dim=1))[:, None]
        out.copy_(weight)

    return dataclasses.replace(base, read_into=read_into)


def _with_tokens(directory: Path, base: LazyTensor, rows: torch.Tensor, indices: list[int]) -> LazyTensor:
    """Return a matrix with some of its rows replaced: PEFT's "delta" holds the trained rows themselves."""
    if rows.shape != (len(indices), *base.shape[1:]) or not all(0 <= i < base.shape[0] for i in indices):
        raise UserError(f"{directory}: its trained tokens of {tuple(rows.shape)} do not fit trainable_token_indices.")

    def read_into(out: torch.Tensor) -> None:
        base.read_into(out)
        out[indices] = rows.to(out.dtype)

    return dataclasses.replace(base, read_into=read_into)


def _indices(directory: Path, config: dict[str, Any], module: str) -> list[int]:
    """Return the ids of a module's trained tokens; the setting is a list for the embedding, or lists by module."""
    setting = config.get("trainable_token_indices")
    if isinstance(setting, dict):
        found = [ids for name, ids in setting.items() if f".{module}".endswith(f".{name}")]
        setting = found[0] if len(found) == 1 else None
    if not isinstance(setting, list) or not all(type(i) is int for i in setting):
        raise UserError(f"{directory / ADAPTER_CONFIG} does not say which tokens of {module} are trained.")
    return setting


def _by_pattern(directory: Path, patterns: dict[str, float] | None, module: str, default: float) -> float:
    """Return the value of the first pattern that the end of a module's name matches, as PEFT's get_pattern_key does."""
    for pattern, value in (patterns or {}).items():
        # Repeated groups, and many repetitions, could take for ever on a name that does not match.
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
            raise UserError(f"{directory / ADAPTER_CONFIG}: the pattern {pattern!r:.60} is not supported.")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as e:
            raise UserError(
                f"{directory / ADAPTER_CONFIG}: {pattern!r:.60} is not a regular expression ({e})."
            ) from None
    return default


def _text_files(directory: Path) -> dict[str, Any]:
    """Return the tokenizer and chat template of an adapter's folder, as far as it has them, as fields of `Source`."""
    found: dict[str, Any] = {}
    config: dict[str, Any] = {}
    if (file := directory / "tokenizer.json").is_file():
        config = read_tokenizer_config(directory)
        found = {"tokenizer_json": file.read_text(encoding="utf-8"), "tokenizer_config": config}
    if (template := read_chat_template(directory, config)) is not None:
        found["chat_template"] = template
    return found


def _read(tensor: LazyTensor) -> torch.Tensor:
    values = torch.empty(tensor.shape)
    tensor.read_into(values)
    return values


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(_is_number(number) and number > 0 for number in value.values())
    )


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))
