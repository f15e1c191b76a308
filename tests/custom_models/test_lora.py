"""LoRA is peft's, forward and backward; merging changes nothing, unmerging restores every bit; files are peft's."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from custom_models.encoder import Encoder, bert
from custom_models.generation import generate
from custom_models.llama_checkpoint import hf_module_names, load_llama
from custom_models.lora import (
    LoRALinear,
    add_lora,
    fold_lora,
    load_lora,
    lora_layers,
    main,
    merge_lora,
    save_lora,
    trainable_parameters,
    unmerge_lora,
)
from tests.conftest import make_llama
from tests.workflows.conftest import file_size_limit
from workflows.errors import UserError

IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, dict[str, Any]] = {
    "rank 4": {"rank": 4, "alpha": 8.0},
    "rank 1": {"rank": 1, "alpha": 3.0},
    "rank-stabilised": {"rank": 6, "alpha": 6.0, "rslora": True},
    "dropout": {"rank": 4, "alpha": 8.0, "dropout": 0.3},
}


def plain(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20, bias=bias), nn.ReLU(), nn.Linear(20, 5, bias=bias))


def stir(model: nn.Module) -> nn.Module:
    """Give the B matrices, which begin at zero, something to say."""
    torch.manual_seed(3)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.B, std=0.3)
    return model


def peft_of(model: nn.Module, names: dict[str, str], adapted: nn.Module, settings: dict[str, Any]) -> Any:
    """peft's model with the adapters of ours."""
    config = peft.LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], lora_dropout=settings.get("dropout", 0.0),
        use_rslora=settings.get("rslora", False),
        target_modules=[names.get(name, name) for name in lora_layers(adapted)],
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    copied = {f"base_model.model.{names.get(name, name)}.lora_{part}.default.weight": getattr(layer, part).detach()
              for name, layer in lora_layers(adapted).items() for part in "AB"}  # fmt: skip
    assert {name for name, p in wrapped.named_parameters() if p.requires_grad} == set(copied)
    wrapped.load_state_dict(copied, strict=False)
    return wrapped


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_layers_output_and_gradients_are_pefts(settings, bias):
    ours = plain(bias)
    add_lora(ours, **SETTINGS[settings])
    stir(ours)
    theirs = peft_of(plain(bias), {}, ours, SETTINGS[settings])
    results = []
    for model in (ours, theirs):
        x = torch.randn(7, 12, generator=torch.Generator().manual_seed(4)).requires_grad_()
        torch.manual_seed(5)  # of dropout
        out = model(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == len(results[1]) == 6
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


@pytest.mark.parametrize("settings", ["rank 4", "rank-stabilised"])
def test_llamas_logits_and_gradients_are_pefts(settings, tiny_llama_hf):
    ours = load_llama(tiny_llama_hf)
    add_lora(ours, **SETTINGS[settings])
    stir(ours)
    names = hf_module_names(2)
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama_hf, dtype=torch.float32)
    theirs = peft_of(hf, names, ours, SETTINGS[settings])
    logits = ours(IDS)
    torch.testing.assert_close(logits, theirs(IDS).logits, atol=1e-4, rtol=0)
    assert (logits - load_llama(tiny_llama_hf)(IDS)).abs().max() > 0.5
    for found in (logits, theirs(IDS).logits):
        F.cross_entropy(found[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    their_parameters = dict(theirs.named_parameters())
    assert len(lora_layers(ours)) == 14
    for name, layer in lora_layers(ours).items():
        for part in "AB":
            their = their_parameters[f"base_model.model.{names[name]}.lora_{part}.default.weight"].grad
            assert their.abs().max() > 1e-4
            torch.testing.assert_close(getattr(layer, part).grad, their, rtol=1e-3, atol=1e-5)


def test_half_precision_weights_have_float32_adapters_as_pefts(tiny_llama_hf):
    layer = LoRALinear(nn.Linear(12, 20).bfloat16(), 4, 8.0)
    nn.init.normal_(layer.B)
    assert layer.A.dtype == layer.B.dtype == torch.float32
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(4)).bfloat16()
    found = layer(x)
    assert found.dtype == torch.bfloat16
    expected = peft_of(nn.Sequential(layer.linear), {}, nn.Sequential(layer), {"rank": 4, "alpha": 8.0})(x)
    assert torch.equal(found, expected)


def test_an_adapted_model_begins_as_it_was_and_only_its_adapters_learn():
    model, before = plain(), plain()
    assert add_lora(model, ["0"], rank=3) == ["0"]
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(4))
    assert torch.equal(model(x), before(x))
    assert trainable_parameters(model) == 3 * (12 + 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model(x), before(x))
    assert torch.equal(model[0].linear.weight, before[0].weight) and torch.equal(model[2].weight, before[2].weight)


