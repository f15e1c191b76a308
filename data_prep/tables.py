"""Tables of raw data: files in JSONL, JSON or Parquet, and data sets of the Hugging Face Hub, each row with its place.

From the Hub, data comes through `datasets`, which runs no code of the repository. Where a repository holds nothing but
such code, the Parquet copy that the Hub itself keeps of it (revision `refs/convert/parquet`) is read.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.rows import Row, iterate_jsonl, type_name
from workflows.errors import UserError, first_line
from workflows.files import no_room_explained, sha256
from workflows.untrusted import parse_json

PARQUET_REVISION = "refs/convert/parquet"
_SUFFIXES = (".jsonl", ".json", ".parquet")
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
        return f"{self.name}, line {self.numbers[index]}" if self.numbers else f"{self.name}, row {index + 1}"

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


def read_table(path: Path) -> Table:
    """Read a `.jsonl` or `.parquet` file, or a `.json` file that holds a list or one object per line.

    Raises:
        UserError: If the file is missing, malformed or of another sort; with the line where there is one.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".json" and path.read_text(encoding="utf-8-sig", errors="replace").lstrip().startswith("["):
        try:
            rows = parse_json(path.read_text(encoding="utf-8-sig"))
        except ValueError as e:
            raise UserError(f"{path}: not valid JSON ({e}). The file may be cut short.") from None
        return Table(str(path), rows)
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path} is none of {', '.join(_SUFFIXES)}.")
    numbered = list(iterate_jsonl(path))
    return Table(str(path), [row for _, row in numbered], [number for number, _ in numbered])


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
