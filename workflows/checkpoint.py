"""The checkpoint directory: the only thing that model steps pass to each other, always in LitGPT's own shape.

`lit_model.pth` (merged weights), `model_config.yaml` (LitGPT's Config), the Hugging Face files that describe the model
and its tokenizer, `chat_template.jinja`, `prompt_style.yaml` for LitGPT's CLI, and three files about how it came to be:
`hyperparameters.yaml`, `metrics.json`, `provenance.json`. A LoRA step adds `lit_model.pth.lora`.
"""

import dataclasses
import importlib.metadata
import math
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from workflows.errors import UserError
from workflows.evaluation.compare import wilson_interval
from workflows.files import read_json, read_text, sha256, write_json, write_text
from workflows.measure import hardware
from workflows.untrusted import parse_yaml

if TYPE_CHECKING:
    from litgpt.config import Config

WEIGHTS = "lit_model.pth"
LORA_WEIGHTS = "lit_model.pth.lora"
PROVENANCE = "provenance.json"
COMPANIONS = (
    "config.json",
    "model_config.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "prompt_style.yaml",
)
"""Files that a training step hands on unchanged."""
REQUIRED = ("config.json", "model_config.yaml", "tokenizer.json", "tokenizer_config.json")
SIZES = {
    "hidden_size": ("n_embd", 1 << 20),
    "intermediate_size": ("intermediate_size", 1 << 24),
    "num_hidden_layers": ("n_layer", 1 << 10),
    "num_attention_heads": ("n_head", 1 << 16),
    "num_key_value_heads": ("n_query_groups", 1 << 16),
    "head_dim": ("head_size", 1 << 16),
    "vocab_size": ("padded_vocab_size", 1 << 24),
    "max_position_embeddings": ("block_size", 1 << 24),
}
"""Sizes by their names in `config.json`: LitGPT's names, and limits far above those of any model. What a file asks for
is allocated further down, whoever wrote it."""
VERSIONED = ("torch", "litgpt", "lightning", "transformers", "tokenizers", "lm-eval", "datasets", "jsonargparse")
"""Packages whose versions are written into every provenance.json."""


def check_checkpoint_dir(checkpoint_dir: Path | str, weights: str = WEIGHTS) -> Path:
    """Make sure that a checkpoint directory is there and complete.

    Args:
        checkpoint_dir: The folder to check.
        weights: The weights file that must be in it.

    Returns:
        The folder as a `Path`.

    Raises:
        UserError: If it is missing, half-written, or not a LitGPT checkpoint; with the command that mends it.
    """
    directory = Path(checkpoint_dir)
    if not directory.is_dir():
        known = sorted(str(path.parent) for path in Path("checkpoints").glob(f"*/*/{WEIGHTS}"))
        raise UserError(
            f"There is no checkpoint at {directory}. Get one with `make download MODEL=…`"
            + (f"; here are: {', '.join(known)}." if known else ".")
        )
    missing = [name for name in (*REQUIRED, weights) if not (directory / name).is_file()]
    if missing:
        if (directory / "adapter_config.json").is_file() and WEIGHTS in missing:
            base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
            raise UserError(
                f"{directory} is an adapter in PEFT's format for {base}, not a model: merge the two with "
                f"`make download MODEL={directory}`."
            )
        hint = "is in Hugging Face's form: convert it with `make download MODEL=" + str(directory) + "`"
        if any(directory.glob("*.safetensors")) and WEIGHTS in missing:
            raise UserError(f"{directory} {hint}.")
        raise UserError(
            f"{directory} is not a complete checkpoint, it lacks {', '.join(missing)}. "
            "Run the step that makes it (`make download`, `make lora`) again."
        )
    return directory


