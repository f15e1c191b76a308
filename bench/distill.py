"""`make bench-distill`: how much faster the distilled student reads than its teacher, side by side.

Each classifies the same texts, in batches of texts of similar length, as `predict` does; in turn, each in a process of
its own.
"""

import json
import time
from pathlib import Path

import torch

from bench.harness import alternate, report, write_report
from custom_models.encoder import non_embedding_parameters
from custom_models.projects.classifier import encode_splits, load_classifier
from custom_models.projects.texts import read_labelled
from workflows.errors import UserError, run_file

LEAST_FASTER = 1.6


def setup(
    student_dir: Path = Path("out/distill/movie_snippets/final"),
    teacher_dir: Path = Path("out/sentiment/movie_snippets/minilm/final"),
    data: Path = Path("data/movie_snippets"),
    texts: int = 1000,
    rounds: int = 5,
    contender: str | None = None,
) -> None:
    """Measure, and write out/bench/distill.json.

    Args:
        student_dir: The student, from `make distill`.
        teacher_dir: Its teacher, from `make sentiment`.
        data: Whose test texts are read.
        texts: How many of them.
        rounds: How often each reads them, in turn.
        contender: Only this one, once, in this process (used by the bench itself).

    Raises:
        UserError: If a folder holds no classifier.
    """
    directories = {"ours": student_dir, "teacher": teacher_dir}
    for directory in directories.values():
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory} is not there yet: run make distill first.")
    if contender is not None:
        print(json.dumps(read(directories[contender], data, texts)))
        return
    arguments = ["--student_dir", str(student_dir), "--teacher_dir", str(teacher_dir)]
    runs = alternate(
        "bench.distill", list(directories), [*arguments, "--data", str(data), "--texts", str(texts)], rounds
    )
    reported = report("distill", "texts/s", {"data": data.name, "texts": texts, "rounds": rounds}, runs)
    sizes = {name: found[0]["non_embedding_parameters"] for name, found in runs.items()}
    accuracy = {name: found[0]["accuracy"] for name, found in runs.items()}
    write_report({**reported, "non_embedding_parameters": sizes, "accuracy": accuracy})
    print(f"accuracy {accuracy['ours']:.1%} of {accuracy['teacher']:.1%}, "
          f"{1 - sizes['ours'] / sizes['teacher']:.0%} fewer parameters besides embeddings")  # fmt: skip
    faster = reported["ratio"]["teacher"]["median"]
    print(f"{faster:.2f} times as fast (promised: {LEAST_FASTER}): {'kept' if faster >= LEAST_FASTER else 'NOT kept'}")


def read(directory: Path, data: Path, texts: int) -> dict[str, float]:
    """Classify the texts once to warm up, then once against the clock."""
    model, tokenizer = load_classifier(directory)
    pairs = read_labelled(data, "test", model.labels)[0][:texts]
    rows = encode_splits(data, {"test": pairs}, tokenizer, model.encoder.config.n_position)["test"]
    model.logits(rows)
    began = time.perf_counter()
    taken = model.logits(rows).argmax(dim=-1)  # (texts,)
    seconds = time.perf_counter() - began
    right = (taken == torch.tensor([row.label for row in rows])).float().mean()
    size = non_embedding_parameters(model.encoder)
    return {"rate": len(rows) / seconds, "accuracy": float(right), "non_embedding_parameters": size}


if __name__ == "__main__":
    run_file(setup)
