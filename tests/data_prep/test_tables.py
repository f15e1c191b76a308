"""Files of rows in every format: what is read, and what is said about one that cannot be."""

import gzip
import json
from pathlib import Path

import pytest

from data_prep.tables import read_table
from workflows.errors import UserError

ROWS = [{"question": "Ä?\u2028b", "answer": 'a,\n"b"'}, {"question": "c", "answer": "d"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def csv_with(comma: str) -> bytes:
    return f'question{comma}answer\r\n"Ä?\u2028b"{comma}"a,\n""b"""\r\n\r\nc{comma}d\r\n'.encode()


CSV = csv_with(",").decode()
FILES = {
    "lines.jsonl": LINES.encode(),
    "lines.JSONL": LINES.encode(),
    "lines.ndjson": LINES.encode(),
    "lines.json": LINES.encode(),
    "marked.jsonl": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode(),
    "wide.jsonl": LINES.encode("utf-16"),
    "big.jsonl": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "wider.jsonl": LINES.encode("utf-32"),
    "zipped.jsonl.gz": gzip.compress(LINES.encode(), mtime=0),
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "wrapped_line.json": json.dumps({"rows": ROWS, "total": 2}).encode(),
    "wrapped.jsonl": json.dumps({"data": ROWS}, indent=1).encode(),
    "table.csv": CSV.encode(),
    "marked.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "wide.csv": CSV.encode("utf-16"),
    "semicolons.csv": csv_with(";"),
    "zipped.CSV.GZ": gzip.compress(CSV.encode(), mtime=0),
    "table.tsv": csv_with("\t"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    broken: list[str] = []
    assert read_table(path, broken).rows == ROWS
    assert broken == []


def test_a_conversation_by_itself_is_a_row(tmp_path: Path):
    row = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "one.json").write_text(json.dumps(row, indent=1))
    assert read_table(tmp_path / "one.json").rows == [row]


def test_rows_know_their_lines(tmp_path: Path):
    (tmp_path / "a.csv").write_text('a,b\n"1\n2",3\n\n4,5\n')
    assert [read_table(tmp_path / "a.csv").place(i)[-6:] for i in range(2)] == ["line 2", "line 5"]
    (tmp_path / "a.jsonl").write_text('{"a": 1}')
    assert read_table(tmp_path / "a.jsonl").place(0) == f"{tmp_path / 'a.jsonl'}, line 1"
    (tmp_path / "a.json").write_text('[{"a": 1}]')
    assert read_table(tmp_path / "a.json").place(0) == f"{tmp_path / 'a.json'}, row 1"


@pytest.mark.parametrize(
    ("name", "content", "rows", "problems"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2} tail\n{"a": 3}\n{"a": 4', 2, ["line 2: not valid JSON", "line 4: not valid"]),
        ("a.jsonl", b'nonsense\n{"a": 1}\n', 1, ["line 1: not valid JSON"]),
        ("a.jsonl", b'{"a": "\xe4"}\n{"a": 1}\n', 1, ["line 1: not UTF-8"]),
        ("a.csv", b"a,b\n1,2\n3\n4,5,6\n7,8\n", 2, ["line 3: 1 cells, 2 columns", "line 4: 3 cells, 2 columns"]),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_read_are_all_listed(
    tmp_path: Path, name: str, content: bytes, rows: int, problems: list[str]
):
    path = tmp_path / name
    path.write_bytes(content)
    broken: list[str] = []
    assert len(read_table(path, broken).rows) == rows
    assert len(broken) == len(problems)
    assert all(problem in told for told, problem in zip(broken, problems, strict=True))
    with pytest.raises(UserError, match=problems[0]):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xlsx", b"x", "is none of .jsonl.*parquet"),
        ("a.jsonl.zst", b"x", "is none of"),
        ("a", b"x", "is none of"),
        ("a.jsonl.gz", b"x", "not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "not a complete gzip file"),
        ("a.jsonl", b"\xff\xfea", "not utf-16-le text"),
        ("a.json", b'[{"a": 1},', "not valid JSON"),
        ("a.json", b'{\n "data": [\n  {"a": 1}\n', "not valid JSON"),
        ("a.jsonl", b'{\n "a": 1\n}\n{\n "a": 2\n}\n', "several JSON values.*Write one value a line"),
        ("a.json", b'{"train": [{"a": 1}], "test": [{"a": 2}]}', "several lists of rows: 'train', 'test'"),
        ("a.json", b'{"question": ["a", "b"], "answer": ["c", "d"]}', "one JSON object of columns"),
        ("a.csv", b'a,b\n"1,2\n3,4\n', "line 2: not valid CSV"),
        ("a.csv", b"a,a\n1,2\n", "two columns are named 'a'"),
        ("a.csv", b"a,b\n1,\xe4\n", "line 2: not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_cure(tmp_path: Path, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_table(tmp_path / name, [])


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(UserError, match="is a folder"):
        read_table(tmp_path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.csv"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\n")
    assert read_table(tmp_path / name).rows == []
