"""Hugging Face's checkpoints of T5 as our encoder-decoder and back, and checkpoints of our own.

A checkpoint of our own is a folder with `config.json` (the fields of `EncoderDecoderConfig`), `model.safetensors` and
`tokenizer.json`.

Run it: python -m custom_models.encoder_decoder_checkpoint
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor, nn

from custom_models.configuration import configured
from custom_models.encoder_checkpoint import save_tokenizer, tokenizer_of
from custom_models.encoder_decoder import EncoderDecoder
from custom_models.encoder_decoder_config import T5, EncoderDecoderConfig
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
from workflows.files import atomic_dir, read_json, recover_dir, write_json
from workflows.hub import fetch_from_hub

OURS = own_type("encoder_decoder")
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "width",
    "d_kv": "head_size",
    "d_ff": "inner_width",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "relative_attention_num_buckets": "n_bucket",
}
"""What T5's `config.json` calls things -> fields of `EncoderDecoderConfig`."""
_OTHERS = {
    "num_decoder_layers": "n_decoder_layer",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "norm_eps",
    "pad_token_id": "pad_id",
    "eos_token_id": "end_id",
    "decoder_start_token_id": "start_id",
    "dropout_rate": "dropout",
}
"""The same, for what a file may leave out."""
_FEED_FORWARD = {"relu": "relu", "gated-gelu": "gated_gelu"}
_PARTS = {"encoder": ("attention", "feed_forward"), "decoder": ("attention", "cross", "feed_forward")}
"""What a layer is made of, in the order by which T5 numbers it."""
_INNER = {"q": "q", "k": "k", "v": "v", "o": "out", "wi": "up", "wi_0": "gate", "wi_1": "up", "wo": "down"}
_LAYER = re.compile(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.(?:layer_norm|\w+\.(\w+))")
_OUTSIDE = {
    "shared": "tokens",
    "lm_head": "head",
    "encoder.final_layer_norm": "encoder_norm",
    "decoder.final_layer_norm": "decoder_norm",
}
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
"""The first checkpoints have a bias that no version of T5 reads: a source and an answer have no distance."""


def config_from_hf(config: Mapping[str, Any], place: str, tied: bool) -> EncoderDecoderConfig:
    """Read a `config.json` of T5's architecture.

    Args:
        config: Its contents.
        place: Where it lies, for messages.
        tied: Whether the weights have no head of their own.

    Raises:
        UserError: If the model is of another architecture or has a part that ours lacks, or a value cannot be.
    """
    if config.get("model_type") != "t5":
        raise UserError(f"{place} is of the architecture {config.get('model_type')!r}; only t5 is read here.")
    if missing := [name for name in _SIZES if name not in config]:
        raise UserError(f"{place}/config.json lacks {', '.join(missing)}. Download it again.")
    if (kind := config.get("feed_forward_proj", "relu")) not in tuple(_FEED_FORWARD):
        raise UserError(f"{place} has the feed-forward layer {kind!r}; {' and '.join(_FEED_FORWARD)} are read here.")
    if config.get("is_encoder_decoder") is False or config.get("is_decoder"):
        raise UserError(f"{place} is half of a T5; only encoder and decoder together are read here.")
    values = {ours: config[theirs] for theirs, ours in _SIZES.items()}
    values |= {ours: config[theirs] for theirs, ours in _OTHERS.items() if config.get(theirs) is not None}
    # transformers 5 writes tie_word_embeddings as true for all, and beside it whether the head's input is scaled.
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    shape = configured(
        EncoderDecoderConfig,
        {**T5, "n_decoder_layer": values["n_layer"], **values, "feed_forward": _FEED_FORWARD[kind], "tied": tied,
         "scale_head": bool(scaled)},
        f"{place}/config.json",
        {ours: theirs for theirs, ours in (_SIZES | _OTHERS).items()},
    )  # fmt: skip
    return replace(shape, attention_dropout=shape.dropout)


def from_hf_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """T5's weights under our names; what is none of them keeps its name, and `fill` says that the model has none."""
    found = {}
    for name, tensor in tensors.items():
        if name in _COPIES or name == _UNUSED:
            continue
        stem, _, kind = name.rpartition(".")
        if stem in _OUTSIDE:
            stem = _OUTSIDE[stem]
        elif stem.endswith(".relative_attention_bias"):
            stem = f"{stem.partition('.')[0]}_bias"
        elif match := _LAYER.fullmatch(stem):
            stack, layer, number, inner = match.groups()
            part = dict(enumerate(_PARTS[stack])).get(int(number), "unknown")
            stem = f"{stack}.{layer}.{part}" + ("_norm" if inner is None else f".{_INNER.get(inner, inner)}")
        found[f"{stem}.{kind}"] = tensor
    return found


def config_to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The way back: the `config.json` of a T5.

    Raises:
        UserError: If the model computes what no T5 does.
    """
    # embeddings times sqrt(width), and a head that reads them as they are: T5's tied head by another name
    head = {(True, True, False): True, (False, True, True): True, (False, False, False): False}
    ties = head.get((config.scale_embeddings, config.tied, config.scale_head))
    if ties is None or config.bias or config.scale_scores or not config.norm_first or config.positions != "relative":
        raise UserError("Only a model of T5's architecture can be written in its form.")
    names = {theirs: getattr(config, ours) for theirs, ours in (_SIZES | _OTHERS).items()}
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        **names,
        "d_kv": config.head_size or config.width // config.n_head,
        "feed_forward_proj": {ours: theirs for theirs, ours in _FEED_FORWARD.items()}[config.feed_forward],
        "tie_word_embeddings": ties,
    }


def to_hf_names(model: EncoderDecoder) -> dict[str, Tensor]:
    """A model's weights under T5's names."""
    outside = {ours: theirs for theirs, ours in _OUTSIDE.items()}
    gated = model.config.feed_forward == "gated_gelu"
    inner = {"q": "q", "k": "k", "v": "v", "out": "o", "gate": "wi_0", "up": "wi_1" if gated else "wi", "down": "wo"}
    layers = {"attention": "SelfAttention", "cross": "EncDecAttention", "feed_forward": "DenseReluDense"}
    found = {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem in outside:
            stem = outside[stem]
        elif stem.endswith("_bias"):
            stem = f"{stem.removesuffix('_bias')}.block.0.layer.0.SelfAttention.relative_attention_bias"
        else:
            stack, layer, part, *rest = stem.split(".")
            number = _PARTS[stack].index(part.removesuffix("_norm"))
            last = f"{layers[part]}.{inner[rest[0]]}" if rest else "layer_norm"
            stem = f"{stack}.block.{layer}.layer.{number}.{last}"
        scale = model.config.width**0.5 if stem == "shared" and model.config.scale_embeddings else 1.0
        found[f"{stem}.{kind}"] = tensor * scale
    return found


def save_hf(model: EncoderDecoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model of ours as a T5 that transformers loads, whole or not at all.

    Its tokenizer ends every text by the end token, as T5's does.

    Args:
        model: Of T5's architecture.
        tokenizer: Whose ids it reads.
        folder: Where; what was there is replaced.

    Raises:
        UserError: If the model computes what no T5 does.
    """
    config, ending = model.config, Tokenizer.from_str(tokenizer.to_str())
    pad, end = (tokenizer.id_to_token(i) for i in (config.pad_id, config.end_id))
    ending.post_processor = processors.TemplateProcessing(f"$A {end}", f"$A {end} $B {end}", [(end, config.end_id)])
    with atomic_dir(folder) as temporary:
        write_json(temporary / "config.json", config_to_hf(config))
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in to_hf_names(model).items()}
        safetensors.torch.save_file(weights, temporary / "model.safetensors", {"format": "pt"})
        save_tokenizer(ending, temporary)
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": pad,
            "eos_token": end,
            "model_input_names": ["input_ids", "attention_mask"],  # else it gives token types, which T5 does not take
            "clean_up_tokenization_spaces": False,
        }
        write_json(temporary / "tokenizer_config.json", described)


