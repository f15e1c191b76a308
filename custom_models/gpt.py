"""GPT: a stack of layers that look back only, and so can be asked at every token which one comes next.

One class is GPT-2 (Radford et al. 2019) and what six years of practice made of it; `GPTConfig` says which:

    ==============  =============  =============================================================================
                    GPT-2          modern
    ==============  =============  =============================================================================
    positions       learned        RoPE: queries and keys are turned, no table of vectors (arXiv 2104.09864)
    norm            layer          RMS: no mean, no bias (arXiv 1910.07467)
    feed_forward    gelu           relu2: relu(x)^2, sparse and cheap (So et al. 2021, arXiv 2109.08668),
                                   or swiglu: a gate opens and closes each number (arXiv 2002.05202)
    qk_norm         no             yes: scores stay bounded, so higher rates are stable (arXiv 2010.04245)
    bias            yes            no: nothing is lost without them, and there is less to compute
    tied_head       yes            no: the matrix that names tokens learns apart from the one that embeds them
    ==============  =============  =============================================================================

Every layer is `x + attention(norm(x))`, then `x + feed_forward(norm(x))`: normalised is what a layer reads (pre-norm),
so that the sum itself runs from the embeddings to the head untouched.

Hugging Face's GPT-2 weights are read by `gpt_checkpoint.py`; `projects/gpt.py` trains; `generation.py` writes on.

Run it: python -m custom_models.gpt
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.attention import Backend, KVCache, MultiHeadAttention
from custom_models.layers import FeedForward, GatedFeedForward, RMSNorm
from custom_models.positions import LearnedPositions
from custom_models.rope import rope_table
from workflows.errors import UserError, report_all, run_file

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2 was trained with this approximation
    "relu2": lambda x: F.relu(x).square(),
}
_SIZES = ("vocab_size", "context", "width", "n_layer", "n_head")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2's smallest.

    Attributes:
        vocab_size: Token ids are below it.
        context: The longest text, in tokens.
        width: Of the tokens' vectors.
        n_layer: Layers.
        n_head: Query heads.
        n_kv_head: Key and value heads (grouped-query attention); as many as queries if None.
        inner_width: Of the feed-forward layer; if None 4 widths, or with a gate 8/3, which has as many parameters.
        positions: "learned" or "rope".
        rope_base: See `rope.rope_frequencies`.
        norm: "layer" or "rms".
        norm_eps: Added to variances.
        feed_forward: "gelu", "relu2" or "swiglu".
        qk_norm: Whether queries and keys are normalised.
        bias: Whether matrices and layer norms have biases.
        tied_head: Whether the head is the embedding matrix.
        dropout: Share of embeddings, attention weights and layers' outputs that is set to zero in training.
        backend: Who computes attention, see `attention.attend`.
    """

    vocab_size: int = 50257
    context: int = 1024
    width: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    inner_width: int | None = None
    positions: Literal["learned", "rope"] = "learned"
    rope_base: float = 10000.0
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    feed_forward: Literal["gelu", "relu2", "swiglu"] = "gelu"
    qk_norm: bool = False
    bias: bool = True
    tied_head: bool = True
    dropout: float = 0.0
    backend: Backend = "sdpa"

    def __post_init__(self) -> None:
        problems = [
            f"The GPT's {name} must be at least 1, not {getattr(self, name)}."
            for name in _SIZES
            if getattr(self, name) < 1
        ]
        choices = {"positions": ("learned", "rope"), "norm": ("layer", "rms"),
                   "feed_forward": ("gelu", "relu2", "swiglu")}  # fmt: skip
        problems += [
            f"The GPT's {name} must be one of {', '.join(known)}, not {getattr(self, name)!r}."
            for name, known in choices.items()
            if getattr(self, name) not in known
        ]
        if self.inner_width is not None and self.inner_width < 1:
            problems.append(f"The GPT's inner_width must be at least 1, not {self.inner_width}.")
        if not 0 <= self.dropout < 1:
            problems.append(f"The GPT's dropout must be from 0 to below 1, not {self.dropout}.")
        report_all(problems)

    @property
    def inner(self) -> int:
        """The feed-forward layer's width; a gated one's is a multiple of 8, which processors like."""
        if self.inner_width is not None:
            return self.inner_width
        return 8 * round(self.width / 3) if self.feed_forward == "swiglu" else 4 * self.width


def gpt2(size: Literal["small", "medium", "large", "xl"] = "small", **changes: Any) -> GPTConfig:
    """GPT-2 as published, of 124, 355, 774 or 1,558 million parameters; `changes` are fields of `GPTConfig`."""
    width, n_layer, n_head = {
        "small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1280, 36, 20), "xl": (1600, 48, 25),
    }[size]  # fmt: skip
    return GPTConfig(**{"width": width, "n_layer": n_layer, "n_head": n_head, **changes})


def modern(**changes: Any) -> GPTConfig:
    """Everything of the right column above; `changes` are fields of `GPTConfig`."""
    fields: dict[str, Any] = {"positions": "rope", "norm": "rms", "norm_eps": 1e-6, "feed_forward": "relu2",
                              "qk_norm": True, "bias": False, "tied_head": False}  # fmt: skip
    return GPTConfig(**{**fields, **changes})


