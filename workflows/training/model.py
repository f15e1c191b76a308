"""LitGPT's LoRA GPT, able to read a tree-packed batch and to give one log-probability per completion token.

What is in: explicit masks and rotary positions, a language-model head that runs only where a token is predicted, in
chunks (the logits of a whole batch never exist at once), tied embeddings that stay tied, 32-bit adapters over 16-bit
weights, and faster forms of LitGPT's layers where the plain Llama shape allows them (`fused.py`, `attention.py`).
What is not: models with sliding windows, multi-head latent attention or learned positions (LitGPT's own forward runs
them; a packed one would need more than a mask).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import litgpt.lora
import litgpt.model
import torch
import torch.nn.functional as F
from litgpt.model import do_softcapping
from torch.utils.checkpoint import checkpoint

from workflows.checkpoint import check_checkpoint_dir, is_tied, load_config, load_weights
from workflows.errors import UserError, first_line
from workflows.training.attention import RowAttention, StepAttention
from workflows.training.batch import PackedBatch
from workflows.training.decoding import PackedLinear
from workflows.training.fused import HEAD_CHUNK, head_logprobs, lora_linear, rms_norm, swiglu
from workflows.training.segments import SegmentAttention

Precision = Literal["32-true", "bf16-true", "16-true"]
DTYPES: dict[str, torch.dtype] = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass
class LoRAArgs:
    """Which linear layers are adapted, and how (Hu et al. 2021, arXiv 2106.09685). Names are LitGPT's."""

    r: int = 16
    """Rank of the update; 0 trains the full weights instead."""
    alpha: int = 32
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    query: bool = True
    key: bool = True
    value: bool = True
    projection: bool = True
    mlp: bool = True
    head: bool = False

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "LoRAArgs":
        """The `lora_*` entries of a step's `hyperparameters.yaml`.

        Raises:
            UserError: If one of them is unknown or of another type.
        """
        found = {str(k).removeprefix("lora_"): value for k, value in settings.items() if str(k).startswith("lora_")}
        for name, value in found.items():
            kind = type(getattr(cls, name, None))
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UserError(f"hyperparameters.yaml: lora_{name} is {value!r:.40}, which it cannot be.")
        return cls(**found)

    def config_fields(self) -> dict[str, Any]:
        """The fields of `litgpt.lora.Config`."""
        return {f"lora_{name}": value for name, value in vars(self).items()}


class LoRALinear(litgpt.lora.LoRALinear):
    """LitGPT's layer with a faster forward; adapters of higher precision than the weights are cast when used."""

    packed: PackedLinear | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, in_features). Returns (B, T, out_features)."""
        if self.packed is not None:
            return self.packed(x)
        if self.r == 0 or self.merged:
            return self.linear(x)
        return _adapted(self, x, self.lora_B)


class LoRAQKVLinear(litgpt.lora.LoRAQKVLinear):
    """LitGPT's fused query-key-value layer; the three updates are one product with a block-diagonal matrix."""

    packed: PackedLinear | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, C). Returns (B, T, (n_head + 2 * n_query_groups) * head_size)."""
        if self.packed is not None:
            return self.packed(x)
        if self.r == 0 or not any(self.enable_lora) or self.merged:
            return self.linear(x)
        return _adapted(self, x, self.block_diagonal_B())

    def block_diagonal_B(self) -> torch.Tensor:
        """Shape (out_features, r * enabled): B of query, key, value on the diagonal, zeros for what is not adapted."""
        sizes = [self.head_size * n for n in (self.n_head, self.n_query_groups, self.n_query_groups)]
        learned = iter(self.lora_B.split(self.qkv_shapes))
        blocks = [
            next(learned) if on else self.lora_B.new_zeros(size, 0)
            for on, size in zip(self.enable_lora, sizes, strict=True)
        ]
        return torch.block_diag(*blocks)


def _adapted(layer: litgpt.lora.LoRALinear, x: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    """The layer's output with its update; x: (B, T, in_features)."""
    dropped = layer.training and isinstance(layer.lora_dropout, torch.nn.Dropout) and layer.lora_dropout.p > 0
    if type(layer.linear) is torch.nn.Linear and not dropped:
        return lora_linear(x, layer.linear.weight, layer.linear.bias, layer.lora_A, lora_B, layer.scaling)
    # quantized weights multiply by themselves, and with dropout the two products have different inputs
    down = F.linear(layer.lora_dropout(x), layer.lora_A.to(x.dtype)) * layer.scaling  # (B, T, r)
    return layer.linear(x) + F.linear(down, lora_B.to(x.dtype))


class CausalSelfAttention(litgpt.lora.CausalSelfAttention):
    """LitGPT's attention, which also takes `RowAttention` or `SegmentAttention` (a packed row) or `StepAttention`
    (decoding) as its mask."""

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """x: (B, T, n_embd). Returns the same shape."""
        if not isinstance(mask, RowAttention | SegmentAttention | StepAttention):
            return super().forward(x, cos, sin, mask, *args, **kwargs)
        scale = self.mscale**2 / math.sqrt(self.config.attention_scores_scalar or self.config.head_size)
        parts = (self.qkv(x), cos, sin, self.config.n_head, self.config.n_query_groups, scale)
        return self.proj(mask(*parts, self.kv_cache) if isinstance(mask, StepAttention) else mask(*parts))


