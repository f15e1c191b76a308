"""Each hand-written backward pass equals autograd's on the plain formula, and each value the formula's in float64."""

import pytest
import torch
import torch.nn.functional as F

from workflows.training.fused import HEAD_CHUNK, head_logprobs, lora_linear, rms_norm, swiglu

EIGHT_ROUNDINGS = 8 * 2.0**-8  # of bfloat16


def randn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def assert_same(fused, plain, inputs, *, dtype=torch.float32, tolerance=1e-5):
    """Values and gradients of `fused` in a dtype against `plain` in float64, relative to the largest entry."""
    given = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in given]
    got, expected = fused(*given), plain(*exact)
    weight = randn(*got.shape, seed=99)
    gradients = torch.autograd.grad(got, given, weight.to(got.dtype))
    references = torch.autograd.grad(expected, exact, weight.double())
    for mine, reference in zip((got, *gradients), (expected, *references), strict=True):
        assert (mine.double() - reference).abs().max() <= tolerance * reference.abs().max()


BOTH = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, EIGHT_ROUNDINGS)],
    ids=["float32", "bfloat16"],
)


@BOTH
def test_rms_norm(dtype, tolerance):
    def plain(x, weight):
        return weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    inputs = [randn(2, 7, 48, seed=0, scale=3.0), 1 + randn(48, seed=1, scale=0.1)]
    assert_same(lambda x, w: rms_norm(x, w, 1e-5), plain, inputs, dtype=dtype, tolerance=tolerance)
    tiny = [randn(1, 3, 48, seed=2, scale=1e-4), torch.ones(48)]  # where eps decides
    assert_same(lambda x, w: rms_norm(x, w, 1e-5), plain, tiny, dtype=dtype, tolerance=tolerance)


@BOTH
@pytest.mark.parametrize("with_bias", [False, True])
def test_lora_linear(with_bias, dtype, tolerance):
    weight, bias = randn(40, 24, seed=0, scale=0.2), randn(40, seed=1) if with_bias else None

    def fused(x, a, b):
        return lora_linear(x, weight.to(dtype), None if bias is None else bias.to(dtype), a, b, 2.0)

    def plain(x, a, b):
        frozen = F.linear(x, weight.to(dtype).double(), None if bias is None else bias.to(dtype).double())
        return frozen + 2.0 * F.linear(F.linear(x, a), b)

    inputs = [randn(1, 9, 24, seed=2), randn(4, 24, seed=3, scale=0.2), randn(40, 4, seed=4, scale=0.2)]
    assert_same(fused, plain, inputs, dtype=dtype, tolerance=tolerance)


@BOTH
def test_swiglu(dtype, tolerance):
    inputs = [randn(2, 5, 16, seed=0, scale=3.0), randn(2, 5, 16, seed=1)]
    assert_same(swiglu, lambda gate, up: gate * gate.sigmoid() * up, inputs, dtype=dtype, tolerance=tolerance)


def test_lora_linear_keeps_the_adapters_precision_in_their_gradients():
    x, weight = randn(1, 5, 8, seed=0).bfloat16(), randn(6, 8, seed=1).bfloat16()
    a, b = randn(2, 8, seed=2).requires_grad_(), randn(6, 2, seed=3).requires_grad_()
    lora_linear(x, weight, None, a, b, 1.0).float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


@BOTH
@pytest.mark.parametrize("n", [1, HEAD_CHUNK, 2 * HEAD_CHUNK + 3])
def test_head_logprobs(n, dtype, tolerance):
    weight = randn(300, 24, seed=0).to(dtype)
    targets = torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(1))

    def plain(states):
        return F.linear(states, weight.double()).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    assert_same(
        lambda states: head_logprobs(states, weight, targets), plain, [randn(n, 24, seed=2)], dtype=dtype,
        tolerance=tolerance,
    )  # fmt: skip


def test_head_logprobs_of_a_token_whose_probability_has_no_float32():
    states, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0], [0.5]])
    logprobs = head_logprobs(states.expand(3, 1), weight, torch.tensor([0, 1, 2]))
    assert logprobs.tolist() == [0.0, -400.0, -100.0]