def make_norm(config: GPTConfig) -> nn.Module:
    """The norm that a configuration asks for, over vectors of its width."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """Attention to earlier tokens, then the feed-forward layer; each reads what is normalised and adds to the sum."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = MultiHeadAttention(
            config.width,
            config.n_head,
            config.n_kv_head,
            qkv_bias=config.bias,
            out_bias=config.bias,
            qk_norm=config.qk_norm,
            dropout=config.dropout,
            backend=config.backend,
        )
        self.feed_forward_norm = make_norm(config)
        gated = config.feed_forward == "swiglu"
        self.feed_forward = (
            GatedFeedForward(config.width, config.inner, bias=config.bias)
            if gated
            else FeedForward(config.width, config.inner, ACTIVATIONS[config.feed_forward], config.bias)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None) -> Tensor:
        """x: (B, T, width), rope: cos and sin of (T, head_size) each -> (B, T, width)."""
        attended, _ = self.attention(self.attention_norm(x), causal=True, rope=rope, cache=cache)
        x = x + self.dropout(attended)  # (B, T, width)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))  # (B, T, width)


class GPT(nn.Module):
    """Token vectors, layers, and a head that gives each token of the vocabulary a score for being the next one.

    Args:
        config: Its shape.

    Raises:
        UserError: If the width is no multiple of the number of heads.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        learned = config.positions == "learned"
        self.positions = LearnedPositions(config.context, config.width) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.last_norm = make_norm(config)
        self.head = None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)
        if not learned:
            # Computed once; not part of a checkpoint, since the configuration says all of it.
            table = rope_table(torch.arange(config.context), config.width // config.n_head, config.rope_base)
            for name, part in zip(("rope_cos", "rope_sin"), table, strict=True):
                self.register_buffer(name, part, persistent=False)  # (context, head_size)
        self.apply(self._initialise)
        # What layers add sums up; their last matrices begin smaller, so that the sum's variance does not grow with
        # depth (GPT-2's paper, section 2.3: 1 / sqrt(N) for N additions).
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "feed_forward.down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)  # GPT-2's
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def max_length(self) -> int:
        """The longest text, in tokens."""
        return self.config.context

    def forward(self, ids: Tensor, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Score every token of the vocabulary as the next one, at every place.

        Args:
            ids: Token ids, (B, T); with caches the new ones only.
            caches: One for each layer, from `new_caches`.

        Returns:
            Logits, (B, T, vocab_size).

        Raises:
            UserError: If the text is longer than the context.
        """
        begin = caches[0].length if caches else 0
        end = begin + ids.shape[1]
        if end > self.config.context:
            raise UserError(
                f"The text has {end} tokens, and this model was made for {self.config.context}. Shorten it, or train a "
                "model with a longer context."
            )
        x = self.tokens(ids)  # (B, T, width)
        if self.positions is not None:
            x = x + self.positions.weight[begin:end]  # (B, T, width)
        x = self.dropout(x)  # (B, T, width)
        rope = None if self.positions is not None else (self.rope_cos[begin:end], self.rope_sin[begin:end])
        for i, block in enumerate(self.blocks):
            x = block(x, rope, caches[i] if caches else None)  # (B, T, width)
        x = self.last_norm(x)  # (B, T, width)
        return F.linear(x, self.tokens.weight if self.head is None else self.head.weight)  # (B, T, vocab_size)

    def new_caches(self, batch: int, length: int) -> list[KVCache]:
        """An empty cache for each layer, for B texts of at most so many tokens."""
        attention: Any = self.blocks[0].attention
        n_kv_head = attention.k.out_features // attention.head_size
        weight = attention.k.weight
        return [
            KVCache(batch, n_kv_head, length, attention.head_size, dtype=weight.dtype, device=weight.device)
            for _ in self.blocks
        ]


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(next token), the mean over all places, in nats.

    Args:
        logits: (B, T, vocab_size).
        targets: The token that really came next, (B, T).

    Returns:
        A scalar.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def count_parameters(model: nn.Module) -> int:
    """Parameters, a tied head counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Show the sizes, and what each modern part does to the number of parameters."""
    small: dict[str, Any] = {"vocab_size": 65, "context": 64, "width": 128, "n_layer": 4, "n_head": 4}
    configs = {f"GPT-2 {size}": gpt2(size) for size in ("small", "medium", "large", "xl")}
    configs |= {
        "of characters": GPTConfig(**small),
        "  no biases": GPTConfig(**small, bias=False),
        "  RoPE": GPTConfig(**small, positions="rope"),
        "  SwiGLU": GPTConfig(**small, feed_forward="swiglu"),
        "  untied head": GPTConfig(**small, tied_head=False),
        "  all modern": modern(**small),
    }
    print(f"{'':<16}{'layers':>7}{'width':>7}{'heads':>7}{'context':>9}{'parameters':>15}")
    for name, config in configs.items():
        with torch.device("meta" if config.positions == "learned" else "cpu"):  # 1.6 billion parameters stay unmade
            size = count_parameters(GPT(config))
        shape = f"{config.n_layer:>7}{config.width:>7}{config.n_head:>7}{config.context:>9}"
        print(f"{name:<16}{shape}{size:>15,}")


if __name__ == "__main__":
    run_file(main)
