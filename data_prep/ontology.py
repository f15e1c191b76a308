"""Readers for the Human Phenotype Ontology's two files: the ontology (OBO) and the disease annotations (HPOA)."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from workflows.errors import UserError

_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(\w*)[ \t]*(\w*)')
_LAYPERSON = "layperson"
"""The type of a synonym that people without medical training use."""
_HPOA_COLUMNS = {"database_id", "disease_name", "qualifier", "hpo_id", "frequency", "aspect"}
# Middle of each class's range (https://hpo.jax.org, "Frequency"); occasional and rarer classes are not needed apart.
_FREQUENCY_CLASSES = {
    "HP:0040280": 1.0,  # obligate
    "HP:0040281": 0.895,  # very frequent: 80 to 99%
    "HP:0040282": 0.545,  # frequent: 30 to 79%
    "HP:0040283": 0.17,  # occasional: 5 to 29%
    "HP:0040284": 0.025,  # very rare: 1 to 4%
    "HP:0040285": 0.0,  # excluded
}


@dataclass(frozen=True)
class Term:
    """One clinical finding.

    Attributes:
        id: Such as `HP:0001250`.
        name: Its preferred name.
        definition: One or more sentences, or "" if it has none.
        exact: Synonyms that mean the same.
        related: Synonyms that are broader, narrower or merely related.
        parents: Ids of the terms it is a kind of.
        layperson: Those of its synonyms, of any scope, that are tagged as a layperson's words.
    """

    id: str
    name: str
    definition: str
    exact: tuple[str, ...]
    related: tuple[str, ...]
    parents: tuple[str, ...]
    layperson: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Every text by which the term goes."""
        return (self.name, *self.exact, *self.related)


@dataclass(frozen=True)
class Annotation:
    """One sign of a disease, from one reference.

    Attributes:
        disease: The disease's id, such as `OMIM:154700`.
        disease_name: Its name.
        term: The sign's id.
        share: The share of patients who have it, from 0 to 1, or None if the file does not say.
        patients: How many patients that share is of, or None if it is a class such as "frequent".
    """

    disease: str
    disease_name: str
    term: str
    share: float | None
    patients: int | None


def read_obo(lines: Iterable[str], file: str) -> tuple[str, dict[str, Term]]:
    """Read the terms of an OBO file, obsolete ones left out.

    Args:
        lines: The file's lines.
        file: Its name for messages.

    Returns:
        The file's version (`data-version`) and the terms by id.

    Raises:
        UserError: If it is not an OBO file with terms, or a term is malformed; with the line's number.
    """
    version = ""
    terms: dict[str, Term] = {}
    for start, kind, fields in _stanzas(lines, file):
        if kind == "":
            version = next(iter(fields.get("data-version", [])), "")
        if kind != "[Term]" or "true" in fields.get("is_obsolete", []):
            continue
        if "id" not in fields or "name" not in fields:
            raise UserError(f"{file}, line {start}: a term without id or name. The file is damaged; get it again.")
        synonyms = [_quoted(text, file, start) for text in fields.get("synonym", [])]
        terms[fields["id"][0]] = Term(
            id=fields["id"][0],
            name=fields["name"][0],
            definition=_quoted(fields["def"][0], file, start)[0] if "def" in fields else "",
            exact=tuple(text for text, scope, _ in synonyms if scope == "EXACT"),
            related=tuple(text for text, scope, _ in synonyms if scope != "EXACT"),
            parents=tuple(parent.split(" ")[0] for parent in fields.get("is_a", [])),
            layperson=tuple(text for text, _, kind in synonyms if kind == _LAYPERSON),
        )
    if not version or not terms:
        raise UserError(f"{file} is not an ontology in OBO format (no data-version or no [Term]). Get the file again.")
    for term in terms.values():
        if unknown := [parent for parent in term.parents if parent not in terms]:
            raise UserError(f"{file}: {term.id} is a kind of {unknown[0]}, which is not there. The file is cut short.")
    return version, terms


def _stanzas(lines: Iterable[str], file: str) -> Iterator[tuple[int, str, dict[str, list[str]]]]:
    start, kind = 1, ""
    fields: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        if line.startswith("["):
            yield start, kind, fields
            start, kind, fields = number, line, {}
        elif line:
            name, colon, value = line.partition(": ")
            if not colon:
                raise UserError(f"{file}, line {number}: not `name: value` but {line[:60]!r}. Get the file again.")
            fields.setdefault(name, []).append(value)
    yield start, kind, fields


