"""A folder in which the real Makefile runs, with a script in the place of Python."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Project:
    """A folder with the Makefile and what it reads.

    Attributes:
        root: The folder.
        variables: Variables that each call has; those of a call itself take precedence.
    """

    root: Path
    variables: tuple[str, ...] = ()

    def make(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run make; `make test` hands its own flags and variables down in the environment, which is left out here."""
        python = f"PY={sys.executable} stand_in.py"
        return subprocess.run(
            ["make", python, "INSTALLED=installed", *self.variables, *args],
            cwd=self.root,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, *args: str) -> list[list[str]]:
        """The steps that `make ARGS` runs, each with its arguments."""
        log = self.root / "calls.jsonl"
        log.unlink(missing_ok=True)
        result = self.make(*args)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def announced(self) -> list[list[str]]:
        """The stages that the demo has announced so far, each with its arguments."""
        log = self.root / "stages.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def steps(self, *args: str) -> list[str]:
        """The names of the steps that `make ARGS` runs."""
        return [step for step, *_ in self.calls(*args)]

    def refusal(self, *args: str) -> str:
        """What make says when it refuses, before any step has run."""
        (self.root / "calls.jsonl").unlink(missing_ok=True)
        result = self.make(*args)
        assert result.returncode != 0 and not (self.root / "calls.jsonl").exists(), result.stdout
        return result.stderr


def option(call: list[str], name: str) -> str:
    """The value of an option of a call."""
    return call[call.index(name) + 1]
