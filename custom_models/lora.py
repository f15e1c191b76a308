"""LoRA: a large matrix learns through two thin ones beside it, and stays as it is.

    h = W x + (alpha / r) B A x        Hu et al. 2021, arXiv 2106.09685, equation 3, scaled as in section 4.1

W, (out, in), is frozen. A, (r, in), and B, (out, r), are trained: r (in + out) numbers in place of in * out. B begins
at zero, so the model begins as it was. Whatever is learned is a change of W of rank r; it can be added to W ("merged"),
after which the model costs what it did before, and taken out again.

What is in: any `nn.Linear` of any model, chosen by its name; dropout on what A reads; rank-stabilised scaling, alpha /
sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732); files in the format of the `peft` library, which reads them.
What is not: adapters of embeddings and convolutions, several adapters at once, DoRA.

Run it: python -m custom_models.lora
"""

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from custom_models.weights import check_fit, shapes_of
from workflows.errors import UserError, report_all, run_file
from workflows.files import atomic_dir, read_json, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What `peft` writes before a module's name."""


class LoRALinear(nn.Module):
    """A linear layer with an adapter.

    It has no `weight` of its own: code that reads a layer's weight, and does not call the layer, would pass the adapter
    over without a word.

    Args:
        linear: The layer; it is frozen.
        rank: r, at least 1.
        alpha: The change is scaled by alpha / rank.
        dropout: Share of what A reads that is set to zero in training.
        rslora: Scale by alpha / sqrt(rank) instead, which keeps the change as large at high ranks as at low ones.

    Raises:
        UserError: If a setting makes no sense.
    """

    def __init__(
        self, linear: nn.Linear, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, rslora: bool = False
    ) -> None:
        super().__init__()
        report_all(problems_of(rank, alpha, dropout))
        self.linear = linear.requires_grad_(False)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = nn.Dropout(dropout)
        weight = linear.weight
        # At least float32, whatever the weight is in: an optimizer's small steps are lost in bfloat16's eight bits.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype, device=weight.device))  # (r, in)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype, device=weight.device))  # (out, r)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as peft and LitGPT draw it; the paper has a Gaussian
        self.kept: Tensor | None
        self.register_buffer("kept", None, persistent=False)  # (out, in), the weight without the change, while merged
        self.train(linear.training)

    @property
    def merged(self) -> bool:
        """Whether the change is in the weight."""
        return self.kept is not None

    def forward(self, x: Tensor) -> Tensor:
        """(.., in) -> (.., out)."""
        out = self.linear(x)  # (.., out)
        if self.merged:
            return out
        low = F.linear(self.dropout(x.to(self.A.dtype)), self.A)  # (.., r)
        return (out + F.linear(low, self.B) * self.scale).to(out.dtype)  # (.., out)

    def change(self) -> Tensor:
        """What is added to the weight: (alpha / r) B A, (out, in)."""
        return self.B @ self.A * self.scale  # (out, in)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the change to the weight. The weight as it was is kept, so that it can be had back to the bit.

        Subtracting the change again would not do: (w + d) - d is w only up to rounding.
        """
        if not self.merged:
            self.kept = self.linear.weight.data  # (out, in)
            self.linear.weight.data = (self.kept + self.change()).to(self.kept.dtype)  # (out, in)

    def unmerge(self) -> None:
        """Take the change out of the weight again, by putting back what was there."""
        if self.kept is not None:
            self.linear.weight.data, self.kept = self.kept, None

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return f"rank={self.rank}, alpha={self.alpha}, scale={self.scale:.4g}, merged={self.merged}"


def problems_of(rank: int, alpha: float, dropout: float) -> list[str]:
    """Everything that is wrong with an adapter's settings, as messages."""
    found = [] if rank >= 1 else [f"LoRA's rank must be at least 1, not {rank}."]
    found += [] if alpha > 0 else [f"LoRA's alpha must be positive, not {alpha}."]
    return found + ([] if 0 <= dropout < 1 else [f"LoRA's dropout must be from 0 to below 1, not {dropout}."])


