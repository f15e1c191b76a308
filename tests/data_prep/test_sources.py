"""pubmedqa, medquad, medqa, medmcqa and one's own file: raw files, the Hub's columns, official splits, bad input."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import setup
from data_prep.pubmedqa import official_test_ids
from data_prep.rows import normalise, read_rows
from tests.data_prep.conftest import medmcqa_row, medqa_row, medquad_row, pubmedqa_row, write_table
from workflows.errors import UserError

SPLITS = ("train", "validation", "test")


def raw_data(name: str) -> Path:
    if not os.environ.get("WORKFLOW_DATA"):
        pytest.skip("WORKFLOW_DATA is not set; it names the folder with raw data sets (see README)")
    return Path(os.environ["WORKFLOW_DATA"]).resolve() / name


def messages(directory: Path, split: str) -> list[list[dict[str, str]]]:
    return [row["messages"] for row in read_rows(directory / f"{split}.jsonl")]


def rewrite(path: Path, change: Any) -> None:
    path.write_text(change(path.read_text()))


# --- the real files -------------------------------------------------------------------------------------------------


def test_pubmedqa_test_is_the_official_one(tmp_path: Path):
    raw = raw_data("pubmedqa")
    setup(data="pubmedqa", raw_dir=raw, out_dir=tmp_path)
    official = json.loads((raw / "test_ground_truth.json").read_text())
    rows = read_rows(tmp_path / "pubmedqa_mcq" / "test.jsonl", "scoring")
    assert {row["id"]: row["choices"][row["answer"]] for row in rows} == official and len(rows) == 500
    ids = {split: {row["id"] for row in read_rows(tmp_path / "pubmedqa" / f"{split}.jsonl")} for split in SPLITS}
    assert [len(ids[split]) for split in SPLITS] == [450, 50, 500]
    assert not ids["train"] & ids["test"] and not ids["validation"] & (ids["train"] | ids["test"])
    abstracts = {
        split: {m[0]["content"].split("\n\nQuestion")[0] for m in messages(tmp_path / "pubmedqa", split)}
        for split in SPLITS
    }
    assert not abstracts["train"] & abstracts["test"] and not abstracts["validation"] & abstracts["test"]


def test_pubmedqa_official_ids_are_found_without_the_file_that_names_them(tmp_path: Path):
    raw = raw_data("pubmedqa")
    labels = {k: v["final_decision"] for k, v in json.loads((raw / "ori_pqal.json").read_text()).items()}
    assert official_test_ids(labels) == set(json.loads((raw / "test_ground_truth.json").read_text()))
    with pytest.raises(UserError, match=r"test_ground_truth.json"):
        official_test_ids(dict(sorted(labels.items())))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "ori_pqal.json").symlink_to(raw / "ori_pqal.json")
    for name, folder in (("with", raw), ("without", tmp_path / "raw")):
        setup(data="pubmedqa", raw_dir=folder, out_dir=tmp_path / name)
    files = [f"pubmedqa/{split}.jsonl" for split in SPLITS] + ["pubmedqa_mcq/test.jsonl"]
    for file in files:
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


def test_medquad_shares_no_passage(tmp_path: Path):
    raw = raw_data("medquad")
    setup(data="medquad", raw_dir=raw, out_dir=tmp_path / "a")
    setup(data="medquad", raw_dir=raw, out_dir=tmp_path / "b")
    facts: dict[str, set[tuple[str, str]]] = {}  # what a question-and-answer pair hangs on, from the raw files
    for file in sorted(raw.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            secrets = {("focus", normalise(row["focus"])), ("url", row["url"]), ("answer", normalise(row["answer"]))}
            facts.setdefault(row["question"].strip() + row["answer"].strip(), set()).update(secrets)
    owner: dict[tuple[str, str], str] = {}
    counts = []
    for split in SPLITS:
        assert (tmp_path / "a/medquad" / f"{split}.jsonl").read_bytes() == (
            tmp_path / "b/medquad" / f"{split}.jsonl"
        ).read_bytes()
        rows = messages(tmp_path / "a" / "medquad", split)
        counts.append(len(rows))
        for question, answer in rows:
            for secret in facts[question["content"] + answer["content"]]:
                assert owner.setdefault(secret, split) == split
    assert counts[1:] == [300, 500] and sum(counts) == len(facts)


# --- the Hub's columns ----------------------------------------------------------------------------------------------


def test_medquad_from_the_hub_leaves_empty_answers_out(tmp_path: Path, hub: Path):
    rows = [medquad_row(i) for i in range(30)]
    rows += [medquad_row(90 + i, answer=answer) for i, answer in enumerate(["", None, "  "])]
    rows += [medquad_row(0), medquad_row(99, question=" ")]
    write_table(hub / "lavita/MedQuAD/main/data/train-00000-of-00001.parquet", rows)
    setup(data="medquad", out_dir=tmp_path / "data", validation_size=4, test_size=5)
    manifest = json.loads((tmp_path / "data/medquad/manifest.json").read_text())
    assert [manifest["splits"][f"{split}.jsonl"]["rows"] for split in SPLITS] == [21, 4, 5]
    assert manifest["dropped"] == {"empty answer": 3, "empty question": 1, "repeated question and answer": 1}
    assert (manifest["origin"], manifest["revision"]) == ("lavita/MedQuAD", "sha-of-main")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_raw_files_in_the_hubs_columns_are_read_in_every_format(tmp_path: Path, suffix: str):
    raw = tmp_path / "raw"
    write_table(raw / f"train{suffix}", [medqa_row(i) for i in range(20)])
    write_table(raw / f"test{suffix}", [medqa_row(i) for i in range(100, 106)])
    setup(data="medqa", raw_dir=raw, out_dir=tmp_path / "data", validation_size=3)
    scoring = read_rows(tmp_path / "data/medqa_mcq/test.jsonl", "scoring")
    assert len(scoring) == 6
    for row in scoring:
        number = int(row["prompt"][0]["content"].split()[1])
        assert row["choices"][row["answer"]] == medqa_row(number)["answer"]
    rows = read_rows(tmp_path / "data/medqa/train.jsonl")
    assert [sum(row["kind"] == kind for row in rows) for kind in ("answer", "letter")] == [17, 17]
    for row in rows:
        if row["kind"] == "letter":
            asked, letter = (message["content"] for message in row["messages"])
            assert f"{letter}. {row['choices'][row['answer']]}\n" in asked and asked.count("\n") == 7
    assert messages(tmp_path / "data/medqa", "test")[0][1]["content"] == scoring[0]["choices"][scoring[0]["answer"]]


def test_medqa_from_the_hub(tmp_path: Path, hub: Path):
    main = hub / "GBaker/MedQA-USMLE-4-options/main"
    write_table(main / "phrases_no_exclude_train.jsonl", [medqa_row(i) for i in range(12)] + [medqa_row(50)])
    write_table(main / "phrases_no_exclude_test.jsonl", [medqa_row(i) for i in range(50, 54)])
    setup(data="medqa", out_dir=tmp_path / "data", validation_size=2)
    manifest = json.loads((tmp_path / "data/medqa/manifest.json").read_text())
    assert [manifest["splits"][f"{split}.jsonl"]["rows"] for split in SPLITS] == [20, 4, 8]
    assert manifest["dropped"] == {"training question that is also in the test": 1}


@pytest.mark.parametrize("first", [0, 1])
def test_medmcqa_counts_options_as_its_source_does(tmp_path: Path, first: int):
    """The Hub's `cop` counts from 0, the authors' own files count from 1."""
    raw = tmp_path / "raw"
    write_table(raw / "train.json", [medmcqa_row(i, first) for i in range(16)])
    write_table(raw / "dev.json", [medmcqa_row(i, first) for i in range(100, 108)])
    write_table(raw / "test.json", [medmcqa_row(i, cop=-1) for i in range(200, 203)])
    setup(data="medmcqa", raw_dir=raw, out_dir=tmp_path / "data", validation_size=4)
    scoring = read_rows(tmp_path / "data/medmcqa_mcq/test.jsonl", "scoring")
    assert len(scoring) == 8
    for row in scoring:
        number = int(row["prompt"][0]["content"].rstrip("?").split()[-1])
        assert row["choices"][row["answer"]] == f"nerve {'abcd'[number % 4]}{number}"


def test_medmcqa_from_the_hub_leaves_unusable_questions_out(tmp_path: Path, hub: Path):
    main = hub / "openlifescienceai/medmcqa/main/data"
    odd = [medmcqa_row(50, opa="Same", opb="same"), medmcqa_row(51, opc=" "), medmcqa_row(52, cop=-1), medmcqa_row(1)]
    write_table(main / "train-00000-of-00001.parquet", [medmcqa_row(i) for i in range(20)] + odd)
    write_table(main / "validation-00000-of-00001.parquet", [medmcqa_row(i) for i in range(100, 105)])
    write_table(main / "test-00000-of-00001.parquet", [medmcqa_row(i, cop=-1) for i in range(200, 203)])
    setup(data="medmcqa", out_dir=tmp_path / "data", validation_size=4)
    manifest = json.loads((tmp_path / "data/medmcqa/manifest.json").read_text())
    assert [manifest["splits"][f"{split}.jsonl"]["rows"] for split in SPLITS] == [32, 8, 10]
    assert sorted(manifest["dropped"].values()) == [0, 1, 1, 1, 1]


def test_a_repository_of_code_is_read_from_its_parquet_copy(tmp_path: Path, hub: Path):
    """datasets runs no script of a repository; the Hub's own Parquet copy stands in."""
    repository = hub / "qiaojin/PubMedQA"
    (repository / "main").mkdir(parents=True)
    (repository / "main" / "main.py").write_text("raise SystemExit('code of a repository was run')\n")
    write_table(repository / "parquet/pqa_labeled/train/0000.parquet", [pubmedqa_row(i) for i in range(9)])
    with pytest.raises(UserError, match="not the 1,000 labelled questions"):  # read, and found to be too few
        setup(data="pubmedqa", out_dir=tmp_path / "data")


