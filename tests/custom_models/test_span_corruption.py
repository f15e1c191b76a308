"""Span corruption: nothing is lost, the rates are T5's, and what cannot be corrupted is refused."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_models.span_corruption import corrupt, main, sentinel
from workflows.errors import UserError

SENTINELS, END = [-1 - i for i in range(100)], 0


def restored(source: list[int], target: list[int]) -> list[int]:
    """The text, with what the target says put in the gaps."""
    spans: dict[int, list[int]] = {}
    for i in target[:-1]:
        if i < 0:
            spans[i] = []
        else:
            spans[list(spans)[-1]].append(i)
    return [token for i in source[:-1] for token in spans.get(i, [i])]


@given(st.integers(2, 300), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_source_and_target_together_are_the_text(length, seed):
    ids = list(range(1, length + 1))
    source, target = corrupt(ids, SENTINELS, END, random.Random(seed))
    assert source[-1] == target[-1] == END
    assert restored(source, target) == ids
    marks = [i for i in source if i < 0]
    assert marks == [i for i in target if i < 0] == SENTINELS[: len(marks)]
    lost = len(target) - 1 - len(marks)
    assert lost == max(round(0.15 * length), 1)
    assert len(marks) == max(round(lost / 3), 1) and source[0] == 1  # a kept span comes first


def test_every_place_but_the_first_may_be_lost():
    ids, chance = list(range(1, 41)), random.Random(0)
    lost = {i for _ in range(400) for i in corrupt(ids, SENTINELS, END, chance).target if i > 0}
    assert lost == set(ids[1:])


def test_what_cannot_be_corrupted_is_refused():
    for ids, message in (([1], "one token"), (list(range(1, 4000)), "Cut texts to 2000 tokens")):
        with pytest.raises(UserError, match=message):
            corrupt(ids, SENTINELS, END, random.Random(0))
    for share, mean_span in ((0.0, 3.0), (1.0, 3.0), (0.15, 0.5)):
        with pytest.raises(UserError, match="between 0 and 1"):
            corrupt([1, 2, 3], SENTINELS, END, random.Random(0), share, mean_span)


def test_its_command_shows_sources_and_targets(capsys):
    main(text="one two three four five six seven eight", seed=3)
    shown = capsys.readouterr().out
    assert shown.count("source") == shown.count("target") == 4 and sentinel(0) in shown and "<end>" in shown
