"""Hugging Face's GPT-2 checkpoints as our GPT, and checkpoints of our own with their tokenizer.

GPT-2 was written with `Conv1D` layers, which are linear layers whose matrix lies the other way round, (in, out), and
whose query, key and value matrices are one. So a matrix is transposed on its way, and that one is cut in three.

A checkpoint of our own is a folder with `config.json` (the fields of `GPTConfig`), `model.safetensors`, and the
tokenizer: `characters.json` or `tokenizer.json`.

Run it: python -m custom_models.gpt_checkpoint
"""

import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from custom_models.configuration import configured
from custom_models.gpt import GPT, GPTConfig
from custom_models.tokenization import tokenizer_json
from custom_models.tokenization.bpe import ByteBPE
from custom_models.tokenization.characters import CharacterTokenizer
from custom_models.weights import (
    fill,
    own_type,
    quiet_transformers,
    read_checkpoint,
    read_hf,
    reference,
    save_checkpoint,
    tell_difference,
)
from workflows.errors import UserError, run_file
from workflows.files import read_json, recover_dir, write_json
from workflows.hub import fetch_from_hub

OURS = own_type("gpt")
CHARACTERS, BPE = "characters.json", "tokenizer.json"
_CONFIG = {
    "vocab_size": "vocab_size",
    "n_positions": "context",
    "n_embd": "width",
    "n_layer": "n_layer",
    "n_head": "n_head",
}
_OPTIONS = {
    "n_inner": "inner_width",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tied_head",
    "resid_pdrop": "dropout",
}
"""What GPT-2's `config.json` calls things -> fields of `GPTConfig`; the latter may be left out."""
_INSIDE = {
    "ln_1": "attention_norm",
    "attn.c_proj": "attention.out",
    "ln_2": "feed_forward_norm",
    "mlp.c_fc": "feed_forward.up",
    "mlp.c_proj": "feed_forward.down",
}
_OUTSIDE = {"wte": "tokens", "wpe": "positions", "ln_f": "last_norm"}
_MASKS = (".attn.bias", ".attn.masked_bias")
"""Not weights: the causal mask, which the first checkpoints carry along."""


class Tokenizer(Protocol):
    """What a language model needs of a tokenizer."""

    def __len__(self) -> int:
        """The size of the vocabulary."""
        ...

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into the text they stand for."""
        ...


def config_from_hf(config: dict[str, Any], place: str) -> GPTConfig:
    """Read a `config.json` of GPT-2's architecture.

    Args:
        config: Its contents.
        place: Where it lies, for messages.

    Raises:
        UserError: If the model is of another architecture, or has a part that ours lacks.
    """
    if config.get("model_type") != "gpt2":
        raise UserError(f"{place} is of the architecture {config.get('model_type')!r}; only gpt2 is read here.")
    if missing := [name for name in _CONFIG if name not in config]:
        raise UserError(f"{place}/config.json lacks {', '.join(missing)}. Download it again.")
    if (activation := config.get("activation_function", "gelu_new")) not in ("gelu_new", "gelu_pytorch_tanh"):
        raise UserError(f"{place} has the activation {activation!r}; GPT-2's is gelu_new, and no other is read here.")
    foreign = [name for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention") if config.get(name)]
    if foreign or not config.get("scale_attn_weights", True):
        raise UserError(f"{place} scales its attention or crosses it with another text's ({', '.join(foreign)}), which "
                        "GPT-2 itself does not. Such models are not read here.")  # fmt: skip
    values = {ours: config[theirs] for theirs, ours in _CONFIG.items()}
    values |= {ours: config[theirs] for theirs, ours in _OPTIONS.items() if theirs in config}
    names = {ours: theirs for theirs, ours in (_CONFIG | _OPTIONS).items()}
    return configured(GPTConfig, {"dropout": 0.1, **values}, f"{place}/config.json", names)


def from_hf_names(tensors: dict[str, Tensor], tied_head: bool) -> dict[str, Tensor]:
    """GPT-2's weights under our names, Conv1D matrices turned round.

    Args:
        tensors: A checkpoint's.
        tied_head: Whether the head is the embedding matrix; a copy of it that is stored as the head is left out.
    """
    found = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("transformer.")
        stem, _, kind = bare.rpartition(".")
        if bare == "lm_head.weight":
            if not tied_head:
                found["head.weight"] = tensor
        elif stem in _OUTSIDE:
            found[f"{_OUTSIDE[stem]}.{kind}"] = tensor
        elif bare.startswith("h.") and not bare.endswith(_MASKS):
            number, _, inner = stem.removeprefix("h.").partition(".")
            if "ln_" not in inner and kind == "weight":
                tensor = tensor.T  # (in, out) -> (out, in)
            if inner == "attn.c_attn":
                for projection, part in zip("qkv", tensor.chunk(3), strict=True):  # (width, width) or (width,) each
                    found[f"blocks.{number}.attention.{projection}.{kind}"] = part
            else:
                found[f"blocks.{number}.{_INSIDE.get(inner, inner)}.{kind}"] = tensor
        elif not bare.endswith(_MASKS):
            found[bare] = tensor  # `fill` says that the model has none of this name
    return found


def load_hf(directory: Path) -> GPT:
    """A GPT with the weights of a Hugging Face directory of GPT-2's architecture.

    Raises:
        UserError: If a file is missing or damaged, or the weights do not fit the configuration.
    """
    config = config_from_hf(read_json(directory / "config.json"), str(directory))
    model = GPT(config)
    fill(model, from_hf_names(read_hf(directory), config.tied_head), str(directory))
    return model


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer of characters or of byte pairs, in its own file.

    Raises:
        UserError: If there is no room for the file.
    """
    if isinstance(tokenizer, CharacterTokenizer):
        write_json(folder / CHARACTERS, {"characters": tokenizer.characters, "unknown": tokenizer.unknown})
    else:
        assert isinstance(tokenizer, ByteBPE)
        tokenizer_json.save(tokenizer, folder / BPE)


