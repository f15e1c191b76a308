"""`make ask FILE=questions.jsonl`: have a file of questions answered by a model in Ollama, a JSON line per answer."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.rows import ROLES, parse_line, type_name
from workflows.errors import UserError, report_all
from workflows.ollama.batch import Batch, Question
from workflows.ollama.options import chosen, option_problems
from workflows.ollama.schema import read_schema
from workflows.ollama.server import open_server
from workflows.progress import watched

STATUS = Path("out/ask")
"""Where `make status` sees how far answers are."""
SHAPES = '{"question": TEXT}, {"prompt": TEXT or [messages]} or {"messages": [...]}'
_MOST_TOLD = 10


def setup(
    file: Path,
    model: str = "medical",
    out_file: Path | None = None,
    system: str | None = None,
    schema: Path | None = None,
    parallel: int = 4,
    skip_broken: bool = False,
    resume: bool = True,
    limit: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    repeat_penalty: float | None = None,
    num_predict: int | None = None,
    num_ctx: int | None = None,
    num_thread: int | None = None,
    seed: int | None = None,
    port: int | None = None,
) -> None:
    """Answer a file of questions. Not medical advice.

    Run again, it resumes where it was stopped: finished answers are in OUT_FILE. A server that ends in the middle is
    waited for. A question that cannot be answered gets a line with `error`, and is asked again by the next run, which
    may give it more room. Answers to questions that FILE does not have any more are moved to a file next to it.

    Args:
        file: JSON lines of {"question": TEXT}, {"prompt": TEXT or [messages]} or {"messages": [...]} (an answer at the
            end is left out), perhaps with "id". A data directory's test.jsonl is such a file.
        model: The model's name in Ollama.
        out_file: Where the answers go; FILE with `.answers.jsonl` at its end by default.
        system: System message for questions without one; the model's own by default.
        schema: A JSON schema that every answer must follow, as a file. Such answers have no reasoning before them.
        parallel: Questions in the air at a time. Each takes a context's memory in a server that we start; another's
            server decides by itself how many it works on.
        skip_broken: Leave out lines that are no questions, instead of refusing the file.
        resume: Keep the answers that OUT_FILE has; false starts from scratch.
        limit: Maximum number of questions, from the first.
        temperature: Sampling temperature; the model's own by default, as for all that follow. 0 is greedy.
        top_p: Sample from the fewest tokens whose probabilities reach this.
        top_k: Sample from this many most likely tokens.
        repeat_penalty: Penalty on repeated tokens; 1.0 is none.
        num_predict: Maximum number of tokens of an answer.
        num_ctx: Context length in tokens.
        num_thread: CPU threads.
        seed: Seed of the sampling.
        port: Port for an Ollama server of ours; by default a free one, and only if no other Ollama is found.

    Raises:
        UserError: If an argument or the file is not usable, no Ollama can be had or it ends for good, or a question
            could not be answered.
    """
    options = chosen(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repeat_penalty=repeat_penalty,
        num_predict=num_predict,
        num_ctx=num_ctx,
        num_thread=num_thread,
        seed=seed,
    )
    target = out_file or file.with_suffix(".answers.jsonl")
    problems = option_problems(options, port, model)
    if not 1 <= parallel <= 64:
        problems.append(f"--parallel must be from 1 to 64, not {parallel}.")
    if limit is not None and limit < 1:
        problems.append(f"--limit must be at least 1, not {limit}.")
    if target.resolve() == file.resolve():
        problems.append(f"--out_file {target} is the file of the questions; name another.")
    report_all(problems)
    answer_schema = None if schema is None else read_schema(schema)
    questions = read_questions(file, system, answer_schema, skip_broken)[:limit]
    with open_server(port, parallel=parallel) as server:
        batch = Batch(server, model, questions, target, options, parallel, resume)
        if batch.kept:
            print(f"{batch.kept} of {len(questions)} answers are in {target} already")
        with _seen_by_status(target):
            records = batch.run()
    failed = [record for record in records if "error" in record]
    print(f"{len(records) - len(failed)} answers: {target}")
    batch.require_answers(failed, file)


@contextlib.contextmanager
def _seen_by_status(target: Path) -> Iterator[None]:
    """Let `make status`, which looks under out/, see how far the answers are, where that can be written to."""
    place = target.resolve().with_suffix("")
    place = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place.relative_to(place.anchor)
    folder = STATUS / "-".join(place.parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        yield
        return
    with watched(folder, keeps="keeps what is answered"):
        yield
    with contextlib.suppress(OSError):  # other answers may be under way
        folder.rmdir()
        STATUS.rmdir()


def read_questions(
    file: Path, system: str | None = None, schema: dict[str, Any] | None = None, skip_broken: bool = False
) -> list[Question]:
    """The questions of a file.

    Args:
        file: JSON lines.
        system: System message for those without one.
        schema: What the answers must follow.
        skip_broken: Leave out lines that are no questions.

    Raises:
        UserError: If the file is missing or holds no question, or a line is none; all such lines are told.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist. It is to hold a line for each question: {SHAPES}.")
    questions, problems = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            questions.append(_question(file, number, parse_line(file, number, line), system, schema))
        except UserError as e:
            problems.append(str(e))
    if problems and skip_broken:
        print(f"{len(problems)} lines of {file} are left out. The first: {problems[0]}")
    elif problems:
        more = len(problems) - _MOST_TOLD
        told = problems[:_MOST_TOLD] + ([f"… and {more} more"] if more > 0 else [])
        report_all([*told, "Nothing has been asked yet. Mend these lines, or leave them out with --skip_broken true."])
    if not questions:
        raise UserError(f"{file} holds no question. A line looks like {SHAPES}.")
    return questions


def _question(file: Path, number: int, row: Any, system: str | None, schema: dict[str, Any] | None) -> Question:
    """One line as a question.

    Raises:
        UserError: If it is none.
    """
    if not isinstance(row, dict):
        raise UserError(f"{file}, line {number}: it is {type_name(row)}, not {SHAPES}.")
    name = next((name for name in ("question", "prompt", "messages") if name in row), None)
    asked = row.get(name) if name else None
    if isinstance(asked, str) and asked.strip():
        asked = [{"role": "user", "content": asked}]
    if not isinstance(asked, list) or not all(_is_message(message) for message in asked):
        raise UserError(f"{file}, line {number}: no question. A line looks like {SHAPES}.")
    messages = [{"role": message["role"], "content": message["content"]} for message in asked]
    if name == "messages" and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{file}, line {number}: the conversation does not end with a question of the user's.")
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    identity = {"id": row["id"]} if "id" in row else {}
    return Question(messages, {"line": number, **identity, "question": messages[-1]["content"]}, schema)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ROLES
        and message["role"] != "tool"
        and not message.get("tool_calls")
        and isinstance(message.get("content"), str)
        and bool(message["content"].strip())
    )
