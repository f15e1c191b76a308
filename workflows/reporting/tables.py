"""The report's tables as text: what was run, what was measured, what was answered, what Ollama serves."""

from pathlib import PurePath
from typing import Any

from workflows.evaluation.compare import with_interval
from workflows.measure import duration, gigabytes
from workflows.reporting.gather import Run, Step, in_turn
from workflows.reporting.panel_text import answer_of, heading_of, right_of

Rows = list[list[str]]


def steps_table(run: Run) -> Rows:
    """For each step: its state, what it went on from, the data, steps, time, speed and memory."""
    return [
        [
            step.name,
            step.status.state,
            _short_path(step.provenance.get("settings", {}).get("checkpoint_dir", "")),
            _short_path(step.provenance.get("settings", {}).get("data", "")),
            f"{step.metrics.get('steps', step.status.done) or 0:,}",
            duration(step.metrics["seconds"]) if step.metrics else "",
            _number(step.metrics.get("tokens_per_second") or step.status.tokens_per_second),
            "" if (peak := step.metrics.get("peak_bytes")) is None else gigabytes(peak),
        ]
        for step in run.steps
    ]


def facts(run: Run) -> list[tuple[str, str]]:
    """Where a run came from, and on what it ran."""
    model = run.base.get("sources", {}).get("model", {})
    about = [str(model[key]) for key in ("place", "revision", "licence", "note") if model.get(key)]
    found = [("base model", ", ".join([run.base.get("path", ""), *about]))]
    from_source: dict[str, list[str]] = {}  # data directories made from the same files share their story
    for path, manifest in run.data.items():
        told = [str(manifest[key]) for key in ("title", "revision", "licence", "attribution") if manifest.get(key)]
        from_source.setdefault("\n".join(told), []).append(path)
    found += [("data", ", ".join(paths) + (f"\n{told}" if told else "")) for told, paths in from_source.items()]
    made = [step.provenance for step in run.steps if step.provenance] + [run.export]
    last: dict[str, Any] = next((entry for entry in reversed(made) if entry), {})
    if machine := next((entry["hardware"] for entry in reversed(made) if entry.get("hardware")), None):
        found.append(("hardware", _hardware(machine)))
    if last:
        found.append(("versions", ", ".join(f"{name} {version}" for name, version in last["versions"].items())))
    return [(name, text) for name, text in found if text]


def _hardware(machine: dict[str, Any]) -> str:
    parts = [machine.get("gpu"), machine["cpu"], f"{machine['cores']} cores", f"{machine['threads']} threads"]
    return ", ".join([*filter(None, parts), f"{machine['memory_bytes'] / 1e9:.0f} GB", machine["os"]])


def settings_of(step: Step) -> list[tuple[str, str]]:
    """A finished step's settings, those of groups with their group's name, then the hashes of what went in and out."""
    made = step.provenance
    if not made:
        return []
    return [
        *_flat(made["settings"]),
        *((f"{name} ({where})", text) for where, entry in made["sources"].items() for name, text in _flat(entry)),
        *((f"sha256 of {name}", text) for name, text in made["files"].items()),
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, "null" if value is None else str(value)))
    return rows


def scores_table(run: Run) -> Rows:
    """For each task and metric a row: the stages' scores with their 95% intervals. The first row is the head."""
    names = dict.fromkeys((row["task"], row["name"], row["n"]) for s in run.scores.values() for row in s["metrics"])
    stages = list(run.scores)
    table = [["", *stages]]
    for task, metric, n in names:
        by_stage = {
            stage: row
            for stage in stages
            for row in run.scores[stage]["metrics"]
            if (row["task"], row["name"], row["n"]) == (task, metric, n)
        }
        about = f"{task}, {metric}" + ("" if n is None else f", {n:,} questions")
        table.append([about, *(_score(by_stage.get(stage)) for stage in stages)])
    return table


def gains_table(run: Run) -> Rows:
    """Each stage against the base on the same questions, and each step's own test against where it began."""
    rows = []
    for stage, scores in run.scores.items():
        for c in scores.get("comparison") or []:
            gain, spread = _points(c["difference"]), f"{_points(c['low'])} to {_points(c['high'])}"
            rows.append([f"{stage} − base", f"{c['task']}, {c['metric']}", gain, spread, f"{c['p_value']:.2g}"])
    for step in run.steps:
        for c in step.metrics.get("gain") or []:
            what = f"{c['metric'].replace('_', ' ')}, {c['n']} held-out rows"
            gain, spread = _signed(c["difference"]), f"{_signed(c['low'])} to {_signed(c['high'])}"
            if c["low"] == c["high"]:
                spread = "the same in each row"
            rows.append([f"{step.name} − its start", what, gain, spread, f"{c['p_value']:.2g}"])
    return rows


