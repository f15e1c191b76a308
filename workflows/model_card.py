"""The model card (`README.md`) beside every export: what the model is, what it came from, and that it is no doctor."""

from pathlib import Path
from typing import Any

import yaml

from workflows.checkpoint import PROVENANCE, WEIGHTS
from workflows.evaluation.compare import interval_of
from workflows.files import read_json

_WARNING = """> **Not medical advice.** This is a small language model fine-tuned for study. It makes up facts, and
> words them with confidence. Do not use it for diagnosis, treatment or any decision about health; ask a health
> professional."""


def lineage(checkpoint_dir: Path) -> list[dict[str, Any]]:
    """The provenance of a checkpoint and of those it was made from, newest first, as far as they are on this disk."""
    steps: list[dict[str, Any]] = []
    directory: Path | None = checkpoint_dir
    seen = set()
    while directory is not None and (file := directory / PROVENANCE).is_file() and directory not in seen:
        seen.add(directory)
        step = read_json(file)
        steps.append({"directory": str(directory), **step})
        base = (step.get("sources") or {}).get("base") or {}
        directory = Path(base["path"]) if "path" in base else None
    return steps


def licence_of(steps: list[dict[str, Any]]) -> str | None:
    """The licence that the first checkpoint of a lineage came with, if known."""
    licences = [(step.get("sources") or {}).get("model", {}).get("licence") for step in steps]
    return next((licence for licence in reversed(licences) if licence), None)


def base_model_of(steps: list[dict[str, Any]]) -> str | None:
    """Return the origin of a lineage's first checkpoint: a Hub id, a wheel, or a file; a base with its adapter."""
    models = [(step.get("sources") or {}).get("model", {}) for step in steps]
    model: dict[str, Any] = next((model for model in reversed(models) if model.get("place")), {})
    if base := model.get("base"):
        return f"{base['place']} with the LoRA adapter {model['place']}"
    return model.get("place")


def model_card(checkpoint_dir: Path, name: str, usage: str) -> str:
    """Write the card's text.

    Args:
        checkpoint_dir: The checkpoint that was exported.
        name: The model's name.
        usage: Markdown: how to run what lies beside the card.
    """
    steps = lineage(checkpoint_dir)
    licence, base = licence_of(steps), base_model_of(steps)
    head: dict[str, Any] = {"language": "en", "pipeline_tag": "text-generation", "tags": ["medical", "litgpt"]}
    if licence:
        head["license"] = licence.lower()
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {name}", "", _WARNING, ""]
    lines += ["## How to run", "", usage.strip(), "", "## Where it comes from", ""]
    lines += [
        f"* Base model: {base or 'unknown (no provenance.json)'}",
        f"* Licence of the weights: {licence or 'see the base model'}",
    ]
    for step in reversed(steps):
        note = (step.get("sources") or {}).get("model", {}).get("note")
        hashes = ", ".join(f"{file} sha256 {digest[:16]}…" for file, digest in (step.get("files") or {}).items())
        lines.append(f"* Step `{step.get('step')}`: {hashes or 'no weights'}{f' ({note})' if note else ''}")
    lines += _data_lines(steps)
    metrics = _metric_lines(checkpoint_dir)
    if metrics:
        lines += [
            "",
            "## Numbers",
            "",
            "| what | value | 95% interval | n | split |",
            "|---|---|---|---|---|",
            *metrics,
        ]
    lines += ["", "Full settings, versions and hashes are in `provenance.json` of each step.", ""]
    return "\n".join(lines)


def _data_lines(steps: list[dict[str, Any]]) -> list[str]:
    lines = []
    for step in steps:
        path = ((step.get("sources") or {}).get("data") or {}).get("path")
        if path and (file := Path(path) / "manifest.json").is_file():
            manifest = read_json(file)
            lines.append(
                f"* Training data: {manifest.get('title', path)}. Licence: {manifest.get('licence', 'unknown')}"
            )
            if manifest.get("attribution"):
                lines.append(f"  {manifest['attribution']}")
    return lines


def _metric_lines(checkpoint_dir: Path) -> list[str]:
    # out/RUN/STEP/final was scored, if at all, in out/RUN/evaluate/STEP
    evaluation = checkpoint_dir.parent.parent / "evaluate" / checkpoint_dir.parent.name / "metrics.json"
    provenance = read_json(file) if (file := checkpoint_dir / PROVENANCE).is_file() else {}
    weights_sha256 = provenance.get("files", {}).get(WEIGHTS)
    rows = []
    for file in (checkpoint_dir / "metrics.json", evaluation):
        measured = read_json(file) if file.is_file() else {}
        if file == evaluation and measured.get("model", {}).get(WEIGHTS) != weights_sha256:
            continue  # the step has run again since
        rows += measured.get("metrics", [])

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    def ends(row: dict[str, Any]) -> str:
        return "" if (interval := interval_of(row)) is None else f"{interval[0]:.4f} to {interval[1]:.4f}"

    return [
        f"| {row['name']} | {cell(row['value'])} | {ends(row)} | {cell(row.get('n'))} | {cell(row.get('split'))} |"
        for row in rows
    ]
