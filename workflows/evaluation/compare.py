"""Two models on the same questions: the difference, its interval, and a paired test.

Both answered the same questions, so the difference is taken question by question; its standard error is smaller than
that of two independent samples (Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640, section 4). Right-or-wrong
scores are tested by McNemar's exact test (McNemar 1947, Psychometrika 12; the binomial form), other scores by a paired
bootstrap (Efron and Tibshirani 1993, chapter 16).
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workflows.errors import UserError

BOOTSTRAP_SAMPLES = 10_000
INTERVAL = 1.96
"""Standard errors on either side of a 95% interval."""
_DIGITS = 1e-6
"""Relative difference up to which a standard error counts as the binomial one, that of right-or-wrong scores."""
ANSWERS = "answers.jsonl"
"""Where an evaluation keeps the first questions answered in words: {"task", "question", "wanted", "answer"}."""


@dataclass(frozen=True)
class Comparison:
    """One metric of one task, the baseline against the new model.

    Attributes:
        task: The task's name.
        metric: The metric's name.
        n: Questions that both answered.
        base: The baseline's mean.
        base_stderr: Its standard error.
        tuned: The new model's mean.
        tuned_stderr: Its standard error.
        difference: tuned - base.
        stderr: Standard error of the paired difference.
        low: Lower end of the difference's 95% interval.
        high: Its upper end.
        p_value: Two-sided; how likely a difference as large is if both models are equally good.
        test: "mcnemar" or "bootstrap".
    """

    task: str
    metric: str
    n: int
    base: float
    base_stderr: float
    tuned: float
    tuned_stderr: float
    difference: float
    stderr: float
    low: float
    high: float
    p_value: float
    test: str

    def row(self) -> dict[str, Any]:
        """As JSON for metrics.json."""
        return asdict(self)

    def means(self) -> list[dict[str, Any]]:
        """The baseline's and the new model's mean, as rows of metrics.json."""
        rows: list[dict[str, Any]] = [
            {"value": self.base, "stderr": self.base_stderr},
            {"value": self.tuned, "stderr": self.tuned_stderr},
        ]
        if self.test == "mcnemar":
            for row in rows:
                row["low"], row["high"] = wilson_interval(row["value"], self.n)
        return rows


def compare(task: str, metric: str, base: list[float], tuned: list[float], seed: int = 1234) -> Comparison:
    """Compare two models' scores on the same questions.

    Args:
        task: The task's name.
        metric: The metric's name.
        base: The baseline's score on each question.
        tuned: The new model's scores, in the same order.
        seed: Seed of the bootstrap.
    """
    a, b = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError("two score lists of the same length, not empty, are needed")
    difference = b - a
    mean, stderr = float(difference.mean()), _stderr(difference)
    if set(np.unique([a, b])) <= {0.0, 1.0}:
        low, high = mean - INTERVAL * stderr, mean + INTERVAL * stderr
        p_value, test = mcnemar(int((difference < 0).sum()), int((difference > 0).sum())), "mcnemar"
    else:
        low, high, p_value = _bootstrap(difference, seed)
        test = "bootstrap"
    means = (float(a.mean()), _stderr(a), float(b.mean()), _stderr(b))
    return Comparison(task, metric, a.size, *means, mean, stderr, low, high, p_value, test)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95% interval of a probability, from the share of n rows (Wilson 1927, JASA 22, p. 209).

    Unlike the share plus and minus its standard errors it stays between 0 and 1, and is no point at a share of 0 or 1.
    """
    spread = INTERVAL**2 / n
    centre, half = share + spread / 2, INTERVAL * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def is_share(value: float, stderr: float | None, n: int | None) -> bool:
    """Return whether a mean is that of right-or-wrong scores, by its standard error (of the sample, as lm-eval's)."""
    if n == 1:  # lm-eval has no standard error of one score
        return value in (0, 1)
    if stderr is None or not n or not 0 <= value <= 1:
        return False
    return math.isclose(stderr**2 * (n - 1), value * (1 - value), rel_tol=_DIGITS, abs_tol=1e-12)


def interval_of(row: dict[str, Any]) -> tuple[float, float] | None:
    """95% interval of a row of metrics.json: its own, which shares have, else from its standard error; None without."""
    if row.get("low") is not None and row.get("high") is not None:
        return row["low"], row["high"]
    if not row.get("stderr"):  # 0 is that of a single row, or of rows that are all alike: it says nothing
        return None
    return row["value"] - INTERVAL * row["stderr"], row["value"] + INTERVAL * row["stderr"]


