"""Batched decoding with a KV cache: prompts of different lengths side by side, each row leaving when it is done.

Prompts are padded on the right. A padded position's key and value are written to the cache, but the row's own tokens
overwrite them one by one before any of them is visible, so that a row sees exactly what it would see alone. A prompt
that several rows share (a group's) is computed once. LitGPT's cache writes each row at its own position (`input_pos` of
shape (B, T)) and serves its first B rows; a row that is done is replaced by the last one, so the batch shrinks without
copying the rest.

The uniform numbers that decide a sample belong to its prompt and step, not to its place in a batch: the same seed draws
the same answers whatever the batch size (up to float rounding of the logits).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from litgpt.model import do_softcapping

from workflows.errors import UserError
from workflows.training.attention import StepAttention
from workflows.training.decoding import Steps, laid_out
from workflows.training.model import GPT
from workflows.training.sampling import choose


@dataclass
class Rollout:
    """One sampled continuation.

    Attributes:
        ids: Generated token ids; the stop id is the last one if it was reached.
        logprobs: log p(id) for each of `ids`, of the untruncated distribution at the sampling temperature (at
            temperature 1 for greedy decoding).
        stopped: Whether a stop id (or `stop_when`) ended it, rather than the token limit.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    draws: torch.Tensor | None = None,
    batch_size: int = 16,
    stop_when: Callable[[list[int]], bool] | None = None,
) -> list[Rollout]:
    """Continue each prompt.

    Args:
        model: From `load_model`; left in the mode (training or not) it was in, without a cache.
        prompts: Token ids, each of at least one; lengths may differ.
        max_new_tokens: At most so many tokens are generated for each prompt.
        stop_ids: Ids that end a continuation.
        temperature: 0 takes the most likely token.
        top_k: Sample among the k most likely tokens only.
        top_p: Sample among the fewest tokens whose probabilities reach this sum (nucleus sampling, arXiv 1904.09751).
        seed: Decides the samples; torch's global generator is used if None.
        draws: Decides them instead: uniform numbers in [0, 1), float64, shape (prompts, max_new_tokens).
        batch_size: How many prompts are decoded side by side.
        stop_when: Asked with the ids generated so far after each token; true ends that continuation.

    Returns:
        One `Rollout` for each prompt, in the order of `prompts`.

    Raises:
        UserError: If a prompt with its continuation would exceed the model's context.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p)
    rollouts = [Rollout() for _ in prompts]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if draws is None:
        draws = torch.rand(len(prompts), max_new_tokens, generator=generator, dtype=torch.float64)

    def accept(row: int, token: int, logprob: float) -> bool:
        rollout = rollouts[row]
        rollout.ids.append(token)
        rollout.logprobs.append(logprob)
        rollout.stopped = token in stop_ids or (stop_when is not None and stop_when(rollout.ids))
        return rollout.stopped or len(rollout.ids) == max_new_tokens

    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # similar lengths side by side
    with _ready(model, max_new_tokens * -(-len(prompts) // batch_size)):
        for begin in range(0, len(prompts), batch_size):
            rows = longest_first[begin : begin + batch_size]
            position = torch.tensor([len(prompts[row]) for row in rows])  # of the next token, (B,)
            length = int(position.max()) + max_new_tokens
            _make_caches(model, len(rows), length)
            logits = _prefill(model, [prompts[row] for row in rows])  # (B, padded_vocab_size)
            step = Steps(partial(_decode, model), logits.device, length)
            while True:
                drawn = draws[rows, torch.tensor([len(rollouts[row].ids) for row in rows])]  # (B,)
                tokens, logprobs = choose(logits, drawn, temperature, top_k, top_p)
                picked = zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)
                done = [accept(*each) for each in picked]  # every row, whatever the others say
                slots = _keep_unfinished(model, done)
                if not slots:
                    break
                rows = [rows[slot] for slot in slots]
                position = position[slots]
                left = max_new_tokens - min(len(rollouts[row].ids) for row in rows)
                logits = step(tokens[slots], position, left)
                position = position + 1
    return rollouts


@contextmanager
def _ready(model: GPT, steps: int) -> Iterator[None]:
    """The model in evaluation mode, with its weights laid out for so many steps; then as it was, without a cache."""
    was_training = model.training
    model.eval()
    try:
        with laid_out(model, steps):
            yield
    finally:
        for block in model.transformer.h:
            block.attn.kv_cache = None
        model.train(was_training)


def _check(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float) -> None:
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError("max_new_tokens must be at least 1, temperature at least 0, top_p in (0, 1]")
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > model.max_seq_length:
        raise UserError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {model.max_seq_length} "
            "tokens. Shorten the prompt or generate fewer tokens."
        )


def _make_caches(model: GPT, batch_size: int, length: int) -> None:
    """Give every layer a cache of just the needed size: (batch_size, n_query_groups, length, head_size)."""
    weight = model.transformer.wte.weight
    for block in model.transformer.h:
        block.attn.kv_cache = block.attn.build_kv_cache(
            batch_size, length, model.rope_cache_length(), weight.device, weight.dtype
        )


def _prefill(model: GPT, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Fill the cache with B prompts; those that are the same (a group's) are computed once, and copied.

    Returns:
        The logits that follow each, float32, (B, padded_vocab_size).
    """
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}  # U different ones
    lengths = torch.tensor([len(prompt) for prompt in number])  # (U,)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in number], batch_first=True)  # (U, T)
    device = model.transformer.wte.weight.device
    positions = torch.arange(padded.size(1), device=device)  # (T,)
    logits = _forward(model, padded.to(device), positions, None, lengths.to(device) - 1, padded.size(1))  # (U, V)
    if len(number) == len(prompts):
        return logits
    row = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=logits.device)  # (B,)
    for block in model.transformer.h:
        for cache in (block.attn.kv_cache.k, block.attn.kv_cache.v):
            cache[: len(row), :, : padded.size(1)] = cache[row, :, : padded.size(1)]
    return logits[row]


