"""`make shrink`: a student made of some of its teacher's layers, which is where distillation best begins.

DistilBERT (Sanh et al. 2019, arXiv 1910.01108, sec. 3) keeps every second layer; so do we, with the first and the last
one among them, next to the embedding and the head that the student keeps as well. Which layers a model can do without
is a matter of trial, so they can be named, too.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from workflows.checkpoint import (
    WEIGHTS,
    check_checkpoint_dir,
    copy_companions,
    describe_source,
    is_tied,
    load_config,
    load_weights,
    metric,
    write_config,
    write_hyperparameters,
    write_metrics,
    write_provenance,
)
from workflows.errors import UserError, report_all
from workflows.files import atomic_dir, read_json, write_json
from workflows.measure import PeakMemory, seconds_of_step, step_began
from workflows.progress import brief
from workflows.training.model import LoRAArgs, empty_model
from workflows.weight_writer import weight_writer

_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/shrink"),
    layers: int | None = None,
    keep: list[int] | None = None,
) -> None:
    """Make a smaller checkpoint of some of a checkpoint's layers.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory to take them from: the teacher.
        out_dir: Where the student goes: its `final` folder, a checkpoint directory.
        layers: How many layers to keep, evenly spaced, the first and the last among them; half of them by default.
        keep: Which layers to keep instead, counted from 0, e.g. [0,2,4].

    Raises:
        UserError: If the checkpoint is not usable, or it has no such layers.
    """
    directory = check_checkpoint_dir(checkpoint_dir)
    config = load_config(directory)
    if layers is not None and keep is not None:
        raise UserError(
            "--layers and --keep both say which layers stay; give one of them (--keep null drops a recipe's)."
        )
    report_all(choice_problems(config.n_layer, layers, keep))
    kept = keep or evenly_spaced(layers or max(1, config.n_layer // 2), config.n_layer)
    empty_model(directory, LoRAArgs(r=0))  # refuses an architecture that could not be trained afterwards
    began, final = step_began(), out_dir / "final"
    with atomic_dir(final) as temporary, PeakMemory() as peak:
        copy_companions(directory, temporary)
        config.n_layer = len(kept)
        write_config(config, temporary)
        described = read_json(directory / "config.json")
        if isinstance(kinds := described.get("layer_types"), list):
            described["layer_types"] = [kinds[layer] for layer in kept]
        write_json(temporary / "config.json", {**described, "num_hidden_layers": len(kept)})
        parameters = _write_weights(directory, kept, temporary)
        settings: dict[str, Any] = {"checkpoint_dir": directory, "out_dir": out_dir, "keep": kept}
        write_hyperparameters(temporary, settings)
        rows = [metric("parameters", parameters), metric("bytes", (temporary / WEIGHTS).stat().st_size)]
        write_metrics(temporary / "metrics.json", rows, seconds=seconds_of_step(began), peak_bytes=peak.bytes)
        write_provenance(temporary, "shrink", {"base": describe_source(directory)}, settings)
    print(f"layers {', '.join(map(str, kept))} of {directory}; {parameters:,} parameters, checkpoint: {final}")


def evenly_spaced(count: int, layers: int) -> list[int]:
    """`count` of the numbers 0 to layers - 1, ascending, as even as can be, both ends among them (one: the first)."""
    return [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]


def choice_problems(layers: int, count: int | None, keep: Sequence[int] | None) -> list[str]:
    """What is wrong with the choice among so many layers, as messages."""
    if count is not None and not 1 <= count <= layers:
        return [f"--layers must be from 1 to the model's {layers}, not {count}."]
    if keep is None:
        return []
    problems = [] if keep else ["--keep names no layer."]
    if odd := [layer for layer in keep if not 0 <= layer < layers]:
        problems.append(f"--keep: the model has the layers 0 to {layers - 1}, not {', '.join(map(str, odd))}.")
    if any(later <= earlier for earlier, later in pairwise(keep)):
        problems.append(f"--keep {list(keep)} must ascend, and name no layer twice: their order is part of the model.")
    return problems


def _write_weights(source: Path, kept: Sequence[int], target: Path) -> int:
    """Write the kept layers under their new numbers, and all that belongs to no layer; gives the parameters written."""
    number = {old: new for new, old in enumerate(kept)}
    tied = is_tied(source)
    parameters, weights = 0, load_weights(source)
    with weight_writer(target / WEIGHTS, max(weight.nbytes for weight in weights.values())) as writer:
        for name, weight in brief(weights.items(), "copying", "tensor"):
            if name == "lm_head.weight" and tied:
                continue
            if found := _LAYER.fullmatch(name):
                if int(found[1]) not in number:
                    continue
                name = f"transformer.h.{number[int(found[1])]}.{found[2]}"
            parameters += weight.numel()
            writer.copy(name, weight)
        if tied:
            writer.tie("lm_head.weight", "transformer.wte.weight")
    return parameters
