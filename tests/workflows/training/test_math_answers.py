r"""Mathematical answers: equal values in any writing are equal, different ones never; hostile ones end in time."""

import importlib.util
import os
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.answers import answers_of
from data_prep.rows import iterate_jsonl
from workflows.training import math_answers
from workflows.training.math_answers import answer_part, is_plain, is_right, number_in

EQUAL = [
    ("0.5", "1/2"),
    ("0.5", "50%"),
    ("0.5", r"50\%"),
    ("0.5", r"\frac{1}{2}"),
    ("0.5", r"\dfrac12"),
    ("0.5", "½"),
    ("0.5", "5e-1"),
    ("0.5", "0,5"),
    ("0.5", ".5"),
    ("-0.5", r"-\frac{1}{2}"),
    ("-0.5", r"\frac{-1}{2}"),
    ("-5", "−5"),
    ("-5", "(-5)"),
    ("5", "+5"),
    ("0", "-0"),
    ("2.5", "2 1/2"),
    ("2.5", r"2\frac{1}{2}"),
    ("1.5", "1½"),
    ("1234.5", "1,234.5"),
    ("1234.5", "1.234,5"),
    ("1234", "1 234"),
    ("1234", r"1{,}234"),
    ("1234", r"1\,234"),
    ("123456", "1,23,456"),
    ("12.5", "12,5"),
    ("1500", r"1.5 \times 10^{3}"),
    ("1500", "1.5×10³"),
    ("5000000", "5 million"),
    ("18", "$18"),
    ("18", r"\$18"),
    ("18", "18 dollars"),
    ("18", "18 dollars per hour"),
    ("5", r"5\text{ cm}"),
    ("5", r"5 \text{m}^2"),
    ("5", "5cm"),
    ("30", r"30^\circ"),
    ("30", "30°"),
    ("18", "x = 18"),
    ("18", "3 + 15 = 18"),
    ("1/3", "0.333333"),
    ("0.3", "0.30000000000000004"),
    ("Tuesday", r"\text{tuesday}"),
    ("(1, 2)", "(1,2)"),
    # math-verify's
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\{1, 2\}", r"\{2,1\}"),
    ("2x+4", "4 + 2x"),
    ("2", r"\sqrt{4}"),
    ("8", "2^3"),
    ("120", "5!"),
]
DIFFERENT = [
    ("2", r"\frac{1}{2}"),
    ("2", "1/2"),
    ("4", "3/4"),
    ("2", "50%"),
    ("50", "50%"),
    ("5", "-5"),
    ("72", "1,072"),
    ("1000000", "1000001"),
    ("0.333333", "0.333334"),
    ("1/3", "0.33"),
    ("11/2", "1½"),
    ("52", "5²"),
    ("102", "10₂"),
    ("10", "10_2"),
    ("12", "1 2"),
    ("1.2", "(1,2)"),
    ("5", "5x"),
    ("5", "5 x"),
    ("5", "5i"),
    ("5", r"5\pi"),
    ("5", "5π"),
    ("5", r"5\sqrt{2}"),
    ("5", "5^2"),
    ("5", "5!"),
    ("5", "5 million"),
    ("5", "5 squared"),
    ("5", "5 halves"),
    ("5", "5 and a half"),
    ("5", r"\pm 5"),
    ("5", "5, 6"),
    ("6", "5, 6"),
    ("5", "5 or 6"),
    ("5", "5 times x"),
    ("10", "2 5"),
    ("6", "5; 6"),
    ("6", r"5 \text{ or } 6"),
    ("5", r"\{4,5\}"),
    ("5", "(4,5)"),
    ("5", "[4,5]"),
    ("5", "(5,\\infty)"),
    ("5", "x > 5"),
    ("4", "2x+4"),
    ("5", "5 - 3"),
    ("5", "1/0"),
    ("5", "5:30"),
    ("5", "1.2.5"),
    ("5 cm", "5 kg"),
    ("5 cm", "5 m"),
    ("x = 5", "y = 5"),
    ("5", "x = 4, y = 5"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("Monday", "Tuesday"),
    ("A", "B"),
    ("5", ""),
]
WAYS = [
    "{}",
    r"So $\boxed{{{}}}$.",
    "It is so.\n#### {}",
    "The answer is {}.",
    "**Answer:** {}",
    "Hm. <answer>{}</answer>",
]


def ways_for(answer: str) -> list[str]:
    """Ways to say an answer; at the end of a sentence an exclamation mark is no factorial."""
    return [way for way in WAYS if "!" not in answer or way == "{}" or "boxed" in way or "<answer>" in way]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_values_are_equal_in_any_writing(one: str, other: str):
    assert is_right(other, [one]) and is_right(one, [other])
    for way in ways_for(other):
        assert is_right(way.format(other), [one]), way


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_values_are_never_equal(one: str, other: str):
    assert not is_right(other, [one]) and not is_right(one, [other])
    for way in ways_for(other):
        assert not is_right(way.format(other), [one]), way


def writings(value: Fraction) -> list[str]:
    """Ways to write a fraction."""
    top, bottom = abs(value.numerator), value.denominator
    sign = "-" if value < 0 else ""
    found = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"\dfrac{{{sign}{top}}}{{{bottom}}}"]
    whole, rest = divmod(top, bottom)
    if whole and rest:
        found += [f"{sign}{whole} {rest}/{bottom}", rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}"]
    if (value * 10**4).denominator == 1:
        decimal = f"{float(abs(value)):.4f}"
        found += [f"{sign}{decimal}", f"{sign}{float(abs(value)):,.4f}", f"{sign}{float(abs(value) * 100):.2f}%"]
        found += [f"−{decimal}" if sign else decimal, f"{sign}{decimal} apples", rf"{sign}{decimal}\text{{ cm}}"]
        found.append(rf"{sign}{float(abs(value) / 1000):.7f} \times 10^{{3}}")
    return found


