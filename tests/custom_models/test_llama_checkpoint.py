"""Checkpoints that are no Llama, damaged or cut short are refused in words; heads are tied where they are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from custom_models.llama import LlamaConfig, main
from custom_models.llama_checkpoint import check_vocabulary, hf_module_names, load_llama, save_llama
from tests.conftest import make_llama, write_tokenizer
from tests.workflows.conftest import file_size_limit
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError

IDS = torch.tensor([[5, 70, 12, 200, 33]])


@pytest.fixture
def hf(tiny_llama_hf, tmp_path) -> Path:
    """A copy of the tiny Llama in Hugging Face's form, to be spoiled."""
    return shutil.copytree(tiny_llama_hf, tmp_path / "hf")


@pytest.fixture
def lit(tiny_llama, tmp_path) -> Path:
    """A copy of it in LitGPT's form."""
    return shutil.copytree(tiny_llama, tmp_path / "lit")


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_yaml(folder: Path, **changes: Any) -> None:
    file = folder / "model_config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba'; this reads llama and qwen2"),
        ({"hidden_act": "gelu", "mlp_bias": True}, r"2 problems:\n.*activation 'gelu'.*\n.*mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {}}, "quantized weights; take the 16-bit checkpoint"),
        ({"hidden_size": "48", "num_hidden_layers": 0}, r"2 problems:\n.*size is '48'.*\n.*num_hidden_layers is 0"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"rms_norm_eps": "small"}, "config.json is damaged"),
        ({"rope_parameters": [1]}, "config.json is damaged"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "a part of each head without RoPE"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE of type 'longrope'"),
        ({"num_attention_heads": 5, "head_dim": None}, "width 48 is no multiple of n_head 5"),
    ],
)  # fmt: skip
def test_a_config_that_is_none_is_refused(hf, changes, message):
    change_config(hf, **changes)
    with pytest.raises(UserError, match=message):
        load_llama(hf)


def test_another_architecture_is_refused_in_both_forms(lit, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=16, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="architecture 'gpt2'"):
        load_llama(tmp_path)
    change_yaml(lit, norm_class_name="LayerNorm", parallel_residual=True)
    with pytest.raises(UserError, match=r"is no Llama: .* norm_class_name 'LayerNorm', parallel_residual True"):
        load_llama(lit)


def test_litgpts_other_stretches_of_rope_are_refused(lit):
    change_yaml(lit, rope_adjustments={"factor": 2.0, "beta_fast": 32, "beta_slow": 1})
    with pytest.raises(UserError, match="reads Llama 3's only"):
        load_llama(lit)


@pytest.mark.parametrize(
    "changes", [{"norm_eps": "small"}, {"rope_adjustments": ["low_freq_factor"]}, {"rope_base": None},
                {"rope_adjustments": {"low_freq_factor": 1, "high_freq_factor": 4}}]
)  # fmt: skip
def test_a_damaged_model_config_is_told(lit, changes):
    change_yaml(lit, **changes)
    with pytest.raises(UserError, match=r"model_config\.yaml is damaged"):
        load_llama(lit)


def test_missing_extra_and_misshapen_weights_are_told_at_once(hf, lit):
    weights = load_file(hf / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"][:5].clone()
    save_file({**weights, "visual.weight": torch.zeros(2)}, hf / "model.safetensors")
    told = r"lacks last_norm\.weight; has visual\.weight, which the model has not; has \S+up\.weight of shape \(5, 48\)"
    with pytest.raises(UserError, match=told):
        load_llama(hf)

    stored = torch.load(lit / "lit_model.pth", weights_only=True)
    stored["transformer.h.0.attn.qkv.weight"] = stored["transformer.h.0.attn.qkv.weight"][:7].clone()
    torch.save(stored, lit / "lit_model.pth")
    with pytest.raises(UserError, match=r"lacks layers\.0\.attention\.q\.weight; .* and 1 more"):
        load_llama(lit)


def test_a_config_of_other_sizes_does_not_fit(hf):
    change_config(hf, num_hidden_layers=3, vocab_size=400)
    with pytest.raises(UserError, match=r"lacks layers\.2\.\S+; .*and 7 more"):
        load_llama(hf)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "missing"])
@pytest.mark.parametrize("form", ["hf", "lit"])
def test_damaged_weights_are_told(request, form, damage):
    folder = request.getfixturevalue(form)
    file = folder / ("model.safetensors" if form == "hf" else "lit_model.pth")
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"not weights", "missing": b""}[damage])
    if damage == "missing":
        file.unlink()
    with pytest.raises(UserError, match=file.name):
        load_llama(folder)


