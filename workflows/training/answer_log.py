"""The log of sampled answers, completions.jsonl: some of each logged step, with what they were worth."""

import json
import math
from pathlib import Path
from typing import Any

from workflows.files import atomic_file, no_room_explained


class AnswerLog:
    """A file that a run appends to; what a stopped run wrote of the steps that are taken again is dropped."""

    def __init__(self, file: Path) -> None:
        """Nothing is written yet: the first step to come says what is kept."""
        self.file, self._begun = file, False

    def write(self, step: int, entries: list[dict[str, Any]]) -> None:
        """Append a step's answers.

        Raises:
            UserError: If there is no room for them.
        """
        if not self._begun:
            earlier = self.file.read_text(encoding="utf-8").split("\n") if self.file.is_file() else []
            kept = "".join(line + "\n" for line in earlier if _step_of(line) < step)
            with atomic_file(self.file) as temporary:
                temporary.write_text(kept, encoding="utf-8")
            self._begun = True
        with no_room_explained(self.file), open(self.file, "a", encoding="utf-8") as f:
            f.writelines(json.dumps({"step": step, **entry}, ensure_ascii=False) + "\n" for entry in entries)


def _step_of(line: str) -> float:
    """The step that a line of the log of answers belongs to; infinity for one that a kill cut off."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf
