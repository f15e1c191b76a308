"""`make distill`: a student of half the layers learns a classifier from its teacher (DistilBERT's recipe).

The student begins with every other layer of the teacher (Sanh et al. 2019, arXiv 1910.01108, section 3) and is trained
on three losses, each with a weight of its own: what the teacher thinks of each class, softened by a temperature (Hinton
et al. 2015, arXiv 1503.02531), the true class, and the direction of the teacher's hidden states. The same student
trained without a teacher stands beside it.
"""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from custom_models.distillation import cosine_loss, soft_target_loss, student_of
from custom_models.encoder import non_embedding_parameters
from custom_models.encoder_checkpoint import read_own
from custom_models.projects.classifier import (
    ClassifierTask,
    TextClassifier,
    confusion,
    encode_splits,
    fit_classifier,
    load_classifier,
    over_seeds,
    share_right,
    steps_of,
)
from custom_models.projects.fitting import FitArgs, seed_problems
from custom_models.projects.keeping import kept_until_done
from custom_models.projects.pictures import draw_curves
from custom_models.projects.texts import Batch, read_labelled
from workflows.checkpoint import metric, share_metric, versions, write_metrics
from workflows.errors import UserError, report_all
from workflows.measure import PeakMemory, hardware, seconds_of_step, step_began


@dataclass
class Weights:
    """What each loss counts."""

    soft: float = 0.5
    """The teacher's classes, softened."""
    hard: float = 0.5
    """The true class."""
    cosine: float = 1.0
    """The direction of the hidden states."""
    temperature: float = 2.0
    """Softens teacher's and student's probabilities."""

    def problems(self) -> list[str]:
        """Everything that is wrong with them, as messages."""
        found = [f"--weights.{name} must be at least 0, not {getattr(self, name)}."
                 for name in ("soft", "hard", "cosine") if getattr(self, name) < 0]  # fmt: skip
        if not self.temperature > 0:
            found.append(f"--weights.temperature must be positive, not {self.temperature}.")
        if not self.soft + self.hard > 0:
            found.append("--weights.soft and --weights.hard cannot both be 0.")
        return found


class DistillationTask(ClassifierTask):
    """A classifier that is trained with a teacher."""

    def __init__(
        self, model: TextClassifier, teacher: TextClassifier, weights: Weights, fit: FitArgs, total_steps: int
    ) -> None:
        super().__init__(model, fit, total_steps)
        self.weights = weights
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list: it is no part of what is trained and saved

    def loss(self, batch: Batch) -> Tensor:
        """The weighted sum of the three losses."""
        (teacher,), weights = self._teacher, self.weights
        teacher.to(self.device)
        with torch.no_grad():
            theirs = teacher.encoder(batch.ids, batch.lengths).last  # (B, T, width)
            their_logits = teacher.from_states(theirs, batch.lengths)  # (B, n_label)
        states = self.model.encoder(batch.ids, batch.lengths).last  # (B, T, width)
        logits = self.model.from_states(states, batch.lengths)  # (B, n_label)
        return (
            weights.soft * soft_target_loss(logits, their_logits, weights.temperature)
            + weights.hard * F.cross_entropy(logits, batch.labels)
            + weights.cosine * cosine_loss(states, theirs, batch.lengths)
        )


