"""The Transformer encoder: every token looks at all others, layer after layer, and becomes a word in its context.

One class is the encoder of "Attention Is All You Need" (Vaswani et al. 2017, arXiv 1706.03762, section 3.1), BERT
(Devlin et al. 2018, arXiv 1810.04805), RoBERTa (Liu et al. 2019, arXiv 1907.11692) and DistilBERT (Sanh et al. 2019,
arXiv 1910.01108). They differ in what stands around the layers, and `EncoderConfig` says how:

    ==============  ==========  ==========  ==========  ====  ===============================
                    positions   segments    activation  pool  besides
    ==============  ==========  ==========  ==========  ====  ===============================
    the paper       sine waves  none        ReLU        no    embeddings times sqrt(width)
    BERT            learned     two         GELU        yes
    RoBERTa         learned     one, idle   GELU        yes   positions count from pad_id + 1
    DistilBERT      learned     none        GELU        no    half as many layers
    ==============  ==========  ==========  ==========  ====  ===============================

Weights of Hugging Face checkpoints are read by `encoder_checkpoint.py`; heads that fill masks stand in
`masked_language_model.py`, the one that names a class in `projects/classifier.py`.

Run it: python -m custom_models.encoder
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.attention import Backend, MultiHeadAttention, real_tokens
from custom_models.layers import FeedForward, check_ids
from custom_models.positions import LearnedPositions, SinusoidalPositions
from workflows.errors import UserError, report_all, run_file

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder.

    Attributes:
        vocab_size: Token ids are below it.
        width: Of the tokens' vectors.
        n_layer: Layers.
        n_head: Attention heads.
        inner_width: Of the feed-forward layer between its two matrices.
        n_position: The longest text, in tokens.
        n_segment: Segments a text may have (BERT tells the sentences of a pair apart by them); 0 for none.
        positions: "learned", or "sinusoidal" as in the paper.
        first_position: The number of a text's first position: 0, or what RoBERTa begins with.
        pad_id: The id of padding.
        activation: Between the two matrices of the feed-forward layer.
        norm_first: Whether layers normalise what they read (pre-norm, Xiong et al. 2020, arXiv 2002.04745) and not, as
            in the paper and in BERT, what they write.
        embedding_norm: Whether embeddings are normalised (BERT and its kin: yes).
        scale_embeddings: Whether token embeddings are multiplied by sqrt(width) (the paper, section 3.4: yes).
        pooler: Whether there is BERT's layer that makes one vector of the text from that of its first token.
        norm_eps: Added to variances.
        dropout: Share of activations set to zero in training.
        attention_dropout: Share of attention weights set to zero in training.
        backend: Who computes attention, see `attention.attend`.
    """

    vocab_size: int
    width: int = 768
    n_layer: int = 12
    n_head: int = 12
    inner_width: int = 3072
    n_position: int = 512
    n_segment: int = 2
    positions: Literal["learned", "sinusoidal"] = "learned"
    first_position: int = 0
    pad_id: int = 0
    activation: Literal["gelu", "relu"] = "gelu"
    norm_first: bool = False
    embedding_norm: bool = True
    scale_embeddings: bool = False
    pooler: bool = True
    norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    backend: Backend = "sdpa"

    def __post_init__(self) -> None:
        problems = [f"The encoder's {name} must be at least 1, not {getattr(self, name)}."
                    for name in ("vocab_size", "width", "n_layer", "n_head", "inner_width", "n_position")
                    if getattr(self, name) < 1]  # fmt: skip
        if not 0 <= self.pad_id < max(1, self.vocab_size):
            problems.append(f"The encoder's pad_id {self.pad_id} is no token of {self.vocab_size}.")
        if self.activation not in ACTIVATIONS:
            problems.append(f"There is no activation {self.activation!r}; there are {', '.join(ACTIVATIONS)}.")
        if self.positions not in ("learned", "sinusoidal"):
            problems.append(f"There are no {self.positions!r} positions; there are learned, sinusoidal.")
        report_all(problems)


def paper(vocab_size: int, **changes: object) -> EncoderConfig:
    """The base encoder of "Attention Is All You Need" (table 3); `changes` are fields of `EncoderConfig`."""
    fields: dict = {"width": 512, "n_layer": 6, "n_head": 8, "inner_width": 2048, "n_segment": 0, "pooler": False,
                    "positions": "sinusoidal", "activation": "relu", "embedding_norm": False, "scale_embeddings": True,
                    "norm_eps": 1e-5, "attention_dropout": 0.0}  # fmt: skip
    return EncoderConfig(vocab_size, **{**fields, **changes})