def with_interval(row: dict[str, Any], digits: int = 3, in_percent: bool = False) -> str:
    """A row of metrics.json as "value (low to high)", the 95% interval, as all tables show it."""
    scale, unit = (100, "%") if in_percent else (1, "")
    text = f"{scale * row['value']:.{digits}f}{unit}"
    if (interval := interval_of(row)) is None:
        return text
    low, high = (f"{scale * end:.{digits}f}" for end in interval)
    return f"{text} ({low} to {high})"


def _stderr(scores: np.ndarray) -> float:
    """Standard error of the mean, with the sample's own standard deviation (n - 1), as lm-eval reports it."""
    return float(scores.std(ddof=1) / math.sqrt(scores.size)) if scores.size > 1 else 0.0


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of McNemar's test.

    Args:
        lost: Questions that only the baseline answers rightly.
        won: Questions that only the new model answers rightly.

    Returns:
        The probability, if each such question falls to either with probability 1/2, of a split at least as uneven.
    """
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1))
    return float(min(1, tail * 2 / 2**n)) if n < 1000 else min(1.0, math.exp(math.log(tail) - (n - 1) * math.log(2)))


def _bootstrap(difference: np.ndarray, seed: int) -> tuple[float, float, float]:
    """95% percentile interval and two-sided p-value of a mean paired difference."""
    rng = np.random.default_rng(seed)
    means = np.array([rng.choice(difference, difference.size).mean() for _ in range(BOOTSTRAP_SAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    extreme = int((np.abs(means - difference.mean()) >= abs(difference.mean())).sum())
    return float(low), float(high), (extreme + 1) / (BOOTSTRAP_SAMPLES + 1)


def samples_file(out_dir: Path, task: str) -> Path:
    """Where an evaluation keeps a task's questions and answers, a line each."""
    return out_dir / f"samples_{task.replace('/', '_')}.jsonl"


def compare_samples(base_dir: Path, tuned: dict[str, list[dict[str, Any]]]) -> tuple[list[Comparison], list[str]]:
    """Compare a run's answers with those of an earlier run.

    Args:
        base_dir: The folder of the earlier run, with its `samples_TASK.jsonl` files.
        tuned: This run's samples by task, as lm-eval gives them.

    Returns:
        A comparison for each task and metric that both have, and remarks on what could not be compared.

    Raises:
        UserError: If the folder is missing, nothing can be compared, or the questions differ.
    """
    if not base_dir.is_dir():
        raise UserError(f"--baseline {base_dir} is not a folder: name the out_dir of an earlier `make evaluate`.")
    comparisons, remarks = [], []
    for task, samples in tuned.items():
        file = samples_file(base_dir, task)
        if not file.is_file():
            remarks.append(f"{task} is not among the baseline's tasks")
            continue
        before, after = _by_question(read_samples(file)), _by_question(samples)
        shared = [question for question in after if question in before]
        changed = [q for q in shared if before[q]["doc_hash"] != after[q]["doc_hash"]]
        if changed:
            raise UserError(
                f"{file}: question {changed[0][0]} of {task} is another one there (the data was made anew?). "
                "Evaluate the baseline again."
            )
        if len(shared) < max(len(before), len(after)):
            remarks.append(f"{task}: {len(shared)} questions compared, of {len(before)} (baseline) and {len(after)}")
        if not shared:
            continue
        for metric in after[shared[0]]["metrics"]:
            pairs = [(before[q].get(metric), after[q].get(metric)) for q in shared]
            if all(isinstance(score, int | float) for pair in pairs for score in pair):
                base, new = zip(*pairs, strict=True)
                comparisons.append(compare(task, metric, list(base), list(new)))
    if not comparisons:
        raise UserError(f"--baseline {base_dir}: nothing there can be compared. " + "; ".join(remarks))
    return comparisons, remarks


def _by_question(samples: list[dict[str, Any]]) -> dict[tuple[int, str], dict[str, Any]]:
    return {(sample["doc_id"], sample.get("filter", "none")): sample for sample in samples}


def read_samples(file: Path) -> list[dict[str, Any]]:
    """The lines of an evaluation's samples file.

    Raises:
        UserError: If a line is not a sample.
    """
    samples = []
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # texts may hold other line separators
    for number, line in enumerate(lines, start=1):
        try:
            sample = json.loads(line)
            samples.append({**sample, "doc_id": sample["doc_id"], "doc_hash": sample["doc_hash"]})
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{file}, line {number}: not a sample. Evaluate the baseline again.") from None
    return samples
