"""Rewards: what counts as an answer, how they add up, and what a wrong one says."""

import math
from typing import Any

import pytest

from workflows.errors import UserError
from workflows.training import rewards
from workflows.training.rewards import Rewards, Sample, WeightedReward

ROW = {"prompt": [{"role": "user", "content": "Which finding?"}], "answers": ["Atrial septal defect", "ASD"]}


def sample(text: str, row: dict[str, Any] = ROW, tokens: int = 10, limit: int = 64) -> Sample:
    return Sample(row, text, tokens, tokens == limit, limit)


@pytest.mark.parametrize(
    ("said", "worth"),
    [
        ("Atrial septal defect", 1),
        ("asd.", 1),
        ("Ventricular septal defect", 2 / 3),
        ("A septal defect", 2 / 3),
        ("septal septal septal", 1 / 3),
        ("Fever", 0),
        ("", 0),
        ("<think>Fever? No.</think>\nASD", 1),
        ("It sees a hole.</think> Atrial septal defect", 1),
    ],
)
def test_a_finding_is_worth_its_f1_with_the_best_name(said: str, worth: float):
    assert rewards.finding(sample(said)) == pytest.approx(worth)
    assert rewards.exact(sample(said)) == (worth == 1)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("B", True),
        ("B.", True),
        ("(B)", True),
        ("B) because of it", True),
        ("The answer is B", True),
        ("Answer: (B) the heart", True),
        ("Answer: B", True),
        ("**Final Answer:** B", True),
        ("Option B", True),
        (r"So it is \boxed{B}.", True),
        (r"The answer is $\boxed{\text{B}}$", True),
        ("B is right", True),
        ("Answer: A", False),
        ("B cells are made in the marrow", False),
        ("I would say (A), no: the answer is B.", True),
        ("<think>A? B?</think>B", True),
        ("A", False),
        ("A heart defect", False),
        ("It is the heart", False),
        ("", False),
    ],
)
def test_a_letter(said: str, right: bool):
    assert rewards.letter(sample(said, {"choices": ["x", "y"], "answer": 1})) == right


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("So 3 + 4 = 72", True),
        ("#### 72", True),
        ("#### 72 apples, not 5", True),
        (r"It is \boxed{72}, of 100", True),
        (r"\boxed{7} then \boxed{72.0}", True),
        ("72.0", True),
        ("1,072", False),
        ("-72", False),
        ("none", False),
    ],
)
def test_a_number(said: str, right: bool):
    assert rewards.number(sample(said, {"answers": ["3 * 24 = 72\n#### 72"]})) == right


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("<think>a hole</think>ASD", True),
        ("a hole</think>\n\nASD", True),
        ("<think></think>ASD", False),
        ("<think>a hole</think>", False),
        ("ASD <think>a hole</think>ASD", False),
        ("<think>a</think>b</think>c", False),
        ("<think>a hole", False),
        ("ASD", False),
    ],
)
def test_the_format_of_thoughts(said: str, right: bool):
    assert rewards.format(sample(said)) == right


def test_shaping():
    assert rewards.brevity(sample("x", tokens=32)) == 0
    assert rewards.brevity(sample("x", tokens=48)) == pytest.approx(-0.5)
    assert rewards.brevity(sample("x", tokens=64)) == -1
    assert rewards.repetition(sample("a b c d")) == 0
    assert rewards.repetition(sample("a b c a b c a b c")) == pytest.approx(3 / 7 - 1)
    assert rewards.repetition(sample("a b")) == 0


def half(sample: Sample) -> float:
    return 0.5


def broken(sample: Sample) -> float:
    raise KeyError("no such thing")


def nothing(sample: Sample) -> float:
    return math.nan


def several(sample: Sample) -> Any:
    return [1.0, 2.0]


def test_they_add_up_by_weight():
    composed = Rewards(
        [WeightedReward("finding", 2.0), WeightedReward("format", 0.5), WeightedReward(f"{__name__}.half", -1.0)]
    )
    (found,) = composed([sample("<think>a hole</think>ASD")])
    assert found == {"finding": 1.0, "format": 1.0, f"{__name__}.half": 0.5, "total": 2.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "failed with KeyError: 'no such thing'"),
        ("nothing", "gave nan"),
        ("several", "failed with TypeError"),
    ],
)
def test_a_reward_that_fails_names_the_sample(name: str, message: str):
    with pytest.raises(UserError, match=message) as e:
        Rewards([WeightedReward(f"{__name__}.{name}")])([sample("Fever")])
    assert "'Which finding?'" in str(e.value) and "'Fever'" in str(e.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "lists no reward"),
        ([WeightedReward("fnding")], "no reward 'fnding'. There are finding"),
        ([WeightedReward("no.such.module")], "cannot be imported"),
        ([WeightedReward("math.nothing")], "cannot be imported"),
        ([WeightedReward("math.pi")], "is no function"),
        ([WeightedReward("finding"), WeightedReward("finding")], "more than once"),
        ([WeightedReward("finding", math.nan)], "weight of finding is nan"),
    ],
)
def test_what_cannot_be_composed_is_refused(entries: list[WeightedReward], message: str):
    with pytest.raises(UserError, match=message):
        Rewards(entries)
