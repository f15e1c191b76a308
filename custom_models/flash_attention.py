"""Attention whose memory grows with the length of the text, not with its square.

The textbook writes down all T x T scores. FlashAttention never does: it walks over blocks of queries and blocks of
keys, and keeps for each query the running maximum and sum of a softmax that is not finished yet. When a block brings
a larger maximum, what was gathered so far is scaled down (Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3).
Stored for the backward pass are the output O and one number per query, L = log(sum(exp(scores))); the weights are
computed again, block by block, as exp(scores - L). Followed here is FlashAttention-2 (Dao 2023, arXiv 2307.08691),
algorithms 1 and 2, after FlashAttention (Dao et al. 2022, arXiv 2205.14135).

In: causal, grouped-query without a copy of the keys, and texts of different lengths, padded (`key_lengths`) or packed
(`flash_attention_varlen`). Left out: arbitrary masks, an additive bias, dropout. The same for GPUs, as a kernel, is in
`flash_attention_triton.py`.

Run it: python -m custom_models.flash_attention
"""

import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workflows.errors import UserError, report_all, run_file
from workflows.measure import PeakMemory

BLOCK_Q = 256
BLOCK_K = 512
"""Rows and columns of a block. The scores of one head then take 512 KiB, which a core's own cache holds."""


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
) -> Tensor:
    """softmax(q k^T * scale) v, in blocks.

    A query that may attend to nothing gets zeros, and gradients of zero.

    Args:
        q: Queries, (B, n_head, Tq, head_size).
        k: Keys, (B, n_kv_head, Tk, head_size); query head h reads key head h // (n_head // n_kv_head).
        v: Values, (B, n_kv_head, Tk, value_size).
        causal: Whether a query sees only the keys up to its own place. Where Tq and Tk differ, the last query belongs
            to the last key (the bottom right of the score matrix), as when new tokens follow a KV cache.
        key_lengths: How many keys of each text are real, (B,); the others are padding at its end. All, if None.
        scale: What the scores are multiplied by; 1 / sqrt(head_size) if None.
        block_q: Rows of a block.
        block_k: Columns of a block.

    Returns:
        (B, n_head, Tq, value_size), in the dtype of q.

    Raises:
        UserError: If the shapes do not fit together.
    """
    check_shapes(q, k, v, key_lengths)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    hidden = Hidden(q.shape[2], k.shape[2], causal, key_lengths)
    out: Tensor = FlashAttention.apply(q, k, v, hidden, scale, (block_q, block_k))
    return out


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention within each of several texts that lie end to end, without padding.

    Args:
        q: Queries, (total_q, n_head, head_size); this and the next two are laid out as in the flash-attn package.
        k: Keys, (total_k, n_kv_head, head_size).
        v: Values, (total_k, n_kv_head, value_size).
        cu_seqlens_q: Where each text begins in q, and at last where the last one ends, (B + 1,): 0, ..., total_q.
        cu_seqlens_k: The same for k and v; that of q if None.
        causal: As in `flash_attention`, for each text by itself.
        scale: As in `flash_attention`.

    Returns:
        (total_q, n_head, value_size).

    Raises:
        UserError: If the boundaries do not fit the tensors.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    check_boundaries(q, k, cu_seqlens_q, cu_seqlens_k)
    # `split`, since its gradient is one concatenation; that of a slice is a tensor as long as all texts together
    parts = zip(
        q.transpose(0, 1).split(cu_seqlens_q.diff().tolist(), dim=1),  # each (n_head, Tq, head_size)
        k.transpose(0, 1).split(cu_seqlens_k.diff().tolist(), dim=1),  # each (n_kv_head, Tk, head_size)
        v.transpose(0, 1).split(cu_seqlens_k.diff().tolist(), dim=1),  # each (n_kv_head, Tk, value_size)
        strict=True,
    )
    outs = [flash_attention(*(x[None] for x in part), causal=causal, scale=scale)[0] for part in parts]
    return torch.cat(outs, dim=1).transpose(0, 1)  # (total_q, n_head, value_size)


