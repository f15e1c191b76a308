"""Multi-head latent attention: the keys and values of all heads are kept as one short vector a token, and made from it.

A KV cache of n_head keys and values for every token is what makes long texts dear. Grouped-query attention has fewer
heads; DeepSeek-V2 (arXiv 2405.04434, section 2.1) has all of them, but made from a vector that they share. With the
numbers of equations 1 to 11 of DeepSeek-V3's report (arXiv 2412.19437, section 2.1.1), for the token h_t and head i:

    c^KV_t  = W^DKV h_t                      (1)  the latent vector: kept
    k^C_t,i = W^UK_i c^KV_t                  (2)
    k^R_t   = RoPE(W^KR h_t)                 (3)  one key for all heads, the only one that knows where it stands: kept
    k_t,i   = [k^C_t,i; k^R_t]               (4)
    v_t,i   = W^UV_i c^KV_t                  (5)
    c^Q_t   = W^DQ h_t                       (6)  queries have a latent vector, too, to save memory in training
    q^C_t,i = W^UQ_i c^Q_t                   (7)
    q^R_t,i = RoPE(W^QR_i c^Q_t)             (8)
    q_t,i   = [q^C_t,i; q^R_t,i]             (9)
    o_t,i   = sum_j softmax_j(q_t,i . k_j,i / sqrt(d_h + d^R_h)) v_j,i    (10)
    u_t     = W^O [o_t,1; ...; o_t,n_head]   (11)

Both latent vectors are normalised (RMSNorm) before W^UK, W^UV, W^UQ and W^QR read them; the report's text says so, its
equations do not.

Why RoPE stands apart ("decoupled"): without it, q . k = (W^UQ c^Q) . (W^UK c^KV) = (W^UK^T W^UQ c^Q) . c^KV. So W^UK
can be taken to the query's side, and keys need never be made: a query of kv_rank numbers meets the latent vectors
themselves. A turn between the two matrices, which is another one for each distance, would forbid that. W^UV moves
behind the sum of equation 10 in the same way. This is the absorbed form: multi-query attention, whose one head has
[c^KV; k^R] for keys and c^KV for values. It multiplies more for each score (kv_rank + rope_size numbers, not
nope_size + rope_size), but has nothing to make from the cache, so it wins when few new tokens meet many old ones.

Run it: python -m custom_models.latent_attention
"""

import math
import time

import torch
from torch import Tensor, nn

from custom_models.attention import Backend, KVCache, attend
from custom_models.layers import RMSNorm
from custom_models.rope import apply_rope, rope_table
from workflows.errors import run_file


