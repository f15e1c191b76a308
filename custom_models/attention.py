"""Attention: every token asks, every token it may see answers, and the answers are averaged by how well they fit.

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V             Vaswani et al. 2017, arXiv 1706.03762, equation 1

`scaled_dot_product_attention` is that line, with masks. `MultiHeadAttention` is the layer around it, made to carry
every model of this folder:

* multi-head (section 3.2.2), self- and cross-attention;
* grouped-query (Ainslie et al. 2023, arXiv 2305.13245): several query heads share one key and value head;
* causal and padding masks, rotary positions (`positions.py`), an additive position bias (T5, ALiBi);
* a KV cache, so that a new token costs one row of scores and not a whole text.

The same numbers come from four backends: "naive" (the line above, written out), "sdpa" (PyTorch's own kernel, fast),
"flash" (`flash_attention.py`) and "triton" (`flash_attention_triton.py`, for GPUs).

A boolean mask says True where a query may attend to a key. A query that may attend to nothing gets zeros.

Run it: python -m custom_models.attention
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.flash_attention import check_shapes, flash_attention
from custom_models.layers import RMSNorm
from custom_models.rope import apply_rope
from workflows.errors import UserError, report_all

Backend = Literal["naive", "sdpa", "flash", "triton"]


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T * scale + bias) v, written out.

    Args:
        q: Queries, (B, n_head, Tq, head_size).
        k: Keys, (B, n_kv_head, Tk, head_size); query head h reads key head h // (n_head // n_kv_head).
        v: Values, (B, n_kv_head, Tk, value_size).
        mask: True where a query may attend; of a shape that broadcasts to (B, n_head, Tq, Tk).
        bias: Added to the scaled scores; of such a shape, too.
        scale: 1 / sqrt(head_size) if None (T5 has 1).
        dropout: The share of weights that is set to zero.
        return_weights: Whether to return the weights, too.

    Returns:
        The output, (B, n_head, Tq, value_size), and the weights, (B, n_head, Tq, Tk), or None.

    Raises:
        UserError: If the shapes do not fit together.
    """
    check_shapes(q, k, v, None)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k = k.repeat_interleave(group, dim=1)  # (B, n_head, Tk, head_size)
        v = v.repeat_interleave(group, dim=1)  # (B, n_head, Tk, value_size)
    scores = q @ k.mT * scale  # (B, n_head, Tq, Tk)
    if bias is not None:
        scores = scores + bias  # (B, n_head, Tq, Tk)
    if mask is not None:
        # The lowest number, not minus infinity: a row of nothing but infinities would become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # (B, n_head, Tq, Tk)
    weights = scores.softmax(dim=-1)  # (B, n_head, Tq, Tk); each row sums to 1
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)  # (B, n_head, Tq, Tk); changes only rows that see nothing
    out = F.dropout(weights, dropout) @ v  # (B, n_head, Tq, value_size)
    return out, weights if return_weights else None


def causal_mask(n_queries: int, n_keys: int, device: torch.device | None = None) -> Tensor:
    """True where a key is no later than the query. The last query belongs to the last key, as with a KV cache.

    Returns:
        (Tq, Tk), boolean.
    """
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)  # (Tq, Tk)


