"""Attention by pieces, and by segments, equals masked attention over the whole row: values and gradients, whatever the
row's shape. What the segments' kernel does on a GPU is done segment by segment (the kernel: tests/test_gpu.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows.training import attention, segments
from workflows.training.attention import RowAttention
from workflows.training.batch import PackedBatch, Tree, pack_row
from workflows.training.segments import SegmentAttention

HEADS, GROUPS, SIZE = 6, 2, 8


def row_of(system: int, trees: list[tuple[int, list[int]]], multiple: int = 1) -> PackedBatch:
    packed = [Tree([1] * system + [i + 2] * p, [[9] * c for c in cs]) for i, (p, cs) in enumerate(trees)]
    return pack_row(packed, multiple)


def inputs_of(batch: PackedBatch, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens = batch.input_ids.size(1)
    qkv = torch.randn(1, tokens, (HEADS + 2 * GROUPS) * SIZE, generator=g).to(dtype)
    angles = batch.positions[..., None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)  # (1, T, size)
    weight = torch.randn(1, tokens, HEADS * SIZE, generator=g)
    return qkv, angles.cos().to(dtype), angles.sin().to(dtype), weight


def plain(batch: PackedBatch, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float) -> torch.Tensor:
    """Rotate, repeat keys and values for their query heads, mask the whole row."""
    q, k, v = qkv.unflatten(-1, (-1, SIZE)).transpose(1, 2).split([HEADS, GROUPS, GROUPS], dim=1)  # (1, heads, T, size)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (rotate(k), v))
    scores = rotate(q) @ k.mT * scale  # (1, heads, T, T)
    mask = batch.attention_mask()
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    y = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2)


def one_by_one(q, k, v, query_ends, key_ends, longest, scale) -> torch.Tensor:
    """What `segments.flash` says of itself, written out."""
    found = []
    for number in range(len(query_ends) - 1):
        asks = q[query_ends[number] : query_ends[number + 1]].transpose(0, 1)  # (heads, L, size)
        seen = slice(key_ends[number], key_ends[number + 1])
        keys, values = (x[seen].transpose(0, 1).repeat_interleave(HEADS // GROUPS, dim=0) for x in (k, v))
        scores = asks @ keys.mT * scale  # (heads, L, K)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(keys.size(1) - asks.size(1) + 1)
        assert asks.size(1) <= longest[0] and keys.size(1) <= longest[1]
        found.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(found)


def largest_difference(batch: PackedBatch, dtype: torch.dtype = torch.float32, attend: type = RowAttention) -> float:
    """Of values and gradients from the plain ones in float64, each relative to its largest entry."""
    qkv, cos, sin, weight = inputs_of(batch, dtype)
    mine = qkv.clone().requires_grad_()
    exact = qkv.double().requires_grad_()
    y = attend(batch)(mine, cos, sin, HEADS, GROUPS, 0.3)
    expected = plain(batch, exact, cos.double(), sin.double(), 0.3)
    (gradient,) = torch.autograd.grad(y, mine, weight.to(dtype))
    (reference,) = torch.autograd.grad(expected, exact, weight.double())
    differences = [
        (a.double() - b).abs().max() / b.abs().max()
        for a, b in ((y.detach(), expected.detach()), (gradient, reference))
    ]
    return float(max(differences))


ROWS = {
    "one short sample": (0, [(4, [5])]),
    "one long sample": (0, [(100, [300])]),
    "short samples": (0, [(5, [3]), (2, [6]), (7, [1]), (4, [5])]),
    "short samples with a system message": (9, [(5, [3]), (2, [6]), (7, [1]), (4, [5])]),
    "groups of completions": (9, [(5, [3, 4, 2]), (2, [6, 6])]),
    "long and short": (20, [(150, [200]), (5, [3]), (60, [90, 90, 90]), (7, [1])]),
    "a long system message": (300, [(5, [3]), (2, [6])]),
    "one-token completions, as of multiple choice": (3, [(6, [1, 1, 1, 1]), (5, [1, 1, 1, 1])]),
}


@pytest.mark.parametrize("name", ROWS)
def test_pieces_equal_the_masked_row(name):
    assert largest_difference(row_of(*ROWS[name])) < 1e-5


@pytest.mark.parametrize("name", ROWS)
def test_segments_equal_the_masked_row(name, monkeypatch):
    monkeypatch.setattr(segments, "flash", one_by_one)
    assert largest_difference(row_of(*ROWS[name]), attend=SegmentAttention) < 1e-5


def test_a_prompt_and_its_first_completion_are_one_segment():
    alone = SegmentAttention(row_of(*ROWS["short samples"]))
    assert alone.keys is None and alone.longest == [8, 8] and alone.query_ends.tolist() == alone.key_ends.tolist()
    groups = SegmentAttention(row_of(9, [(5, [3, 4, 2]), (2, [6, 6])]))
    assert groups.query_ends.diff().tolist() == [
        9 + 5 + 2,
        3,
        1,
        2 + 5,
        5,
    ]  # what all share, and the first tree with it
    assert groups.key_ends.diff().tolist() == [16, 14 + 3, 14 + 1, 9 + 7, 11 + 5]


@pytest.mark.parametrize("name", ["one long sample", "long and short"])
def test_pieces_in_bfloat16_are_as_near_as_its_rounding_allows(name):
    assert largest_difference(row_of(*ROWS[name]), torch.bfloat16) < 0.03


@pytest.mark.parametrize("name", ["one long sample", "long and short", "groups of completions"])
def test_weights_computed_again_give_the_same_gradients(name, monkeypatch):
    batch = row_of(*ROWS[name])
    gradients = []
    for limit in (2**30, 0):
        monkeypatch.setattr(attention, "KEPT_PAIRS", limit)
        qkv, cos, sin, weight = inputs_of(batch, torch.float32)
        row = RowAttention(batch)
        assert row.kept == (limit > 0)
        qkv.requires_grad_()
        (row(qkv, cos, sin, HEADS, GROUPS, 0.3) * weight).sum().backward()
        gradients.append(qkv.grad)
    assert torch.equal(*gradients)


tree = st.tuples(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=4))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40), st.lists(tree, min_size=1, max_size=6), st.sampled_from([8, 32, 128]), st.sampled_from([1, 32])
)
def test_any_row_any_stretch(system, trees, stretch, multiple):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "STRETCH", stretch)
        batch = row_of(system, trees, multiple)
        patch.setattr(segments, "flash", one_by_one)
        assert largest_difference(batch) < 1e-5
        assert largest_difference(batch, attend=SegmentAttention) < 1e-5
        asked = torch.cat([piece.queries[piece.asks] for piece in RowAttention(batch).pieces])
        assert torch.equal(asked.sort().values, torch.arange(batch.input_ids.size(1)))  # each token asks once


def test_most_pairs_of_a_long_or_packed_row_are_left_out():
    for name, share in (("one long sample", 0.7), ("long and short", 0.4)):
        batch = row_of(*ROWS[name])
        pairs = sum(piece.hidden.numel() for piece in RowAttention(batch).pieces)
        assert pairs < share * batch.input_ids.size(1) ** 2