def bert(vocab_size: int = 30522, **changes: object) -> EncoderConfig:
    """BERT base."""
    return EncoderConfig(vocab_size, **changes)  # type: ignore[arg-type]


def roberta(vocab_size: int = 50265, **changes: object) -> EncoderConfig:
    """RoBERTa base: BERT's layers, one segment that every token belongs to, positions after those of padding."""
    fields: dict = {"n_segment": 1, "pad_id": 1, "first_position": 2, "norm_eps": 1e-5}
    return EncoderConfig(vocab_size, **{**fields, **changes})


def distilbert(vocab_size: int = 30522, **changes: object) -> EncoderConfig:
    """DistilBERT base: half of BERT's layers, neither segments nor pooler."""
    fields: dict = {"n_layer": 6, "n_segment": 0, "pooler": False}
    return EncoderConfig(vocab_size, **{**fields, **changes})


class Encoded(NamedTuple):
    """What an encoder makes of a batch.

    Attributes:
        states: The embeddings and the output of each layer, n_layer + 1 tensors of (B, T, width). Those of padding mean
            nothing.
        pooled: BERT's one vector for each text, (B, width), or None.
        weights: Each layer's attention weights, (B, n_head, T, T), if asked for.
    """

    states: list[Tensor]
    pooled: Tensor | None
    weights: list[Tensor]

    @property
    def last(self) -> Tensor:
        """The last layer's output, (B, T, width)."""
        return self.states[-1]


class EncoderLayer(nn.Module):
    """Attention, then the feed-forward layer; each adds to what it reads, and the sum is normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            config.width, config.n_head, dropout=config.attention_dropout, backend=config.backend
        )
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config.width, config.inner_width, ACTIVATIONS[config.activation])
        self.feed_forward_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_first = config.norm_first

    def forward(self, x: Tensor, key_lengths: Tensor | None, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        """x: (B, T, width), key_lengths: (B,) or None -> (B, T, width), and weights (B, n_head, T, T) or None."""
        read = self.attention_norm(x) if self.norm_first else x  # (B, T, width)
        attended, weights = self.attention(read, key_lengths=key_lengths, return_weights=return_weights)
        x = x + self.dropout(attended)  # (B, T, width)
        if self.norm_first:
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), weights  # (B, T, width)
        x = self.attention_norm(x)  # (B, T, width)
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x))), weights  # (B, T, width)


class Encoder(nn.Module):
    """A stack of layers over the sum of what a token is, where it stands and which segment it belongs to."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        length = config.first_position + config.n_position
        learned = config.positions == "learned"
        self.positions = (LearnedPositions if learned else SinusoidalPositions)(length, config.width)
        self.segments = nn.Embedding(config.n_segment, config.width) if config.n_segment else None
        self.embedding_norm = nn.LayerNorm(config.width, config.norm_eps) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layer))
        self.last_norm = nn.LayerNorm(config.width, config.norm_eps) if config.norm_first else None
        self.pooler = nn.Linear(config.width, config.width) if config.pooler else None
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)  # BERT's
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    def embed(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """What the first layer reads.

        Args:
            ids: Token ids, (B, T).
            segments: Which segment each token belongs to, (B, T); the first if None.

        Returns:
            (B, T, width).

        Raises:
            UserError: If a text is longer than the positions reach, or an id is no token.
        """
        config = self.config
        if ids.shape[1] > config.n_position:
            raise UserError(
                f"The text has {ids.shape[1]} tokens, and this encoder reads at most {config.n_position}. Shorten or "
                "split it."
            )
        check_ids(ids, config.vocab_size)
        if not ids.shape[1]:
            raise UserError("There is nothing to encode: the texts have no token.")
        if self.segments is not None and segments is not None and int(segments.max()) >= config.n_segment:
            raise UserError(f"Segments must be below {config.n_segment}, and these reach {int(segments.max())}.")
        x = self.tokens(ids)  # (B, T, width)
        if config.scale_embeddings:
            x = x * math.sqrt(config.width)  # (B, T, width)
        x = x + self.positions(torch.arange(ids.shape[1], device=ids.device) + config.first_position)  # (B, T, width)
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(ids) if segments is None else segments)  # (B, T, width)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)  # (B, T, width)
        return self.dropout(x)  # (B, T, width)

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor | None = None,
        segments: Tensor | None = None,
        return_weights: bool = False,
    ) -> Encoded:
        """Encode a batch of texts.

        Args:
            ids: Token ids, (B, T), padded at the end.
            lengths: How many tokens of each text are real, (B,); all if None.
            segments: See `embed`.
            return_weights: Whether to return attention weights, too.

        Raises:
            UserError: See `embed`.
        """
        x = self.embed(ids, segments)  # (B, T, width)
        states, weights = [x], []
        for layer in self.layers:
            x, found = layer(x, lengths, return_weights)  # (B, T, width)
            states.append(x)
            weights.append(found)
        if self.last_norm is not None:
            states[-1] = x = self.last_norm(x)  # (B, T, width)
        pooled = None if self.pooler is None else torch.tanh(self.pooler(x[:, 0]))  # (B, width)
        return Encoded(states, pooled, weights if return_weights else [])


