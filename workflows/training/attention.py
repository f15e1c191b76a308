"""Attention over a packed row on a CPU: only the pairs of tokens that see each other, with a backward pass of its own.

A row's queries are cut into pieces: the short trees together, padded to the longest of them, and stretches of the long
ones, each with the keys up to its own end. What is left out is most of a row's pairs, where torch's kernel computes all
of them (a mask does not save it work) or, with several samples in a row, cannot skip any.

The softmax's weights are kept for the backward pass while they are few and computed again where they are many. Query,
key and value stay one tensor on the way in and on the way back, and the rotation of query and key is done here, so that
nothing is cut apart and put together again in between.
"""

from dataclasses import dataclass
from typing import Any

import torch

from workflows.training.batch import PackedBatch

STRETCH = 128
"""Queries of a piece: fewer leave more pairs out, more make larger matrix products."""
KEPT_PAIRS = 2**19
"""Up to so many pairs in a row the weights are kept: 30 layers of 9 heads then hold 280 MB in bfloat16."""


@dataclass(frozen=True)
class Piece:
    """n groups of L queries each; a group's keys are the row's first S tokens, which all share, and K of its own.

    Attributes:
        shared: S; 0 for the shared tokens' own pieces.
        queries: The tokens that ask, n * L of them; a range, or indices with padding.
        keys: The own tokens that are seen, n * K of them.
        mask: True where a query sees a key, shape (n, L, S + K).
        real: For indices with padding: which tokens they are without it, and their places among the n * L.
    """

    shared: int
    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    mask: torch.Tensor
    real: tuple[torch.Tensor, torch.Tensor] | None = None


class RowAttention:
    """How the tokens of one packed row see each other, cut into pieces.

    Attributes:
        pieces: They cover every token of the row as a query once.
        kept: Whether the softmax's weights are kept for the backward pass.
    """

    def __init__(self, batch: PackedBatch) -> None:
        """Cut a row.

        Args:
            batch: The row, on a CPU.
        """
        tokens = batch.input_ids.size(1)
        mask = batch.attention_mask()
        sees = torch.ones(tokens, tokens, dtype=torch.bool).tril() if mask is None else mask[0, 0]  # (T, T)
        spans = [(begin, end) for begin, end in batch.spans.tolist() if end > begin]
        shared = spans[0][0]
        short = [span for span in spans if span[1] - span[0] <= STRETCH]
        if len(short) == 1:
            short = []
        self.pieces = _stretches(0, shared, 0, sees)
        for begin, end in spans:
            if (begin, end) not in short:
                self.pieces += _stretches(begin, end, shared, sees)
        if short:
            self.pieces.append(_side_by_side(short, shared, sees))
        self.kept = sum(piece.mask.numel() for piece in self.pieces) <= KEPT_PAIRS

    def __call__(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_head: int, n_query_groups: int, scale: float
    ) -> torch.Tensor:
        """Rotate query and key, and attend.

        Args:
            qkv: Queries of all heads, then keys, then values, shape (1, T, (n_head + 2 * n_query_groups) * head_size).
            cos: Cosines by token, both halves alike, shape (1, T, head_size).
            sin: Sines by token, both halves alike, shape (1, T, head_size).
            n_head: Query heads.
            n_query_groups: Key and value heads; as many query heads after each other share one.
            scale: What the products of query and key are multiplied by.

        Returns:
            Shape (1, T, n_head * head_size).
        """
        heads = n_head + 2 * n_query_groups
        y = _Attend.apply(qkv[0].unflatten(1, (heads, -1)), cos[0], sin[0], self, n_query_groups, scale)
        return y.flatten(1)[None]


def _stretches(begin: int, end: int, shared: int, sees: torch.Tensor) -> list[Piece]:
    """A tree's tokens, or the shared ones, in pieces of one group; sees: (T, T)."""
    pieces = []
    for first in range(begin, end, STRETCH):
        last = min(end, first + STRETCH)
        mask = torch.cat([sees[first:last, :shared], sees[first:last, begin:last]], dim=1)  # (L, S + K)
        pieces.append(Piece(shared, slice(first, last), slice(begin, last), mask[None]))
    return pieces


def _side_by_side(spans: list[tuple[int, int]], shared: int, sees: torch.Tensor) -> Piece:
    """Short trees as the groups of one piece, padded to the longest; sees: (T, T)."""
    begins, ends = torch.tensor(spans).T  # (n,)
    slots = torch.arange(int((ends - begins).max()))
    tokens = (begins[:, None] + slots).clamp(max=sees.size(0) - 1)  # (n, L)
    real = slots < (ends - begins)[:, None]  # (n, L)
    own = sees[tokens[:, :, None], tokens[:, None, :]] & real[:, None, :]  # (n, L, L)
    own |= torch.eye(len(slots), dtype=torch.bool)  # a query of padding sees itself: a softmax needs something
    mask = torch.cat([own.new_ones(len(spans), len(slots), shared), own], dim=2)
    return Piece(shared, tokens.flatten(), tokens.flatten(), mask, (tokens[real], real.flatten().nonzero()[:, 0]))


