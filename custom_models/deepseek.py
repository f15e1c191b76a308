"""DeepSeek-V3, a decoder: latent attention and mixtures of experts, layer after layer.

DeepSeek-AI 2024, arXiv 2412.19437. A layer is that of Llama (norms before both halves, no biases, RoPE, SwiGLU), but
its halves are others: attention whose cache is one short vector a token (`latent_attention.py`), and, after the first
layers, a feed-forward layer of which each token uses a small part (`mixture_of_experts.py`). Predicting several tokens
at once is in `multi_token_prediction.py`; Hugging Face checkpoints are read by `deepseek_checkpoint.py`.

With a cache, the prompt goes through the plain form of attention and each later token through the absorbed one; the
numbers are the same, see `latent_attention.py`.

Run it: python -m custom_models.deepseek
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.attention import Backend, KVCache
from custom_models.latent_attention import LatentAttention
from custom_models.layers import GatedFeedForward, RMSNorm, check_cache, check_ids
from custom_models.mixture_of_experts import ExpertsConfig, MixtureOfExperts
from custom_models.rope import RopeScaling, rope_table, yarn_mscale
from workflows.errors import report_all, run_file


@dataclass(frozen=True)
class DeepSeekConfig:
    """The shape of a decoder; the defaults are DeepSeek-V3's.

    Attributes:
        vocab_size: Token ids are below it.
        width: Of the tokens' vectors.
        n_layer: Layers.
        n_dense: How many of them, the first, have a plain feed-forward layer in place of a mixture of experts.
        inner_width: Of that, between its matrices.
        experts: The mixtures' shape.
        n_head: Attention heads.
        q_rank: Of the queries' latent vector; None for none (DeepSeek-V2-Lite).
        kv_rank: Of the keys' and values' latent vector.
        nope_size: How many numbers of a head's query and key come without a position.
        rope_size: How many RoPE turns.
        value_size: Of a head's value.
        max_length: The longest text, in tokens.
        rope_base: See `rope.rope_frequencies`.
        rope_scaling: How RoPE is stretched to max_length; None for not at all.
        rope_neighbours: Whether RoPE's pairs are neighbours, as in DeepSeek's checkpoints.
        norm_eps: Added to mean squares.
        tied: Whether the matrix that names tokens is the one that embeds them.
        backend: Who computes attention, see `attention.attend`.
    """

    vocab_size: int = 129280
    width: int = 7168
    n_layer: int = 61
    n_dense: int = 3
    inner_width: int = 18432
    experts: ExpertsConfig = field(default_factory=lambda: ExpertsConfig(n_group=8, n_active_group=4, scale=2.5))
    n_head: int = 128
    q_rank: int | None = 1536
    kv_rank: int = 512
    nope_size: int = 128
    rope_size: int = 64
    value_size: int = 128
    max_length: int = 4096
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_neighbours: bool = True
    norm_eps: float = 1e-6
    tied: bool = False
    backend: Backend = "sdpa"

    def __post_init__(self) -> None:
        names = ("vocab_size", "width", "n_layer", "inner_width", "n_head", "kv_rank", "nope_size", "rope_size",
                 "value_size", "max_length")  # fmt: skip
        problems = [f"The decoder's {name} must be at least 1, not {getattr(self, name)}."
                    for name in names if getattr(self, name) < 1]  # fmt: skip
        if self.q_rank is not None and self.q_rank < 1:
            problems.append(f"The decoder's q_rank must be at least 1, or None, not {self.q_rank}.")
        if self.rope_size % 2:
            problems.append(f"RoPE turns pairs of numbers, so rope_size must be even, not {self.rope_size}.")
        if not 0 <= self.n_dense <= self.n_layer:
            problems.append(f"Of {self.n_layer} layers {self.n_dense} cannot be dense (n_dense).")
        report_all(problems)

    @property
    def sharpen(self) -> float:
        """What DeepSeek multiplies the softmax scale by if YaRN stretches RoPE: the square of YaRN's mscale.

        YaRN itself multiplies cos and sin, so that queries and keys each get the factor. Here only a part of them is
        turned, and the rest wants it, too.
        """
        scaling = self.rope_scaling
        if scaling is None or not scaling.mscale_all_dim:
            return 1.0
        return yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then the same with the feed-forward layer.

    Args:
        config: The decoder's shape.
        dense: Whether its feed-forward layer is a plain one.
    """

    def __init__(self, config: DeepSeekConfig, dense: bool = False) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = LatentAttention(
            config.width,
            config.n_head,
            config.q_rank,
            config.kv_rank,
            config.nope_size,
            config.rope_size,
            config.value_size,
            config.sharpen,
            config.rope_neighbours,
            config.backend,
        )
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = (
            GatedFeedForward(config.width, config.inner_width)
            if dense
            else MixtureOfExperts(config.width, config.experts)
        )

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None = None, absorb: bool = False
    ) -> Tensor:
        """(B, T, width) -> (B, T, width); for the rest see `LatentAttention.forward`."""
        x = x + self.attention(self.attention_norm(x), rope, cache, absorb)  # (B, T, width)
        return x + self.feed_forward(self.feed_forward_norm(x))  # (B, T, width)


