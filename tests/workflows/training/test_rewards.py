"""Rewards: what counts as an answer, how they add up, and what a wrong one says."""

import importlib.util
import math
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch

from data_prep.normalisation import normalise
from workflows.errors import UserError
from workflows.training import rewards
from workflows.training.rewards import Rewards, Sample, WeightedReward, batched

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
        ("The answer is (A), not (B).", False),
        ("(B), not (A)", True),
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
    assert rewards.math_answer(sample(said, {"answers": ["3 * 24 = 72\n#### 72"]})) == right


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("<think>It is 3.</think>\\boxed{\\frac{1}{2}}", "50%"), ("<think>3</think> 72", "#### 72"), ("x = 4", "2^2")],
)
def test_a_mathematical_answer_is_what_follows_the_reasoning(said: str, wanted: str):
    assert rewards.math_answer(sample(said, {"answers": [wanted]})) == 1
    assert rewards.math_answer(sample(said, {"answers": ["3"]})) == 0


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("का", "कि"),
        ("ไม", "ไม่"),
        ("5", "-5"),
        ("C", "C++"),
        ("🔥", "🙂"),
        ("", "🙂"),
        ("?!", "..."),
        ("?!", "?!"),
        ("3 5", "3.5"),
    ],
)
def test_another_answer_is_not_exact(said: str, wanted: str):
    row = {"answers": [wanted]}
    assert rewards.exact(sample(said, row)) == 0
    assert rewards.finding(sample(said, row)) < 1
    same = normalise(wanted) != ""
    assert rewards.exact(sample(wanted, row)) == rewards.finding(sample(wanted, row)) == same


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


def text(sample: Sample) -> Any:
    return "0.5"


def forgets(sample: Sample) -> Any:
    len(sample.text)


def forgets_sometimes(sample: Sample) -> float | None:
    if sample.text:
        return 1.0


async def coroutine(sample: Sample) -> float:
    return 1.0


def late_coroutine(sample: Sample) -> Any:
    return coroutine(sample)


def generator(sample: Sample) -> Any:
    yield 1.0


def of_trl(completions: Any, **kwargs: Any) -> list[float]:
    return [1.0 for _ in completions]


def two(sample: Sample, other: Any) -> float:
    return 1.0


def typed(sample: Sample) -> Any:
    kinds = [True, 1, np.float32(1), np.int64(1), np.bool_(True), np.array(1.0), torch.tensor(1.0), torch.tensor(True),
             torch.tensor(1.0, requires_grad=True), Fraction(1), Decimal(1)]  # fmt: skip
    return kinds[sample.tokens]


def huge(sample: Sample) -> float:
    return 1e300 * len(sample.text)


def overflowing(sample: Sample) -> int:
    return 10**400


def if_short(sample: Sample) -> float | None:
    return None if len(sample.text) > 3 else 0.5


def ranks(samples: list[Sample]) -> list[float | None]:
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].text))
    return [None if len(samples[i].text) > 30 else float(order.index(i)) for i in range(len(samples))]


def as_tensor(samples: "Sequence[Sample]") -> torch.Tensor:
    return torch.arange(len(samples))


def maybe_samples(samples: Optional[list[Sample]] = None) -> list[float]:  # noqa: UP045 (as users write it)
    return [3.0 for _ in samples or []]


def without_annotation(samples):  # type: ignore[no-untyped-def]
    return [1.0 for _ in samples]


@batched
def marked(samples):  # type: ignore[no-untyped-def]
    return np.ones(len(samples))


class Judge:
    def __call__(self, samples: list[Sample]) -> list[float]:
        return [2.0] * len(samples)


judge = Judge()


def too_few(samples: list[Sample]) -> list[float]:
    return [1.0]


def one_for_all(samples: list[Sample]) -> Any:
    return 1.0


def texts(samples: list[Sample]) -> Any:
    return ["1"] * len(samples)


def broken_list(samples: list[Sample]) -> list[float]:
    return [1 / 0 for _ in samples]


def named(name: str) -> Rewards:
    return Rewards([WeightedReward(f"{__name__}.{name}")])


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
        ("several", r"returned \[1.0, 2.0\] of type list. It must return a number.*list\[Sample\]"),
        ("text", "returned '0.5' of type str. It must return a number"),
        ("late_coroutine", "of type coroutine. It must return a number"),
        ("overflowing", "gave inf"),
        ("huge", "sum to 5e.300; beyond 1e.15 their statistics are not finite"),
        ("texts", "returned '1' of type str"),
        ("broken_list", "failed with ZeroDivisionError"),
        ("without_annotation", r"object is not iterable. \(A function of all samples is annotated with list"),
    ],
)
def test_a_reward_that_fails_names_the_sample(name: str, message: str):
    with pytest.raises(UserError, match=message) as e:
        Rewards([WeightedReward(f"{__name__}.{name}")])([sample("Fever")])
    assert "'Which finding?'" in str(e.value) and "'Fever'" in str(e.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("forgets", "never returns a value"),
        ("coroutine", "is asynchronous"),
        ("generator", "is a generator"),
        ("of_trl", "takes completions, as reward functions of TRL do"),
        ("two", "cannot be called with one argument"),
        ("Judge", "is a class"),
    ],
)
def test_a_function_that_can_be_no_reward_is_refused_before_it_is_called(name: str, message: str):
    with pytest.raises(UserError, match=message):
        named(name)


