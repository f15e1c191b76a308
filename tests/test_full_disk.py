"""A disk that fills up while a step writes: one clear message, and what was there before is untouched.

Two stand-ins for a full disk: a limit on the size of files, chosen so that each of a step's files in turn is the first
one to fail, and a small file system in memory, filled up to so much room.
"""

import fnmatch
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.children import Child, Outcome
from tests.fuzz.fuzzing import amounts
from tests.kills.engine import Step
from tests.kills.steps import make_steps
from workflows.__main__ import main
from workflows.planning import PLANNED
from workflows.progress import PROGRESS

pytestmark = pytest.mark.rough

NAMES = ("data", "download", "lora", "dpo", "grpo", "merge", "evaluate", "export")
FEW = 3
"""How many places to fail at are tried for each step in the shorter runs; the longer ones try all files."""
DISK = 64 << 20
"""Bytes of the small file system."""


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, child: Child) -> dict[str, Step]:
    """Each step with the settings of a run that stands there finished (`earlier`) and of one that comes after it."""
    work = tmp_path_factory.mktemp("steps")
    made = make_steps(work)
    export, types = made["export"], ["--quantize", "[f16,q8_0]"]
    made["export"] = replace(export, command=[*export.command, *types], earlier=[*export.earlier, *types])
    other = [part.replace("hf/one", "hf/two") for part in made["download"].command]
    made["download"] = replace(made["download"], earlier=other)
    merge = {}
    for name, command in (("one", made["lora"].earlier), ("two", made["lora"].command)):
        check(child.run(main, [*command, "--out_dir", str(work / name), "--train.max_steps", "2"]))
        merge[name] = ["merge", "--checkpoint_dir", f"{work / name}/final", "--out_dir", str(work / "merge" / "merged")]
    made["merge"] = Step("merge", work / "merge", merge["two"], merge["one"])
    return {name: made[name] for name in NAMES}


def check(outcome: Outcome) -> None:
    """It went well."""
    assert (outcome.how, outcome.value) == ("returned", 0), outcome


def files(step: Step, folder: Path) -> dict[str, bytes | None]:
    """All that stands there (folders have no contents), but for what the step itself goes on with after a stop."""
    there = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes() if path.is_file() else None
        for name, path in there.items()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in (*step.working, "checkpoints", PROGRESS))
    }


def check_failure(outcome: Outcome, step: Step, folder: Path, before: dict[str, bytes | None]) -> None:
    """One message that names a file of the step's and what to do; and nothing has changed."""
    said = outcome.text
    assert (outcome.how, outcome.value) == ("returned", 1), outcome
    assert said.count("error") == 1 and "Traceback" not in said, said
    message = said[said.index("error: ") :]
    assert re.match(rf"error: Could not write {re.escape(str(folder))}\S*: .+\. Free some space", message), message
    assert not re.search(r"/\.[^/ ]*\.(part|old)", message), message
    after = files(step, folder)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []


def some(values: list[int], amount: str) -> list[int]:
    """All of them, or a few from end to end."""
    if amount == "many" or len(values) <= FEW:
        return values
    return [values[i * (len(values) - 1) // (FEW - 1)] for i in range(FEW)]


@amounts
@pytest.mark.parametrize("name", NAMES)
def test_a_limit_on_file_sizes(name: str, amount: str, child: Child, steps: dict[str, Step]) -> None:
    step = steps[name]
    shutil.rmtree(step.folder, ignore_errors=True)
    check(child.run(main, step.earlier))
    before = files(step, step.folder)
    # a little less than each file has: those that follow are a few bytes smaller or larger
    for limit in some(sorted({0, *(int(0.98 * len(contents)) for contents in before.values() if contents)}), amount):
        outcome = child.run(main, step.command, seconds=60, file_size=limit)
        check_failure(outcome, step, step.folder, before)
    check(child.run(main, step.command))
    assert files(step, step.folder) != before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def leave_room(disk: Path, size: int) -> None:
    """Fill the disk up to so many bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    with open(filler, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, max(1, free - size))


@amounts
@pytest.mark.parametrize("name", NAMES)
def test_a_small_disk(name: str, amount: str, child: Child, steps: dict[str, Step], disk: Path) -> None:
    step, folder = steps[name], disk / "here"
    command, earlier = (
        [part.replace(str(step.folder), str(folder)) for part in command] for command in (step.command, step.earlier)
    )
    check(child.run(main, earlier))
    if command[0] in PLANNED:
        command += ["--ignore_plan", "true"]  # which would say before the step begins that there is no room
    before = files(step, folder)
    total = sum(len(contents) for contents in before.values() if contents)
    for share in range(10) if amount == "many" else (0, 5):
        leave_room(disk, total * share // 10)
        check_failure(child.run(main, command, seconds=60), step, folder, before)
    (disk / "filler").unlink()
    check(child.run(main, command))
    assert files(step, folder) != before