def warnings(run: Run) -> list[tuple[str, list[str]]]:
    """What each step made worse than it was before, in words."""
    return [(step.name, step.metrics["warnings"]) for step in run.steps if step.metrics.get("warnings")]


def own_tests(run: Run) -> list[tuple[str, Rows]]:
    """What each step measured of its own aim on held-out rows."""
    found = []
    for step in run.steps:
        rows = [row for row in step.metrics.get("metrics", []) if "task" not in row]
        table = [
            [
                row["name"].removeprefix("val_").replace("_", " "),
                with_interval(row),
                ", ".join(filter(None, [row["split"], row["n"] and f"{row['n']:,} rows"])),
            ]
            for row in rows
        ]
        if table:
            found.append((step.name, table))
    return found


def answers(runs: list[Run]) -> list[dict[str, Any]]:
    """The same held-out questions, answered by each stage of each run: {"question", "wanted", "answers"}."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        for stage in in_turn(run.answers):
            for row in run.answers[stage]:
                asked = {"question": row["question"], "wanted": row["wanted"], "answers": []}
                who = stage if len(runs) == 1 else f"{run.name}, {stage}"
                found.setdefault((row["task"], row["question"]), asked)["answers"].append((who, row["answer"]))
    return list(found.values())


def panel(runs: list[Run]) -> list[dict[str, Any]]:
    """The demo's prompts, answered by each stage of each run: {"heading", "question", "wanted", "answers"}."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for stage, records in run.panel.items():
            who = stage if len(runs) == 1 else f"{run.name}, {stage}"
            for record in records:
                heading, wanted = heading_of(record["kind"]), right_of(record)
                asked = {"heading": heading, "question": record["question"], "wanted": wanted, "answers": []}
                found.setdefault(record["question"], asked)["answers"].append((who, answer_of(record)))
    return list(found.values())


def shown(run: Run) -> list[tuple[str, list[dict[str, str]]]]:
    """What each step answered before and after it, to questions of its own test."""
    return [(step.name, step.metrics["shown"]) for step in run.steps if step.metrics.get("shown")]


def checks(run: Run) -> list[tuple[str, str, bool | None]]:
    """What the verification compared, in words, and whether it was equal (None: not verified)."""
    found = run.verified
    if not found:
        return []
    return [
        ("prompt token ids", f"{found['prompts']} held-out questions", found["prompt_ids_equal"]),
        ("conversations", "one to three turns, with and without a system message", found["chat_prompts_equal"]),
    ]


def quantisations(run: Run) -> Rows:
    """For each type of GGUF: its size, how many greedy answers are LitGPT's, and how many of the others near ties."""
    sizes = run.verified.get("file_bytes", {})
    rows = []
    for kind, model in run.verified.get("models", {}).items():
        size = next((f"{count / 1e6:,.0f} MB" for name, count in sizes.items() if name.endswith(f"-{kind}.gguf")), "")
        differences = model["differences"]
        ties = sum(difference["near_tie"] for difference in differences)
        others = f"{len(differences)} of {model['prompts']}"
        rows.append([kind, size, f"{100 * model['greedy_agreement']:.0f}%", others, str(ties)])
    return rows


def headline(run: Run) -> str:
    """What the run came to, in a sentence: the last stage's first score against the base's."""
    for stage in reversed(in_turn(run.scores)):
        for c in run.scores[stage].get("comparison") or []:
            return (
                f"{c['metric']} on {c['n']:,} held-out questions of {c['task']} went from {100 * c['base']:.1f}% to "
                f"{100 * c['tuned']:.1f}% ({stage}): {_points(c['difference'])} points, 95% interval "
                f"{_points(c['low'])} to {_points(c['high'])}."
            )
    return ""


def _points(share: float) -> str:
    return _signed(100 * share, 1)


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _score(row: dict[str, Any] | None) -> str:
    return "" if row is None else with_interval(row, digits=1, in_percent=0 <= row["value"] <= 1)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _short_path(path: str) -> str:
    parts = [part for part in PurePath(path).parts if part != "final"]
    return "/".join(parts[-2:])
