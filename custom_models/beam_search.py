"""Beam search: keep the few likeliest beginnings of an answer, not just one, and at the end take the likeliest answer.

An answer's score is the sum of its tokens' log-probabilities, over its length to the power of `length_penalty`: long
sums are lower, so that without it short answers would win (Wu et al. 2016, arXiv 1609.08144, section 7, has a like
formula). Scores, ties and stopping are those of transformers' `generate`, which the tests hold it to.

With one beam it is greedy search that obeys the two rules `generation.generate` does not know: no n-gram twice, and a
hook that says which tokens may come next ("constrained decoding").

Run it: python -m custom_models.beam_search --text "The liver is"
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from custom_models.generation import Decoder, Generated, check_scores
from workflows.errors import UserError, report_all, run_file

Allowed = Callable[[int, list[int]], Sequence[int]]
"""(number of the text, its new ids so far) -> ids that may come next; if there are none, that beginning is given up."""


class Hypotheses:
    """The finished answers to one text, the best first.

    Args:
        n_beam: How many are kept.
        length_penalty: See `beam_search`.
        early_stopping: See there.
    """

    def __init__(self, n_beam: int, length_penalty: float, early_stopping: bool | Literal["never"]) -> None:
        self.n_beam, self.length_penalty, self.early_stopping = n_beam, length_penalty, early_stopping
        self.best: list[tuple[float, list[int]]] = []
        self.closed = False

    def add(self, logprob: float, ids: list[int]) -> None:
        """Take up an answer, if it is among the best."""
        self.best.append((logprob / len(ids) ** self.length_penalty, ids))
        self.best.sort(key=lambda scored: -scored[0])  # stable: of equals the earlier one stays first
        del self.best[self.n_beam :]

    def close_if_done(self, best_running: float, length: int, max_new_tokens: int) -> None:
        """Take up no more, if there are enough and, unless `early_stopping`, no running answer will be better.

        Args:
            best_running: The highest sum of log-probabilities of those that go on.
            length: How many tokens they have.
            max_new_tokens: How many they may get.
        """
        if len(self.best) < self.n_beam:
            return
        # "never" asks what the best score would be at any length; otherwise the score it has now is taken for it.
        longest = self.early_stopping == "never" and self.length_penalty > 0
        reachable = best_running / (max_new_tokens if longest else length) ** self.length_penalty
        self.closed = self.closed or self.early_stopping is True or reachable <= self.best[-1][0]


@torch.no_grad()
def beam_search(
    model: Decoder,
    prompts: Tensor,
    max_new_tokens: int,
    *,
    n_beam: int = 4,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    no_repeat_ngram: int = 0,
    stop_ids: Sequence[int] = (),
    allowed: Allowed | None = None,
    use_cache: bool = True,
) -> Generated:
    """The likeliest way to write on from each prompt, as far as so many beams can tell.

    Args:
        model: A decoder in evaluation mode; an encoder-decoder's `writer`, with its `prompts`.
        prompts: Token ids, (B, T), T at least 1.
        max_new_tokens: At most so many tokens are written.
        n_beam: How many beginnings are kept; 1 is greedy search.
        length_penalty: Above 0 favours long answers, below 0 short ones.
        early_stopping: True stops at the first n_beam finished answers. False also wants that no running answer has a
            better score by now, "never" that none can get one.
        no_repeat_ngram: No n tokens in a row occur twice in a text, its prompt included; 0 for no such rule.
        stop_ids: Ids that end an answer.
        allowed: Which tokens may come next.
        use_cache: Whether to keep keys and values.

    Returns:
        Each text's best answer, and all that were kept; the stop id is the last of its ids if it was reached. Where the
        rules let no beginning go on and none has ended, the best beginning.

    Raises:
        UserError: If the text would grow beyond the model's longest, a setting makes no sense, the rules forbid every
            first token, or the model's scores are not finite.
    """
    batch, length = prompts.shape
    problems = [f"{name} must be at least {least}, not {value}."
                for name, value, least in (("The prompt's length", length, 1), ("max_new_tokens", max_new_tokens, 1),
                                           ("n_beam", n_beam, 1), ("no_repeat_ngram", no_repeat_ngram, 0))
                if value < least]  # fmt: skip
    report_all(problems)
    if length + max_new_tokens > model.max_length:
        raise UserError(
            f"{length} tokens and {max_new_tokens} new ones are more than the {model.max_length} that the model was "
            "made for. Shorten the prompt, or write fewer tokens."
        )
    began = time.perf_counter()
    n_kept = max(2, 1 + len(stop_ids)) * n_beam  # so that n_beam go on, even if all of the first n_beam end here
    found = [Hypotheses(n_beam, length_penalty, early_stopping) for _ in range(batch)]
    caches = model.new_caches(batch * n_beam, length + max_new_tokens) if use_cache else None
    text = prompts.repeat_interleave(n_beam, dim=0)  # (B * n_beam, T)
    # All beams begin alike, so only the first one counts.
    scores = torch.full((batch, n_beam), -torch.inf, device=prompts.device)  # (B, n_beam)
    scores[:, 0] = 0.0
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=prompts.device)  # (n_stop,)
    first_rows = torch.arange(batch, device=prompts.device)[:, None] * n_beam  # (B, 1)
    new = text  # (B * n_beam, T)
    for step in range(1, max_new_tokens + 1):
        logits = model(new if use_cache else text, caches)[:, -1].float()  # (B * n_beam, vocab_size)
        check_scores(logits)
        logprobs = logits.log_softmax(dim=-1)  # (B * n_beam, vocab_size)
        _forbid(logprobs, text, length, scores.flatten().tolist(), no_repeat_ngram, allowed, n_beam)
        vocab_size = logprobs.shape[1]
        sums = scores.view(-1, 1) + logprobs  # (B * n_beam, vocab_size)
        top, places = sums.view(batch, -1).topk(min(n_kept, n_beam * vocab_size))  # (B, n_kept) each
        rows, ids = first_rows + places // vocab_size, places % vocab_size  # (B, n_kept) each
        ended = torch.isin(ids, stops) | (step == max_new_tokens)  # (B, n_kept)
        for i, hypotheses in enumerate(found):
            if hypotheses.closed:
                continue
            if top[i, 0] == -torch.inf:  # no beginning may go on
                if not hypotheses.best:
                    if step == 1:
                        raise UserError("The rules of what may be written forbid every token after the prompt.")
                    best = int(scores[i].argmax())
                    hypotheses.add(float(scores[i, best]), text[i * n_beam + best, length:].tolist())
                hypotheses.closed = True
                continue
            for rank in range(n_beam):  # one further down only waits in case that others end
                if ended[i, rank] and top[i, rank] > -torch.inf:
                    written = text[rows[i, rank], length:].tolist()
                    hypotheses.add(float(top[i, rank]), [*written, int(ids[i, rank])])
        scores, kept = top.masked_fill(ended, -torch.inf).topk(n_beam)  # (B, n_beam) each
        for hypotheses, highest in zip(found, scores[:, 0].tolist(), strict=True):
            hypotheses.close_if_done(highest, step, max_new_tokens)
        if all(hypotheses.closed for hypotheses in found) or step == max_new_tokens:
            break
        rows, new = rows.gather(1, kept).flatten(), ids.gather(1, kept).view(-1, 1)  # (B * n_beam,), (B * n_beam, 1)
        text = torch.cat([text[rows], new], dim=1)  # (B * n_beam, T + step)
        if n_beam > 1:
            for cache in caches or ():
                cache.reorder(rows)
    answers = [[ids for _, ids in hypotheses.best] for hypotheses in found]
    return Generated([best for best, *_ in answers], time.perf_counter() - began, answers)


def _forbid(
    logprobs: Tensor,
    text: Tensor,
    n_prompt: int,
    scores: list[float],
    no_repeat_ngram: int,
    allowed: Allowed | None,
    n_beam: int,
) -> None:
    """Set to minus infinity what must not come next: logprobs (B * n_beam, vocab_size), text (B * n_beam, T)."""
    if not no_repeat_ngram and allowed is None:
        return
    for row, ids in enumerate(text.tolist()):
        if scores[row] == -torch.inf:
            continue  # no beginning of an answer, but a place that is not taken yet
        if allowed is not None:
            following = allowed(row // n_beam, ids[n_prompt:])
            may = torch.tensor(list(following), dtype=torch.long, device=text.device)  # (n_allowed,)
            kept = logprobs[row, may]  # (n_allowed,)
            logprobs[row] = -torch.inf
            logprobs[row, may] = kept
        if no_repeat_ngram:
            last = ids[len(ids) - no_repeat_ngram + 1 :]  # the newest n - 1 tokens
            for i in range(len(ids) - no_repeat_ngram + 1):
                if ids[i : i + no_repeat_ngram - 1] == last:
                    logprobs[row, ids[i + no_repeat_ngram - 1]] = -torch.inf


def main(text: str = "The liver is", max_new_tokens: int = 12, no_repeat_ngram: int = 2) -> None:
    """Let the embedded 135M Llama write on with one beam and with four, and print how likely each text is.

    Args:
        text: What to write on from.
        max_new_tokens: Tokens to write.
        no_repeat_ngram: No n tokens in a row occur twice.

    Raises:
        UserError: If a setting makes no sense.
    """
    from custom_models.encoder_checkpoint import tokenizer_of
    from custom_models.llama_checkpoint import load_llama, smollm2_directory

    directory = smollm2_directory()
    model, tokenizer = load_llama(directory).eval(), tokenizer_of(directory)
    prompt = torch.tensor([tokenizer.encode(text).ids])  # (1, T)
    for n_beam in (1, 4):
        (ids,) = beam_search(model, prompt, max_new_tokens, n_beam=n_beam, no_repeat_ngram=no_repeat_ngram).ids
        whole = torch.cat([prompt, torch.tensor([ids])], dim=1)  # (1, T + new tokens)
        with torch.no_grad():
            logprobs = model(whole)[0, prompt.shape[1] - 1 : -1].log_softmax(-1)  # (new tokens, vocab_size)
        total = float(logprobs.gather(1, torch.tensor(ids)[:, None]).sum())
        print(f"{n_beam} beam{'s' if n_beam > 1 else ' '}  {total:8.2f}  {text}{tokenizer.decode(ids)}")


if __name__ == "__main__":
    run_file(main)
