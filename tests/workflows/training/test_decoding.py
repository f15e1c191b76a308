"""Layers laid out for decoding give what they give otherwise, and are as they were afterwards."""

from pathlib import Path

import litgpt.lora
import pytest
import torch

from workflows.training import decoding
from workflows.training.decoding import WORTH_STEPS, laid_out
from workflows.training.model import GPT, LoRAArgs, Precision, adapters_off, load_model
from workflows.training.rollouts import generate


def adapted(checkpoint: Path, precision: Precision, **lora: bool) -> GPT:
    model = load_model(checkpoint, LoRAArgs(r=4, alpha=12, **lora), precision)  # type: ignore[arg-type]
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])  # the latter with biases
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-true", 2e-2)])
@pytest.mark.parametrize("lora", [{}, {"key": False, "mlp": False}, {"query": False, "head": True}], ids=str)
def test_every_layer_gives_the_same(request, family, precision, tolerance, lora):
    if precision == "bf16-true" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 products")
    model = adapted(request.getfixturevalue(family), precision, **lora)
    layers = [module for module in model.modules() if isinstance(module, litgpt.lora.LoRALinear)]
    assert any(isinstance(layer, litgpt.lora.LoRAQKVLinear) for layer in layers)
    inputs = [torch.randn(3, 2, layer.linear.in_features).to(layer.linear.weight.dtype) for layer in layers]
    expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    with laid_out(model, WORTH_STEPS):
        assert all(layer.packed is not None for layer in layers)
        for layer, x, y in zip(layers, inputs, expected, strict=True):
            torch.testing.assert_close(layer(x), y, atol=tolerance, rtol=tolerance)
    assert all(layer.packed is None for layer in layers)
    with adapters_off(model):
        bare = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        with laid_out(model, WORTH_STEPS):
            for layer, x, y in zip(layers, inputs, bare, strict=True):
                torch.testing.assert_close(layer(x), y, atol=tolerance, rtol=tolerance)
    assert any(not torch.allclose(a, b, atol=0.1) for a, b in zip(expected, bare, strict=True))


def test_it_is_not_done_where_it_does_not_pay(tiny_llama, monkeypatch):
    model = adapted(tiny_llama, "32-true")
    made: list[int] = []
    packed = decoding.PackedLinear
    monkeypatch.setattr(decoding, "PackedLinear", lambda layer: made.append(1) or packed(layer))
    few = generate(model, [[5, 6, 7]], max_new_tokens=WORTH_STEPS - 1, stop_ids=())
    assert not made
    many = generate(model, [[5, 6, 7]], max_new_tokens=WORTH_STEPS, stop_ids=())
    assert made and many[0].ids[:-1] == few[0].ids
