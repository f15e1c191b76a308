"""Sentences with marked entities: official splits, the Hub's tables, one's own files, the ontology's silver labels."""

import json
import os
from pathlib import Path

import datasets
import pytest

from data_prep.entities import WORD
from data_prep.iob import entities_of
from data_prep.prepare import setup
from data_prep.rows import read_rows, row_problem
from tests.data_prep.conftest import write_table
from workflows.errors import UserError

SPLITS = ("train", "validation", "test")


def rows_of(folder: Path) -> dict[str, list[dict]]:
    return {split: read_rows(folder / f"{split}.jsonl", "tagged") for split in SPLITS}


def marked(row: dict) -> list[str]:
    return [" ".join(row["tokens"][e.start : e.end]) for e in entities_of(row["tags"])]


def test_the_real_bc5cdr(tmp_path):
    if not os.environ.get("WORKFLOW_DATA"):
        pytest.skip("WORKFLOW_DATA is not set; it names the folder with raw data sets (see README)")
    raw = Path(os.environ["WORKFLOW_DATA"]).resolve() / "bc5cdr"
    setup(data="bc5cdr", raw_dir=raw, out_dir=tmp_path)
    rows = rows_of(tmp_path / "bc5cdr")
    assert len(rows["test"]) == 4797 and sum(len(entities_of(row["tags"])) for row in rows["test"]) == 9809
    assert len(rows["train"]) + len(rows["validation"]) + 38 == 4560 + 4581
    manifest = json.loads((tmp_path / "bc5cdr" / "manifest.json").read_text())
    assert manifest["shape"] == "tagged" and manifest["dropped"] == {"sentences that a later split has, too": 38}


@pytest.mark.long
def test_the_ontologys_definitions_with_its_own_names_marked(tmp_path):
    setup(data="hpo_entities", out_dir=tmp_path)
    rows = rows_of(tmp_path / "hpo_entities")
    assert len(rows["train"]) > 8 * len(rows["test"]) * 0.9
    everything = [row for split in rows.values() for row in split]
    names = [name for row in everything for name in marked(row)]
    assert len(names) > len(everything) / 2 and all(len(name) >= 4 for name in names)
    texts = [{" ".join(row["tokens"]).casefold() for row in rows[split]} for split in SPLITS]
    assert not texts[0] & texts[2] and not texts[1] & texts[2]


def iob(path: Path, *sentences: str) -> None:
    """Sentences of words, of which those with * before them are entities."""
    lines = (f"{word.strip('*')}\t{'B-X' if '*' in word else 'O'}" for s in sentences for word in [*s.split(), "|"])
    path.write_text("\n".join("" if line.startswith("|") else line for line in lines))


