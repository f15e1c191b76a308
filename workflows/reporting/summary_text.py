"""The demo's summary as text for the terminal: the panel, a table for each thing measured, and what is next."""

import math
import textwrap
from pathlib import Path
from typing import Any

from workflows.evaluation.compare import wilson_interval, with_interval
from workflows.reporting.panel_text import WIDTH, side_by_side

Row = dict[str, Any]
FACTS = {"medical": "exact_name", "meaning": "close_f1", "naming": "exact_name"}
"""Kinds of an assistant's questions about taught facts, each with the metric that says whether an answer is right."""
SENTENCES = ("medical", "naming")
"""Kinds of an assistant's questions whose answer is a name, which may be in a plain sentence."""
DISCLAIMERS = ("advice", "advice_other")
_EXAM: tuple[tuple[str, dict[str, tuple[str, str]]], ...] = (
    (
        "Taught facts, asked in words that no training row has: right",
        {
            "lay words > term": ("medical", "exact_name"),
            "term > meaning": ("meaning", "close_f1"),
            "meaning > term": ("naming", "exact_name"),
            "unseen lay words > term": ("lay", "exact_name"),
        },
    ),
    (
        "Manner: form of names, identity, and a disclaimer where advice is asked for (unseen complaints)",
        {
            "right, in a sentence": ("sentence", "name_in_sentence"),
            "identity, small talk": ("identity", "contains"),
            "disclaimer": ("advice", "disclaimer"),
            "disclaimer, new words": ("advice_other", "disclaimer"),
        },
    ),
    (
        "What must stay: the base's own answers to general prompts; and findings that were never taught",
        {
            "log-probability, nats a token": ("general", "logprob"),
            "hpo_mcq, one of four options": ("hpo_mcq", "acc"),
        },
    ),
)
"""Tables of an assistant's exam: for each column its task, by the last part of its name, and its metric."""
_CHANGES = {
    "taught facts": "facts",
    "right, in a sentence": "sentence",
    "disclaimer": "disclaimer",
    "general, nats": "general",
}
LOSS_OF_SFT = ("base", "lora")
"""Stages whose validation loss is the mean negative log-likelihood of the data's answers."""
_SHOWN = 300
"""Characters of a question or answer; the summary has all of them."""
_LABEL = 8


def as_text(summary: dict[str, Any], run_dir: Path) -> str:
    """The summary for the terminal.

    Args:
        summary: What `demo` writes.
        run_dir: The run's folder.
    """
    stages = summary["stages"]
    lines = [side_by_side(summary["panel"], summary["panel_tokens"])]
    by_stage = {stage["name"]: by_kind(stage["metrics"]) for stage in stages}
    shown: set[tuple[str, str]] = set()
    if has_exam := is_exam(by_stage["base"]):
        for title, columns in _EXAM:
            lines += _table(title, list(columns), {
                name: [_cell(rows.get(column), column[1], digits=0) for column in columns.values()]
                for name, rows in by_stage.items()
            })  # fmt: skip
            shown |= set(columns.values())
        shown |= {*((kind, "name_in_sentence") for kind in (*SENTENCES, "lay")), ("hpo_mcq", "acc_norm")}
        lines += _changes(summary["changes"])
    for task in dict.fromkeys(task for rows in by_stage.values() for task, _ in rows if task):
        keys = [key for rows in by_stage.values() for key in rows if key[0] == task and key not in shown]
        if names := [metric for _, metric in dict.fromkeys(keys)]:
            lines += _table(f"Held-out questions of {task}", names, {
                stage: [_cell(rows.get((task, name)), name) for name in names] for stage, rows in by_stage.items()
            })  # fmt: skip
    losses = {name: [_cell(rows.get(("", "val_loss")), "val_loss")] for name, rows in by_stage.items()}
    losses = {name: cells for name, cells in losses.items() if name in LOSS_OF_SFT}
    if all(cells != [""] for cells in losses.values()):
        lines += _table("Loss on validation rows", ["nats a token"], losses)
    if has_exam:
        found = [line for stage in stages for line in warnings(stage)]
        lines += ["", *found] if found else []
    else:
        lines += _comparisons(stages) + [line for stage in stages for line in own_test(stage)]
    return "\n".join([*lines, *_ollama(summary, run_dir), *_seconds(summary), *_next(summary, run_dir)])