def test_an_unreachable_hub_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import httpx
    import huggingface_hub

    class Api:
        def dataset_info(self, repo_id: str, revision: str | None = None) -> Any:
            raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(UserError, match=r"cannot be reached for GBaker.*--raw_dir"):
        setup(data="medqa", out_dir=tmp_path)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "x"}, "line 3: no 'options'"),
        (medqa_row(1, options={"A": "x"}), "line 3: 'options' lacks a text"),
        (medqa_row(1, answer_idx="E"), "line 3: 'answer_idx' is 'E'"),
        (medqa_row(1, question=None), "line 3: 'question' is null"),
        (["x"], "line 3: a list, not an object"),
    ],
)
def test_a_bad_medqa_row_is_named(tmp_path: Path, row: Any, words: str):
    write_table(tmp_path / "raw/train.jsonl", [medqa_row(10), medqa_row(11), row])
    write_table(tmp_path / "raw/test.jsonl", [medqa_row(20)])
    with pytest.raises(UserError, match=f"train.jsonl, {words}"):
        setup(data="medqa", raw_dir=tmp_path / "raw", out_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([0, 4], "from 0 or from 1, but has"), ([1, 2, 3], "not clear if it counts"), ([7], "from 0 or from 1, but has")],
)
def test_unclear_medmcqa_answers_are_refused(tmp_path: Path, numbers: list[int], words: str):
    for split in ("train", "dev"):
        write_table(tmp_path / f"raw/{split}.jsonl", [medmcqa_row(i, cop=n) for i, n in enumerate(numbers)])
    with pytest.raises(UserError, match=words):
        setup(data="medmcqa", raw_dir=tmp_path / "raw", out_dir=tmp_path / "data")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no rows"),
        (b'{"question": "a", ', "line 1: not valid JSON"),
        (b'{"question": "a", "answer": 5}\n', "line 1: 'answer' is a number"),
        (b'{"answer": "a"}\n', "line 1: no 'question'"),
        (b"\xff\n", "line 1: not UTF-8"),
    ],
)
def test_a_bad_medquad_file_is_named(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "1_QA.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"1_QA.jsonl.*{words}"):
        setup(data="medquad", raw_dir=tmp_path / "raw", out_dir=tmp_path / "data")


def test_a_cut_parquet_or_json_file_is_named(tmp_path: Path):
    raw = tmp_path / "raw"
    path = write_table(raw / "train.parquet", [medquad_row(i) for i in range(50)])
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"train.parquet is not a readable Parquet file"):
        setup(data="medquad", raw_dir=raw, out_dir=tmp_path / "data")
    path.unlink()
    rewrite(write_table(raw / "train.json", [medquad_row(i) for i in range(5)]), lambda text: text[:-20])
    with pytest.raises(UserError, match=r"train.json: not valid JSON.*cut short"):
        setup(data="medquad", raw_dir=raw, out_dir=tmp_path / "data")
    (raw / "train.json").unlink()
    with pytest.raises(UserError, match=r"raw holds no .jsonl"):
        setup(data="medquad", raw_dir=raw, out_dir=tmp_path / "data")


