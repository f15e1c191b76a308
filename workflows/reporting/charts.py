"""Which of a log's columns are drawn together, in which unit, under which name."""

import math
from dataclasses import dataclass
from typing import Any

from workflows.evaluation.compare import interval_of
from workflows.reporting.gather import Run, in_turn

MOST_POINTS = 2000
"""Points of a curve; of a longer log every so manieth row is drawn."""


@dataclass(frozen=True)
class Kind:
    """One chart.

    Attributes:
        title: What it shows.
        columns: Columns of metrics.csv and what they are called beside each other.
        unit: What the axis counts.
        scale: What the numbers are multiplied by.
        first: Whether it is among those that are shown at once.
    """

    title: str
    columns: dict[str, str]
    unit: str = ""
    scale: float = 1.0
    first: bool = True


KINDS = (
    Kind("Loss", {"loss": "training", "val_loss": "validation"}),
    Kind("Reward", {"reward": "sampled", "val_reward": "validation, greedy"}),
    Kind("Rewards of the answers", {"rewards_chosen": "chosen", "rewards_rejected": "rejected"}),
    Kind("Margin", {"margin": "training", "val_margin": "validation"}),
    Kind(
        "Pairs the right way round",
        {"accuracy": "training", "val_accuracy": "validation", "val_logprob_accuracy": "by log-probability"},
        unit="%",
        scale=100,
    ),
    Kind("KL to the reference", {"kl": "training"}, unit="nats"),
    Kind("Distance from the teacher", {"divergence": "training", "val_divergence": "validation"}, unit="nats a token"),
    Kind("Throughput", {"tokens_per_second": "whole steps", "sampled_per_second": "sampling"}, unit="tokens/s"),
    Kind("Peak memory", {"peak_bytes": "since the row before"}, unit="GB", scale=1e-9),
    Kind("Learning rate", {"lr": "learning rate"}, first=False),
    Kind("Norm of the gradient", {"grad_norm": "before clipping"}, first=False),
    Kind("Length of an answer", {"answer_tokens": "mean"}, unit="tokens", first=False),
    Kind("Entropy", {"entropy": "of the policy"}, unit="nats a token", first=False),
    Kind(
        "Shares",
        {"truncated": "cut at the limit", "clipped": "clipped tokens", "no_signal": "groups without signal"},
        unit="%",
        scale=100,
        first=False,
    ),
    Kind("Spread of the rewards", {"reward_std": "within a group"}, first=False),
    Kind("Log-probability of the answers", {"logprobs_chosen": "chosen", "logprobs_rejected": "rejected"}, first=False),
    Kind("Updating alone", {"updated_per_second": "without sampling"}, unit="tokens/s", first=False),
)


def charts(runs: list[Run]) -> list[dict[str, Any]]:
    """The charts of each training step, the runs in one chart each: {"step", "charts": [...], "thinned"}."""
    groups = []
    for name in in_turn({step.name for run in runs for step in run.steps}):
        logs = {run.name: step.log for run in runs for step in run.steps if step.name == name and step.log}
        if logs:
            columns = list(dict.fromkeys(column for log in logs.values() for row in log for column in row))
            drawn = [_chart(kind, logs) for kind in kinds_for(columns)]
            groups.append({"step": name, "charts": drawn, "thinned": max(_stride(len(log)) for log in logs.values())})
    return groups


def kinds_for(columns: list[str]) -> list[Kind]:
    """The charts for a log's columns; one that no chart names gets its own."""
    known = [kind for kind in KINDS if set(kind.columns) & set(columns)]
    named = {"step", *(column for kind in KINDS for column in kind.columns)}
    words = {column: column.replace("_", " ") for column in columns if column not in named}
    return known + [Kind(text[:1].upper() + text[1:], {column: text}, first=False) for column, text in words.items()]


def _chart(kind: Kind, logs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    series, gaps = [], 0
    for run, log in logs.items():
        for column, called in kind.columns.items():
            points = [(int(row["step"]), _finite(row[column] * kind.scale)) for row in log if column in row]
            if points:
                x, y = zip(*points[:: _stride(len(points))], strict=True)
                series.append({"run": run, "name": called, "x": x, "y": y, "sparse": column.startswith("val_")})
                gaps += sum(value is None for _, value in points)
    return {"title": kind.title, "unit": kind.unit, "first": kind.first, "series": series, "gaps": gaps}


def _finite(value: float) -> float | None:
    """None, which is drawn as a gap, for a number that no axis can show."""
    return value if math.isfinite(value) else None


def _stride(rows: int) -> int:
    return max(1, -(-rows // MOST_POINTS))


def score_charts(runs: list[Run]) -> list[dict[str, Any]]:
    """A chart for each task and metric: each stage's score with its 95% interval; shares in percent."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for stage, scores in run.scores.items():
            for row in scores["metrics"]:
                found.setdefault((row["task"], row["name"]), []).append({"run": run.name, "stage": stage, **row})
    return [_score_chart(task, metric, rows) for (task, metric), rows in found.items()]


def _score_chart(task: str, metric: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    is_share = all(0 <= row["value"] <= 1 for row in rows)
    scale = 100 if is_share else 1
    points = [
        {
            "run": row["run"],
            "stage": row["stage"],
            "value": scale * row["value"],
            "interval": None if (ends := interval_of(row)) is None else [scale * end for end in ends],
        }
        for row in rows
    ]
    stages = in_turn({row["stage"] for row in rows})
    return {"task": task, "metric": metric, "unit": "%" if is_share else "", "stages": stages, "points": points}
