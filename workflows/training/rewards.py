"""What an answer is worth: verifiable rewards, shaping, and any function of one's own, composed with weights.

A reward is a function of a `Sample` and gives a number. In a recipe they are listed with their weights,

    rewards:
      - {reward: finding, weight: 1.0}
      - {reward: format, weight: 0.2}
      - {reward: my_package.my_module.my_function, weight: 0.5}

and an answer's reward is the weighted sum.
"""

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.rows import Row, normalise
from workflows.errors import UserError
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


Reward = Callable[[Sample], float]

_THOUGHTS = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*(.*)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")
_LETTER = re.compile(
    r"\\boxed\{(?:\\text\{)?\W*([A-Z])\b"
    r"|\b(?i:answer|option|choice)\b\W*(?i:is\b\W*)?\(?([A-Z])\b"
    r"|^\W*([A-Z])\b(?:(?= is\b)|(?![a-z' ]\w))"
    r"|\(([A-Z])\)",
    re.MULTILINE,
)


def final_answer(text: str) -> str:
    """An answer without its thoughts."""
    found = _THOUGHTS.match(text)
    return (found[2] if found else text).strip()


def finding(sample: Sample) -> float:
    """Token-level F1 of the answer with the row's best-matching "answers" (a term's name and synonyms), from 0 to 1.

    As SQuAD's F1 (Rajpurkar et al. 2016, arXiv 1606.05250, sec. 6.1): words without case and punctuation, as multisets.
    """
    said = normalise(final_answer(sample.text)).split()
    return max(token_f1(said, normalise(answer).split()) for answer in sample.row["answers"])


def token_f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words."""
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def exact(sample: Sample) -> float:
    """1 if the answer is one of the row's "answers", case and punctuation aside, else 0."""
    said = normalise(final_answer(sample.text))
    return float(any(said == normalise(answer) for answer in sample.row["answers"]))


def letter(sample: Sample) -> float:
    """1 if the answer chooses the right option of a `scoring` row by its letter, else 0; the last one named counts."""
    found = [next(filter(None, groups)) for groups in _LETTER.findall(final_answer(sample.text))]
    return float(bool(found) and found[-1] == chr(ord("A") + sample.row["answer"]))


def number(sample: Sample) -> float:
    r"""1 if the answer's number equals that of one of the row's "answers", else 0.

    The number is what stands in the last \boxed{}, else after the last ####, else the last number of all.
    """
    said = number_in(final_answer(sample.text))
    wanted = [number_in(answer) for answer in sample.row["answers"]]
    return float(
        said is not None and any(w is not None and math.isclose(said, w, rel_tol=1e-6, abs_tol=1e-9) for w in wanted)
    )


def number_in(text: str) -> float | None:
    r"""The number that a text gives as its answer (see `number`), or None."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    part = boxed[-1] if boxed else text.rpartition("####")[2]
    numbers = _NUMBER.findall(part)
    if not numbers:
        return None
    first_counts = not boxed and "####" in text
    return float((numbers[0] if first_counts else numbers[-1]).replace(",", ""))


def format(sample: Sample) -> float:
    """1 for thoughts that are closed once and an answer after them, `<think>…</think>` first, else 0.

    Where the prompt has opened the thoughts, the answer need not.
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
    words = normalise(sample.text).split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) / len(triples) - 1 if triples else 0.0


BUILT_IN: dict[str, Reward] = {
    "finding": finding,
    "exact": exact,
    "letter": letter,
    "number": number,
    "format": format,
    "brevity": brevity,
    "repetition": repetition,
}
NEEDS = {"finding": "answers", "exact": "answers", "number": "answers", "letter": "answer"}
"""The field of a row that a reward reads."""
LARGEST_TOTAL = 1e15
"""Largest sum of an answer's rewards: its square, summed over a step's answers, is finite in float32."""


@dataclass
class WeightedReward:
    """One entry of a recipe's `rewards`."""

    reward: str
    """One of finding, exact, letter, number, format, brevity, repetition, or an importable function
    (`package.module.name`) of a `workflows.training.rewards.Sample`, or a reward model's folder with a slash in it
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
            UserError: If there is none, one is unknown, named twice, or has a weight that is no number.
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
        for name in names:
            if "/" in name:
                self.models[name] = LearnedReward(Path(name), precision, device)
            else:
                self.functions[name] = BUILT_IN.get(name) or _imported(name)

    @property
    def fields(self) -> list[str]:
        """The fields of a row that the built-in ones among them read."""
        return sorted({NEEDS[name] for name in self.functions if name in NEEDS})

    def __call__(self, samples: Sequence[Sample]) -> list[dict[str, float]]:
        """Every reward of each answer, unweighted, and their weighted sum under "total".

        Raises:
            UserError: If one of them fails or gives no finite number, or their sum is too large; the message shows the
                answer.
        """
        columns = {name: self._column(name, samples) for name in self.weights}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        totals = [sum(self.weights[name] * value for name, value in row.items()) for row in rows]
        for sample, total in zip(samples, totals, strict=True):
            if not abs(total) <= LARGEST_TOTAL:
                raise UserError(
                    f"The rewards of an answer sum up to {total:g}; beyond {LARGEST_TOTAL:g} their statistics are not "
                    f"finite. Scale them, with a smaller weight in --rewards say. {_shown(sample)}"
                )
        return [{**row, "total": total} for row, total in zip(rows, totals, strict=True)]

    def _column(self, name: str, samples: Sequence[Sample]) -> list[float]:
        """One reward of each answer."""
        if name in self.models:
            prompts = [sample.row["prompt"] for sample in samples]
            found = self.models[name](prompts, [sample.text for sample in samples])
        else:
            found = [self._value(name, sample) for sample in samples]
        for sample, value in zip(samples, found, strict=True):
            if not math.isfinite(value):
                raise UserError(f"The reward {name} gave {value}. {_shown(sample)}")
        return found

    def _value(self, name: str, sample: Sample) -> float:
        """What a function says of one answer."""
        try:
            return float(self.functions[name](sample))
        except Exception as e:  # a function of the user's may raise anything
            raise UserError(f"The reward {name} failed with {type(e).__name__}: {e}. {_shown(sample)}") from None


def _shown(sample: Sample) -> str:
    prompt = sample.row.get("prompt") or [{"content": ""}]
    return f"The question was {str(prompt[-1].get('content'))[:200]!r}, the answer {sample.text[:200]!r}."


def _imported(path: str) -> Reward:
    """A function by its import path.

    Raises:
        UserError: If there is none.
    """
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