def real_tokens(lengths: Tensor, length: int) -> Tensor:
    """Which tokens are no padding, where each text is padded at its end: lengths (B,) -> (B, length), boolean."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]  # (B, length)


def padding_mask(lengths: Tensor, n_keys: int) -> Tensor:
    """True for the keys that are real, where each text is padded at its end.

    Args:
        lengths: How long each text is, (B,).
        n_keys: Tk, the length it is padded to.

    Returns:
        (B, 1, 1, Tk), boolean.
    """
    return real_tokens(lengths, n_keys)[:, None, None]  # (B, 1, 1, Tk)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: Backend = "sdpa",
    causal: bool = False,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention by the backend of your choice; the numbers are the same.

    Args:
        q: Queries, (B, n_head, Tq, head_size).
        k: Keys, (B, n_kv_head, Tk, head_size).
        v: Values, (B, n_kv_head, Tk, value_size).
        backend: Who computes it. The weights come from "naive", whatever is asked for: no other has them.
        causal: Whether a query sees only the keys up to its own place; the last query belongs to the last key.
        key_lengths: How many keys of each text are real, (B,).
        mask: A further mask, True where a query may attend; it broadcasts to (B, n_head, Tq, Tk).
        bias: Added to the scaled scores; it broadcasts to (B, n_head, Tq, Tk).
        scale: What the scores are multiplied by; 1 / sqrt(head_size) if None.
        dropout: The share of weights that is set to zero.
        return_weights: Whether to return the weights, too.

    Returns:
        The output, (B, n_head, Tq, value_size), and the weights, (B, n_head, Tq, Tk), or None.

    Raises:
        UserError: If the shapes do not fit together, or the backend lacks what is asked for.
    """
    check_shapes(q, k, v, key_lengths)
    if backend in ("flash", "triton") and not return_weights:
        if mask is not None or bias is not None or dropout:
            raise UserError(
                f"The {backend} backend knows causal and key_lengths, but no other mask, no bias and no dropout. "
                'Take backend "sdpa" or "naive" for this model.'
            )
        if backend == "triton":
            from custom_models.flash_attention_triton import flash_attention_triton

            return flash_attention_triton(q, k, v, causal=causal, key_lengths=key_lengths, scale=scale), None
        return flash_attention(q, k, v, causal=causal, key_lengths=key_lengths, scale=scale), None
    n_queries, n_keys = q.shape[2], k.shape[2]
    # A single query is the last one and sees all keys. SDPA's own flag is faster than a mask, but aligns the first
    # query with the first key, which is the same only for a square.
    flag = backend == "sdpa" and not return_weights and n_queries == n_keys
    flag = flag and causal and key_lengths is None and mask is None and bias is None
    if causal and n_queries > 1 and not flag:
        earlier = causal_mask(n_queries, n_keys, q.device)  # (Tq, Tk)
        mask = earlier if mask is None else mask & earlier  # (.., Tq, Tk)
    if key_lengths is not None:
        real = padding_mask(key_lengths, n_keys)  # (B, 1, 1, Tk)
        mask = real if mask is None else mask & real  # (B, 1 or n_head, 1 or Tq, Tk)
    if backend == "naive" or return_weights:
        return scaled_dot_product_attention(q, k, v, mask, bias, scale, dropout, return_weights)
    if bias is not None and mask is not None:
        bias = bias.masked_fill(~mask, -math.inf)  # (B, n_head, Tq, Tk); SDPA takes one of the two
    added = mask if bias is None else bias.to(q.dtype)  # it broadcasts to (B, n_head, Tq, Tk)
    out = F.scaled_dot_product_attention(q, k, v, added, dropout, flag, scale=scale, enable_gqa=q.shape[1] > k.shape[1])
    return out, None


