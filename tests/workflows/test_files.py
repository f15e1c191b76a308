"""Files are whole or absent, and a full disk is explained."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest

from workflows.errors import UserError, report_all
from workflows.files import (
    atomic_dir,
    atomic_file,
    atomic_update,
    read_json,
    read_text,
    recover_dir,
    sha256,
    write_json,
)


def test_atomic_file_leaves_the_old_content_when_the_body_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_atomic_dir_replaces_a_whole_folder_or_nothing(tmp_path):
    path = tmp_path / "final"
    with atomic_dir(path) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(KeyError), atomic_dir(path) as temporary:
        (temporary / "a").write_text("2")
        raise KeyError
    assert (path / "a").read_text() == "1"
    with atomic_dir(path) as temporary:
        (temporary / "b").write_text("3")
    assert [p.name for p in path.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_atomic_dir_puts_back_what_a_killed_process_had_moved_aside(tmp_path):
    old = tmp_path / ".final.old"
    old.mkdir()
    (old / "a").write_text("kept")
    with pytest.raises(KeyError), atomic_dir(tmp_path / "final"):
        raise KeyError
    assert (tmp_path / "final" / "a").read_text() == "kept"


def test_half_a_folder_is_never_under_the_name_that_is_put_back(tmp_path, monkeypatch):
    """A kill while the old folder is being deleted, and then the user deletes the new one to make it again."""
    path = tmp_path / "final"
    for number in "12":
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt), atomic_dir(path) as temporary:
            (temporary / "a").write_text(number)
            patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    (left,) = (folder for folder in tmp_path.iterdir() if folder != path)
    assert (path / "a").read_text() == "2" and (left / "a").read_text() == "1"
    shutil.rmtree(path)
    recover_dir(path)
    assert list(tmp_path.iterdir()) == []


def test_recovery_clears_what_a_killed_process_left(tmp_path):
    for name in (".final.part", ".final.old", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    recover_dir(tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "a").read_text() == "final"


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    dead, living, older = (
        tmp_path / f".weights.{pid}.part.{suffix}"
        for pid, suffix in ((process.pid, "gguf"), (os.getppid(), "gguf"), (os.getpid(), "bin"))
    )
    ours = tmp_path / f".notes.{process.pid}.txt"
    for path in (dead, living, older, ours):
        path.write_text("half")
    os.utime(older, (0, 0))  # the number was another process's then
    write_json(tmp_path / "a.json", {})
    assert set(tmp_path.iterdir()) == {living, ours, tmp_path / "a.json"}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder, text, *, names=("a", "hf/b", "last")):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def test_atomic_update_replaces_several_things_or_nothing(tmp_path):
    fill(tmp_path, "old", names=("a", "hf/b", "hf/c", "last", "other"))
    old = contents(tmp_path)
    with pytest.raises(KeyError), atomic_update(tmp_path, last=["last"]) as fresh:
        fill(fresh, "new")
        raise KeyError
    assert contents(tmp_path) == old
    with atomic_update(tmp_path, last=["last"]) as fresh:
        fill(fresh, "new")
    assert contents(tmp_path) == {"a": "new", "hf/b": "new", "last": "new", "other": "old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "hf", "last", "other"]


def test_an_update_that_is_stopped_between_is_told_by_what_comes_last(tmp_path, monkeypatch):
    fill(tmp_path, "old")
    rename = Path.rename

    def stops(path, target):
        if path.name == "hf" and target.name == "hf":  # the old one has stepped aside
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stops)
        with pytest.raises(KeyboardInterrupt), atomic_update(tmp_path, last=["last"], kept="a*") as fresh:
            fill(fresh, "new", names=("a", "a2", "hf/b", "last", "z"))
    there = contents(tmp_path)
    assert (there["a"], there[".hf.old/b"]) == ("new", "old") and "last" not in there and "hf/b" not in there
    with atomic_update(tmp_path, last=["last"], kept="a*") as fresh:
        assert contents(fresh) == {}  # they had taken their places already
        assert (tmp_path / "hf" / "b").read_text() == "old"
        fill(fresh, "newest", names=("last",))
    assert contents(tmp_path) == {"a": "new", "a2": "new", "hf/b": "old", "last": "newest"}


def test_an_update_goes_on_with_what_a_stopped_one_is_to_keep(tmp_path):
    for kept, found in (("*.gguf", {"big.gguf": "new"}), (None, {})):
        with pytest.raises(KeyboardInterrupt), atomic_update(tmp_path, last=(), kept=kept) as fresh:
            fill(fresh, "new", names=("big.gguf", "small", "hf/big.gguf"))
            raise KeyboardInterrupt
        with pytest.raises(KeyError), atomic_update(tmp_path, last=(), kept=kept) as fresh:
            assert contents(fresh) == found
            raise KeyError
        assert list(tmp_path.iterdir()) == []


def test_a_message_names_the_file_and_not_its_temporary_place(tmp_path):
    for context in (atomic_dir(tmp_path / "final"), atomic_update(tmp_path / "final", last=())):
        with pytest.raises(UserError) as told, context as fresh, atomic_file(fresh / "a.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert str(told.value).startswith(f"Could not write {tmp_path}/final/a.txt: the disk is full.")


@pytest.mark.long
@pytest.mark.parametrize("writer", ["write_text", "torch", "safetensors"])
def test_a_full_disk_is_one_clear_message_and_the_old_file_stays(tmp_path, writer):
    path = tmp_path / "weights.bin"
    path.write_text("old")
    script = textwrap.dedent(f"""
        import resource, sys, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from workflows.errors import UserError
        from workflows.files import atomic_file, write_text
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        path, tensor = Path({str(path)!r}), torch.zeros(100_000)
        try:
            if {writer!r} == "write_text":
                write_text(path, "x" * 200_000)
            else:
                with atomic_file(path) as temporary:
                    torch.save(tensor, temporary) if {writer!r} == "torch" else save_file({{"a": tensor}}, temporary)
        except UserError as e:
            sys.exit(str(e))
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert "Free some space" in result.stderr and "Traceback" not in result.stderr
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights.bin"]


