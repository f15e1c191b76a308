"""Byte-pair encoding, a ladder of three small classes: plain bytes, words by a pattern, special tokens.

Any text is a row of bytes, so a vocabulary that begins with the 256 bytes knows every text; merges of frequent pairs
then make it shorter (Sennrich et al. 2016, arXiv 1508.07909, on characters; Radford et al. 2019, the GPT-2 paper, on
bytes). A merge across words ("dog." beside "dog!") wastes vocabulary, so GPT-2 first cuts the text by a pattern and
merges within its words only. Special tokens such as <|endoftext|> stand for something that no text can spell.

    python -m custom_models.tokenization.bpe --merges 512 --text "An abnormality of the liver"
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

import regex

from custom_models import demo
from custom_models.tokenization.bpe_training import learn_merges
from workflows.errors import UserError, run_file

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's words: a contraction's end, letters, digits or signs, each with the space before it."""
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""GPT-4's (cl100k_base): contractions in any case, at most three digits, line ends by themselves."""
_REMEMBERED_WORDS, _REMEMBERED_LENGTH = 500_000, 64
"""How many words an encoder remembers, and of how many characters at most: text repeats its short words."""


class ByteBPE:
    """The lowest rung: the whole text is one word.

    Without merges the tokens are the text's bytes. Ids: the bytes have 0 to 255, merge i makes 256 + i.

    Args:
        merges: Pairs of ids, in the order in which they were learned.
        byte_ids: The id of each byte; GPT-2 has them in another order. Default: a byte is its own id.
    """

    def __init__(self, merges: Iterable[tuple[int, int]] = (), byte_ids: Sequence[int] = range(256)) -> None:
        self._set_merges(merges, byte_ids)

    def _set_merges(self, merges: Iterable[tuple[int, int]], byte_ids: Sequence[int] = range(256)) -> None:
        self.byte_ids = list(byte_ids)
        self.merges = {pair: 256 + i for i, pair in enumerate(merges)}
        self.vocabulary = [b""] * 256
        """The bytes of each token, by id."""
        for byte, token in enumerate(self.byte_ids):
            self.vocabulary[token] = bytes([byte])
        for first, second in self.merges:
            self.vocabulary.append(self.vocabulary[first] + self.vocabulary[second])
        self._ids_of = _Remembered(self)

    def __len__(self) -> int:
        """The size of the vocabulary."""
        return len(self.vocabulary)

    def split(self, text: str) -> list[str]:
        """Cut a text into the words within which pairs are merged; together they are the text."""
        return [text] if text else []

    def train(self, text: str, merges: int) -> None:
        """Learn merges from a text; what was learned before is forgotten.

        Args:
            text: What to learn from.
            merges: How many; the vocabulary then has 256 more.

        Raises:
            UserError: If the text is empty or too short for so many merges, or holds half of a surrogate pair.
        """
        if merges < 0:
            raise UserError(f"The number of merges must be 0 or more, not {merges}.")
        if not text:
            raise UserError("The text to learn merges from is empty. Give one with words in it.")
        check_characters(text)
        words = Counter(self.split(text))  # a dict keeps the order of first occurrence, which decides ties
        self._set_merges(learn_merges({word.encode(): often for word, often in words.items()}, merges))

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids; an empty one into none.

        Raises:
            UserError: If the text holds half of a surrogate pair, which no encoding has bytes for.
        """
        check_characters(text)
        return list(chain.from_iterable(map(self._ids_of.__getitem__, self.split(text))))

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into the text they stand for. Bytes that are no whole character become U+FFFD.

        Raises:
            UserError: If the vocabulary has no such id.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Turn ids into bytes: exact where a token ends within a character.

        Raises:
            UserError: If the vocabulary has no such id.
        """
        ids = list(ids)
        for token in ids:
            if not 0 <= token < len(self.vocabulary):
                last = len(self.vocabulary) - 1
                raise UserError(f"No token has the id {token}; this vocabulary's are 0 to {last}. Is it the right one?")
        return b"".join(map(self.vocabulary.__getitem__, ids))

    def merge_word(self, word: bytes) -> tuple[int, ...]:
        """Merge the bytes of one word: again and again the pair that was learned first, the leftmost of several.

        A heap holds all pairs that can merge, so that a word of n bytes takes n log n steps: "words" such as a long
        line of dashes or a genome occur.
        """
        ids = [self.byte_ids[byte] for byte in word]
        following, preceding = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        heap = [(merged, i) for i, pair in enumerate(pairwise(ids)) if (merged := self.merges.get(pair))]
        heapq.heapify(heap)
        while heap:
            merged, i = heapq.heappop(heap)
            j = following[i]
            if j == len(ids) or self.merges.get((ids[i], ids[j])) != merged:
                continue  # one of the two has merged with another since
            ids[i], ids[j] = merged, _GONE
            following[i] = k = following[j]
            if k < len(ids):
                preceding[k] = i
                if (right := self.merges.get((merged, ids[k]))) is not None:
                    heapq.heappush(heap, (right, i))
            h = preceding[i]
            if h >= 0 and (left := self.merges.get((ids[h], merged))) is not None:
                heapq.heappush(heap, (left, h))
        return tuple(token for token in ids if token != _GONE)