def _quoted(value: str, file: str, line: int) -> tuple[str, str, str]:
    """Return a quoted text, and the two words after it: a synonym's scope and type, "" where there is none."""
    match = _QUOTED.match(value)
    if not match:
        raise UserError(f"{file}, term at line {line}: a text without quotes: {value[:60]!r}. Get the file again.")
    text = re.sub(r"\\(.)", lambda escape: " " if escape[1] in "nt" else escape[1], match[1])
    return " ".join(text.split()), match[2], match[3]


def read_hpoa(lines: Iterable[str], file: str) -> tuple[str, list[Annotation]]:
    """Read which disease shows which sign (aspect P, without those marked NOT) from `phenotype.hpoa`.

    Args:
        lines: The file's lines.
        file: Its name for messages.

    Returns:
        The file's version and the annotations in the file's order.

    Raises:
        UserError: If a column is missing or a line is malformed; with the line's number.
    """
    version = ""
    columns: list[str] = []
    annotations = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        if line.startswith("#version:"):
            version = line.removeprefix("#version:").strip()
        if not line or line.startswith("#"):
            continue
        values = line.split("\t")
        if not columns:
            columns = values
            if missing := _HPOA_COLUMNS - set(columns):
                raise UserError(f"{file}, line {number}: no column {', '.join(sorted(missing))}. Get the file again.")
            continue
        if len(values) != len(columns):
            raise UserError(
                f"{file}, line {number}: {len(values)} columns, expected {len(columns)}. "
                "The file may be cut short; get it again."
            )
        row = dict(zip(columns, values, strict=True))
        if row["aspect"] != "P" or row["qualifier"] == "NOT":
            continue
        share, patients = _frequency(row["frequency"], file, number)
        annotations.append(Annotation(row["database_id"], row["disease_name"], row["hpo_id"], share, patients))
    if not annotations:
        raise UserError(f"{file} holds no disease annotations. Get the file again.")
    return version, annotations


def _frequency(text: str, file: str, line: int) -> tuple[float | None, int | None]:
    if not text:
        return None, None
    if text in _FREQUENCY_CLASSES:
        return _FREQUENCY_CLASSES[text], None
    if match := re.fullmatch(r"(\d+)/(\d+)", text):
        cases, patients = int(match[1]), int(match[2])
        return (cases / patients, patients) if patients else (None, None)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        return float(match[1]) / 100, None
    raise UserError(f"{file}, line {line}: unknown frequency {text!r} (expected n/m, p% or a class).")


class Ontology:
    """Terms below a root, and their kinship.

    Attributes:
        terms: The terms below the root by id, in the order of their ids.
    """

    def __init__(self, terms: dict[str, Term], root: str) -> None:
        children: dict[str, list[str]] = {}
        for term in terms.values():
            for parent in term.parents:
                children.setdefault(parent, []).append(term.id)
        family = _reachable(root, children)
        self.terms = {term_id: terms[term_id] for term_id in sorted(family - {root})}
        self._children = children
        self._parents = {i: [p for p in term.parents if p in family] for i, term in self.terms.items()} | {root: []}

    def parents(self, term_id: str) -> list[Term]:
        """What a term is a kind of, the root left out."""
        return [self.terms[parent] for parent in self._parents[term_id] if parent in self.terms]

    def descendants(self, term_id: str) -> set[str]:
        """Ids of a term and of everything that is a kind of it."""
        return _reachable(term_id, self._children)

    def ancestors(self, term_id: str) -> set[str]:
        """Ids of a term and of everything it is a kind of, up to the root."""
        return _reachable(term_id, self._parents)

    def kin(self, term_id: str) -> Iterator[set[str]]:
        """A term's kin, nearest first: siblings (a shared parent), then cousins, remoter ones, at last all other terms.

        Yields:
            For each generation, the ids that join in it; the term's own line (ancestors, descendants) is left out.
        """
        own_line = self.ancestors(term_id) | self.descendants(term_id)
        elders, seen = {term_id}, set(own_line)
        generation = 0
        while elders := {parent for elder in elders for parent in self._parents[elder]}:
            generation += 1
            level = elders
            for _ in range(generation):
                level = {child for member in level for child in self._children.get(member, ())}
            yield level - seen
            seen |= level
        yield set(self.terms) - seen


def _reachable(start: str, edges: dict[str, list[str]]) -> set[str]:
    found, todo = set(), [start]
    while todo:
        if (node := todo.pop()) not in found:
            found.add(node)
            todo += edges.get(node, [])
    return found