@pytest.mark.parametrize(
    ("questions", "truth", "words"),
    [
        ([], {}, "does not hold a JSON object"),
        ({"1": {"QUESTION": "a"}}, {"1": "yes"}, "question 1: not an object with QUESTION, CONTEXTS"),
        ({"1": {"QUESTION": "a", "CONTEXTS": "b", "LONG_ANSWER": "", "final_decision": "no"}}, {"1": "no"}, "contexts"),
        ({"1": {"QUESTION": "a", "CONTEXTS": ["b"], "LONG_ANSWER": "", "final_decision": "si"}}, {"1": "no"}, "'si'"),
        (
            {"1": {"QUESTION": "a", "CONTEXTS": ["b"], "LONG_ANSWER": "", "final_decision": "no"}},
            {"2": "no"},
            "lacks 1",
        ),
        (
            {"1": {"QUESTION": "a", "CONTEXTS": ["b"], "LONG_ANSWER": "", "final_decision": "no"}},
            {"2": "?"},
            "ids with",
        ),
    ],
)
def test_bad_pubmedqa_files_are_named(tmp_path: Path, questions: Any, truth: Any, words: str):
    (tmp_path / "ori_pqal.json").write_text(json.dumps(questions))
    (tmp_path / "test_ground_truth.json").write_text(json.dumps(truth))
    with pytest.raises(UserError, match=words):
        setup(data="pubmedqa", raw_dir=tmp_path, out_dir=tmp_path / "data")