def test_damaged_or_missing_configurations_are_told(hf, lit, tmp_path):
    (hf / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(UserError, match=r"config\.json, line 1: not valid JSON"):
        load_llama(hf)
    (lit / "model_config.yaml").unlink()
    with pytest.raises(UserError, match=r"model_config\.yaml does not exist"):
        load_llama(lit)
    with pytest.raises(UserError, match="There is no folder"):
        load_llama(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_llama(tmp_path / "empty")


def test_pickled_weights_are_not_read(hf):
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"or holds pickled weights\. Download the model's safetensors"):
        load_llama(hf)


def test_a_shard_that_is_not_there_is_named(hf):
    (hf / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-00001-of-00001\.safetensors"):
        load_llama(hf)


@torch.no_grad()
def test_a_head_that_has_come_to_differ_is_a_head_of_its_own(lit, hf):
    """The configuration still says tied; LitGPT's training has untied."""
    stored = torch.load(lit / "lit_model.pth", weights_only=True)
    stored["lm_head.weight"] = 2 * stored["lm_head.weight"]
    torch.save(stored, lit / "lit_model.pth")
    model = load_llama(lit)
    assert not model.config.tied
    torch.testing.assert_close(model(IDS), 2 * load_llama(hf)(IDS), atol=1e-5, rtol=0)

    weights = load_file(hf / "model.safetensors")
    save_file({**weights, "lm_head.weight": 2 * weights["model.embed_tokens.weight"]}, hf / "model.safetensors")
    torch.testing.assert_close(load_llama(hf)(IDS), model(IDS), atol=1e-5, rtol=0)
    expected = AutoModelForCausalLM.from_pretrained(hf).eval()(IDS).logits
    torch.testing.assert_close(load_llama(hf)(IDS), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_frequencies_that_old_files_keep_are_passed_over(hf):
    weights = load_file(hf / "model.safetensors")
    before = load_llama(hf)(IDS)
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, hf / "model.safetensors")
    assert torch.equal(load_llama(hf)(IDS), before)


def test_names_of_linear_layers_are_hugging_faces(tmp_path):
    folder = make_llama(tmp_path, tied=False)
    ours, theirs = (
        {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        for model in (load_llama(folder), AutoModelForCausalLM.from_pretrained(folder))
    )
    names = hf_module_names(2)
    assert set(names) == ours and set(names.values()) == theirs and len(ours) == 15


@pytest.mark.parametrize("form", ["tiny_llama", "tiny_qwen2", "tiny_qwen2_hf"])
@torch.no_grad()
def test_what_is_saved_is_read_by_us_and_by_transformers(form, request, tmp_path):
    """Tied and untied, with biases and without; from either form."""
    source = request.getfixturevalue(form)
    model = load_llama(source)
    for parameter in model.parameters():
        parameter.mul_(1.1)  # trained, say
    save_llama(model, source, tmp_path / "saved")
    again = load_llama(tmp_path / "saved")
    # Qwen2's config.json does not say the heads' size, LitGPT's file does
    assert replace(again.config, head_size=again.head_size) == replace(model.config, head_size=model.head_size)
    assert torch.equal(again(IDS), model(IDS))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)
    assert ChatTemplate.from_checkpoint(tmp_path / "saved").encode("fever")


def test_a_full_disk_leaves_the_old_model(tiny_llama, tmp_path):
    save_llama(load_llama(tiny_llama), tiny_llama, tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    with file_size_limit(50_000), pytest.raises(UserError, match="Could not write"):
        save_llama(load_llama(tiny_llama), tiny_llama, tmp_path / "saved")
    assert {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_another_models_tokenizer_is_told(hf, tmp_path):
    config = load_llama(hf).config
    check_vocabulary(config, write_tokenizer(tmp_path), tmp_path)
    small = LlamaConfig(**{**vars(config), "vocab_size": 50})
    with pytest.raises(UserError, match=r"has ids up to \d+, and the model knows 50 tokens"):
        check_vocabulary(small, write_tokenizer(tmp_path), tmp_path)
    other = make_llama(tmp_path / "other")
    change_config(other, vocab_size=300)
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:300].clone()
    save_file(weights, other / "model.safetensors")
    with pytest.raises(UserError, match="another model's tokenizer"):
        main("Hi", other, max_new_tokens=2)
