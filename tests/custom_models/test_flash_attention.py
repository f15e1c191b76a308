"""Blocks and an online softmax change nothing but the memory: equal to SDPA, forward and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_models.attention import causal_mask, padding_mask, scaled_dot_product_attention
from custom_models.flash_attention import flash_attention, flash_attention_varlen
from workflows.errors import UserError


def tensors(batch, n_head, n_kv_head, tq, tk, size, value_size=None, dtype=torch.float32):
    shapes = (batch, n_head, tq, size), (batch, n_kv_head, tk, size), (batch, n_kv_head, tk, value_size or size)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def outputs_and_gradients(attend, inputs, dout):
    out = attend(*inputs)
    return out, *torch.autograd.grad(out, inputs, dout)


def sdpa(causal, key_lengths, scale=None):
    def attend(q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        mask = causal_mask(q.shape[2], k.shape[2]) if causal else mask
        mask = mask & padding_mask(key_lengths, k.shape[2]) if key_lengths is not None else mask
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    return attend


@given(
    seed=st.integers(0, 1 << 30),
    batch=st.integers(1, 3),
    n_kv_head=st.integers(1, 3),
    group=st.integers(1, 3),
    tq=st.integers(1, 70),
    tk=st.integers(1, 70),
    size=st.sampled_from([1, 8, 16]),
    value_size=st.sampled_from([None, 5]),
    causal=st.booleans(),
    padded=st.booleans(),
    blocks=st.sampled_from([(16, 16), (32, 8), (256, 512), (7, 5)]),
)
@settings(max_examples=150, deadline=None)
def test_equal_to_sdpa_for_random_shapes(
    seed, batch, n_kv_head, group, tq, tk, size, value_size, causal, padded, blocks
):
    torch.manual_seed(seed)
    inputs = tensors(batch, n_kv_head * group, n_kv_head, tq, tk, size, value_size)
    lengths = torch.randint(0, tk + 1, (batch,)) if padded else None
    dout = torch.randn(batch, n_kv_head * group, tq, value_size or size)

    def ours(q, k, v):
        return flash_attention(q, k, v, causal=causal, key_lengths=lengths, block_q=blocks[0], block_k=blocks[1])

    theirs = outputs_and_gradients(sdpa(causal, lengths), inputs, dout)
    for a, b in zip(outputs_and_gradients(ours, inputs, dout), theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_equal_to_sdpa_over_many_blocks_of_the_usual_size(causal):
    torch.manual_seed(0)
    inputs = tensors(1, 4, 2, 1100, 1300, 32)
    dout = torch.randn(1, 4, 1100, 32)
    theirs = outputs_and_gradients(sdpa(causal, None), inputs, dout)
    ours = outputs_and_gradients(lambda *qkv: flash_attention(*qkv, causal=causal), inputs, dout)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (5, 7), (7, 5)])
@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck(causal, tq, tk, padded):
    torch.manual_seed(0)
    inputs = tensors(2, 4, 2, tq, tk, 3, 2, dtype=torch.float64)
    lengths = torch.tensor([tk, tk // 2]) if padded else None

    def attend(q, k, v):
        return flash_attention(q, k, v, causal=causal, key_lengths=lengths, scale=0.7, block_q=4, block_k=3)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_texts_are_each_by_itself(causal):
    torch.manual_seed(0)
    lengths_q, lengths_k = [3, 1, 40, 0, 17], [5, 1, 40, 2, 9]
    ends_q = torch.tensor([0, *lengths_q]).cumsum(0)
    ends_k = torch.tensor([0, *lengths_k]).cumsum(0)
    q, k, v = (
        torch.randn(total, heads, 8, requires_grad=True)
        for total, heads in ((sum(lengths_q), 4), (sum(lengths_k), 2), (sum(lengths_k), 2))
    )
    out = flash_attention_varlen(q, k, v, ends_q, ends_k, causal=causal)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for i in range(len(lengths_q)):
        here, there = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        alone = [x[None].transpose(1, 2).detach().requires_grad_() for x in (q[here], k[there], v[there])]
        theirs = outputs_and_gradients(sdpa(causal, None), alone, dout[here][None].transpose(1, 2))
        ours = (out[here], grads[0][here], grads[1][there], grads[2][there])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a[None].transpose(1, 2), b, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient():
    torch.manual_seed(0)
    q, k, v = tensors(2, 2, 2, 6, 4, 8)  # causal: the first two queries stand before the first key
    out = flash_attention(q, k, v, causal=True, key_lengths=torch.tensor([4, 0]))
    out.sum().backward()
    assert (out[0, :, :2] == 0).all() and (out[1] == 0).all() and (out[0, :, 2:] != 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (q.grad[0, :, :2] == 0).all() and (k.grad[1] == 0).all() and (v.grad[1] == 0).all()


def test_scores_whose_exponential_overflows():
    torch.manual_seed(0)
    inputs = tensors(1, 1, 1, 40, 40, 8)
    q, k, v = (x.detach() for x in inputs)
    out = flash_attention(q * 100, k * 100, v, block_q=8, block_k=8)  # scores up to tens of thousands
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q * 100, k * 100, v), atol=1e-5, rtol=1e-5)


def test_sixteen_bits_are_summed_in_thirty_two():
    torch.manual_seed(0)
    inputs = [x.detach().requires_grad_() for x in tensors(1, 2, 1, 300, 300, 16, dtype=torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    dout = torch.randn(1, 2, 300, 16, dtype=torch.bfloat16)
    ours = outputs_and_gradients(lambda *qkv: flash_attention(*qkv, block_q=16, block_k=16), inputs, dout)
    theirs = outputs_and_gradients(sdpa(False, None), exact, dout.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).abs().max() <= 2**-7 * b.abs().max()  # one rounding to 8 bits, not one per block


def test_nothing_of_the_size_of_the_scores_is_kept_or_made():
    """Every tensor that autograd saves, and every one that is made on the way, is far smaller than T x T."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                self.numbers = max(self.numbers, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    length, saved = 2048, []
    inputs = tensors(1, 1, 1, length, length, 8)
    with (
        Largest() as made,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
    ):
        flash_attention(*inputs).sum().backward()
    assert made.numbers <= 256 * 512
    assert sum(saved) == 4 * length * 8 + length  # q, k, v, O and L
    with Largest() as made:
        scaled_dot_product_attention(*inputs)
    assert made.numbers == length**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 4, 5)}, "four dimensions"),
        ({"q": (3, 4, 5, 8)}, "different numbers of texts"),
        ({"v": (2, 2, 4, 8)}, "k and v differ"),
        ({"k": (2, 2, 6, 4)}, "differ in head_size"),
        ({"q": (2, 3, 5, 8)}, "multiple of n_kv_head"),
        ({"key_lengths": [1, 2, 3]}, "for 2 texts"),
        ({"key_lengths": [1, 7]}, "between 0 and 6"),
        ({"key_lengths": [-1, 2]}, "between 0 and 6"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    shapes = {"q": (2, 4, 5, 8), "k": (2, 2, 6, 8), "v": (2, 2, 6, 8), **change}
    lengths = torch.tensor(shapes.pop("key_lengths")) if "key_lengths" in shapes else None
    with pytest.raises(UserError, match=message):
        flash_attention(*(torch.randn(shape) for shape in shapes.values()), key_lengths=lengths)


@pytest.mark.parametrize(
    ("ends_q", "ends_k", "message"),
    [
        ([0, 3], [0, 4], "rise from 0 to 4, the rows of q"),
        ([0, 5, 4], [0, 2, 4], "cu_seqlens_q must rise"),
        ([1, 4], [0, 4], "cu_seqlens_q must rise"),
        ([0, 4], [0, 2, 4], "cu_seqlens_q has 2 boundaries and cu_seqlens_k 3"),
        ([], [0, 4], "cu_seqlens_q must rise"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(ends_q, ends_k, message):
    x = torch.randn(4, 2, 8)
    with pytest.raises(UserError, match=message):
        flash_attention_varlen(x, x, x, torch.tensor(ends_q), torch.tensor(ends_k))


def test_the_default_scale_is_that_of_the_paper():
    torch.manual_seed(0)
    q, k, v = tensors(1, 1, 1, 3, 3, 16)
    assert torch.equal(flash_attention(q, k, v), flash_attention(q, k, v, scale=1 / math.sqrt(16)))


def test_it_runs_as_a_program(capsys):
    from custom_models.flash_attention import main

    main(length=300)
    told = capsys.readouterr().out
    assert "flash: " in told and "naive: " in told and float(told.split("difference: ")[1]) < 1e-5