_GONE = -1


class _Remembered(dict[str, tuple[int, ...]]):
    """The ids of words that were met before; a new word is encoded when it is asked for."""

    def __init__(self, tokenizer: ByteBPE) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self.tokenizer.merge_word(word.encode())
        if len(word) <= _REMEMBERED_LENGTH and len(self) < _REMEMBERED_WORDS:
            self[word] = ids
        return ids


class RegexBPE(ByteBPE):
    """The second rung: a pattern cuts the text into words, and no token reaches over a word's end.

    Args:
        pattern: What a word is, for the `regex` module. It must match every part of a text and have no groups.
        merges: As for `ByteBPE`.
        byte_ids: As for `ByteBPE`.

    Raises:
        UserError: If the pattern is no regular expression or has groups.
    """

    def __init__(
        self,
        pattern: str = GPT2_PATTERN,
        merges: Iterable[tuple[int, int]] = (),
        byte_ids: Sequence[int] = range(256),
    ) -> None:
        super().__init__(merges, byte_ids)
        self.pattern = pattern
        try:
            self._word = regex.compile(pattern)
        except regex.error as e:
            raise UserError(f"The pattern {pattern!r} is no regular expression: {e}.") from None
        if self._word.groups:
            raise UserError(f"The pattern {pattern!r} has groups that capture; write (?:…) instead of (…).")

    def split(self, text: str) -> list[str]:
        """Cut a text into words.

        Raises:
            UserError: If the pattern leaves something out, which would be lost.
        """
        words = self._word.findall(text)
        if sum(map(len, words)) != len(text):
            end = 0
            for match in self._word.finditer(text):
                if match.start() > end:
                    break
                end = match.end()
            raise UserError(
                f"The pattern {self.pattern!r} does not match {text[end : end + 20]!r} (at character {end}), which "
                "would be lost. Add an alternative for it, such as |\\s+|\\S."
            )
        return words


