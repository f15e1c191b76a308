"""Sentences with marked entities: IOB2 tags as spans and back, and files of one word and its tag a line.

IOB2 (Ramshaw and Marcus 1995, cmp-lg/9505040; Tjong Kim Sang and Veenstra 1999, cs/9907006): B-TYPE is an entity's
first word, I-TYPE each further one, O all others.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from workflows.errors import UserError
from workflows.files import read_text

OUTSIDE = "O"
_NOT_TEXT = "-DOCSTART-"


class Entity(NamedTuple):
    """An entity within a sentence.

    Attributes:
        type: Such as "Disease".
        start: Its first word.
        end: The word after its last.
    """

    type: str
    start: int
    end: int


def tag_problem(tag: str, before: str) -> str | None:
    """What is wrong with a tag after another ("O" before the first), or None."""
    if tag == OUTSIDE:
        return None
    prefix, dash, kind = tag.partition("-")
    if prefix not in ("B", "I") or not dash or not kind or kind.split() != [kind]:
        return f"{tag!r} is no tag of IOB2 (O, B-TYPE, I-TYPE)"
    if prefix == "I" and before not in (f"B-{kind}", f"I-{kind}"):
        return f"{tag!r} must follow B-{kind} or I-{kind}, not {before!r}"
    return None


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """The entities that valid IOB2 tags mark, in order."""
    found: list[Entity] = []
    for i, tag in enumerate(tags):
        if tag.startswith("B-"):
            found.append(Entity(tag[2:], i, i + 1))
        elif tag != OUTSIDE:
            found[-1] = found[-1]._replace(end=i + 1)
    return found


def tags_of(entities: Iterable[Entity], n_words: int) -> list[str]:
    """The tags of a sentence of so many words; the entities must not overlap."""
    tags = [OUTSIDE] * n_words
    for entity in entities:
        tags[entity.start : entity.end] = [f"I-{entity.type}"] * (entity.end - entity.start)
        tags[entity.start] = f"B-{entity.type}"
    return tags


class Dictionary:
    """Names that are looked for in sentences, without case.

    Args:
        names: Words of a name, case-folded -> the type of what it names.
    """

    def __init__(self, names: Mapping[tuple[str, ...], str]) -> None:
        self.names = dict(names)
        self._lengths: dict[str, list[int]] = {}  # first word -> how long its names are, the longest first
        for name in self.names:
            self._lengths.setdefault(name[0], []).append(len(name))
        self._lengths = {first: sorted(set(lengths), reverse=True) for first, lengths in self._lengths.items()}

    def find(self, words: Sequence[str]) -> list[Entity]:
        """The names in a sentence, from left to right, at each place the longest."""
        folded = [word.casefold() for word in words]
        found: list[Entity] = []
        i = 0
        while i < len(words):
            names = (tuple(folded[i : i + length]) for length in self._lengths.get(folded[i], ()))
            if (name := next((name for name in names if name in self.names), None)) is None:
                i += 1
            else:
                found.append(Entity(self.names[name], i, i + len(name)))
                i += len(name)
        return found


def read_iob(
    path: Path, broken: list[str] | None = None, unused: Counter[str] | None = None
) -> list[tuple[list[str], list[str]]]:
    """Read a file of lines `WORD ... TAG`, with an empty line after each sentence.

    Columns lie between tabs, or between spaces where there are no tabs; those between the first and the last are
    ignored, and so are the lines `-DOCSTART-` that CoNLL's files have.

    Args:
        path: The file.
        broken: Where the first wrong line of each sentence that has one is added; None raises at the first.
        unused: Counts the lines that have columns between the first and the last.

    Returns:
        Each sentence's words and tags; those with a wrong line are left out.

    Raises:
        UserError: If the file is missing, empty or not UTF-8, or a line is no word and tag of IOB2; with its number.
    """
    sentences: list[tuple[list[str], list[str]]] = []
    words: list[str] = []
    tags: list[str] = []
    problem: str | None = None
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        columns = [part for part in (line.strip("\r").split("\t") if "\t" in line else line.split()) if part]
        if not columns or columns[0] == _NOT_TEXT:
            if problem is not None and broken is not None:
                broken.append(problem)
            elif words:
                sentences.append((words, tags))
            words, tags, problem = [], [], None
        elif problem is None:
            problem = _line_problem(columns, line, tags[-1] if tags else OUTSIDE)
            if problem is not None:
                problem = f"{path}, line {number}: {problem}"
                if broken is None:
                    raise UserError(problem)
            if unused is not None and len(columns) > 2:
                unused["columns between a word and its tag"] += 1
            words.append(columns[0])
            tags.append(columns[-1])
    if not sentences and not broken:
        raise UserError(f"{path} holds no sentence. A line is a word and its tag: aspirin<TAB>B-Chemical")
    return sentences


def _line_problem(columns: list[str], line: str, before: str) -> str | None:
    """Return what is wrong with a line that is to be a word and its tag, or None."""
    if len(columns) < 2 or columns[0].split() != [columns[0]]:
        return f"{line[:60]!r} is not a word and its tag. Fix that line."
    if problem := tag_problem(columns[-1], before):
        return f"{problem}. Fix that line; files of another scheme must be converted to IOB2."
    return None
