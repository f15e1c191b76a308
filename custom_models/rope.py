"""RoPE: queries and keys are turned by an angle that grows with their position (arXiv 2104.09864, equation 34).

It can be stretched to texts longer than those of the training: linear (arXiv 2306.15595), NTK-aware (bloc97 2023; here
its dynamic form), YaRN (arXiv 2309.00071) and Llama 3.1's (Meta's own code, `apply_scaling` in llama-models).

Run it: python -m custom_models.rope
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from custom_models.configuration import configured
from workflows.errors import UserError, report_all, run_file

ROPE_KINDS = {"linear": "linear", "dynamic": "ntk", "yarn": "yarn", "llama3": "llama3"}
"""The ways of stretching, by the names that `config.json` has for them."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE is stretched to texts longer than those the model was first trained on.

    Attributes:
        kind: Which way.
        factor: By how much.
        original_length: The longest text before the stretching ("linear" does not ask for it).
        low_frequency_factor: llama3: waves longer than original_length / this are slowed by the whole factor.
        high_frequency_factor: llama3: waves shorter than original_length / this stay as they are.
        beta_fast: yarn: waves that turn more often than this within original_length stay as they are.
        beta_slow: yarn: waves that turn less often than this are slowed by the whole factor.
        attention_factor: yarn: what cos and sin are multiplied by; worked out from `factor` if None.
        mscale: yarn, DeepSeek's: a weight in that working out.
        mscale_all_dim: yarn, DeepSeek's: another.
        truncate: yarn: whether the borders between those waves are rounded to whole dimensions.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    factor: float
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in ROPE_KINDS.values():
            problems.append(f"There is no RoPE scaling {self.kind!r}; there are {', '.join(ROPE_KINDS.values())}.")
        if not self.factor >= 1:
            problems.append(f"RoPE's scaling factor must be at least 1, not {self.factor}.")
        if self.kind != "linear" and self.original_length < 1:
            problems.append(f"RoPE scaling {self.kind!r} needs original_length, the longest text before the scaling.")
        if self.kind == "llama3" and not 0 < self.low_frequency_factor < self.high_frequency_factor:
            problems.append("RoPE scaling 'llama3' needs 0 < low_frequency_factor < high_frequency_factor.")
        report_all(problems)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "RopeScaling | None":
        """Read it from a Hugging Face `config.json` (`rope_parameters`, or `rope_scaling` in older files).

        Returns:
            None if the model has plain RoPE.

        Raises:
            UserError: If the kind is none of ours, or something it needs is missing.
        """
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, Mapping):
            raise UserError(f"RoPE's parameters are {given!r:.40}, which they cannot be.")
        name = given.get("rope_type") or given.get("type") or "default"
        if name == "default":
            return None
        if not isinstance(name, str) or name not in ROPE_KINDS:
            raise UserError(f"config.json asks for RoPE of type {name!r}; known are default, {', '.join(ROPE_KINDS)}.")
        length = config.get("max_position_embeddings") or 0
        original = given.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        original = length if name == "dynamic" else original or length  # a dynamic model's own length is the original
        factor = given.get("factor")
        if factor is None and isinstance(length, int) and isinstance(original, int) and original > 0:
            factor = length / original
        if factor is None:
            raise UserError(f"config.json asks for RoPE of type {name!r} without a factor. Add it to rope_parameters.")
        renamed = {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor"}
        known = {field.name for field in dataclasses.fields(cls)} - {"kind", "factor", "original_length"}
        options = {renamed.get(str(key), str(key)): value for key, value in given.items() if value is not None}
        options = {key: value for key, value in options.items() if key in known}
        values = {"kind": ROPE_KINDS[name], "factor": factor, "original_length": original, **options}
        return configured(cls, values, "RoPE's scaling")


def rope_frequencies(
    head_size: int, base: float = 10000.0, scaling: RopeScaling | None = None, length: int | None = None
) -> tuple[Tensor, float]:
    """theta_i = base^(-2i / head_size): how far, in radians, a step turns each pair; and a factor for cos and sin.

    Args:
        head_size: Of a query or key head (of the part that turns, where only a part does).
        base: The larger, the longer the longest waves.
        scaling: How to stretch them.
        length: ntk only: of the text at hand; up to `original_length` nothing is stretched.

    Returns:
        theta, (head_size / 2,), and a factor, which is 1 but for YaRN.

    Raises:
        UserError: If head_size is odd.
    """
    if head_size % 2:
        raise UserError(f"RoPE turns pairs of numbers, so head_size must be even, not {head_size}.")
    factor = 1.0
    if scaling is not None and scaling.kind == "ntk":
        # Shortest waves stay, the longest is slowed by the whole stretch: that is another base (bloc97, emozilla).
        stretch = scaling.factor * max(length or 0, scaling.original_length) / scaling.original_length
        base *= (stretch - scaling.factor + 1) ** (head_size / (head_size - 2))
    theta = 1 / base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)  # (head_size / 2,)
    if scaling is not None and scaling.kind == "linear":
        theta = theta / scaling.factor  # (head_size / 2,); as if all positions were divided by it
    if scaling is not None and scaling.kind == "llama3":
        turns = scaling.original_length * theta / (2 * math.pi)  # (head_size / 2,); within original_length
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # (head_size / 2,); 1: fast waves, 0: slow ones
        theta = theta * kept + theta / scaling.factor * (1 - kept)  # (head_size / 2,)
    if scaling is not None and scaling.kind == "yarn":
        kept = _yarn_kept(head_size, base, scaling)  # (head_size / 2,)
        theta = theta * kept + theta / scaling.factor * (1 - kept)  # (head_size / 2,)
        factor = _yarn_attention_factor(scaling)
    return theta, factor


