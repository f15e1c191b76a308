"""Weights in 4 bits: the model is the one whose weights were rounded to 4 bits, and its frozen part is small."""

import litgpt.lora
import pytest
import torch

from tests.conftest import convert, make_llama, make_qwen2
from tests.workflows import alignment
from workflows import dpo, grpo, reward
from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import UserError
from workflows.training.batch import Tree, pack_row
from workflows.training.model import LoRAArgs, load_model
from workflows.training.qlora import quantize_frozen
from workflows.training.rewards import WeightedReward

functional = pytest.importorskip("bitsandbytes.functional", reason="QLoRA's package, part of the extra `qlora`")
CPU = torch.device("cpu")


def adapted(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, litgpt.lora.LoRALinear) and name != "lm_head"
    }


def with_random_adapters(model):
    g = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=g)
    return model


@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.nf4-dq", "bnb.fp4"])
@pytest.mark.parametrize("make", [make_llama, make_qwen2])  # Qwen2 has biases
def test_equals_the_model_with_rounded_weights(kind, make, tmp_path):
    base = convert(make(tmp_path / "hf", hidden_size=64, intermediate_size=128), tmp_path)
    torch.manual_seed(0)
    quantized = load_model(base, LoRAArgs(r=4))
    torch.manual_seed(0)
    rounded = load_model(base, LoRAArgs(r=4))
    quantize_frozen(quantized, kind, CPU)
    for layer, plain in zip(adapted(quantized).values(), adapted(rounded).values(), strict=True):
        weight = layer.linear.weight
        assert weight.dtype == torch.uint8
        restored = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert 0.01 < (restored - plain.linear.weight).norm() / plain.linear.weight.norm() < 0.2
        plain.linear.weight.data = restored
    with_random_adapters(quantized), with_random_adapters(rounded)
    quantized.eval()
    with torch.no_grad():  # a validation changes nothing
        quantized(pack_row([Tree([1, 2], [[3]])]))
    quantized.train()
    batch = pack_row([Tree([5, 6, 7], [[8, 9], [10]]), Tree([5, 6, 11], [[12, 13, 14]])])
    got, expected = quantized(batch), rounded(batch)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    parameters = [[p for p in model.parameters() if p.requires_grad] for model in (quantized, rounded)]
    for a, b in zip(
        torch.autograd.grad(got.sum(), parameters[0]), torch.autograd.grad(expected.sum(), parameters[1]), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_width_that_bitsandbytes_gets_wrong_is_refused(tiny_llama):
    with pytest.raises(UserError, match="multiple of 64 inputs, not 48"):
        quantize_frozen(load_model(tiny_llama, LoRAArgs(r=4)), "bnb.nf4", CPU)


def test_head_and_embedding_keep_their_precision(tmp_path):
    base = convert(make_llama(tmp_path / "hf", hidden_size=64, intermediate_size=128), tmp_path)
    model = load_model(base, LoRAArgs(r=4))
    quantize_frozen(model, "bnb.nf4", CPU)
    assert model.lm_head.linear.weight is model.transformer.wte.weight
    assert model.transformer.wte.weight.dtype == torch.float32
    assert all(not p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.long
@pytest.mark.parametrize("step", ["dpo", "reward", "grpo"])
def test_alignment_trains_on_quantized_weights(step, pairs, questions, tmp_path):
    base = convert(make_llama(tmp_path / "hf", hidden_size=64, intermediate_size=128), tmp_path)
    options = {"lora_r": 4, "precision": "32-true", "train": alignment.TRAIN, "quantize": "bnb.nf4"}
    module = {"dpo": dpo, "reward": reward, "grpo": grpo}[step]
    if step == "grpo":
        options |= {"max_new_tokens": 8, "rewards": [WeightedReward(f"{alignment.__name__}.early_letters")]}
    module.setup(base, questions if step == "grpo" else pairs, tmp_path / "out", **options)
    log = alignment.log_of(tmp_path / "out")
    assert log[-1]["loss"] < log[0]["loss"] if step != "grpo" else log[0]["sampling_logp_diff_max"] < 1e-4
    assert check_checkpoint_dir(tmp_path / "out" / "final")