def load_config(checkpoint_dir: Path, **overrides: Any) -> Any:
    """LitGPT's `Config` of a checkpoint directory.

    Args:
        checkpoint_dir: A folder with `model_config.yaml`.
        **overrides: Fields to set; with any `lora_*` field the result is a `litgpt.lora.Config`.

    Raises:
        UserError: If the file is malformed or names an unknown field.
    """
    file = checkpoint_dir / "model_config.yaml"
    # Here, since LitGPT takes seconds to load, and `chat` and `ask` need none of it.
    if any(name.startswith("lora_") for name in overrides):
        from litgpt.lora import Config as config_class
    else:
        from litgpt.config import Config as config_class
    try:
        return checked(config_class(**{**parse_yaml(read_text(file)), **overrides}))
    except (yaml.YAMLError, TypeError, ValueError, AssertionError, AttributeError, KeyError, ArithmeticError) as e:
        raise UserError(f"{file} is not a LitGPT model configuration ({e}). Download the checkpoint again.") from None


def checked(config: Any) -> Any:
    """The configuration, if its sizes can be those of a model.

    Raises:
        ValueError: If one of them is none.
    """
    for name, most in SIZES.values():
        if type(size := getattr(config, name)) is not int or not 0 < size <= most:
            raise ValueError(f"{name} is {size!r:.40}, not a whole number from 1 to {most:,}")
    return config


def write_config(config: "Config", checkpoint_dir: Path) -> None:
    """Write LitGPT's `model_config.yaml`."""
    write_text(checkpoint_dir / "model_config.yaml", yaml.safe_dump(dataclasses.asdict(config)))


def load_weights(checkpoint_dir: Path, name: str = WEIGHTS) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint, mapped from the file: memory is used only for what is read.

    Raises:
        UserError: If the file is cut short, or is a pickle with anything but tensors in it.
    """
    file = checkpoint_dir / name
    try:
        state_dict = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"{file} does not exist. Run the step that makes it again.") from None
    except Exception as e:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for what is no checkpoint
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"{file} cannot be read as a checkpoint of tensors: {reason}\n"
            "It is cut short or holds more than tensors. Delete its folder and run the step that makes it again."
        ) from None
    weights: Any = state_dict.get("model", state_dict) if isinstance(state_dict, dict) else None
    if not is_state_dict(weights) or not all(tensor.is_floating_point() for tensor in weights.values()):
        raise UserError(
            f"{file} does not hold weights by name. Delete its folder and run the step that makes it again."
        )
    return weights


def is_state_dict(value: Any) -> bool:
    """Whether a value read from a file is tensors by name, none of them larger than what the file holds of it."""
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
        for name, tensor in value.items()
    )


def is_tied(checkpoint_dir: Path) -> bool:
    """Return whether the language-model head is the embedding matrix.

    `tie_word_embeddings` in config.json must say so, and the weights, where they are there, must not differ: the flag
    alone would discard a head that was trained apart.
    """
    if not read_json(checkpoint_dir / "config.json").get("tie_word_embeddings", False):
        return False
    if not (checkpoint_dir / WEIGHTS).is_file():
        return True
    weights = load_weights(checkpoint_dir)
    head, embedding = weights.get("lm_head.weight"), weights.get("transformer.wte.weight")
    if head is None or embedding is None or head.data_ptr() == embedding.data_ptr():
        return True
    return torch.equal(head, embedding)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files that describe a model from one checkpoint directory to the next."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def plain(value: Any) -> Any:
    """A configuration as plain dicts, lists, strings and numbers, fit for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return fields
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def write_hyperparameters(checkpoint_dir: Path, settings: dict[str, Any]) -> None:
    """Write `hyperparameters.yaml`: the step's arguments under LitGPT's names, so that `litgpt merge_lora` reads it."""
    write_text(checkpoint_dir / "hyperparameters.yaml", yaml.safe_dump(plain(settings), sort_keys=False))


