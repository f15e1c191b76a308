"""Finished results on disk, so that an evaluation that was stopped is simply run again.

One JSON line per unit of work (a packed row, a batch of answers), written whole when the unit is done. The plan of
units is a function of all questions, not of those that are left, so a run that was killed and started again computes
each unit exactly as an undisturbed run does and ends with identical results.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workflows.files import no_room_explained


def request_key(kind: str, *parts: Any) -> str:
    """A name for a request: SHA-256 of everything that decides its result, besides the model."""
    return hashlib.sha256(json.dumps([kind, *parts], sort_keys=True).encode()).hexdigest()


class ResultCache:
    """Results by `request_key`, kept in memory and, if a path is given, appended to a file.

    What is finished is a unit, not a request: beside other requests a request's result may differ in its last bits.

    A half-written last line, as a kill leaves behind, is cut off. A file of another model or of other settings is
    replaced.

    Attributes:
        seconds: Time that the units took, those of earlier runs included.
        tokens: Real tokens of the units, those of earlier runs included.
    """

    def __init__(self, path: Path | None = None, identity: Mapping[str, Any] | None = None) -> None:
        """Open or start a file.

        Args:
            path: The file; None keeps results in memory only.
            identity: What the results depend on besides the request: the model's hash, the precision, ...
        """
        self.path = path
        self.seconds = 0.0
        self.tokens = 0
        self._results: dict[str, Any] = {}
        self._units: dict[tuple[str, ...], dict[str, Any]] = {}
        if path is None:
            return
        header = json.dumps({"identity": identity}, sort_keys=True).encode() + b"\n"
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        kept = len(header)
        if lines[:1] == [header]:
            for line in lines[1:]:
                if not self._read(line):
                    break
                kept += len(line)
            with open(path, "r+b") as f:
                f.truncate(kept)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with no_room_explained(path):
                path.write_bytes(header)

    def _read(self, line: bytes) -> bool:
        """Take in one line; false if it is not whole."""
        try:
            unit = json.loads(line)
            results, seconds, tokens = dict(unit["results"]), float(unit["seconds"]), int(unit["tokens"])
        except (ValueError, TypeError, KeyError):
            return False
        if not line.endswith(b"\n"):
            return False
        self._keep(results, seconds, tokens)
        return True

    def _keep(self, results: dict[str, Any], seconds: float, tokens: int) -> None:
        self._units[tuple(results)] = results
        self._results |= results
        self.seconds += seconds
        self.tokens += tokens

    def __len__(self) -> int:
        return len(self._results)

    def __getitem__(self, key: str) -> Any:
        return self._results[key]

    def has(self, keys: Sequence[str]) -> bool:
        """Whether this very unit is finished; if so, its results are those that `[]` gives from now on."""
        unit = self._units.get(tuple(keys))
        self._results |= unit or {}
        return unit is not None

    def add(self, results: Mapping[str, Any], seconds: float, tokens: int) -> None:
        """Keep a unit's results, and append them to the file as one line."""
        self._keep(dict(results), seconds, tokens)
        if self.path is not None:
            line = json.dumps({"results": results, "seconds": seconds, "tokens": tokens})
            with no_room_explained(self.path), open(self.path, "ab") as f:
                f.write(line.encode() + b"\n")

    def delete(self) -> None:
        """Remove the file: the evaluation is finished and its results are elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