# --- one's own file -------------------------------------------------------------------------------------------------


def test_every_accepted_form_becomes_messages(tmp_path: Path):
    user, assistant = {"role": "user", "content": "Q0"}, {"role": "assistant", "content": "A0"}
    system = {"role": "system", "content": "S"}
    rows = [
        {"messages": [system, user, assistant], "kind": "own"},
        {"prompt": "Q1", "completion": "A1"},
        {"prompt": [system, {"role": "user", "content": "Q2"}], "completion": [{"role": "assistant", "content": "A2"}]},
        {"instruction": "Q3", "input": "more", "output": "A3"},
        {"instruction": "Q4", "input": "", "output": "A4"},
        {"question": "Q5", "answer": "A5"},
        {"question": "Q5", "answer": "A5"},
    ]
    file = write_table(tmp_path / "mine.jsonl", rows)
    setup(data="jsonl", file=file, out_dir=tmp_path / "data", name="mine")
    found = [m for split in SPLITS for m in messages(tmp_path / "data" / "mine", split)]
    texts = sorted((m[-2]["content"], m[-1]["content"]) for m in found)
    assert texts == [("Q0", "A0"), ("Q1", "A1"), ("Q2", "A2"), ("Q3\n\nmore", "A3"), ("Q4", "A4"), ("Q5", "A5")]
    manifest = json.loads((tmp_path / "data/mine/manifest.json").read_text())
    assert manifest["dropped"] == {"repeated row": 1} and manifest["name"] == "mine"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json}", "line 4: not valid JSON"),
        ('"text"', "line 4: it is a text"),
        ("{}", "line 4: it is an empty object"),
        ('{"text": "a"}', "line 4: .*continued pretraining on raw text is not available"),
        ('{"question": "a", "reply": "b"}', "line 4: it has the fields 'question', 'reply'"),
        ('{"prompt": 5, "completion": "a"}', "line 4: 'prompt' must be a text"),
        ('{"prompt": "a", "completion": ""}', 'line 4: "completion" is empty'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 4: it has no answer: no message of role assistant"),
    ],
)
def test_a_bad_line_of_ones_own_file_is_named(tmp_path: Path, line: str, words: str):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=f"(?s)mine.jsonl, {words}"):
        setup(data="jsonl", file=file, out_dir=tmp_path / "data")


