"""`make evaluate-ollama NAME=…`: score models in Ollama on questions with options, and LitGPT on the same ones.

What is served is what is scored: the server is asked through its own template and quantized weights. Each answer is
held to the options by a JSON schema (`workflows.evaluation.constrained` says why, and does the same with LitGPT).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.rows import Row, read_rows
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import WEIGHTS, check_checkpoint_dir, share_metric, write_metrics
from workflows.errors import report_all
from workflows.evaluation.compare import compare, with_interval
from workflows.evaluation.constrained import choose_options, enum_of, speakable, written
from workflows.evaluation.tasks import LOCAL, local_file
from workflows.files import atomic_update, write_text
from workflows.measure import PeakMemory, seconds_of_step, step_began
from workflows.ollama.batch import Batch, Question
from workflows.ollama.client import connect, explained, installed, owner_sha256
from workflows.ollama.gguf_writer import fingerprint
from workflows.ollama.options import chosen, option_problems
from workflows.ollama.server import OllamaServer, open_server
from workflows.progress import watched
from workflows.training.model import Precision, load_model
from workflows.training.processes import choose_accelerator, unusable_device

_GREEDY = {"temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0, "seed": 0}
_LITGPT = "LitGPT"
_METRICS = "metrics.json"


def setup(
    model: str = "medical",
    tasks: list[str] = ["hpo_mcq"],  # noqa: B006 (read only; jsonargparse shows it as the default)
    limit: int | None = 400,
    checkpoint_dir: Path | None = None,
    out_dir: Path | None = None,
    data_dir: Path = Path("data"),
    parallel: int = 1,
    resume: bool = True,
    precision: Precision = "32-true",
    device: str | None = None,
    num_ctx: int | None = None,
    num_thread: int | None = None,
    port: int | None = None,
) -> None:
    """Score a model in Ollama, and its quantizations side by side.

    Each answer is held to the question's options, greedily, and so is LitGPT's: `acc` is the share of right ones, not
    the log-likelihood score of `make evaluate`. Thoughts that a model's template opens are closed first.

    Args:
        model: The model's name in Ollama. Without a tag all of NAME, NAME:q8_0, … are scored.
        tasks: Local tasks (hpo_mcq, pubmedqa_local, medmcqa_local, medqa_local, any data/…_mcq).
        limit: Score the first so many questions of each task only; null takes all.
        checkpoint_dir: The checkpoint that the model was exported from, to score LitGPT and to say how often the served
            models choose the same; none for a model from elsewhere.
        out_dir: Where results go; out/evaluate-ollama/NAME by default.
        data_dir: The folder of prepared data.
        parallel: Questions in the air at a time.
        resume: Keep the finished questions of a run that was stopped; false starts from scratch.
        precision: What LitGPT computes in.
        device: Where LitGPT computes: "cpu", "cuda", …; null takes a GPU if there is one.
        num_ctx: Context length in Ollama; the model's own by default.
        num_thread: CPU threads in Ollama; the model's own by default.
        port: Port for an Ollama server of ours; by default a free one, and only if no other Ollama is found.

    Raises:
        UserError: If an argument or a task's data is not usable, Ollama does not know the model, or it fails.
    """
    options = chosen(num_ctx=num_ctx, num_thread=num_thread)
    problems = option_problems(options, port, model)
    options |= _GREEDY
    files = {task: local_file(task, data_dir) for task in tasks}
    for task, file in files.items():
        if file is None:
            problems.append(f"Task {task!r} is not a local one. Ollama is scored on {', '.join(LOCAL)} and data/…_mcq.")
        elif not file.is_file():
            problems.append(f"Task {task} reads {file}, which does not exist. Prepare it with `make data`.")
    if not tasks:
        problems.append("--tasks names no task, e.g. --tasks '[hpo_mcq]'.")
    if doubled := sorted({task for task in tasks if tasks.count(task) > 1}):
        problems.append(f"--tasks names {', '.join(doubled)} more than once.")
    problems += unusable_device(device)
    if checkpoint_dir is None:
        given = {"device": device is not None, "precision": precision != "32-true"}
        problems += [
            f"--{name} is for LitGPT, which is scored only with --checkpoint_dir. Add that, or leave --{name} out."
            for name, is_given in given.items()
            if is_given
        ]
    if limit is not None and limit < 1:
        problems.append(f"--limit must be at least 1, not {limit}.")
    if not 1 <= parallel <= 64:
        problems.append(f"--parallel must be from 1 to 64, not {parallel}.")
    report_all(problems)
    ours = None if checkpoint_dir is None else fingerprint(check_checkpoint_dir(checkpoint_dir))
    began = step_began()
    rows = {task: read_rows(file, "scoring")[:limit] for task, file in files.items() if file is not None}
    target = out_dir or Path("out") / "evaluate-ollama" / _as_file_name(model)
    scored: list[Scored] = []
    with watched(target), PeakMemory() as peak:
        with open_server(port, parallel=parallel) as server:
            names = tags_of(server, model)
            if ours is not None:
                report_all([_of_another(name, checkpoint_dir) for name in names if owner_sha256(server, name) != ours])
            for name in names:
                for task in tasks:
                    scored.append(ask_all(server, name, task, rows[task], target, options, parallel, resume))
        reference = {}
        if checkpoint_dir is not None:
            reference = {
                s.task: s for s in litgpt_choices(checkpoint_dir, rows, precision, device or choose_accelerator())
            }
    columns = [*reference.values(), *scored]
    results = [column.result(rows[column.task], reference.get(column.task)) for column in columns]
    with atomic_update(target, last=[_METRICS]) as fresh:
        for task in tasks:
            of_task = [column for column in columns if column.task == task]
            lines = (
                {"id": row.get("id", i), "answer": row["answer"], **{s.model: s.choices[i] for s in of_task}}
                for i, row in enumerate(rows[task])
            )
            write_text(fresh / f"choices_{task}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_metrics(
            fresh / _METRICS,
            [row for result in results for row in result["metrics"]],
            seconds=seconds_of_step(began),
            peak_bytes=peak.bytes,
            models=[{name: value for name, value in result.items() if name != "metrics"} for result in results],
        )
    for task in tasks:
        for name in names:
            unfinished(target, task, name).unlink(missing_ok=True)
    print(table(results))
    print(f"acc: the option that is written when nothing else may be, greedily.\nresults: {target}")


def _of_another(name: str, checkpoint_dir: Path | None) -> str:
    return (
        f"{name} in Ollama was not made from {checkpoint_dir} as it is now. Export it again (`make export`), name the "
        "checkpoint that it is of with --checkpoint_dir, or leave that out to score Ollama alone."
    )


@dataclass(frozen=True)
class Scored:
    """One model's choices on one task.

    Attributes:
        model: Its name.
        task: The task's name.
        choices: For each question the index of the option, or None where there is no answer.
        tokens: Tokens read and written.
        seconds: Wall time.
        size: Bytes of the weights.
        quantization: Their type.
    """

    model: str
    task: str
    choices: Sequence[int | None]
    tokens: int
    seconds: float
    size: int | None
    quantization: str

    def result(self, questions: list[Row], reference: "Scored | None") -> dict[str, Any]:
        """The model's result, as metrics.json has it."""
        right = [float(choice == row["answer"]) for choice, row in zip(self.choices, questions, strict=True)]
        n = len(right)
        found = [share_metric("acc", sum(right) / n, n)]
        result: dict[str, Any] = {
            "model": self.model,
            "task": self.task,
            "quantization": self.quantization,
            "bytes": self.size,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else None,
            "unanswered": sum(choice is None for choice in self.choices),
        }
        if reference is not None and reference is not self:
            same = sum(a == b for a, b in zip(self.choices, reference.choices, strict=True))
            found.append(share_metric("agreement", same / n, n))
            base = [float(c == row["answer"]) for c, row in zip(reference.choices, questions, strict=True)]
            result["difference"] = compare(self.task, "acc", base, right).row()
        result["metrics"] = [{**row, "model": self.model, "task": self.task} for row in found]
        return result


