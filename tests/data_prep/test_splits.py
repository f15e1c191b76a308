"""Splits: nothing shared, sizes kept, the same every time."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.normalisation import words_of
from data_prep.splits import Item, Phrases, check_splits, groups_of, hold_out, key, random_splits, without_shared
from workflows.errors import UserError

ITEMS = st.lists(st.frozensets(st.integers(0, 25).map(str), min_size=1, max_size=3), min_size=1, max_size=30).map(
    lambda sets: [Item(keys, ()) for keys in sets]
)


def keys_of(items: list[Item]) -> set[str]:
    return {k for item in items for k in item.keys}


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(0, 12), st.integers(0, 12), st.integers(0, 3))
def test_random_splits_share_nothing_and_lose_nothing(items: list[Item], validation: int, test: int, seed: int):
    splits = random_splits(items, validation, test, seed)
    assert sorted(id(item) for split in splits.values() for item in split) == sorted(map(id, items))
    names = list(splits)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not keys_of(splits[a]) & keys_of(splits[b])
    assert len(splits["validation"]) <= validation and len(splits["test"]) <= test
    assert random_splits(items, validation, test, seed) == splits


@settings(max_examples=60, deadline=None)
@given(ITEMS)
def test_groups_are_the_connected_components(items: list[Item]):
    """Reference: merge sets of keys until no two overlap."""
    components: list[set[str]] = []
    for item in items:
        touching = [c for c in components if c & item.keys]
        components = [c for c in components if not c & item.keys] + [set(item.keys).union(*touching)]
    assert sorted(map(sorted, components)) == sorted(sorted(keys_of(group)) for group in groups_of(items))


def test_hold_out_takes_exactly_the_size_from_single_items():
    items = [Item(frozenset({str(i)}), ()) for i in range(50)]
    held, rest = hold_out(items, 20, seed=1)
    assert len(held) == 20 and len(rest) == 30
    assert held != hold_out(items, 20, seed=2)[0]
    assert [item for item in items if item in rest] == rest  # the order is kept


def test_questions_that_differ_in_a_sign_or_an_emoji_are_different():
    texts = [*(f"0 {sign} 3 = ?" for sign in "+-*/"), *map(chr, range(0x1F600, 0x1F628)), "?!", "...", "कि", "का"]
    items = [Item(frozenset({key("question", text)}), ()) for text in texts]
    assert len(groups_of(items)) == len(texts) == 48
    assert key("question", "What is it?!") == key("question", "what is IT")


def test_a_phrase_is_found_whatever_signs_are_beside_it():
    assert Phrases(["HER2+ cancer"]).found_in("A HER2-cancer, say")
    assert not Phrases(["?!", "🙂"]).found_in("What?! 🙂")


def test_without_shared_counts_what_it_leaves_out():
    items = [Item(frozenset({key("question", text)}), ()) for text in ("What is it?", "Why?")]
    held = [Item(frozenset({key("question", "what IS it")}), ())]
    assert without_shared(items, held) == ([items[1]], 1)


def test_check_splits_refuses_an_empty_split_and_a_shared_key():
    one, two = Item(frozenset({"a"}), ()), Item(frozenset({"a", "b"}), ())
    with pytest.raises(UserError, match=r"the test split is empty.*--test_size"):
        check_splits("x", {"train": [one], "test": []})
    with pytest.raises(ValueError, match="in both train and test"):
        check_splits("x", {"train": [one], "test": [two]})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab -", max_size=11), max_size=4), st.text("ab -.", max_size=14))
def test_phrases_are_found_as_whole_words(phrases: list[str], text: str):
    """Reference: a regular expression for each phrase."""
    wanted = [" ".join(words) for words in map(words_of, phrases) if words]
    expected = any(re.search(rf"(?:^| ){re.escape(p)}(?: |$)", " ".join(words_of(text))) for p in wanted)
    assert Phrases(phrases).found_in(text) == expected