def is_exam(rows: dict[tuple[str, str], Row]) -> bool:
    """Return whether the questions of an assistant were asked."""
    return all((kind, "name_in_sentence") in rows for kind in SENTENCES)


def kind_of(task: str) -> str:
    """A task in a word: the kind of an exam's questions, "general" for a model's own answers, else its name."""
    return "general" if task.endswith("_taught") else task.partition("_questions/")[2] or task


def by_kind(metrics: list[Row]) -> dict[tuple[str, str], Row]:
    """Rows of metrics.json by the kind of their task and the metric; of the exam also its pooled rows."""
    rows = {(kind_of(row.get("task", "")), row["name"]): row for row in metrics}
    if is_exam(rows):
        rows["sentence", "name_in_sentence"] = pooled([rows[kind, "name_in_sentence"] for kind in SENTENCES])
    return rows


def pooled(rows: list[Row]) -> Row:
    """Shares of several tasks as one share of all their questions, with Wilson's interval."""
    n = sum(row["n"] for row in rows)
    share = sum(row["value"] * row["n"] for row in rows) / n
    low, high = wilson_interval(share, n)
    return {"name": rows[0]["name"], "value": share, "stderr": None, "n": n, "low": low, "high": high}


def _cell(row: Row | None, metric: str, digits: int = 1) -> str:
    if row is None:
        return ""
    in_percent = metric not in ("logprob", "val_loss") and 0 <= row["value"] <= 1
    return with_interval(row, digits=digits if in_percent else 3, in_percent=in_percent)


def _table(title: str, headings: list[str], rows: dict[str, list[str]]) -> list[str]:
    """A table: a row for each stage."""
    width = [2 + max(len(heading), *(len(cells[i]) for cells in rows.values())) for i, heading in enumerate(headings)]
    label = max(_LABEL, 1 + max(map(len, rows)))
    lines = ["", title, (" " * (2 + label) + _right(headings, width)).rstrip()]
    return lines + [f"  {name:<{label}}{_right(cells, width)}".rstrip() for name, cells in rows.items()]


def _right(cells: list[str], width: list[int]) -> str:
    return "".join(f"{cell:>{size}}" for cell, size in zip(cells, width, strict=True))


def _changes(changes: list[dict[str, Any]]) -> list[str]:
    """What each stage changed, on the same questions."""
    rows: dict[str, list[str]] = {}
    for change in changes:
        found = {c["metric"]: c for c in change["compared"]}
        rows[change["stage"]] = [
            _difference(found[name], 1 if name == "general" else 100) if name in found else ""
            for name in _CHANGES.values()
        ]
    title = "Change from the stage before, on the same questions, in points"
    return _table(title, list(_CHANGES), rows) if rows else []


def _difference(compared: dict[str, Any], scale: int) -> str:
    digits = 0 if scale == 100 else 2
    value, low, high = (f"{scale * compared[name]:+.{digits}f}" for name in ("difference", "low", "high"))
    return f"{value} ({low} to {high})"


def _comparisons(stages: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"  {stage['name']} - base, {c['task']} {c['metric']}: {100 * c['difference']:+.1f} points "
        f"({100 * c['low']:+.1f} to {100 * c['high']:+.1f}), p = {c['p_value']:.2g}, {c['n']} questions"
        for stage in stages[1:]
        for c in stage["comparison"]
    ]
    return ["", "Differences on the same questions", *lines] if lines else []


