"""What an answer is worth: verifiable rewards, shaping, and any function of the user's, composed with weights.

A reward is a function of a `Sample` that returns a number, or None where it does not apply; one that is annotated with
`list[Sample]`, or decorated with `batched`, takes all samples of an optimizer step and returns a list. In a recipe they
are listed with their weights,

    rewards:
      - {reward: finding, weight: 1.0}
      - {reward: format, weight: 0.2}
      - {reward: my_package.my_module.my_function, weight: 0.5}

and an answer's reward is the weighted sum of those that apply.
"""

import ast
import importlib
import inspect
import math
import numbers
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from data_prep.normalisation import words_of
from data_prep.rows import Row
from workflows.errors import UserError
from workflows.training import math_answers
from workflows.training.answer_rules import (
    close_f1,
    contains,
    disclaimer,
    exact,
    exact_name,
    final_answer,
    finding,
    name_in_sentence,
)
from workflows.training.model import Precision
from workflows.training.scalar_heads import LearnedReward


@dataclass(frozen=True)
class Sample:
    """One sampled answer.

    Attributes:
        row: The data set's row that was asked (`verifiable` or `scoring`).
        text: The answer, without the token that ends the turn.
        tokens: How many tokens it has.
        truncated: Whether the limit on new tokens ended it.
        max_new_tokens: That limit.
    """

    row: Row
    text: str
    tokens: int
    truncated: bool
    max_new_tokens: int


Reward = Callable[[Sample], Any]
"""A reward function; of `list[Sample]` if it takes all samples at once."""
Function = TypeVar("Function", bound=Callable[..., Any])
LARGEST_TOTAL = 1e15
"""Largest sum of an answer's rewards: its square, summed over a step's answers, is finite in float32."""

_OF_ALL = " (A function of all samples is annotated with list[Sample].)"
_LETTER = re.compile(
    r"\\boxed\{(?:\\text\{)?\W*([A-Z])\b"
    r"|\b(?i:answer|option|choice)\b\W*(?i:is\b\W*)?\(?([A-Z])\b"
    r"|^\W*([A-Z])\b(?:(?= is\b)|(?![a-z' ]\w))"
    r"|(?<!not )(?<!nor )(?<!n't )\(([A-Z])\)",
    re.MULTILINE,
)


def letter(sample: Sample) -> float:
    """1 if the answer chooses the right option of a `scoring` row by its letter, else 0; the last one named counts."""
    found = [next(filter(None, groups)) for groups in _LETTER.findall(final_answer(sample.text))]
    return float(bool(found) and found[-1] == chr(ord("A") + sample.row["answer"]))


def math_answer(sample: Sample) -> float:
    r"""1 if the answer's number or expression equals one of the row's "answers", else 0.

    It is read from <answer>, the last \boxed{}, the line after ####, "the answer is …", or is the last number of all.
    Numbers are compared by value in any writing (1/2 = 50% = 0.5); other expressions need the package math-verify.
    """
    return float(math_answers.is_right(final_answer(sample.text), sample.row["answers"]))


def format(sample: Sample) -> float:
    """1 for reasoning that is closed once and an answer after it, `<think>…</think>` first, else 0.

    Where the prompt has opened the reasoning, the answer need not.
    """
    text = sample.text
    if text.count("</think>") != 1 or text.count("<think>") > 1:
        return 0.0
    thoughts, _, answer = text.partition("</think>")
    begins = thoughts.lstrip().startswith("<think>") or "<think>" not in thoughts
    return float(begins and bool(thoughts.replace("<think>", "").strip()) and bool(answer.strip()))


def brevity(sample: Sample) -> float:
    """0 for an answer of up to half the limit on new tokens, falling to -1 at the limit.

    The soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13).
    """
    free = sample.max_new_tokens / 2
    return -max(0.0, (sample.tokens - free) / (sample.max_new_tokens - free)) if sample.max_new_tokens > 1 else 0.0


def repetition(sample: Sample) -> float:
    """Minus the share of the answer's three-word sequences that it has said before, from -1 to 0."""
    words = words_of(sample.text)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) / len(triples) - 1 if triples else 0.0


