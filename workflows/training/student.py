"""A model that learns from another: log-probabilities of the data's tokens, and how far it is from its teacher at each.

Both read the same packed row. The teacher's head runs, like the student's, only where a token is learned, chunk by
chunk; what a chunk's backward pass needs is computed again there, so that neither model's logits of a whole row exist
at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from workflows.chat_template import ChatTemplate
from workflows.checkpoint import load_config
from workflows.training.batch import PackedBatch
from workflows.training.losses import forward_kl, reverse_kl
from workflows.training.model import GPT

Divergence = Literal["forward", "reverse"]
DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
}
CHUNK = 128
"""Learned tokens per chunk. Half a dozen tables of its size are alive at once: both models' logits, log-probabilities
and gradients; 128 rows of 49,152 numbers are 25 MB."""


class Student(GPT):
    """A model whose packed forward can also compare it with a teacher."""

    def forward(self, idx: torch.Tensor | PackedBatch, *args: Any, teacher: GPT | None = None, **kwargs: Any) -> Any:
        """`compared` for a packed row and a teacher; else as `GPT.forward`.

        Args:
            idx: A packed row, or token ids for LitGPT's own forward.
            *args: LitGPT's.
            teacher: The model to learn from, frozen.
            **kwargs: LitGPT's, or those of `compared`.
        """
        if teacher is not None and isinstance(idx, PackedBatch):
            return self.compared(idx, teacher, *args, **kwargs)
        return super().forward(idx, *args, **kwargs)

    def compared(
        self, batch: PackedBatch, teacher: GPT, divergence: Divergence = "forward", temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student beside its teacher, at every learned token.

        Args:
            batch: A packed row.
            teacher: A model of the same vocabulary, on the same device; no gradient reaches it.
            divergence: "forward" is KL(teacher || student), "reverse" KL(student || teacher).
            temperature: Of the divergence; the log-probabilities are at 1.

        Returns:
            log p(token) and divergence, float32, shape (N,) each.
        """
        with torch.no_grad():
            theirs = teacher.hidden(batch)[0].index_select(0, batch.predictors)  # (N, the teacher's n_embd)
        ours = self.hidden(batch)[0].index_select(0, batch.predictors)  # (N, n_embd)

        def chunk(ours: torch.Tensor, theirs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                taught = teacher.head_logits(theirs)  # (n, padded_vocab_size)
            logits = self.head_logits(ours)  # (n, padded_vocab_size)
            logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)  # (n,)
            return logprobs, DIVERGENCES[divergence](logits, taught, temperature)

        chunks = zip(ours.split(CHUNK), theirs.split(CHUNK), batch.targets.split(CHUNK), strict=True)
        pairs = [checkpoint(chunk, *each, use_reentrant=False) for each in chunks]
        logprobs, divergences = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return logprobs, divergences


def teacher_problems(student_dir: Path, teacher_dir: Path, max_seq_length: int) -> list[str]:
    """Why a teacher's distributions say nothing to a student, as messages.

    Args:
        student_dir: The checkpoint that is trained.
        teacher_dir: The checkpoint that it is to learn from.
        max_seq_length: The longest sample that both are to read.
    """
    student, teacher = load_config(student_dir), load_config(teacher_dir)
    problems = []
    ours, theirs = (ChatTemplate.from_checkpoint(folder).tokenizer.get_vocab() for folder in (student_dir, teacher_dir))
    sizes = (student.padded_vocab_size, teacher.padded_vocab_size)
    if ours != theirs or sizes[0] != sizes[1]:
        odd = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        told = (
            f"{len(odd):,} tokens differ, such as {', '.join(map(repr, odd[:3]))}" if odd else "the heads' sizes differ"
        )
        problems.append(
            f"--teacher_dir {teacher_dir} has another vocabulary ({sizes[1]:,} tokens) than --checkpoint_dir "
            f"{student_dir} ({sizes[0]:,}; {told}), so their distributions cannot be compared. Let it write answers "
            "instead (`teach`), and train on those."
        )
    if student.n_layer > teacher.n_layer:
        problems.append(
            f"--checkpoint_dir {student_dir} has {student.n_layer} layers, more than the {teacher.n_layer} of its "
            "teacher: are the two the wrong way round?"
        )
    if max_seq_length > teacher.block_size:
        problems.append(
            f"--train.max_seq_length {max_seq_length} exceeds the teacher's context of {teacher.block_size}."
        )
    return problems
