"""RMSNorm is transformers' and torch's; the gated feed-forward layer is Llama's and T5 v1.1's."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, T5Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from custom_models.layers import GatedFeedForward, RMSNorm, main
from workflows.errors import UserError

WIDTH, INNER = 24, 40


def states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (5 * torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)


def norm(eps: float) -> RMSNorm:
    torch.manual_seed(1)
    found = RMSNorm(WIDTH, eps)
    nn.init.normal_(found.weight)  # ones would hide a weight that is not used
    return found


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_transformers_in_both_precisions(eps, dtype):
    ours, theirs = norm(eps).to(dtype), LlamaRMSNorm(WIDTH, eps).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(states(dtype)), theirs(states(dtype)))
    assert ours(states(dtype)).dtype == dtype


def test_rms_norm_and_its_gradients_are_torchs():
    ours, theirs = norm(1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, theirs):
        x = states().requires_grad_()
        (module(x) ** 3).sum().backward()
        results.append((module(x), x.grad, module.weight.grad))
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-4)


def test_rms_norm_is_the_papers_equation_and_keeps_the_mean():
    x = torch.tensor([3.0, 4.0, 0.0, 5.0])
    torch.testing.assert_close(RMSNorm(4, 0.0)(x), x / (50 / 4) ** 0.5)
    assert RMSNorm(4)(x).mean() > 0.5  # layer norm's would be 0


def test_large_numbers_in_half_precision_do_not_overflow():
    x = torch.full((1, WIDTH), 60_000.0, dtype=torch.float16)  # its square is beyond float16
    torch.testing.assert_close(RMSNorm(WIDTH).half()(x), torch.ones(1, WIDTH, dtype=torch.float16))


def copied(ours: GatedFeedForward, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> GatedFeedForward:
    for name, layer in (("gate", gate), ("up", up), ("down", down)):
        getattr(ours, name).load_state_dict(layer.state_dict())
    return ours


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_is_llamas(bias):
    torch.manual_seed(2)
    theirs = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER, mlp_bias=bias))
    ours = copied(GatedFeedForward(WIDTH, INNER, bias=bias), theirs.gate_proj, theirs.up_proj, theirs.down_proj)
    torch.testing.assert_close(ours(states()), theirs(states()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("activation", "of_t5"), [("gelu_tanh", "gated-gelu"), ("silu", "gated-silu")])
def test_gated_gelu_is_t5s(activation, of_t5):
    torch.manual_seed(3)
    config = T5Config(d_model=WIDTH, d_ff=INNER, feed_forward_proj=of_t5, dropout_rate=0.0)
    theirs = T5DenseGatedActDense(config)
    ours = copied(GatedFeedForward(WIDTH, INNER, activation), theirs.wi_0, theirs.wi_1, theirs.wo)
    torch.testing.assert_close(ours(states()), theirs(states()), rtol=1e-6, atol=1e-6)


def test_gelu_and_its_approximation_are_not_the_same():
    exact = GatedFeedForward(WIDTH, INNER, "gelu")
    near = GatedFeedForward(WIDTH, INNER, "gelu_tanh")
    near.load_state_dict(exact.state_dict())
    difference = (exact(states()) - near(states())).abs().max()
    assert 1e-6 < difference < 1e-2


def test_an_unknown_gate_is_refused():
    with pytest.raises(UserError, match="no gate 'relu'; there are silu, gelu_tanh, gelu"):
        GatedFeedForward(WIDTH, INNER, "relu")


def test_it_runs_as_a_program(capsys):
    main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["moved", "by", "3", "0.00", "1.00", "0.95", "1.00"] in rows  # RMSNorm leaves a mean, layer norm does not
    assert [row[-2] for row in rows[-2:]] == ["2,097,152", "2,096,640"]
