"""Knowledge distillation: a small model learns from what a large one thinks, not from the right answers alone.

A teacher that says "positive, 70%" tells more than a label does. DistilBERT (Sanh et al. 2019, arXiv 1910.01108) puts
three losses together; here each is a function. `projects/distill.py` uses them on a classifier;
`workflows/distill_lm.py` does the like for language models on LitGPT.

Run it: python -m custom_models.distillation
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_models.attention import real_tokens
from custom_models.encoder import Encoder, non_embedding_parameters
from workflows.errors import UserError, run_file


def soft_target_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(z_teacher / T) || softmax(z / T)), the mean over texts (arXiv 1503.02531, section 2).

    T^2 keeps the gradient's size, which falls with 1 / T^2, so that the weight beside other losses keeps its meaning.

    Args:
        logits: The student's, (.., n_label).
        teacher_logits: Of the same shape.
        temperature: T.
    """
    theirs = F.log_softmax(teacher_logits / temperature, dim=-1)  # (.., n_label)
    ours = F.log_softmax(logits / temperature, dim=-1)  # (.., n_label)
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(dim=-1).mean()


def cosine_loss(states: Tensor, teacher_states: Tensor, lengths: Tensor | None = None) -> Tensor:
    """1 - cos(h, h_teacher), the mean over real tokens.

    Args:
        states: The student's last layer, (B, T, width).
        teacher_states: The teacher's, of the same shape.
        lengths: How many tokens of each text are real, (B,); all if None.
    """
    apart = 1 - F.cosine_similarity(states, teacher_states, dim=-1)  # (B, T)
    if lengths is None:
        return apart.mean()
    return apart[real_tokens(lengths, apart.shape[1])].mean()


def student_of(teacher: Encoder, n_layer: int | None = None) -> Encoder:
    """An encoder with some of a teacher's layers, evenly spread, and all else of it: its weights are where to begin.

    Args:
        teacher: The larger encoder.
        n_layer: How many layers the student has; half of the teacher's if None.

    Raises:
        UserError: If that are more than the teacher has, or none.
    """
    of_teacher = teacher.config.n_layer
    n_layer = of_teacher // 2 if n_layer is None else n_layer
    if not 1 <= n_layer <= of_teacher:
        raise UserError(f"A student of a teacher with {of_teacher} layers has from 1 to {of_teacher}, not {n_layer}.")
    student = Encoder(replace(teacher.config, n_layer=n_layer))
    kept = [i * of_teacher // n_layer for i in range(n_layer)]
    theirs, ours = teacher.state_dict(), {}
    for name in student.state_dict():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            ours[name] = theirs[f"layers.{kept[int(number)]}.{rest}"]
        else:
            ours[name] = theirs[name]
    student.load_state_dict(ours)
    return student


def main() -> None:
    """Show what a temperature does to a teacher's opinion, and how small a student of MiniLM is."""
    from custom_models.encoder_checkpoint import load_encoder

    opinion = torch.tensor([4.0, 1.0, -1.0])
    for temperature in (1.0, 2.0, 5.0):
        shares = (opinion / temperature).softmax(dim=-1).tolist()
        print(f"temperature {temperature:.0f}: " + "  ".join(f"{share:6.1%}" for share in shares))
    teacher = load_encoder("minilm")
    student = student_of(teacher)
    for name, encoder in {"MiniLM": teacher, "student": student}.items():
        inner = non_embedding_parameters(encoder) / 1e6
        print(f"{name}: {encoder.config.n_layer} layers, {inner:.1f} M parameters besides embeddings")


if __name__ == "__main__":
    run_file(main)
