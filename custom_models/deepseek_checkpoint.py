"""Hugging Face's checkpoints of DeepSeek-V3 and its kin (model_type "deepseek_v3") as our decoder.

Matrices are stored as ours are, so only the names differ; here are the tables. Layers beyond the decoder's own are
those of multi-token prediction, and are read, too. DeepSeek's original files have 8-bit weights with a scale for each
block, which this does not read: take a checkpoint in 16 bits.

Run it: python -m custom_models.deepseek_checkpoint
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from custom_models.configuration import configured
from custom_models.deepseek import DeepSeek, DeepSeekConfig
from custom_models.mixture_of_experts import ExpertsConfig
from custom_models.multi_token_prediction import MultiTokenPrediction
from custom_models.rope import RopeScaling
from custom_models.weights import fill, quiet_transformers, read_hf, reference, tell_difference
from workflows.errors import UserError, report_all, run_file
from workflows.files import read_json

_OUTSIDE = {"model.embed_tokens": "tokens", "model.norm": "norm", "lm_head": "head"}
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_INSIDE = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q_up",
    "self_attn.q_a_proj": "attention.q_down",
    "self_attn.q_a_layernorm": "attention.q_norm",
    "self_attn.q_b_proj": "attention.q_up",
    "self_attn.kv_a_proj_with_mqa": "attention.kv_down",
    "self_attn.kv_a_layernorm": "attention.kv_norm",
    "self_attn.kv_b_proj": "attention.kv_up",
    "self_attn.o_proj": "attention.out",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.gate": "feed_forward.router",
}
_FEED_FORWARD = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_PREDICTION = {"enorm": "embedding_norm", "hnorm": "state_norm", "eh_proj": "join", "shared_head.norm": "norm"}
"""Hugging Face's names -> ours: around the layers, in a layer, in its feed-forward part, in a layer that predicts."""

_COPIES = ("embed_tokens", "shared_head.head")
"""What such a layer shares with the decoder, and the files have twice."""

_CONFIG = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "n_layer",
    "first_k_dense_replace": "n_dense",
    "intermediate_size": "inner_width",
    "num_attention_heads": "n_head",
    "q_lora_rank": "q_rank",
    "kv_lora_rank": "kv_rank",
    "qk_nope_head_dim": "nope_size",
    "qk_rope_head_dim": "rope_size",
    "v_head_dim": "value_size",
    "max_position_embeddings": "max_length",
}
_EXPERTS_CONFIG = {
    "n_routed_experts": "n_routed",
    "num_experts_per_tok": "n_active",
    "moe_intermediate_size": "inner_width",
    "n_shared_experts": "n_shared",
    "n_group": "n_group",
    "topk_group": "n_active_group",
    "norm_topk_prob": "normalise",
    "routed_scaling_factor": "scale",
}
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
"""What this decoder is built for; a checkpoint that says otherwise would give wrong numbers."""


def config_from_hf(config: dict[str, Any], place: str) -> DeepSeekConfig:
    """Read a Hugging Face `config.json`.

    Args:
        config: Its contents.
        place: Where it lies, for messages.

    Raises:
        UserError: If the model is of another architecture, or has a part that ours lacks.
    """
    if config.get("model_type") != "deepseek_v3":
        raise UserError(
            f"{place} is of the architecture {config.get('model_type')!r}; this decoder reads 'deepseek_v3' "
            "(DeepSeek-V3, R1 and what is built like them)."
        )
    if "quantization_config" in config:
        raise UserError(f"{place} has weights of fewer bits, with scales, which are not read: take it in 16 bits.")
    place = f"{place}/config.json"
    report_all(
        [f"{place} has {config[name]!r:.40} for {name}; this decoder knows {known!r} only."
         for name, known in _ONLY.items() if config.get(name, known) != known]
    )  # fmt: skip
    try:
        scaling = RopeScaling.from_config(config)
    except UserError as e:
        raise UserError(f"{place}: {e}") from None
    rope = config.get("rope_parameters") or {}
    experts = {ours: config.get(theirs) for theirs, ours in _EXPERTS_CONFIG.items()}
    found: dict[str, Any] = {ours: config.get(theirs) for theirs, ours in _CONFIG.items()}
    found |= {
        "experts": configured(ExpertsConfig, experts, place, {ours: name for name, ours in _EXPERTS_CONFIG.items()}),
        "rope_base": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        "rope_scaling": scaling,
        "rope_neighbours": config.get("rope_interleave", True),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied": config.get("tie_word_embeddings", False),
    }
    if isinstance(found["n_layer"], int) and isinstance(found["n_dense"], int):
        found["n_dense"] = min(found["n_dense"], found["n_layer"])  # some small ones say more than they have
    names = {ours: theirs for theirs, ours in _CONFIG.items()} | {"norm_eps": "rms_norm_eps", "rope_base": "rope_theta"}
    return configured(DeepSeekConfig, found, place, names)


