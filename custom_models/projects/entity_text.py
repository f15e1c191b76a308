"""Entities as text: "Chemical: aspirin ; Disease: gastric ulcer", and back to exactly the words of the sentence.

The list has the sentence's order. A mention means its first occurrence behind the mention before it; if it is the
second one, "@2" follows, and so on. Words of a mention that look like a part of the list have a slash before them (T5
knows slashes, and no backslashes). So the way back is exact, and `entities_in` and `Grammar` rest on the same rules:

    list     = nothing, or entry (" ; " entry)*
    entry    = type ":" (" " word)+ [" @" number]
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from data_prep.iob import Entity

SEPARATOR = ";"
_STRUCTURE = re.compile(r"/*(?:;|@\d+)")
_ORDINAL = re.compile(r"@(\d+)")


def escaped(word: str, seen: str) -> str:
    """A mention's word as it stands in the list; `seen`, what is left of it there, may look like a part of the list."""
    return f"/{word}" if _STRUCTURE.fullmatch(seen) else word


def unescaped(word: str) -> str:
    """The way back of `escaped`."""
    return word[1:] if word.startswith("/") and _STRUCTURE.fullmatch(word) else word


def occurrences(mention: Sequence[str], words: Sequence[str], begin: int) -> list[int]:
    """Where a mention begins in a sentence, from the word `begin` on."""
    n, first = len(mention), mention[0]
    return [
        i for i in range(begin, len(words) - n + 1) if words[i] == first and list(words[i : i + n]) == list(mention)
    ]


def list_of(words: Sequence[str], entities: Sequence[Entity], seen: Callable[[str], str] = str.casefold) -> list[str]:
    """The list of a sentence's entities, word by word.

    Args:
        words: The sentence.
        entities: In order, without overlap.
        seen: What is left of a word when a model writes it, case-folded: words that are alike then are the same.
    """
    alike = [seen(word) for word in words]
    found: list[str] = []
    cursor = 0
    for entity in entities:
        number = occurrences(alike[entity.start : entity.end], alike, cursor).index(entity.start) + 1
        found += [SEPARATOR] if found else []
        found += [f"{entity.type}:", *map(escaped, words[entity.start : entity.end], alike[entity.start : entity.end])]
        found += [f"@{number}"] if number > 1 else []
        cursor = entity.end
    return found


def entities_in(
    text: str, words: Sequence[str], types: Sequence[str], seen: Callable[[str], str] = str.casefold
) -> tuple[list[Entity], int]:
    """The way back: a list that a model wrote, as the entities of the sentence.

    Args:
        text: The list.
        words: The sentence.
        types: The types there are.
        seen: See `list_of`.

    Returns:
        The entities, and how many entries are none: of no known type, of a mention that the sentence does not have (any
        more), or without one.
    """
    alike, names = [seen(word) for word in words], {f"{kind}:".casefold(): kind for kind in types}
    entries: list[list[str]] = [[]]
    for word in text.split():
        if word == SEPARATOR:
            entries.append([])
        else:
            entries[-1].append(word)
    found: list[Entity] = []
    malformed = cursor = 0
    for entry in entries if text.split() else []:
        kind = names.get(entry[0].casefold()) if entry else None
        mention, number = entry[1:], 1
        if mention and (match := _ORDINAL.fullmatch(mention[-1])):
            mention, number = mention[:-1], int(match[1])
        places = occurrences([unescaped(word).casefold() for word in mention], alike, cursor) if mention else []
        if kind is None or not 1 <= number <= len(places):
            malformed += 1
            continue
        cursor = places[number - 1] + len(mention)
        found.append(Entity(kind, places[number - 1], cursor))
    return found, malformed


Chunk = tuple[tuple[int, ...], str, tuple[int, ...]]
"""Ids that are still to be written, and what they belong to."""


class Grammar:
    """Which ids may come next, so that a model can write nothing but a list of the sentence's own words.

    A state is the chunks that may be going on: `allowed` of `beam_search` follows them id by id.

    Args:
        words: The sentence.
        types: The types there are.
        ids_of: A word's ids, as the model writes it after a space.
        end_id: What ends the list.
        seen: See `list_of`.
    """

    def __init__(
        self,
        words: Sequence[str],
        types: Sequence[str],
        ids_of: Callable[[str], Sequence[int]],
        end_id: int,
        seen: Callable[[str], str] = str.casefold,
    ) -> None:
        self.alike = [seen(word) for word in words]
        self.words = [tuple(ids_of(escaped(word, seen))) for word, seen in zip(words, self.alike, strict=True)]
        self.types = [tuple(ids_of(f"{kind}:")) for kind in types]
        self.separator, self.end = tuple(ids_of(SEPARATOR)), (end_id,)
        self.ordinal = lru_cache(maxsize=None)(lambda number: tuple(ids_of(f"@{number}")))
        # of each beginning of a list the chunks that may be going on
        self.states: dict[tuple[int, ...], list[Chunk]] = {(): self._after("begin", (0,))}

    def allowed(self, ids: Sequence[int]) -> list[int]:
        """The ids that may follow those that are written."""
        return list({rest[0] for rest, _, _ in self._state(tuple(ids))})

    def _state(self, ids: tuple[int, ...]) -> list[Chunk]:
        if ids not in self.states:
            after: list[Chunk] = []
            for rest, part, data in self._state(ids[:-1]):
                if rest[0] == ids[-1]:
                    after += [(rest[1:], part, data)] if rest[1:] else self._after(part, data)
            self.states[ids] = after
        return self.states[ids]

    def _after(self, part: str, data: tuple[int, ...]) -> list[Chunk]:
        """The chunks that may follow a part of the list, once it is written."""
        chunks: list[Chunk] = []
        if part == "begin":  # (0,)
            chunks = [(self.end, "end", ())]
            chunks += [(ids, "type", data) for ids in self.types] if self.words else []
        elif part == "separator":  # (cursor,)
            chunks = [(ids, "type", data) for ids in self.types]
        elif part == "type":  # (cursor,)
            chunks = [(self.words[i], "mention", (*data, i, i + 1)) for i in range(data[0], len(self.words))]
        elif part == "mention":  # (cursor, start, end)
            cursor, start, end = data
            if end < len(self.words):
                chunks = [(self.words[end], "mention", (cursor, start, end + 1))]
            number = occurrences(self.alike[start:end], self.alike, cursor).index(start) + 1
            chunks += [(self.ordinal(number), "ordinal", (end,))] if number > 1 else self._after("ordinal", (end,))
        elif part == "ordinal":  # (cursor,)
            chunks = [(self.end, "end", ())]
            chunks += [(self.separator, "separator", data)] if data[0] < len(self.words) else []
        # A word that a tokenizer makes nothing of is written as soon as it begins.
        return [c for chunk in chunks for c in ([chunk] if chunk[0] else self._after(chunk[1], chunk[2]))]
