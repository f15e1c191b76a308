"""Kill a step again and again, and look at what it leaves behind: after each kill, and when it has gone on to its end.

After a kill every file under a final name must be, byte for byte, one that an undisturbed run leaves: of this run, or
of the finished one that stood there before. Folders that appear whole are all old or all new. The resumed run must end
with exactly the files of an undisturbed one, and nothing beside them.
"""

import csv
import fnmatch
import hashlib
import io
import json
import random
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.kills.server import Kill, Run, Server, is_temporary, temporaries
from workflows.progress import PROGRESS

_VARYING = {  # what two undisturbed runs differ in, too: times, memory, dates
    "metrics.json": ("seconds", "tokens_per_second", "peak_bytes", "train_seconds"),
    "results.json": ("date", "start_time", "end_time", "total_evaluation_time_seconds"),
    "metrics.csv": ("tokens_per_second", "updated_per_second", "sampled_per_second", "peak_bytes"),
}
_MOST_KILLS = 3  # in a row, before a run is let to its end

Files = dict[str, str]
"""Names relative to a folder, and the hash of each file's contents without what varies."""


@dataclass(frozen=True)
class Step:
    """A step to kill.

    Attributes:
        name: Its name.
        folder: Where it writes; everything in there belongs to it.
        command: The step and its options, as after `python -m workflows`.
        earlier: The same with other settings, for a finished run that stands in the folder before; None if the step
            refuses to replace one.
        whole: Folders that appear whole or not at all.
        marker: A file that says that all is there; None where that is a whole folder.
        working: Patterns of files that grow while the step runs and are read with that in mind.
    """

    name: str
    folder: Path
    command: list[str]
    earlier: list[str] | None = None
    whole: tuple[str, ...] = ()
    marker: str | None = None
    working: tuple[str, ...] = ()


@dataclass
class Tally:
    """What happened to a step.

    Attributes:
        kills: Kills that hit a living process.
        in_save: Those of them that left a temporary file or folder behind.
        resumed: Runs started after a kill.
        ended: Sequences of kills whose last run ended by itself.
        identical: Those of them that ended like an undisturbed run.
        problems: What was found, in words.
    """

    kills: int = 0
    in_save: int = 0
    resumed: int = 0
    ended: int = 0
    identical: int = 0
    problems: list[str] = field(default_factory=list)


def files_of(folder: Path) -> Files:
    """Every file below a folder, hidden ones too."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(contents(path)).hexdigest() for path in paths}


def contents(path: Path) -> bytes:
    """A file's bytes; without what varies from run to run where the file has such."""
    data = path.read_bytes()
    varying = _VARYING.get(path.name)
    if varying is None or not data:
        return data
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(data.decode())))
        return json.dumps([{key: row[key] for key in row if key not in varying} for row in rows]).encode()
    value = json.loads(data)
    return json.dumps({key: value[key] for key in value if key not in varying}).encode()


