"""Running what a model wrote: equal results, wrong ones, none; loops without end, and what no program may reach."""

import shutil

import pytest

from custom_models.projects import program_runs
from custom_models.projects.program_runs import do_the_same, results

PYTHON = "def half(n):\n    return n // 2"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")


@needs_node
@pytest.mark.parametrize(
    ("javascript", "same"),
    [
        ("function half(n) { return Math.floor(n / 2); }", True),
        ("function half(n) { return n / 2; }", False),  # differs for odd numbers
        ("function half(n) { return Math.trunc(n / 2); }", False),  # for negative ones
        ("function half(n) {", False),
        ("function other(n) { return Math.floor(n / 2); }", False),
        ("function half(n) { throw 1; }", False),
        (PYTHON, False),
        ("", False),
    ],
)
def test_only_equal_results_for_all_inputs_count(javascript: str, same: bool):
    assert do_the_same(PYTHON, javascript, [[4], [7], [-3]]) is same


@needs_node
def test_true_is_not_one():
    assert not do_the_same("def f(n):\n    return n > 0", "function f(n) { return 1; }", [[2]])
    assert do_the_same("def f(n):\n    return n > 0", "function f(n) { return n > 0; }", [[2], [-2]])


@needs_node
def test_a_program_reaches_nothing_and_ends():
    for body in ("return require('fs');", "return process.pid;", "while (true) {}", "return eval('1');",
                 "const x = []; while (true) { x.push(new Array(1e6).fill(1)); }"):  # fmt: skip
        assert results(f"function f(n) {{ {body} }}", "f", [[1]], "javascript") is None


def test_python_programs_run_within_limits(monkeypatch):
    assert results(PYTHON, "half", [[9], [-9]], "python") == [4, -5]
    assert results("def f(n):\n    return [0] * (1 << 30)", "f", [[1]], "python") is None
    assert results("def f(n):\n    return {n}", "f", [[1]], "python") is None  # a set is no JSON
    monkeypatch.setattr(program_runs, "SECONDS", 0.5)
    assert results("def f(n):\n    while True: pass", "f", [[1]], "python") is None
    with pytest.raises(ValueError, match="does not run"):
        do_the_same("def f(n):\n    return missing", "function f(n) { return 1; }", [[1]])