def _decode(model: GPT, tokens: torch.Tensor, position: torch.Tensor, length: int) -> torch.Tensor:
    """Feed one token a row.

    Args:
        model: With a cache in every layer.
        tokens: On the model's device, (B,).
        position: Likewise, (B,).
        length: How much of the cache is looked at: more than any position.

    Returns:
        The next logits, float32, (B, padded_vocab_size).
    """
    if model.has_plain_attention:
        mask: Any = StepAttention(position, model.config.n_query_groups, model.transformer.wte.weight.dtype, length)
    else:
        mask = (torch.arange(length, device=position.device) <= position[:, None])[:, None, None]  # (B, 1, 1, S)
    return _forward(model, tokens[:, None], position[:, None], mask, torch.zeros_like(tokens), length)


def _forward(
    model: GPT, ids: torch.Tensor, input_pos: torch.Tensor, mask: Any, last: torch.Tensor, length: int
) -> torch.Tensor:
    """LitGPT's cached forward, but with the language-model head only where the next token is predicted.

    Args:
        model: With a cache in every layer; all tensors are on its device.
        ids: Token ids, (B, T).
        input_pos: Their positions, (T,) or (B, T).
        mask: A `StepAttention`, or a tensor that is true where a token may look, (B, 1, T, S); None for plain causal
            attention over positions 0..T-1.
        last: For each row the index in 0..T-1 whose output is wanted, (B,).
        length: S, how much of the cache is looked at.

    Returns:
        float32 logits, (B, padded_vocab_size).
    """
    x = model.transformer.wte(ids)  # (B, T, n_embd)
    if model.config.scale_embeddings:
        x = x * model.config.n_embd**0.5
    cos, sin = model.cos[input_pos].to(x.dtype), model.sin[input_pos].to(x.dtype)  # (T, n_elem) or (B, T, n_elem)
    if input_pos.dim() == 1:
        cos, sin = cos[None], sin[None]
    for block in model.transformer.h:
        x = block(x, cos, sin, mask, input_pos, length)  # (B, T, n_embd)
    x = model.transformer.ln_f(x[torch.arange(len(x), device=x.device), last])  # (B, n_embd)
    logits = model.lm_head(x[:, None])[:, 0].float()  # (B, padded_vocab_size)
    if model.config.final_logit_softcapping is not None:
        logits = do_softcapping(logits, model.config.final_logit_softcapping)
    return logits


def _keep_unfinished(model: GPT, done: list[bool]) -> list[int]:
    """Fill the cache rows of finished continuations from the back.

    Returns:
        For each row that is left, in its new place, the slot it was in.
    """
    slots = list(range(len(done)))
    place = 0
    while place < len(slots):
        if not done[slots[place]]:
            place += 1
            continue
        moved = slots.pop()
        if place < len(slots):
            for block in model.transformer.h:
                cache = block.attn.kv_cache
                cache.k[place], cache.v[place] = cache.k[moved], cache.v[moved]
            slots[place] = moved
    return slots
