"""Tables of raw data: files and data sets of the Hugging Face Hub, each row with its place.

A file is JSONL, JSON (a list, an object with one list in it, or one object per line), CSV, TSV or Parquet; the text
formats may be compressed with gzip, and are UTF-8, or UTF-16 or UTF-32 with a byte-order mark.

From the Hub, data comes through `datasets`, which runs no code of the repository. Where a repository holds nothing but
such code, the Parquet copy that the Hub itself keeps of it (revision `refs/convert/parquet`) is read.
"""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.rows import Row, parse_line, type_name
from workflows.errors import UserError, first_line
from workflows.files import no_room_explained, sha256
from workflows.untrusted import parse_json

PARQUET_REVISION = "refs/convert/parquet"
_SUFFIXES = (".jsonl", ".json", ".parquet")
_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_ONE_ROW = ("messages", "conversations", "conversation", "prompt", "chosen")
"""Fields with lists of objects that are messages of a row; any other such list of a JSON object holds the rows."""
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SPLIT_WORDS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLIT_WORDS |= {"dev": "validation", "test": "test"}
_OFFLINE = (
    "Check the connection and run again, or download the files by other means and name their folder by --raw_dir."
)


@dataclass(frozen=True)
class Table:
    """Rows of one file or Hub split.

    Attributes:
        name: The file or the Hub split, for messages.
        rows: The rows.
        numbers: Each row's line in a JSONL file, or None where rows have no lines.
    """

    name: str
    rows: list[Row]
    numbers: list[int] | None = None

    def place(self, index: int) -> str:
        """Where a row came from, for messages."""
        return self.places([index])

    def places(self, indices: Sequence[int], most: int = 5) -> str:
        """Return where some rows came from, for messages: neighbours as a range, and a limited number of ranges."""
        numbers = [self.numbers[index] if self.numbers else index + 1 for index in indices]
        ranges: list[list[int]] = []
        for number in numbers:
            if ranges and number == ranges[-1][1] + 1:
                ranges[-1][1] = number
            else:
                ranges.append([number, number])
        shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:most]]
        word = ("line" if self.numbers else "row") + "s" * (len(numbers) > 1)
        return f"{self.name}, {word} {', '.join([*shown, '…'] if len(ranges) > most else shown)}"

    def require(self, columns: dict[str, type | tuple[type, ...]]) -> None:
        """Make sure that every row has these columns with values of these types.

        Raises:
            UserError: If the table is empty or a value is missing or of another type; with the row's place.
        """
        if not self.rows:
            raise UserError(f"{self.name} holds no rows. Is it the right file, and whole?")
        for index, row in enumerate(self.rows):
            if not isinstance(row, dict):
                raise UserError(f"{self.place(index)}: {type_name(row)}, not an object with {', '.join(columns)}.")
            for column, kind in columns.items():
                if column not in row:
                    found = ", ".join(map(str, row)) or "nothing"
                    raise UserError(f"{self.place(index)}: no {column!r} (it has {found}).")
                if not isinstance(row[column], kind) or isinstance(row[column], bool):
                    raise UserError(
                        f"{self.place(index)}: {column!r} is {type_name(row[column])}, which it must not be."
                    )


def read_table(path: Path, broken: list[str] | None = None) -> Table:
    """Read a file of rows; see the module's docstring for the formats.

    Args:
        path: The file.
        broken: Where the lines that cannot be read are added, each with its place; None raises at the first.

    Raises:
        UserError: If the file is missing, malformed as a whole or of another format; with the line where there is one.
    """
    if not path.is_file():
        raise UserError(f"{path} is a folder; name a file." if path.is_dir() else f"{path} does not exist.")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if zipped else suffixes)[-1:] or [""]
    if suffix == [".parquet"] and not zipped:
        return _read_parquet(path)
    if suffix[0] not in _TEXT_SUFFIXES:
        known = ", ".join(dict.fromkeys((*_TEXT_SUFFIXES, ".parquet")))
        raise UserError(f"{path} is none of {known} (all but .parquet may end in .gz). Convert it to one of them.")
    content = _utf8(path, _unzipped(path) if zipped else path.read_bytes())
    if suffix[0] in (".csv", ".tsv"):
        return _read_csv(path, content, "\t" if suffix == [".tsv"] else ",", broken)
    return _read_json(path, content, broken)