class DeepSeek(nn.Module):
    """The decoder. `generation.generate` writes with it.

    Args:
        config: Its shape.
    """

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        self.config, self.max_length = config, config.max_length
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, dense=i < config.n_dense) for i in range(config.n_layer))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(initialise)

    def new_caches(self, batch: int, length: int) -> list[KVCache]:
        """An empty cache for each layer, for B texts of at most so many tokens.

        Raises:
            UserError: If the model's positions do not reach that far.
        """
        check_cache(length, self.max_length)
        attentions = [module for module in self.modules() if isinstance(module, LatentAttention)]
        return [attention.new_cache(batch, length) for attention in attentions]

    def rope(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """cos and sin for the positions from first up to last: (last - first, rope_size) each.

        Raises:
            UserError: If that is more than the model was made for.
        """
        config, device = self.config, self.tokens.weight.device
        positions = torch.arange(first, last, device=device)  # (T,)
        return rope_table(positions, config.rope_size, config.rope_base, config.rope_scaling, config.max_length)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> vectors (B, T, width).

        Raises:
            UserError: If an id is no token.
        """
        check_ids(ids, self.config.vocab_size)
        return self.tokens(ids)  # (B, T, width)

    def states(self, ids: Tensor, caches: Sequence[KVCache] | None = None) -> Tensor:
        """What the head reads: the last layer's output, normalised.

        Args:
            ids: Token ids, (B, T); with caches only the new ones.
            caches: Of the layers, from `new_caches`; the new tokens are added to them.

        Returns:
            (B, T, width).

        Raises:
            UserError: If the text is longer than the model was made for or than the caches hold, or an id is no token.
        """
        x = self.embed(ids)  # (B, T, width)
        seen = caches[0].length if caches else 0
        rope = self.rope(seen, seen + ids.shape[1])  # (T, rope_size) each
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, caches[i] if caches else None, absorb=seen > 0)  # (B, T, width)
        return self.norm(x)  # (B, T, width)

    def name(self, states: Tensor) -> Tensor:
        """Scores of the whole vocabulary: states (.., width) -> logits (.., vocab_size)."""
        return F.linear(states, self.tokens.weight if self.head is None else self.head.weight)  # (.., vocab_size)

    def forward(self, ids: Tensor, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, vocab_size); see `states`."""
        return self.name(self.states(ids, caches))  # (B, T, vocab_size)


def initialise(module: nn.Module) -> None:
    """Small random weights to begin with, transformers' way; V3's own deviation is 0.006 (section 4.2)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def cache_numbers(config: DeepSeekConfig) -> dict[str, int]:
    """How many numbers a token leaves in the caches of all layers, by kind of attention (arXiv 2405.04434, table 1).

    The others have heads as large as a value of latent attention, so that all of them are equally wide.
    """
    sizes = {"multi-head": 2 * config.n_head * config.value_size}
    sizes |= {"grouped-query, 8 groups": 2 * 8 * config.value_size, "multi-query": 2 * config.value_size}
    sizes |= {"latent": config.kv_rank + config.rope_size}
    return {kind: size * config.n_layer for kind, size in sizes.items()}


def parameters(config: DeepSeekConfig) -> tuple[int, int]:
    """All parameters of a decoder, and those that work on a token: of the routed experts only the active ones."""
    with torch.device("meta"):  # one layer of each kind, without memory
        dense, sparse = DecoderLayer(config, dense=True), DecoderLayer(config)
    n_sparse = config.n_layer - config.n_dense
    total = config.n_dense * _count(dense) + n_sparse * _count(sparse)
    total += (1 if config.tied else 2) * config.vocab_size * config.width + config.width
    expert, n_idle = GatedFeedForward(1, config.experts.inner_width), config.experts.n_routed - config.experts.n_active
    return total, total - n_sparse * n_idle * _count(expert) * config.width


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def deepseek_v3(**changes: object) -> DeepSeekConfig:
    """DeepSeek-V3 (section 4.2), stretched to 163,840 tokens as published; `changes` are fields of `DeepSeekConfig`."""
    stretched = RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    return DeepSeekConfig(**{"max_length": 163840, "rope_scaling": stretched, **changes})  # type: ignore[arg-type]


def small(**changes: object) -> DeepSeekConfig:
    """A decoder of 16 heads, as wide as DeepSeek-V2-Lite; `changes` are fields of `DeepSeekConfig`."""
    experts = ExpertsConfig(n_routed=64, n_active=6, inner_width=1408, n_shared=2)
    fields: dict = {"vocab_size": 102400, "width": 2048, "n_layer": 27, "n_dense": 1, "inner_width": 10944,
                    "experts": experts, "n_head": 16, "q_rank": None}  # fmt: skip
    return DeepSeekConfig(**{**fields, **changes})


def main(length: int = 131072) -> None:
    """Print the size of two decoders, and of their caches beside those of other kinds of attention.

    Args:
        length: Tokens of the text whose cache is shown, too.
    """
    for title, config in {"DeepSeek-V3": deepseek_v3(), "a small one, of DeepSeek-V2-Lite's shape": small()}.items():
        total, active = parameters(config)
        print(f"{title}: {total / 1e9:.1f} billion parameters, {active / 1e9:.1f} at work on a token")
        print(f"  {'cache in bf16':<26}{'bytes a token':>15}{f'{length:,} tokens':>18}{'times latent':>14}")
        numbers = cache_numbers(config)
        for kind, count in numbers.items():
            size, ratio = 2 * count, count / numbers["latent"]
            print(f"  {kind:<26}{size:>15,}{f'{size * length / 1e9:.1f} GB':>18}{ratio:>14.1f}")
        print()


if __name__ == "__main__":
    run_file(main)