BUILT_IN: dict[str, Reward] = {
    "finding": finding,
    "exact": exact,
    "exact_name": exact_name,
    "name_in_sentence": name_in_sentence,
    "close_f1": close_f1,
    "contains": contains,
    "disclaimer": disclaimer,
    "letter": letter,
    "math_answer": math_answer,
    "format": format,
    "brevity": brevity,
    "repetition": repetition,
}
_COMPARING = ("finding", "exact", "exact_name", "name_in_sentence", "close_f1", "contains", "math_answer")
NEEDS = {**dict.fromkeys(_COMPARING, "answers"), "letter": "answer"}
"""The field of a row that a reward reads."""
RULES = (*NEEDS, "disclaimer")
"""Rewards that say whether an answer is right: a row that names its `rules` is judged by these of them alone."""
RIGHT_OR_WRONG = (*(name for name in RULES if name != "finding"), "format")
"""Rewards that are 0 or 1."""
RENAMED = {"number": "math_answer"}
"""Earlier names of rewards."""


def batched(function: Function) -> Function:
    """Mark a reward function, or the class of one, as taking a list of samples and returning a list of values."""
    function.takes_samples = True  # type: ignore[attr-defined]
    return function


@dataclass
class WeightedReward:
    """One entry of a recipe's `rewards`."""

    reward: str
    """One of finding, exact, exact_name, name_in_sentence, close_f1, contains, disclaimer, letter, math_answer, format,
    brevity, repetition, or an importable function (`package.module.name`) of a
    `workflows.training.rewards.Sample` or of a list of them, or a reward model's folder with a slash in it
    (`out/RUN/reward/final`)."""
    weight: float = 1.0
    """What it is multiplied by."""


