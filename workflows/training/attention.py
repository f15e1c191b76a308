"""Attention over a packed row on a CPU: only the pairs of tokens that see each other, with a backward pass of its own.

Each tree's queries are cut into stretches, which see the keys up to their own end; stretches of the row that are about
as long and see about as many keys are computed side by side, as one piece. What is left out is most of a row's pairs,
where torch's kernel computes all of them (a mask does not save it work) or, with several samples in a row, cannot skip
any.

The softmax's weights are kept for the backward pass while they are few and computed again where they are many. Query,
key and value stay one tensor on the way in and on the way back, and the rotation of query and key is done here, so that
nothing is cut apart and put together again in between.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from workflows.training.batch import PackedBatch

STRETCH = 128
"""Queries of a stretch: fewer leave more pairs out, more make larger matrix products."""
KEPT_PAIRS = 2**19
"""Up to so many pairs in a row the weights are kept: 30 layers of 9 heads then hold 280 MB in bfloat16."""


@dataclass(frozen=True)
class Piece:
    """n stretches of up to L queries; each sees the row's first S tokens, which all share, and up to K of its own.

    Attributes:
        shared: S; 0 for stretches of the shared tokens themselves.
        queries: The tokens that ask, shape (n, L).
        asks: False where a shorter stretch has no query, shape (n, L); any token stands there.
        keys: The tokens that are seen, the shared ones first, shape (n, S + K); any token where there is none.
        hidden: True where a query does not see a key, shape (n, L, S + K).
    """

    shared: int
    queries: torch.Tensor
    asks: torch.Tensor
    keys: torch.Tensor
    hidden: torch.Tensor


@dataclass(frozen=True)
class Places:
    """Where a piece's vectors stand among those of all heads and tokens, which are numbered head * T + token.

    Attributes:
        queries: For each of (G, n, R, L) the query's number.
        keys: For each of (G, n, S + K) the key's number.
        own: The same for the last K keys alone.
        none: Which of (G, n, R, L) are no query.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    own: torch.Tensor
    none: torch.Tensor


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
        self.tokens = batch.input_ids.size(1)
        mask = batch.attention_mask()
        sees = torch.ones(self.tokens, self.tokens, dtype=torch.bool).tril() if mask is None else mask[0, 0]  # (T, T)
        trees = batch.spans.tolist()
        shared = trees[0][0]
        alike = defaultdict(list)  # stretches by their number in the tree, and by length: up to 32, 64, 128, …
        for above, begin, end in [(0, 0, shared), *((shared, *tree) for tree in trees)]:
            length = math.ceil((end - begin) / max(1, round((end - begin) / STRETCH)))
            for number, first in enumerate(range(begin, end, max(1, length))):
                last = min(end, first + length)
                alike[above, number, max(5, (length - 1).bit_length())].append((begin, first, last))
        self.pieces = [_piece(above, stretches, sees) for (above, *_), stretches in alike.items()]
        self.kept = sum(piece.hidden.numel() for piece in self.pieces) <= KEPT_PAIRS
        self._places: dict[tuple[int, int], tuple[list[Places], torch.Tensor]] = {}

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

    def places(self, groups: int, ratio: int) -> tuple[list[Places], torch.Tensor]:
        """Numbers for every piece with so many key heads and query heads for each; the same for all layers.

        Returns:
            The pieces' places, and for each of (G * R, T) where its answer stands among those of all pieces in turn.
        """
        if (groups, ratio) not in self._places:
            heads = torch.arange(groups * ratio).view(groups, 1, ratio, 1) * self.tokens
            places = []
            answers = torch.empty(groups * ratio * self.tokens, dtype=torch.long)
            before = 0
            for piece in self.pieces:
                queries = (heads + piece.queries[:, None]).flatten()  # (G * n * R * L,)
                keys = torch.arange(groups).view(groups, 1, 1) * self.tokens + piece.keys  # (G, n, S + K)
                asks = piece.asks[:, None].expand(groups, -1, ratio, -1).flatten()  # (G * n * R * L,)
                places.append(
                    Places(queries, keys.flatten(), keys[..., piece.shared :].flatten(), (~asks).nonzero()[:, 0])
                )
                answers[queries[asks]] = before + asks.nonzero()[:, 0]
                before += len(queries)
            self._places[groups, ratio] = places, answers
        return self._places[groups, ratio]


