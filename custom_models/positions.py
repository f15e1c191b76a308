"""Where a token stands. Attention itself sees a set of tokens without an order; these are the ways to give it one.

| kind        | added to or applied to  | used by                    | source                                        |
|-------------|-------------------------|----------------------------|-----------------------------------------------|
| sinusoidal  | token vectors, a sum    | the original Transformer   | arXiv 1706.03762, section 3.5                 |
| learned     | token vectors, a sum    | BERT, GPT-2                | arXiv 1810.04805                              |
| T5 buckets  | scores, a sum           | T5                         | arXiv 1910.10683, section 2.1                 |
| ALiBi       | scores, a sum           | BLOOM, MPT                 | arXiv 2108.12409, section 3                   |
| RoPE        | queries and keys, turns | Llama, Qwen, DeepSeek      | arXiv 2104.09864, equation 34                 |

RoPE, which turns instead of adding, has a file of its own: `rope.py`.

Run it: python -m custom_models.positions
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workflows.errors import UserError, run_file

# ---- sums with the token vectors ----


def sinusoidal_table(length: int, width: int, layout: Literal["interleaved", "halves"] = "interleaved") -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/width)), PE(pos, 2i + 1) = cos(pos / 10000^(2i/width)).

    Args:
        length: How many positions.
        width: Of the token vectors.
        layout: "interleaved" is the paper's, a sine beside its cosine; "halves" has all sines first (Marian).

    Returns:
        (length, width).

    Raises:
        UserError: If the width is odd.
    """
    if width % 2:
        raise UserError(f"Sinusoidal positions need an even width, a sine and a cosine for each wave, not {width}.")
    waves = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)  # (width / 2,)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), waves)  # (length, width / 2)
    pair = (angles.sin(), angles.cos())  # each (length, width / 2)
    table = torch.stack(pair, dim=-1).flatten(1) if layout == "interleaved" else torch.cat(pair, dim=-1)
    return table.to(torch.get_default_dtype())  # (length, width)


def look_up(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of a table of positions.

    Args:
        table: (length, width).
        positions: Integers, (.., T).

    Returns:
        (.., T, width).

    Raises:
        UserError: If a position lies beyond the table.
    """
    if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= len(table)):
        raise UserError(
            f"Position {int(positions.max())} is asked for, and the model knows 0 to {len(table) - 1}: the text is "
            f"longer than its {len(table)} positions. Shorten or split the text, or take a model with a longer context."
        )
    return F.embedding(positions, table)


class SinusoidalPositions(nn.Module):
    """The sinusoids as a module; nothing is learned, and nothing is stored in a checkpoint.

    Args:
        length: How many positions.
        width: Of the token vectors.
        layout: See `sinusoidal_table`.
    """

    def __init__(self, length: int, width: int, layout: Literal["interleaved", "halves"] = "interleaved") -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", sinusoidal_table(length, width, layout), persistent=False)  # (length, width)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions (.., T) -> vectors (.., T, width); a `UserError` for a position beyond the table."""
        return look_up(self.table, positions)


class LearnedPositions(nn.Module):
    """One learned vector for each position.

    Args:
        length: How many positions.
        width: Of the token vectors.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(length, width) * 0.02)  # (length, width); BERT's and GPT-2's 0.02

    def forward(self, positions: Tensor) -> Tensor:
        """Positions (.., T) -> vectors (.., T, width); a `UserError` for a position beyond the table."""
        return look_up(self.weight, positions)


# ---- sums with the scores ----


def distances(n_queries: int, n_keys: int, device: torch.device | None = None) -> Tensor:
    """How far each key lies after each query. The last query belongs to the last key, as with a KV cache.

    Returns:
        (Tq, Tk), integers; negative for earlier keys.
    """
    queries = torch.arange(n_keys - n_queries, n_keys, device=device)  # (Tq,)
    return torch.arange(n_keys, device=device) - queries[:, None]  # (Tq, Tk)


def relative_position_bucket(
    relative: Tensor, n_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """T5's buckets: each small distance has its own, larger ones share them, ever more to one.

    Args:
        relative: Key's position minus query's, any shape, integers.
        n_buckets: How many buckets there are.
        max_distance: The distance from which on all share the last bucket.
        bidirectional: Whether later keys have buckets of their own, half of all (an encoder); else a later key counts
            as distance 0 (a decoder, which masks it anyway).

    Returns:
        Bucket numbers in the shape of `relative`.
    """
    offset = torch.zeros_like(relative)  # the shape of relative, as everything here
    if bidirectional:
        n_buckets //= 2
        offset = (relative > 0) * n_buckets
        distance = relative.abs()
    else:
        distance = (-relative).clamp(min=0)
    exact = n_buckets // 2  # the first half: one bucket for each distance
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    shared = (exact + (ratio * (n_buckets - exact)).long()).clamp(max=n_buckets - 1)
    return offset + torch.where(distance < exact, distance, shared)


class RelativePositionBias(nn.Module):
    """T5's bias: for each head one learned number per bucket, added to the scores. A model's layers share one.

    Args:
        n_head: Heads.
        n_buckets: See `relative_position_bucket`.
        max_distance: See there.
        bidirectional: See there.
    """

    def __init__(self, n_head: int, n_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> None:
        super().__init__()
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.randn(n_buckets, n_head) * 0.02)  # (n_buckets, n_head)

    def forward(self, n_queries: int, n_keys: int) -> Tensor:
        """The bias for the last n_queries of n_keys positions, (1, n_head, Tq, Tk)."""
        buckets = self.buckets(distances(n_queries, n_keys, self.weight.device))  # (Tq, Tk)
        return F.embedding(buckets, self.weight).permute(2, 0, 1)[None]  # (1, n_head, Tq, Tk)

    def buckets(self, relative: Tensor) -> Tensor:
        """Which bucket, a row of `weight`, keys at these positions relative to the query belong to; shapes stay."""
        return relative_position_bucket(relative, len(self.weight), self.max_distance, self.bidirectional)


def alibi_slopes(n_head: int) -> Tensor:
    """A geometric series from 2^(-8/n) on, for n heads a power of two: near-sighted heads and far-sighted ones.

    For another number of heads the series of the next lower power of two is filled up with every other member of that
    of the next higher one, as in the authors' code.

    Returns:
        (n_head,).
    """
    lower = 2 ** int(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    between = [2 ** (-8 * (i + 1) / (2 * lower)) for i in range(0, 2 * lower, 2)]
    return torch.tensor(slopes + between[: n_head - lower])  # (n_head,)


def alibi_bias(n_head: int, n_queries: int, n_keys: int, device: torch.device | None = None) -> Tensor:
    """-slope * distance, added to the scores: a key counts less the further back it lies.

    Later keys get a positive number here; a causal model masks them.

    Returns:
        (1, n_head, Tq, Tk), for the last n_queries of n_keys positions.
    """
    slopes = alibi_slopes(n_head).to(device)  # (n_head,)
    return (slopes[:, None, None] * distances(n_queries, n_keys, device))[None]  # (1, n_head, Tq, Tk)


def main(width: int = 128, n_head: int = 8, length: int = 512) -> None:
    """Print how each kind sees a key that lies so many tokens back."""
    table = sinusoidal_table(length, width)  # (length, width)
    alike = F.cosine_similarity(table[-1:], table)  # (length,); the last position beside all others
    buckets = relative_position_bucket(distances(1, length)[0], bidirectional=False)  # (length,)
    bias = alibi_bias(n_head, 1, length)[0, :, 0]  # (n_head, length)
    print(f"{'':>12}{'sine waves':>12}{'T5':>8}{'ALiBi':>24}")
    print(f"{'tokens back':>12}{'cosine':>12}{'bucket':>8}{'head 1':>12}{f'head {n_head}':>12}")
    for back in (0, 1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256):
        key = length - 1 - back
        near, far = bias[0, key], bias[-1, key]
        print(f"{back:>12}{alike[key]:>12.2f}{int(buckets[key]):>8}{near:>12.2f}{far:>12.2f}")


if __name__ == "__main__":
    run_file(main)
