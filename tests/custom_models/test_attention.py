"""Attention equals PyTorch's, by every backend that runs here; masks, cache and rotary positions do what they say."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from custom_models.attention import (
    KVCache,
    MultiHeadAttention,
    attend,
    causal_mask,
    main,
    padding_mask,
    scaled_dot_product_attention,
)
from custom_models.positions import RelativePositionBias, alibi_bias
from custom_models.rope import rope_table
from workflows.errors import UserError

BACKENDS = ("naive", "sdpa", "flash")


def near(a, b):
    torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


def qkv(batch=2, n_head=4, n_kv_head=4, tq=6, tk=6, size=8):
    shapes = (batch, n_head, tq, size), (batch, n_kv_head, tk, size), (batch, n_kv_head, tk, size)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.fixture(autouse=True)
def seed_and_precision():
    """In float64: what differs is a formula, never a processor's rounding."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_the_formula_equals_sdpa_forward_and_backward(n_kv_head, masked, biased, scale):
    inputs = qkv(n_kv_head=n_kv_head, tk=9)
    mask = torch.rand(2, 4, 6, 9) < 0.7 if masked else None
    bias = torch.randn(1, 4, 6, 9) if biased else None
    added = mask if bias is None else bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    theirs = F.scaled_dot_product_attention(*inputs, added, scale=scale, enable_gqa=True)
    ours, weights = scaled_dot_product_attention(*inputs, mask, bias, scale, return_weights=True)
    near(ours, theirs)
    near(weights.sum(-1), torch.ones(2, 4, 6))
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (ours, theirs)), strict=True):
        near(a, b)


def test_the_formula_passes_gradcheck():
    inputs = [x.detach().double().requires_grad_() for x in qkv(1, 2, 1, 3, 4, 3)]
    mask = causal_mask(3, 4)
    assert torch.autograd.gradcheck(lambda *x: scaled_dot_product_attention(*x, mask)[0], inputs)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_may_attend_to_nothing_gets_zeros(backend):
    inputs = qkv(tq=5, tk=3)  # causal: the first two queries stand before the first key
    with torch.autograd.detect_anomaly(check_nan=True):
        out, _ = attend(*inputs, backend=backend, causal=True, key_lengths=torch.tensor([3, 0]))
        out.sum().backward()
    assert (out[0, :, :2] == 0).all() and (out[1] == 0).all() and (out[0, :, 2:] != 0).all()
    assert all(x.grad.isfinite().all() for x in inputs)
    out, weights = attend(*inputs, backend=backend, causal=True, key_lengths=torch.tensor([3, 0]), return_weights=True)
    assert (weights[1] == 0).all() and (out[1] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("tq", "tk"), [(6, 6), (1, 6), (3, 6)])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_the_backends_agree(causal, padded, tq, tk, n_kv_head):
    inputs = qkv(n_kv_head=n_kv_head, tq=tq, tk=tk)
    lengths = torch.tensor([tk, tk - 2]) if padded else None
    outs = [attend(*inputs, backend=backend, causal=causal, key_lengths=lengths)[0] for backend in BACKENDS]
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    for other in (1, 2):
        near(outs[other], outs[0])
        for a, b in zip(grads[other], grads[0], strict=True):
            near(a, b)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_masks_and_bias_join(backend):
    inputs = qkv()
    bias, mask = torch.randn(1, 4, 6, 6), torch.rand(2, 1, 1, 6) < 0.7
    out, _ = attend(*inputs, backend=backend, causal=True, key_lengths=torch.tensor([6, 4]), mask=mask, bias=bias)
    joined = causal_mask(6, 6) & padding_mask(torch.tensor([6, 4]), 6) & mask
    near(out, scaled_dot_product_attention(*inputs, joined, bias)[0])


def test_dropout_is_for_the_output_and_only_in_training():
    layer = MultiHeadAttention(16, 2, dropout=0.5, backend="naive")
    x = torch.randn(1, 5, 16)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    _, weights = scaled_dot_product_attention(*qkv(), dropout=0.5, return_weights=True)
    near(weights.sum(-1), torch.ones(2, 4, 6))  # the picture of heads is that before dropout


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["self", "causal", "padding", "cross"])
def test_equal_to_torch_multi_head_attention(backend, case):
    width, context_width = 16, 12 if case == "cross" else 16
    theirs = nn.MultiheadAttention(width, 4, batch_first=True, kdim=context_width, vdim=context_width)
    ours = MultiHeadAttention(width, 4, context_width=context_width, backend=backend)
    nn.init.normal_(theirs.in_proj_bias)
    rows = theirs.in_proj_weight.chunk(3) if case != "cross" else [theirs.q_proj_weight, theirs.k_proj_weight]
    rows = rows if case != "cross" else [*rows, theirs.v_proj_weight]
    for layer, weight, bias in zip((ours.q, ours.k, ours.v), rows, theirs.in_proj_bias.chunk(3), strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})
    ours.out.load_state_dict(theirs.out_proj.state_dict())
    x, lengths = torch.randn(2, 6, width), torch.tensor([6, 4])
    context = torch.randn(2, 9, context_width) if case == "cross" else None
    source = x if context is None else context
    expected, expected_weights = theirs(
        x,
        source,
        source,
        attn_mask=~causal_mask(6, 6) if case == "causal" else None,  # theirs says True where not to look
        key_padding_mask=~padding_mask(lengths, 6)[:, 0, 0] if case == "padding" else None,
        average_attn_weights=False,
    )
    settings = {"causal": case == "causal", "key_lengths": lengths if case == "padding" else None}
    near(ours(x, context, **settings)[0], expected)
    out, weights = ours(x, context, **settings, return_weights=True)
    near(out, expected)
    near(weights, expected_weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_to_transformers_llama_attention_with_grouped_queries_and_rope(backend):
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=6, vocab_size=8)
    config._attn_implementation = "eager"
    theirs = LlamaAttention(config, layer_idx=0)
    ours = MultiHeadAttention(32, 4, 2, 6, qkv_bias=False, out_bias=False, backend=backend)
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
    state = {".".join([names[key.split(".")[0]], "weight"]): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x, places = torch.randn(2, 7, 32), torch.arange(7)
    mask = torch.zeros(7, 7).masked_fill(~causal_mask(7, 7), -torch.inf)[None, None]
    expected, _ = theirs(x, LlamaRotaryEmbedding(config)(x, places[None]), mask)
    near(ours(x, causal=True, rope=rope_table(places, 6))[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 3, 1], [9]])
