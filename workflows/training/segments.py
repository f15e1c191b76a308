"""Attention over a packed row on a GPU: FlashAttention over segments, of which each sees a list of keys.

A segment is a stretch of the row that goes on along one path of its forest: a prompt and its first completion, or a
further completion alone. Its keys are the tokens of the nodes above it and its own, in that order, so "causal, aligned
at the end" is all the mask there is, and a kernel for sequences of different lengths (Dao 2023, arXiv 2307.08691) skips
what no token sees. A mask of the whole row would have it computed, and forbids that kernel. Tokens that several
segments see (a prompt's, below several completions) are copied for each; key heads are not repeated for query heads.
"""

from typing import Any

import torch

from workflows.training.attention import rotate
from workflows.training.batch import PackedBatch

DTYPES = (torch.float16, torch.bfloat16)
"""What the kernel computes in."""
LARGEST_HEAD = 192
"""Beyond it, not every GPU has the kernel's backward pass."""


class SegmentAttention:
    """How the tokens of one packed row see each other, as segments; U keys in all.

    Attributes:
        keys: The token that stands at each place of the segments' keys, (U,); None where that is the row itself.
        query_ends: Where each segment's queries begin, and the last one's end, int32, (segments + 1,).
        key_ends: The same of their keys.
        longest: Most queries, and most keys, of a segment.
    """

    def __init__(self, batch: PackedBatch) -> None:
        """Cut a row.

        Args:
            batch: The row, on any device.
        """
        visible = batch.visible[0]  # (M, M)
        nodes = len(visible)
        # A node goes on with the one before it if it sees just what that one sees, and itself.
        goes_on = (visible[1:] == visible[:-1] | torch.eye(nodes, dtype=torch.bool, device=visible.device)[1:]).all(1)
        last = torch.cat([~goes_on, goes_on.new_ones(1)])  # of its segment, (M,)
        segment = (last.cumsum(0) - last.long())[batch.nodes[0]]  # of each token, (T,)
        sees = visible[last][:, batch.nodes[0]]  # (segments, T)
        seen = sees.nonzero()[:, 1]  # (U,)
        counts = torch.stack([segment.bincount(minlength=len(sees)), sees.sum(1)])  # (2, segments)
        ends = torch.nn.functional.pad(counts.cumsum(1), (1, 0)).int()
        self.query_ends, self.key_ends = ends[0].contiguous(), ends[1].contiguous()
        self.longest: list[int] = counts.amax(1).tolist()
        self.keys = None if len(seen) == len(segment) else seen

    @staticmethod
    def computes(dtype: torch.dtype, head_size: int) -> bool:
        """Whether the kernel computes in this type, with heads of this size."""
        return dtype in DTYPES and head_size % 8 == 0 and head_size <= LARGEST_HEAD

    @staticmethod
    def works_on(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
        """Whether torch has the kernel for this device, type and size of a head."""
        if device.type != "cuda" or not SegmentAttention.computes(dtype, head_size):
            return False
        return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)

    def __call__(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_head: int, n_query_groups: int, scale: float
    ) -> torch.Tensor:
        """Rotate query and key, and attend. Arguments and result are those of `RowAttention`."""
        heads = qkv[0].unflatten(1, (n_head + 2 * n_query_groups, -1))  # (T, heads, size)
        turned, v = heads.split([n_head + n_query_groups, n_query_groups], dim=1)
        q, k = _Rotated.apply(turned, cos[0, :, None], sin[0, :, None]).split([n_head, n_query_groups], dim=1)
        # values of their own, so that qkv need not be kept for the backward pass
        v = v.contiguous() if self.keys is None else _Copied.apply(v, self.keys)  # (U, n_query_groups, size)
        k = k if self.keys is None else _Copied.apply(k, self.keys)  # (U, n_query_groups, size)
        y = flash(q, k, v, self.query_ends, self.key_ends, self.longest, scale)  # (T, n_head, size)
        return y.flatten(1)[None]


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest: list[int],
    scale: float,
) -> torch.Tensor:
    """FlashAttention of segments; of a segment the last query sees all keys, the one before it all but the last, ….

    Args:
        q: Shape (T, query heads, size).
        k: Shape (U, key heads, size).
        v: Likewise.
        query_ends: As in `SegmentAttention`.
        key_ends: Likewise.
        longest: Likewise.
        scale: What the products of query and key are multiplied by.

    Returns:
        Shape (T, query heads, size).
    """
    kernel = torch.ops.aten._flash_attention_forward
    return kernel(q, k, v, query_ends, key_ends, *longest, 0.0, True, False, scale=scale)[0]


class _Rotated(torch.autograd.Function):
    """Query and key heads rotated by their positions; x: (T, heads, size), cos and sin: (T, 1, size)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, -sin), None, None


class _Copied(torch.autograd.Function):
    """x[index]; gradients of one row's copies are added up in float32, since a prompt may have a hundred of them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        total = grads[0].new_zeros(ctx.rows, *grads[0].shape[1:], dtype=torch.float32)
        return total.index_add_(0, ctx.saved_tensors[0], grads[0].float()).to(grads[0].dtype), None