def add_lora(
    model: nn.Module,
    targets: Sequence[str] = ("*",),
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
) -> list[str]:
    """Give some of a model's linear layers adapters, and freeze everything else.

    Args:
        model: Any model; it is changed.
        targets: Patterns of the layers' names, as for files: "*.attention.q" or "layers.[01].*"; "*" for all.
        rank: See `LoRALinear`.
        alpha: See there.
        dropout: See there.
        rslora: See there.

    Returns:
        The names of the adapted layers.

    Raises:
        UserError: If a setting makes no sense, a pattern matches no linear layer, a layer's weight is used elsewhere in
            the model, too, or the model has adapters already. The model is then as it was.
    """
    problems = problems_of(rank, alpha, dropout)
    if lora_layers(model):
        problems.append("The model has adapters already. Merge them for good with fold_lora, or load the model anew.")
    linear = _linear_layers(model)
    chosen = [name for name in linear if any(fnmatchcase(name, target) for target in targets)]
    kinds = sorted({re.sub(r"\b\d+\b", "*", name) for name in linear})
    for target in targets:
        if not any(fnmatchcase(name, target) for name in linear):
            problems.append(f"No linear layer is named {target!r}; there are {', '.join(kinds) or 'none'}.")
    if not targets:
        problems.append(f"No layer is to be adapted; name some of {', '.join(kinds)}.")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in chosen:
        if others := [owner for owner in owners[id(linear[name].weight)] if owner != f"{name}.weight"]:
            problems.append(
                f"{name} shares its weight with {others[0]}, which a merge would change, too. Leave it out."
            )
    report_all(problems)
    model.requires_grad_(False)
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoRALinear(linear[name], rank, alpha, dropout, rslora))
    return chosen


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that can be adapted; the model itself has no parent in which it could be replaced."""
    return {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}


def merge_lora(model: nn.Module) -> None:
    """Add all changes to the weights: the model computes as fast as without adapters. Takes a copy of each weight."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Take all changes out again; every weight has the bits that it had before `merge_lora`."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def fold_lora(model: nn.Module) -> None:
    """Merge for good: adapted layers become plain ones with the change in their weights, and no copy is kept."""
    for name, layer in lora_layers(model).items():
        layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.linear)


def save_lora(model: nn.Module, folder: Path, names: Mapping[str, str] | None = None, base: str = "") -> None:
    """Write the adapters, and nothing else of the model, in peft's format, whole or not at all.

    Args:
        model: A model with adapters, merged or not.
        folder: Where; what was there is replaced.
        names: Other names for the layers in the file; those of the model that peft is to put the adapters into
            (`llama_checkpoint.hf_module_names` for transformers' Llama). A name that is not in it stays.
        base: The base model's place, for peft's own records.

    Raises:
        UserError: If the model has no adapters, or there is no room.
    """
    if not (layers := lora_layers(model)):
        raise UserError("The model has no adapters to save: add some with add_lora.")
    renamed = {(names or {}).get(name, name): layer for name, layer in layers.items()}
    first = next(iter(layers.values()))
    with atomic_dir(folder) as temporary:
        tensors = {
            f"{_PREFIX}{name}.lora_{part}.weight": getattr(layer, part).detach().cpu().contiguous()
            for name, layer in renamed.items()
            for part in "AB"
        }  # (r, in) and (out, r)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / WEIGHTS).chmod(0o644)  # safetensors makes files for their owner alone
        write_json(
            temporary / CONFIG,
            {
                "peft_type": "LORA",
                "task_type": None,
                "base_model_name_or_path": base,
                "r": first.rank,
                "lora_alpha": first.alpha,
                "lora_dropout": first.dropout.p,
                "use_rslora": first.rslora,
                "target_modules": list(renamed),
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
            },
        )


