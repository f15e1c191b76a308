"""Every file runs as `python -m`, on the text that every machine has or on one's own."""

import importlib
import re
import subprocess
import sys

import pytest

from custom_models import demo
from workflows.errors import UserError


@pytest.mark.parametrize(
    ("name", "arguments", "shown"),
    [
        ("bpe", {"merges": 300}, r"\| abnormality\|"),
        ("bpe_training", {"merges": 300}, "300 merges from"),
        ("tokenizer_json", {"merges": 300}, r"equal on (\d,\d+) of \1 lines"),
        ("characters", {"text": "liver"}, "5 characters -> 5 ids"),
        ("words", {"text": "It isn't, e.g. so. No."}, r"\|It\|is\|n't\|,\|e\.g\.\|so\|\.\|"),
        ("gpt2_files", {"text": "Hello world"}, r"\|Hello\| world\|"),
    ],
)
def test_each_file_shows_itself_at_work(name, arguments, shown, english, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(english[:300_000], encoding="utf-8")
    files = {"file": tmp_path / "text.txt"} if name != "gpt2_files" else {}
    files |= {"out_file": tmp_path / "tokenizer.json"} if name == "tokenizer_json" else {}
    importlib.import_module(f"custom_models.tokenization.{name}").main(**arguments, **files)
    assert re.search(shown, capsys.readouterr().out)


def test_bad_input_is_one_message(tmp_path):
    command = [sys.executable, "-m", "custom_models.tokenization.characters", "--file", str(tmp_path / "none.txt")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == f"error: {tmp_path}/none.txt does not exist.\n"


def test_an_empty_file_or_a_folder_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"a\.txt is empty"):
        demo.read(tmp_path / "a.txt")
    with pytest.raises(UserError, match="is a folder"):
        demo.read(tmp_path)


def test_tokens_can_be_told_apart(monkeypatch):
    assert demo.separated(["a", "\n", " b"]) == "|a|↵| b|"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert demo.separated(["a", "b"]).count("\033[0m") == 2


def test_the_default_text_is_english_of_more_than_a_megabyte(english):
    assert len(english.encode()) > 1_000_000 and "abnormality" in english