class LatentAttention(nn.Module):
    """Causal self-attention whose cache holds kv_rank + rope_size numbers a token, however many heads there are.

    Matrices that read the same vector lie in one, as in DeepSeek's checkpoints: [W^DKV; W^KR] is `kv_down`,
    [W^UK_i; W^UV_i] for each head `kv_up`, and [W^UQ_i; W^QR_i] for each head `q_up`.

    Args:
        width: Of the tokens' vectors.
        n_head: Heads.
        q_rank: Of the queries' latent vector; None for none, then `q_up` reads the token itself (DeepSeek-V2-Lite).
        kv_rank: Of the keys' and values' latent vector.
        nope_size: How many numbers of a head's query and key come without a position.
        rope_size: How many RoPE turns.
        value_size: Of a head's value.
        sharpen: What the softmax scale is multiplied by; 1 but for a stretched RoPE, see `DeepSeekConfig.sharpen`.
        neighbours: Whether RoPE's pairs are neighbours, as in DeepSeek's checkpoints; else halves, see `apply_rope`.
        backend: Who computes the attention, see `attention.attend`.
    """

    def __init__(
        self,
        width: int,
        n_head: int,
        q_rank: int | None,
        kv_rank: int,
        nope_size: int,
        rope_size: int,
        value_size: int,
        sharpen: float = 1.0,
        neighbours: bool = True,
        backend: Backend = "sdpa",
    ) -> None:
        super().__init__()
        self.n_head, self.kv_rank = n_head, kv_rank
        self.nope_size, self.rope_size, self.value_size = nope_size, rope_size, value_size
        self.scale = sharpen / math.sqrt(nope_size + rope_size)  # equation 10's
        self.neighbours = neighbours
        self.backend: Backend = backend
        # DeepSeek's code has RMSNorm's usual 1e-6 for latent vectors, whatever the other norms have.
        self.q_down = None if q_rank is None else nn.Linear(width, q_rank, bias=False)
        self.q_norm = None if q_rank is None else RMSNorm(q_rank)
        self.q_up = nn.Linear(width if q_rank is None else q_rank, n_head * (nope_size + rope_size), bias=False)
        self.kv_down = nn.Linear(width, kv_rank + rope_size, bias=False)
        self.kv_norm = RMSNorm(kv_rank)
        self.kv_up = nn.Linear(kv_rank, n_head * (nope_size + value_size), bias=False)
        self.out = nn.Linear(n_head * value_size, width, bias=False)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache: k^R lies in its `k`, c^KV in its `v`, as if there were one head of them."""
        weight = self.kv_down.weight
        return KVCache(batch, 1, length, self.rope_size, self.kv_rank, dtype=weight.dtype, device=weight.device)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None = None, absorb: bool = False
    ) -> Tensor:
        """Let each token attend to itself and those before it.

        Args:
            x: Tokens, (B, T, width); with a cache only the new ones.
            rope: cos and sin for the positions of x, (T, rope_size) each, from `rope.rope_table`.
            cache: Of the earlier tokens; the new ones are added to it.
            absorb: Whether to take the absorbed form. Both give the same.

        Returns:
            (B, T, width).

        Raises:
            UserError: If the cache is full or made for another batch, or the RoPE table is not for these tokens.
        """
        q_nope, q_rope = self._queries(x, rope)  # (B, n_head, T, nope_size), (B, n_head, T, rope_size)
        latent, k_rope = self.kv_down(x)[:, None].split([self.kv_rank, self.rope_size], dim=-1)  # (B, 1, T, ..) each
        latent = self.kv_norm(latent)  # (B, 1, T, kv_rank); equation 1
        k_rope = self._turn(k_rope, rope)  # (B, 1, T, rope_size); equation 3
        if cache is not None:
            k_rope, latent = cache.append(k_rope, latent)  # (B, 1, Tk, rope_size), (B, 1, Tk, kv_rank)
        form = self._absorbed if absorb else self._plain
        heads = form(q_nope, q_rope, latent, k_rope)  # (B, n_head, T, value_size)
        return self.out(heads.transpose(1, 2).flatten(2))  # (B, T, width); equation 11

    def _queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Equations 6 to 8: (B, T, width) -> (B, n_head, T, nope_size) and (B, n_head, T, rope_size)."""
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down(x))  # (B, T, q_rank)
        q = self.q_up(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, n_head, T, nope_size + rope_size)
        q_nope, q_rope = q.split([self.nope_size, self.rope_size], dim=-1)
        return q_nope, self._turn(q_rope, rope)

    def _turn(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """RoPE, with its pairs brought to where `apply_rope` expects them: (B, n, T, rope_size) -> the same shape."""
        if self.neighbours:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # (B, n, T, rope_size): 0, 2, .., 1, 3, ..
        return apply_rope(x, *rope)  # (B, n, T, rope_size)

    def _plain(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        """Equations 2, 4, 5, 9 and 10 as they stand, keys and values made for every head.

        Args:
            q_nope: q^C, (B, n_head, T, nope_size).
            q_rope: q^R, (B, n_head, T, rope_size).
            latent: c^KV of all tokens so far, (B, 1, Tk, kv_rank).
            k_rope: k^R of all tokens so far, (B, 1, Tk, rope_size).

        Returns:
            o, (B, n_head, T, value_size).
        """
        kv = self.kv_up(latent[:, 0]).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, n_head, Tk, nope + value)
        k_nope, v = kv.split([self.nope_size, self.value_size], dim=-1)  # (B, n_head, Tk, nope_size or value_size)
        k_rope = k_rope.expand(-1, self.n_head, -1, -1)  # (B, n_head, Tk, rope_size)
        k = torch.cat([k_nope, k_rope], dim=-1)  # (B, n_head, Tk, nope_size + rope_size)
        q = torch.cat([q_nope, q_rope], dim=-1)  # (B, n_head, T, nope_size + rope_size)
        return attend(q, k, v, backend=self.backend, causal=True, scale=self.scale)[0]  # (B, n_head, T, value_size)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        """The same with W^UK on the queries' side and W^UV behind the sum."""
        matrices = self.kv_up.weight.unflatten(0, (self.n_head, -1))  # (n_head, nope_size + value_size, kv_rank)
        k_up, v_up = matrices.split([self.nope_size, self.value_size], dim=1)  # (n_head, .., kv_rank) each
        q = torch.cat([q_nope @ k_up, q_rope], dim=-1)  # (B, n_head, T, kv_rank + rope_size)
        k = torch.cat([latent, k_rope], dim=-1)  # (B, 1, Tk, kv_rank + rope_size): one head for all
        out, _ = attend(q, k, latent, backend=self.backend, causal=True, scale=self.scale)  # (B, n_head, T, kv_rank)
        return out @ v_up.mT  # (B, n_head, T, value_size)


def main(cached: int = 2048) -> None:
    """Let one new token meet a cache in both forms: how far they differ, and what each takes.

    Args:
        cached: Tokens in the cache.
    """
    torch.manual_seed(0)
    width, n_head = 1024, 16
    layer = LatentAttention(width, n_head, q_rank=384, kv_rank=256, nope_size=64, rope_size=32, value_size=64).eval()
    old, new = torch.randn(1, cached, width), torch.randn(1, 1, width)  # (B, T, width)
    rope, last = rope_table(torch.arange(cached), 32), rope_table(torch.tensor([cached]), 32)  # (T, rope_size) twice
    found = {}
    with torch.no_grad():
        for form in ("plain", "absorbed"):
            cache = layer.new_cache(1, cached + 10)
            layer(old, rope, cache)
            found[form] = layer(new, last, cache, absorb=form == "absorbed")  # (1, 1, width)
            began = time.perf_counter()
            for _ in range(5):
                layer(new, last, cache, absorb=form == "absorbed")
            print(f"{form:<9} {(time.perf_counter() - began) / 5 * 1e3:8.2f} ms a new token beside {cached:,} old ones")
    difference = float((found["plain"] - found["absorbed"]).abs().max())
    print(f"largest difference {difference:.1e}")
    ours, heads = layer.kv_rank + layer.rope_size, 2 * n_head * layer.value_size
    print(f"the cache keeps {ours} numbers a token; all {n_head} heads' keys and values would be {heads:,}")


if __name__ == "__main__":
    run_file(main)