def write_provenance(
    checkpoint_dir: Path, step: str, sources: dict[str, Any], settings: dict[str, Any], files: str = "lit_model.pth*"
) -> None:
    """Write `provenance.json`: what a directory was made from, by what, and with which settings.

    Args:
        checkpoint_dir: The folder that is described.
        step: The name of the step that made it.
        sources: Inputs by role; for a checkpoint or data directory use `describe_source`.
        settings: The step's arguments.
        files: Pattern of the files whose hashes are kept.
    """
    write_json(
        checkpoint_dir / PROVENANCE,
        {
            "step": step,
            "sources": plain(sources),
            "settings": plain(settings),
            "versions": versions(),
            "hardware": hardware(),
            "files": {p.name: sha256(p) for p in sorted(checkpoint_dir.glob(files))},
        },
    )


def describe_source(directory: Path) -> dict[str, Any]:
    """A checkpoint or data directory as one entry of `provenance.json`: its path and the hashes it came with."""
    entry: dict[str, Any] = {"path": str(directory)}
    if (file := directory / PROVENANCE).is_file():
        entry["files"] = read_json(file)["files"]
    elif (file := directory / "manifest.json").is_file():
        entry["manifest_sha256"] = sha256(file)
    elif (file := directory / WEIGHTS).is_file():  # a LitGPT checkpoint that is not of our making
        entry["files"] = {WEIGHTS: sha256(file)}
    return entry


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in VERSIONED}}


def metric(
    name: str, value: float, *, stderr: float | None = None, n: int | None = None, split: str | None = None
) -> dict[str, Any]:
    """One row of `metrics.json`. Accuracies are shares from 0 to 1."""
    return {"name": name, "value": value, "stderr": stderr, "n": n, "split": split}


def share_metric(name: str, share: float, n: int) -> dict[str, Any]:
    """One row about a share of n rows of the test split, with the ends of its 95% interval (Wilson's).

    The binomial standard error of a share of 0 or 1 would be 0, which is not true of any; it is null there.
    """
    low, high = wilson_interval(share, n)
    stderr = math.sqrt(share * (1 - share) / n) or None
    return {**metric(name, share, stderr=stderr, n=n, split="test"), "low": low, "high": high}


def write_metrics(
    path: Path,
    metrics: list[dict[str, Any]],
    *,
    seconds: float,
    tokens_per_second: float | None = None,
    peak_bytes: int | None = None,
    **more: Any,
) -> None:
    """Write a step's `metrics.json` in the one shape that the demo and the README's tables read.

    Args:
        path: The file to write.
        metrics: Rows made by `metric`.
        seconds: Wall time of the step.
        tokens_per_second: Real tokens (those of the samples, without padding) per second, where the step has them.
        peak_bytes: Peak memory: anonymous plus shared memory of the process (GPU: `max_memory_allocated`).
        **more: Further facts of the step.

    What is infinite or not a number, which JSON does not have, is null, and a row of "metrics", "gain" or "comparison"
    that lacks what readers rely on is left out; "not_finite" says where that is, and what it was. No result is lost
    for a figure.
    """
    odd: dict[str, str] = {}
    rows = [finite(row, odd, f"metrics.{row['name']}") for row in metrics]
    facts = {
        "metrics": [row for row in rows if row["value"] is not None],
        **finite({"seconds": seconds, "tokens_per_second": tokens_per_second, "peak_bytes": peak_bytes}, odd),
        **finite(more, odd),
    }
    for compared in {"gain", "comparison"} & facts.keys():
        facts[compared] = [row for row in facts[compared] if None not in row.values()]
    if odd:
        print(f"{path}: not finite, and left out: {', '.join(f'{name} ({value})' for name, value in odd.items())}")
    write_json(path, {**facts, **({"not_finite": odd} if odd else {})})


def finite(value: Any, odd: dict[str, str], where: str = "") -> Any:
    """A value for JSON, with None for each number in it that is infinite or none.

    Args:
        value: Plain values, lists and dicts of such.
        odd: Takes what these numbers were, by their place.
        where: The value's own place.
    """
    if isinstance(value, float) and not math.isfinite(value):
        odd[where] = str(value)
        return None
    if isinstance(value, dict):
        return {key: finite(item, odd, f"{where}.{key}".strip(".")) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item, odd, f"{where}.{i}".strip(".")) for i, item in enumerate(value)]
    return value