def test_a_kv_cache_changes_nothing(backend, steps):
    layer = MultiHeadAttention(16, 4, 2, backend=backend)
    x = torch.randn(2, 9, 16)
    cos, sin = rope_table(torch.arange(9), 4)
    whole, _ = layer(x, causal=True, rope=(cos, sin))
    cache, parts = KVCache(2, 2, 9, 4), []
    for n in steps:
        here = slice(cache.length, cache.length + n)
        with torch.no_grad():
            parts.append(layer(x[:, here], causal=True, rope=(cos[here], sin[here]), cache=cache)[0])
    near(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("positions", ["t5", "alibi"])
def test_a_kv_cache_with_a_position_bias_changes_nothing(positions):
    layer, x = MultiHeadAttention(16, 4), torch.randn(2, 9, 16)
    learned = RelativePositionBias(4, n_buckets=8, max_distance=6, bidirectional=False)

    def bias(n_queries, n_keys):
        return learned(n_queries, n_keys) if positions == "t5" else alibi_bias(4, n_queries, n_keys)

    whole, _ = layer(x, causal=True, bias=bias(9, 9))
    cache = KVCache(2, 4, 9, 4)
    with torch.no_grad():
        for begin, end in itertools.pairwise([0, 4, 5, 9]):
            out, _ = layer(x[:, begin:end], causal=True, bias=bias(end - begin, end), cache=cache)
            near(out, whole[:, begin:end])


def test_cross_attention_reads_its_cache_and_not_the_context_again():
    layer, x, context = MultiHeadAttention(16, 4), torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    cache = KVCache(2, 4, 5, 4)
    with torch.no_grad():
        whole, _ = layer(x, context)
        near(layer(x[:, :1], context, cache=cache)[0], whole[:, :1])
        near(layer(x[:, 1:], torch.full_like(context, torch.nan), cache=cache)[0], whole[:, 1:])


def test_padding_changes_nothing_for_the_real_tokens():
    layer, x = MultiHeadAttention(16, 4), torch.randn(1, 5, 16)
    alone, _ = layer(x)
    padded, _ = layer(torch.cat([x, torch.randn(1, 4, 16)], dim=1), key_lengths=torch.tensor([5]))
    near(padded[:, :5], alone)


def test_what_does_not_fit_is_told_in_words():
    with pytest.raises(UserError, match=r"2 problems:\n.*width 10 is no multiple of n_head 4.*\n.*n_kv_head 3"):
        MultiHeadAttention(10, 4, 3)
    with pytest.raises(UserError, match="no attention backend 'fast'; there are naive"):
        MultiHeadAttention(16, 4, backend="fast")
    layer, x = MultiHeadAttention(16, 4, backend="flash"), torch.randn(2, 5, 16)
    for extra in ({"mask": causal_mask(5, 5)}, {"bias": torch.zeros(1, 4, 5, 5)}):
        with pytest.raises(UserError, match='Take backend "sdpa"'):
            layer(x, **extra)
    with pytest.raises(UserError, match="grows to 5 tokens, and the KV cache holds 4"):
        layer(x, cache=KVCache(2, 4, 4, 4))
    with pytest.raises(UserError, match="made for 1 texts and 4 heads, not for 2 and 4"):
        layer(x, cache=KVCache(1, 4, 8, 4))
    with pytest.raises(UserError, match="for 7 tokens and head_size 4; queries and keys have 5 and 4"):
        layer(x, rope=rope_table(torch.arange(7), 4))


def test_a_full_cache_keeps_what_it_has():
    cache = KVCache(1, 1, 3, 2)
    cache.append(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    with pytest.raises(UserError):
        cache.append(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert cache.length == 2 and (cache.seen()[0] == 1).all()


def test_it_runs_as_a_program(capsys):
    main()
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[3:]}
    assert rows["it"][1] == "93" and rows["the"] == ["100", *"......"]
