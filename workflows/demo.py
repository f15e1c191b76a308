"""The end of `make demo`: ask the new model three held-out questions in Ollama, and put all numbers in one table.

The stages themselves are targets of the Makefile; each left its numbers in files, which are read here. Only the
validation loss of the untuned model is measured here, to go with the one that training reports.
"""

import random
import time
from pathlib import Path
from typing import Any

from data_prep.chat_data import ChatData
from data_prep.rows import read_rows
from workflows.checkpoint import metric, versions
from workflows.errors import UserError
from workflows.evaluation.compare import with_interval
from workflows.files import read_json, write_json
from workflows.lora import SFT
from workflows.measure import hardware, seconds_of_step, step_began
from workflows.merge import read_hyperparameters
from workflows.ollama.client import stream_chat
from workflows.ollama.server import open_server
from workflows.training.held_out import right_answer
from workflows.training.loop import TrainArgs
from workflows.training.model import load_model
from workflows.training.processes import choose_accelerator

LOSS_OF_SFT = ("base", "lora")
"""Stages whose validation loss is the mean negative log-likelihood of the data's answers."""
QUESTIONS = 3
ANSWER_TOKENS = 256
"""The most tokens of an answer: a model that learned from truncated answers may not stop by itself."""
_SHOWN = 300
"""Characters of a question or answer in the table; the summary has all of them."""


def setup(
    run_dir: Path = Path("out/demo"),
    base_dir: Path = Path("checkpoints/embedded/smollm2-135m-instruct"),
    data: Path = Path("data/hpo"),
    name: str = "demo",
    stages: list[str] = ["lora"],  # noqa: B006 (read only)
    seed: int = 7,
    scored: bool = True,
    show: bool = False,
) -> None:
    """Write RUN_DIR/summary.json from what the stages wrote, and print it as a table.

    Args:
        run_dir: The run's folder, with evaluate/, a folder for each stage, and ollama/ in it.
        base_dir: The checkpoint that the run started from.
        data: The data directory; questions are drawn from its test split.
        name: The model's name in Ollama.
        stages: The training steps of the run, in turn.
        seed: Chooses the questions.
        scored: Whether the stages were evaluated; false for data without questions to score on, whose stages differ by
            their validation loss alone.
        show: Only print the summary that is there.

    Raises:
        UserError: If a stage has not run, or Ollama does not answer.
    """
    began = step_began()
    if show:
        print(as_text(read_stage(run_dir / "summary.json", "demo"), run_dir))
        return
    base, *tuned = [stage_summary(run_dir, stage, scored) for stage in ("base", *stages)]
    answers = ask(data, name, seed)
    seconds_of_asking = seconds_of_step(began)
    if any(stage["name"] == "lora" and row["name"] == "val_loss" for stage in tuned for row in stage["metrics"]):
        began = time.time()
        loss = validation_loss(base_dir, data, read_hyperparameters(run_dir / "lora" / "final"))
        base["metrics"].append(metric("val_loss", loss, split="validation"))
        base["seconds"] += time.time() - began
    summary = summarize(run_dir, base_dir, data, [base, *tuned], answers)
    summary["steps"]["ask"] = seconds_of_asking
    summary["total_seconds"] = sum(summary["steps"].values())
    write_json(run_dir / "summary.json", summary)


