"""The plan's numbers are those of real modules: parameters, what autograd keeps, caches; and they grow as they must."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from workflows.download import registry
from workflows.errors import UserError
from workflows.planning.architecture import find_architecture
from workflows.planning.memory import (
    Device,
    activations,
    kept_per_token,
    kernels,
    sampling,
    trained_state,
    weights,
)
from workflows.planning.rows import RowShape
from workflows.training.attention import RowAttention
from workflows.training.batch import Tree, pack_row
from workflows.training.mixed_precision import MasterWeights
from workflows.training.model import DTYPES, LoRAArgs, load_model
from workflows.training.rollouts import _make_caches

FULL = LoRAArgs(r=0)
CPU, GPU = Device(torch.bfloat16), Device(torch.bfloat16, on_gpu=True)
ROW = RowShape(
    tokens=2048, learned=512, kept_pairs=0, copied_keys=2048, rows=2, step_tokens=4096, lengths=4, prompt=64,
    source="made up",
)  # fmt: skip


@pytest.mark.parametrize("name", registry())
def test_every_model_of_the_registry_is_known_without_its_checkpoint(name: str):
    entry, model = registry()[name], find_architecture(name)
    assert model.weights == entry["parameters"]
    assert model.sure


@pytest.mark.parametrize("lora", [LoRAArgs(r=4), LoRAArgs(r=4, mlp=False, key=False), FULL], ids=str)
@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_qwen2"])
def test_parameters_are_those_of_the_model_that_is_loaded(fixture: str, lora: LoRAArgs, request):
    directory = request.getfixturevalue(fixture)
    model, planned = load_model(directory, lora), find_architecture(directory, lora)
    parameters = {id(p): p for p in model.parameters()}.values()
    assert planned.weights + planned.adapters == sum(p.numel() for p in parameters)
    assert planned.trained == sum(p.numel() for p in parameters if p.requires_grad)


def test_adapters_counted_by_hand():
    model = find_architecture("llama-3.1-8b-instruct", LoRAArgs(r=16))
    width, inner, key = 4096, 14336, 1024
    qkv = 3 * 16 * width + 16 * (width + 2 * key)
    assert model.adapters == 32 * (qkv + 16 * 2 * width + 3 * 16 * (width + inner))
    state = trained_state(model, CPU)
    assert state == {
        "adapters": 4 * model.adapters,
        "optimizer (AdamW)": 8 * model.adapters,
        "gradients": 4 * model.adapters,
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
@pytest.mark.parametrize("lora", [LoRAArgs(r=4), FULL], ids=str)
def test_trained_state_is_as_large_as_after_a_real_step(lora: LoRAArgs, precision: str, tiny_llama: Path):
    model = load_model(tiny_llama, lora, precision)
    masters = MasterWeights(model)
    optimizer = torch.optim.AdamW(masters.weights.values())
    (-model(pack_row([Tree([1, 2], [[3, 4]])])).sum()).backward()
    gradients = sum(weight.grad.nbytes for weight in masters.weights.values() if weight.grad is not None)
    optimizer.step()
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    copies = sum(weight.nbytes for weight in masters.weights.values())
    planned = trained_state(find_architecture(tiny_llama, lora), Device(DTYPES[precision]))
    assert planned["gradients"] == gradients and planned["optimizer (AdamW)"] == moments
    assert planned.get("master weights in float32" if lora.r == 0 else "adapters", copies) == copies
    assert ("master weights in float32" in planned) == (lora.r == 0 and precision != "32-true")


def kept_bytes(directory: Path, lora: LoRAArgs, precision: str, tokens: int) -> tuple[int, int]:
    """Bytes that autograd keeps of the blocks' forward pass, without parameters; and the row's pairs."""
    model = load_model(directory, lora, precision)
    batch = pack_row([Tree([1] * (tokens // 2), [[2] * (tokens // 2 + 1)])])
    outside = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.hidden(batch)
    assert states.requires_grad
    return sum(kept.values()), sum(piece.hidden.numel() for piece in RowAttention(batch).pieces)


@pytest.mark.parametrize(
    ("lora", "precision"),
    [
        (LoRAArgs(r=4), "32-true"),
        (LoRAArgs(r=4), "bf16-true"),
        (LoRAArgs(r=4, mlp=False), "32-true"),
        (LoRAArgs(r=4, projection=False, dropout=0.1), "32-true"),
        (FULL, "32-true"),
    ],
    ids=str,
)
def test_what_a_token_keeps_is_what_autograd_saves(tiny_llama: Path, lora: LoRAArgs, precision: str):
    model = find_architecture(tiny_llama, lora)
    device = Device(torch.float32 if precision == "32-true" else torch.bfloat16)
    config = model.config
    (small, few), (large, many) = (kept_bytes(tiny_llama, lora, precision, tokens) for tokens in (64, 256))
    pairs = config.n_layer * config.n_head * device.dtype.itemsize * (many - few)
    # what does not grow with the row (adapters' copies) falls out of the difference
    planned = 192 * config.n_layer * kept_per_token(model, device) + pairs
    assert planned == pytest.approx(large - small, rel=0.05)


def test_caches_are_as_large_as_the_real_ones(tiny_llama: Path):
    model = load_model(tiny_llama)
    _make_caches(model, 6, 100)
    real = sum(block.attn.kv_cache.k.nbytes + block.attn.kv_cache.v.nbytes for block in model.transformer.h)
    parts = sampling(find_architecture(tiny_llama), Device(torch.float32), 6, 80, 20, prompts=2)
    assert parts["KV cache"] == real


def test_weights_that_are_not_cast_stay_in_the_file(tiny_llama: Path):
    model = find_architecture(tiny_llama)
    same, other = Device(model.stored), Device(torch.float16)
    assert model.stored == torch.float32
    assert weights(model, same) == ({}, 4 * model.weights)
    assert weights(model, other) == ({"weights in float16": 2 * model.weights}, 0)
    assert weights(model, same, written=True) == ({"weights in float32": 4 * model.weights}, 0)
    assert weights(model, replace(same, on_gpu=True))[1] == 0


def total(model_name: str, lora: LoRAArgs, device: Device, row: RowShape = ROW) -> int:
    model = find_architecture(model_name, lora)
    parts = [weights(model, device, written=lora.r == 0)[0], trained_state(model, device)]
    return sum(sum(part.values()) for part in [*parts, activations(model, device, row), kernels(device, row.lengths)])


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_more_of_anything_takes_more(device: Device):
    name, lora = "llama-3.1-8b-instruct", LoRAArgs()
    usual = total(name, lora, device)
    if device.on_gpu:
        assert total(name, lora, replace(device, quantize="bnb.nf4")) < usual
        nf4, double = (weights(find_architecture(name), replace(device, quantize=kind))[0]["weights in 4 bits"]
                       for kind in ("bnb.nf4", "bnb.nf4-dq"))  # fmt: skip
        assert double < nf4
    assert total(name, lora, device, replace(ROW, tokens=4096)) > usual
    assert total(name, replace(lora, r=64), device) > usual
    assert total(name, replace(lora, dropout=0.1), device) > usual
    assert total(name, FULL, device) > 2 * usual
    assert total(name, lora, replace(device, dtype=torch.float32)) > usual
    assert total("llama-3.2-1b-instruct", lora, device) < usual
    eight = replace(device, processes=8, sharded=True)
    assert total(name, FULL, eight) < total(name, FULL, device) / 3
    assert total(name, FULL, replace(eight, sharded=False)) > total(name, FULL, device)


@pytest.mark.parametrize("name", ["llama-3.1-8b-instrct", "nobody/nothing"])
def test_a_model_that_nobody_knows_is_told_with_the_nearest_names(name: str):
    with pytest.raises(UserError, match="no checkpoint at") as error:
        find_architecture(name)
    assert ("llama-3.1-8b-instruct" in str(error.value)) == name.startswith("llama")
