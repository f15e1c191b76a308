"""What stands in the JSON files that steps leave, as far as `status` and `report` rely on it.

Files are cut short, mended by hand, written by other versions: they are held to these shapes when they are read, so
that the message names the file, and what comes later need not doubt them. What is not named here may be anything.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from workflows.errors import UserError
from workflows.files import read_json

Moment = Annotated[float, Field(ge=0, lt=1e11)]
"""Unix seconds, of a time that a calendar knows."""
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Shape(BaseModel):
    """A JSON object; no text is taken for a number."""

    model_config = ConfigDict(strict=True)


S = TypeVar("S", bound=Shape)


class Progress(Shape):
    """`progress.json`: the process that writes it and, once something was counted, how far it is (`_Watch`)."""

    command: str
    host: str
    pid: Annotated[int, Field(gt=0)]
    born: Moment
    updated: Moment
    began: Moment = 0
    first: Count = 0
    done: Count = 0
    total: Count | None = None
    unit: str = "step"
    what: str = ""
    keeps: str = ""
    loss: FiniteFloat | None = None


class Row(Shape):
    """One of the metrics in `metrics.json`."""

    name: str
    value: FiniteFloat
    stderr: FiniteFloat | None
    n: int | None
    split: str | None
    task: str | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None


class Metrics(Shape):
    """`metrics.json` of any step."""

    metrics: list[Row]
    seconds: FiniteFloat
    tokens_per_second: FiniteFloat | None = None


class Compared(Shape):
    """Two models on the same questions, a row of `evaluation.compare`."""

    task: str
    metric: str
    n: int
    base: FiniteFloat
    tuned: FiniteFloat
    difference: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    p_value: FiniteFloat


class Shown(Shape):
    """A held-out question, answered before and after a training step."""

    question: str
    before: str = ""
    after: str = ""
    wanted: str = ""


class Trained(Metrics):
    """`metrics.json` of a training step."""

    peak_bytes: FiniteFloat | None = None
    steps: int | None = None
    gain: list[Compared] = []
    shown: list[Shown] = []
    warnings: list[str] = []


class Score(Row):
    """One of a task's metrics."""

    task: str


class Evaluated(Shape):
    """`metrics.json` of an evaluation."""

    metrics: list[Score]
    checkpoint_dir: str
    comparison: list[Compared] = []


class Answer(Shape):
    """A line of an evaluation's `answers.jsonl`."""

    task: str
    question: str
    wanted: str
    answer: str


class Sampled(Shape):
    """A line of a training step's `completions.jsonl`."""

    step: int
    question: str
    answer: str
    total: float


class Machine(Shape):
    """What `measure.hardware` says."""

    cpu: str
    cores: int
    threads: int
    memory_bytes: Count
    os: str
    gpu: str | None = None


class Provenance(Shape):
    """`provenance.json` of any directory."""

    sources: dict[str, dict[str, Any]]
    versions: dict[str, str]
    files: dict[str, str]
    hardware: Machine | None = None


class Settings(Shape):
    """The settings of a training step that the page names in its table."""

    checkpoint_dir: str
    data: str = ""


class TrainedFrom(Provenance):
    """`provenance.json` of a training step."""

    settings: Settings


class PanelAnswer(Shape):
    """A line of a run's `panel/STAGE.jsonl`."""

    question: str
    kind: str
    wanted: str
    answer: str = ""
    error: str = ""
    done_reason: str = ""


class Difference(Shape):
    """A greedy answer of Ollama's that is not LitGPT's."""

    near_tie: bool


class Example(Shape):
    """A question with the answers of both."""

    question: str
    litgpt: str
    ollama: str
    equal: bool


class Verified(Shape):
    """What the verification found of one type of GGUF."""

    prompts: int
    greedy_agreement: FiniteFloat
    differences: list[Difference]
    examples: list[Example]


class Verification(Shape):
    """`verification.json`."""

    version: str
    prompts: int
    prompt_ids_equal: bool | None
    chat_prompts_equal: bool | None
    file_bytes: dict[str, FiniteFloat]
    models: dict[str, Verified]


def shaped(value: Any, shape: type[S], where: object) -> S:
    """A value as the shape that it must have.

    Args:
        value: What was read.
        shape: What is relied on.
        where: The file, and the line in it.

    Raises:
        UserError: If it is not of this shape; the message says where, and what is odd.
    """
    try:
        return shape.model_validate(value)
    except ValidationError as e:
        odd = e.errors(include_url=False)[0]
        named = ".".join(map(str, odd["loc"])) or "the whole"
        raise UserError(
            f"{where} is not what a step writes ({named}: {odd['msg'].lower()}). Delete it, or run the step again."
        ) from None


def read_shape(file: Path, shape: type[S]) -> S:
    """Read a JSON file that must have a shape.

    Raises:
        UserError: If it is missing, no JSON, or not of this shape.
    """
    return shaped(read_json(file), shape, file)