def test_sentences_of_a_later_split_are_left_out_of_earlier_ones(tmp_path):
    (tmp_path / "raw").mkdir()
    iob(tmp_path / "raw" / "train.tsv", "one *two", "METHODS :", "- -", "again", "again")
    iob(tmp_path / "raw" / "devel.tsv", "three", "methods :")
    iob(tmp_path / "raw" / "test.tsv", "Methods :", "Methods :", "( )")
    setup(data="bc5cdr", raw_dir=tmp_path / "raw", out_dir=tmp_path)
    rows = rows_of(tmp_path / "bc5cdr")
    assert {split: len(found) for split, found in rows.items()} == {"train": 4, "validation": 1, "test": 3}
    (tmp_path / "raw" / "test.tsv").unlink()
    with pytest.raises(UserError, match="there is no test split"):
        setup(data="bc5cdr", raw_dir=tmp_path / "raw", out_dir=tmp_path)
    with pytest.raises(UserError, match="bc5cdr has official splits, so --test_size cannot be chosen"):
        setup(data="bc5cdr", raw_dir=tmp_path / "raw", out_dir=tmp_path, test_size=5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no train, devel and test file"):
        setup(data="bc5cdr", raw_dir=tmp_path / "empty", out_dir=tmp_path)


def test_a_file_of_ones_own(tmp_path):
    iob(tmp_path / "mine.iob", *(f"word{i} *name{i}" for i in range(30)))
    setup(data="iob", file=tmp_path / "mine.iob", out_dir=tmp_path, name="own", validation_size=4, test_size=5)
    rows = rows_of(tmp_path / "own")
    assert [len(rows[split]) for split in SPLITS] == [21, 4, 5] and marked(rows["test"][0])[0].startswith("name")
    iob(tmp_path / "mine.iob", "one", "two", "*three")
    setup(data="iob", file=tmp_path / "mine.iob", out_dir=tmp_path, name="small")
    assert [len(found) for found in rows_of(tmp_path / "small").values()] == [1, 1, 1]
    with pytest.raises(UserError, match=r"is a folder\. Name a file in it"):
        setup(data="iob", file=tmp_path, out_dir=tmp_path, name="own")
    (tmp_path / "mine.iob").write_text("a\tO\nb\tI-X\n")
    with pytest.raises(UserError, match=r"mine\.iob, line 2: 'I-X' must follow"):
        setup(data="iob", file=tmp_path / "mine.iob", out_dir=tmp_path, name="own")
    assert len(read_rows(tmp_path / "own" / "train.jsonl", "tagged")) == 21  # what was there stays


def write_tagged(folder: Path, sentences: dict[str, list[str]]) -> None:
    """A table as the Hub's Parquet copies have it: tags are numbers, their names are in its features."""
    names = datasets.ClassLabel(names=["O", "B-Disease", "I-Disease"])
    features = datasets.Features({
        "id": datasets.Value("string"),
        "tokens": datasets.Sequence(datasets.Value("string")),
        "ner_tags": datasets.Sequence(names),
    })  # fmt: skip
    for split, texts in sentences.items():
        rows = [{"id": str(i), "tokens": text.split(), "ner_tags": [1, *[0] * (len(text.split()) - 1)]}
                for i, text in enumerate(texts)]  # fmt: skip
        (folder / split).mkdir(parents=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / split / "0000.parquet")


def test_a_tagged_data_set_of_the_hub(tmp_path, hub):
    repository = hub / "ncbi/ncbi_disease"
    (repository / "main").mkdir(parents=True)
    (repository / "main" / "main.py").write_text("raise SystemExit('code of a repository was run')\n")
    sentences = {"train": ["ulcer of it"], "validation": ["fever rose"], "test": ["cough went", "gout"]}
    write_tagged(repository / "parquet/ncbi_disease", sentences)
    setup(data="ncbi_disease", out_dir=tmp_path)
    rows = rows_of(tmp_path / "ncbi_disease")
    assert rows["train"] == [{"tokens": ["ulcer", "of", "it"], "tags": ["B-Disease", "O", "O"]}]
    assert [marked(row) for row in rows["test"]] == [["cough"], ["gout"]]


def document(number: int) -> dict:
    """A document in BigBio's form: a title, an abstract of two sentences, five entities of which two are not marked."""
    title, abstract = (
        f"Drug{number} and gastric ulcer.",
        f"It causes gastric  ulcer. Rats{number} had anti-ulcer drugs.",
    )
    text = f"{title} {abstract}"

    def entity(mention: str, kind: str, place: int = 0) -> dict:
        begin = text.index(mention, place)
        return {"id": "e", "type": kind, "text": [mention], "offsets": [[begin, begin + len(mention)]]}

    return {
        "id": str(number),
        "passages": [
            {"id": "t", "type": "title", "text": [title], "offsets": [[0, len(title)]]},
            {"id": "a", "type": "abstract", "text": [abstract], "offsets": [[len(title) + 1, len(text)]]},
        ],
        "entities": [
            entity(f"Drug{number}", "Chemical"),
            entity("gastric ulcer", "Disease"),
            entity("ulcer", "Disease"),  # within the one before
            entity("gastric  ulcer", "Disease"),
            entity("ats", "Chemical", len(title)),  # cuts a word
        ],
    }  # fmt: skip


def test_bc5cdr_of_the_hub_is_cut_into_sentences_and_words(tmp_path, hub):
    repository = hub / "bigbio/bc5cdr"
    (repository / "main").mkdir(parents=True)
    (repository / "main" / "main.py").write_text("raise SystemExit('code of a repository was run')\n")
    for number, split in enumerate(SPLITS):
        write_table(repository / f"parquet/bc5cdr_bigbio_kb/{split}/0000.parquet", [document(number)])
    setup(data="bc5cdr", out_dir=tmp_path)
    row, *others = sorted(rows_of(tmp_path / "bc5cdr")["test"], key=lambda row: "Drug2" not in row["tokens"])
    assert row["tokens"] == ["Drug2", "and", "gastric", "ulcer", "."]
    assert row["tags"] == ["B-Chemical", "O", "B-Disease", "I-Disease", "O"]
    assert [marked(other) for other in others if marked(other)] == [["gastric ulcer"]]
    dropped = json.loads((tmp_path / "bc5cdr" / "manifest.json").read_text())["dropped"]
    assert dropped["entities within others"] == 3 and dropped["entities that cut a word or a sentence"] == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a b"], "tags": ["O"]}, '"tokens" must be a list of words'),
        ({"tokens": ["a"], "tags": []}, '"tags" must be a list of words'),
        ({"tokens": ["a", "b"], "tags": ["O"]}, '"tokens" has 2 words and "tags" 1'),
        ({"tokens": ["a", "b"], "tags": ["O", "I-X"]}, "'I-X' must follow B-X or I-X, not 'O'"),
        ({"tokens": ["a"], "tags": ["I-X"]}, "'I-X' must follow"),
        ({"tokens": ["a", "b"], "tags": ["B-X", "I-X"]}, None),
    ],
)
def test_rows_that_are_no_tagged_sentences(row, message):
    problem = row_problem(row, "tagged")
    assert problem is None if message is None else message in str(problem)


def test_signs_above_and_below_belong_to_their_letter():
    assert WORD.findall("हिन्दी में cafe\u0301, 10 m² ½-on_e") == [
        "हिन्दी", "में", "cafe\u0301", ",", "10", "m²", "½", "-", "on_e"
    ]  # fmt: skip