class SpecialBPE(RegexBPE):
    """The top rung: special tokens, each one id, which come after the merges.

    In training they end a text as the text's end does: none of their characters is learned from.

    Args:
        special_tokens: Their texts, in the order of their ids; of those that begin alike the longest is found.
        pattern: As for `RegexBPE`.
        merges: As for `ByteBPE`.
        byte_ids: As for `ByteBPE`.

    Raises:
        UserError: If a special token is empty or named twice, or the pattern is none.
    """

    def __init__(
        self,
        special_tokens: Sequence[str],
        pattern: str = GPT2_PATTERN,
        merges: Iterable[tuple[int, int]] = (),
        byte_ids: Sequence[int] = range(256),
    ) -> None:
        super().__init__(pattern, merges, byte_ids)
        if not all(special_tokens) or len(set(special_tokens)) < len(special_tokens):
            raise UserError(f"Special tokens must be different texts, none of them empty; got {list(special_tokens)}.")
        check_characters("".join(special_tokens))
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = regex.compile("|".join(map(regex.escape, longest_first)) or r"(?!)")  # (?!) never matches
        self._append(special_tokens)

    def _append(self, special_tokens: Sequence[str]) -> None:
        self.special_tokens = {text: len(self.vocabulary) + i for i, text in enumerate(special_tokens)}
        """The id of each special token."""
        self.vocabulary += [text.encode() for text in special_tokens]

    def split(self, text: str) -> list[str]:
        """Cut a text into words; special tokens are left out.

        Raises:
            UserError: If the pattern leaves something out.
        """
        return [word for part in self._special.split(text) for word in super(SpecialBPE, self).split(part)]

    def train(self, text: str, merges: int) -> None:
        """Learn merges from a text, as `ByteBPE.train`; the special tokens' ids follow the new merges."""
        super().train(text, merges)
        self._append(list(self.special_tokens))

    def encode(self, text: str, special: Literal["refuse", "text", "parse"] = "refuse") -> list[int]:
        """Turn a text into ids.

        Args:
            text: Any text.
            special: What a special token's text in it means: an error, since a user could end a prompt with it;
                ordinary text; or the token.

        Raises:
            UserError: If the text holds a special token that is refused, or half of a surrogate pair.
        """
        check_characters(text)
        if special == "text":
            return [token for word in RegexBPE.split(self, text) for token in self._ids_of[word]]
        found = self._special.search(text)
        if found and special == "refuse":
            raise UserError(
                f"The text holds the special token {found[0]} (at character {found.start()}). Pass special='parse' to "
                "encode it as that token, or special='text' as ordinary text."
            )
        ids: list[int] = []
        end = 0
        for match in self._special.finditer(text):
            ids += super().encode(text[end : match.start()])
            ids.append(self.special_tokens[match[0]])
            end = match.end()
        return ids + super().encode(text[end:])


def check_characters(text: str) -> None:
    """Refuse half of a surrogate pair: Python's strings can hold it, UTF-8 cannot.

    Raises:
        UserError: If there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"Character {e.start} of the text is half of a surrogate pair (U+{ord(text[e.start]):04X}), no character. "
            "Read the text anew as UTF-8, or replace it: text.encode('utf-16', 'surrogatepass').decode('utf-16', "
            "'replace')."
        ) from None


def main(
    text: str = "An abnormality of the liver, isn't it? 1234 mg",
    file: Path | None = None,
    merges: int = 512,
) -> None:
    """Climb the ladder: train each rung on the same text and see how it cuts a sentence.

    Args:
        text: The sentence.
        file: The text to learn from; default: the definitions of the Human Phenotype Ontology.
        merges: How many merges to learn.
    """
    learned_from = demo.read(file)
    rungs = {
        "bytes": ByteBPE(),
        "bytes, merged": ByteBPE(),
        "GPT-2's words": RegexBPE(GPT2_PATTERN),
        "GPT-4's words": SpecialBPE(["<|endoftext|>"], GPT4_PATTERN),
    }
    for name, rung in rungs.items():
        if name != "bytes":
            rung.train(learned_from, merges)
        ids = rung.encode(text)
        longer = sorted(rung.vocabulary, key=len)[-5:]
        print(f"\n{name}: {len(rung)} tokens, the longest {[token.decode(errors='replace') for token in longer]}")
        print(f"  {len(text.encode())} bytes -> {len(ids)} ids  {demo.separated(rung.decode([i]) for i in ids)}")


if __name__ == "__main__":
    run_file(main)
