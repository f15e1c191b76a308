"""Latent attention is the paper's equations; the absorbed form and the cache change nothing but the cost."""

import math
import re

import pytest
import torch

from custom_models.latent_attention import LatentAttention, main
from custom_models.rope import rope_table
from workflows.errors import UserError

SIZES = {"width": 20, "n_head": 3, "kv_rank": 10, "nope_size": 6, "rope_size": 4, "value_size": 5}


def layer(q_rank: int | None = 7, **changes) -> LatentAttention:
    """A random one, in double precision."""
    torch.manual_seed(0)
    made = LatentAttention(q_rank=q_rank, **{**SIZES, **changes}).double()
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made


def tokens(length: int = 7) -> torch.Tensor:
    return torch.randn(2, length, SIZES["width"], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """RoPE as arXiv 2104.09864 has it: neighbours are the two parts of a number on the plane."""
    d = len(x)
    out = torch.empty_like(x)
    for i in range(d // 2):
        angle = position * 10000 ** (-2 * i / d)
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("q_rank", [7, None])
def test_the_papers_equations_token_by_token(q_rank, absorb):
    attention, x = layer(q_rank), tokens()
    kept, rank, nope, value = attention.kv_down.weight, 10, 6, 5
    for text, found in zip(x, attention(x, rope_table(torch.arange(7), 4), absorb=absorb), strict=True):
        latent = [attention.kv_norm(kept[:rank] @ h) for h in text]  # 1
        k_rope = [turned(kept[rank:] @ h, t) for t, h in enumerate(text)]  # 3
        c_q = [h if q_rank is None else attention.q_norm(attention.q_down.weight @ h) for h in text]  # 6
        heads = []
        for i in range(3):
            up = attention.kv_up.weight[i * (nope + value) : (i + 1) * (nope + value)]
            w_q = attention.q_up.weight[i * (nope + 4) : (i + 1) * (nope + 4)]
            k = [torch.cat([up[:nope] @ c, r]) for c, r in zip(latent, k_rope, strict=True)]  # 2, 4
            v = [up[nope:] @ c for c in latent]  # 5
            q = [torch.cat([w_q[:nope] @ c, turned(w_q[nope:] @ c, t)]) for t, c in enumerate(c_q)]  # 7, 8, 9
            out = []
            for t in range(7):
                weights = torch.stack([q[t] @ k[j] / math.sqrt(nope + 4) for j in range(t + 1)]).softmax(0)
                out.append(sum(w * v[j] for j, w in enumerate(weights)))  # 10
            heads.append(torch.stack(out))
        expected = torch.cat(heads, dim=1) @ attention.out.weight.T  # 11
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # the table of cos and sin is in float32


@pytest.mark.parametrize("backend", ["naive", "sdpa", "flash"])
@pytest.mark.parametrize("q_rank", [7, None])
@pytest.mark.parametrize("sharpen", [1.0, 1.7])
def test_absorbed_is_plain(backend, q_rank, sharpen):
    attention, x, rope = layer(q_rank, sharpen=sharpen), tokens(), rope_table(torch.arange(7), 4)
    expected = attention(x, rope)
    wanted = torch.autograd.grad(expected.square().sum(), list(attention.parameters()))
    attention.backend = backend
    found = attention(x, rope, absorb=True)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    grads = torch.autograd.grad(found.square().sum(), list(attention.parameters()))
    for ours, theirs in zip(grads, wanted, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # RMSNorm's inside is in float32
    assert not torch.allclose(layer(q_rank, sharpen=sharpen + 1)(x, rope), expected, atol=1e-3)


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("pieces", [[7], [1] * 7, [4, 1, 2]])
def test_with_a_cache_the_text_may_come_in_pieces(pieces, absorb):
    attention, x = layer(), tokens()
    cos, sin = rope_table(torch.arange(7), 4)
    with torch.no_grad():
        expected = attention(x, (cos, sin))
        cache, out, begin = attention.new_cache(2, 9), [], 0
        for size in pieces:
            part = slice(begin, begin + size)
            out.append(attention(x[:, part], (cos[part], sin[part]), cache, absorb))
            begin += size
    torch.testing.assert_close(torch.cat(out, dim=1), expected, atol=1e-6, rtol=0)


def test_the_cache_holds_the_latent_vector_and_one_key_whatever_the_heads():
    for n_head in (3, 12):
        cache = layer(n_head=n_head).new_cache(2, 9)
        assert cache.k.numel() + cache.v.numel() == 2 * 9 * (10 + 4)
        assert cache.k.dtype == cache.v.dtype == torch.float64
    attention, x = layer(), tokens()
    with torch.no_grad():
        attention(x, rope_table(torch.arange(7), 4), cache := attention.new_cache(2, 9))
        latent = attention.kv_norm(attention.kv_down(x)[..., :10])
    torch.testing.assert_close(cache.seen()[1][:, 0], latent)
    assert cache.length == 7 and cache.v[:, :, 7:].eq(0).all()


def test_neighbours_and_halves_differ_in_the_order_of_rows_only():
    pairs, halves, x = layer(), layer(neighbours=False), tokens()
    rope = rope_table(torch.arange(7), 4)
    assert not torch.allclose(pairs(x, rope), halves(x, rope), atol=1e-3)
    order = torch.tensor([0, 2, 1, 3])
    halves.kv_down.weight.data[10:] = halves.kv_down.weight[10:][order]
    rows = halves.q_up.weight.data.view(3, 10, 7)
    rows[:, 6:] = rows[:, 6:][:, order]
    torch.testing.assert_close(pairs(x, rope), halves(x, rope))


def test_what_does_not_fit_is_told():
    attention, x = layer(), tokens()
    rope = rope_table(torch.arange(7), 4)
    with pytest.raises(UserError, match="grows to 7 tokens, and the KV cache holds 6"):
        attention(x, rope, attention.new_cache(2, 6))
    with pytest.raises(UserError, match="made for 3 texts"):
        attention(x, rope, attention.new_cache(3, 7))
    with pytest.raises(UserError, match="RoPE table is for 5 tokens"):
        attention(x, rope_table(torch.arange(5), 4))


def test_it_runs_as_a_program(capsys):
    main(cached=64)
    out = capsys.readouterr().out
    assert float(re.search(r"largest difference (\S+)", out)[1]) < 1e-5
    assert "the cache keeps 288 numbers a token; all 16 heads' keys and values would be 2,048" in out
