"""Medical examination questions with four options: MedQA (US licence exam) and MedMCQA (Indian entrance exams).

In the questions that are scored the options are not listed: a small model cannot choose by letter, but it can tell
which of four texts is the likeliest answer. Training rows of kind "answer" have the same form, and give the right
option's text; those of kind "letter" list the options and want a letter, for larger models and the rewards of GRPO.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.dataset import DataSet, Source
from data_prep.rows import Row, question_row, scoring_row
from data_prep.splits import Item, hold_out, key, without_shared
from data_prep.tables import Table, read_folder, read_hub
from workflows.errors import UserError

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Question:
    """One question: its text, the four options, and the index of the right one."""

    text: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Exam:
    """What differs between the two.

    Attributes:
        name: The data set's name here.
        hub_id: Its id on the Hub.
        title: Its full name.
        licence: Its licence.
        attribution: The paper to cite.
        test_split: The labelled split that serves as the test.
        questions: Reads the questions of tables that belong together.
    """

    name: str
    hub_id: str
    title: str
    licence: str
    attribution: str
    test_split: str
    questions: Callable[[list[Table]], Iterator[Question]]


def _medqa_questions(tables: list[Table]) -> Iterator[Question]:
    for table in tables:
        table.require({"question": str, "options": dict, "answer_idx": str})
        for index, row in enumerate(table.rows):
            options, letter = row["options"], row["answer_idx"]
            if not all(isinstance(options.get(name), str) for name in LETTERS):
                raise UserError(f"{table.place(index)}: 'options' lacks a text for one of {', '.join(LETTERS)}.")
            if letter not in LETTERS:
                raise UserError(f"{table.place(index)}: 'answer_idx' is {letter!r}, not one of {', '.join(LETTERS)}.")
            yield Question(row["question"], tuple(options[name] for name in LETTERS), LETTERS.index(letter))


def _medmcqa_questions(tables: list[Table]) -> Iterator[Question]:
    columns = ("opa", "opb", "opc", "opd")
    for table in tables:
        table.require({"question": str, "cop": int, **dict.fromkeys(columns, str)})
    # The Hub counts the right option from 0 (-1: not told), the authors' own files count from 1.
    numbers = {row["cop"] for table in tables for row in table.rows}
    if not numbers <= {-1, 0, 1, 2, 3, 4} or {0, 4} <= numbers:
        raise UserError(f"{tables[0].name}: 'cop' must count four options from 0 or from 1, but has {sorted(numbers)}.")
    if not numbers & {-1, 0, 4}:
        raise UserError(
            f"{tables[0].name}: 'cop' is only {sorted(numbers)}, so it is not clear if it counts from 0 or 1."
        )
    first = 1 if 4 in numbers else 0
    for table in tables:
        for row in table.rows:
            yield Question(row["question"], tuple(row[column] for column in columns), row["cop"] - first)


MEDQA = Exam(
    name="medqa",
    hub_id="GBaker/MedQA-USMLE-4-options",
    title="MedQA: United States Medical Licensing Examination, four options",
    licence="CC BY 4.0 as stated on the Hub; the authors' repository (jind11/MedQA) is MIT",
    attribution="Jin D et al.: What Disease Does This Patient Have? A Large-Scale Open Domain Question Answering "
    "Dataset from Medical Exams. Applied Sciences 11 (2021), 6421. https://github.com/jind11/MedQA",
    test_split="test",
    questions=_medqa_questions,
)
MEDMCQA = Exam(
    name="medmcqa",
    hub_id="openlifescienceai/medmcqa",
    title="MedMCQA: Indian medical entrance examinations",
    licence="Apache-2.0 as stated on the Hub; the authors' repository is MIT",
    attribution="Pal A, Umapathi LK, Sankarasubbu M: MedMCQA: A Large-scale Multi-Subject Multi-Choice Dataset for "
    "Medical domain Question Answering. CHIL 2022, PMLR 174, 248-260. https://medmcqa.github.io",
    test_split="validation",  # the answers of its test split are not published
    questions=_medmcqa_questions,
)


def prepare_medqa(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Make `medqa`; see `_prepare`."""
    return _prepare(MEDQA, raw_dir, validation_size, seed)


def prepare_medmcqa(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Make `medmcqa`; see `_prepare`."""
    return _prepare(MEDMCQA, raw_dir, validation_size, seed)


def _prepare(exam: Exam, raw_dir: Path | None, validation_size: int | None, seed: int) -> DataSet:
    """Make one of the two data sets.

    Args:
        exam: Which.
        raw_dir: A folder with files whose names say train, dev or test, in the authors' or the Hub's columns; None for
            the Hub.
        validation_size: Number of training questions held out for validation; default 500.
        seed: Seed of that choice.

    Raises:
        UserError: If the data cannot be had or is malformed.
    """
    files: dict[str, str] = {}
    if raw_dir is None:
        tables, revision = read_hub(exam.hub_id)
    else:
        tables, files = read_folder(raw_dir)
        revision = "raw files"
    needed = ("train", exam.test_split)
    if missing := [split for split in needed if split not in tables]:
        raise UserError(
            f"{raw_dir or exam.hub_id} has no {' and no '.join(missing)} split; their files' names must say so."
        )
    dropped: Counter[str] = Counter()
    everything = [table for split in needed for table in tables[split]]
    questions = iter(list(exam.questions(everything)))
    counts = {split: sum(len(table.rows) for table in tables[split]) for split in needed}
    by_split = {split: _items([next(questions) for _ in range(counts[split])], dropped) for split in needed}
    test = by_split[exam.test_split]
    rest, shared = without_shared(by_split["train"], test)
    dropped["training question that is also in the test"] += shared
    validation, train = hold_out(rest, 500 if validation_size is None else validation_size, seed)
    return DataSet(
        name=exam.name,
        splits={"train": train, "validation": validation, "test": test},
        source=Source(
            exam.title,
            exam.hub_id if raw_dir is None else str(raw_dir),
            revision,
            exam.licence,
            exam.attribution,
            files,
        ),
        split_rule=f"test: the official {exam.test_split} split; validation: at random by seed from the training split",
        dropped=dict(dropped),
    )


def _items(questions: list[Question], dropped: Counter[str]) -> list[Item]:
    items: dict[frozenset[str], Item] = {}
    for question in questions:
        text, options = question.text.strip(), [option.strip() for option in question.options]
        keys = frozenset({key("question", text)})
        if not text or not all(options):
            dropped["empty question or option"] += 1
        elif len({option.casefold() for option in options}) < len(options):
            dropped["two options with the same text"] += 1
        elif question.answer < 0:
            dropped["no answer given"] += 1
        elif keys in items:
            dropped["repeated question"] += 1
        else:
            rows = (question_row(text, options[question.answer], "answer"), letter_row(text, options, question.answer))
            items[keys] = Item(keys, rows, scoring_row(text, options, question.answer))
    return list(items.values())


def letter_row(question: str, options: list[str], answer: int) -> Row:
    """A training row that lists the options and wants one's letter; carries "choices" and "answer" for rewards."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    asked = f"{question}\n\n{listed}\n\nAnswer with the letter of the right option."
    return {**question_row(asked, LETTERS[answer], "letter"), "choices": options, "answer": answer}