def tags_of(server: OllamaServer, model: str) -> list[str]:
    """The models of a name: the one that a tag names, else all of the name.

    Raises:
        UserError: If there is none.
    """
    if ":" in model:
        return [str(installed(server, model).model)]
    with explained(server, model):
        names = sorted(str(entry.model) for entry in connect(server).list().models)
    found = [name for name in names if name.partition(":")[0] == model]
    if not found:
        installed(server, model)  # tells which there are
    return found


def unfinished(out_dir: Path, task: str, model: str) -> Path:
    """Where a model's answers to a task are kept until all is done."""
    return out_dir / f"unfinished-{task}-{_as_file_name(model)}.jsonl"


def _as_file_name(model: str) -> str:
    return model.replace("/", "-").replace(":", "-")


def ask_all(
    server: OllamaServer,
    model: str,
    task: str,
    rows: list[Row],
    out_dir: Path,
    options: dict[str, Any],
    parallel: int,
    resume: bool,
) -> Scored:
    """Let a model in Ollama choose.

    Args:
        server: The server.
        model: The model's name.
        task: The task's name.
        rows: The questions.
        out_dir: Where the answers are kept until all is done.
        options: Ollama's parameters.
        parallel: Questions in the air at a time.
        resume: Whether to keep what is there.

    Raises:
        UserError: If the server fails, or has not answered a question.
    """
    longest = max(len(written(choice).encode()) for row in rows for choice in row["choices"])
    file = unfinished(out_dir, task, model)
    questions = [Question(row["prompt"], {"line": i}, enum_of(row["choices"])) for i, row in enumerate(rows, start=1)]
    batch = Batch(server, model, questions, file, {**options, "num_predict": longest + 16}, parallel, resume)
    began = time.perf_counter()
    records = batch.run()
    seconds = time.perf_counter() - began
    failed = [record for record in records if "error" in record]
    batch.require_answers([record for record in failed if "answer" not in record], f"the questions of {task}")
    if failed:  # the model has answered, as it would again: they count as wrong
        print(
            f"{model}, {task}: {len(failed)} of {len(records)} answers are none of the options. The first, line "
            f"{failed[0]['line']}: {failed[0]['error']}"
        )
    asked = records if not batch.kept else [record for record in records if "seconds" in record]
    counted = sum(record.get("prompt_eval_count", 0) + record.get("eval_count", 0) for record in asked)
    if batch.kept:  # a part was answered by an earlier run: its time is that of its answers
        seconds = sum(record["seconds"] for record in asked) / parallel
    choices = [
        [*map(speakable, row["choices"])].index(record["answer"]) if "error" not in record else None
        for row, record in zip(rows, records, strict=True)
    ]
    entry = installed(server, model)
    kind = entry.details.quantization_level if entry.details else None
    return Scored(model, task, choices, counted, seconds, entry.size and int(entry.size), str(kind or "unknown"))


