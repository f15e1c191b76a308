"""What a model is, before any of its weights are there: built on the meta device from a configuration alone.

The configuration is that of a checkpoint directory or, where there is none yet, LitGPT's own of a name: one of
`checkpoints/registry.yaml`, a Hub id, or a name that LitGPT knows.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import litgpt.config
import litgpt.lora
import torch

from workflows.checkpoint import is_tied, load_config
from workflows.download import registry
from workflows.errors import UserError, did_you_mean, first_line
from workflows.files import read_json
from workflows.training.model import GPT, LoRAArgs

_TRAINED_KINDS = ("LLaMAMLP", "GemmaMLP")
_STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Architecture:
    """A model without weights.

    Attributes:
        name: What it was asked for by.
        config: LitGPT's configuration, with the adapters' fields.
        tied: Whether one matrix embeds tokens and predicts them.
        stored: The type of the weights on the disk.
        lora: The adapters.
        sure: Whether `tied` is known; of models that are neither here nor in the registry it is not.
    """

    name: str
    config: Any
    tied: bool
    stored: torch.dtype
    lora: LoRAArgs
    sure: bool = True

    @cached_property
    def module(self) -> GPT:
        """The model that would be trained, all of it on the meta device.

        Raises:
            UserError: If the configuration describes none that our steps can run.
        """
        if self.config.mlp_class_name not in _TRAINED_KINDS:
            raise UserError(f"{self.name}: a model with {self.config.mlp_class_name} layers cannot be planned yet.")
        try:
            with torch.device("meta"):
                return GPT(self.config)
        except Exception as e:  # as in `training.model.empty_model`
            raise UserError(f"{self.name} describes no model ({first_line(e)}).") from None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number of elements of every parameter by name; of a tied head's matrix under the embedding's alone."""
        sizes = {name: parameter.numel() for name, parameter in self.module.named_parameters()}
        if self.tied and not (self.lora.r > 0 and self.lora.head):
            del sizes["lm_head.linear.weight"]
        return sizes

    @property
    def adapters(self) -> int:
        """Parameters of the adapters."""
        return sum(size for name, size in self.sizes.items() if "lora_" in name)

    @property
    def weights(self) -> int:
        """Parameters without adapters, tied ones counted once."""
        return sum(self.sizes.values()) - self.adapters

    @property
    def trained(self) -> int:
        """Parameters that a training step trains: the adapters, or with rank 0 all."""
        return self.adapters if self.lora.r > 0 else self.weights

    @property
    def embedding(self) -> int:
        """Elements of the embedding matrix, which are as many as those of the head's."""
        return self.config.padded_vocab_size * self.config.n_embd

    @property
    def linears(self) -> int:
        """Elements of the blocks' matrices: what QLoRA keeps in 4 bits."""
        return sum(size for name, size in self.sizes.items() if ".h." in name and name.endswith(".linear.weight"))

    @property
    def largest_linear(self) -> int:
        """Elements of the largest of them."""
        return max(size for name, size in self.sizes.items() if ".h." in name and name.endswith(".linear.weight"))


def find_architecture(checkpoint: Path | str, lora: LoRAArgs | None = None) -> Architecture:
    """A model's architecture by its checkpoint directory or its name.

    Args:
        checkpoint: A folder with `model_config.yaml`, a name in the registry, a Hub id, or a name of LitGPT's.
        lora: The adapters; none if None.

    Raises:
        UserError: If there is no such folder and no such name, with the nearest names.
    """
    lora = lora or LoRAArgs(r=0)
    directory = Path(checkpoint)
    if (directory / "model_config.yaml").is_file():
        config = load_config(directory, **lora.config_fields())
        described = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
        stored = str(described.get("torch_dtype", described.get("dtype")))
        tied = bool(described) and is_tied(directory)
        return Architecture(str(directory), config, tied, _STORED.get(stored, torch.bfloat16), lora)
    name = str(checkpoint)
    entry = registry().get(name.lower()) or next(
        (known for known in registry().values() if known["hub_id"].lower() == name.lower()), None
    )
    litgpt_name = (
        entry["litgpt"] if entry and "litgpt" in entry else (entry["hub_id"] if entry else name).split("/")[-1]
    )
    if litgpt_name not in litgpt.config.name_to_config:
        near = did_you_mean(name.split("/")[-1], [*registry(), *litgpt.config.name_to_config], cutoff=0.5)
        raise UserError(
            f"There is no checkpoint at {name}, and neither checkpoints/registry.yaml nor LitGPT knows a model of that "
            f"name.{near} A downloaded model is planned by its folder."
        )
    config = litgpt.lora.Config.from_name(litgpt_name, **lora.config_fields())
    stored_type = torch.float32 if entry and entry["hub_id"] == "embedded" else torch.bfloat16
    untied = Architecture(name, config, False, stored_type, lora)
    # LitGPT's configurations do not say whether the head is tied; the registry's count of parameters does.
    tied = entry is not None and entry["parameters"] <= untied.weights - untied.embedding // 2
    return Architecture(name, config, tied, stored_type, lora, entry is not None)