class _Attend(torch.autograd.Function):
    """Shapes below: G key heads, R query heads for each, T tokens, and n, L, S, K as in `Piece`."""

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, row: RowAttention, groups: int, scale: float
    ) -> torch.Tensor:
        """qkv: (T, G * R + 2 * G, size). Returns (T, G * R, size)."""
        tokens, heads, size = qkv.shape
        turned = _rotate(qkv[:, : heads - groups].transpose(0, 1), cos, sin)  # (G * R + G, T, size)
        q, k = turned[:-groups].unflatten(0, (groups, -1)), turned[-groups:]  # (G, R, T, size), (G, T, size)
        v = qkv[:, heads - groups :].transpose(0, 1)  # (G, T, size)
        y = qkv.new_empty(tokens, heads - 2 * groups, size)
        weights = []
        for piece in row.pieces:
            queries, keys, values = _queries(q, piece), _keys(k, piece), _keys(v, piece)
            p = _weights(queries, keys, piece, scale)  # (G * n, R * L, S + K)
            _put(y, torch.bmm(p, values), piece)
            weights.append(p)
        ctx.save_for_backward(q, k, v, cos, sin, *(weights if row.kept else ()))
        ctx.row, ctx.scale = row, scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """grads: that of y, (T, G * R, size)."""
        q, k, v, cos, sin, *weights = ctx.saved_tensors
        row, scale = ctx.row, ctx.scale
        groups, ratio, tokens, size = q.shape
        dy = grads[0].view(tokens, groups, ratio, size).permute(1, 2, 0, 3)  # (G, R, T, size)
        d_q = q.new_empty(tokens, groups * ratio, size)
        d_k, d_v = k.new_zeros(k.shape), k.new_zeros(k.shape)  # (G, T, size)
        for number, piece in enumerate(row.pieces):
            queries, keys, values = _queries(q, piece), _keys(k, piece), _keys(v, piece)
            p = weights[number] if row.kept else _weights(queries, keys, piece, scale)  # (G * n, R * L, S + K)
            dy_piece = _queries(dy, piece)  # (G * n, R * L, size)
            _add_keys(d_v, torch.bmm(p.mT, dy_piece), piece)
            d_p = torch.bmm(dy_piece, values.mT)
            d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)  # (G * n, R * L, S + K)
            _put(d_q, _scaled_bmm(d_scores, keys, scale), piece)
            _add_keys(d_k, _scaled_bmm(d_scores.mT, queries, scale), piece)
        d_qkv = q.new_empty(tokens, groups * ratio + 2 * groups, size)
        d_qkv[:, : groups * ratio] = _rotate(d_q.transpose(0, 1), cos, -sin).transpose(0, 1)
        d_qkv[:, groups * ratio : -groups] = _rotate(d_k, cos, -sin).transpose(0, 1)
        d_qkv[:, -groups:] = d_v.transpose(0, 1)
        return d_qkv, None, None, None, None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (heads, T, size) rotated by position (Su et al. 2021, arXiv 2104.09864, halves as in Llama); -sin undoes it."""
    half = x.size(-1) // 2
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x, cos, out=y)
    y[..., :half].addcmul_(x[..., half:], sin[:, :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[:, half:])
    return y


def _scaled_bmm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * (a @ b), the factor taken inside the product."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _weights(queries: torch.Tensor, keys: torch.Tensor, piece: Piece, scale: float) -> torch.Tensor:
    """The softmax's weights, (G * n, R * L, S + K); zero for queries of padding, so that nothing flows back to them."""
    n, length, seen = piece.mask.shape
    scores = _scaled_bmm(queries, keys.mT, scale)
    by_group = scores.view(-1, n, queries.size(1) // length, length, seen)  # (G, n, R, L, S + K)
    by_group.masked_fill_(~piece.mask[:, None], -torch.inf)
    p = scores.softmax(dim=-1)
    if piece.real is not None:
        real = torch.zeros(n * length, dtype=p.dtype)
        real[piece.real[1]] = 1
        p.view(by_group.shape).mul_(real.view(n, 1, length, 1))
    return p


def _queries(x: torch.Tensor, piece: Piece) -> torch.Tensor:
    """x (G, R, T, size) -> (G * n, R * L, size)."""
    n, length, _ = piece.mask.shape
    groups, ratio, _, size = x.shape
    taken = x[:, :, piece.queries].view(groups, ratio, n, length, size)
    return taken.transpose(1, 2).reshape(groups * n, ratio * length, size)


def _keys(x: torch.Tensor, piece: Piece) -> torch.Tensor:
    """x (G, T, size) -> (G * n, S + K, size)."""
    n, _, seen = piece.mask.shape
    own = x[:, piece.keys].reshape(-1, n, seen - piece.shared, x.size(-1))  # (G, n, K, size)
    above = x[:, None, : piece.shared].expand(-1, n, -1, -1)  # (G, n, S, size)
    return torch.cat([above, own], dim=2).flatten(0, 1)


def _put(x: torch.Tensor, values: torch.Tensor, piece: Piece) -> None:
    """Write values (G * n, R * L, size) to a piece's queries in x (T, G * R, size)."""
    n, length, _ = piece.mask.shape
    size = x.size(-1)
    by_query = values.view(-1, n, values.size(1) // length, length, size).permute(1, 3, 0, 2, 4)  # (n, L, G, R, size)
    flat = by_query.reshape(n * length, -1, size)
    if piece.real is None:
        x[piece.queries] = flat
    else:
        x[piece.real[0]] = flat[piece.real[1]]


def _add_keys(x: torch.Tensor, values: torch.Tensor, piece: Piece) -> None:
    """Add values (G * n, S + K, size) to a piece's keys in x (G, T, size)."""
    n, _, seen = piece.mask.shape
    by_group = values.view(-1, n, seen, x.size(-1))
    x[:, : piece.shared] += by_group[:, :, : piece.shared].sum(dim=1)
    own = by_group[:, :, piece.shared :].flatten(1, 2)  # (G, n * K, size)
    if piece.real is None:
        x[:, piece.keys] += own
    else:
        x[:, piece.real[0]] += own[:, piece.real[1]]  # each token is one group's: no index stands twice