def load_tokenizer(folder: Path) -> CharacterTokenizer | ByteBPE:
    """The tokenizer of a checkpoint or of token files.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    if (file := folder / CHARACTERS).is_file():
        kept = read_json(file)
        characters, unknown = kept.get("characters"), kept.get("unknown")
        if not isinstance(characters, str) or not isinstance(unknown, str | None):
            raise UserError(f"{file} does not hold characters. Delete its folder and make it anew.")
        return CharacterTokenizer(characters, unknown)
    if (file := folder / BPE).is_file():
        return tokenizer_json.load(file)
    raise UserError(f"{folder} has no tokenizer: neither {CHARACTERS} nor {BPE}.")


def save_gpt(model: GPT, tokenizer: Tokenizer, folder: Path, **more: Any) -> None:
    """Write a checkpoint of our own, whole or not at all.

    Args:
        model: The model.
        tokenizer: Whose ids it reads.
        folder: Where; what was there is replaced.
        **more: Further entries of `config.json`.
    """
    save_checkpoint("gpt", model, model.config, folder, partial(save_tokenizer, tokenizer), **more)


def load_own(folder: Path) -> GPT:
    """A model of our own.

    Raises:
        UserError: If it is none, or damaged.
    """
    _, shape, weights = read_checkpoint(folder, "gpt", GPTConfig)
    model = GPT(shape)
    fill(model, weights, str(folder))
    return model


def load_gpt(place: Path | str) -> tuple[GPT, CharacterTokenizer | ByteBPE]:
    """A model of our own or of Hugging Face's, in evaluation mode, and its tokenizer.

    Args:
        place: A folder, or the id of a GPT-2 on the Hub.

    Raises:
        UserError: If it cannot be had or is damaged, or its tokenizer has more tokens than the model.
    """
    directory = Path(place)
    recover_dir(directory)
    if directory.is_file():
        raise UserError(f"{place} is a file. Name its folder, {directory.parent}.")
    if not directory.is_dir():
        if str(place).count("/") > 1 or str(place).startswith((".", "/")) or directory.parent.is_dir():
            raise UserError(f"There is no folder {place}. Train a model first: make gpt.")
        directory = fetch_from_hub(str(place))
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json: it is no checkpoint. Train one with make gpt.")
    ours = read_json(directory / "config.json").get("model_type") == OURS
    model, tokenizer = load_own(directory) if ours else load_hf(directory), load_tokenizer(directory)
    check_vocabulary(len(tokenizer), model.config.vocab_size, str(directory))
    return model.eval(), tokenizer


def check_vocabulary(tokens: int, vocab_size: int, place: str) -> None:
    """Refuse a tokenizer that has ids which a model does not know.

    Raises:
        UserError: If so.
    """
    if tokens > vocab_size:
        raise UserError(
            f"The tokenizer in {place} has {tokens:,} tokens, and the model knows {vocab_size:,}: they do not belong "
            "together. Take the tokenizer that the model was trained with."
        )


def main(checkpoint: str | None = None) -> None:
    """Print how a layer of GPT-2 looks under our names, and how far our logits are from transformers'.

    Args:
        checkpoint: The folder of a GPT-2 of Hugging Face's, or its id on the Hub, such as openai-community/gpt2; a
            small one with random weights, which transformers makes and writes, if null.

    Raises:
        UserError: If the checkpoint cannot be had or read.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        if checkpoint is None:
            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=64, n_layer=2, n_head=4)).save_pretrained(directory)
        else:
            directory = Path(checkpoint) if Path(checkpoint).is_dir() else fetch_from_hub(checkpoint)
        ours, theirs = load_hf(directory).eval(), reference(GPT2LMHeadModel, directory)
    for name, tensor in theirs.state_dict().items():
        if name.startswith("transformer.h.0.") and tensor.dim() == 2:
            found = from_hf_names({name: tensor}, tied_head=True)
            print(f"{name} {tuple(tensor.shape)}")
            print("".join(f"  -> {our_name} {tuple(part.shape)}\n" for our_name, part in found.items()), end="")
    ids = torch.randint(ours.config.vocab_size, (2, 32))  # (B, T)
    with torch.no_grad():
        tell_difference("logits", ours(ids), theirs(ids).logits)


if __name__ == "__main__":
    run_file(main)