def own_test(stage: dict[str, Any]) -> list[str]:
    """What a stage measured of its own aim on held-out rows, and one of its answers before and after."""
    rows = {row["name"]: row for row in stage["metrics"] if row["split"] == "test" and "task" not in row}
    if not rows:
        return []
    lines = ["", f"{stage['name']}, {max(row['n'] for row in rows.values())} held-out rows"]
    for name, row in rows.items():
        value, _, interval = with_interval(row).partition(" ")
        lines.append(f"  {name.replace('_', ' '):<26}{value:>8} {interval}".rstrip())
    for gain in stage.get("gain", []):
        what, interval = f"{gain['metric'].replace('_', ' ')}, change", f"({gain['low']:+.3f} to {gain['high']:+.3f})"
        lines.append(f"  {what:<26}{gain['difference']:>+8.3f} {interval}")
    for answer in stage.get("shown", [])[:1]:
        lines += [f"  {name + ':':<10}{_short(text)}" for name, text in answer.items()]
    return lines + warnings(stage)


def warnings(stage: dict[str, Any]) -> list[str]:
    """What a stage made worse than it was before, in words."""
    return [f"  WARNING, {stage['name']}: {text}" for text in stage.get("warnings", [])]


def _short(text: str) -> str:
    """On one line; of a long text its beginning and its end, where the question is that follows an abstract."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN // 2]} … {line[-_SHOWN // 2 :]}"


def _ollama(summary: dict[str, Any], run_dir: Path) -> list[str]:
    ollama = summary["ollama"]
    ids = {True: "equal to ours", None: "not verified", False: "DIFFERENT"}
    return [
        "",
        f"In Ollama {ollama['version']}",
        f"  prompt token ids of {ollama['prompts']} questions: {ids[ollama['prompt_ids_equal']]};"
        f" conversations: {ids[ollama['chat_prompts_equal']]}",
        *(
            f"  greedy answers as LitGPT's ({kind}): {100 * share:.0f}%"
            for kind, share in ollama["greedy_agreements"].items()
        ),
        *(f"  {run_dir}/ollama/{file}: {size / 1e6:,.0f} MB" for file, size in ollama["file_bytes"].items()),
    ]


def _seconds(summary: dict[str, Any]) -> list[str]:
    rates = {stage["name"]: stage.get("tokens_per_second") for stage in summary["stages"]}
    lines = ["", "Time"]
    for name, seconds in summary["steps"].items():
        rate = f"  {rates[name]:,.0f} tokens/s" if rates.get(name) else ""
        lines += [f"  {name:<20}{clock(seconds):>8}{rate}"] if seconds else []
    return [*lines, f"  {'in all':<20}{clock(summary['total_seconds']):>8}"]


def clock(seconds: float) -> str:
    """Minutes and seconds, as 4:05."""
    whole = math.floor(seconds + 0.5)
    return f"{whole // 60}:{whole % 60:02d}"


def _next(summary: dict[str, Any], run_dir: Path) -> list[str]:
    """What was left out, what the intervals are, and the next three commands."""
    run, name = run_dir.name, summary["ollama"].get("name", run_dir.name)
    of_run = "" if run == "demo" else f" RUN={run}"
    of_name = "" if name == run else f" NAME={name}"
    commands = {
        f"make chat{of_run}{of_name}": "talk to it",
        f"make report{of_run}": f"the page about all this: {(run_dir / 'report.html').resolve().as_uri()}",
        'make data DATA=jsonl ARGS="--file mine.csv --name mine"': "your own questions and answers, then:",
        "make lora export chat DATA=mine RUN=mine": "your own model (docs/data.md, README.md)",
    }
    width = max(map(len, commands))
    left_out = [line for text in summary["left_out"] for line in textwrap.wrap(f"left out: {text}", WIDTH)]
    return [
        "",
        "In parentheses are 95% intervals. Not medical advice.",
        *left_out,
        f"All of it: {run_dir}/summary.json",
        "",
        "Next",
        *(f"  {command:<{width}}  {about}" for command, about in commands.items()),
    ]
