"""How the next token is picked: the likeliest, or one drawn from what temperature, top-k and top-p leave."""

import torch


def choose(
    logits: torch.Tensor, draws: torch.Tensor, temperature: float, top_k: int | None, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick one token for each row.

    Probabilities are summed in float64; for a device that has none (Apple's MPS) that is done on the CPU.

    Args:
        logits: float32, shape (B, V).
        draws: A uniform number in [0, 1) for each row, shape (B,).
        temperature: 0 for the most likely token.
        top_k: Keep the k most likely tokens.
        top_p: Keep the fewest tokens whose probabilities reach this sum.

    Returns:
        Token ids, shape (B,), and their log-probabilities before truncation, shape (B,); on the logits' device, or on
        the CPU.
    """
    if logits.device.type == "mps":
        logits = logits.cpu()
    logprobs = (logits / temperature if temperature > 0 else logits).log_softmax(-1)  # (B, V)
    if temperature == 0:
        tokens = logits.argmax(-1)  # (B,)
    elif top_k is None and top_p == 1.0:
        tokens = _inverse_cdf(logprobs.double().exp(), draws)
    else:
        probs, order = logprobs.double().exp().sort(dim=-1, descending=True, stable=True)  # (B, V)
        if top_k is not None:
            probs[:, top_k:] = 0
        probs = probs / probs.sum(-1, keepdim=True)
        probs[probs.cumsum(-1) - probs >= top_p] = 0  # what comes before a token has reached the sum already
        tokens = order.gather(1, _inverse_cdf(probs, draws)[:, None])[:, 0]
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _inverse_cdf(probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """probs: float64 (B, V), need not sum to one; draws: (B,). Returns the sampled indices, (B,)."""
    cumulative = probs.cumsum(-1)
    target = draws.to(probs.device)[:, None] * cumulative[:, -1:]  # (B, 1), below the last value
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