def _yarn_kept(head_size: int, base: float, scaling: RopeScaling) -> Tensor:
    """YaRN's "NTK-by-parts", section 3.2: 1 for waves that stay, 0 for those slowed by the whole factor.

    Between the two it falls in a straight line over the dimensions (Llama 3's falls over the number of turns).
    """

    def dimension_that_turns(times: float) -> float:  # within original_length; solves arXiv 2309.00071, equation 17
        return head_size * math.log(scaling.original_length / (times * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension_that_turns(scaling.beta_fast), dimension_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    last += 0.001 * (first == last)  # no division by zero
    return 1 - ((torch.arange(head_size // 2) - first) / (last - first)).clamp(0, 1)  # (head_size / 2,)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's 0.1 ln(factor) + 1 (arXiv 2309.00071, equation 22): longer texts want sharper weights.

    DeepSeek also multiplies its softmax scale by the square of this, with `mscale_all_dim` as the weight.
    """
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor)


def rope_table(
    positions: Tensor,
    head_size: int,
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle m * theta_i for each position m, twice each, for the two numbers of a pair.

    Args:
        positions: Integers, (.., T).
        head_size: Of a query or key head.
        base: See `rope_frequencies`.
        scaling: See there.
        max_length: How many positions the model was made for; None for no limit.

    Returns:
        cos and sin, (.., T, head_size) each, float32.

    Raises:
        UserError: If a position lies beyond max_length, or head_size is odd.
    """
    length = int(positions.max()) + 1 if positions.numel() else 0
    if max_length is not None and length > max_length:
        raise UserError(
            f"The text has {length} tokens, and the model was made for {max_length} positions. Shorten or split the "
            "text, or stretch its RoPE (RopeScaling)."
        )
    theta, factor = rope_frequencies(head_size, base, scaling, length)  # (head_size / 2,)
    angles = positions[..., None].float() * theta.to(positions.device)  # (.., T, head_size / 2)
    angles = torch.cat([angles, angles], dim=-1)  # (.., T, head_size)
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of numbers by an angle that grows with the position (arXiv 2104.09864, equation 34).

    A query at m and a key at n, both turned, have a product that depends on m - n alone. The paper pairs neighbours,
    (0, 1), (2, 3), ...; here the pairs are (0, d/2), (1, d/2 + 1), ..., as in Hugging Face's and LitGPT's code and the
    checkpoints made for them. The two differ only in the order of the rows of the query and key weights.

    Args:
        x: Queries or keys, (B, n_head, T, head_size).
        cos: (T, head_size) or (B, T, head_size), from `rope_table`.
        sin: Likewise.

    Returns:
        (B, n_head, T, head_size), in the dtype of x.

    Raises:
        UserError: If the table is not for these tokens.
    """
    if cos.shape[-2:] != (x.shape[2], x.shape[3]):
        raise UserError(
            f"The RoPE table is for {cos.shape[-2]} tokens and head_size {cos.shape[-1]}; queries and keys have "
            f"{x.shape[2]} and {x.shape[3]}. Make it with rope_table for the positions of these tokens."
        )
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, head_size)
    first, second = x.chunk(2, dim=-1)  # (B, n_head, T, head_size / 2) each
    turned = torch.cat([-second, first], dim=-1)  # (B, n_head, T, head_size); x turned by a quarter
    return (x * cos + turned * sin).to(x.dtype)  # (B, n_head, T, head_size)


def main(head_size: int = 64, base: float = 10000.0, original_length: int = 2048) -> None:
    """Print after how many tokens each pair has come round, plain and stretched."""
    kinds: list[RopeScaling | None] = [None, *(RopeScaling(kind, 4.0, original_length) for kind in ROPE_KINDS.values())]  # type: ignore[arg-type]
    print(
        f"RoPE, head_size {head_size}, base {base:,.0f}: tokens until a pair has come round once; plain, and as it is"
    )
    print(f"stretched by 4 from {original_length:,} tokens (ntk: for a text of {4 * original_length:,})\n")
    waves = [2 * math.pi / rope_frequencies(head_size, base, kind, 4 * original_length)[0] for kind in kinds]
    print("pair" + "".join(f"{kind.kind if kind else 'plain':>12}" for kind in kinds))
    for pair in range(0, head_size // 2, 3):
        print(f"{pair:>4}" + "".join(f"{wave[pair]:>12,.1f}" for wave in waves))


if __name__ == "__main__":
    run_file(main)
