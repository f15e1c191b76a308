"""Data from anywhere: lines that are no JSON, rows of other shapes, values of other types."""

import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import strategies as st

from data_prep.chat_data import encode_rows
from data_prep.formats import Shape
from data_prep.prepare import setup
from data_prep.rows import SHAPES, read_rows
from tests.children import Child
from tests.conftest import CHATML, write_tokenizer
from tests.fuzz.fuzzing import amounts, fuzz, json_values, mutations, words
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.evaluation.tasks import LocalTask
from workflows.export import held_out_prompts

pytestmark = pytest.mark.rough


def prepare(name: str, contents: bytes, kinds: list[str] | None, shape: Shape | None, skip_broken: bool) -> None:
    """What `make data DATA=jsonl` does."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(contents)
        out_dir = Path(folder) / "data"
        setup("jsonl", out_dir, file=Path(folder) / name, kinds=kinds, shape=shape, skip_broken=skip_broken)


def use(checkpoint: Path, contents: bytes) -> None:
    """What training, evaluation and export do with a file; a refusal by one of them is enough."""
    template = ChatTemplate.from_checkpoint(checkpoint)
    folder = Path(tempfile.mkdtemp())
    file = folder / "test.jsonl"
    file.write_bytes(contents)
    try:
        for shape in SHAPES:
            graceful(lambda shape=shape: read_rows(file, shape))
        graceful(lambda: encode_rows(read_rows(file), template, 64))
        graceful(lambda: LocalTask("a_mcq", file, template).doc_to_text(read_rows(file, "scoring")[0]))
        graceful(lambda: held_out_prompts(folder, 3, template, 4096))
    finally:
        shutil.rmtree(folder)


def graceful(function: Callable[[], Any]) -> None:
    try:
        function()
    except UserError:
        return


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, template=CHATML)
    return path


text = words | st.text(min_size=1, max_size=20) | json_values
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "Tool", "gpt"]) | json_values, "content": text},
    optional={
        name: json_values | st.sampled_from([0, 1, "false", "T", [{"name": "f", "arguments": "{}"}]])
        for name in (
            "weight",
            "train",
            "mask",
            "thinking",
            "tool_calls",
            "function_call",
            "tool_call_id",
            "from",
            "value",
        )
    },
)
messages = st.lists(message | json_values, max_size=3) | json_values
fields: dict[str, st.SearchStrategy[Any]] = {
    "messages": messages,
    "prompt": messages | text,
    "completion": messages | text,
    "chosen": messages | text,
    "rejected": messages | text,
    "label": json_values,
    "choices": st.lists(text, max_size=4) | json_values,
    "answers": st.lists(text, max_size=4) | json_values,
    "answer": st.integers(-1, 4) | json_values,
    "question": text,
    "instruction": text,
    "input": text,
    "output": text,
    "conversations": messages,
    "system": text,
    "history": st.lists(st.lists(text, max_size=2), max_size=2) | json_values,
    "context": text,
    "tools": st.just([{"name": "f"}]) | json_values,
    "reasoning": text,
    "kto_tag": json_values,
    "options": st.dictionaries(st.sampled_from("AB"), text) | json_values,
    "solution": text,
    "document": text,
    "summary": text,
    "source": text,
    "target": text,
    "mood": json_values,
    "kind": st.sampled_from(["a", "b", 1, True]) | json_values,
    "id": json_values,
}
GOOD = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "completion": "b", "kind": "a"},
    {"instruction": "a", "input": "c", "output": "b", "kind": 1},
    {"prompt": [{"role": "user", "content": "a"}], "choices": ["b", "c"], "answer": 0},
    {"prompt": [{"role": "user", "content": "a"}], "answers": ["b", "c"]},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
    {"instruction": "a", "output": "b", "history": [["c", "d"]], "system": "e", "kto_tag": True},
    {"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [0]}},
    {"question": "a", "options": {"A": "b", "B": "c"}, "answer": "B"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"document": "a. b.", "summary": "c"},
    {"source": "a", "target": "b"},
    {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": "c"},
]
rows = st.one_of(
    st.fixed_dictionaries({}, optional=fields),
    st.tuples(st.sampled_from(GOOD), st.fixed_dictionaries({}, optional=fields)).map(
        lambda pair: {**pair[0], **pair[1]}
    ),
    st.sampled_from(GOOD),
    json_values,
)
ODD_LINES = [
    b"",
    b"   ",
    b"{",
    b"\xff\xfe",
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b"9" * 5000,
    b"NaN",
    b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
    b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}',
    b'{"prompt": "a", "completion": "b", "completion": 1}',
    b'{"prompt": "a\\u0000", "completion": "b"}',
]
lines = rows.map(lambda row: json.dumps(row).encode()) | st.sampled_from(ODD_LINES) | st.binary(max_size=9)
good_line = st.integers(0, 99).map(
    lambda i: json.dumps({"prompt": f"{i}?", "completion": f"{i}", "kind": "ab"[i % 2]}).encode()
)
files = st.lists(lines, max_size=4).map(b"\n".join) | st.tuples(
    st.lists(good_line, min_size=3, max_size=8, unique=True), st.lists(rows, max_size=2)
).map(lambda p: b"\n".join([*p[0], *(json.dumps(row).encode() for row in p[1])]))
files |= mutations(b"\n".join(json.dumps(row).encode() for row in GOOD))
tables = st.lists(st.lists(words, min_size=2, max_size=2).map(",".join), min_size=1, max_size=5).map(
    lambda cells: "\n".join(["question,answer", *cells]).encode()
)
files |= mutations(b'question,answer\n"a, b","c"\nd,e\n') | tables | files.map(gzip.compress)
files |= st.sampled_from(["utf-16", "utf-32-be"]).map(lambda name: json.dumps(GOOD).encode(name))
names = st.sampled_from(["a.jsonl", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.JSONL.gz", "a.parquet", "a.txt"])
shapes = st.none() | st.sampled_from(get_args(Shape))
kinds = st.none() | st.sampled_from([["a"], ["b", "a"], ["1"], []])


@amounts
def test_a_file_of_ones_own(amount: str, child: Child) -> None:
    def check(given: tuple[str, bytes, list[str] | None, Shape | None, bool]) -> None:
        outcome = child.run(prepare, *given)
        assert outcome.is_graceful, outcome

    fuzz(amount, 90, st.tuples(names, files, kinds, shapes, st.booleans()), check)


@amounts
def test_a_prepared_file(amount: str, child: Child, checkpoint: Path) -> None:
    def check(contents: bytes) -> None:
        outcome = child.run(use, checkpoint, contents)
        assert outcome.is_graceful, outcome

    fuzz(amount, 70, files, check)