def _piece(shared: int, stretches: list[tuple[int, int, int]], sees: torch.Tensor) -> Piece:
    """Stretches side by side, padded to the longest.

    Args:
        shared: S.
        stretches: For each the first token of its tree, its own first token, and the token after its last one.
        sees: Which token sees which, shape (T, T).
    """
    begins, firsts, lasts = torch.tensor(stretches).T[..., None]  # (n, 1)
    queries = firsts + torch.arange(int((lasts - firsts).max()))  # (n, L)
    own = begins + torch.arange(int((lasts - begins).max()))  # (n, K)
    asks, real = queries < lasts, own < lasts
    queries, own = queries.clamp(max=sees.size(0) - 1), own.clamp(max=sees.size(0) - 1)
    keys = torch.cat([torch.arange(shared).expand(len(stretches), -1), own], dim=1)  # (n, S + K)
    seen = sees[queries[:, :, None], keys[:, None, :]]  # (n, L, S + K)
    seen[..., shared:] &= real[:, None, :]
    seen[..., 0] |= ~asks  # a softmax needs something
    return Piece(shared, queries, asks, keys, ~seen)


class _Attend(torch.autograd.Function):
    """Shapes below: G key heads, R query heads for each, T tokens, and n, L, S, K as in `Piece`."""

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, row: RowAttention, groups: int, scale: float
    ) -> torch.Tensor:
        """qkv: (T, G * R + 2 * G, size). Returns (T, G * R, size)."""
        tokens, heads, size = qkv.shape
        turned = rotate(qkv[:, : heads - groups].transpose(0, 1), cos, sin)  # (G * R + G, T, size)
        q, k = turned[:-groups].flatten(0, 1), turned[-groups:].flatten(0, 1)  # (G * R * T, size), (G * T, size)
        v = qkv[:, heads - groups :].transpose(0, 1).flatten(0, 1)  # (G * T, size)
        places, answers = row.places(groups, heads // groups - 2)
        found, weights = [], []
        for piece, place in zip(row.pieces, places, strict=True):
            queries, keys, values = _taken(q, k, v, piece, place)
            p = _weights(queries, keys, piece, scale)  # (G * n, R * L, S + K)
            found.append(torch.bmm(p, values).view(-1, size))
            weights.append(p)
        ctx.save_for_backward(q, k, v, cos, sin, *(weights if row.kept else ()))
        ctx.row, ctx.groups, ctx.scale = row, groups, scale
        return torch.cat(found).index_select(0, answers.view(-1, tokens).T.flatten()).view(tokens, -1, size)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """grads: that of y, (T, G * R, size)."""
        q, k, v, cos, sin, *weights = ctx.saved_tensors
        row, groups, scale = ctx.row, ctx.groups, ctx.scale
        tokens, n_head, size = grads[0].shape
        places, answers = row.places(groups, n_head // groups)
        dy = grads[0].transpose(0, 1).flatten(0, 1)  # (G * R * T, size)
        d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)  # (G * T, size)
        found = []
        for number, (piece, place) in enumerate(zip(row.pieces, places, strict=True)):
            queries, keys, values = _taken(q, k, v, piece, place)
            p = weights[number] if row.kept else _weights(queries, keys, piece, scale)  # (G * n, R * L, S + K)
            # zeros where there is no query: nothing flows back from there
            dy_piece = dy.index_select(0, place.queries).index_fill_(0, place.none, 0).view(queries.shape)
            _add_keys(d_v, torch.bmm(p.mT, dy_piece), piece, place)
            d_p = torch.bmm(dy_piece, values.mT)
            d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)  # (G * n, R * L, S + K)
            found.append(_scaled_bmm(d_scores, keys, scale).view(-1, size))
            _add_keys(d_k, _scaled_bmm(d_scores.mT, queries, scale), piece, place)
        d_turned = torch.cat([torch.cat(found).index_select(0, answers), d_k]).view(-1, tokens, size)
        d_qkv = q.new_empty(tokens, n_head + 2 * groups, size)
        d_qkv[:, :-groups] = rotate(d_turned, cos, -sin).transpose(0, 1)
        d_qkv[:, -groups:] = d_v.view(groups, tokens, size).transpose(0, 1)
        return d_qkv, None, None, None, None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (…, size) rotated by position (Su et al. 2021, arXiv 2104.09864, halves as in Llama); -sin undoes it.

    Args:
        x: Heads by token in any order, (…, size).
        cos: Cosines, both halves alike, of a shape that goes with x's.
        sin: Likewise.
    """
    half = x.size(-1) // 2
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x, cos, out=y)
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


class StepAttention:
    """Decoding, one new token a row: it sees what the cache holds of its own row, and itself.

    Attributes:
        position: Of each row's token, (B,).
        hidden: 0 where a token may look and -inf where it may not, (B * G, 1, S).
    """

    def __init__(self, position: torch.Tensor, groups: int, dtype: torch.dtype, length: int) -> None:
        """What all layers share; `groups` are the key heads, `length` is S, more than any position."""
        self.position, self.rows = position, torch.arange(len(position), device=position.device)
        seen = torch.arange(length, device=position.device)  # (S,)
        hidden = torch.zeros(len(position), len(seen), dtype=dtype, device=position.device)
        hidden.masked_fill_(seen > position[:, None], -torch.inf)
        self.hidden = hidden.repeat_interleave(groups, dim=0)[:, None]

    def __call__(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        n_head: int,
        groups: int,
        scale: float,
        cache: Any,
    ) -> torch.Tensor:
        """Attend, after the new keys and values are in the cache.

        Args:
            qkv: Query, key and value heads, (B, 1, (n_head + 2 * groups) * size).
            cos: (B, 1, size).
            sin: (B, 1, size).
            n_head: Query heads.
            groups: Key heads.
            scale: Of the scores.
            cache: LitGPT's `KVCache`.

        Returns:
            (B, 1, n_head * size).
        """
        count, size = len(qkv), cos.size(-1)
        heads = qkv.view(count, n_head + 2 * groups, size)
        turned = rotate(heads[:, :-groups].transpose(0, 1), cos[:, 0], sin[:, 0])  # (n_head + groups, B, size)
        cache.k[self.rows, :, self.position] = turned[n_head:].transpose(0, 1)
        cache.v[self.rows, :, self.position] = heads[:, -groups:]
        seen = self.hidden.size(-1)
        keys, values = (x[:count, :, :seen].flatten(0, 1) for x in (cache.k, cache.v))  # (B * G, S, size)
        queries = turned[:n_head].transpose(0, 1).reshape(count * groups, -1, size)  # (B * G, R, size)
        p = torch.baddbmm(self.hidden, queries, keys.mT, alpha=scale).softmax(dim=-1)  # (B * G, R, S)
        return torch.bmm(p, values).view(count, 1, -1)


def _scaled_bmm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * (a @ b), the factor taken inside the product."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _taken(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece, place: Places
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A piece's queries (G * n, R * L, size), keys and values (G * n, S + K, size)."""
    seen, size = piece.hidden.size(-1), q.size(-1)
    keys = k.index_select(0, place.keys).view(-1, seen, size)
    values = v.index_select(0, place.keys).view(-1, seen, size)
    return q.index_select(0, place.queries).view(len(keys), -1, size), keys, values


def _weights(queries: torch.Tensor, keys: torch.Tensor, piece: Piece, scale: float) -> torch.Tensor:
    """The softmax's weights, (G * n, R * L, S + K)."""
    n, length, seen = piece.hidden.shape
    scores = _scaled_bmm(queries, keys.mT, scale)
    scores.view(-1, n, queries.size(1) // length, length, seen).masked_fill_(piece.hidden[:, None], -torch.inf)
    return scores.softmax(dim=-1)


def _add_keys(x: torch.Tensor, values: torch.Tensor, piece: Piece, place: Places) -> None:
    """Add values (G * n, S + K, size) to a piece's keys in x (G * T, size); they are zero where there is no key."""
    n, _, seen = piece.hidden.shape
    by_group = values.view(-1, n, seen, x.size(-1))  # (G, n, S + K, size)
    x.view(len(by_group), -1, x.size(-1))[:, : piece.shared] += by_group[:, :, : piece.shared].sum(dim=1)
    x.index_add_(0, place.own, by_group[:, :, piece.shared :].reshape(-1, x.size(-1)))