def litgpt_choices(checkpoint_dir: Path, rows: dict[str, list[Row]], precision: Precision, device: str) -> list[Scored]:
    """Let LitGPT choose under the same rule.

    Args:
        checkpoint_dir: The checkpoint.
        rows: The questions of each task.
        precision: Of weights and arithmetic.
        device: Where to compute.
    """
    template = ChatTemplate.from_checkpoint(checkpoint_dir)
    model = load_model(checkpoint_dir, precision=precision, device=device)
    size = (checkpoint_dir / WEIGHTS).stat().st_size
    scored = []
    for task, questions in rows.items():
        prompts = [template.render(row["prompt"], True) + template.empty_thoughts for row in questions]
        began = time.perf_counter()
        choices = choose_options(model, template, prompts, [row["choices"] for row in questions])
        seconds = time.perf_counter() - began
        texts = (written(row["choices"][choice]) for row, choice in zip(questions, choices, strict=True))
        tokens = sum(len(template.encode(p)) + len(template.encode(t)) for p, t in zip(prompts, texts, strict=True))
        scored.append(Scored(_LITGPT, task, choices, tokens, seconds, size, precision))
    return scored


def table(results: list[dict[str, Any]]) -> str:
    """The results as text, a line for each model and task."""
    lines = [["model", "task", "type", "MB", "acc", "agreement", "difference", "tokens/s"]]
    for result in results:
        by_name = {row["name"]: row for row in result["metrics"]}
        acc, agreement, difference = by_name["acc"], by_name.get("agreement"), result.get("difference")
        lines.append(
            [
                result["model"],
                result["task"],
                result["quantization"],
                "" if result["bytes"] is None else f"{result['bytes'] / 1e6:.0f}",
                with_interval(acc),
                "" if agreement is None else with_interval(agreement),
                "" if difference is None else f"{difference['low']:+.3f} … {difference['high']:+.3f}",
                "" if result["tokens_per_second"] is None else f"{result['tokens_per_second']:.0f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
