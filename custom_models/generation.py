"""Writing on: a decoder's likeliest next token, or a drawn one, again and again, with or without its KV cache.

With the cache each step computes one token; without it, the whole text again. Both give the same text, which
`tests/custom_models/test_generation.py` holds every decoder of this folder to.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from workflows.errors import UserError, report_all
from workflows.training.sampling import choose


class Decoder(Protocol):
    """What `generate` needs of a model."""

    @property
    def max_length(self) -> int:
        """The longest text, in tokens."""
        ...

    def __call__(self, ids: Tensor, caches: Sequence[Any] | None = None) -> Tensor:
        """Token ids (B, T), with caches only the new ones -> logits (B, T, vocab_size)."""
        ...

    def new_caches(self, batch: int, length: int) -> list[Any]:
        """An empty cache for each layer, for B texts of at most so many tokens."""
        ...


class Generated(NamedTuple):
    """What was written.

    Attributes:
        ids: For each text its new tokens' ids; the stop id is the last of them if it was reached.
        seconds: How long it took.
        answers: For each text all of the answers that a beam search kept, the best first; empty without one.
    """

    ids: list[list[int]]
    seconds: float
    answers: Sequence[list[list[int]]] = ()

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all texts, by second."""
        return sum(map(len, self.ids)) / max(self.seconds, 1e-9)


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
    use_cache: bool = True,
) -> Generated:
    """Write on from prompts of one length.

    Args:
        model: A decoder in evaluation mode.
        prompts: Token ids, (B, T), T at least 1.
        max_new_tokens: At most so many tokens are written.
        temperature: 0 takes the likeliest token.
        top_k: Draw among the k likeliest tokens only.
        top_p: Draw among the fewest tokens whose probabilities reach this sum (nucleus sampling, arXiv 1904.09751).
        seed: Decides what is drawn; torch's global generator if None.
        stop_ids: Ids that end a text.
        use_cache: Whether to keep keys and values.

    Raises:
        UserError: If the text would grow beyond the model's longest, a setting makes no sense, or the model's scores
            are not finite.
    """
    batch, length = prompts.shape
    problems = [] if length else ["There is nothing to write on from: the prompt has no token."]
    problems += [] if max_new_tokens >= 1 else [f"max_new_tokens must be at least 1, not {max_new_tokens}."]
    problems += [] if temperature >= 0 else [f"temperature must be at least 0, not {temperature}."]
    problems += [] if top_k is None or top_k >= 1 else [f"top_k must be at least 1, not {top_k}."]
    problems += [] if 0 < top_p <= 1 else [f"top_p must be above 0 and at most 1, not {top_p}."]
    report_all(problems)
    if length + max_new_tokens > model.max_length:
        raise UserError(
            f"{length} tokens and {max_new_tokens} new ones are more than the {model.max_length} that the model was "
            "made for. Shorten the prompt, or write fewer tokens."
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    draws = torch.rand(batch, max_new_tokens, generator=generator, dtype=torch.float64)  # (B, max_new_tokens)
    caches = model.new_caches(batch, length + max_new_tokens) if use_cache else None
    began, text, new = time.perf_counter(), prompts, prompts  # (B, T) each
    done = torch.zeros(batch, dtype=torch.bool, device=prompts.device)  # (B,)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=prompts.device)  # (n_stop,)
    for step in range(max_new_tokens):
        logits = model(new if use_cache else text, caches)[:, -1].float()  # (B, vocab_size)
        check_scores(logits)
        picked, _ = choose(logits, draws[:, step], temperature, top_k, top_p)  # (B,)
        new = picked[:, None]  # (B, 1)
        text = torch.cat([text, new], dim=1)  # (B, T + step + 1)
        done |= torch.isin(picked, stops)  # (B,)
        if done.all():
            break
    written = [_until(row, set(stop_ids)) for row in text[:, length:].tolist()]
    return Generated(written, time.perf_counter() - began)


def check_scores(logits: Tensor) -> None:
    """Refuse to write by a model's scores, of any shape, that are not finite.

    Raises:
        UserError: If one is not.
    """
    if not logits.isfinite().all():
        raise UserError("The model's scores are not finite: its weights are damaged, or its training diverged.")


def _until(ids: list[int], stop_ids: set[int]) -> list[int]:
    """Ids up to the first stop id, that one included."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
