"""Right answers: found in every field in which published files have them, and nowhere else."""

from typing import Any

import pytest

from data_prep.answers import answers_of, last_box, marked_answer

LONG = "First we add the two numbers and then we see that the sum of both is large."


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"question": "1 + 2?", "answer": "1+2=<<1+2=3>>3\n#### 3"}, ["3"]),  # GSM8K
        ({"question": "?", "answer": "So it is.\n#### 1,080 \n"}, ["1,080"]),
        ({"problem": "?", "solution": r"Thus $\boxed{\frac{1}{2}}$."}, [r"\frac{1}{2}"]),  # MATH, NuminaMath
        ({"prompt": [{"role": "user", "content": "?"}], "solution": "$3/4$"}, ["$3/4$"]),  # TRL
        ({"prompt": "?", "solution": LONG}, [LONG]),
        ({"prompt": "1 + 2?", "answer": "3"}, ["3"]),
        ({"prompt": "1 + 2?", "answer": 3}, ["3"]),
        ({"prompt": "?", "answer": -2.5}, ["-2.5"]),
        ({"prompt": "?", "answer": True}, ["true"]),
        ({"prompt": "?", "answer": "", "solution": r"\boxed{4}"}, ["4"]),
        ({"question": "?", "answer": LONG, "solution": "5"}, ["5"]),
        ({"question": "?", "answer": LONG, "final_answer": "6"}, ["6"]),
        ({"question": "?", "answer": "7", "solution": r"\boxed{8}"}, ["7"]),
        ({"problem": "?", "expected_answer": "x = 2"}, ["x = 2"]),
        ({"prompt": "?", "ground_truth": 34}, ["34"]),
        ({"instruction": "?", "output": "Thus:\n#### 9"}, ["9"]),
        ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Add.\n#### 18"}]}, ["18"]),
        ({"prompt": "?", "answers": ["a", "b", "a"]}, ["a", "b"]),
        ({"prompt": "?", "answers": "a"}, ["a"]),
        ({"prompt": "?", "answers": [4, "four"]}, ["4", "four"]),
        ({"question": "?", "answers": {"text": ["a"], "answer_start": [0]}}, ["a"]),
        ({"prompt": "?", "answers": None, "answer": "a"}, ["a"]),
    ],
)
def test_answers_are_found_where_files_have_them(row: dict[str, Any], answers: list[str]):
    assert answers_of(row) == answers


@pytest.mark.parametrize(
    "row",
    [
        {"question": "?", "answer": LONG},
        {"question": "?", "answer": "Two things:\n#### Treatment\nRest."},  # a heading of Markdown
        {"question": "?", "answer": "a short\nlist"},
        {"question": "?", "answer": " "},
        {"question": "?", "answer": float("nan")},
        {"instruction": "?", "output": "Four."},
        {"prompt": "?", "choices": ["a", "b"], "answer": 1},
        {"prompt": "?", "completion": r"\boxed{3}", "label": False},
        {"prompt": "?", "completion": r"\boxed{3}", "kto_tag": True},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Four."}]},
        {"messages": [{"role": "user", "content": r"Put it into \boxed{}, as \boxed{3}."}]},
        {},
    ],
)
def test_other_rows_have_none(row: dict[str, Any]):
    assert answers_of(row) is None


@pytest.mark.parametrize("answers", [[], [""], ["a", " "], [{"text": "a"}], {"b": 1}, [None], ""])
def test_malformed_answers_are_refused(answers: Any):
    with pytest.raises(ValueError, match='"answers" must be texts or numbers'):
        answers_of({"prompt": "?", "answers": answers})


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"\boxed{3}", "3"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"$\boxed{\frac{1}{\sqrt{2}}}$", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed {3}", "3"),
        (r"\fbox{3}", "3"),
        (r"\boxed 3.5$.", "3.5"),
        (r"\boxed{}", ""),
        (r"\boxed{3} no: \boxed{4", ""),  # cut off
        (r"\boxed{\frac{1}{2}", ""),
        (r"\boxedx{3}", None),
        ("3", None),
    ],
)
def test_the_last_box(text: str, held: str | None):
    assert last_box(text) == held
    assert marked_answer(text) == (held or None)
