"""The smallest tokenizer: each character of a text has an id.

The vocabulary is short, the sequences are long, and a character that the vocabulary's text did not have has no id.
Byte-pair encoding (`bpe.py`) cures the last two.

    python -m custom_models.tokenization.characters --text "An abnormality of the liver"
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from custom_models import demo
from workflows.errors import UserError, run_file


class CharacterTokenizer:
    """Characters to ids and back.

    Args:
        characters: The vocabulary; a character's id is its place in it.
        unknown: One of them, which stands for all that are not there; None makes those an error.

    Raises:
        UserError: If there is no character, one twice, or `unknown` is not among them.
    """

    def __init__(self, characters: str, unknown: str | None = None) -> None:
        self.characters = characters
        self.ids = {character: i for i, character in enumerate(characters)}
        if not characters:
            raise UserError("A vocabulary of characters needs at least one. Give a text that is not empty.")
        if len(self.ids) < len(characters):
            twice = next(character for i, character in enumerate(characters) if self.ids[character] != i)
            raise UserError(f"The character {twice!r} is in the vocabulary twice.")
        if unknown is not None and unknown not in self.ids:
            raise UserError(f"The character for unknown ones, {unknown!r}, is not in the vocabulary itself. Add it.")
        self.unknown = unknown

    @classmethod
    def from_text(cls, text: str, unknown: str | None = None) -> Self:
        """The vocabulary of a text: its characters in the order of their code points, and `unknown` if given.

        Raises:
            UserError: If the text is empty, or `unknown` is not one character.
        """
        if not text:
            raise UserError("The text to take characters from is empty. Give one with characters in it.")
        if unknown is not None and len(unknown) != 1:
            raise UserError(f"What stands for unknown characters must be one character, not {unknown!r}.")
        return cls("".join(sorted({*text, *(unknown or "")})), unknown)

    def __len__(self) -> int:
        """The size of the vocabulary."""
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Turn a text into one id per character; an empty one into none.

        Raises:
            UserError: If a character is not in the vocabulary and none stands for unknown ones.
        """
        if self.unknown is not None:
            other = self.ids[self.unknown]
            return [self.ids.get(character, other) for character in text]
        try:
            return [self.ids[character] for character in text]
        except KeyError as e:
            character = e.args[0]
            raise UserError(
                f"The vocabulary of {len(self):,} characters has no {character!r} (U+{ord(character):04X}, character "
                f"{text.index(character)} of the text). Build it from a text that has all characters, or name one "
                "that stands for unknown ones: unknown='\\ufffd'."
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into the text they stand for.

        Raises:
            UserError: If the vocabulary has no such id.
        """
        ids = list(ids)
        if wrong := [i for i in ids if not 0 <= i < len(self)]:
            raise UserError(f"No character has the id {wrong[0]}; this vocabulary's are 0 to {len(self) - 1}.")
        return "".join(self.characters[i] for i in ids)


def main(text: str = "An abnormality of the liver.", file: Path | None = None, unknown: str | None = None) -> None:
    """See a text as characters' ids.

    Args:
        text: What to encode.
        file: The text whose characters are the vocabulary; default: the Human Phenotype Ontology's definitions.
        unknown: A character that stands for all that are not there.
    """
    tokenizer = CharacterTokenizer.from_text(demo.read(file), unknown)
    ids = tokenizer.encode(text)
    print(f"{len(tokenizer)} characters: {tokenizer.characters!r}")
    print(f"{len(text)} characters -> {len(ids)} ids: {ids}\n{tokenizer.decode(ids)}")


if __name__ == "__main__":
    run_file(main)
