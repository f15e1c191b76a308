"""FlashAttention as a GPU kernel in Triton: the algorithm of `flash_attention.py`, one block of it per program.

Every program holds its block in the GPU's fast memory and walks over the others: for the output and for dq over blocks
of keys, for dk and dv over the queries of all heads that share these keys. So no two programs write to the same place
(Dao 2023, arXiv 2307.08691, section 3.2), and the scores exist for one block at a time.

What is tested: in Triton's interpreter, on the CPU, forward and gradients equal SDPA's; the kernels compile for compute
capability 8.0, in no more shared memory than 8.6 has; and on an H200 (`make test-gpu`, Triton 3.6) both equal SDPA's in
float32 and bfloat16. What is not: how fast they are, and whether the block sizes are good ones.

The kernels know one layout, packed texts, (total, heads, head_size). A padded batch is read as such, too: its texts lie
end to end, and the keys of the padding are passed over. Left out, as in `flash_attention.py`: arbitrary masks, an
additive bias, dropout; further, value heads of another size than key heads.

Run it: TRITON_INTERPRET=1 python -m custom_models.flash_attention_triton
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from custom_models.flash_attention import check_boundaries, check_shapes
from workflows.errors import UserError, run_file

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise UserError(
        'The "triton" backend needs the package triton (Linux): pip install triton. The backend "flash" is the same '
        "in plain PyTorch."
    ) from e

MAX_HEAD_SIZE = 256


@triton.jit
def _text(sequences: tl.tensor) -> tuple[tl.tensor, ...]:
    """This program's text: its first query, how many; its first key, how many; and which key the first query is at."""
    row = sequences + tl.program_id(2) * 5
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def _tile(
    x: tl.tensor, rows: tl.tensor, valid: tl.tensor, head: tl.tensor, N_HEAD: tl.constexpr, SIZE: tl.constexpr,
    PADDED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Where the rows of one head lie in x, (total, N_HEAD, SIZE), and which of it may be touched: (rows, PADDED) each.

    PADDED is SIZE rounded up to a power of two, which is all that Triton's tiles can be.
    """
    size = tl.arange(0, PADDED)  # (PADDED,)
    begin = (rows.to(tl.int64) * N_HEAD + head) * SIZE  # (rows,); 64 bits, for long batches
    return x + begin[:, None] + size[None, :], valid[:, None] & (size < SIZE)[None, :]


@triton.jit
def _weights(
    q: tl.tensor, k: tl.tensor, lse: tl.tensor, rows: tl.tensor, cols: tl.tensor, n_queries: tl.tensor,
    n_keys: tl.tensor, shift: tl.tensor, scale: tl.tensor, CAUSAL: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """exp(scores - lse) of one block, zero where a query does not see a key: (BLOCK_Q, BLOCK_K)."""
    scores = _scores(q, k, rows, cols, n_queries, n_keys, shift, scale, CAUSAL)  # (BLOCK_Q, BLOCK_K)
    return tl.exp(scores - lse[:, None])  # (BLOCK_Q, BLOCK_K); lse is infinite for a query that sees nothing


@triton.jit
def _scores(
    q: tl.tensor, k: tl.tensor, rows: tl.tensor, cols: tl.tensor, n_queries: tl.tensor, n_keys: tl.tensor,
    shift: tl.tensor, scale: tl.tensor, CAUSAL: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """q k^T * scale of one block, minus infinity where a query does not see a key: (BLOCK_Q, BLOCK_K)."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_Q, BLOCK_K)
    seen = (rows < n_queries)[:, None] & (cols < n_keys)[None, :]  # (BLOCK_Q, BLOCK_K)
    if CAUSAL:
        seen = seen & (cols[None, :] <= rows[:, None] + shift)  # (BLOCK_Q, BLOCK_K)
    return tl.where(seen, scores, float("-inf"))  # (BLOCK_Q, BLOCK_K)


@triton.jit
def _forward(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, lse: tl.tensor, sequences: tl.tensor, total: tl.tensor,
    scale: tl.tensor, N_HEAD: tl.constexpr, N_KV_HEAD: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """O and L of one block of queries (algorithm 1)."""
    q0, n_queries, k0, n_keys, shift = _text(sequences)
    head, i0 = tl.program_id(1), tl.program_id(0) * BLOCK_Q
    if i0 < n_queries:  # the grid is as long as the longest text
        rows = i0 + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
        q_at, q_valid = _tile(q, q0 + rows, rows < n_queries, head, N_HEAD, SIZE, PADDED)  # (BLOCK_Q, PADDED)
        qi = tl.load(q_at, mask=q_valid, other=0.0)  # (BLOCK_Q, PADDED)
        largest = tl.full((BLOCK_Q,), -3.0e38, tl.float32)  # (BLOCK_Q,); no infinity, see flash_attention.py
        sums = tl.zeros((BLOCK_Q,), tl.float32)  # (BLOCK_Q,)
        acc = tl.zeros((BLOCK_Q, PADDED), tl.float32)  # (BLOCK_Q, PADDED)
        end = n_keys
        if CAUSAL:
            end = tl.minimum(n_keys, i0 + BLOCK_Q + shift)  # what lies wholly above the diagonal is not visited
        for j0 in range(0, end, BLOCK_K):
            cols = j0 + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
            kv_head = head // (N_HEAD // N_KV_HEAD)
            k_at, k_valid = _tile(k, k0 + cols, cols < n_keys, kv_head, N_KV_HEAD, SIZE, PADDED)  # (BLOCK_K, PADDED)
            v_at, _ = _tile(v, k0 + cols, cols < n_keys, kv_head, N_KV_HEAD, SIZE, PADDED)  # (BLOCK_K, PADDED)
            kj, vj = tl.load(k_at, mask=k_valid, other=0.0), tl.load(v_at, mask=k_valid, other=0.0)
            scores = _scores(qi, kj, rows, cols, n_queries, n_keys, shift, scale, CAUSAL)  # (BLOCK_Q, BLOCK_K)
            larger = tl.maximum(largest, tl.max(scores, 1))  # (BLOCK_Q,)
            p = tl.exp(scores - larger[:, None])  # (BLOCK_Q, BLOCK_K)
            shrink = tl.exp(largest - larger)  # (BLOCK_Q,)
            sums = sums * shrink + tl.sum(p, 1)  # (BLOCK_Q,)
            acc = acc * shrink[:, None] + tl.dot(p.to(vj.dtype), vj, input_precision="ieee")  # (BLOCK_Q, PADDED)
            largest = larger
        sums_or_1 = tl.where(sums == 0.0, 1.0, sums)  # (BLOCK_Q,)
        li = tl.where(sums == 0.0, float("inf"), largest + tl.log(sums_or_1))  # (BLOCK_Q,)
        out_at, _ = _tile(out, q0 + rows, rows < n_queries, head, N_HEAD, SIZE, PADDED)  # (BLOCK_Q, PADDED)
        tl.store(out_at, (acc / sums_or_1[:, None]).to(out.dtype.element_ty), mask=q_valid)
        tl.store(lse + head * total + q0 + rows, li, mask=rows < n_queries)


@triton.jit
def _backward_q(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, dout: tl.tensor, lse: tl.tensor, d: tl.tensor, dq: tl.tensor,
    sequences: tl.tensor, total: tl.tensor, scale: tl.tensor, N_HEAD: tl.constexpr, N_KV_HEAD: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """dQ of one block of queries: the sum over the keys of dS K, dS = P (dO V^T - D) (algorithm 2)."""
    q0, n_queries, k0, n_keys, shift = _text(sequences)
    head, i0 = tl.program_id(1), tl.program_id(0) * BLOCK_Q
    if i0 < n_queries:
        rows = i0 + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
        q_at, q_valid = _tile(q, q0 + rows, rows < n_queries, head, N_HEAD, SIZE, PADDED)  # (BLOCK_Q, PADDED)
        o_at, _ = _tile(dout, q0 + rows, rows < n_queries, head, N_HEAD, SIZE, PADDED)  # (BLOCK_Q, PADDED)
        qi, di = tl.load(q_at, mask=q_valid, other=0.0), tl.load(o_at, mask=q_valid, other=0.0)  # (BLOCK_Q, PADDED)
        at = head * total + q0 + rows  # (BLOCK_Q,)
        li = tl.load(lse + at, mask=rows < n_queries, other=float("inf"))  # (BLOCK_Q,)
        deltas = tl.load(d + at, mask=rows < n_queries, other=0.0)  # (BLOCK_Q,)
        acc = tl.zeros((BLOCK_Q, PADDED), tl.float32)  # (BLOCK_Q, PADDED)
        end = n_keys
        if CAUSAL:
            end = tl.minimum(n_keys, i0 + BLOCK_Q + shift)
        for j0 in range(0, end, BLOCK_K):
            cols = j0 + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
            kv_head = head // (N_HEAD // N_KV_HEAD)
            k_at, k_valid = _tile(k, k0 + cols, cols < n_keys, kv_head, N_KV_HEAD, SIZE, PADDED)  # (BLOCK_K, PADDED)
            v_at, _ = _tile(v, k0 + cols, cols < n_keys, kv_head, N_KV_HEAD, SIZE, PADDED)  # (BLOCK_K, PADDED)
            kj, vj = tl.load(k_at, mask=k_valid, other=0.0), tl.load(v_at, mask=k_valid, other=0.0)
            p = _weights(qi, kj, li, rows, cols, n_queries, n_keys, shift, scale, CAUSAL)  # (BLOCK_Q, BLOCK_K)
            ds = p * (tl.dot(di, tl.trans(vj), input_precision="ieee") - deltas[:, None])  # (BLOCK_Q, BLOCK_K)
            acc += tl.dot(ds.to(kj.dtype), kj, input_precision="ieee")  # (BLOCK_Q, PADDED)
        dq_at, _ = _tile(dq, q0 + rows, rows < n_queries, head, N_HEAD, SIZE, PADDED)  # (BLOCK_Q, PADDED)
        tl.store(dq_at, (acc * scale).to(dq.dtype.element_ty), mask=q_valid)


@triton.jit
def _backward_kv(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, dout: tl.tensor, lse: tl.tensor, d: tl.tensor, dk: tl.tensor,
    dv: tl.tensor, sequences: tl.tensor, total: tl.tensor, scale: tl.tensor, N_HEAD: tl.constexpr,
    N_KV_HEAD: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """dK and dV of one block of keys: sums of dS^T Q and P^T dO over the queries of all heads of the group."""
    q0, n_queries, k0, n_keys, shift = _text(sequences)
    kv_head, j0 = tl.program_id(1), tl.program_id(0) * BLOCK_K
    if j0 < n_keys:
        cols = j0 + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        k_at, k_valid = _tile(k, k0 + cols, cols < n_keys, kv_head, N_KV_HEAD, SIZE, PADDED)  # (BLOCK_K, PADDED)
        v_at, _ = _tile(v, k0 + cols, cols < n_keys, kv_head, N_KV_HEAD, SIZE, PADDED)  # (BLOCK_K, PADDED)
        kj, vj = tl.load(k_at, mask=k_valid, other=0.0), tl.load(v_at, mask=k_valid, other=0.0)  # (BLOCK_K, PADDED)
        dkj = tl.zeros((BLOCK_K, PADDED), tl.float32)  # (BLOCK_K, PADDED)
        dvj = tl.zeros((BLOCK_K, PADDED), tl.float32)  # (BLOCK_K, PADDED)
        begin = 0
        if CAUSAL:
            begin = tl.maximum(0, j0 - shift)  # the first query that sees any of these keys
        for member in range(0, N_HEAD // N_KV_HEAD):
            head = kv_head * (N_HEAD // N_KV_HEAD) + member
            for i0 in range(begin, n_queries, BLOCK_Q):
                rows = i0 + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
                q_at, q_valid = _tile(q, q0 + rows, rows < n_queries, head, N_HEAD, SIZE, PADDED)  # (BLOCK_Q, PADDED)
                o_at, _ = _tile(dout, q0 + rows, rows < n_queries, head, N_HEAD, SIZE, PADDED)  # (BLOCK_Q, PADDED)
                qi, di = tl.load(q_at, mask=q_valid, other=0.0), tl.load(o_at, mask=q_valid, other=0.0)
                at = head * total + q0 + rows  # (BLOCK_Q,)
                li = tl.load(lse + at, mask=rows < n_queries, other=float("inf"))  # (BLOCK_Q,)
                deltas = tl.load(d + at, mask=rows < n_queries, other=0.0)  # (BLOCK_Q,)
                p = _weights(qi, kj, li, rows, cols, n_queries, n_keys, shift, scale, CAUSAL)  # (BLOCK_Q, BLOCK_K)
                dvj += tl.dot(tl.trans(p).to(di.dtype), di, input_precision="ieee")  # (BLOCK_K, PADDED)
                ds = p * (tl.dot(di, tl.trans(vj), input_precision="ieee") - deltas[:, None])  # (BLOCK_Q, BLOCK_K)
                dkj += tl.dot(tl.trans(ds).to(qi.dtype), qi, input_precision="ieee")  # (BLOCK_K, PADDED)
        dk_at, _ = _tile(dk, k0 + cols, cols < n_keys, kv_head, N_KV_HEAD, SIZE, PADDED)  # (BLOCK_K, PADDED)
        dv_at, _ = _tile(dv, k0 + cols, cols < n_keys, kv_head, N_KV_HEAD, SIZE, PADDED)  # (BLOCK_K, PADDED)
        tl.store(dk_at, (dkj * scale).to(dk.dtype.element_ty), mask=k_valid)
        tl.store(dv_at, dvj.to(dv.dtype.element_ty), mask=k_valid)


def constants(n_head: int, n_kv_head: int, head_size: int, causal: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels are compiled for. Blocks are such that 99 KiB of fast memory are enough."""
    padded = max(16, triton.next_power_of_2(head_size))  # a matrix product needs 16 at least
    block = (64 if dtype.itemsize == 2 else 32) // (1 if padded * dtype.itemsize <= 256 else 2)
    return {
        "N_HEAD": n_head,
        "N_KV_HEAD": n_kv_head,
        "SIZE": head_size,
        "PADDED": padded,
        "CAUSAL": causal,
        "BLOCK_Q": block,
        "BLOCK_K": block,
    }


class FlashAttentionTriton(torch.autograd.Function):
    """The three kernels, tied together for autograd. All tensors are packed: (total, heads, head_size)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: Tensor, longest: tuple[int, int], causal: bool,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Keep the inputs, the output and one number per query."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # (total, heads, head_size) each
        out = torch.zeros_like(q)  # (total_q, n_head, head_size)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)  # (n_head, total_q)
        sizes = constants(q.shape[1], k.shape[1], q.shape[2], causal, q.dtype)
        grid = (triton.cdiv(longest[0], sizes["BLOCK_Q"]), q.shape[1], len(sequences))
        if min(grid) > 0:
            with _on_device_of(q):
                _forward[grid](q, k, v, out, lse, sequences, len(q), scale, **sizes)
        ctx.save_for_backward(q, k, v, out, lse, sequences)
        ctx.settings = (longest, scale, sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, out, lse, sequences = ctx.saved_tensors
        longest, scale, sizes = ctx.settings
        dout = dout.contiguous()  # (total_q, n_head, head_size)
        d = (dout.float() * out.float()).sum(-1).T.contiguous()  # (n_head, total_q): D = rowsum(dO O)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)  # (total, heads, head_size) each
        over_q = (triton.cdiv(longest[0], sizes["BLOCK_Q"]), q.shape[1], len(sequences))
        over_k = (triton.cdiv(longest[1], sizes["BLOCK_K"]), k.shape[1], len(sequences))
        if min(*over_q, *over_k) > 0:
            with _on_device_of(q):
                _backward_q[over_q](q, k, v, dout, lse, d, dq, sequences, len(q), scale, **sizes)
                _backward_kv[over_k](q, k, v, dout, lse, d, dk, dv, sequences, len(q), scale, **sizes)
        return dq, dk, dv, None, None, None, None


def flash_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`flash_attention` by the kernels, with the same arguments.

    Args:
        q: Queries, (B, n_head, Tq, head_size).
        k: Keys, (B, n_kv_head, Tk, head_size).
        v: Values, (B, n_kv_head, Tk, head_size).
        causal: See `flash_attention`.
        key_lengths: See there, (B,).
        scale: See there.

    Returns:
        (B, n_head, Tq, head_size).

    Raises:
        UserError: If the shapes do not fit, or there is neither a GPU nor the interpreter.
    """
    check_shapes(q, k, v, key_lengths)
    batch, n_queries, n_keys = q.shape[0], q.shape[2], k.shape[2]
    texts = torch.arange(batch, device=q.device)  # (B,)
    real = torch.full_like(texts, n_keys) if key_lengths is None else key_lengths.to(texts)  # (B,)
    n_q, shift = torch.full_like(texts, n_queries), torch.full_like(texts, n_keys - n_queries)  # (B,) each
    sequences = torch.stack([texts * n_queries, n_q, texts * n_keys, real, shift], dim=1)  # (B, 5), see _text
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # each (B * T, heads, head_size)
    out = _run(q, k, v, sequences, (n_queries, n_keys), causal, scale)  # (B * Tq, n_head, head_size)
    return out.unflatten(0, (batch, n_queries)).transpose(1, 2)  # (B, n_head, Tq, head_size)


def flash_attention_triton_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *, causal: bool = False,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`flash_attention_varlen` by the kernels, with the same arguments; all texts in one launch.

    Args:
        q: Queries, (total_q, n_head, head_size).
        k: Keys, (total_k, n_kv_head, head_size).
        v: Values, (total_k, n_kv_head, head_size).
        cu_seqlens_q: Where each text begins and the last one ends, (B + 1,).
        cu_seqlens_k: The same for k and v; that of q if None.
        causal: See `flash_attention`.
        scale: See there.

    Returns:
        (total_q, n_head, head_size).

    Raises:
        UserError: If the boundaries do not fit, or there is neither a GPU nor the interpreter.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    check_boundaries(q, k, cu_seqlens_q, cu_seqlens_k)
    n_q, n_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()  # (B,) each
    sequences = torch.stack([cu_seqlens_q[:-1], n_q, cu_seqlens_k[:-1], n_k, n_k - n_q], dim=1)  # (B, 5), see _text
    longest = (max(n_q.tolist(), default=0), max(n_k.tolist(), default=0))
    return _run(q, k, v, sequences, longest, causal, scale)


def _run(
    q: Tensor, k: Tensor, v: Tensor, sequences: Tensor, longest: tuple[int, int], causal: bool, scale: float | None
) -> Tensor:
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        raise UserError(
            'The "triton" backend needs a GPU; on the CPU take "flash" or "sdpa", or, to try the kernels slowly, set '
            "TRITON_INTERPRET=1 before Python starts."
        )
    if v.shape[-1] != q.shape[-1] or q.shape[-1] > MAX_HEAD_SIZE or q.dtype == torch.float64:
        raise UserError(
            f"The Triton kernels take heads of one size up to {MAX_HEAD_SIZE} in at most 32 bits, not "
            f'{q.shape[-1]} with values of {v.shape[-1]} in {q.dtype}. Take the backend "flash" or "sdpa".'
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    numbers = sequences.to(device=q.device, dtype=torch.int32)  # (B, 5)
    out: Tensor = FlashAttentionTriton.apply(q, k, v, numbers, longest, causal, scale)
    return out  # (total_q, n_head, head_size)


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton starts kernels on the current GPU, whichever one their tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def main() -> None:
    """Compare with PyTorch's own attention."""
    device = "cpu" if triton.knobs.runtime.interpret else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no GPU here. Run it as: TRITON_INTERPRET=1 python -m " + __spec__.name)
    q = torch.randn(2, 4, 100, 32, device=device, requires_grad=True)  # (B, n_head, T, head_size)
    k, v = torch.randn(2, 2, 2, 100, 32, device=device).unbind()  # each (B, n_kv_head, T, head_size)
    for causal in (False, True):
        ours = flash_attention_triton(q, k, v, causal=causal)  # (B, n_head, T, head_size)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        (ours_dq,), (their_dq,) = (torch.autograd.grad(out.square().sum(), q) for out in (ours, theirs))
        print(f"causal {causal!s:<5}  differs from SDPA on {device} by: output {(ours - theirs).abs().max():.1e}, "
              f"gradient of q {(ours_dq - their_dq).abs().max():.1e}")  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    run_file(main)
