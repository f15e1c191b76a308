"""The reference policy's log-probabilities, computed once for each data set and kept on the disk.

The reference is the model before training: with adapters the same model with them switched off, with full weights the
one that training begins with (or a frozen copy of it, for answers that are sampled on the way). A file made from other
weights or other rows is told by its key and made anew.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import safetensors
import safetensors.torch
import torch

from workflows.files import atomic_file
from workflows.progress import Bar
from workflows.training.batch import Tree, pack
from workflows.training.model import GPT, adapters_off, load_model


def key_of(trees: Sequence[Tree], model_identity: dict[str, object]) -> str:
    """What the log-probabilities depend on: the tokens, and the model as a dict of hashes and settings."""
    digest = hashlib.sha256(json.dumps(model_identity, sort_keys=True, default=str).encode())
    for tree in trees:
        digest.update(json.dumps([tree.prompt, tree.completions, tree.loss_masks]).encode())
    return digest.hexdigest()


@torch.no_grad()
def reference_logprobs(
    fabric: L.Fabric, model: GPT, trees: Sequence[Tree], row_tokens: int, file: Path, key: str
) -> list[torch.Tensor]:
    """log pi_ref of the learned tokens of each tree, in its completions' order.

    Args:
        fabric: A launched Fabric; its processes share the work.
        model: The policy as Fabric set it up, untrained.
        trees: Prompts with their completions.
        row_tokens: Capacity of a packed row.
        file: Where they are kept.
        key: `key_of` the trees and the model.

    Returns:
        For each tree a float32 tensor of as many numbers as it has learned tokens.
    """
    lengths = [sum(map(sum, tree.loss_masks)) if tree.loss_masks else sum(map(len, tree.completions)) for tree in trees]
    kept = _read(file, key)
    if kept is None:
        if file.is_file():
            fabric.print(f"{file} belongs to another model or other data; the reference is computed again")
        rows = pack(trees, row_tokens)
        mine = rows[fabric.global_rank :: fabric.world_size]
        rounds = -(-len(rows) // fabric.world_size)  # sharded models gather their weights together, row by row
        begins = torch.tensor([0, *lengths]).cumsum(0).tolist()
        flat = torch.zeros(begins[-1], device=fabric.device)
        was_training = model.training
        model.eval()
        with adapters_off(model):
            for number in Bar(range(rounds), desc="reference", disable=fabric.global_rank != 0, unit="row"):
                indices, batch = mine[number] if number < len(mine) else rows[0]
                logprobs = model(batch.to(fabric.device))  # (N,)
                if number < len(mine):
                    for index, part in zip(indices, logprobs.split([lengths[i] for i in indices]), strict=True):
                        flat[begins[index] : begins[index + 1]] = part
        model.train(was_training)
        if fabric.world_size > 1:
            flat = fabric.all_reduce(flat, reduce_op="sum")  # type: ignore[assignment]
        kept = flat.cpu()
        if fabric.global_rank == 0:
            with atomic_file(file) as temporary:
                safetensors.torch.save_file({"logprobs": kept}, temporary, metadata={"key": key})
        fabric.barrier()
    return list(kept.split(lengths))


def frozen_reference_of(settings: dict[str, Any], fabric: L.Fabric) -> GPT | None:
    """The checkpoint that a step starts from as a second, frozen model, where its settings ask for one.

    Adapters make it needless; answers that are sampled on the way leave no log-probabilities to compute beforehand.
    """
    if not settings["frozen_reference"]:
        return None
    longest = settings["train"].max_seq_length
    model = load_model(settings["checkpoint_dir"], None, settings["precision"], longest, device=fabric.device)
    return model.eval().requires_grad_(False)


def _read(file: Path, key: str) -> torch.Tensor | None:
    """The file's numbers, if it is there, whole, and of this key."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return opened.get_tensor("logprobs") if (opened.metadata() or {}).get("key") == key else None
    except (FileNotFoundError, safetensors.SafetensorError):
        return None
