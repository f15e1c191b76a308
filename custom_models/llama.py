"""Llama: a decoder that writes on, token by token, and the shape that most open language models have taken.

Touvron et al. 2023, arXiv 2302.13971 (section 2.2); Llama 2, arXiv 2307.09288; Llama 3, arXiv 2407.21783 (section 3.2).
Against the decoder of "Attention Is All You Need" it changes five things, each a part that stands in a file of its own:

    ====================  ==========================================================  ====================
    what                  in place of                                                 where
    ====================  ==========================================================  ====================
    RMSNorm, first        layer norm, last                                            `layers.py`
    RoPE                  sine waves that are added to the tokens                     `rope.py`
    SwiGLU                two matrices with ReLU between them                         `layers.py`
    grouped-query heads   as many key and value heads as query heads                  `attention.py`
    no biases             biases everywhere (Qwen2 kept those of query, key, value)
    ====================  ==========================================================  ====================

What is left of a layer, with x the tokens' vectors (B, T, width):

    x = x + Attention(RMSNorm(x))           every token looks at itself and at those before it
    x = x + SwiGLU(RMSNorm(x))              every token by itself

The generations differ in sizes, in the base of RoPE, in how it is stretched (Llama 3.1), and in whether the matrix that
reads tokens also writes them ("tied": small models, whose vocabulary would otherwise be half of their weights).

Weights are read by `llama_checkpoint.py`; `generation.py` picks the tokens.

Run it: python -m custom_models.llama --text "What is anaemia?"
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.attention import Backend, KVCache, MultiHeadAttention
from custom_models.layers import GatedFeedForward, RMSNorm, check_cache, check_ids
from custom_models.rope import RopeScaling, rope_table
from workflows.errors import report_all, run_file


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama; what has a default is SmolLM2's.

    Attributes:
        vocab_size: Token ids are below it.
        width: Of the tokens' vectors.
        n_layer: Layers.
        n_head: Query heads.
        n_kv_head: Key and value heads; each is shared by n_head / n_kv_head query heads.
        inner_width: Of the feed-forward layer between its matrices.
        max_length: The longest text, in tokens.
        head_size: Of each head; width / n_head if None.
        norm_eps: Added to the mean of the squares.
        rope_base: The larger, the longer RoPE's longest waves.
        rope_scaling: How RoPE is stretched; None for not at all.
        qkv_bias: Whether query, key and value have biases (Llama: no; Qwen2: yes).
        tied: Whether the embedding is the head, too.
        backend: Who computes attention, see `attention.attend`.
    """

    vocab_size: int
    width: int
    n_layer: int
    n_head: int
    n_kv_head: int
    inner_width: int
    max_length: int
    head_size: int | None = None
    norm_eps: float = 1e-5
    rope_base: float = 100_000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    tied: bool = True
    backend: Backend = "sdpa"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "width", "n_layer", "n_head", "n_kv_head", "inner_width", "max_length")
        problems = [f"Llama's {name} must be at least 1, not {getattr(self, name)}."
                    for name in sizes if getattr(self, name) < 1]  # fmt: skip
        problems += [f"Llama's {name} must be positive, not {getattr(self, name)}."
                     for name in ("norm_eps", "rope_base") if not getattr(self, name) > 0]  # fmt: skip
        # Dynamic NTK turns all keys anew when the text has grown beyond its original length; a cache has turned them.
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "ntk" and self.max_length > scaling.original_length:
            problems.append(
                "Dynamic RoPE scaling changes keys that a KV cache holds already, so max_length must not be above "
                f"original_length {scaling.original_length}. Take yarn, linear or llama3 to go further."
            )
        report_all(problems)


