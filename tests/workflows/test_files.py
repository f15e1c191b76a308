"""Files are whole or absent, and a full disk is explained."""

import subprocess
import sys
import textwrap

import pytest

from workflows.errors import UserError, report_all
from workflows.files import atomic_dir, atomic_file, read_json, sha256, write_json


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