def load_hf(directory: Path) -> EncoderDecoder:
    """An encoder-decoder with the weights of a Hugging Face directory of T5's architecture.

    Raises:
        UserError: If a file is missing or damaged, or the weights do not fit the configuration.
    """
    tensors = read_hf(directory)
    for copy in ("shared.weight", *_COPIES):  # a tied matrix may have been saved under any of its names
        if copy in tensors:
            tensors.setdefault("shared.weight", tensors[copy])
    head, shared = tensors.get("lm_head.weight"), tensors.get("shared.weight")
    if head is not None and shared is None:
        tensors["shared.weight"] = shared = head
    tied = head is None or (shared is not None and torch.equal(head, shared))
    if tied:
        tensors.pop("lm_head.weight", None)
    model = EncoderDecoder(config_from_hf(read_json(directory / "config.json"), str(directory), tied))
    fill(model, from_hf_names(tensors), str(directory))
    return model


def save_encoder_decoder(
    model: nn.Module, config: EncoderDecoderConfig, tokenizer: Tokenizer, folder: Path, **more: Any
) -> None:
    """Write a checkpoint of our own, whole or not at all.

    Args:
        model: An encoder-decoder, or a model with one.
        config: The encoder-decoder's shape.
        tokenizer: Whose ids it reads.
        folder: Where; what was there is replaced.
        **more: Further entries of `config.json`.
    """
    save_checkpoint("encoder_decoder", model, config, folder, partial(save_tokenizer, tokenizer), **more)