def test_too_few_rows_for_three_splits_are_refused(tmp_path: Path):
    file = write_table(tmp_path / "mine.jsonl", [{"question": "a", "answer": str(i)} for i in range(9)])
    with pytest.raises(UserError, match=r"split is empty"):  # one question, so one split
        setup(data="jsonl", file=file, out_dir=tmp_path / "data")
    file.write_text("")
    with pytest.raises(UserError, match=r"mine.jsonl holds no rows"):
        setup(data="jsonl", file=file, out_dir=tmp_path / "data")


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        ("labelled", {"completion": "An answer", "label": False}),
        ("verifiable", {"answers": ["an answer", "another"]}),
        ("scoring", {"choices": ["a", "b"], "answer": 1}),
    ],
)
def test_ones_own_prompts_with_what_is_judged_keep_their_shape(tmp_path: Path, shape: str, fields: dict[str, Any]):
    rows = [{"prompt": f"Question {i}?", **fields} for i in range(20)]
    setup(data="jsonl", file=write_table(tmp_path / "mine.jsonl", rows), out_dir=tmp_path / "data")
    found = [row for split in SPLITS for row in read_rows(tmp_path / "data/jsonl" / f"{split}.jsonl", shape)]
    assert len(found) == 20 and json.loads((tmp_path / "data/jsonl/manifest.json").read_text())["shape"] == shape
    turns = {"completion": [{"role": "assistant", "content": "An answer"}]} if shape == "labelled" else {}
    assert all(row == {"prompt": row["prompt"], **fields, **turns} for row in found)
    broken = write_table(tmp_path / "broken.jsonl", [*rows, {"prompt": "And?", **{name: [""] for name in fields}}])
    with pytest.raises(UserError, match=r"(?s)broken.jsonl, line 21: .*A row is .*the shape of the first row"):
        setup(data="jsonl", file=broken, out_dir=tmp_path / "data", name="broken")


def test_ones_own_conversations_keep_what_rewards_read(tmp_path: Path):
    rows = [{"question": f"Q{i}", "answer": f"A{i}", "answers": [f"A{i}", "x"]} for i in range(20)]
    setup(data="jsonl", file=write_table(tmp_path / "mine.jsonl", rows), out_dir=tmp_path / "data")
    assert all(len(row["answers"]) == 2 for row in read_rows(tmp_path / "data/jsonl/train.jsonl"))
