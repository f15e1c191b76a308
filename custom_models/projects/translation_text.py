"""Texts to translate as token ids, and back; what a program fills in is carried over and not translated.

The placeholders of a source (%(name)s, {name}) become marks, <0>, <1> and so on, in their order, and in its target the
same ones become the same marks. So the model sees where something stands and not what it is called, and a beam may end
only when it has written each mark of its source once: placeholders are kept by construction.
"""

import random
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from custom_models.beam_search import Allowed
from custom_models.projects.vocabulary import END, PAD, learn_vocabulary
from custom_models.tokenization.merge_dropout import MergeDropout
from data_prep.translations import PLACEHOLDER
from workflows.errors import UserError

MEMORY = "<memory>"
"""What stands between a source and what a memory has found for it."""
MARKS = [f"<{i}>" for i in range(10)]
"""Of the placeholders in a text; further ones stay as they are."""
_CARRIED = re.compile(f"{PLACEHOLDER.pattern}|{'|'.join(MARKS)}")
"""What a mark takes the place of: a placeholder, or a text that only looks like a mark."""


class Marked(NamedTuple):
    """A text with marks in the places of its placeholders.

    Attributes:
        text: The text.
        values: What the marks stand for, in their order.
    """

    text: str
    values: list[str]


def mark(text: str) -> Marked:
    """Put marks into the places of a source's placeholders."""
    values = _CARRIED.findall(text)[: len(MARKS)]
    marks = iter(MARKS)
    return Marked(_CARRIED.sub(lambda found: next(marks, found[0]), text), values)


def mark_as(text: str, values: Sequence[str]) -> str:
    """Put into the places of a target's placeholders the marks that they have in its source; others stay."""
    left = list(enumerate(values))

    def marked(found: re.Match[str]) -> str:
        number = next((i for i, (_, value) in enumerate(left) if value == found[0]), None)
        return found[0] if number is None else MARKS[left.pop(number)[0]]

    return _CARRIED.sub(marked, text)


def unmark(text: str, values: Sequence[str]) -> str:
    """Put what the marks stand for back into their places."""
    left = dict(zip(MARKS, values, strict=False))  # each once: a further <0> is what it looks like
    return re.sub("|".join(MARKS), lambda found: left.pop(found[0], found[0]), text)


class Codec:
    """Texts as ids of one vocabulary for both languages, and back.

    Args:
        tokenizer: From `learn`.
        placeholders: Whether placeholders are carried over by marks; programs have none.
        longest: The most tokens of a text, its end included.
        multiline: Whether a text may have several lines, as a program has.
    """

    def __init__(self, tokenizer: Tokenizer, placeholders: bool, longest: int, multiline: bool) -> None:
        self.tokenizer, self.placeholders, self.longest, self.multiline = tokenizer, placeholders, longest, multiline
        self.pad_id, self.end_id = tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)
        self.memory_id = tokenizer.token_to_id(MEMORY)
        self.mark_ids = [tokenizer.token_to_id(name) for name in MARKS] if placeholders else []
        self._id_of: dict[str, int] = tokenizer.get_vocab()
        special = {self.end_id, self.pad_id, self.memory_id, *self.mark_ids}
        self._words = [i for i in self._id_of.values() if i not in special]
        self._merge_dropout = MergeDropout(tokenizer)

    @classmethod
    def learn(cls, pairs: Iterable[tuple[str, str]], vocab_size: int, placeholders: bool, longest: int) -> "Codec":
        """A codec with a vocabulary of its own, learned from sources and targets together.

        Raises:
            UserError: See `learn_vocabulary`.
        """
        texts = [f" {mark(text).text if placeholders else text}" for pair in pairs for text in pair]
        special = [PAD, END, MEMORY, *(MARKS if placeholders else [])]
        multiline = any("\n" in text for text in texts)
        return cls(learn_vocabulary(texts, vocab_size, special, as_written=True), placeholders, longest, multiline)

    def ids_of(self, text: str, left_out: float = 0.0, chance: random.Random | None = None) -> list[int]:
        """A text's tokens, and the end.

        Args:
            text: The text.
            left_out: Share of merges that are left out at random (`MergeDropout`).
            chance: Decides which.
        """
        text = f" {text}"  # so that its first word is the one that it is elsewhere
        if chance is None or not left_out:
            return [*self.tokenizer.encode(text).ids, self.end_id]
        ids: list[int] = []
        for part in re.split(f"({'|'.join(MARKS)})", text) if self.placeholders else [text]:
            if part in MARKS and self.placeholders:
                ids.append(self._id_of[part])
            else:
                ids += self._merge_dropout.ids_of(part, left_out, chance)
        return [*ids, self.end_id]

    def size(self, text: str) -> int:
        """How many tokens a text has as it is learned from, its end included."""
        return len(self.ids_of(mark(text).text if self.placeholders else text))

    def source(
        self, text: str, found: str | None = None, left_out: float = 0.0, chance: random.Random | None = None
    ) -> tuple[list[int], list[str], bool]:
        """A text to read; `left_out` and `chance` as for `ids_of`.

        Args:
            text: The text.
            found: What a memory has found for it, with marks; it is read as far as there is room.
            left_out: See `ids_of`.
            chance: See there.

        Returns:
            Its tokens; the placeholders that its marks stand for; whether it was too long and lost its end.

        Raises:
            UserError: If it is empty.
        """
        if not text.strip():
            raise UserError("There is nothing to translate in an empty text.")
        text, values = mark(text) if self.placeholders else Marked(text, [])
        ids = self.ids_of(text, left_out, chance)
        cut = len(ids) > self.longest
        if cut:
            ids = [*ids[: self.longest - 1], self.end_id]
        if found is not None:
            ids = [*ids[:-1], self.memory_id, *self.ids_of(found, left_out, chance)[: self.longest]]
        return ids, values, cut

    def target(
        self, text: str, values: Sequence[str], left_out: float = 0.0, chance: random.Random | None = None
    ) -> list[int]:
        """Tokens of the translation of a source with these placeholders, and the end."""
        return self.ids_of(mark_as(text, values), left_out, chance)

    def text(self, ids: Sequence[int], values: Sequence[str]) -> str:
        """What was written, with its placeholders."""
        kept = [i for i in ids if i not in (self.end_id, self.pad_id)]
        return unmark(self.tokenizer.decode(kept, skip_special_tokens=False), values).strip()

    def allowed(self, values: Sequence[Sequence[str]]) -> Allowed:
        """What may be written for each of several sources, by its placeholders: each mark once, and then the end."""
        marks = [set(self.mark_ids[: len(found)]) for found in values]

        def may_follow(number: int, written: list[int]) -> list[int]:
            left = marks[number] - set(written)
            return [*self._words, *(left or {self.end_id})]

        return may_follow