def test_bad_json_names_the_file_and_line(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"a\.json does not exist"):
        read_json(path)
    path.write_text('{"a": 1,\n"b": ')
    with pytest.raises(UserError, match=r"a\.json, line 2"):
        read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "does not hold a JSON object"),
        ('{"a": NaN}', "has no NaN"),
        ("{" + '"a":{' * 200 + "}" * 201, "nested more than 100 levels deep"),
        ('{"a":' * 50_000, "nested more than 100 levels deep"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
    ],
)
def test_json_that_python_reads_but_no_one_means_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": "\\ud83d\\ude42"}')
    assert read_json(tmp_path / "a.json") == {"a": "🙂"}


def test_json_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_all_problems_are_reported_at_once():
    report_all([])
    with pytest.raises(UserError, match=r"^only one$"):
        report_all(["only one"])
    with pytest.raises(UserError, match=r"2 problems:\n  - a\n  - b"):
        report_all(["a", "b"])


def test_an_update_clears_a_replaced_folder_whose_deletion_was_cut_short(tmp_path):
    for folder in ("hf", ".hf.part"):  # the new one is in its place, of the old one half is deleted
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights").write_text(folder)
    with atomic_update(tmp_path, last=["done"]) as fresh:
        (fresh / "hf").mkdir()
        (fresh / "hf" / "weights").write_text("new")
        (fresh / "done").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "hf"]
    assert (tmp_path / "hf" / "weights").read_text() == "new"


def test_a_mark_at_a_texts_beginning_is_no_part_of_it(tmp_path):
    (tmp_path / "text").write_bytes("é\ufeff{}".encode("utf-8-sig"))
    (tmp_path / "json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_text(tmp_path / "text") == "é\ufeff{}" and read_json(tmp_path / "json") == {}
