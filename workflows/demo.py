"""The end of `make demo`: ask every stage the panel's prompts in Ollama, and put all numbers into one summary.

The stages themselves are targets of the Makefile; each left its numbers in files, which are read here. Where a stage is
not scored on questions, the validation loss of the untuned model is measured, to go with the one that training reports.
"""

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from workflows.errors import UserError
from workflows.evaluation.compare import compare, read_samples, samples_file
from workflows.files import read_json, write_json
from workflows.reporting.summary_text import DISCLAIMERS, FACTS, SENTENCES, as_text, by_kind, is_exam, kind_of
from workflows.stages import left_out

_KEPT = ("question", "kind", "wanted", "answer", "error", "done_reason")
"""What the summary keeps of a panel's answer."""


def setup(
    run_dir: Path = Path("out/demo"),
    base_dir: Path = Path("checkpoints/embedded/smollm2-135m-instruct"),
    data: Path = Path("data/hpo"),
    name: str = "demo",
    stages: list[str] = ["lora"],  # noqa: B006 (read only)
    prepared: list[Path] = [],  # noqa: B006 (read only)
    seed: int = 7,
    scored: bool = True,
    show: bool = False,
) -> None:
    """Write RUN_DIR/summary.json from what the stages wrote, and RUN_DIR/report.html; or print the summary.

    Args:
        run_dir: The run's folder, with evaluate/, a folder for each stage, and ollama/ in it.
        base_dir: The checkpoint that the run started from.
        data: The data directory, with the panel's prompts; without a panel.jsonl questions of its test split are asked.
        name: Name of the model in Ollama.
        stages: The training steps of the run, in turn.
        prepared: All data directories that were made for the run, for their seconds; DATA alone if none is named.
        seed: Seed of the draw of questions.
        scored: The stages were evaluated; false for data without questions to score on, whose stages differ by their
            validation loss alone.
        show: Print the summary that is there, and do nothing else.

    Raises:
        UserError: If a stage has not run, or Ollama does not answer.
    """
    if show:
        print(as_text(read_stage(run_dir / "summary.json", "demo"), run_dir))
        return
    # All that follows loads torch; to show a summary must not.
    from workflows.checkpoint import metric
    from workflows.measure import seconds_of_step, step_began
    from workflows.merge import read_hyperparameters
    from workflows.panel import FOLDER, MAX_TOKENS, ask_stages
    from workflows.report import setup as write_report

    began = step_began()
    base, *tuned = [stage_summary(run_dir, stage, scored) for stage in ("base", *stages)]
    panel = ask_stages(run_dir, base_dir, data, ["base", *stages], name, seed)
    seconds_of_asking = seconds_of_step(began)
    asked_before = run_dir / FOLDER / "metrics.json"
    if asked_before.is_file():
        seconds_of_asking += read_json(asked_before)["seconds"]
    trained = read_hyperparameters(run_dir / "lora" / "final") if "lora" in stages else {}
    has_exam = is_exam(by_kind(base["metrics"]))
    if not has_exam and any(
        stage["name"] == "lora" and ("", "val_loss") in by_kind(stage["metrics"]) for stage in tuned
    ):
        began = time.time()
        loss = validation_loss(base_dir, data, trained)
        base["metrics"].append(metric("val_loss", loss, split="validation"))
        spent = time.time() - began
        base["seconds"] += spent
        base["evaluating"] += spent
    done = [*stages, *(["evaluate"] if scored else []), *(["replay"] if trained.get("replay") else [])]
    summary = {
        "panel": {stage: [{k: row[k] for k in _KEPT if k in row} for row in rows] for stage, rows in panel.items()},
        "panel_tokens": MAX_TOKENS,
        "changes": changes(run_dir, [base, *tuned]) if has_exam else [],
        "left_out": left_out(done),
        **summarize(run_dir, base_dir, prepared or [data], [base, *tuned], panel["base" if not stages else stages[-1]]),
    }
    summary["steps"]["panel"] = seconds_of_asking
    summary["total_seconds"] = sum(summary["steps"].values())
    write_json(run_dir / "summary.json", summary)
    write_report([run_dir.name], out_dir=run_dir.parent)


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
    summary: dict[str, Any] = {"name": stage, "metrics": evaluated["metrics"]}
    summary |= {"seconds": evaluated["seconds"], "evaluating": evaluated["seconds"]}
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
    from data_prep.chat_data import ChatData
    from workflows.lora import SFT
    from workflows.training.loop import TrainArgs
    from workflows.training.model import load_model
    from workflows.training.processes import choose_accelerator

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


