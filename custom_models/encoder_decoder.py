"""The encoder-decoder: one stack reads a text, the other writes one and looks at what the first has made of it.

One class is the Transformer of "Attention Is All You Need" (Vaswani et al. 2017, arXiv 1706.03762, section 3) and T5
(Raffel et al. 2019, arXiv 1910.10683, section 2.1); `encoder_decoder_config.py` says in what they differ.

A decoder layer is an encoder layer with a second attention between its two parts: its queries are the text that is
written, its keys and values the encoder's output ("cross-attention").

Hugging Face's T5 weights are read by `encoder_decoder_checkpoint.py`; `generation.py` and `beam_search.py` write.

Run it: python -m custom_models.encoder_decoder
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.attention import KVCache, MultiHeadAttention
from custom_models.encoder_decoder_config import EncoderDecoderConfig, t5, t5_v1_1, transformer
from custom_models.layers import FeedForward, GatedFeedForward, RMSNorm, check_ids
from custom_models.positions import RelativePositionBias, SinusoidalPositions
from workflows.errors import UserError, run_file


class LayerCache(NamedTuple):
    """What a decoder layer has seen.

    Attributes:
        own: Keys and values of the text that is written.
        context: Those of the encoder's output, which its first step computes.
    """

    own: KVCache
    context: KVCache

    @property
    def length(self) -> int:
        """How many tokens have been written."""
        return self.own.length

    def reorder(self, rows: Tensor) -> None:
        """Let text i go on as text rows[i], rows (B,); both must be answers to the same source."""
        self.own.reorder(rows)


def make_norm(config: EncoderDecoderConfig) -> nn.Module:
    """The norm that a configuration asks for, over vectors of its width."""
    return (RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.width, config.norm_eps)


class Layer(nn.Module):
    """Attention to its own text, in a decoder attention to the encoder's output, and the feed-forward layer.

    Each adds to what it reads. T5 normalises what they read, the paper the sums.

    Args:
        config: The model's shape.
        crossed: Whether it belongs to a decoder.
    """

    def __init__(self, config: EncoderDecoderConfig, crossed: bool) -> None:
        super().__init__()
        self.attention_norm, self.attention = make_norm(config), self._attention(config)
        self.cross_norm = make_norm(config) if crossed else None
        self.cross = self._attention(config) if crossed else None
        self.feed_forward_norm = make_norm(config)
        gated = config.feed_forward == "gated_gelu"
        self.feed_forward = (
            GatedFeedForward(config.width, config.inner_width, "gelu_tanh", config.bias)
            if gated
            else FeedForward(config.width, config.inner_width, bias=config.bias)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.norm_first = config.norm_first

    @staticmethod
    def _attention(config: EncoderDecoderConfig) -> MultiHeadAttention:
        return MultiHeadAttention(
            config.width,
            config.n_head,
            head_size=config.head_size,
            qkv_bias=config.bias,
            out_bias=config.bias,
            scale=None if config.scale_scores else 1.0,
            dropout=config.attention_dropout,
            backend=config.backend,
        )

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        bias: Tensor | None = None,
        context: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Let the tokens look around, in a decoder only back, and then at the context.

        Args:
            x: Tokens' vectors, (B, T, width); with a cache only those of the new ones.
            lengths: How many tokens of the text that the encoder reads are real, (B,); all if None.
            bias: Of the scores within the own text, (1, n_head, T, Tk), or None.
            context: A decoder layer's: the encoder's output, (B, Ts, width).
            cache: Likewise.

        Returns:
            (B, T, width).
        """

        def within(y: Tensor) -> Tensor:
            if self.cross is None:
                return self.attention(y, key_lengths=lengths, bias=bias)[0]  # (B, T, width)
            return self.attention(y, causal=True, bias=bias, cache=cache and cache.own)[0]  # (B, T, width)

        x = self._add(x, self.attention_norm, within)  # (B, T, width)
        if self.cross is not None and self.cross_norm is not None:
            cross, of_context = self.cross, cache and cache.context
            x = self._add(x, self.cross_norm, lambda y: cross(y, context, key_lengths=lengths, cache=of_context)[0])
        return self._add(x, self.feed_forward_norm, self.feed_forward)  # (B, T, width)

    def _add(self, x: Tensor, norm: nn.Module, part: Any) -> Tensor:
        """x with what a part makes of it: (B, T, width) -> (B, T, width)."""
        if self.norm_first:
            return x + self.dropout(part(norm(x)))  # (B, T, width)
        return norm(x + self.dropout(part(x)))  # (B, T, width)


