"""Byte-pair encoding as textbooks write it, minbpe's algorithm: what the fast one must equal, here and in the bench."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

Pair = tuple[int, int]


def textbook_merges(words: Iterable[bytes], merges: int) -> list[Pair]:
    """Learn merges: count all pairs of all words, merge the most frequent pair everywhere, begin again.

    Of equally frequent pairs `max` takes the one that came into the dict first: the first in the text.

    Args:
        words: The text's words as often as they occur, in its order; for plain bytes one word, the text.
        merges: How many to learn; fewer are if there is no pair left.
    """
    texts = [list(word) for word in words]
    learned: list[Pair] = []
    while len(learned) < merges:
        counts: dict[Pair, int] = {}
        for ids in texts:
            for pair in pairwise(ids):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = max(counts, key=counts.__getitem__)
        texts = [replaced(ids, best, 256 + len(learned)) for ids in texts]
        learned.append(best)
    return learned


def replaced(ids: Sequence[int], pair: Pair, token: int) -> list[int]:
    """Put `token` for each occurrence of a pair, from the left."""
    result, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            result.append(token)
            i += 2
        else:
            result.append(ids[i])
            i += 1
    return result


def textbook_ids(word: bytes, merges: Mapping[Pair, int]) -> list[int]:
    """Encode a word: again and again merge the pair that was learned first."""
    ids = list(word)
    while pairs := {pair for pair in pairwise(ids) if pair in merges}:
        first = min(pairs, key=merges.__getitem__)
        ids = replaced(ids, first, merges[first])
    return ids