def our_names(tensors: dict[str, Tensor], n_layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The decoder's weights and those of multi-token prediction, under our names; one that is unknown keeps its own.

    Args:
        tensors: A checkpoint's.
        n_layer: Layers of the decoder.
    """
    predicts = f"model.layers.{n_layer}.eh_proj.weight" in tensors
    ours: dict[str, Tensor] = {}
    prediction: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if found := _IN_LAYER.fullmatch(stem):
            number, inner = int(found[1]), found[2]
            kind = "bias" if kind == "e_score_correction_bias" else kind
            if number < n_layer or not predicts:
                ours[f"layers.{number}.{_inside(inner)}.{kind}"] = tensor
            elif inner not in _COPIES:
                within = _PREDICTION.get(inner) or f"layer.{_inside(inner)}"
                prediction[f"depths.{number - n_layer}.{within}.{kind}"] = tensor
        else:
            ours[f"{_OUTSIDE.get(stem, stem)}.{kind}"] = tensor
    return ours, prediction


def _inside(name: str) -> str:
    """A part of a layer by our name: "mlp.experts.3.up_proj" is "feed_forward.experts.3.up"."""
    part, _, last = name.rpartition(".")
    if part.startswith("mlp") and last in _FEED_FORWARD:
        return f"{part.replace('mlp', 'feed_forward').replace('shared_experts', 'shared')}.{_FEED_FORWARD[last]}"
    return _INSIDE.get(name, name)


def load_deepseek(directory: Path) -> tuple[DeepSeek, MultiTokenPrediction | None]:
    """A decoder with the weights of a Hugging Face directory, in float32, and its multi-token prediction if there.

    Raises:
        UserError: If a file is missing or damaged, or the weights do not fit the configuration.
    """
    shape = config_from_hf(read_json(directory / "config.json"), str(directory))
    files = ("model.safetensors", "model.safetensors.index.json")
    if not any((directory / file).is_file() for file in files):
        raise UserError(f"{directory} has neither {' nor '.join(files)}. Download the checkpoint's safetensors.")
    tensors = read_hf(directory)
    if shape.tied:
        tensors.pop("lm_head.weight", None)  # the embeddings again
    ours, predicted = our_names(tensors, shape.n_layer)
    model = DeepSeek(shape)
    fill(model, ours, str(directory))
    if not predicted:
        return model, None
    prediction = MultiTokenPrediction(shape, 1 + max(int(name.split(".")[1]) for name in predicted))
    fill(prediction, predicted, str(directory))
    return model, prediction


def main(checkpoint_dir: Path | None = None) -> None:
    """Print the weights of a layer of experts under our names, and how far our logits are from transformers'.

    Args:
        checkpoint_dir: A folder of Hugging Face's; a small DeepSeek-V3 with random weights, which transformers makes
            and writes, if null.

    Raises:
        UserError: If the checkpoint cannot be read.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        directory = checkpoint_dir or Path(folder)
        if checkpoint_dir is None:
            torch.manual_seed(0)
            DeepseekV3ForCausalLM(DeepseekV3Config(
                vocab_size=500, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
                first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_group=2,
                topk_group=1, num_experts_per_tok=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16,
                qk_rope_head_dim=8, v_head_dim=16, max_position_embeddings=128,
            )).save_pretrained(directory)  # fmt: skip
        ours, prediction = load_deepseek(directory)
        theirs = reference(DeepseekV3ForCausalLM, directory)
        stored = read_hf(directory)
    layer = f"model.layers.{ours.config.n_dense}."
    for name, tensor in stored.items():
        if name.startswith(layer) and not re.search(r"experts\.[1-9]", name):
            (our_name,) = our_names({name: tensor}, ours.config.n_layer)[0]
            print(f"{name:<55} {our_name:<40} {tuple(tensor.shape)}")
    print(f"layers of multi-token prediction: {0 if prediction is None else len(prediction.depths)}")
    ids = torch.randint(ours.config.vocab_size, (2, 32))  # (B, T)
    with torch.no_grad():
        tell_difference("logits", ours.eval()(ids), theirs(ids).logits)


if __name__ == "__main__":
    run_file(main)
