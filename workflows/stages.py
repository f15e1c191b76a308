"""A line before each stage of `make demo`: its number, its purpose, and the time that it and the rest take.

Times were measured with one model on one machine. They are scaled by the seconds that the stages before took here; for
other models nothing was measured, so nothing is estimated. No model library is loaded: this runs before each stage.
"""

from pathlib import Path

from workflows.files import read_json

MODEL = "smollm2-135m"
SECONDS: dict[str, dict[str, float]] = {
    "assistant": {
        "data": 27, "download": 9, "replay": 52, "lora": 550, "dpo": 108, "grpo": 378, "evaluate": 214, "export": 140,
    },
    "hpo": {"data": 15, "download": 10, "lora": 200, "dpo": 155, "grpo": 250, "evaluate": 160, "export": 90},
}  # fmt: skip
"""Seconds of each stage by data set, of one run each on two idle cores of an AMD EPYC, whose speed varies twofold;
`lora` with its first answers, `export` with the panel and the summary."""
ABOUT = {
    "data": "writes what is learned, and what is asked, to data/",
    "download": "gets the model",
    "replay": "lets the model answer everyday prompts, which are mixed into what it learns",
    "lora": "teaches the data by supervised fine-tuning, then shows the first answers",
    "dpo": "makes preferred answers more likely than rejected ones",
    "grpo": "samples answers and reinforces those that rules judge better",
    "ppo": "samples answers and reinforces those that a reward model scores higher",
    "evaluate": "asks every stage the same held-out questions",
    "export": "creates the model in Ollama, verifies it, and asks every stage the same prompts",
}

PREPARING = ("data", "download", "replay")
WITHOUT = {
    "replay": "so lora costs more of what the model could do before (REPLAY=general mixes its own answers in)",
    "dpo": "since there are no preferences for this data (PAIRS=NAME names some)",
    "grpo": "since there are no questions with verifiable answers that a recipe has rewards for",
    "evaluate": "since there are no held-out questions to score (TASKS=NAME names some)",
}
"""Why a stage is left out."""


def setup(name: str, stages: list[str], run_dir: Path, model: str, data: str, replay: Path | None = None) -> None:
    """Print the line.

    Args:
        name: The stage that begins.
        stages: All stages of the demo, in turn.
        run_dir: The run's folder, with the seconds of its finished stages.
        model: The model's name.
        data: The data set's name.
        replay: The folder of the model's own answers, if there is such a stage.
    """
    number, measured = stages.index(name), SECONDS.get(data, {})
    line = f"stage {number + 1} of {len(stages)}: {name}"
    if model == MODEL and set(stages) <= measured.keys():
        speed = relative_speed({stage: seconds_of(stage, run_dir, replay) for stage in stages[:number]}, measured)
        this, rest = (speed * sum(measured[stage] for stage in part) for part in ([name], stages[number:]))
        line += f", about {rough(this)}; {rough(rest)} left" if rest > this else f", about {rough(this)}, the last"
    first_trained = next(stage for stage in stages if stage not in PREPARING)
    lines = ["", *(f"left out: {text}" for text in left_out(stages) if name == first_trained), line]
    print("\n".join(lines + ([f"  {ABOUT[name]}"] if name in ABOUT else [])), flush=True)


def left_out(stages: list[str]) -> list[str]:
    """What the demo can do with its own data and does not with this, in words.

    Args:
        stages: The demo's stages.
    """
    return [f"{stage}, {why}" for stage, why in WITHOUT.items() if stage not in stages]


def seconds_of(stage: str, run_dir: Path, replay: Path | None) -> float:
    """The seconds that a finished stage took; 0 if it did not compute with the model, or has left no figure."""
    folder = replay if stage == "replay" else run_dir / stage / "final"
    file = folder / "metrics.json" if folder else None
    seconds = read_json(file).get("seconds") if file is not None and file.is_file() else 0
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def relative_speed(took: dict[str, float], measured: dict[str, float]) -> float:
    """Seconds here per measured second, of the stages that have both; 1 if there are none."""
    both = [stage for stage, seconds in took.items() if seconds > 0]
    return sum(took[stage] for stage in both) / sum(measured[stage] for stage in both) if both else 1.0


def rough(seconds: float) -> str:
    """A time as one says it: in tens of seconds below a minute and a half, else in minutes."""
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} seconds"
    return f"{round(seconds / 60)} minutes"