@kept_until_done
def setup(
    teacher_dir: Path = Path("out/sentiment/movie_snippets/minilm/final"),
    data: Path = Path("data/movie_snippets"),
    out_dir: Path = Path("out/distill/movie_snippets"),
    weights: Weights = Weights(),
    fit: FitArgs = FitArgs(batch_size=32, learning_rate=1e-4, max_epochs=4, patience=2, precision=None),
    seeds: list[int] | None = None,
    max_rows: int | None = None,
) -> None:
    """Distil a classifier into one of half its layers, and train the same student without the teacher beside it.

    Args:
        teacher_dir: The teacher: the `final` folder of `make sentiment`.
        data: A data directory of {"text", "label"} rows.
        out_dir: Where pictures and numbers go; the student is in its `final` folder.
        weights: What each loss counts.
        fit: How both students are trained.
        seeds: One student with and one without a teacher for each; [1] if null. The first one is kept.
        max_rows: Train on the first so many texts only.

    Raises:
        UserError: If an argument, the data or the teacher is not usable.
    """
    began = step_began()
    seeds = [1] if seeds is None else seeds
    problems = weights.problems() + fit.problems() + seed_problems(*seeds)
    problems += [] if max_rows is None or max_rows >= 2 else [f"--max_rows must be at least 2, not {max_rows}."]
    report_all(problems)
    teacher, tokenizer = load_classifier(teacher_dir)
    learned_from = read_own(teacher_dir)[0].get("data", data.name)
    if learned_from != data.name:  # sets of the same reviews share sentences: the teacher may know the test's
        raise UserError(
            f"The teacher in {teacher_dir} learned from {learned_from}, not from {data.name}. Train one on the same "
            f"data: make sentiment ENCODER=minilm REVIEWS={data.name}"
        )
    texts = {split: read_labelled(data, split, teacher.labels)[0] for split in ("train", "validation", "test")}
    texts["train"] = texts["train"][:max_rows]
    rows = encode_splits(data, texts, tokenizer, teacher.encoder.config.n_position)

    found: dict[str, list[float]] = {"distilled": [], "alone": []}
    curves, kept = [], None
    with PeakMemory() as peak:
        of_teacher = share_right(confusion(teacher, rows["test"]))
        for seed in seeds:
            for name in found:
                L.seed_everything(seed, verbose=False)
                student = TextClassifier(student_of(teacher.encoder), teacher.labels)
                student.head.load_state_dict(teacher.head.state_dict())
                if name == "distilled":
                    task: ClassifierTask = DistillationTask(student, teacher, weights, fit, steps_of(rows, fit))
                    kept = kept or student
                else:
                    task = ClassifierTask(student, fit, steps_of(rows, fit))
                started = time.perf_counter()
                epochs = fit_classifier(task, rows, out_dir, seed)
                found[name].append(share_right(confusion(student, rows["test"])))
                print(f"seed {seed}, {name}: test {found[name][-1]:.1%}, {time.perf_counter() - started:.0f} s")
                if name == "distilled":
                    curves.append(epochs)
    assert kept is not None
    kept.save(tokenizer, out_dir / "final", data.name)
    draw_curves(curves, out_dir / "curves.png", f"student of {kept.encoder.config.n_layer} layers on {data.name}")
    sizes = {name: non_embedding_parameters(model.encoder) for name, model in (("teacher", teacher), ("student", kept))}
    mean, alone = (statistics.fmean(values) for values in found.values())
    fewer = 1 - sizes["student"] / sizes["teacher"]
    n = len(rows["test"])
    write_metrics(
        out_dir / "metrics.json",
        [
            share_metric("accuracy_teacher", of_teacher, n),
            share_metric("accuracy", found["distilled"][0], n),
            share_metric("accuracy_without_teacher", found["alone"][0], n),
            *over_seeds("accuracy", found["distilled"]),
            *over_seeds("accuracy_without_teacher", found["alone"]),
            metric("share_of_teachers_accuracy", mean / of_teacher, n=len(seeds), split="test"),
            metric("fewer_non_embedding_parameters", fewer),
        ],
        seconds=seconds_of_step(began),
        peak_bytes=peak.bytes,
        seeds=found,
        non_embedding_parameters=sizes,
        data=data.name,
        settings={
            "teacher_dir": str(teacher_dir),
            "weights": asdict(weights),
            "fit": asdict(fit),
            "max_rows": max_rows,
        },
        hardware=hardware(),
        versions=versions(),
    )
    print(
        f"\ntest accuracy: teacher {of_teacher:.1%}, student {mean:.1%}, the same one alone {alone:.1%} "
        f"({len(seeds)} seed{'s' * (len(seeds) > 1)})\nThe student keeps {mean / of_teacher:.1%} of the accuracy with "
        f"{fewer:.0%} fewer parameters besides embeddings; `make bench-distill` measures how much faster it is.\n"
        f"{out_dir}/final, curves.png, metrics.json"
    )
