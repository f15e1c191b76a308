"""Programs in two languages: they mean the same, repeat themselves for a seed, and no shape is in two splits."""

import json
import random
import shutil

import pytest

from custom_models.projects.program_runs import do_the_same
from data_prep import programs
from data_prep.prepare import setup
from data_prep.programs import Grammar, results, shape_of
from data_prep.rows import read_rows
from workflows.errors import UserError

SPLITS = ("train", "validation", "test")


def test_programs_differ_between_splits_by_more_than_names(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "PROGRAMS", 400)
    setup(data="python_javascript", out_dir=tmp_path / "one", validation_size=30, test_size=40)
    setup(data="python_javascript", out_dir=tmp_path / "two", validation_size=30, test_size=40)
    folder = tmp_path / "one" / "python_javascript"
    rows = {split: read_rows(folder / f"{split}.jsonl", "translated") for split in SPLITS}
    assert {split: len(found) for split, found in rows.items()} == {"train": 330, "validation": 30, "test": 40}
    shapes = [{shape_of(row["source"]) for row in rows[split]} for split in SPLITS]
    assert not shapes[0] & shapes[1] and not shapes[0] & shapes[2] and not shapes[1] & shapes[2]
    assert json.loads((folder / "manifest.json").read_text())["dropped"]["one result for all inputs"] > 0
    for split in SPLITS:  # the same seed, the same bytes
        assert (folder / f"{split}.jsonl").read_bytes() == (
            tmp_path / "two" / "python_javascript" / f"{split}.jsonl"
        ).read_bytes()
    for row in rows["test"]:
        assert len(row["inputs"]) == programs.INPUTS and len(set(map(repr, results(row["source"], row["inputs"])))) > 1
    with pytest.raises(UserError, match="reads no files"):
        setup(data="python_javascript", raw_dir=tmp_path, out_dir=tmp_path)


def test_a_shape_forgets_names_numbers_and_texts():
    one = 'def solve(a, word):\n    return a + 3 if word == "b" else word.count("c")'
    two = 'def check(k, name):\n    return k + 17 if name == "e" else name.count("a")'
    assert shape_of(one) == shape_of(two) != shape_of(one.replace("count", "upper"))
    assert shape_of("def f(a, b): return a") != shape_of("def f(a, b): return b")


def test_both_languages_mean_the_same():
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed, so the JavaScript cannot be run")
    chance = random.Random(3)
    for _ in range(40):
        program, kinds = Grammar(chance).function()
        inputs = [[programs._argument(kind, chance) for kind in kinds] for _ in range(6)]
        assert do_the_same(program.python, program.javascript, inputs), program