def _unzipped(path: Path) -> bytes:
    try:
        with gzip.open(path) as f:
            return f.read()
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path} is not a complete gzip file ({first_line(e)}). Download or copy it again.") from None


def _utf8(path: Path, content: bytes) -> bytes:
    """The content in UTF-8, without a byte-order mark."""
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            content = content[len(mark) :]
            if encoding == "utf-8":
                return content
            try:
                return content.decode(encoding).encode()
            except UnicodeError as e:
                raise UserError(f"{path}: not {encoding} text ({e}); save it as UTF-8.") from None
    return content


def _read_json(path: Path, content: bytes, broken: list[str] | None) -> Table:
    """Rows of JSON text: a row a line, or one JSON value that holds them."""
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    if not lines:
        return Table(str(path), [])
    if len(lines) == 1 or not _is_json(lines[0][1]):
        try:
            value = parse_json(content.decode(), unique_names=True)
            rows = _rows_within(path, value)
            return Table(str(path), rows, [lines[0][0]] if rows == [value] else None)
        except UnicodeDecodeError as e:
            if path.name.lower().endswith((".json", ".json.gz")):
                raise UserError(f"{path}: not UTF-8 text ({e.reason}); save it as UTF-8.") from None
        except ValueError as e:
            by_name = path.name.lower().endswith((".json", ".json.gz"))
            one_value = by_name or content.lstrip().startswith(b"[") or lines[0][1].strip() == b"{"
            if one_value and not (isinstance(e, json.JSONDecodeError) and e.msg == "Extra data"):
                raise UserError(f"{path}: not valid JSON ({e}). Fix it there; the file may be cut short.") from None
            if one_value:
                raise UserError(
                    f"{path}: several JSON values ({e}). Write one value a line (JSONL), or one list of all."
                ) from None
    rows, numbers = [], []
    for number, line in lines:
        try:
            rows.append(parse_line(path, number, line))
            numbers.append(number)
        except UserError as e:
            if broken is None:
                raise
            broken.append(str(e))
    return Table(str(path), rows, numbers)


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line.decode())
    except ValueError:
        return False
    return True