class KVCache:
    """The keys and values of one layer's earlier tokens, in memory that is taken once.

    Args:
        batch: B, how many texts.
        n_kv_head: Heads of keys and values.
        max_length: How many tokens fit.
        head_size: Size of a key head.
        value_size: Size of a value head; as a key's if None.
        dtype: Of keys and values; the default dtype if None.
        device: Where they lie.
    """

    def __init__(
        self,
        batch: int,
        n_kv_head: int,
        max_length: int,
        head_size: int,
        value_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch, n_kv_head, max_length)
        self.k = torch.zeros(*shape, head_size, dtype=dtype, device=device)  # (B, n_kv_head, max_length, head_size)
        self.v = torch.zeros(*shape, value_size or head_size, dtype=dtype, device=device)  # (.., value_size)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest tokens.

        Args:
            k: Their keys, (B, n_kv_head, T, head_size).
            v: Their values, (B, n_kv_head, T, value_size).

        Returns:
            Keys and values of all tokens so far, (B, n_kv_head, length, head_size) and (.., value_size).

        Raises:
            UserError: If they do not fit.
        """
        end, room = self.length + k.shape[2], self.k.shape[2]
        if end > room:
            raise UserError(
                f"The text grows to {end} tokens, and the KV cache holds {room}. Shorten the text, or make the cache "
                "longer (max_length), if the model's positions reach that far."
            )
        if k.shape[:2] != self.k.shape[:2]:
            raise UserError(
                f"The KV cache was made for {self.k.shape[0]} texts and {self.k.shape[1]} heads, not for "
                f"{k.shape[0]} and {k.shape[1]}. Make a new one for this batch."
            )
        self.k[:, :, self.length : end] = k  # (B, n_kv_head, T, head_size)
        self.v[:, :, self.length : end] = v  # (B, n_kv_head, T, value_size)
        self.length = end
        return self.seen()

    def reorder(self, rows: Tensor) -> None:
        """Let text i go on from what text rows[i] has seen (beam search): rows (B,), numbers of texts."""
        k, v = self.seen()
        self.k[:, :, : self.length] = k[rows]  # (B, n_kv_head, length, head_size)
        self.v[:, :, : self.length] = v[rows]  # (B, n_kv_head, length, value_size)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far: (B, n_kv_head, length, head_size) and (.., value_size)."""
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class MultiHeadAttention(nn.Module):
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O, where head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V).

    Section 3.2.2 of arXiv 1706.03762. The projections of all heads lie in one matrix, one head below the other.

    Args:
        width: Of the tokens' vectors, in and out.
        n_head: Query heads.
        n_kv_head: Key and value heads (grouped-query); n_head if None, 1 is multi-query.
        head_size: Of each head; width // n_head if None.
        qkv_bias: Whether the first three projections have a bias (GPT, BERT, Qwen2: yes; Llama, T5: no).
        out_bias: Whether the last one has.
        context_width: Of the vectors that keys and values are made from in cross-attention; `width` if None.
        scale: What the scores are multiplied by; 1 / sqrt(head_size) if None (T5 has 1).
        qk_norm: Whether each query and key is normalised (RMSNorm, before it is turned by RoPE), so that scores cannot
            grow without bound however large the weights get (Henry et al. 2020, arXiv 2010.04245; Dehghani et al. 2023,
            arXiv 2302.05442, section 2).
        dropout: The share of weights set to zero in training.
        backend: Who computes the attention, see `attend`.

    Raises:
        UserError: If the numbers of heads or the backend make no sense.
    """

    def __init__(
        self,
        width: int,
        n_head: int,
        n_kv_head: int | None = None,
        head_size: int | None = None,
        *,
        qkv_bias: bool = True,
        out_bias: bool = True,
        context_width: int | None = None,
        scale: float | None = None,
        qk_norm: bool = False,
        dropout: float = 0.0,
        backend: Backend = "sdpa",
    ) -> None:
        super().__init__()
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        problems = []
        if n_head < 1 or (head_size is None and width % n_head):
            problems.append(f"width {width} is no multiple of n_head {n_head}: choose another, or give head_size.")
        if n_kv_head < 1 or n_head % n_kv_head:
            problems.append(f"n_head {n_head} is no multiple of n_kv_head {n_kv_head}.")
        if backend not in (known := ("naive", "sdpa", "flash", "triton")):
            problems.append(f"There is no attention backend {backend!r}; there are {', '.join(known)}.")
        report_all(problems)
        self.head_size = width // n_head if head_size is None else head_size
        self.scale, self.dropout = scale, dropout
        self.backend: Backend = backend
        context_width = width if context_width is None else context_width
        self.q = nn.Linear(width, n_head * self.head_size, bias=qkv_bias)
        self.k = nn.Linear(context_width, n_kv_head * self.head_size, bias=qkv_bias)
        self.v = nn.Linear(context_width, n_kv_head * self.head_size, bias=qkv_bias)
        self.out = nn.Linear(n_head * self.head_size, width, bias=out_bias)
        self.q_norm = RMSNorm(self.head_size) if qk_norm else None
        self.k_norm = RMSNorm(self.head_size) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        causal: bool = False,
        key_lengths: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Let the tokens of x attend to themselves, or to those of another text.

        Args:
            x: Tokens, (B, T, width); with a cache only the new ones.
            context: The text to attend to, (B, Tk, context_width); x itself if None.
            causal: Whether a token sees only those up to itself.
            key_lengths: How many tokens of each attended text are real, (B,).
            mask: A further mask, True where a token may attend; it broadcasts to (B, n_head, T, Tk).
            bias: Added to the scores (T5's, ALiBi); it broadcasts to (B, n_head, T, Tk).
            rope: cos and sin for the positions of x, from `rope.rope_table`: (T, head_size) or (B, T, head_size).
            cache: This layer's cache. Self-attention appends to it. Cross-attention fills it at the first call and
                reads it at later ones, which then need not compute the context's keys again.
            return_weights: Whether to return the weights, too; this takes the naive road.

        Returns:
            (B, T, width), and the weights, (B, n_head, T, Tk), or None.

        Raises:
            UserError: If shapes do not fit together, the cache is full, or the backend lacks what is asked for.
        """
        q = self._heads(self.q(x))  # (B, n_head, T, head_size)
        if self.q_norm is not None:
            q = self.q_norm(q)  # (B, n_head, T, head_size)
        if context is not None and cache is not None and cache.length:
            k, v = cache.seen()  # (B, n_kv_head, Tk, head_size) each
        else:
            source = x if context is None else context  # (B, Tk, context_width)
            k, v = self._heads(self.k(source)), self._heads(self.v(source))  # (B, n_kv_head, Tk, head_size) each
            if self.k_norm is not None:
                k = self.k_norm(k)  # (B, n_kv_head, Tk, head_size)
            if rope is not None:
                k = apply_rope(k, *rope)  # (B, n_kv_head, T, head_size)
            if cache is not None:
                k, v = cache.append(k, v)  # (B, n_kv_head, Tk, head_size) each, Tk now with the earlier tokens
        if rope is not None:
            q = apply_rope(q, *rope)  # (B, n_head, T, head_size)
        out, weights = attend(
            q,
            k,
            v,
            backend=self.backend,
            causal=causal,
            key_lengths=key_lengths,
            mask=mask,
            bias=bias,
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            return_weights=return_weights,
        )  # (B, n_head, T, head_size), (B, n_head, T, Tk)
        return self.out(out.transpose(1, 2).flatten(2)), weights  # (B, T, width)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, n * head_size) -> (B, n, T, head_size)."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


