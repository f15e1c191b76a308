"""What every bench shares: contenders run in turn, each in a process of its own, and the report in one shape.

A contender is a command that does the work once and prints one line of JSON, {"rate": units per second, "loss": …},
by `tell`. Memory is that of its process tree, or where it computes on a GPU what torch took there.
In each round all run, one after the other, so that a machine whose speed drifts is the same for all; what is compared
is the ratio within a round.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from workflows import environment
from workflows.checkpoint import versions
from workflows.errors import UserError
from workflows.files import write_json
from workflows.measure import PeakMemory, hardware, tree_bytes

REPORTS = Path("out/bench")


def hf_directory(checkpoint_dir: Path) -> Path:
    """The checkpoint in Hugging Face's form, for peers; written once for each content."""
    from workflows.hf_export import write_hf
    from workflows.ollama.gguf_writer import fingerprint

    folder = REPORTS / "hf" / fingerprint(checkpoint_dir)[:16]
    if not (folder / "config.json").is_file():
        write_hf(checkpoint_dir, folder, "For measurements only.\n")
    return folder


def by_precision(reports: dict[str, Any]) -> dict[str, Any]:
    """One report of those at several precisions: bfloat16's on top, float32's under its own key."""
    top = reports.get("bf16-true") or reports["32-true"]
    return {**top, **({"float32": reports["32-true"]} if "32-true" in reports else {})}


def run_watched(command: list[str], variables: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run a command, and give what it printed and the peak memory of its process tree in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
    peak, watched = 0, psutil.Process(process.pid)
    while True:
        try:
            out, err = process.communicate(timeout=PeakMemory.INTERVAL)
            return subprocess.CompletedProcess(command, process.returncode, out, err), peak
        except subprocess.TimeoutExpired:
            peak = max(peak, tree_bytes(watched))


def tell(**measured: Any) -> None:
    """Print what a contender measured, for `run_contender`; on a GPU with the peak of torch's memory there."""
    if torch.cuda.is_available():
        measured["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(measured))


def run_contender(module: str, name: str, arguments: list[str]) -> dict[str, Any]:
    """Run one contender in a fresh process and watch its memory.

    Args:
        module: The bench's module, which takes `--contender NAME`.
        name: The contender.
        arguments: Further arguments.

    Returns:
        What it printed as JSON, with `peak_bytes` added.

    Raises:
        UserError: If it fails; with the end of what it said.
    """
    command = [sys.executable, "-m", module, "--contender", name, *arguments]
    variables = dict(os.environ)
    if name == "ours":  # as `python -m workflows` does
        environment.prepare(variables)
    process, peak = run_watched(command, variables)
    out, err = process.stdout, process.stderr
    lines = [line for line in out.splitlines() if line.startswith('{"rate"')]
    if process.returncode != 0 or not lines:
        raise UserError(f"The contender {name} of {module} failed:\n{err[-2000:]}")
    told = json.loads(lines[-1])
    return {**told, "peak_bytes": told.pop("gpu_peak_bytes", peak)}


def alternate(
    module: str, contenders: list[str], arguments: list[str], rounds: int, seed: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Run all contenders in turn, `rounds` times; with `--seed` seed + round if a seed is given."""
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {rounds}.")
    environment.share_cores()  # the contenders inherit it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in contenders:
            began = time.perf_counter()
            seeded = [] if seed is None else ["--seed", str(seed + number)]
            runs[name].append(run_contender(module, name, [*arguments, *seeded]))
            rate = runs[name][-1]["rate"]
            print(f"round {number + 1}: {name} {rate:,.4g} ({time.perf_counter() - began:.0f} s)", flush=True)
    return runs


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(name: str, unit: str, settings: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The report of one bench at one precision; `ours` is the first contender, a ratio above 1 means it is better."""
    rates = {contender: [run["rate"] for run in rounds] for contender, rounds in runs.items()}
    peaks = {contender: max(run["peak_bytes"] for run in rounds) for contender, rounds in runs.items()}
    peers = [contender for contender in runs if contender != "ours"]
    return {
        "name": name,
        "unit": unit,
        "hardware": hardware(),
        "versions": versions(),
        "settings": settings,
        "ours": {**spread(rates["ours"]), "peak_bytes": peaks["ours"]},
        "peers": {peer: {**spread(rates[peer]), "peak_bytes": peaks[peer]} for peer in peers},
        "ratio": {peer: spread([a / b for a, b in zip(rates["ours"], rates[peer], strict=True)]) for peer in peers},
        "losses": {contender: rounds[0].get("loss") for contender, rounds in runs.items()},
    }


def write_report(reported: dict[str, Any]) -> None:
    """Write out/bench/NAME.json and print it as a table."""
    path = REPORTS / f"{reported['name']}.json"
    write_json(path, reported)
    for part in (reported, reported.get("float32")):
        if part is None or (part is not reported and part["settings"] == reported["settings"]):
            continue  # not measured at a second precision
        title = [reported["name"], part["settings"].get("precision"), reported["unit"]]
        print("\n" + ", ".join(word for word in title if word))
        rows = {"ours": part["ours"], **part["peers"]}
        for contender, row in rows.items():
            ratio = part["ratio"].get(contender)
            told = f"ours is {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
            print(
                f"  {contender:<11}{row['median']:>8,.4g} ({row['min']:,.4g} to {row['max']:,.4g})"
                f"{row['peak_bytes'] / 1e9:>8.2f} GB  {told}"
            )
    print(f"\n{path}")
