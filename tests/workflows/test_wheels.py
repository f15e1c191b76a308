"""Pinned wheels: the cache, a wrong hash, no network."""

import subprocess
import zipfile

import pytest

from workflows.errors import UserError
from workflows.files import sha256
from workflows.wheels import Wheel, fetch, open_wheel


@pytest.fixture
def served(tmp_path, monkeypatch):
    """`pip download` replaced by a copy of a small local wheel; counts its calls."""
    source = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("thing/data.txt", "hello")
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        (tmp_path / "cache").joinpath(folder.split("/")[-1], source.name).write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return Wheel("thing==1.0", sha256(source)), tmp_path / "cache", calls


def test_a_wheel_is_downloaded_once_and_read_as_an_archive(served):
    wheel, cache, calls = served
    assert open_wheel(wheel, cache).read("thing/data.txt") == b"hello"
    assert open_wheel(wheel, cache).read("thing/data.txt") == b"hello"
    assert len(calls) == 1 and "--no-deps" in calls[0]


def test_a_damaged_file_in_the_cache_is_fetched_again(served):
    wheel, cache, calls = served
    fetch(wheel, cache).write_bytes(b"cut")
    assert sha256(fetch(wheel, cache)) == wheel.sha256
    assert len(calls) == 2


def test_a_file_of_another_hash_is_refused_and_not_kept(served):
    _, cache, _ = served
    with pytest.raises(UserError, match="not the file this project was tested with"):
        fetch(Wheel("thing==1.0", "0" * 64), cache)
    assert not list(cache.rglob("*.whl"))


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    answer = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found for thing\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(UserError, match=r"No matching distribution.*\n.*by hand"):
        fetch(Wheel("thing==1.0", "0" * 64), tmp_path)