def main() -> None:
    """Show which words of a sentence look at which, by vectors made by hand."""
    words = ["the", "cat", "sat", "because", "it", "was", "tired"]
    # What a word is, and what it looks for, in two numbers: being an animal, and being a doing.
    are = {"cat": [4.0, 0.0], "it": [2.0, 0.0], "sat": [0.0, 4.0], "was": [0.0, 2.0]}
    want = {"sat": [1.0, 0.0], "because": [0.0, 1.0], "it": [2.0, 0.0], "was": [1.0, 0.0], "tired": [1.0, 1.0]}
    k = torch.tensor([are.get(word, [0.0, 0.0]) for word in words])[None, None]  # (1, 1, T, 2): one text, one head
    q = torch.tensor([want.get(word, [0.0, 0.0]) for word in words])[None, None]  # (1, 1, T, 2)
    mask = causal_mask(len(words), len(words))  # (T, T)
    _, weights = scaled_dot_product_attention(q, k, k, mask, return_weights=True)  # (1, 1, T, T)
    assert weights is not None
    print("Each row is a word; what it takes from itself and the words before it, in percent:\n")
    print(" " * 8 + "".join(f"{word:>9}" for word in words))
    for word, row in zip(words, weights[0, 0], strict=True):
        print(f"{word:<8}" + "".join(f"{100 * share:>9.0f}" if share > 0 else " " * 8 + "." for share in row.tolist()))


if __name__ == "__main__":
    main()
