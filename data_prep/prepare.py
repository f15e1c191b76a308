"""`make data`: prepare a data set as {train,validation,test}.jsonl with a manifest, and NAME_mcq for scoring.

`data/NAME` holds `messages` rows for training. Data sets whose questions have options (hpo, pubmedqa, medqa, medmcqa)
get `data/NAME_mcq/{validation,test}.jsonl` too, with {"prompt", "choices", "answer"} rows about the same held-out
questions; "choices" are the texts whose log-likelihood is compared. hpo also gets `data/hpo_pairs` (preferences) and
`data/hpo_thoughts` (answers that think first) over the same terms in the same splits; `assistant` gets preferences, and
`data/assistant_questions` ({"prompt", "answers"} rows, whose answers are verified); the collections of preferences are
such rows themselves. The prompts of `general` have no answers (`teach` gives them a model's). The movie reviews
(movie_snippets, sentence_polarity, sst2) are {"text", "label"} rows,
sentences with marked entities (hpo_entities, bc5cdr, ncbi_disease, wnut_17, conll2003, iob) {"tokens", "tags"} rows,
documents with summaries (docstrings, scitldr and others) {"sentences", "summaries"} rows, questions about a text
(hpo_spans, squad) {"question", "context", "answers"} rows, and what is translated (catalogues_fr, catalogues_de,
opus_books_fr, opus_books_de, python_javascript) {"source", "target"} rows.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from data_prep import (
    assistant,
    docstrings,
    entities,
    exams,
    general,
    hpo,
    jsonl,
    medquad,
    preferences,
    programs,
    pubmedqa,
    reviews,
    spans,
    summaries,
    translations,
)
from data_prep.dataset import DataSet, choose_kinds, write_dataset
from data_prep.formats import Shape
from workflows.errors import report_all
from workflows.files import read_json
from workflows.measure import step_began

Name = Literal[
    "hpo", "assistant", "general", "pubmedqa", "medquad", "medqa", "medmcqa",
    "instruction_preference", "orca", "ultrafeedback_binarized", "ultramedical_preference",
    "movie_snippets", "sentence_polarity", "sst2",
    "hpo_entities", "bc5cdr", "ncbi_disease", "wnut_17", "conll2003",
    "docstrings", "scitldr", "meqsum", "pubmedqa_conclusions", "cnn_dailymail", "xsum",
    "hpo_spans", "squad", "pubmedqa_decisions",
    "catalogues_fr", "catalogues_de", "opus_books_fr", "opus_books_de", "python_javascript",
    "jsonl", "iob",
]  # fmt: skip
_PREPARE: dict[str, Callable[[Path | None, int | None, int | None, int], DataSet]] = {
    "hpo": hpo.prepare,
    "assistant": assistant.prepare,
    "general": general.prepare,
    "pubmedqa": pubmedqa.prepare,
    "medquad": medquad.prepare,
    "medqa": exams.prepare_medqa,
    "medmcqa": exams.prepare_medmcqa,
    **{name: partial(preferences.prepare, name) for name in preferences.COLLECTIONS},
    "movie_snippets": reviews.prepare_snippets,
    "sentence_polarity": reviews.prepare_polarity,
    "sst2": reviews.prepare_sst2,
    **translations.PREPARE,
    "python_javascript": programs.prepare,
    "hpo_entities": entities.prepare_definitions,
    **{name: partial(entities.prepare, name) for name in entities.OFFICIAL},
    "docstrings": docstrings.prepare,
    "scitldr": summaries.prepare_scitldr,
    "meqsum": summaries.prepare_meqsum,
    "pubmedqa_conclusions": summaries.prepare_pubmedqa,
    **{name: partial(summaries.prepare_news, name) for name in summaries.NEWS},
    "hpo_spans": spans.prepare_hpo,
    "squad": spans.prepare_squad,
    "pubmedqa_decisions": pubmedqa.prepare_decisions,
}
_OF_FILE = ("jsonl", "iob")
_OFFICIAL_TEST = ("pubmedqa", "pubmedqa_decisions", "medqa", "medmcqa")


def setup(
    data: Name = "hpo",
    out_dir: Path = Path("data"),
    name: str | None = None,
    raw_dir: Path | None = None,
    file: Path | None = None,
    kinds: list[str] | None = None,
    validation_size: int | None = None,
    test_size: int | None = None,
    seed: int = 42,
    shape: Shape | None = None,
    skip_broken: bool = False,
    ignore_fields: list[str] | None = None,
) -> None:
    """Prepare a data set for training and scoring.

    Args:
        data: Data set: hpo (Human Phenotype Ontology, needs no Hub), assistant (a small assistant for medical terms,
            needs no Hub), general (everyday prompts for `teach`, needs no Hub), pubmedqa, medquad, medqa, medmcqa, or
            jsonl for a file of your own (iob for one in IOB2); for preferences: instruction_preference, orca,
            ultrafeedback_binarized or ultramedical_preference; movie reviews to classify: movie_snippets (needs no
            Hub), sentence_polarity, sst2; sentences with marked entities: hpo_entities (needs no Hub), bc5cdr,
            ncbi_disease, wnut_17, conll2003; documents with summaries: docstrings (needs no Hub), scitldr, meqsum,
            pubmedqa_conclusions, cnn_dailymail, xsum; questions about a text: hpo_spans (needs no Hub), squad,
            pubmedqa_decisions (yes, no, maybe); to translate: catalogues_fr, catalogues_de, python_javascript (need no
            Hub), opus_books_fr, opus_books_de.
        out_dir: The folder of data directories.
        name: Name of the directory in it; the data set's own by default.
        raw_dir: Read raw files from this folder instead of the Hub (hpo, assistant: instead of the wheel).
        file: The file to prepare with --data jsonl (JSONL, JSON, CSV, TSV or Parquet; .gz too). Its rows are
            conversations (OpenAI's or ShareGPT's), questions with answers (prompt/completion, instruction/input/output,
            question/answer and other names in common use, with system, history, context and tools), preferences
            (chosen, rejected), labelled answers (label or kto_tag), questions with what counts as right, documents with
            summaries, translations, or questions about a context; docs/data.md lists the forms. With --data iob: a
            file of one word and its IOB2 tag a line, an empty line after each sentence.
        kinds: Write training rows of these kinds only (hpo: name, definition, signs; pubmedqa: decision, conclusion;
            assistant: medical, meaning, naming, name, identity, advice).
        validation_size: Size of the validation split (hpo: terms, assistant: facts a kind, else questions); each data
            set has a default.
        test_size: Size of the test split, where there is no official one.
        seed: Seed of the split, the order of rows and the choice of distractors.
        shape: Shape that the rows of --file become (docs/data.md); by default, printed, that of the first row whose
            form is known.
        skip_broken: Leave out rows of --file that cannot be read, and count them, instead of refusing the file.
        ignore_fields: Names of fields of --file to leave out although they change what a row means.

    Raises:
        UserError: If an argument does not fit, or the data cannot be had or is malformed.
    """
    began = step_began()
    problems = []
    if (file is not None) != (data in _OF_FILE):
        problems.append(f"--data {data} needs --file." if file is None else "--file belongs to --data jsonl or iob.")
    if raw_dir is not None and data in _OF_FILE:
        problems.append(f"--raw_dir does not go with --data {data}; name the one file by --file.")
    elif raw_dir is not None and not raw_dir.is_dir():
        problems.append(f"--raw_dir {raw_dir} is not a folder.")
    problems += [
        f"--{option} must be at least 1, not {size}."
        for option, size in (("validation_size", validation_size), ("test_size", test_size))
        if size is not None and size < 1
    ]
    if test_size is not None and data in _OFFICIAL_TEST:
        problems.append(f"{data} has an official test, so --test_size cannot be chosen.")
    if name is not None and (not name or Path(name).name != name):
        problems.append(f"--name {name!r} is not a folder's name.")
    if data != "jsonl" and (shape is not None or ignore_fields):
        problems.append(f"--{'ignore_fields' if shape is None else 'shape'} belongs to --data jsonl.")
    if data not in _OF_FILE and skip_broken:
        problems.append("--skip_broken belongs to --data jsonl or iob.")
    report_all(problems)

    if file is not None and data == "iob":
        dataset = entities.prepare_iob(file, validation_size, test_size, seed, skip_broken)
    elif file is not None:
        dataset = jsonl.prepare(file, validation_size, test_size, seed, shape, skip_broken, ignore_fields)
    else:
        dataset = _PREPARE[data](raw_dir, validation_size, test_size, seed)
    dataset.name = name or dataset.name
    choose_kinds(dataset, kinds)
    directories = write_dataset(dataset, out_dir, seed, began)
    _print_summary(dataset, directories)


def _print_summary(dataset: DataSet, directories: list[Path]) -> None:
    source = dataset.source
    print(f"{source.title}, {source.origin}, revision {source.revision}\nlicence: {source.licence}")
    if dataset.read_as:
        print(f"read as: {dataset.read_as}")
    for directory in directories:
        splits = read_json(directory / "manifest.json")["splits"]
        for file, split in splits.items():
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in split["kinds"].items())
            print(f"  {directory / file}: {split['rows']:,} rows" + (f" ({kinds})" if kinds else ""))
    for reason, count in dataset.dropped.items():
        if count:
            print(f"  left out, {reason}: {count:,}")
    for fact, count in dataset.notes.items():
        print(f"  {fact}: {count:,}")
    for name, count in dataset.fields_not_used.items():
        print(f"  field not used, {name}: {count:,} rows")
    if dataset.shape == "scoring" and not dataset.name.endswith("_mcq"):
        print(f"  `evaluate` finds questions with options by the end of their name: --name {dataset.name}_mcq")