class Rewards:
    """A weighted sum of rewards, each known by its name."""

    def __init__(
        self, entries: Sequence[WeightedReward], precision: Precision = "32-true", device: torch.device | str = "cpu"
    ) -> None:
        """Find the functions, and load the reward models.

        Args:
            entries: At least one.
            precision: What reward models compute in.
            device: Where they are.

        Raises:
            UserError: If there is none, one is unknown, named twice, or has a weight that is no number, or a function
                cannot be called with a sample or never returns a value.
        """
        if not entries:
            raise UserError("--rewards lists no reward, e.g. --rewards '[{reward: finding}]'.")
        names = [entry.reward for entry in entries]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"--rewards names {', '.join(doubled)} more than once.")
        if odd := [entry for entry in entries if not math.isfinite(entry.weight)]:
            raise UserError(f"--rewards: the weight of {odd[0].reward} is {odd[0].weight}.")
        self.weights = {entry.reward: entry.weight for entry in entries}
        self.models: dict[str, LearnedReward] = {}
        self.functions: dict[str, Reward] = {}
        self.batched: set[str] = set()
        for name in names:
            if "/" in name:
                self.models[name] = LearnedReward(Path(name), precision, device)
            else:
                self.functions[name] = BUILT_IN.get(name) or _imported(name)
                if name not in BUILT_IN and _takes_samples(name, self.functions[name]):
                    self.batched.add(name)

    @property
    def fields(self) -> list[str]:
        """The fields of a row that the built-in ones among them read."""
        return sorted({NEEDS[name] for name in self.functions if name in NEEDS})

    @property
    def is_share(self) -> bool:
        """Return whether the total of an answer is 0 or 1, so that a mean of totals is a share of answers."""
        return len(self.weights) == 1 and all(
            name in RIGHT_OR_WRONG and weight == 1 for name, weight in self.weights.items()
        )

    def check(self, rows: Sequence[Row], path: Path) -> None:
        """Make sure that the answers of a file's rows can be compared.

        Raises:
            UserError: If rows name rules none of which is among the rewards, or if `math_answer` is to compare with an
                expression and math-verify is not installed.
        """
        self._check_rules(rows, path)
        if "math_answer" not in self.functions or math_answers.has_math_verify():
            return
        odd = [row["answers"] for row in rows if not any(map(math_answers.is_plain, row["answers"]))]
        if odd:
            raise UserError(
                f"{path}: {len(odd):,} of {len(rows):,} rows have an answer that is no plain number, such as "
                f"{odd[0][0][:80]!r}. To compare such ones the reward math_answer needs the package math-verify: "
                "`.venv/bin/pip install -e '.[math]'`."
            )

    def _check_rules(self, rows: Sequence[Row], path: Path) -> None:
        """Refuse rows to which no reward would apply."""
        if self.models or not self.functions.keys() <= set(RULES):  # what is no rule applies to every row
            return
        left_out = Counter(" or ".join(row["rules"]) for row in rows if row.get("rules") and not self._judges(row))
        if left_out:
            found = ", ".join(f"{count:,} by {rules}" for rules, count in left_out.items())
            kinds = ", ".join(sorted({str(row.get("kind")) for row in rows if not self._judges(row)}))
            raise UserError(
                f"{path} has rows that are judged by rules that --rewards does not list: {found}. Add these rewards, "
                f"or leave out the kinds {kinds} by naming the others with --kinds."
            )

    def _judges(self, row: Row) -> bool:
        """Return whether one of the rules among the rewards applies to a row."""
        return "rules" not in row or not self.functions.keys().isdisjoint(row["rules"])

    def __call__(self, samples: Sequence[Sample]) -> list[dict[str, float]]:
        """Return every reward that applies to each answer, unweighted, and their weighted sum under "total".

        A sample to which no reward applies has a total of 0.

        Raises:
            UserError: If one of them fails or gives no finite number, or their sum is too large; the message shows the
                answer.
        """
        columns = {name: self._column(name, samples) for name in self.weights} if samples else {}
        found = []
        for i, sample in enumerate(samples):
            row = {name: value for name, column in columns.items() if (value := column[i]) is not None}
            total = sum((self.weights[name] * value for name, value in row.items()), 0.0)
            if not abs(total) <= LARGEST_TOTAL:
                raise UserError(
                    f"The rewards of an answer sum to {total:g}; beyond {LARGEST_TOTAL:g} their statistics are not "
                    f"finite. Scale them down, with a smaller weight in --rewards. They are {row}. {_shown(sample)}"
                )
            found.append({**row, "total": total})
        return found

    def means(self, given: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the mean of each reward over the answers to which it applies, and the share to which none does.

        Args:
            given: What calling this returned, at least one.
        """
        found = {}
        for name in self.weights:
            values = [row[name] for row in given if name in row]
            found[f"reward_{name}"] = sum(values) / len(values) if values else math.nan
        if not self.functions.keys() <= BUILT_IN.keys():  # the built-in ones apply always
            found["no_reward"] = sum(not row.keys() & self.weights.keys() for row in given) / len(given)
        return found

    def _column(self, name: str, samples: Sequence[Sample]) -> Sequence[float | None]:
        """One reward of each answer; None where it does not apply."""
        found: Sequence[float | None]
        if name in self.models:
            prompts = [sample.row["prompt"] for sample in samples]
            texts, truncated = [sample.text for sample in samples], [sample.truncated for sample in samples]
            tools = [sample.row.get("tools") for sample in samples]
            found = self.models[name](prompts, texts, truncated, tools)
        else:
            found = self._values(name, samples)
        for sample, value in zip(samples, found, strict=True):
            if value is not None and not math.isfinite(value):
                raise UserError(f"The reward {name} gave {value}. {_shown(sample)}")
        return found

    def _values(self, name: str, samples: Sequence[Sample]) -> list[float | None]:
        """The values of a function, called with one sample after the other or with all."""
        function = self.functions[name]
        if name not in self.batched:
            given = [
                None
                if name in RULES and name not in sample.row.get("rules", (name,))
                else _called(name, function, sample, sample)
                for sample in samples
            ]
        else:
            listed = _called(name, function, list(samples), samples[0])
            if isinstance(listed, torch.Tensor | np.ndarray):
                listed = listed.tolist()
            if not isinstance(listed, list | tuple):
                raise UserError(
                    f"The reward {name} takes a list of samples and must return a list, not {_kind(listed)}."
                )
            if len(listed) != len(samples):
                raise UserError(
                    f"The reward {name} returned {len(listed)} values for {len(samples)} samples. It must return one "
                    "for each, in their order, and None for one to which it does not apply."
                )
            given = list(listed)
        return [_as_number(name, value, sample) for value, sample in zip(given, samples, strict=True)]


def _called(name: str, function: Reward, argument: Any, sample: Sample) -> Any:
    try:
        return function(argument)
    except Exception as e:  # a function of the user's may raise anything
        listed = _OF_ALL if isinstance(argument, Sample) and "'Sample' object" in str(e) else ""
        raise UserError(f"The reward {name} failed with {type(e).__name__}: {e}.{listed} {_shown(sample)}") from None


def _as_number(name: str, value: Any, sample: Sample) -> float | None:
    """A value as a float; None stays what it is."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, numbers.Real | Decimal):  # bool is Real
        if inspect.iscoroutine(value):
            value.close()
        listed = _OF_ALL if isinstance(value, list) else ""
        raise UserError(
            f"The reward {name} returned {_kind(value)}. It must return a number, or None where it does not apply."
            f"{listed} {_shown(sample)}"
        )
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _kind(value: Any) -> str:
    return f"{value!r:.60} of type {type(value).__name__}"


def _shown(sample: Sample) -> str:
    prompt = sample.row.get("prompt") or [{"content": ""}]
    return f"The question was {str(prompt[-1].get('content'))[:200]!r}, the answer {sample.text[:200]!r}."


def _imported(path: str) -> Reward:
    """A function by its import path.

    Raises:
        UserError: If there is none.
    """
    if path in RENAMED:
        raise UserError(f"--rewards: the reward {path!r} is now called {RENAMED[path]!r}.")
    module, _, name = path.rpartition(".")
    if not module:
        raise UserError(
            f"--rewards: there is no reward {path!r}. There are {', '.join(BUILT_IN)}, or package.module.name."
        )
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise UserError(f"--rewards: {path} cannot be imported ({e}).") from None
    if not callable(function):
        raise UserError(f"--rewards: {path} is no function.")
    return function


def _takes_samples(path: str, function: Reward) -> bool:
    """Return whether a user's function takes a list of samples: by its annotation, or marked by `batched`.

    Raises:
        UserError: If it cannot be called with one argument, is asynchronous, or never returns a value.
    """
    if inspect.isclass(function):
        raise UserError(f"--rewards: {path} is a class; name a function, or an object that can be called.")
    called = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
        raise UserError(f"--rewards: {path} is asynchronous (async def). A reward is an ordinary function: def.")
    if inspect.isgeneratorfunction(called):
        raise UserError(f"--rewards: {path} is a generator (yield). A reward returns its value: return.")
    try:
        signature = inspect.signature(function)
        signature.bind(None)
    except TypeError as e:
        raise UserError(
            f"--rewards: {path} cannot be called with one argument ({e}). A reward takes a "
            "workflows.training.rewards.Sample, or a list[Sample]."
        ) from None
    except ValueError:  # one written in C tells no signature
        return False
    first = next(iter(signature.parameters.values()))
    if first.name in ("completions", "prompts", "completion_ids"):
        raise UserError(
            f"--rewards: {path}{signature} takes {first.name}, as reward functions of TRL do. Here a reward takes a "
            "workflows.training.rewards.Sample (or a list[Sample]) with the answer in its `text` and the row in `row`."
        )
    if _never_returns(called):
        raise UserError(f"--rewards: {path} never returns a value. Is a `return` missing?")
    listed = re.search(  # in Optional[...] and unions, too
        r"\b(?:list|List|Sequence|Iterable|Collection|tuple)\[|\A<class '(?:list|tuple)'>|\A(?:list|tuple)\Z",
        str(first.annotation).strip("'\""),  # a quoted one is a text
    )
    return bool(listed) or bool(getattr(function, "takes_samples", False))


def _never_returns(function: Any) -> bool:
    """Return whether no `return` in a function's source has a value; False where its source is not known."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(tree, ast.FunctionDef):  # a lambda has a value
        return False
    inner = {node for part in ast.walk(tree) if part is not tree and isinstance(part, ast.FunctionDef | ast.Lambda)
             for node in ast.walk(part)}  # fmt: skip
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return) and node not in inner]
    raises = isinstance(tree.body[-1], ast.Raise)
    return not raises and all(node.value is None for node in returns)
