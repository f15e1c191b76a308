"""Files that are whole or absent: atomic writes, hashes, JSON, and a readable word for a full disk."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from workflows.errors import UserError
from workflows.untrusted import parse_json

_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "file too large"}
# What torch's zip writer and safetensors' Rust writer say when a write is cut short; neither keeps the errno.
_WRITER_FAILED = (
    "PytorchStreamWriter failed",
    "unexpected pos",
    "iostream error",
    "No space left on",
    "File too large",
)
_TEMPORARY = re.compile(r"\..+\.(\d+)\.part(\.[^.]*)?")
"""What `atomic_file` calls a file that is being written; the number is the writing process's."""


@contextmanager
def no_room_explained(path: Path) -> Iterator[None]:
    """Turn the many faces of "no room to write" into one `UserError` that names the file.

    Raises:
        UserError: If the body failed because the disk, quota or file-size limit was reached.
    """
    try:
        yield
    except OSError as e:
        # numpy's tofile says "N requested and M written" and keeps no errno
        cause = _NO_ROOM.get(e.errno or 0) or (_NO_ROOM[errno.ENOSPC] if "requested and" in str(e) else None)
        if cause is None:
            raise
        raise UserError(_no_room_message(path, cause)) from e
    except Exception as e:  # torch: RuntimeError; safetensors: its own class, imported only where used
        if not any(words in str(e) for words in _WRITER_FAILED):
            raise
        raise UserError(_no_room_message(path, "the disk is full or a file-size limit was reached")) from e


def _no_room_message(path: Path, cause: str) -> str:
    named = (part for part in path.parts if part != _UPDATE)
    final = Path(*(found[1] if (found := re.fullmatch(r"\.(.+)\.part", part)) else part for part in named))
    return f"Could not write {final}: {cause}. What was there before is intact. Free some space and run the step again."


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it onto `path` only if the body ends well.

    The file is flushed to the disk before the rename, so that a power cut cannot leave an empty file under the final
    name. Temporary files that killed processes left in the same folder are deleted first.

    Args:
        path: The final name. Its folder is made if needed.

    Yields:
        The temporary path to write to (same suffix as `path`).

    Raises:
        UserError: If there is no room for the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(path.parent)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with no_room_explained(path):
            yield temporary
            _flush(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    with open(file, "rb") as f:
        os.fsync(f.fileno())


def _delete_leftovers(folder: Path) -> None:
    """Delete temporary files whose writer was killed; another process may be writing at this moment, its stay."""
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _may_be_writing(int(found[1]), path):
            path.unlink(missing_ok=True)


def _may_be_writing(pid: int, file: Path) -> bool:
    """Whether a process lives that has this number and is older than the last write; numbers are given out anew."""
    try:
        return psutil.Process(pid).create_time() < file.stat().st_mtime + 1  # clocks tick in fractions of a second
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Like `atomic_file` for a folder: the body fills a temporary sibling, which then takes the place of `path`.

    A folder cannot be renamed onto a full one, so an existing `path` steps aside as `.NAME.old` for the moment between
    two renames; if the process dies in that moment, `recover_dir` puts it back.

    Yields:
        An empty temporary folder to fill.

    Raises:
        UserError: If there is no room for a file in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, _ = _beside(path)
    recover_dir(path)
    temporary.mkdir()
    try:
        with no_room_explained(path):
            yield temporary
            _flush_all(temporary)
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            _flush(file)


def _put_in_place(folder: Path, path: Path) -> None:
    temporary, old = _beside(path)
    if path.exists():
        path.rename(old)
    folder.rename(path)
    if old.exists():
        old.rename(temporary)  # deleted under this name, for half a folder must not be found under the other
        shutil.rmtree(temporary)


@contextmanager
def atomic_update(path: Path, last: Sequence[str], kept: str | None = None) -> Iterator[Path]:
    """Replace several files and folders of a folder that holds others too; if the body fails, nothing has changed.

    The body fills a temporary folder, whose contents then take their places in `path` one by one. In that moment the
    files of `last` are not there: found with them, a folder is of one run.

    Args:
        path: The folder; made if needed.
        last: Files that say that all is there: deleted before the first of the others is replaced, put in their places
            after the last, in this order.
        kept: Pattern of files that a later run is given again if this one is stopped, since they took long to make.

    Yields:
        The temporary folder, inside `path`.

    Raises:
        UserError: If there is no room for a file in it.
    """
    temporary = path / _UPDATE
    path.mkdir(parents=True, exist_ok=True)
    # a folder that has stepped aside, or one that was being deleted
    for left in [*path.glob(".*.old"), *(part for part in path.glob(".*.part") if part.is_dir() and part != temporary)]:
        recover_dir(path / left.stem[1:])
    temporary.mkdir(exist_ok=True)
    for leftover in temporary.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif kept is None or not leftover.match(kept):
            leftover.unlink()
    try:
        with no_room_explained(path):
            yield temporary
            _flush_all(temporary)
        for name in last:
            (path / name).unlink(missing_ok=True)
        new = {file.name: file for file in temporary.iterdir()}
        for name in [*sorted(new.keys() - set(last)), *(name for name in last if name in new)]:
            if new[name].is_dir():
                _put_in_place(new[name], path / name)
            else:
                new[name].replace(path / name)
    except BaseException as e:
        if kept is None or isinstance(e, Exception):  # what Ctrl-C stops goes on with it
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)


_UPDATE = ".update.part"


def recover_dir(path: Path) -> None:
    """Clear up after an `atomic_dir` whose process was killed: nothing half-filled stays, what stepped aside is back.

    A step that may find its folder finished calls this before it looks; `atomic_dir` does so by itself.
    """
    temporary, old = _beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and path.exists():
        old.rename(temporary)
        shutil.rmtree(temporary)
    elif old.exists():
        old.rename(path)


def _beside(path: Path) -> tuple[Path, Path]:
    """The names of a folder that is being filled, and of one that has stepped aside."""
    return path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON (2-space indent, key order kept), whole or not at all. Not-a-number is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file; the mark that some editors put at its beginning (a BOM) is no part of it.

    Raises:
        UserError: If the file is missing, a folder, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder. Name a file in it.") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}); is it the right file?") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: If the file is missing or is not such JSON; the message names the file and the line.
    """
    try:
        value = parse_json(read_text(path))
    except json.JSONDecodeError as e:
        raise UserError(f"{path}, line {e.lineno}: not valid JSON ({e.msg}). The file may be cut short.") from None
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; is it the right file?")
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