class EncoderDecoder(nn.Module):
    """p(next token of the answer | source, the answer up to here), for every token of the answer at once.

    Args:
        config: Its shape.

    Raises:
        UserError: If the numbers of heads make no sense.
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        relative = config.positions == "relative"
        self.positions = None if relative else SinusoidalPositions(config.max_length, config.width)
        buckets = (config.n_head, config.n_bucket, config.max_distance)
        self.encoder_bias = RelativePositionBias(*buckets) if relative else None
        self.decoder_bias = RelativePositionBias(*buckets, bidirectional=False) if relative else None
        self.encoder = nn.ModuleList(Layer(config, crossed=False) for _ in range(config.n_layer))
        self.decoder = nn.ModuleList(Layer(config, crossed=True) for _ in range(config.n_decoder_layer))
        # Post-norm layers end with a norm anyway.
        self.encoder_norm = make_norm(config) if config.norm_first else None
        self.decoder_norm = make_norm(config) if config.norm_first else None
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    def _initialise(self) -> None:
        """Each matrix keeps the variance of what it reads; queries are smaller where scores are not scaled (T5)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith(".q") and not self.config.scale_scores:
                    head_size = self.config.head_size or self.config.width // self.config.n_head
                    module.weight.data /= math.sqrt(head_size)
        nn.init.normal_(self.tokens.weight, std=self.config.width**-0.5 if self.config.scale_embeddings else 1.0)

    def _embed(self, ids: Tensor, begin: int = 0) -> Tensor:
        """Token ids at the positions from `begin` on, (B, T) -> (B, T, width)."""
        check_ids(ids, self.config.vocab_size)
        if not ids.shape[1]:
            raise UserError("There is nothing to read: the texts have no token.")
        x = self.tokens(ids)  # (B, T, width)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.width)  # (B, T, width)
        if self.positions is not None:
            x = x + self.positions(torch.arange(begin, begin + ids.shape[1], device=ids.device))  # (B, T, width)
        return self.dropout(x)  # (B, T, width)

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Read texts.

        Args:
            source: Token ids, (B, Ts), padded at the end.
            lengths: How many tokens of each are real, (B,); all if None.

        Returns:
            A vector for each token, (B, Ts, width); those of padding mean nothing.

        Raises:
            UserError: If an id is no token, or a text is longer than the sine waves reach.
        """
        x = self._embed(source)  # (B, Ts, width)
        n = source.shape[1]
        bias = None if self.encoder_bias is None else self.encoder_bias(n, n)  # (1, n_head, Ts, Ts)
        for layer in self.encoder:
            x = layer(x, lengths, bias)  # (B, Ts, width)
        return x if self.encoder_norm is None else self.dropout(self.encoder_norm(x))  # (B, Ts, width)

    def decode(
        self,
        ids: Tensor,
        context: Tensor,
        lengths: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """What comes after each token of the answers.

        Args:
            ids: The answers' tokens so far, `start_id` first, (B, T); with caches only the new ones.
            context: The encoder's output, (B, Ts, width).
            lengths: How many of its tokens are real, (B,); all if None.
            caches: One for each layer, from `new_caches`.

        Returns:
            Logits, (B, T, vocab_size).

        Raises:
            UserError: If an id is no token, or an answer is longer than the sine waves or the caches reach.
        """
        begin = caches[0].length if caches else 0
        x = self._embed(ids, begin)  # (B, T, width)
        new = ids.shape[1]
        bias = None if self.decoder_bias is None else self.decoder_bias(new, begin + new)  # (1, n_head, T, begin + T)
        for i, layer in enumerate(self.decoder):
            x = layer(x, lengths, bias, context, caches[i] if caches else None)  # (B, T, width)
        if self.decoder_norm is not None:
            x = self.dropout(self.decoder_norm(x))  # (B, T, width)
        if self.config.scale_head:
            x = x / math.sqrt(self.config.width)  # (B, T, width)
        return F.linear(x, self.tokens.weight if self.head is None else self.head.weight)  # (B, T, vocab_size)

    def forward(self, source: Tensor, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Read and write at once, as in training.

        Args:
            source: Token ids of the texts to read, (B, Ts), padded at the end.
            ids: Those of the answers, each after `start_id`, (B, T), padded at the end.
            lengths: How many source tokens are real, (B,); all if None.

        Returns:
            Logits of what comes after each of `ids`, (B, T, vocab_size).

        Raises:
            UserError: See `encode`.
        """
        return self.decode(ids, self.encode(source, lengths), lengths)

    def shift(self, targets: Tensor) -> Tensor:
        """What the decoder reads to write `targets`: (B, T) -> (B, T), `start_id` first and the last token gone."""
        start = torch.full_like(targets[:, :1], self.config.start_id)  # (B, 1)
        return torch.cat([start, targets[:, :-1]], dim=1)  # (B, T)

    def new_caches(self, batch: int, length: int, n_context: int) -> list[LayerCache]:
        """An empty cache for each decoder layer.

        Args:
            batch: B, how many answers.
            length: How many tokens they may grow to.
            n_context: Ts, of the encoder's output.
        """
        attention: Any = self.decoder[0].attention
        shape = {"dtype": attention.k.weight.dtype, "device": attention.k.weight.device}

        def cache(length: int) -> KVCache:
            return KVCache(batch, self.config.n_head, length, attention.head_size, **shape)

        return [LayerCache(cache(length), cache(n_context)) for _ in self.decoder]

    @torch.no_grad()
    def writer(self, source: Tensor, lengths: Tensor | None = None) -> "Writer":
        """The decoder with these texts read: what `generation.generate` and `beam_search.beam_search` write with.

        Args:
            source: Token ids, (B, Ts), padded at the end.
            lengths: How many of each are real, (B,); all if None.
        """
        return Writer(self, self.encode(source, lengths), lengths)