def _rows_within(path: Path, value: Any) -> list[Any]:
    """The rows of a JSON value: a list, an object with one list of objects in it, or a row by itself."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or any(name in value for name in _ONE_ROW):
        return [value]
    lists = {name: rows for name, rows in value.items() if isinstance(rows, list) and any(map(_is_object, rows))}
    if len(lists) > 1:
        names = ", ".join(map(repr, lists))
        raise UserError(f"{path} is one JSON object with several lists of rows: {names}. Save one of them as a list.")
    if lists:
        return next(iter(lists.values()))
    if value and all(isinstance(column, list | dict) for column in value.values()):
        raise UserError(
            f"{path} is one JSON object of columns ({', '.join(map(repr, value))}). Save it by rows: a list, "
            'or an object a line (pandas: orient="records").'
        )
    return [value]


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _read_csv(path: Path, content: bytes, delimiter: str, broken: list[str] | None) -> Table:
    try:
        text = content.decode()
    except UnicodeDecodeError as e:
        number = content.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}, line {number}: not UTF-8 text ({e.reason}); save it as UTF-8.") from None
    header = text.partition("\n")[0]
    if delimiter == "," and "," not in header:  # spreadsheets of many countries write semicolons
        delimiter = next((other for other in (";", "\t") if other in header), delimiter)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    numbers: list[int] = []
    names: list[str] = []
    for number, cells in _records(path, reader):
        if not names:
            names = cells
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise UserError(f"{path}, line {number}: two columns are named {twice[0]!r}. Rename one of them.")
        elif len(cells) != len(names):
            problem = f"{path}, line {number}: {len(cells)} cells, {len(names)} columns. Quote texts with {delimiter!r}"
            if broken is None:
                raise UserError(f"{problem}.")
            broken.append(f"{problem}.")
        else:
            rows.append(dict(zip(names, cells, strict=True)))
            numbers.append(number)
    return Table(str(path), rows, numbers)


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Records of a CSV file that are not empty, each with the line on which it begins."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise UserError(f"{path}, line {number}: not valid CSV ({e}). Close or double the quotes there.") from None
        if any(cell.strip() for cell in cells):
            yield number, cells


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path} is not a readable Parquet file ({str(e).splitlines()[0]}). Get it again.") from None
    return Table(str(path), rows)


def read_folder(raw_dir: Path, ignore: Iterable[str] = ()) -> tuple[dict[str, list[Table]], dict[str, str]]:
    """Read all tables of a folder (and the folders in it), by the split that their paths name.

    Args:
        raw_dir: The folder.
        ignore: Names of files to leave out.

    Returns:
        Tables by split ("train" where a path names none), and the files' sha256.

    Raises:
        UserError: If there is no table, or one is malformed.
    """
    files = sorted(path for path in raw_dir.rglob("*") if path.suffix in _SUFFIXES and path.name not in ignore)
    if not files:
        raise UserError(
            f"{raw_dir} holds no {', '.join(_SUFFIXES)} file. Name the folder with the raw files by --raw_dir."
        )
    tables: dict[str, list[Table]] = {}
    for file in files:
        tables.setdefault(_named_split(file.relative_to(raw_dir)), []).append(read_table(file))
    return tables, {str(file.relative_to(raw_dir)): sha256(file) for file in files}


def _named_split(path: Path) -> str:
    words = "".join(c if c.isalpha() else " " for c in str(path.with_suffix("")).lower()).split()
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), "train")


def read_hub(hub_id: str, config: str | None = None) -> tuple[dict[str, list[Table]], str]:
    """Read all splits of a data set on the Hugging Face Hub into memory; arguments and errors are `hub_splits`'.

    Returns:
        One table per split, and the commit that was read.
    """
    loaded, commit = hub_splits(hub_id, config)
    return {str(split): [Table(f"{hub_id} ({split})", rows.to_list())] for split, rows in loaded.items()}, commit


def hub_splits(hub_id: str, config: str | None = None) -> tuple[dict[str, Any], str]:
    """Fetch a data set of the Hugging Face Hub.

    Args:
        hub_id: `ORG/NAME`.
        config: The configuration ("subset"), where there are several.

    Returns:
        A `datasets.Dataset` per split, mapped from the Hub's cache, and the commit that was read.

    Raises:
        UserError: If it cannot be had: no network, no such data set, no access.
    """
    import datasets
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    try:
        with no_room_explained(Path(datasets.config.HF_CACHE_HOME)):
            commit = api.dataset_info(hub_id).sha
            try:
                loaded = datasets.load_dataset(hub_id, config, revision=commit)
            except RuntimeError as e:
                if "scripts are no longer supported" not in str(e):
                    raise
                commit = api.dataset_info(hub_id, revision=PARQUET_REVISION).sha
                loaded = datasets.load_dataset(hub_id, data_dir=config or "default", revision=commit)
    except datasets.exceptions.DatasetNotFoundError as e:
        raise UserError(f"The Hub has no data set {hub_id} that you may read ({e}). Is HF_TOKEN needed?") from None
    except HfHubHTTPError as e:
        raise UserError(f"The Hub refused {hub_id} ({first_line(e)}). If it wants a login, set HF_TOKEN.") from None
    except datasets.exceptions.DatasetsError as e:
        raise UserError(f"{hub_id} cannot be read ({first_line(e)}). {_OFFLINE}") from None
    except (httpx.HTTPError, OSError, RuntimeError) as e:  # hf_xet raises bare RuntimeErrors
        raise UserError(f"The Hugging Face Hub cannot be reached for {hub_id} ({first_line(e)}). {_OFFLINE}") from None
    return loaded, str(commit)
