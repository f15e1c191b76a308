"""What a step says of itself while it runs, what is left when it is stopped, and nothing when it ends well."""

import json
import os
import shlex
import sys
from pathlib import Path

import psutil
import pytest

from workflows import progress
from workflows.progress import PROGRESS, Bar, brief, command, watched


def read(folder: Path) -> dict:
    return json.loads((folder / PROGRESS).read_text())


def test_a_bar_in_a_watched_step_is_in_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    with watched(tmp_path / "lora"):
        begun = read(tmp_path / "lora")
        assert begun["pid"] == os.getpid() and begun["born"] == psutil.Process().create_time()
        assert shlex.split(begun["command"]) == sys.orig_argv and "total" not in begun
        with Bar(total=10, initial=4, unit="step", desc="reference") as bar:
            bar.update(2)
            told = read(tmp_path / "lora")
    assert (told["done"], told["total"], told["first"], told["unit"]) == (6, 10, 4, "step")
    assert told["what"] == "reference"
    assert told["began"] <= told["updated"]
    assert list((tmp_path / "lora").iterdir()) == []


def test_the_file_is_not_written_at_every_unit(tmp_path):
    with watched(tmp_path), Bar(total=1000, unit="row") as bar:
        bar.update()
        first = (tmp_path / PROGRESS).read_bytes()
        for _ in range(50):
            bar.update()
        assert (tmp_path / PROGRESS).read_bytes() == first
        bar.update(949)
        assert read(tmp_path)["done"] == 1000  # the last one always is


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_did_not_end_well_leaves_the_file(tmp_path, end):
    with pytest.raises(end), watched(tmp_path):
        raise end
    assert read(tmp_path)["command"] == command()
    with Bar(total=1) as bar:  # of something else, afterwards
        bar.update()
    assert "done" not in read(tmp_path)


def test_only_the_first_of_several_processes_writes(tmp_path):
    with watched(tmp_path, active=False), Bar(total=1) as bar:
        bar.update()
    assert list(tmp_path.iterdir()) == []


def test_no_run_ends_because_its_progress_cannot_be_written(tmp_path, monkeypatch):
    def full(file: Path, *_: object, **__: object) -> None:
        file.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with watched(tmp_path), Bar(total=1) as bar:
        bar.update()
        assert list(tmp_path.iterdir()) == []


def test_brief_work_shows_no_bar_and_gives_every_item(capsys):
    assert list(brief(["a", "b"], "copying", "tensor")) == ["a", "b"]
    assert capsys.readouterr().err == ""
