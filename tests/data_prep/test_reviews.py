"""Movie reviews: the package's ratings, raw files, the Hub's tables; labels, repetitions, bad input."""

import json
import os
from pathlib import Path

import pytest

from data_prep import reviews
from data_prep.prepare import setup
from data_prep.rows import normalise, read_rows
from data_prep.tables import Table
from tests.data_prep.conftest import write_table
from workflows.errors import UserError

SPLITS = ("train", "validation", "test")


def polarity(folder: Path, good: list[str], bad: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rt-polarity.pos").write_text("\n".join(good), encoding="latin-1")
    (folder / "rt-polarity.neg").write_text("\n".join(bad), encoding="latin-1")
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [row for split in SPLITS for row in read_rows(folder / f"{split}.jsonl", "classified")]


@pytest.mark.long
def test_the_packages_snippets_by_the_sign_of_their_ratings(tmp_path):
    setup(data="movie_snippets", out_dir=tmp_path)
    manifest = json.loads((tmp_path / "movie_snippets" / "manifest.json").read_text())
    rows = rows_of(tmp_path / "movie_snippets")
    assert manifest["dropped"] == {"neither: rated 0": 37, "repeated": 2} and len(rows) + 39 == 10_605
    labels = {row["text"]: row["label"] for row in rows}
    assert labels["Effective but too tepid biopic"] == "negative"  # rated -0.6
    assert 0.45 < sum(label == "positive" for label in labels.values()) / len(labels) < 0.55
    texts = [{normalise(row["text"]) for row in read_rows(tmp_path / "movie_snippets" / f"{split}.jsonl", "classified")}
             for split in SPLITS]  # fmt: skip
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_the_real_sentence_polarity(tmp_path):
    if not os.environ.get("WORKFLOW_DATA"):
        pytest.skip("WORKFLOW_DATA is not set; it names the folder with raw data sets (see README)")
    raw = Path(os.environ["WORKFLOW_DATA"]).resolve() / "sentence_polarity"
    setup(data="sentence_polarity", raw_dir=raw, out_dir=tmp_path)
    folder = tmp_path / "sentence_polarity"
    assert [len(read_rows(folder / f"{split}.jsonl", "classified")) for split in SPLITS] == [8528, 1066, 1066]


def test_repetitions_and_contradictions_are_left_out_and_counted(tmp_path):
    raw = polarity(tmp_path / "raw", ["a fine film", "a fine film!", "so so", "", *"abcdefghi"], ["so so", "dull"])
    setup(data="sentence_polarity", raw_dir=raw, out_dir=tmp_path, validation_size=2, test_size=3)
    rows = rows_of(tmp_path / "sentence_polarity")
    manifest = json.loads((tmp_path / "sentence_polarity" / "manifest.json").read_text())
    assert manifest["dropped"] == {"repeated": 1, "of both labels": 2, "empty": 1} and len(rows) == 11
    assert [split["rows"] for split in manifest["splits"].values()] == [6, 2, 3]
    assert {row["text"]: row["label"] for row in rows}["dull"] == "negative"


def test_tables_of_the_hub(tmp_path, monkeypatch):
    split = [{"text": f"text {i}", "label": i % 2} for i in range(30)]
    monkeypatch.setattr(reviews, "read_hub", lambda _: ({"train": [Table("hub (train)", split)]}, "commit"))
    setup(data="sentence_polarity", out_dir=tmp_path)
    assert {row["text"]: row["label"] for row in rows_of(tmp_path / "sentence_polarity")}["text 3"] == "positive"
    split[7]["label"] = -1
    with pytest.raises(UserError, match=r"hub \(train\), row 8: the label -1 is none of 0 \(negative\) and 1"):
        setup(data="sentence_polarity", out_dir=tmp_path)


def test_sst2_is_tested_on_its_official_validation(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    write_table(raw / "train.jsonl", [{"sentence": f"phrase {i}", "label": i % 2} for i in range(20)])
    write_table(raw / "validation.jsonl", [{"sentence": s, "label": 1} for s in ("phrase 3", "a whole sentence")])
    setup(data="sst2", raw_dir=raw, out_dir=tmp_path, validation_size=4)
    manifest = json.loads((tmp_path / "sst2" / "manifest.json").read_text())
    assert manifest["dropped"]["also in the test"] == 1
    assert [split["rows"] for split in manifest["splits"].values()] == [15, 4, 2]
    with pytest.raises(UserError, match="official test"):
        setup(data="sst2", raw_dir=raw, out_dir=tmp_path, test_size=3)


def test_bad_raw_files_are_named(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(UserError, match=r"rt-polarity\.neg does not exist"):
        setup(data="sentence_polarity", raw_dir=tmp_path / "raw", out_dir=tmp_path)
    with pytest.raises(UserError, match=r"GroundTruth\.txt does not exist"):
        setup(data="movie_snippets", raw_dir=tmp_path / "raw", out_dir=tmp_path)
    (tmp_path / "raw" / "movieReviewSnippets_GroundTruth.txt").write_text("1\t2.5\tgood\n2\tmuch\tbad\n")
    with pytest.raises(UserError, match="line 2: not an id, a rating and a text"):
        setup(data="movie_snippets", raw_dir=tmp_path / "raw", out_dir=tmp_path)