_MORE_THAN_LORA = (
    *("use_dora", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
    *("alora_invocation_tokens", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters"),
    *("trainable_token_indices", "layer_replication", "lora_bias", "fan_in_fan_out"),
)
"""Settings of peft's that change what an adapter computes, and that ours lacks."""


def load_lora(model: nn.Module, folder: Path, names: Mapping[str, str] | None = None) -> list[str]:
    """Give a model the adapters of a folder that `save_lora` or peft has written, and freeze everything else.

    Args:
        model: A model without adapters; it is changed.
        folder: The adapters.
        names: See `save_lora`.

    Returns:
        The names of the adapted layers.

    Raises:
        UserError: If a file is missing or damaged, an adapter is of another kind, or does not fit the model. The model
            is then as it was.
    """
    config = read_json(folder / CONFIG)
    problems = (
        [] if config.get("peft_type") == "LORA" else [f"its peft_type is {config.get('peft_type')!r:.40}, not LORA"]
    )
    problems += [] if config.get("bias", "none") == "none" else ["it has biases"]
    problems += [f"it asks for {name}, which this LoRA lacks" for name in _MORE_THAN_LORA if config.get(name)]
    if isinstance(how := config.get("init_lora_weights"), str) and how != "gaussian":
        problems.append(f"it was begun by {how!r:.40}, which may have changed the model's weights, too")
    numbers: Any = (config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0))
    rank, alpha, dropout = numbers
    if type(rank) is int and all(isinstance(number, int | float) for number in numbers):
        problems += problems_of(rank, alpha, dropout)
    else:
        problems.append("r, lora_alpha and lora_dropout are " + ", ".join(f"{n!r:.40}" for n in numbers))
    report_all([f"{folder / CONFIG}: {problem.removesuffix('.')}." for problem in problems])
    settings: Any = {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": bool(config.get("use_rslora"))}
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{folder / WEIGHTS} is missing, cut short or no safetensors file ({e}).") from None

    ours = {theirs: name for name, theirs in (names or {}).items()}
    found: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name, _, part = full.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        found[f"{ours.get(name, name)}.{part}"] = tensor
    layers = {name: layer for name, layer in _linear_layers(model).items()
              if f"{name}.A" in found or f"{name}.B" in found}  # fmt: skip
    expected = {f"{name}.A": (rank, layer.in_features) for name, layer in layers.items()}
    expected |= {f"{name}.B": (layer.out_features, rank) for name, layer in layers.items()}
    check_fit(expected, shapes_of(found), str(folder))
    adapted = add_lora(model, list(layers), **settings)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.A.copy_(found[f"{name}.A"])  # (r, in)
            layer.B.copy_(found[f"{name}.B"])  # (out, r)
    return adapted


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers an optimizer would change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main(size: int = 64, hidden_rank: int = 4, steps: int = 400, seed: int = 1) -> None:
    """Let adapters of several ranks learn a change of a matrix that has a rank of its own; merge one and take it out.

    Args:
        size: Of the square matrix.
        hidden_rank: Of the change.
        steps: Of training.
        seed: Of all that is random.

    Raises:
        UserError: If a setting makes no sense.
    """
    if not (1 <= hidden_rank <= size and steps >= 1):
        raise UserError("--hidden_rank must be from 1 to --size, and --steps at least 1.")
    torch.manual_seed(seed)
    frozen = nn.Linear(size, size)
    change = torch.randn(size, hidden_rank) @ torch.randn(hidden_rank, size) / size  # (size, size)
    x = torch.randn(1024, size)  # (B, size)
    wanted = (frozen(x) + x @ change.T).detach()  # (B, size)
    before = F.mse_loss(frozen(x), wanted).item()
    print(f"a matrix of {size} x {size}, to be changed by one of rank {hidden_rank}\n")
    print(f"{'rank':<6}{'trained':>9}{'error left':>12}")
    layer = None
    for rank in (1, 2, hidden_rank, 2 * hidden_rank):
        layer = LoRALinear(frozen, rank, alpha=2 * rank)
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.01)
        for _ in range(steps):
            loss = F.mse_loss(layer(x), wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"{rank:<6}{trainable_parameters(layer):>9,}{F.mse_loss(layer(x), wanted).item() / before:>12.1%}")
    print(f"{'all':<6}{size * size:>9,}\n")
    assert layer is not None
    with torch.no_grad():
        weight, apart = frozen.weight.clone(), layer(x)
        layer.merge()
        print(f"merged: outputs differ by at most {float((layer(x) - apart).abs().max()):.1e}")
        subtracted = frozen.weight - layer.change()
        layer.unmerge()
        print(f"unmerged: {int((frozen.weight != weight).sum())} of {weight.numel():,} weights have changed; "
              f"subtracting would have changed {int((subtracted != weight).sum()):,}")  # fmt: skip


if __name__ == "__main__":
    run_file(main)