def changes(run_dir: Path, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each stage changed against the one before it, on the same questions.

    Args:
        run_dir: The run's folder, with the samples of each stage's evaluation.
        stages: The stages in turn, with their metrics.

    Returns:
        For each stage but the first its name, that of the one before, and comparisons of right answers about taught
        facts, names in a plain sentence, disclaimers, and the log-probability of general answers.
    """
    groups = {
        "facts": FACTS,
        "sentence": dict.fromkeys(SENTENCES, "name_in_sentence"),
        "disclaimer": dict.fromkeys(DISCLAIMERS, "disclaimer"),
        "general": {"general": "logprob"},
    }
    found = {stage["name"]: _scores(run_dir / "evaluate" / stage["name"], stage) for stage in stages}
    rows = []
    for (before, earlier), (name, scores) in pairwise(found.items()):
        compared = []
        for group, metrics in groups.items():
            keys = [key for key in scores if metrics.get(key[0]) == key[1] and key in earlier]
            if keys:
                sides = [earlier[key] for key in keys], [scores[key] for key in keys]
                compared.append(compare("exam", group, *sides).row())
        rows.append({"stage": name, "before": before, "compared": compared})
    return rows


def _scores(folder: Path, stage: dict[str, Any]) -> dict[tuple[str, str, int], float]:
    """Each question's scores, by the kind of the question, the metric, and the question's number."""
    tasks = dict.fromkeys(row["task"] for row in stage["metrics"] if "task" in row)
    return {
        (kind_of(task), metric, sample["doc_id"]): float(sample[metric])
        for task in tasks
        if (file := samples_file(folder, task)).is_file()
        for sample in read_samples(file)
        for metric in sample["metrics"]
    }


def is_taught(directory: Path) -> bool:
    """Return whether a data directory holds a model's own answers."""
    return kind_of(directory.name) == "general"


def summarize(
    run_dir: Path, base_dir: Path, prepared: list[Path], stages: list[dict[str, Any]], answers: list[dict[str, Any]]
) -> dict[str, Any]:
    """The part of the summary that every demo has; times of all steps under `steps`."""
    from workflows.checkpoint import versions
    from workflows.measure import hardware

    verified = read_stage(run_dir / "ollama" / "verification.json", "export")
    exported = read_stage(run_dir / "ollama" / "metrics.json", "export")
    steps = {
        "data": sum(read_stage(d / "metrics.json", "data")["seconds"] for d in prepared if not is_taught(d)),
        "download": read_stage(base_dir / "metrics.json", "download")["seconds"],
        "replay": sum(read_stage(d / "metrics.json", "lora")["seconds"] for d in prepared if is_taught(d)),
        **{stage["name"]: stage["seconds"] - stage["evaluating"] for stage in stages[1:]},
        "evaluate": sum(stage["evaluating"] for stage in stages),
        "export and verify": exported["seconds"],
    }
    return {
        "stages": stages,
        "ollama": {
            "version": verified["version"],
            "name": verified["name"],
            "prompt_ids_equal": verified["prompt_ids_equal"],
            "chat_prompts_equal": verified["chat_prompts_equal"],
            "prompts": verified["prompts"],
            "greedy_agreement": verified["greedy_agreement"].get("q8_0"),
            "greedy_agreements": verified["greedy_agreement"],
            "file_bytes": exported["file_bytes"],
            "answers": [
                {"question": row["question"], "answer": row.get("answer", ""), "expected": row["wanted"]}
                for row in answers
            ],
        },
        "steps": steps,
        "total_seconds": sum(steps.values()),
        "hardware": hardware(),
        "versions": versions(),
    }