def read_own(folder: Path) -> tuple[dict[str, Any], EncoderDecoderConfig, dict[str, Tensor]]:
    """A checkpoint of our own: the contents of `config.json`, the model's shape, and the weights.

    Raises:
        UserError: If it is none, or damaged.
    """
    return read_checkpoint(folder, "encoder_decoder", EncoderDecoderConfig)


def t5_directory(place: Path | str) -> Path:
    """The folder of an encoder-decoder: itself, or what the Hub has under this id.

    Raises:
        UserError: If there is none, or it is no checkpoint.
    """
    directory = Path(place)
    recover_dir(directory)
    if not directory.is_dir():
        if str(place).count("/") != 1 or str(place).startswith(".") or directory.parent.is_dir():
            raise UserError(f"There is no folder {place}. Name one with a T5, or a T5 on the Hub: google-t5/t5-small")
        directory = fetch_from_hub(str(place))
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json: it is no checkpoint.")
    return directory


def load_encoder_decoder(place: Path | str) -> tuple[EncoderDecoder, Tokenizer]:
    """A model of our own or a T5 of Hugging Face's, in evaluation mode, and its tokenizer.

    Args:
        place: A folder, or the id of a T5 on the Hub.

    Raises:
        UserError: If it cannot be had or is damaged, or its tokenizer has ids that the model does not know.
    """
    directory = t5_directory(place)
    if read_json(directory / "config.json").get("model_type") == OURS:
        _, shape, weights = read_own(directory)
        model = EncoderDecoder(shape)
        fill(model, weights, str(directory))
    else:
        model = load_hf(directory)
    tokenizer = tokenizer_of(directory)
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise UserError(
            f"The tokenizer in {directory} has {tokenizer.get_vocab_size():,} tokens, and the model knows "
            f"{model.config.vocab_size:,}: they do not belong together."
        )
    return model.eval(), tokenizer


def main(checkpoint: str | None = None) -> None:
    """Print how a decoder layer of T5 is called here and there, and how far our logits are from transformers'.

    Args:
        checkpoint: The folder of a T5 of Hugging Face's, or its id on the Hub, such as google-t5/t5-small; a small one
            with random weights, which transformers makes and writes, if null.

    Raises:
        UserError: If the checkpoint cannot be had or read.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) if checkpoint is None else t5_directory(checkpoint)
        if checkpoint is None:
            torch.manual_seed(0)
            shape = T5Config(vocab_size=500, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                             decoder_start_token_id=0)  # fmt: skip
            T5ForConditionalGeneration(shape).save_pretrained(directory)
        ours, theirs = load_hf(directory).eval(), reference(T5ForConditionalGeneration, directory)
    for name, tensor in theirs.state_dict().items():
        if name.startswith("decoder.block.0."):
            (our_name,) = from_hf_names({name: tensor})
            print(f"{name:<66}{our_name:<42}{tuple(tensor.shape)}")
    source, target = torch.randint(1, ours.config.vocab_size, (2, 2, 12))  # (B, T) each
    with torch.no_grad():
        found = theirs(input_ids=source, decoder_input_ids=target).logits  # (B, T, vocab_size)
        tell_difference("logits", ours(source, target), found)


if __name__ == "__main__":
    run_file(main)
