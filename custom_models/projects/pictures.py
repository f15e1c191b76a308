"""Pictures of a training: its curves, and what was taken for what."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from workflows.files import atomic_file


def draw_curves(rounds: Sequence[Sequence[dict[str, float]]], file: Path, title: str, unit: str = "text") -> None:
    """Loss and accuracy over the epochs, a line for each seed.

    Args:
        rounds: For each seed the epochs' numbers: epoch, train_loss, val_loss, val_accuracy.
        file: The picture.
        title: Above it.
        unit: What a loss is the mean of.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for number, epochs in enumerate(rounds):
        x = [row["epoch"] + 1 for row in epochs]
        named = number == 0
        losses.plot(x, [row["train_loss"] for row in epochs], "C0.--", label="training" if named else None)
        losses.plot(x, [row["val_loss"] for row in epochs], "C1.-", label="validation" if named else None)
        accuracies.plot(x, [100 * row["val_accuracy"] for row in epochs], "C1.-")
    losses.set(xlabel="epoch", ylabel=f"loss (nats a {unit})")
    accuracies.set(xlabel="epoch", ylabel="validation accuracy (%)")
    losses.legend()
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    figure.suptitle(f"{title}, {len(rounds)} seed{'s' * (len(rounds) > 1)}")
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=150)


def draw_confusion(counts: Tensor, labels: Sequence[str], file: Path, title: str) -> None:
    """How many texts of each class were taken for which.

    Args:
        counts: (n_label, n_label), true class by row.
        labels: The classes' names.
        file: The picture.
        title: Above it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 4), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)  # (n_label, n_label)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            share = float(shares[i, j])
            axes.text(
                j, i, f"{count:,}\n{share:.0%}", ha="center", va="center", color="white" if share > 0.5 else "black"
            )
    axes.set(xticks=range(len(labels)), yticks=range(len(labels)), xlabel="taken for", ylabel="truth")
    axes.set_xticklabels(labels)
    axes.set_yticklabels(labels, rotation=90, va="center")
    axes.set_title(title, fontsize=10)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=150)
