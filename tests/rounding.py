"""What rounding may decide: where two right programs may part on a processor, and how far eight bits move a choice."""

from collections.abc import Sequence

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from workflows.training.model import GPT

Q8_0 = GGMLQuantizationType.Q8_0


def assert_greedy_up_to_a_near_tie(ours: list[int], theirs: list[int], logits: torch.Tensor, within: float) -> None:
    """Two greedy answers are the same, or part where the two tokens' logits are a near tie; after that anything goes.

    Args:
        ours: Ids of one answer.
        theirs: Ids of the other.
        logits: Float32 logits of our tokens' places, (T, vocab_size).
        within: Twice as far as the two programs' logits are apart.
    """
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            gap = float((logits[place, a] - logits[place, b]).abs())
            assert gap <= within, f"token {place}: {a} and {b}, {gap} apart"
            return
    assert len(ours) == len(theirs)


@torch.no_grad()
def near_tie_of_8_bits(model: GPT, prompts: Sequence[list[int]]) -> tuple[float, list[float]]:
    """The largest difference of two logits that q8_0 may turn round, and the prompts' own; rounds the model's weights.

    llama.cpp rounds weights and activations to eight bits by blocks of 32, and its cache to float16. Measured is how
    far the weights' rounding moves differences among each prompt's ten most probable tokens. Activations are rounded
    alike, and the cache far finer: three times the largest is allowed.

    Args:
        model: The float32 model; its weights have eight bits afterwards.
        prompts: Ids of each prompt.

    Returns:
        That bound, and for each prompt the difference of the first and the second token's logits before rounding.
    """

    def logits() -> torch.Tensor:
        return torch.stack([model(torch.tensor([ids]))[0, -1].float() for ids in prompts])  # (n, padded_vocab_size)

    exact = logits()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.from_numpy(dequantize(quantize(parameter.numpy(), Q8_0), Q8_0)))
    top = exact.topk(10)
    moved = (logits() - exact).gather(1, top.indices)  # (n, 10)
    bound = 3 * float((moved[:, :, None] - moved[:, None, :]).abs().max())
    return bound, (top.values[:, 0] - top.values[:, 1]).tolist()
