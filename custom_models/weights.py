"""Weights on their way between files and models: read, made sure that they fit, filled in, written.

How a family's tensors are called stands in that family's `*_checkpoint.py`; this is what all of them do besides. A
checkpoint of our own is a folder with `config.json` (the family, and the fields of its configuration),
`model.safetensors` and a tokenizer.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from custom_models.configuration import configured
from workflows.errors import UserError
from workflows.files import atomic_dir, atomic_file, read_json, recover_dir, write_json
from workflows.hf_reader import lazy_tensors

T = TypeVar("T")
UNREADABLE = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, safetensors.SafetensorError,
)  # fmt: skip
"""What transformers ends with over a folder that is damaged."""


def read_hf(directory: Path) -> dict[str, Tensor]:
    """All weights of a Hugging Face directory under their own names, in float32.

    Raises:
        UserError: If a file is missing or damaged.
    """
    tensors = {}
    for name, lazy in lazy_tensors(directory).items():
        tensors[name] = torch.empty(lazy.shape, dtype=torch.float32)
        lazy.read_into(tensors[name])
    return tensors


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write all of a model's weights to the folder's `model.safetensors`, whole or not at all."""
    with atomic_file(folder / "model.safetensors") as file:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(weights, file)


def own_type(family: str) -> str:
    """What `config.json` has for `model_type` in a checkpoint of our own."""
    return f"custom_models.{family}"


def save_checkpoint(
    family: str, model: nn.Module, config: Any, folder: Path, save_tokenizer: Callable[[Path], None], **more: Any
) -> None:
    """Write a checkpoint of our own, whole or not at all.

    Args:
        family: "encoder", "encoder_decoder" or "gpt".
        model: A model of it, or one with such a model in it.
        config: The family's configuration, a dataclass.
        folder: Where; what was there is replaced.
        save_tokenizer: Writes the tokenizer into a folder.
        **more: Further entries of `config.json`.
    """
    with atomic_dir(folder) as temporary:
        write_json(temporary / "config.json", {"model_type": own_type(family), family: asdict(config), **more})
        save_weights(model, temporary)
        save_tokenizer(temporary)


def read_checkpoint(folder: Path, family: str, kind: type[T]) -> tuple[dict[str, Any], T, dict[str, Tensor]]:
    """A checkpoint of our own: the contents of `config.json`, the model's configuration, and the weights.

    Args:
        folder: Where it is.
        family: Of which it must be.
        kind: The family's configuration.

    Raises:
        UserError: If it is none, or damaged.
    """
    recover_dir(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is no checkpoint.")
    config = read_json(folder / "config.json")
    if config.get("model_type") != own_type(family):
        raise UserError(f"{folder} is of the architecture {config.get('model_type')!r}, not a checkpoint of ours.")
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    try:
        values = {name: value for name, value in config[family].items() if name in known}
        shape = configured(kind, values, f"{folder}/config.json")
        return config, shape, safetensors.torch.load_file(folder / "model.safetensors")
    except (KeyError, TypeError, AttributeError, OSError, safetensors.SafetensorError) as e:
        raise UserError(f"{folder} is damaged ({type(e).__name__}: {e}). Train it again.") from None


def fill(model: nn.Module, tensors: dict[str, Tensor], place: str) -> None:
    """Load weights into a model; all of them, and no others.

    Raises:
        UserError: If one is missing, too much, or of another shape.
    """
    check_fit(shapes_of(model.state_dict()), shapes_of(tensors), place)
    model.load_state_dict(tensors)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape by its name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_fit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], place: str) -> None:
    """Make sure that weights are those of a model, before any of them is read.

    Args:
        expected: The model's shapes by name.
        found: The weights' shapes by name.
        place: Where they lie, for the message.

    Raises:
        UserError: If one is missing, too much, or of another shape.
    """
    problems = [f"lacks {name}" for name in expected if name not in found]
    problems += [f"has {name}, which the model has not" for name in found if name not in expected]
    problems += [
        f"has {name} of shape {shape}, not {expected[name]}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"The weights in {place} do not fit the model: it {'; '.join(problems[:3])}{more}.")


def reference(kind: Any, directory: Path) -> Any:
    """A model of transformers' to compare with, in float32.

    Args:
        kind: A class of transformers' that has `from_pretrained`.
        directory: The checkpoint.
    """
    quiet_transformers()
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def quiet_transformers() -> None:
    """Leave out the bars and reports of loading and saving, which are longer than what the command lines print."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def tell_difference(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Print how far numbers of our model are from those of the reference, for the command lines of the readers."""
    print(f"{what} {tuple(ours.shape)}: differ from the reference by at most {float((ours - theirs).abs().max()):.1e}, "
          f"of sizes up to {float(theirs.abs().max()):.1f}")  # fmt: skip