VALUES = st.builds(Fraction, st.integers(-2500, 2500), st.sampled_from([1, 1, 2, 3, 4, 5, 7, 8, 10, 100]))


@settings(max_examples=300, deadline=None)
@given(VALUES, VALUES, st.integers(0, 99), st.integers(0, 99), st.sampled_from(WAYS))
def test_two_numbers_are_equal_if_their_values_are(one: Fraction, other: Fraction, i: int, j: int, way: str):
    for value in (one, other):
        said, wanted = writings(value)[i % len(writings(value))], writings(one)[j % len(writings(one))]
        units = [re.findall("apples|cm", text) for text in (said, wanted)]
        if not all(units) or units[0] == units[1]:
            assert is_right(way.format(said), [wanted]) == (value == one), (said, wanted)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (r"\boxed{7}, no: \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"It is 5, so \boxed{5", None),
        (r"It is 5, so \boxed{}", None),
        ("#### 72 apples, not 5", "72 apples"),
        ("#### 18\n\nI hope this helps with your 3 questions.", "18"),
        ("I get 17, <answer>18</answer> or 19", "18"),
        ("The answer is found by adding 3 and 4, which gives 7.", "7"),
        ("The answer is $2x + 4$.", "$2x + 4$"),
        ("The answer is 2x + 4.", "2x + 4"),
        ("The answer is B.", "B"),
        ("She has 3 cats and 4 dogs, 7 pets in all.", "7"),
        ("The total is 10 cm^2.", "10"),
        ("Thus 2 + 1 gives $x = 3$ here.", "x = 3"),
        ("The answer is 72!", "72"),
        ("I think it is 72, I am sure", "72"),
        ("She earns 7 * 10 = <<7*10=70>>70/month", "70"),
        ("He goes there 8 * 4 = <<8*4=32>>32 times.", "32"),
        ("Ann:140(2)=280$\nBob:14(3)=42$", "42"),
        ("It is not 5", None),
        ("It isn't 5", None),
        ("It is not equal to 5", None),
        ("It cannot be 5", None),
        ("half of 5", None),
        ("It is 20% of 80", None),
        ("It is two thirds of 9", None),
        ("the square root of 5", None),
        ("a multiple of 5", None),
        ("sqrt 5", None),
        ("8 choose 2", None),
        ("17 mod 5", None),
        ("10 divided by 5", None),
        ("2 to the power of 5", None),
        ("1 in 5", None),
        ("It happens 1 out of 5 times", None),
        ("It is not 4, but 5", "5"),
        ("She has a total of 5", "5"),
        ("In the end there are 5 of them", "5"),
        ("so y = 2x + 4 by 5^2", None),
        ("the values are 5, 6 and 7", None),
        ("it lies between 4 and 5", None),
        ("on 3/4/2024", None),
        ("$5$ or $6$ it may be", None),
        ("five of them", None),
        ("", None),
    ],
)
def test_the_part_of_a_text_that_is_its_answer(text: str, part: str | None):
    assert answer_part(text) == part


