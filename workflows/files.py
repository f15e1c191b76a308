"""Files that are whole or absent: atomic writes, hashes, JSON, and a readable word for a full disk."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workflows.errors import UserError

_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "file too large"}
# What torch's zip writer and safetensors' Rust writer say when a write is cut short; neither keeps the errno.
_WRITER_FAILED = ("PytorchStreamWriter failed", "unexpected pos", "No space left on device", "File too large")


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
    return f"Could not write {path}: {cause}. What was there before is intact. Free some space and run the step again."


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it onto `path` only if the body ends well.

    The file is flushed to the disk before the rename, so that a power cut cannot leave an empty file under the final
    name.

    Args:
        path: The final name. Its folder is made if needed.

    Yields:
        The temporary path to write to (same suffix as `path`).

    Raises:
        UserError: If there is no room for the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with no_room_explained(path):
            yield temporary
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Like `atomic_file` for a folder: the body fills a temporary sibling, which then takes the place of `path`.

    A folder cannot be renamed onto a full one, so an existing `path` steps aside as `.NAME.old` for the moment between
    two renames; if the process dies in that moment, the next call puts it back first.

    Yields:
        An empty temporary folder to fill.

    Raises:
        UserError: If there is no room for a file in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    recover_dir(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with no_room_explained(path):
            yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover_dir(path: Path) -> None:
    """Put back a folder that `atomic_dir` had moved aside when its process died."""
    old = path.with_name(f".{path.name}.old")
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old)
    else:
        old.rename(path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON (2-space indent, key order kept), whole or not at all. Not-a-number is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: If the file is missing or is not JSON; the message names the file and the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}); is it the right file?") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path}, line {e.lineno}: not valid JSON ({e.msg}). The file may be cut short.") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
