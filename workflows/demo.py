"""The end of `make demo`: ask the new model three held-out questions in Ollama, and put all numbers in one table.

The stages themselves are targets of the Makefile; each left its numbers in files, which are read here.
"""

import random
from pathlib import Path
from typing import Any

from data_prep.rows import Row, read_rows
from workflows.checkpoint import versions
from workflows.errors import UserError
from workflows.files import read_json, write_json
from workflows.measure import hardware, seconds_of_step, step_began
from workflows.ollama.client import stream_chat
from workflows.ollama.server import open_server

STAGES = ("base", "lora")
QUESTIONS = 3


def setup(
    run_dir: Path = Path("out/demo"),
    base_dir: Path = Path("checkpoints/embedded/smollm2-135m-instruct"),
    data: Path = Path("data/hpo"),
    name: str = "demo",
    seed: int = 7,
    show: bool = False,
) -> None:
    """Write RUN_DIR/summary.json from what the stages wrote, and print it as a table.

    Args:
        run_dir: The run's folder, with evaluate/, lora/ and ollama/ in it.
        base_dir: The checkpoint that the run started from.
        data: The data directory; questions are drawn from its test split.
        name: The model's name in Ollama.
        seed: Chooses the questions.
        show: Only print the summary that is there.

    Raises:
        UserError: If a stage has not run, or Ollama does not answer.
    """
    began = step_began()
    if show:
        print(as_text(read_json(run_dir / "summary.json"), run_dir))
        return
    stages = [stage_summary(run_dir, stage) for stage in STAGES]
    answers = ask(data, name, seed)
    summary = summarize(run_dir, base_dir, data, stages, answers)
    summary["steps"]["ask"] = seconds_of_step(began)
    summary["total_seconds"] = sum(summary["steps"].values())
    write_json(run_dir / "summary.json", summary)


def stage_summary(run_dir: Path, stage: str) -> dict[str, Any]:
    """One stage's seconds and metrics: its scores on held-out questions, and what its training reported."""
    scored = read_json(run_dir / "evaluate" / stage / "metrics.json")
    summary: dict[str, Any] = {"name": stage, "seconds": scored["seconds"], "metrics": scored["metrics"]}
    if stage != "base":
        trained = read_json(run_dir / stage / "final" / "metrics.json")
        summary["seconds"] += trained["seconds"]
        summary["metrics"] = scored["metrics"] + trained["metrics"]
        summary |= {key: trained[key] for key in ("tokens_per_second", "peak_bytes")}
        summary["comparison"] = scored["comparison"]
    return summary


def ask(data: Path, name: str, seed: int) -> list[dict[str, str]]:
    """Put held-out questions to the model in Ollama, with the settings that its Modelfile gives it.

    Returns:
        For each question its text, the model's answer, and the answer of the data set.

    Raises:
        UserError: If the test split is too small, or Ollama fails.
    """
    rows = [row for row in read_rows(data / "test.jsonl") if row.get("kind") in (None, "name")]
    if len(rows) < QUESTIONS:
        raise UserError(f"{data}/test.jsonl has {len(rows)} questions, the demo asks {QUESTIONS}.")
    answers = []
    with open_server() as server:
        for row in random.Random(seed).sample(rows, QUESTIONS):
            question = _question(row)
            parts = stream_chat(server, name, [{"role": "user", "content": question}], {})
            answer = "".join(part.message.content or "" for part in parts)
            answers.append({"question": question, "answer": answer, "expected": row["messages"][-1]["content"]})
    return answers


def _question(row: Row) -> str:
    return next(message["content"] for message in row["messages"] if message["role"] == "user")


def summarize(
    run_dir: Path, base_dir: Path, data: Path, stages: list[dict[str, Any]], answers: list[dict[str, str]]
) -> dict[str, Any]:
    """The summary in the shape that DESIGN and the README's tables read; times of all steps under `steps`."""
    verified = read_json(run_dir / "ollama" / "verification.json")
    exported = read_json(run_dir / "ollama" / "metrics.json")
    steps = {
        "download": read_json(base_dir / "metrics.json")["seconds"],
        "data": read_json(data / "metrics.json")["seconds"],
        "evaluate base": stages[0]["seconds"],
        **{f"{stage['name']} and evaluate": stage["seconds"] for stage in stages[1:]},
        "export and verify": exported["seconds"],
    }
    return {
        "stages": stages,
        "ollama": {
            "version": verified["version"],
            "prompt_ids_equal": verified["prompt_ids_equal"],
            "chat_prompts_equal": verified["chat_prompts_equal"],
            "prompts": verified["prompts"],
            "greedy_agreement": verified["greedy_agreement"].get("q8_0"),
            "greedy_agreements": verified["greedy_agreement"],
            "file_bytes": exported["file_bytes"],
            "answers": answers,
        },
        "steps": steps,
        "total_seconds": sum(steps.values()),
        "hardware": hardware(),
        "versions": versions(),
    }


def as_text(summary: dict[str, Any], run_dir: Path) -> str:
    """The summary as a table for the terminal."""
    lines = ["", "Held-out questions", f"  {'stage':<8}{'acc':>16}{'acc_norm':>16}{'val loss':>10}{'tokens/s':>10}"]
    for stage in summary["stages"]:
        rows = {row["name"]: row for row in stage["metrics"]}
        cells = [_score(rows.get("acc")), _score(rows.get("acc_norm"))]
        loss = f"{rows['val_loss']['value']:.3f}" if "val_loss" in rows else ""
        rate = f"{stage['tokens_per_second']:,.0f}" if stage.get("tokens_per_second") else ""
        lines.append(f"  {stage['name']:<8}{cells[0]:>16}{cells[1]:>16}{loss:>10}{rate:>10}")
    for stage in summary["stages"][1:]:
        lines += [
            f"  {stage['name']} - base, {c['metric']}: {100 * c['difference']:+.1f} points, 95% interval "
            f"{100 * c['low']:+.1f} to {100 * c['high']:+.1f}, p = {c['p_value']:.2g}, {c['n']} questions"
            for c in stage["comparison"]
        ]

    ollama = summary["ollama"]
    ids = {True: "equal to ours", None: "not verified", False: "DIFFERENT"}
    lines += [
        "",
        f"In Ollama {ollama['version']}",
        f"  prompt token ids of {ollama['prompts']} questions: {ids[ollama['prompt_ids_equal']]};"
        f" conversations: {ids[ollama['chat_prompts_equal']]}",
        *(
            f"  greedy answers as LitGPT's ({kind}): {100 * share:.0f}%"
            for kind, share in ollama["greedy_agreements"].items()
        ),
        *(f"  {run_dir}/ollama/{file}: {size / 1e6:,.0f} MB" for file, size in ollama["file_bytes"].items()),
        "",
        "Asked just now (not medical advice)",
    ]
    for answer in ollama["answers"]:
        lines += [
            f"  Q: {answer['question']}",
            f"  A: {answer['answer'].strip()}",
            f"     (expected: {answer['expected']})",
        ]
    lines += ["", "Seconds"]
    lines += [f"  {name:<20}{seconds:>8.0f}" for name, seconds in summary["steps"].items()]
    lines += [f"  {'total':<20}{summary['total_seconds']:>8.0f}", "", f"All of it: {run_dir}/summary.json"]
    return "\n".join(lines)


def _score(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['value']:.1f}% ± {100 * row['stderr']:.1f}" if row["stderr"] else f"{100 * row['value']:.1f}%"
