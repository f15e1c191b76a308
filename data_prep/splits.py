"""Splits that share nothing: whatever has a question, a passage or a term in common stays on one side."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.normalisation import normalise, words_of
from data_prep.rows import Row
from workflows.errors import UserError

_PREFIX = 3  # words by which a phrase is looked up; long phrases rarely share three


@dataclass(frozen=True)
class Item:
    """What a split must not tear apart: the rows made from one question, document or term.

    Attributes:
        keys: What no other split may hold: its question, passage or term, each through `key`.
        rows: Its training rows.
        scoring: Its row for scoring, if it has one.
        pair: Its preference row, if it has one beside its training rows.
        thought: Its row with an answer that thinks first, likewise.
        question: Its row whose answer is verified, likewise.
    """

    keys: frozenset[str]
    rows: tuple[Row, ...]
    scoring: Row | None = None
    pair: Row | None = None
    thought: Row | None = None
    question: Row | None = None


def key(what: str, text: str) -> str:
    """A key of an `Item`: texts of the same sort (`what`) that differ only in case or punctuation are the same.

    A text of punctuation alone is compared as it is.
    """
    return f"{what}:{normalise(text) or ' '.join(text.split())}"


def conversation_key(messages: list[Row], tools: list[Row] | None = None) -> str:
    """A key of what a model is asked: every message that it is shown, the system's included, and the tools.

    Args:
        messages: Those before the answer.
        tools: What it may call.
    """
    asked = "\n".join(message["content"] for message in messages)
    return key("question", asked + ("\n" + json.dumps(tools, sort_keys=True) if tools else ""))


def groups_of(items: list[Item]) -> list[list[Item]]:
    """Items connected by shared keys, as groups, in order of their first item (union-find over the keys)."""
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[str, int] = {}
    for i, item in enumerate(items):
        for k in item.keys:
            a, b = root(first_with.setdefault(k, i)), root(i)
            parent[max(a, b)] = min(a, b)
    groups: dict[int, list[Item]] = {}
    for i, item in enumerate(items):
        groups.setdefault(root(i), []).append(item)
    return list(groups.values())


def hold_out(items: list[Item], size: int, seed: int) -> tuple[list[Item], list[Item]]:
    """Take whole groups at random until `size` items are held out.

    A group that would overshoot is passed over, so the result has at most `size` items, and exactly `size` as soon as
    there are enough single ones.

    Args:
        items: What to choose from; their order and `seed` decide the result.
        size: The number of items to hold out.
        seed: Seed of the choice.

    Returns:
        The items held out, in random order, and the rest in the order given.
    """
    groups = groups_of(items)
    order = random.Random(seed).sample(range(len(groups)), len(groups))
    chosen: set[int] = set()
    held: list[Item] = []
    for i in order:
        if len(held) + len(groups[i]) <= size:
            chosen.add(i)
            held += groups[i]
    taken = {id(item) for item in held}
    return held, [item for item in items if id(item) not in taken]


def random_splits(items: list[Item], validation_size: int, test_size: int, seed: int) -> dict[str, list[Item]]:
    """Split items at random into train, validation and test, groups kept whole."""
    test, rest = hold_out(items, test_size, seed)
    validation, train = hold_out(rest, validation_size, seed + 1)
    return {"train": train, "validation": validation, "test": test}


def without_shared(items: list[Item], *held_out: Iterable[Item]) -> tuple[list[Item], int]:
    """Leave out the items that share a key with held-out ones.

    Returns:
        The items left and the number of those left out.
    """
    taken = {k for side in held_out for item in side for k in item.keys}
    kept = [item for item in items if not item.keys & taken]
    return kept, len(items) - len(kept)


def check_splits(name: str, splits: dict[str, list[Item]]) -> None:
    """Make sure that no split is empty and no two splits share a key.

    Raises:
        UserError: If a split is empty; with the options that fix it.
        ValueError: If splits share a key, which is a mistake of the preparing code.
    """
    for split, items in splits.items():
        if not items:
            everything = [item for found in splits.values() for item in found]
            total, groups = len(everything), len(groups_of(everything))
            apart = "" if groups == total else f", {groups} groups that have something in common and stay together"
            fix = ", or choose the sizes with --validation_size and --test_size so that every split gets at least one"
            if groups < min(total, len(splits)):
                fix = ": rows with a question, document or term in common stay in one split, whatever its size"
            raise UserError(
                f"{name}: the {split} split is empty ({total} usable items in all{apart}). Give more data{fix}."
            )
    owner: dict[str, str] = {}
    for split, items in splits.items():
        for k in {k for item in items for k in item.keys}:
            if owner.setdefault(k, split) != split:
                raise ValueError(f"{name}: {k!r} is in both {owner[k]} and {split}")


class Phrases:
    """A set of phrases that can be looked for in text, as whole words, without case, signs and punctuation."""

    def __init__(self, phrases: Iterable[str]) -> None:
        self._phrases = {" ".join(words) for words in map(words_of, phrases) if words}
        self._lengths: dict[str, set[int]] = {}  # first words, up to _PREFIX -> lengths of the phrases that begin so
        for phrase in self._phrases:
            words = phrase.split()
            self._lengths.setdefault(" ".join(words[:_PREFIX]), set()).add(len(words))

    def found_in(self, text: str) -> bool:
        """Whether any of the phrases occurs in the text."""
        words = words_of(text)
        return any(
            " ".join(words[i : i + length]) in self._phrases
            for i in range(len(words))
            for size in range(1, _PREFIX + 1)
            for length in self._lengths.get(" ".join(words[i : i + size]), ())
        )