def test_adapters_fit_other_models_than_llama():
    torch.manual_seed(0)
    encoder = Encoder(bert(60, width=16, n_layer=2, n_head=2, inner_width=24)).eval()
    expected = encoder(IDS % 60).last
    names = add_lora(encoder, ["*.attention.[qv]"])
    assert names == [f"layers.{n}.attention.{part}" for n in (0, 1) for part in "qv"]
    assert not lora_layers(encoder)["layers.0.attention.q"].training  # as the model is
    torch.testing.assert_close(encoder(IDS % 60).last, expected)
    stir(encoder)
    assert (encoder(IDS % 60).last - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_computes_the_same_and_unmerged_has_every_bit_again(dtype, tiny_llama_hf):
    model = load_llama(tiny_llama_hf, dtype).eval()
    bits = {name: p.clone() for name, p in model.state_dict().items()}
    add_lora(model, rank=4)
    stir(model)
    with torch.no_grad():
        apart = model(IDS)
        merge_lora(model)
        merged = {name: layer.linear.weight.clone() for name, layer in lora_layers(model).items()}
        merge_lora(model)  # a second time changes nothing
        tolerance = 1e-4 if dtype == torch.float32 else 0.5
        torch.testing.assert_close(model(IDS), apart, atol=tolerance, rtol=0)
        subtracted = [(weight - lora_layers(model)[name].change()).to(dtype) for name, weight in merged.items()]
        unmerge_lora(model)
        unmerge_lora(model)
    assert torch.equal(model(IDS), apart)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.linear.weight, bits[f"{name}.weight"])
        assert not torch.equal(merged[name], bits[f"{name}.weight"])
    # why the weight is kept: to subtract the change again restores it only nearly
    assert any(not torch.equal(w, bits[f"{name}.weight"]) for name, w in zip(merged, subtracted, strict=True))


def test_merged_weights_are_pefts():
    ours = plain()
    add_lora(ours, **SETTINGS["rank 4"])
    stir(ours)
    theirs = peft_of(plain(), {}, ours, SETTINGS["rank 4"]).merge_and_unload()
    merge_lora(ours)
    for name, layer in lora_layers(ours).items():
        torch.testing.assert_close(layer.linear.weight, theirs.get_submodule(name).weight, rtol=0, atol=1e-7)


def test_folded_is_a_plain_model_with_the_merged_weights(tiny_llama_hf):
    model = load_llama(tiny_llama_hf).eval()
    names = set(model.state_dict())
    add_lora(model, rank=4)
    stir(model)
    expected = generate(model, IDS, 10).ids
    fold_lora(model)
    assert set(model.state_dict()) == names and not lora_layers(model)
    assert generate(model, IDS, 10).ids == expected
    add_lora(model, rank=2)  # and can be adapted again


def test_what_is_merged_moves_with_the_model():
    model = plain()
    add_lora(model)
    stir(model)
    before = model[0].linear.weight.clone()
    merge_lora(model)
    model.double()
    unmerge_lora(model)
    assert torch.equal(model[0].linear.weight, before.double())


def test_saved_and_loaded_adapters_are_the_same_and_alone(tiny_llama_hf, tmp_path):
    model = load_llama(tiny_llama_hf).eval()
    add_lora(model, ["*.attention.*"], rank=4, alpha=12, dropout=0.1, rslora=True)
    stir(model)
    expected = model(IDS)
    merge_lora(model)
    save_lora(model, tmp_path / "adapter")
    assert sorted(file.name for file in tmp_path.rglob("*")) == [
        "adapter", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 16 and all(4 in tensor.shape for tensor in stored.values())
    again = load_llama(tiny_llama_hf).eval()
    assert load_lora(again, tmp_path / "adapter") == list(lora_layers(model))
    assert torch.equal(again(IDS), expected)
    assert again.layers[0].attention.q.dropout.p == 0.1 and trainable_parameters(again) == sum(
        tensor.numel() for tensor in stored.values()
    )


@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_what_we_save_into_transformers_llama(tied, tmp_path):
    folder = make_llama(tmp_path / "base", tied=tied)
    model = load_llama(folder).eval()
    add_lora(model, **SETTINGS["rank-stabilised"])
    stir(model)
    save_lora(model, tmp_path / "adapter", hf_module_names(2), base=str(folder))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = hf(IDS).logits
    theirs = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)
        assert (theirs(IDS).logits - before).abs().max() > 0.5
    assert ("lm_head" in "".join(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))) == (not tied)


def test_peft_loads_what_we_save_into_our_own_modules(tmp_path):
    ours = plain()
    add_lora(ours, rank=3)
    stir(ours)
    save_lora(ours, tmp_path / "adapter")
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(4))
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / "adapter")
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-6, atol=1e-6)


