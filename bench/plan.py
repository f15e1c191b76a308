"""`make bench-plan`: what `make plan` predicts beside what a step really takes, at three model sizes, on the CPU.

Each cell is two processes of their own: the plan, and the step with the settings of its recipe for the 135M model, but
for the number of steps. Peak memory is `PeakMemory`'s, of the whole process tree from its start to its end. The models
of 30M and 360M parameters have random weights, on which memory does not depend.
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from bench.export import random_checkpoint
from bench.harness import REPORTS, run_watched, spread
from data_prep.rows import iterate_jsonl, write_rows
from workflows import environment
from workflows.checkpoint import versions
from workflows.errors import UserError, run_file
from workflows.files import atomic_dir, read_json, write_json
from workflows.measure import hardware

SHAPES: dict[str, dict[str, int]] = {
    "30m": {
        "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 64,
    },
    "360m": {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
        "num_key_value_heads": 5, "head_dim": 64,
    },
}  # fmt: skip
"""SmolLM2-360M's, and one of its family (30M has two thirds of its parameters in the embedding of 49,152 tokens)."""
TOLERANCE = 0.15
ROWS = 400
"""Rows of each split: enough for the steps, few enough to be read at once."""
Step = Literal["lora", "dpo", "grpo", "evaluate", "export"]
Size = Literal["30m", "135m", "360m"]


def setup(
    checkpoint_dir: Path = Path("checkpoints/embedded/smollm2-135m-instruct"),
    data_dir: Path = Path("data"),
    steps: list[Step] = ["lora", "dpo", "grpo", "evaluate", "export"],  # noqa: B006
    sizes: list[Size] = ["30m", "135m", "360m"],  # noqa: B006
    max_steps: int = 2,
    limit: int = 40,
) -> None:
    """Measure, and write out/bench/plan.json.

    Args:
        checkpoint_dir: The model of 135M parameters.
        data_dir: The folder of prepared data; `hpo`, `hpo_pairs` and `hpo_mcq` are read.
        steps: What to plan and run.
        sizes: Of the models.
        max_steps: Optimizer steps of a training step.
        limit: Questions of an evaluation.

    Raises:
        UserError: If a step fails, or a prediction is off by more than the tolerance.
    """
    environment.share_cores()
    models = dict.fromkeys(sizes, checkpoint_dir)
    for size in set(sizes) & set(SHAPES):
        models[size] = random_checkpoint(checkpoint_dir, REPORTS / f"smollm2-{size}-shape", SHAPES[size])
    small = {name: small_data(data_dir / name, REPORTS / "plan-data" / name) for name in ("hpo", "hpo_pairs")}
    cells = []
    for step in steps:
        for size in sizes:
            options = options_of(step, small, data_dir, max_steps, limit)
            cells.append({"step": step, "size": size, **measured(step, models[size], options)})
            print(line(cells[-1]), flush=True)
    write_json(REPORTS / "plan.json", report(cells, {"max_steps": max_steps, "limit": limit, "tolerance": TOLERANCE}))
    print(f"\n{REPORTS / 'plan.json'}")
    if off := [f"{cell['step']} {cell['size']}" for cell in cells if abs(cell["ratio"] - 1) > TOLERANCE]:
        raise UserError(f"The plan is off by more than {TOLERANCE:.0%} for {', '.join(off)}.")


def options_of(step: Step, small: dict[str, Path], data_dir: Path, max_steps: int, limit: int) -> list[str]:
    """A step's options: those of its recipe, made short."""
    recipes = Path("workflows/recipes")
    if step == "evaluate":
        return ["--config", str(recipes / "default/evaluate.yaml"), "--limit", str(limit), "--data_dir", str(data_dir)]
    if step == "export":
        return ["--config", str(recipes / "default/export.yaml"), "--create", "false", "--name", "bench"]
    options = ["--config", str(recipes / f"smollm2-135m/{step}.yaml")]
    options += ["--data", str(small["hpo_pairs" if step == "dpo" else "hpo"])]
    options += ["--train.max_steps", str(max_steps), "--train.lr_warmup_steps", "0", "--max_val_rows", "8"]
    if step == "grpo":  # a reward that answers of random weights differ in, or there would be nothing to learn
        options += ["--rewards", "[{reward: bench.grpo.early_letters}]"]
    return options + ([] if step == "lora" else ["--max_test_rows", "0"])


def small_data(source: Path, target: Path) -> Path:
    """A data directory's first rows; of `hpo` those of the kind that recipes train on."""
    if (target / "manifest.json").is_file():
        return target
    with atomic_dir(target) as folder:
        for split in ("train", "validation", "test"):
            rows: list[Any] = [row for _, row in iterate_jsonl(source / f"{split}.jsonl")]
            if source.name == "hpo":
                rows = [row for row in rows if row["kind"] == "name"]
            write_rows(folder / f"{split}.jsonl", rows[:ROWS])
        write_json(folder / "manifest.json", read_json(source / "manifest.json"))
    return target


def measured(step: str, checkpoint_dir: Path, options: list[str]) -> dict[str, Any]:
    """Plan a step and run it; peaks in bytes.

    Raises:
        UserError: If one of the two fails.
    """
    REPORTS.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=REPORTS) as folder:
        common = [step, "--checkpoint_dir", str(checkpoint_dir), "--out_dir", f"{folder}/out", *options]
        planned = Path(folder) / "plan.json"
        run(["plan", *common, "--json_file", str(planned)])
        predicted = read_json(planned)
        peak = run(common)
    found = {"predicted_bytes": predicted["peak_bytes"], "measured_bytes": peak, "parameters": predicted["parameters"]}
    return {**found, "ratio": predicted["peak_bytes"] / peak, "moments": predicted["moments"]}


def run(arguments: list[str]) -> int:
    """Run one step of ours in a process of its own; its peak memory in bytes.

    Raises:
        UserError: If it fails; with the end of what it said.
    """
    process, peak = run_watched([sys.executable, "-m", "workflows", *arguments], dict(os.environ))
    if process.returncode != 0:
        raise UserError(f"`{' '.join(arguments)}` failed:\n{process.stderr[-2000:]}")
    return peak


def line(cell: dict[str, Any]) -> str:
    """One cell as text."""
    sizes = f"predicted {cell['predicted_bytes'] / 1e6:>7,.0f} MB, measured {cell['measured_bytes'] / 1e6:>7,.0f} MB"
    return f"{cell['step']:<9}{cell['size']:>5}  {sizes}, ratio {cell['ratio']:.2f}"


def report(cells: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """The report in the shape of all benches; `ours` is predicted over measured."""
    peak = max(cell["measured_bytes"] for cell in cells)
    return {
        "name": "plan",
        "unit": "predicted / measured peak memory",
        "hardware": hardware(),
        "versions": versions(),
        "settings": settings,
        "ours": {**spread([cell["ratio"] for cell in cells]), "peak_bytes": peak},
        "peers": {},
        "ratio": {},
        "cells": cells,
    }


if __name__ == "__main__":
    run_file(setup)