def test_right_answers_may_be_solutions_or_prose():
    assert is_right("72", ["3 * 24 = 72\n#### 72"])
    assert is_right("72", [r"We add, and get $\boxed{72}$."])
    assert is_right("72", ["The answer is 72."])
    assert is_right("8", ["7", "8"]) and not is_right("9", ["7", "8"])
    assert is_right("5 or 6", ["5 or 6"])


@pytest.mark.skipif(
    not os.environ.get("WORKFLOW_DATA"), reason="needs the real GSM8K, whose folder WORKFLOW_DATA names"
)
def test_the_solutions_of_gsm8k_are_right_and_those_of_other_questions_are_not():
    rows = [row for _, row in iterate_jsonl(Path(os.environ["WORKFLOW_DATA"]) / "gsm8k" / "train.jsonl")][:2000]
    answers = [answers_of(row) for row in rows]
    others = random.Random(0).sample(answers, len(answers))
    for row, right, other in zip(rows, answers, others, strict=True):
        assert right is not None and other is not None and is_plain(right[0])
        assert is_right(row["answer"], right)
        assert is_right(row["answer"], other) == (
            Fraction(right[0].replace(",", "")) == Fraction(other[0].replace(",", ""))
        )


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9^{9}}}", "10^{10^{10}}", "100000000!", "9" * 100_000, "1e999999999", "\\sqrt{" * 60 + "2" + "}" * 60,
     "\\int_0^1 x^{x^{x^x}} dx", "{" * 250, "\\" * 250, "5\x00", "((((((((((5"],
)  # fmt: skip
def test_a_hostile_answer_is_wrong_and_ends_in_time(text: str):
    began = time.monotonic()
    assert not is_right(rf"\boxed{{{text}}}", ["7"])
    assert time.monotonic() - began < math_answers.START_SECONDS + math_answers.CALL_SECONDS
    assert is_right(r"\boxed{\sqrt{49}}", ["7"])  # and the next one is answered


def test_a_process_that_hangs_or_ends_is_replaced(monkeypatch: pytest.MonkeyPatch):
    verifier = math_answers._Verifier()
    assert verifier("2", r"\sqrt{4}")
    first = verifier._process
    assert first is not None
    monkeypatch.setattr(math_answers, "CALL_SECONDS", 0.0)
    assert not verifier("3", r"\sqrt{9}") and first.poll() is not None
    monkeypatch.setattr(math_answers, "CALL_SECONDS", 60.0)
    assert verifier("3", r"\sqrt{9}")
    assert verifier._process is not None
    verifier._process.kill()
    verifier._process.wait()
    assert not verifier("4", r"\sqrt{16}")
    assert verifier("4", r"\sqrt{16}")
    verifier.end()


def test_plain_numbers_need_no_package(monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "math_verify" else found(name))
    math_answers._equal.cache_clear()
    assert is_right("50%", ["1/2"]) and is_right(r"\boxed{\sqrt{2}}", [r"\sqrt{2}"])
    assert not is_right(r"\boxed{\sqrt{4}}", ["2"])
    math_answers._equal.cache_clear()
    assert is_plain("#### 1,080") and is_plain("$5 per hour") and not is_plain(r"\sqrt{2}") and not is_plain("Paris")


def test_a_number_has_a_value_a_unit_and_a_name():
    found = number_in("x = 1,234.50 apples")
    assert found == math_answers.Number(Fraction(2469, 2), 2, "apple", "x")
    assert number_in("€5") == math_answers.Number(Fraction(5), 0, "€", "")
    assert number_in("1 + 1") is None
