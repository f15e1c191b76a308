"""The same few prompts, asked of every stage of a run through Ollama, and its answers side by side.

A stage is what `export` would make of its checkpoint: a q8_0 GGUF with the Modelfile of its template. It is created
under a name of its own, asked, and deleted; the run's exported model is asked as it is, and stays. Answers are greedy,
so that nothing is chosen. They are kept in RUN_DIR/panel/STAGE.jsonl, and asked again if the checkpoint is another one.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.rows import iterate_jsonl, read_rows
from workflows.chat_template import ChatTemplate, Message
from workflows.checkpoint import check_checkpoint_dir, load_config, write_metrics
from workflows.errors import UserError
from workflows.files import read_json
from workflows.measure import seconds_of_step, step_began
from workflows.ollama.batch import Batch, Question, Record
from workflows.ollama.client import connect, create_model, explained, owner_sha256
from workflows.ollama.gguf_writer import fingerprint, write_gguf
from workflows.ollama.modelfile import make_modelfile
from workflows.ollama.server import OllamaServer, open_server
from workflows.progress import watched
from workflows.reporting.panel_text import side_by_side
from workflows.training.held_out import right_answer

FOLDER, FILE = "panel", "panel.jsonl"
"""Where a run keeps the answers, and the prompts of a data directory that has its own."""
MAX_TOKENS = 120
GREEDY = {"temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0, "seed": 0, "num_predict": MAX_TOKENS}
HELD_OUT = 3
"""Number of held-out questions that are asked where the data has no panel."""
CONTEXT = 4096


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        messages: The conversation up to the first question.
        kind: A key of `HEADINGS`.
        wanted: The data's answer; "" where there is no right one.
    """

    messages: list[Message]
    kind: str
    wanted: str


def setup(
    run_dir: Path,
    base_dir: Path,
    data: Path,
    stages: list[str] = ["base", "lora"],  # noqa: B006 (read only)
    name: str = "demo",
    seed: int = 7,
) -> None:
    """Ask stages of a run the panel's prompts in Ollama, and print their answers side by side.

    Args:
        run_dir: The run's folder.
        base_dir: The checkpoint that the run started from.
        data: The data directory; without a panel.jsonl three questions are drawn from its test split.
        stages: Stages to ask: base, or a training step of the run.
        name: Name of the run's model in Ollama.
        seed: Seed of the draw of questions.

    Raises:
        UserError: If a stage has not run, its checkpoint has no form that Ollama runs, or Ollama fails.
    """
    began = step_began()
    with watched(run_dir / FOLDER):
        answers = ask_stages(run_dir, base_dir, data, stages, name, seed)
    print(side_by_side(answers, MAX_TOKENS))
    write_metrics(run_dir / FOLDER / "metrics.json", [], seconds=seconds_of_step(began))


def prompts_of(data: Path, seed: int) -> list[Prompt]:
    """The prompts of a data directory: its panel, else questions drawn from its test split.

    Of rows of kind "name" (hpo's questions with one short answer) where it has such.

    Raises:
        UserError: If a file is not readable, or no row has a user's message.
    """
    file, shape, number = data / FILE, "messages", None
    if not file.is_file():
        manifest = data / "manifest.json"
        file, number = data / "test.jsonl", HELD_OUT
        shape = read_json(manifest).get("shape", "messages") if manifest.is_file() else "messages"
    rows = [row for row in read_rows(file, shape) if any(m["role"] == "user" for m in _turns(row))]
    if not rows:
        raise UserError(f"{file} has no message of a user to ask.")
    if number is not None:
        rows = [row for row in rows if row.get("kind") == "name"] or rows
        rows = random.Random(seed).sample(rows, min(number, len(rows)))
    return [_prompt(row, "held_out" if number else str(row.get("kind"))) for row in rows]


def _turns(row: dict[str, Any]) -> list[Message]:
    return list(row.get("prompt") or row["messages"])


def _prompt(row: dict[str, Any], kind: str) -> Prompt:
    turns = _turns(row)
    end = 1 + next(i for i, message in enumerate(turns) if message["role"] == "user")
    wanted = right_answer(row) if "prompt" in row else str(turns[end]["content"]) if end < len(turns) else ""
    return Prompt(turns[:end], kind, wanted)


def ask_stages(
    run_dir: Path, base_dir: Path, data: Path, stages: list[str], name: str, seed: int = 7
) -> dict[str, list[Record]]:
    """The answers of each stage, from its file if it has those of this checkpoint to these prompts.

    Args:
        run_dir: As in `setup`, like the rest.
        base_dir: The checkpoint of the stage "base".
        data: Has the prompts.
        stages: The stages.
        name: A model of that name that was made from a stage's checkpoint is asked itself.
        seed: Draws questions.

    Returns:
        For each stage a record for each prompt: question, kind, wanted, and answer or error.

    Raises:
        UserError: As `setup`.
    """
    prompts = prompts_of(data, seed)
    found: dict[str, list[Record]] = {}
    left: dict[str, tuple[Path, str]] = {}
    for stage in stages:
        directory = check_checkpoint_dir(base_dir if stage == "base" else run_dir / stage / "final")
        weights = fingerprint(directory)
        kept = _kept(run_dir / FOLDER / f"{stage}.jsonl", weights, prompts)
        if kept is None:
            left[stage] = directory, weights
        found[stage] = kept or []
    if left:
        with open_server() as server:
            for stage, (directory, weights) in left.items():
                file = run_dir / FOLDER / f"{stage}.jsonl"
                with _served(server, directory, weights, name, file.with_suffix(".gguf")) as model:
                    found[stage] = _ask(server, model, prompts, file, weights)
    return found


def _kept(file: Path, weights: str, prompts: list[Prompt]) -> list[Record] | None:
    """The answers in a file, if they are all there, of this checkpoint, and to these prompts."""
    try:
        records = [row for _, row in iterate_jsonl(file)] if file.is_file() else []
    except UserError:  # half a line of a run that was stopped: asked again
        return None
    asked = [(record.get("question"), record.get("checkpoint_sha256"), record.get("num_predict")) for record in records]
    wanted = [(prompt.messages[-1]["content"], weights, MAX_TOKENS) for prompt in prompts]
    return records if asked == wanted else None


@contextmanager
def _served(server: OllamaServer, directory: Path, weights: str, name: str, file: Path) -> Iterator[str]:
    """The name of a model in Ollama with a checkpoint's weights: the run's own, or one that is deleted afterwards."""
    if owner_sha256(server, name) == weights:
        yield name
        return
    model = f"panel-{name.replace(':', '-')}-{file.stem}"
    template = ChatTemplate.from_checkpoint(directory)
    generation = read_json(path) if (path := directory / "generation_config.json").is_file() else {}
    context = min(CONTEXT, load_config(directory).block_size)
    modelfile = make_modelfile(template, generation, num_ctx=context, num_thread=max(1, (os.cpu_count() or 1) // 2))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(directory, file, "q8_0", model, weights)
        create_model(server, model, file, modelfile)
    finally:
        file.unlink(missing_ok=True)
    try:
        yield model
    finally:
        with explained(server, model):
            connect(server).delete(model)


def _ask(server: OllamaServer, model: str, prompts: list[Prompt], file: Path, weights: str) -> list[Record]:
    questions = [
        Question(
            prompt.messages,
            {
                "question": prompt.messages[-1]["content"],
                "kind": prompt.kind,
                "wanted": prompt.wanted,
                "checkpoint_sha256": weights,
            },
        )
        for prompt in prompts
    ]
    return Batch(server, model, questions, file, dict(GREEDY), resume=False).run()