def test_we_load_what_peft_saves(tiny_llama_hf, tmp_path):
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama_hf, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(hf, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    model = load_llama(tiny_llama_hf).eval()
    assert len(load_lora(model, tmp_path, hf_module_names(2))) == 4
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"alpha": 0.0, "dropout": 1.0}, r"2 problems:\n.*alpha must be positive.*\n.*dropout must be from"),
        ({"targets": ["*.query"]}, r"No linear layer is named '\*\.query'; there are \*\."),
        ({"targets": ["0", "nothing"], "rank": -1}, r"2 problems:\n.*rank.*\n.*'nothing'"),
        ({"targets": []}, "No layer is to be adapted"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_and_change_nothing(settings, message):
    model = plain()
    with pytest.raises(UserError, match=message):
        add_lora(model, **settings)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_the_names_that_there_are_stand_in_the_message(tiny_llama_hf):
    with pytest.raises(UserError, match=r"'q_proj'; there are layers\.\*\.attention\.k, layers\.\*\.attention\.out, "):
        add_lora(load_llama(tiny_llama_hf), ["q_proj"])


def test_a_second_adapter_is_refused():
    model = plain()
    add_lora(model, ["0"])
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(model, ["2"])
    assert list(lora_layers(model)) == ["0"]


def test_a_weight_that_is_used_elsewhere_is_not_adapted():
    model = nn.ModuleDict({"tokens": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["tokens"].weight
    with pytest.raises(UserError, match=r"head shares its weight with tokens\.weight"):
        add_lora(model)


def test_code_that_reads_a_weight_does_not_pass_the_adapter_over():
    attention = nn.MultiheadAttention(8, 2)
    add_lora(attention)
    with pytest.raises(AttributeError, match="weight"):
        attention(*[torch.zeros(3, 1, 8)] * 3)


@pytest.fixture
def adapter(tiny_llama_hf, tmp_path) -> Path:
    model = load_llama(tiny_llama_hf)
    add_lora(model, ["*.attention.*"], rank=4)
    save_lora(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_adapter_of_another_shape_or_another_model_is_told(adapter, tmp_path):
    wider = load_llama(make_llama(tmp_path / "wider", hidden_size=64))
    told = r"adapter do not fit the model: it has \S+A of shape \(4, 48\), not \(4, 64\); .* and \d+ more"
    with pytest.raises(UserError, match=told):
        load_lora(wider, adapter)
    assert not lora_layers(wider) and trainable_parameters(wider) > 0
    shallow = load_llama(make_llama(tmp_path / "shallow", num_hidden_layers=1))
    with pytest.raises(UserError, match=r"has layers\.1\.attention\.\S+, which the model has not"):
        load_lora(shallow, adapter)
    with pytest.raises(UserError, match="which the model has not"):
        load_lora(plain(), adapter)


def test_a_rank_that_is_not_the_files_is_told(adapter, tiny_llama_hf):
    change(adapter, r=8)
    with pytest.raises(UserError, match=r"A of shape \(4, 48\), not \(8, 48\)"):
        load_lora(load_llama(tiny_llama_hf), adapter)


def test_half_an_adapter_is_told(adapter, tiny_llama_hf):
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    del stored["base_model.model.layers.0.attention.q.lora_B.weight"]
    save_file(stored, file)
    with pytest.raises(UserError, match=r"lacks layers\.0\.attention\.q\.B"):
        load_lora(load_llama(tiny_llama_hf), adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "its peft_type is 'IA3', not LORA"),
        ({"use_dora": True, "bias": "all"}, r"2 problems:\n.*it has biases.*\n.*use_dora, which this LoRA lacks"),
        ({"rank_pattern": {"q": 2}}, "it asks for rank_pattern"),
        ({"init_lora_weights": "pissa"}, "begun by 'pissa'"),
        ({"r": "four"}, "r, lora_alpha and lora_dropout are 'four', 16"),
        ({"lora_alpha": None}, "lora_dropout are 4, None, 0.0"),
        ({"r": 0}, "rank must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_adapters_of_another_kind_are_refused(adapter, tiny_llama_hf, changes, message):
    change(adapter, **changes)
    model = load_llama(tiny_llama_hf)
    with pytest.raises(UserError, match=message):
        load_lora(model, adapter)
    assert not lora_layers(model)


@pytest.mark.parametrize("damage", ["cut", "missing", "no config", "bad config"])
def test_damaged_files_are_told(adapter, tiny_llama_hf, damage):
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "bad config":
        config.write_text("{")
    else:
        (weights if damage == "missing" else config).unlink()
    with pytest.raises(UserError, match=(config if "config" in damage else weights).name):
        load_lora(load_llama(tiny_llama_hf), adapter)


def test_there_must_be_something_to_save(tmp_path):
    with pytest.raises(UserError, match="no adapters to save"):
        save_lora(plain(), tmp_path / "adapter")


def test_a_full_disk_leaves_the_old_adapter(adapter, tiny_llama_hf, tmp_path):
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    model = load_llama(tiny_llama_hf)
    add_lora(model, rank=64)
    with file_size_limit(20_000), pytest.raises(UserError, match="Could not write"):
        save_lora(model, adapter)
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    shutil.rmtree(adapter)


def test_the_files_command_shows_ranks_and_an_exact_unmerge(capsys):
    main(size=16, hidden_rank=2, steps=250)
    said = capsys.readouterr().out
    left = {int(line.split()[0]): float(line.split()[2].rstrip("%")) for line in said.splitlines() if "%" in line}
    assert left[1] > 20 and left[2] < 1 and left[4] < 1
    assert "unmerged: 0 of 256 weights have changed; subtracting would have changed" in said
    with pytest.raises(UserError, match="hidden_rank must be from 1"):
        main(size=4, hidden_rank=5)