class Bench:
    """One step with its undisturbed runs, ready to be killed."""

    def __init__(self, server: Server, step: Step, work: Path) -> None:
        """Run the step undisturbed: into an empty folder, and over an earlier result.

        Args:
            server: Runs the steps.
            step: The step.
            work: A folder for the earlier result.

        Raises:
            AssertionError: If an undisturbed run fails, or its files depend on what stood there before.
        """
        self.server, self.step, self.saved = server, step, work / f"{step.name}-earlier"
        self.tally = Tally()
        self.undisturbed: dict[bool, Run] = {}  # by whether there was an earlier result
        self._reset(over=False)
        self.undisturbed[False] = self._run_to_end(step.command)
        self.new = files_of(step.folder)
        self.old: Files = {}
        if step.earlier is not None:
            self._reset(over=False)
            self._run_to_end(step.earlier)
            self.old = files_of(step.folder)
            shutil.copytree(step.folder, self.saved)
            self.undisturbed[True] = self._run_to_end(step.command)
            assert not (odd := differences(self.new, files_of(step.folder))), odd

    def kill(self, kills: int, seed: int, sent: signal.Signals = signal.SIGKILL) -> Tally:
        """Kill the step so many times.

        Args:
            kills: How many kills that hit.
            seed: Decides where the kills fall; moments vary with the machine's speed nevertheless.
            sent: By which signal.
        """
        sequence = 0
        while self.tally.kills < kills and sequence < 8 + 4 * kills and len(self.tally.problems) < 5:
            rng = random.Random(f"{seed}-{self.step.name}-{sequence}")
            over = self.step.earlier is not None and rng.random() < 0.5
            wanted = min(rng.choice((1, 1, 2, _MOST_KILLS)), kills - self.tally.kills)
            self._sequence(rng, over, wanted, sent, f"{self.step.name}, seed {seed}, sequence {sequence}")
            sequence += 1
        return self.tally

    def _sequence(self, rng: random.Random, over: bool, wanted: int, sent: signal.Signals, name: str) -> None:
        """Start, kill, start again, … and let the last run end."""
        self._reset(over)
        story = [f"{name}, {'over an earlier result' if over else 'into an empty folder'}"]
        done = 0
        while True:
            kill = self._draw(rng, over, sent) if done < wanted else None
            before = _states(self.step.folder)
            run = self.server.run(self.step.command, self.step.folder, kill)
            self.tally.resumed += done > 0
            if not run.killed:
                break
            done += 1
            story.append(f"killed {kill}, {run.seconds:.2f} s old")
            self.tally.kills += 1
            self.tally.in_save += bool(_states(self.step.folder) - before)
            if problems := self._problems_after_kill(self.old if over else {}):
                self.tally.problems.append("\n  ".join([*story, *problems]))
                return
        self.tally.ended += 1
        odd = [f"it ended with {run.code}; see {self.server.log}"] if run.code else []
        odd += differences(self.new, files_of(self.step.folder))
        if odd:
            self.tally.problems.append("\n  ".join([*story, "then let to its end", *odd]))
        else:
            self.tally.identical += 1

    def _draw(self, rng: random.Random, over: bool, sent: signal.Signals) -> Kill:
        """At any moment, while a temporary file or folder is there, or right before a change to the folder."""
        run = self.undisturbed[over]
        sort = rng.choices(("moment", "temporary", "change"), (2, 1, 1))[0]
        if sort == "temporary" and run.temporaries:
            name = rng.choice(sorted(run.temporaries))
            return Kill(rng.uniform(0, run.temporaries[name]), temporary=name, sent=sent)
        if sort == "change" and sent == signal.SIGKILL:
            return Kill(change=rng.randint(1, len(run.changes)))
        return Kill(rng.uniform(0, run.seconds), sent=sent)

    def _problems_after_kill(self, old: Files) -> list[str]:
        """What of the files that stand there is not as an undisturbed run leaves it.

        Args:
            old: The files of the result that stood there before.
        """
        step, new = self.step, self.new
        there = files_of(step.folder)
        final = {name: there[name] for name in there if not is_temporary(name) and not self._is_working(name)}
        problems = [
            f"{name} is neither the old nor the new one"
            for name, found in final.items()
            if found not in (old.get(name), new.get(name))
        ]
        for folder in step.whole:
            found, before, after = (below(folder, files) for files in (final, old, new))
            aside = below(str(Path(folder).with_name(f".{Path(folder).name}.old")), there)
            if found not in (before, after) and not (not found and aside in (before, after)):
                problems.append(f"{folder} is neither absent nor all old nor all new")
        undisturbed = [{n: side[n] for n in side if not self._is_working(n)} for side in (old, new)]
        if step.marker in final and final not in undisturbed:
            problems.append(f"{step.marker} says that all is there, but the files are not of one run")
        for name in there:
            if self._is_working(name) and Path(name).suffix == ".pth":
                torch.load(step.folder / name, weights_only=True)
        return problems

    def _is_working(self, name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in (PROGRESS, *self.step.working))

    def _reset(self, over: bool) -> None:
        shutil.rmtree(self.step.folder, ignore_errors=True)
        if over:
            shutil.copytree(self.saved, self.step.folder)
        else:
            self.step.folder.mkdir(parents=True)

    def _run_to_end(self, command: list[str]) -> Run:
        run = self.server.run(command, self.step.folder)
        assert run.code == 0, f"{' '.join(command)} ended with {run.code}; see {self.server.log}"
        assert not temporaries(self.step.folder)
        return run


def below(folder: str, files: Files) -> Files:
    """The files inside one folder, by their names there."""
    return {name.removeprefix(f"{folder}/"): files[name] for name in files if name.startswith(f"{folder}/")}


def differences(expected: Files, found: Files) -> list[str]:
    """What differs between two folders, in words."""
    return [
        f"{name} is {'missing' if name not in found else 'too much' if name not in expected else 'another'}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]


def _states(folder: Path) -> set[tuple[str, int, int]]:
    """Temporary files and folders, each with what tells it from an earlier one of the same name."""
    found = set()
    for path in temporaries(folder).values():
        state = path.stat()
        found.add((str(path), state.st_ino, state.st_mtime_ns))
    return found