@pytest.mark.parametrize("kind", range(11))
def test_every_kind_of_number_is_one(kind: int):
    (found,) = named("typed")([sample("x", tokens=kind)])
    assert found["total"] == 1.0 and type(found["total"]) is float


def test_a_reward_that_does_not_apply_is_left_out():
    composed = Rewards([WeightedReward(f"{__name__}.if_short", 2.0), WeightedReward("repetition")])
    given = composed([sample("ASD"), sample("a b c a b c")])
    name = f"{__name__}.if_short"
    assert given == [
        {name: 0.5, "repetition": 0.0, "total": 1.0},
        {"repetition": -0.25, "total": -0.25},
    ]
    assert composed.means(given) == {f"reward_{name}": 0.5, "reward_repetition": -0.125, "no_reward": 0.0}


def test_an_answer_to_which_no_reward_applies_is_counted():
    composed = named("if_short")
    given = composed([sample("ASD"), sample("Fever"), sample("Cough"), sample("Rash")])
    assert [found["total"] for found in given] == [1 / 2, 0, 0, 0]
    assert composed.means(given) == {f"reward_{__name__}.if_short": 0.5, "no_reward": 0.75}
    means = composed.means(composed([sample("Fever")]))
    assert math.isnan(means[f"reward_{__name__}.if_short"]) and means["no_reward"] == 1
    assert [found["total"] for found in named("forgets_sometimes")([sample("x"), sample("")])] == [1, 0]
    assert Rewards([WeightedReward("exact")]).means([{"exact": 1.0, "total": 1.0}]) == {"reward_exact": 1.0}


def test_a_function_of_a_list_gets_all_samples_at_once():
    samples = [sample("abc"), sample("a"), sample("x" * 40), sample("ab")]
    assert [found["total"] for found in named("ranks")(samples)] == [2, 0, 0, 1]
    assert f"{__name__}.ranks" not in named("ranks")(samples)[2]
    assert [found["total"] for found in named("as_tensor")(samples)] == [0, 1, 2, 3]
    assert [found["total"] for found in named("marked")(samples)] == [1] * 4
    assert [found["total"] for found in named("maybe_samples")(samples)] == [3] * 4
    assert [found["total"] for found in named("judge")(samples)] == [2] * 4
    assert named("ranks")([]) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("too_few", "returned 1 values for 2 samples"), ("one_for_all", "must return a list, not 1.0 of type float")],
)
def test_a_list_of_another_length_is_refused(name: str, message: str):
    with pytest.raises(UserError, match=message):
        named(name)([sample("a"), sample("b")])


def test_expressions_need_math_verify_and_say_so(monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    composed = Rewards([WeightedReward("math_answer")])
    rows = [{"answers": ["#### 5"]}, {"answers": [r"\sqrt{2}"]}, {"answers": [r"\sqrt{4}", "2"]}]
    composed.check(rows, Path("train.jsonl"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "math_verify" else found(name))
    composed.check(rows[:1], Path("train.jsonl"))
    with pytest.raises(
        UserError, match=r"train.jsonl: 1 of 3 rows .* no plain number.*sqrt.*pip install -e '\.\[math\]'"
    ):
        composed.check(rows, Path("train.jsonl"))
    Rewards([WeightedReward("exact")]).check(rows, Path("train.jsonl"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "lists no reward"),
        ([WeightedReward("fnding")], "no reward 'fnding'. There are finding"),
        ([WeightedReward("number")], "'number' is now called 'math_answer'"),
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


RULED = {**ROW, "rules": ["exact_name"], "kind": "name"}
ADVICE = {"prompt": ROW["prompt"], "answers": ["-"], "rules": ["disclaimer"], "kind": "advice"}


def test_a_row_is_judged_by_its_own_rules_and_by_what_is_no_rule():
    composed = Rewards([WeightedReward(name) for name in ("exact_name", "disclaimer", "finding", "repetition")])
    given = composed([sample("ASD", RULED), sample("ASD", ADVICE), sample("ASD")])
    assert [sorted(row) for row in given] == [
        ["exact_name", "repetition", "total"],
        ["disclaimer", "repetition", "total"],
        ["disclaimer", "exact_name", "finding", "repetition", "total"],
    ]
    assert [row["total"] for row in given] == [1, 0, 2]


def test_rows_that_no_reward_would_judge_are_refused():
    composed = Rewards([WeightedReward("exact_name")])
    composed.check([RULED, ROW], Path("rows.jsonl"))
    with pytest.raises(UserError, match=r"rows.jsonl has rows .* 2 by disclaimer. Add .* leave out the kinds advice"):
        composed.check([RULED, ADVICE, ADVICE], Path("rows.jsonl"))
    shaped = Rewards([WeightedReward("exact_name"), WeightedReward("brevity")])  # brevity applies to all
    shaped.check([RULED, ADVICE], Path("rows.jsonl"))
