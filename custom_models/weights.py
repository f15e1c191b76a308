"""Weights on their way between files and models: read, made sure that they fit, filled in, written.

How a family's tensors are called stands in that family's `*_checkpoint.py`; this is what all of them do besides.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from workflows.errors import UserError
from workflows.files import atomic_file
from workflows.hf_reader import lazy_tensors


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