class FlashAttention(torch.autograd.Function):
    """`flash_forward` and `flash_backward`, tied together for autograd."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: "Hidden", scale: float, blocks: tuple[int, int]
    ) -> Tensor:
        """Keep the inputs, the output and one number per query."""
        out, lse = flash_forward(q, k, v, hidden, scale, blocks)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = (hidden, scale, blocks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        return *flash_backward(dout, *ctx.saved_tensors, *ctx.settings), None, None, None


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, hidden: "Hidden", scale: float, blocks: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """FlashAttention-2, algorithm 1, for all heads of all texts at once.

    Returns:
        O, (B, n_head, Tq, value_size), and L, (B, n_kv_head, group, Tq, 1), which is infinite for a query that may
        attend to nothing: exp(scores - L) is then zero, as it should be.
    """
    q = q.unflatten(1, (k.shape[1], -1))  # (B, n_kv_head, group, Tq, head_size)
    block_q, block_k = max(1, blocks[0] // q.shape[2]), blocks[1]  # the heads of a group make one taller block
    wide = torch.promote_types(q.dtype, torch.float32)  # sums are never kept in 16 bits
    out = q.new_empty(*q.shape[:-1], v.shape[-1])  # (B, n_kv_head, group, Tq, value_size)
    lse = q.new_empty(*q.shape[:-1], 1, dtype=wide)  # (B, n_kv_head, group, Tq, 1)
    for i0 in range(0, hidden.n_queries, block_q):
        i1 = min(i0 + block_q, hidden.n_queries)
        qi = rows_of(q, i0, i1, wide) * scale  # (B, n_kv_head, group * block_q, head_size)
        # The lowest number, not minus infinity: the difference of two infinities would be NaN.
        largest = qi.new_full((*qi.shape[:-1], 1), torch.finfo(wide).min)  # (B, n_kv_head, group * block_q, 1)
        total = torch.zeros_like(largest)  # (B, n_kv_head, group * block_q, 1)
        acc = qi.new_zeros(*qi.shape[:-1], v.shape[-1])  # (B, n_kv_head, group * block_q, value_size)
        last = hidden.last_key(i1)
        for j0 in range(0, last, block_k):
            j1 = min(j0 + block_k, last)
            p = qi @ k[:, :, j0:j1].to(wide).mT  # (B, n_kv_head, group * block_q, block_k): scores, weights soon
            hidden.fill(p, i0, i1, j0, j1, -math.inf)
            larger = torch.maximum(largest, p.amax(-1, keepdim=True))  # (B, n_kv_head, group * block_q, 1)
            p.sub_(larger).exp_()  # (B, n_kv_head, group * block_q, block_k)
            shrink = (largest - larger).exp_()  # (B, n_kv_head, group * block_q, 1)
            total.mul_(shrink).add_(p.sum(-1, keepdim=True))  # (B, n_kv_head, group * block_q, 1)
            acc.mul_(shrink).add_(p @ v[:, :, j0:j1].to(wide))  # (B, n_kv_head, group * block_q, value_size)
            largest = larger
        empty = total == 0  # (B, n_kv_head, group * block_q, 1)
        acc.div_(total.masked_fill(empty, 1))  # (B, n_kv_head, group * block_q, value_size)
        li = (largest + total.log()).masked_fill_(empty, math.inf)  # (B, n_kv_head, group * block_q, 1)
        out[:, :, :, i0:i1] = acc.unflatten(2, (-1, i1 - i0))  # (B, n_kv_head, group, block_q, value_size)
        lse[:, :, :, i0:i1] = li.unflatten(2, (-1, i1 - i0))  # (B, n_kv_head, group, block_q, 1)
    return out.flatten(1, 2), lse


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    hidden: "Hidden",
    scale: float,
    blocks: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-2, algorithm 2: P = exp(S - L) again, then dV = P^T dO, dP = dO V^T, dS = P (dP - D).

    D = rowsum(dO O) stands for rowsum(dP P), which the softmax's derivative asks for, and needs no T x T matrix
    (arXiv 2205.14135, appendix B.2).

    Returns:
        dq, dk, dv in the shapes of q, k and v.
    """
    q = q.unflatten(1, (k.shape[1], -1))  # (B, n_kv_head, group, Tq, head_size)
    dout, out = dout.unflatten(1, q.shape[1:3]), out.unflatten(1, q.shape[1:3])  # (B, n_kv_head, group, Tq, value_size)
    block_q, block_k = max(1, blocks[0] // q.shape[2]), blocks[1]
    wide = lse.dtype
    dq = torch.zeros_like(q, dtype=wide)  # (B, n_kv_head, group, Tq, head_size)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)  # (B, n_kv_head, Tk, head_size), (B, n_kv_head, Tk, value_size)
    d = torch.empty_like(lse)  # (B, n_kv_head, group, Tq, 1)
    for i0 in range(0, hidden.n_queries, block_q):
        part = dout[:, :, :, i0 : i0 + block_q].to(wide)  # (B, n_kv_head, group, block_q, value_size)
        d[:, :, :, i0 : i0 + block_q] = (part * out[:, :, :, i0 : i0 + block_q]).sum(-1, keepdim=True)
    for j0 in range(0, hidden.last_key(hidden.n_queries), block_k):
        j1 = min(j0 + block_k, hidden.last_key(hidden.n_queries))
        kj = k[:, :, j0:j1].to(wide)  # (B, n_kv_head, block_k, head_size)
        vj = v[:, :, j0:j1].to(wide)  # (B, n_kv_head, block_k, value_size)
        dkj, dvj = torch.zeros_like(kj), torch.zeros_like(vj)  # as kj and vj
        for i0 in range(hidden.first_query(j0), hidden.n_queries, block_q):
            i1 = min(i0 + block_q, hidden.n_queries)
            qi = rows_of(q, i0, i1, wide) * scale  # (B, n_kv_head, group * block_q, head_size)
            di = rows_of(dout, i0, i1, wide)  # (B, n_kv_head, group * block_q, value_size)
            p = qi @ kj.mT  # (B, n_kv_head, group * block_q, block_k)
            p.sub_(rows_of(lse, i0, i1, wide)).exp_()  # (B, n_kv_head, group * block_q, block_k)
            hidden.fill(p, i0, i1, j0, j1, 0.0)
            dvj += p.mT @ di  # (B, n_kv_head, block_k, value_size)
            ds = di @ vj.mT  # (B, n_kv_head, group * block_q, block_k)
            ds.sub_(rows_of(d, i0, i1, wide)).mul_(p)  # (B, n_kv_head, group * block_q, block_k)
            dkj += ds.mT @ qi  # (B, n_kv_head, block_k, head_size); the scale is in qi
            dqi = (ds @ kj).mul_(scale)  # (B, n_kv_head, group * block_q, head_size)
            dq[:, :, :, i0:i1] += dqi.unflatten(2, (-1, i1 - i0))  # (B, n_kv_head, group, block_q, head_size)
        dk[:, :, j0:j1] = dkj  # (B, n_kv_head, block_k, head_size)
        dv[:, :, j0:j1] = dvj  # (B, n_kv_head, block_k, value_size)
    return dq.flatten(1, 2).to(q.dtype), dk, dv


def rows_of(x: Tensor, i0: int, i1: int, dtype: torch.dtype) -> Tensor:
    """Rows i0 to i1 of all heads of a group, one below the other, so that one product with the keys serves them all.

    Args:
        x: (B, n_kv_head, group, T, size).
        i0: The first row.
        i1: The row after the last.
        dtype: What to compute in.

    Returns:
        (B, n_kv_head, group * (i1 - i0), size).
    """
    return x[:, :, :, i0:i1].flatten(2, 3).to(dtype)


class Hidden:
    """Which keys a query may not attend to, worked out for one block at a time.

    Args:
        n_queries: Tq.
        n_keys: Tk.
        causal: See `flash_attention`.
        key_lengths: See `flash_attention`.
    """

    def __init__(self, n_queries: int, n_keys: int, causal: bool, key_lengths: Tensor | None) -> None:
        self.n_queries, self.causal, self.key_lengths = n_queries, causal, key_lengths
        self.shift = n_keys - n_queries  # query i stands at the place of key i + shift
        longest, shortest = n_keys, n_keys
        if key_lengths is not None:
            longest, shortest = int(key_lengths.max()), int(key_lengths.min())
        self.longest, self.shortest = longest, shortest

    def last_key(self, i1: int) -> int:
        """The end of the keys that any query before i1 sees; blocks beyond it are not computed at all."""
        return min(self.longest, i1 + self.shift) if self.causal else self.longest

    def first_query(self, j0: int) -> int:
        """The first query that sees key j0 or a later one."""
        return max(0, j0 - self.shift) if self.causal else 0

    def fill(self, scores: Tensor, i0: int, i1: int, j0: int, j1: int, value: float) -> None:
        """Write `value`, in place, where queries i0 to i1 must not see keys j0 to j1.

        Args:
            scores: (B, n_kv_head, group * (i1 - i0), j1 - j0).
            i0: The block's first row.
            i1: The row after its last.
            j0: Its first column.
            j1: The column after its last.
            value: What to write.
        """
        keys = torch.arange(j0, j1, device=scores.device)  # (block_k,)
        if self.causal and j1 - 1 > i0 + self.shift:  # the diagonal runs through this block
            places = torch.arange(i0, i1, device=scores.device) + self.shift  # (block_q,)
            later = keys > places[:, None]  # (block_q, block_k)
            scores.unflatten(2, (-1, i1 - i0)).masked_fill_(later, value)  # (B, n_kv_head, group, block_q, block_k)
        if self.key_lengths is not None and j1 > self.shortest:
            padding = keys >= self.key_lengths[:, None, None, None]  # (B, 1, 1, block_k)
            scores.masked_fill_(padding, value)  # (B, n_kv_head, group * block_q, block_k)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None) -> None:
    """Make sure that queries, keys and values fit together.

    Raises:
        UserError: With all that does not fit.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise UserError(f"Attention takes tensors of four dimensions, (B, n_head, T, head_size), not {shapes}.")
    problems = []
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        problems.append(f"q, k and v hold different numbers of texts: {shapes}.")
    if k.shape[1:3] != v.shape[1:3]:
        problems.append(f"k and v differ in heads or length: {shapes}.")
    if q.shape[3] != k.shape[3]:
        problems.append(f"q and k differ in head_size: {shapes}.")
    if k.shape[1] == 0 or q.shape[1] % max(1, k.shape[1]):
        problems.append(f"n_head must be a multiple of n_kv_head: {shapes}.")
    if key_lengths is not None:
        if key_lengths.shape != q.shape[:1]:
            problems.append(f"key_lengths holds {tuple(key_lengths.shape)} lengths for {q.shape[0]} texts.")
        elif key_lengths.numel() and (key_lengths.min() < 0 or key_lengths.max() > k.shape[2]):
            problems.append(f"key_lengths must lie between 0 and {k.shape[2]}, not {key_lengths.tolist()}.")
    report_all(problems)


def check_boundaries(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Make sure that the boundaries of packed texts fit the tensors.

    Raises:
        UserError: With all that does not fit.
    """
    problems = []
    for name, boundaries, total in (("q", cu_seqlens_q, len(q)), ("k", cu_seqlens_k, len(k))):
        ends = boundaries.tolist()
        if not ends or ends[0] != 0 or ends[-1] != total or ends != sorted(ends):
            problems.append(f"cu_seqlens_{name} must rise from 0 to {total}, the rows of {name}; it is {ends}.")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        problems.append(f"cu_seqlens_q has {len(cu_seqlens_q)} boundaries and cu_seqlens_k {len(cu_seqlens_k)}.")
    report_all(problems)


def main(length: int = 4096, n_head: int = 4, head_size: int = 64) -> None:
    """Compare time, memory and results with the attention that writes all scores down."""
    from custom_models.attention import scaled_dot_product_attention

    q, k, v = torch.randn(3, 1, n_head, length, head_size).unbind()  # each (1, n_head, T, head_size)
    outs = []
    print(f"{n_head} heads of {head_size} over {length:,} tokens, float32, forward only")
    for name, attend in (("flash", flash_attention), ("naive", lambda *qkv: scaled_dot_product_attention(*qkv)[0])):
        attend(q[:, :, :64], k[:, :, :64], v[:, :, :64])  # what loads at the first call is not what we measure
        with PeakMemory() as before:
            pass
        began = time.perf_counter()
        with PeakMemory() as during:
            outs.append(attend(q, k, v))  # (1, n_head, T, head_size)
        seconds, extra = time.perf_counter() - began, during.bytes - before.bytes - outs[-1].nbytes
        print(f"  {name}: {seconds:.2f} s, {max(extra, 0) / 1e6:,.0f} MB besides the output")
    print(f"  largest difference: {(outs[0] - outs[1]).abs().max():.1e}")


if __name__ == "__main__":
    torch.manual_seed(0)
    run_file(main)