def states_by_parts(
    encoder: Encoder, ids: Tensor, lengths: Tensor, segments: Tensor | None, most: int = 4096
) -> Iterator[Tensor]:
    """The last layer's states of many texts, such as the windows of a book, a few texts at a time.

    What the layers compute for all windows of a long book would fill the memory. In training it must be kept, so there
    all texts are read at once.

    Args:
        encoder: What reads them.
        ids: Token ids, (B, T), padded at the end.
        lengths: How many tokens of each text are real, (B,).
        segments: Which segment each token belongs to, (B, T), or None.
        most: Tokens at a time, padding included; one text at least.

    Yields:
        (part of B, T, width), in the order of the texts.
    """
    rows = len(ids) if torch.is_grad_enabled() else max(1, most // ids.shape[1])
    for begin in range(0, len(ids), rows):
        part = slice(begin, begin + rows)
        yield encoder(ids[part], lengths[part], None if segments is None else segments[part]).last


def mean_over_tokens(states: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The mean of a text's vectors, padding left out: (B, T, width), (B,) -> (B, width)."""
    if lengths is None:
        return states.mean(dim=1)  # (B, width)
    real = real_tokens(lengths, states.shape[1])  # (B, T)
    return (states * real[..., None]).sum(dim=1) / lengths.clamp(min=1)[:, None]  # (B, width)


def non_embedding_parameters(encoder: Encoder) -> int:
    """Parameters besides the tables that are looked up in."""
    tables = (encoder.tokens, encoder.positions, encoder.segments)
    looked_up = {p for table in tables if table is not None for p in table.parameters()}
    return sum(p.numel() for p in encoder.parameters() if p not in looked_up)


def main() -> None:
    """Show the four configurations, and the words that MiniLM, a real BERT of six layers, takes for near each other."""
    from custom_models.encoder_checkpoint import load_encoder, minilm_directory, tokenizer_of

    print(f"{'':<12}{'layers':>7}{'width':>7}{'parameters':>12}{'of layers':>12}")
    with torch.device("meta"):
        for name, config in {
            "the paper": paper(37000),
            "BERT": bert(),
            "RoBERTa": roberta(),
            "DistilBERT": distilbert(),
        }.items():
            encoder = Encoder(config)
            total, inner = sum(p.numel() for p in encoder.parameters()), non_embedding_parameters(encoder)
            print(f"{name:<12}{config.n_layer:>7}{config.width:>7}{total / 1e6:>10.1f} M{inner / 1e6:>10.1f} M")

    directory = minilm_directory()
    encoder, tokenizer = load_encoder(directory).eval(), tokenizer_of(directory)
    sentences = [
        "the patient has a fever",
        "she is running a temperature",
        "a fever dream of a film",
        "he ran for office",
    ]
    print("\nMiniLM, cosine of the sentences' mean vectors:")
    with torch.no_grad():
        vectors = torch.stack([
            mean_over_tokens(encoder(torch.tensor([tokenizer.encode(text).ids])).last)[0] for text in sentences
        ])  # (sentences, width)  # fmt: skip
    vectors = F.normalize(vectors, dim=-1)  # (sentences, width)
    for text, row in zip(sentences, vectors @ vectors.T, strict=True):
        print(f"  {text:<32}" + "".join(f"{value:7.2f}" for value in row.tolist()))


if __name__ == "__main__":
    run_file(main)