def read_stage(file: Path, target: str) -> Any:
    """Read what a stage left.

    Args:
        file: A JSON file.
        target: The target of the Makefile that writes it.

    Raises:
        UserError: If it is not there, or not JSON.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist: `make {target}` (with the same RUN, MODEL and DATA) writes it.")
    return read_json(file)


def stage_summary(run_dir: Path, stage: str, scored: bool) -> dict[str, Any]:
    """One stage's seconds and metrics: its scores on held-out questions, and what its training reported.

    Raises:
        UserError: If the stage has not run or, where it is to be scored, was not evaluated.
    """
    evaluated: dict[str, Any] = {"seconds": 0.0, "metrics": [], "comparison": []}
    if scored:
        evaluated = read_stage(run_dir / "evaluate" / stage / "metrics.json", "evaluate")
    summary: dict[str, Any] = {"name": stage, "seconds": evaluated["seconds"], "metrics": evaluated["metrics"]}
    if stage != "base":
        trained = read_stage(run_dir / stage / "final" / "metrics.json", stage)
        summary["seconds"] += trained["seconds"]
        summary["metrics"] = evaluated["metrics"] + trained["metrics"]
        summary |= {key: trained[key] for key in ("tokens_per_second", "peak_bytes")}
        summary["comparison"] = evaluated["comparison"]
        summary |= {key: trained[key] for key in ("gain", "shown", "warnings") if trained.get(key)}
    return summary


def validation_loss(checkpoint_dir: Path, data: Path, settings: dict[str, Any]) -> float:
    """The loss of an untuned checkpoint on the rows, and in the precision, with which a training step validates.

    The weights are not quantized, even if the training's are.

    Args:
        checkpoint_dir: The checkpoint.
        data: The data directory.
        settings: The `hyperparameters.yaml` of the training step.

    Returns:
        Mean negative log-likelihood of the assistant's tokens, in nats.
    """
    train = TrainArgs(**settings["train"])
    chat_data = ChatData(
        data, kinds=settings["kinds"], max_val_rows=settings["max_val_rows"], checkpoint_dir=checkpoint_dir
    )
    chat_data.connect(max_seq_length=train.max_seq_length)
    objective = SFT([], chat_data.encoded("validation"), train, settings["seed"])
    model = load_model(
        checkpoint_dir,
        precision=settings["precision"],
        max_seq_length=train.max_seq_length,
        device=choose_accelerator(),
    )
    return objective.validate(model)["val_loss"]


def ask(data: Path, name: str, seed: int) -> list[dict[str, str]]:
    """Put held-out questions to the model in Ollama, with the sampling that its Modelfile sets.

    Where the data has rows of kind "name" (hpo's questions with one short answer), the questions are of these.

    Returns:
        For each question its text, the model's answer, and the answer of the data set.

    Raises:
        UserError: If the test split has no question, or Ollama fails.
    """
    manifest = data / "manifest.json"
    shape = read_json(manifest).get("shape", "messages") if manifest.is_file() else "messages"
    rows = read_rows(data / "test.jsonl", shape)
    rows = [row for row in rows if any(m["role"] == "user" for m in row.get("prompt") or row["messages"])]
    rows = [row for row in rows if row.get("kind") == "name"] or rows
    if not rows:
        raise UserError(f"{data}/test.jsonl has no message of a user to ask.")

    answers = []
    with open_server() as server:
        for row in random.Random(seed).sample(rows, min(QUESTIONS, len(rows))):
            turns = row.get("prompt") or row["messages"]
            end = 1 + next(i for i, message in enumerate(turns) if message["role"] == "user")
            asked, expected = turns[:end], right_answer(row) if "prompt" in row else turns[end]["content"]
            parts = stream_chat(server, name, asked, {"num_predict": ANSWER_TOKENS})
            answer = "".join(part.message.content or "" for part in parts)
            answers.append({"question": asked[-1]["content"], "answer": answer, "expected": expected})
    return answers


def summarize(
    run_dir: Path, base_dir: Path, data: Path, stages: list[dict[str, Any]], answers: list[dict[str, str]]
) -> dict[str, Any]:
    """The summary in the shape that DESIGN and the README's tables read; times of all steps under `steps`."""
    verified = read_stage(run_dir / "ollama" / "verification.json", "export")
    exported = read_stage(run_dir / "ollama" / "metrics.json", "export")
    steps = {
        "download": read_stage(base_dir / "metrics.json", "download")["seconds"],
        "data": read_stage(data / "metrics.json", "data")["seconds"],
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
    tasks = list(dict.fromkeys(row["task"] for row in summary["stages"][0]["metrics"] if "task" in row)) or [None]
    named = {task: f" {task}" if len(tasks) > 1 else "" for task in tasks}
    width = 8 + max(map(len, named.values()))
    lines = ["", "Held-out questions"]
    lines += [f"  {'stage':<{width}}{'acc':>24}{'acc_norm':>24}{'val loss':>10}{'tokens/s':>10}"]
    for stage in summary["stages"]:
        losses = [row["value"] for row in stage["metrics"] if row["name"] == "val_loss"]
        loss = f"{losses[0]:.3f}" if losses and stage["name"] in LOSS_OF_SFT else ""
        rate = f"{stage['tokens_per_second']:,.0f}" if stage.get("tokens_per_second") else ""
        for task in tasks:
            rows = {row["name"]: row for row in stage["metrics"] if row.get("task") == task}
            cells = [_score(rows.get("acc")), _score(rows.get("acc_norm"))]
            label = stage["name"] + named[task]
            lines.append(f"  {label:<{width}}{cells[0]:>24}{cells[1]:>24}{loss:>10}{rate:>10}".rstrip())
    for stage in summary["stages"][1:]:
        lines += [
            f"  {stage['name']} - base,{named.get(c['task'], '')} {c['metric']}: "
            f"{100 * c['difference']:+.1f} points, 95% interval {100 * c['low']:+.1f} to {100 * c['high']:+.1f}, "
            f"p = {c['p_value']:.2g}, {c['n']} questions"
            for c in stage["comparison"]
        ]
    for stage in summary["stages"]:
        lines += _own_test(stage)

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
            f"  Q: {_short(answer['question'])}",
            f"  A: {_short(answer['answer'])}",
            f"     (expected: {_short(answer['expected'])})",
        ]
    lines += ["", "Seconds"]
    lines += [f"  {name:<20}{seconds:>8.0f}" for name, seconds in summary["steps"].items()]
    lines += [f"  {'total':<20}{summary['total_seconds']:>8.0f}", "", f"All of it: {run_dir}/summary.json"]
    return "\n".join(lines)


def _own_test(stage: dict[str, Any]) -> list[str]:
    """What a stage measured of its own aim on held-out rows, and one of its answers before and after."""
    rows = {row["name"]: row for row in stage["metrics"] if row["split"] == "test" and "task" not in row}
    if not rows:
        return []
    lines = ["", f"{stage['name']}, {max(row['n'] for row in rows.values())} held-out rows"]
    for name, row in rows.items():
        value, _, interval = with_interval(row).partition(" ")
        lines.append(f"  {name.replace('_', ' '):<26}{value:>8} {interval}".rstrip())
    for gain in stage.get("gain", []):
        what, interval = f"{gain['metric'].replace('_', ' ')}, change", f"{gain['low']:+.3f} to {gain['high']:+.3f}"
        lines.append(f"  {what:<26}{gain['difference']:>+8.3f}, 95% interval {interval}")
    for answer in stage.get("shown", [])[:1]:
        lines += [f"  {name + ':':<10}{_short(text)}" for name, text in answer.items()]
    lines += [f"  WARNING: {text}" for text in stage.get("warnings", [])]
    return lines


def _short(text: str) -> str:
    """On one line; of a long text its beginning and its end, where the question is that follows an abstract."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN // 2]} … {line[-_SHOWN // 2 :]}"


def _score(row: dict[str, Any] | None) -> str:
    return "" if row is None else with_interval(row, digits=1, in_percent=True)