class LlamaLayer(nn.Module):
    """Attention, then the feed-forward layer; both read what is normalised, and add to what is not.

    Args:
        config: The model's shape.

    Raises:
        UserError: If the numbers of heads make no sense.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = MultiHeadAttention(
            config.width,
            config.n_head,
            config.n_kv_head,
            config.head_size,
            qkv_bias=config.qkv_bias,
            out_bias=False,
            backend=config.backend,
        )
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = GatedFeedForward(config.width, config.inner_width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """Let the tokens look back, then think.

        Args:
            x: Tokens' vectors, (B, T, width); with a cache only those of the new ones.
            rope: cos and sin of their positions, (T, head_size) each.
            cache: This layer's.

        Returns:
            (B, T, width).
        """
        seen, _ = self.attention(self.attention_norm(x), causal=True, rope=rope, cache=cache)  # (B, T, width)
        x = x + seen  # (B, T, width)
        return x + self.feed_forward(self.feed_forward_norm(x))  # (B, T, width)


class Llama(nn.Module):
    """p(next token | all tokens up to here), for every token of a text at once.

    Texts of a batch that are shorter than the longest are padded at their ends. No mask is needed for that: no token
    sees a later one, so what stands after a text's end changes nothing before it.

    Args:
        config: Its shape.

    Raises:
        UserError: If the numbers of heads make no sense.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config, self.max_length = config, config.max_length
        self.head_size = config.head_size or config.width // config.n_head
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.n_layer))
        self.last_norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, caches: Sequence[KVCache] | None = None, predict: Tensor | None = None) -> Tensor:
        """What comes after each token.

        Args:
            ids: Token ids, (B, T); with caches only the new ones.
            caches: One for each layer, from `new_caches`; they take up the new tokens.
            predict: True where logits are wanted, (B, T); everywhere if None. With a vocabulary of 49,152 the logits
                are far larger than all else, so training asks only for those that it learns from.

        Returns:
            Logits, (B, T, vocab_size), or (N, vocab_size) for the N tokens where `predict` is True.

        Raises:
            UserError: If an id is no token, or the text is longer than the model or its caches reach.
        """
        config = self.config
        check_ids(ids, config.vocab_size)
        start = caches[0].length if caches else 0
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)  # (T,)
        rope = rope_table(
            positions, self.head_size, config.rope_base, config.rope_scaling, config.max_length
        )  # (T, head_size) each; all layers turn by the same angles
        of_layers: Sequence[KVCache | None] = caches or [None] * config.n_layer
        x = self.tokens(ids)  # (B, T, width)
        for layer, cache in zip(self.layers, of_layers, strict=True):
            x = layer(x, rope, cache)  # (B, T, width)
        x = self.last_norm(x)  # (B, T, width)
        if predict is not None:
            x = x[predict]  # (N, width)
        return F.linear(x, self.tokens.weight) if self.head is None else self.head(x)  # (.., vocab_size)

    def new_caches(self, batch: int, length: int) -> list[KVCache]:
        """An empty cache for each layer.

        Args:
            batch: B, how many texts.
            length: How many tokens they may grow to.

        Raises:
            UserError: If the model's positions do not reach that far.
        """
        check_cache(length, self.max_length)
        weight, n_kv_head = self.tokens.weight, self.config.n_kv_head
        return [
            KVCache(batch, n_kv_head, length, self.head_size, dtype=weight.dtype, device=weight.device)
            for _ in self.layers
        ]


def main(
    text: str = "What is anaemia?",
    checkpoint_dir: Path | None = None,
    adapter: Path | None = None,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 1,
) -> None:
    """Answer a question with a real Llama, with its KV cache and without it, and time both.

    Args:
        text: What the user asks; the checkpoint's own chat template makes the prompt of it.
        checkpoint_dir: A Llama in Hugging Face's or LitGPT's form; the embedded SmolLM2-135M-Instruct if null.
        adapter: The folder of a LoRA adapter for it, such as `make lora-scratch` leaves; it is merged.
        max_new_tokens: At most so many tokens are written.
        temperature: 0 takes the likeliest token.
        top_k: Draw among the k likeliest tokens only.
        top_p: Draw among the fewest tokens whose probabilities reach this sum.
        seed: Decides what is drawn.

    Raises:
        UserError: If the checkpoint cannot be read or has no chat template, or a setting makes no sense.
    """
    from custom_models.generation import generate
    from custom_models.llama_checkpoint import check_vocabulary, hf_module_names, load_llama, smollm2_directory
    from custom_models.lora import fold_lora, load_lora
    from workflows.chat_template import ChatTemplate

    directory = checkpoint_dir or smollm2_directory()
    template = ChatTemplate.from_checkpoint(directory)
    model = load_llama(directory).eval()
    check_vocabulary(model.config, template.tokenizer, directory)
    if adapter is not None:
        load_lora(model, adapter, hf_module_names(model.config.n_layer))
        fold_lora(model)
    prompt = torch.tensor([template.prompt_ids([{"role": "user", "content": text}])])  # (1, T)
    config = model.config
    total = sum(p.numel() for p in model.parameters())
    print(
        f"{directory.name}: {total / 1e6:.1f} M parameters, {config.n_layer} layers of {config.n_head} query heads and "
        f"{config.n_kv_head} key and value heads, {'tied' if config.tied else 'untied'} head; "
        f"a prompt of {prompt.shape[1]} tokens\n"
    )
    found = {}
    for use_cache in (True, False):
        found[use_cache] = written = generate(
            model,
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_ids=template.stop_ids,
            use_cache=use_cache,
        )
        if use_cache:
            print(f"{template.decode(written.ids[0])}\n")
        name = "with the KV cache" if use_cache else "without"
        print(f"{name:<18}{len(written.ids[0])} tokens, {written.tokens_per_second:.1f} tokens/s")
    same = found[True].ids == found[False].ids
    print("both wrote the same text" if same else "the two texts differ: rounding decided between two tokens")


if __name__ == "__main__":
    run_file(main)
