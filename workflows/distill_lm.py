"""`make distill-lm`: train a student to say what its teacher would, token by token.

The loss of a token of the data is (1 - alpha) times its cross-entropy plus alpha times the divergence between teacher
and student there: forward KL (Hinton et al. 2015, arXiv 1503.02531) or reverse KL (MiniLLM, Gu et al. 2023, arXiv
2306.08543). `--divergence none` is the student without its teacher, to compare with. To learn from answers that the
teacher wrote (Kim & Rush 2016, arXiv 1606.07947; DeepSeek-R1's distilled models), train on what `teach` makes of a data
set: with `lora`, or here.
"""

import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import report_all
from workflows.lora import SFT, conversations
from workflows.training.batch import PackedBatch
from workflows.training.loop import TrainArgs
from workflows.training.model import GPT, load_model
from workflows.training.step import RunArgs, decided, done_before, row_limit_problems, run_step
from workflows.training.student import Divergence, Student, teacher_problems


class Distillation(SFT):
    """The objective: per learned token (1 - alpha) cross-entropy + alpha divergence."""

    def __init__(self, *sft: Any, teacher: GPT, divergence: Divergence, alpha: float, temperature: float) -> None:
        """Keep what a run needs.

        Args:
            *sft: What `SFT` takes.
            teacher: Frozen, on the device of the run.
            divergence: Which way round the KL divergence is.
            alpha: The divergence's weight.
            temperature: The divergence's temperature.
        """
        super().__init__(*sft)
        self.teacher, self.alpha = teacher, alpha
        self.compared: dict[str, Any] = {"teacher": teacher, "divergence": divergence, "temperature": temperature}

    def adapt(self, model: Any) -> Student:
        """The model with the forward that compares; its parameters stay what they are."""
        model.__class__ = Student
        student: Student = model
        return student

    def loss(self, model: Any, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The row's losses summed over its learned tokens, and both of their parts, likewise."""
        logprobs, divergence = model(batch, **self.compared)  # (N,) each
        parts = {"cross_entropy": -logprobs.sum(), "divergence": divergence.sum()}
        loss = (1 - self.alpha) * parts["cross_entropy"] + self.alpha * parts["divergence"]
        return loss, {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def validate(self, model: Any) -> dict[str, float]:
        """Mean cross-entropy of the validation rows, as any fine-tuning reports it, and mean divergence."""
        model.eval()
        device = next(model.parameters()).device
        parts = [self.loss(model, batch.to(device))[1] for _, batch in self.validation]
        model.train()
        tokens = sum(self.units(batch) for _, batch in self.validation)
        names = {"val_loss": "cross_entropy", "val_divergence": "divergence"}
        return {name: sum(float(part[of]) for part in parts) / tokens for name, of in names.items()}


def setup(
    checkpoint_dir: Path,
    teacher_dir: Path | None = None,
    data: Path = Path("data/hpo"),
    out_dir: Path = Path("out/distill-lm"),
    kinds: list[str] | None = None,
    divergence: Divergence | Literal["none"] = "forward",
    alpha: float = 0.9,
    temperature: float = 1.0,
    max_val_rows: int = 200,
    train: TrainArgs = TrainArgs(learning_rate=5e-4),
    lora_r: int = 0,
    **run: Any,
) -> None:
    """Distill a teacher into a student.

    Args:
        checkpoint_dir: The student: a LitGPT checkpoint directory (`shrink` makes one of a teacher's layers).
        teacher_dir: The checkpoint to learn from, of the same vocabulary; whole on each device, however sharded
            the student is. It is not read with `--divergence none`.
        data: A data directory with train.jsonl and validation.jsonl of conversations; those of `teach`, too.
        out_dir: Where logs and checkpoints go; the result is its `final` folder.
        kinds: Train only on rows whose `kind` is one of these; all rows if null.
        divergence: "forward", KL(teacher || student): cover all that the teacher holds likely; "reverse",
            KL(student || teacher), on the data's tokens: say nothing that it holds unlikely; "none": the data alone.
        alpha: The divergence's weight, from 0 to 1; the data's cross-entropy has the rest.
        temperature: What both models' logits are divided by for the divergence, which is multiplied by its square.
        max_val_rows: At most this many validation rows are scored each time.
        train: Training settings.
        lora_r: Rank of the update; 0 trains the full weights.
        **run: What all training steps take (`workflows.training.step.RunArgs`).

    Raises:
        UserError: If an argument, one of the checkpoints or the data is not usable, or the two do not go together.
    """
    own = {name: value for name, value in locals().items() if name not in ("run", "lora_r")}
    own["checkpoint_dir"] = checkpoint_dir = check_checkpoint_dir(checkpoint_dir)
    common = RunArgs(lora_r=lora_r, **run)
    problems = common.problems(train, checkpoint_dir) + row_limit_problems(max_val_rows)
    if not 0 <= alpha <= 1:
        problems.append(f"--alpha must be from 0 to 1, not {alpha}.")
    if not 0 < temperature < math.inf:
        problems.append(f"--temperature must be positive, not {temperature}.")
    if divergence == "none":
        own["teacher_dir"] = None
    elif teacher_dir is None:
        problems.append(f"--divergence {divergence} needs the checkpoint to learn from: --teacher_dir.")
    else:
        own["teacher_dir"] = teacher_dir = check_checkpoint_dir(teacher_dir)
        problems += teacher_problems(checkpoint_dir, teacher_dir, train.max_seq_length)
    report_all(problems)
    settings = decided(own, common)
    if done_before(settings):
        return

    def make_objective(fabric: L.Fabric) -> SFT:
        rows = conversations(fabric, settings)
        if divergence == "none":
            return SFT(*rows, train, common.seed)
        longest: int = train.max_seq_length
        teacher = load_model(settings["teacher_dir"], None, settings["precision"], longest, fabric.device)
        teacher = teacher.eval().requires_grad_(False)
        guided: Any = {"divergence": divergence, "alpha": alpha, "temperature": temperature}
        return Distillation(*rows, train, common.seed, teacher=teacher, **guided)

    run_step("distill-lm", settings, common, make_objective)
