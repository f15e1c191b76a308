"""Packing: every token sees what it would see alone, rows are full, and nothing is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows.training.batch import Tree, assign_rows, pack, pack_row, shared_prefix_length

IDS = st.lists(st.integers(0, 9), min_size=1, max_size=6)
TREES = st.lists(st.builds(lambda p, c: Tree(p, c), IDS, st.lists(IDS, min_size=1, max_size=3)), min_size=1, max_size=5)


def seen_by(batch, index):
    """The (token, position) pairs that a token sees, in order of position."""
    mask = batch.attention_mask()
    columns = range(index + 1) if mask is None else mask[0, 0, index].nonzero()[:, 0].tolist()
    return [(int(batch.input_ids[0, j]), int(batch.positions[0, j])) for j in columns]


@given(TREES)
@settings(max_examples=200, deadline=None)
def test_each_learned_token_is_predicted_from_exactly_its_own_past(trees):
    batch = pack_row(trees)
    expected = [
        (tree.prompt + completion[:offset], token)
        for tree in trees
        for completion in tree.completions
        for offset, token in enumerate(completion)
    ]
    assert batch.targets.tolist() == [token for _, token in expected]
    for (past, _), predictor in zip(expected, batch.predictors.tolist(), strict=True):
        assert seen_by(batch, predictor) == [(token, position) for position, token in enumerate(past)]


@given(TREES)
@settings(max_examples=50, deadline=None)
def test_owners_number_completions_in_order(trees):
    batch = pack_row(trees)
    lengths = [len(completion) for tree in trees for completion in tree.completions]
    assert batch.completions == len(lengths)
    assert torch.bincount(batch.owners, minlength=len(lengths)).tolist() == lengths


def test_shared_system_prompt_is_held_once():
    system = list(range(100, 130))
    batch = pack_row([Tree([*system, 1, 2], [[3, 4]]), Tree([*system, 5], [[6, 7]]), Tree([*system, 8, 9], [[6]])])
    assert batch.input_ids.size(1) == 30 + 2 + 1 + 1 + 1 + 2
    assert batch.real_tokens == 34 + 33 + 33


def test_prompt_is_held_once_for_all_its_completions():
    batch = pack_row([Tree([1, 2, 3], [[4, 5], [6, 7, 8], [9]])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6, 7]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 3, 4]]
    assert batch.predictors.tolist() == [2, 3, 2, 4, 5, 2]


def test_one_sample_needs_no_mask():
    assert pack_row([Tree([1, 2], [[3, 4, 5]])]).attention_mask() is None
    assert pack_row([Tree([1, 2], [[3, 4], [5, 6]])]).attention_mask() is not None


def test_loss_mask_keeps_context_in_a_completion_unlearned():
    batch = pack_row([Tree([1], [[2, 3, 4]], [[True, False, True]])])
    assert batch.targets.tolist() == [2, 4]
    assert batch.predictors.tolist() == [0, 2]
    assert batch.input_ids.tolist() == [[1, 2, 3]]


def test_identical_prompts_keep_a_token_each():
    assert shared_prefix_length([[1, 2, 3], [1, 2, 3]]) == 2
    assert shared_prefix_length([[1, 2, 3]]) == 0
    assert shared_prefix_length([[1], [1, 2]]) == 0
    assert shared_prefix_length([[5, 1], [2, 1]]) == 0


def test_a_row_is_filled_up_by_tokens_that_nothing_learned_sees():
    trees = [Tree([1, 2, 3], [[4, 5], [6, 7, 8]]), Tree([1, 2, 9], [[4, 5]])]
    bare, filled = pack_row(trees), pack_row(trees, 5)
    tokens = bare.input_ids.size(1)
    assert tokens == 8 and filled.input_ids.size(1) == 10
    assert filled.spans[-1].tolist() == [int(bare.spans[-1, 0]), 10]
    for name in ("predictors", "targets", "owners"):
        assert torch.equal(getattr(filled, name), getattr(bare, name))
    assert filled.real_tokens == bare.real_tokens
    mask = filled.attention_mask()[0, 0]
    assert torch.equal(mask[:tokens, :tokens], bare.attention_mask()[0, 0]) and not mask[:tokens, tokens:].any()
    assert mask[tokens:].any(dim=1).all()  # a token that sees nothing would be no number


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 50))
def test_rows_hold_every_tree_once_within_capacity(lengths, capacity):
    rows = assign_rows(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows if len(row) > 1)


def test_pack_gives_the_rows_trees():
    trees = [Tree([1, 2], [[3] * n]) for n in (5, 9, 2, 7)]
    for indices, batch in pack(trees, 12):
        assert batch.completions == len(indices)
        assert batch.real_tokens == sum(trees[i].real_tokens for i in indices)


def test_empty_parts_are_refused():
    with pytest.raises(ValueError, match="prompt"):
        Tree([], [[1]])
    with pytest.raises(ValueError, match="completion"):
        Tree([1], [[2], []])
    with pytest.raises(ValueError, match="completion"):
        Tree([1], [])