class RMSNorm(litgpt.model.RMSNorm):
    """LitGPT's norm in fewer passes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., C). Returns the same shape."""
        return rms_norm(x, self.weight + 1 if self.add_unit_offset else self.weight, self.eps)


class LLaMAMLP(litgpt.lora.LLaMAMLP):
    """LitGPT's gated MLP, keeping less for its backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, n_embd). Returns the same shape."""
        return self.proj(swiglu(self.fc_1(x), self.fc_2(x)))


_OURS: dict[type, type] = {
    litgpt.lora.LoRALinear: LoRALinear,
    litgpt.lora.LoRAQKVLinear: LoRAQKVLinear,
    litgpt.lora.CausalSelfAttention: CausalSelfAttention,
    litgpt.lora.LLaMAMLP: LLaMAMLP,
    litgpt.model.RMSNorm: RMSNorm,
}


class GPT(litgpt.lora.GPT):
    """LitGPT's model whose `forward` also takes a `PackedBatch`."""

    def __init__(self, config: Any) -> None:
        if config.sliding_window_size is not None or config.latent_attention or config.rope_local_base_freq is not None:
            raise UserError(
                f"{config.name}: models with sliding windows or latent attention cannot be trained on packed batches."
            )
        super().__init__(config)
        for module in self.modules():
            module.__class__ = _OURS.get(type(module), type(module))  # same parameters, our forward

    def forward(self, idx: torch.Tensor | PackedBatch, *args: Any, **kwargs: Any) -> Any:
        """`token_logprobs` of a packed batch; for a tensor, LitGPT's own forward."""
        if isinstance(idx, PackedBatch):
            return self.token_logprobs(idx, *args, **kwargs)
        return super().forward(idx, *args, **kwargs)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Final hidden states of a packed row, shape (1, T, n_embd), norm applied."""
        x = self.transformer.wte(batch.input_ids)  # (1, T, n_embd)
        mask = self._attention(batch, x.dtype)
        cos, sin = self.cos[batch.positions], self.sin[batch.positions]  # (1, T, rope_n_elem)
        if self.config.scale_embeddings:
            x = x * self.config.n_embd**0.5
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for block in self.transformer.h:
            x = block(x, cos, sin, mask)  # (1, T, n_embd)
        return self.transformer.ln_f(x)

    def _attention(
        self, batch: PackedBatch, dtype: torch.dtype
    ) -> RowAttention | SegmentAttention | torch.Tensor | None:
        """How the row's tokens see each other: by pieces on a CPU, by segments on a GPU; where neither is possible
        LitGPT's own attention gets a mask of (1, 1, T, T), or None where that is causal."""
        device = batch.input_ids.device
        if self.has_plain_attention and device.type == "cpu":
            return RowAttention(batch)
        if self.has_plain_attention and SegmentAttention.works_on(device, dtype, self.config.head_size):
            return SegmentAttention(batch)
        return batch.attention_mask()

    def token_logprobs(self, batch: PackedBatch, temperature: float = 1.0) -> torch.Tensor:
        """log p(token | what it sees) of every learned token.

        Args:
            batch: A packed row.
            temperature: What the logits are divided by.

        Returns:
            float32, shape (N,), in the order of `batch.targets`; of the untruncated distribution.
        """
        states = self.hidden(batch)[0].index_select(0, batch.predictors)  # (N, n_embd)
        return self.head_logprobs(states, batch.targets, temperature)

    def head_logprobs(self, states: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """log p(target | state): states (N, n_embd), targets (N,). Returns float32, (N,)."""
        head = self.lm_head
        if self.has_plain_head and not head.linear.weight.requires_grad:
            states = states if temperature == 1.0 else states / temperature
            return head_logprobs(states, head.linear.weight, targets)
        chunks = zip(states.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
        # what a chunk's backward pass needs is computed again there
        logprobs = [checkpoint(self._chunk, *chunk, temperature, use_reentrant=False)[0] for chunk in chunks]
        return torch.cat(logprobs)

    def head_logits(self, states: torch.Tensor) -> torch.Tensor:
        """The language-model head: states (n, n_embd). Returns float32 logits, (n, padded_vocab_size)."""
        logits = self.lm_head(states).float()
        if self.config.final_logit_softcapping is not None:
            logits = do_softcapping(logits, self.config.final_logit_softcapping)
        return logits

    @property
    def has_adapters(self) -> bool:
        """Whether the weights have adapters, so that the model before training is still there."""
        return self.config.lora_r > 0

    @property
    def has_tied_head(self) -> bool:
        """Whether one matrix embeds tokens and predicts them."""
        return self.lm_head.linear.weight is self.transformer.wte.weight

    @property
    def has_plain_attention(self) -> bool:
        """Whether attention is Llama's: full rotary embeddings in halves, no norms or caps inside."""
        config = self.config
        odd = config.norm_qk or config.rope_interleave or config.attention_logit_softcapping is not None
        return not odd and config.rope_n_elem == config.head_size

    @property
    def has_plain_head(self) -> bool:
        """Whether the head is a matrix alone: no bias, no adapter, no cap."""
        head = self.lm_head
        adapted = head.r > 0 and not head.merged
        return head.linear.bias is None and not adapted and self.config.final_logit_softcapping is None

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the learned tokens, and whether each is the most likely one.

        Returns:
            Two tensors of shape (N,): float32 log-probabilities, and booleans.
        """
        states = self.hidden(batch)[0].index_select(0, batch.predictors)  # (N, n_embd)
        pairs = zip(states.split(HEAD_CHUNK), batch.targets.split(HEAD_CHUNK), strict=True)
        logprobs, greedy = zip(*(self._chunk(*pair) for pair in pairs), strict=True)
        return torch.cat(logprobs), torch.cat(greedy)

    def _chunk(
        self, states: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """states (n, n_embd), targets (n,) -> log-probabilities (n,) and whether each target is the argmax (n,)."""
        logits = self.head_logits(states)  # (n, padded_vocab_size)
        if temperature != 1.0:
            logits = logits / temperature
        chosen = logits.gather(1, targets[:, None])[:, 0]  # (n,)
        return chosen - logits.logsumexp(dim=-1), chosen == logits.amax(dim=-1)


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """The model as it was before its adapters were trained: the reference policy of DPO and GRPO.

    Args:
        model: A model with adapters, bare or as Fabric set it up.
    """
    layers = [module for module in model.modules() if isinstance(module, litgpt.lora.LoRALinear)]
    for layer in layers:
        layer.merged = True  # LitGPT's layers leave out what they take to be in the weights already
    try:
        yield
    finally:
        for layer in layers:
            layer.merged = False


def empty_model(checkpoint_dir: Path, lora: LoRAArgs) -> GPT:
    """A model without weights (all on the meta device), as `model_config.yaml` and the adapters' settings describe it.

    Raises:
        UserError: If they describe none.
    """
    config = load_config(checkpoint_dir, **lora.config_fields())
    try:
        with torch.device("meta"):
            return GPT(config)
    except Exception as e:  # LitGPT checks little: whatever Python and torch say to a setting that cannot be
        raise UserError(f"{checkpoint_dir / 'model_config.yaml'} describes no model ({first_line(e)}).") from None


def load_model(
    checkpoint_dir: Path | str,
    lora: LoRAArgs | None = None,
    precision: Precision = "32-true",
    max_seq_length: int | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """Load a checkpoint as a trainable model.

    Weights are mapped from the file and cast only where the precision asks for it. Adapters are always float32: AdamW's
    small updates would be lost in bfloat16's 8 bits. Their A matrices are drawn from torch's generator, B is zero.

    Args:
        checkpoint_dir: A LitGPT checkpoint directory.
        lora: The adapters to add; None or rank 0 for none (then all weights are trainable).
        precision: What the weights and the arithmetic are in.
        max_seq_length: The longest sample, at most the model's context; the whole context if None.
        device: Where to put the model.

    Raises:
        UserError: If the checkpoint is incomplete or not of the shape its configuration says, or the length too long.
    """
    directory = check_checkpoint_dir(checkpoint_dir)
    lora = lora or LoRAArgs(r=0)
    model = empty_model(directory, lora)
    config = model.config
    if max_seq_length is not None and max_seq_length > config.block_size:
        raise UserError(f"--train.max_seq_length {max_seq_length} exceeds the model's context of {config.block_size}.")

    dtype = DTYPES[precision]
    weights = {name: tensor.to(dtype) for name, tensor in load_weights(directory).items()}
    try:
        loaded = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as e:
        raise UserError(f"{directory}: the weights do not fit model_config.yaml. {e}") from None
    missing = [name for name in loaded.missing_keys if "lora_" not in name]
    if missing or loaded.unexpected_keys:
        raise UserError(
            f"{directory}: lit_model.pth lacks {missing[:3] or 'nothing'} and holds unknown "
            f"{loaded.unexpected_keys[:3] or 'nothing'}. Download or make the checkpoint again."
        )
    if is_tied(directory) and not (lora.r > 0 and lora.head):
        model.lm_head.linear.weight = model.transformer.wte.weight

    for module in model.modules():
        if isinstance(module, litgpt.lora.LoRALinear) and hasattr(module, "lora_A"):
            module.lora_A = torch.nn.Parameter(torch.empty(module.lora_A.shape, dtype=torch.float32))
            module.lora_B = torch.nn.Parameter(torch.empty(module.lora_B.shape, dtype=torch.float32))
            module.reset_parameters()
    model._max_seq_length = max_seq_length or config.block_size  # the setter would compute the rotary table on "meta"
    model.cos, model.sin = model.rope_cache(device=torch.device("cpu"))
    if lora.r > 0:
        litgpt.lora.mark_only_lora_as_trainable(model)
    return model.to(device)