class Writer:
    """A decoder in front of texts that were read; prompts for it hold `start_id` (`prompts`).

    With n times as many answers as texts, each text gets n of them one after the other (beam search).

    Args:
        model: The encoder-decoder.
        context: The encoder's output, (B, Ts, width).
        lengths: How many of its tokens are real, (B,), or None.
    """

    def __init__(self, model: EncoderDecoder, context: Tensor, lengths: Tensor | None) -> None:
        self.model, self.context, self.lengths = model, context, lengths

    @property
    def max_length(self) -> int:
        """The longest answer, in tokens."""
        return self.model.config.max_length if self.model.positions is not None else sys.maxsize

    @property
    def prompts(self) -> Tensor:
        """What each answer begins after, (B, 1)."""
        return torch.full((len(self.context), 1), self.model.config.start_id, device=self.context.device)  # (B, 1)

    def __call__(self, ids: Tensor, caches: Sequence[LayerCache] | None = None) -> Tensor:
        """Token ids (n * B, T), with caches only the new ones -> logits (n * B, T, vocab_size)."""
        n = len(ids) // len(self.context)
        lengths = None if self.lengths is None else self.lengths.repeat_interleave(n)  # (n * B,)
        read = caches is not None and caches[0].context.length  # then the layers need the context no more
        context = self.context if n == 1 or read else self.context.repeat_interleave(n, dim=0)  # (n * B, Ts, width)
        return self.model.decode(ids, context, lengths, caches)

    def new_caches(self, batch: int, length: int) -> list[LayerCache]:
        """An empty cache for each layer, for B answers of at most so many tokens."""
        return self.model.new_caches(batch, length, self.context.shape[1])


def main() -> None:
    """Show the three configurations: what they are made of, and how large it is."""
    from custom_models.gpt import count_parameters

    names = ("layers", "width", "heads", "inner", "parameters", "embeddings", "head")
    print(f"{'':<18}" + "".join(f"{name:>12}" for name in names))
    for name, config in {"the Transformer": transformer(), "T5 small": t5(), "T5 v1.1 small": t5_v1_1()}.items():
        with torch.device("meta"):
            model = EncoderDecoder(config)
        embeddings = model.tokens.weight.numel()
        print(
            f"{name:<18}{config.n_layer:>6} + {config.n_decoder_layer:<3}{config.width:>12}{config.n_head:>12}"
            f"{config.inner_width:>12}{count_parameters(model) / 1e6:>10.1f} M{embeddings / 1e6:>10.1f} M"
            f"{'tied' if config.tied else 'its own':>12}"
        )


if __name__ == "__main__":
    run_file(main)
