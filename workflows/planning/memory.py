"""Peak memory by part, as our code uses it: what is resident, what a pass keeps, what is there for a moment.

Every number is a count of elements times the size of their type; the counts are those of `training/` (named beside
each). Two numbers are measured and not derived: what the libraries hold, which is read from the process that plans, and
the memory of one of oneDNN's kernels. Working memory that is small beside the rest is left out.
"""

from dataclasses import dataclass

import torch

from workflows.environment import KERNELS
from workflows.planning.architecture import Architecture
from workflows.planning.rows import RowShape
from workflows.training.fused import CACHED_ROWS, HEAD_CHUNK
from workflows.training.qlora import Quantize
from workflows.training.segments import SegmentAttention

KERNEL_BYTES = 700_000
"""One of oneDNN's compiled kernels for bfloat16, as measured on a CPU with AVX-512: 10 to 14 MB for the 17 products of
a new row length, whatever the model's width."""
LENGTH_KERNELS = 40
"""Kernels of one row length in training: a block's products forward and backward, the attention's and the head's."""
FORWARD_KERNELS = 12
"""The same of a forward pass alone."""
_FLOAT = 4
_LONG = 8


@dataclass(frozen=True)
class Moment:
    """What is in memory at one time of a step.

    Attributes:
        name: When that is.
        parts: Bytes by part.
    """

    name: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Device:
    """Where a step computes, and how.

    Attributes:
        dtype: The weights' and the arithmetic's type.
        on_gpu: Whether it is a GPU; then the weights' copy there counts.
        quantize: 4-bit weights.
        processes: Devices of the whole run.
        sharded: Whether weights, gradients and optimizer are shared out among them (FSDP2).
    """

    dtype: torch.dtype
    on_gpu: bool = False
    quantize: Quantize | None = None
    processes: int = 1
    sharded: bool = False

    @property
    def shards(self) -> int:
        """Among how many devices a weight is shared out."""
        return self.processes if self.sharded else 1


def weights(model: Architecture, device: Device, *, written: bool = False) -> tuple[dict[str, int], int]:
    """The frozen or trained weights of one device, and how many bytes of them are mapped from the file.

    `load_model` casts only where the type on the disk is another; what is not cast stays mapped on a CPU, unless
    training writes to it.

    Args:
        model: The model.
        device: Where it is.
        written: Whether the weights themselves are trained.
    """
    size = device.dtype.itemsize
    quantized = model.linears if device.quantize else 0
    plain = (model.weights - quantized) * size // device.shards
    parts: dict[str, int] = {}
    if quantized:
        # two weights a byte; a scale for each 64, in 32 bits, or in 8 with a 32-bit scale for each 256 of them
        scales = quantized // 64 * (1 if device.quantize and device.quantize.endswith("-dq") else _FLOAT)
        parts["weights in 4 bits"] = quantized // 2 + scales
    if not device.on_gpu and model.stored == device.dtype and not written:
        return parts, plain
    parts[f"weights in {str(device.dtype).removeprefix('torch.')}"] = plain
    return parts, 0


def trained_state(model: Architecture, device: Device) -> dict[str, int]:
    """Adapters or float32 master weights, gradients and AdamW's two moments (`training/mixed_precision.py`), all of
    them float32 whatever the weights are.

    Args:
        model: The model with its adapters.
        device: Where it is.
    """
    trained = model.trained * _FLOAT // device.shards
    parts = {}
    if model.lora.r > 0:
        parts["adapters"] = trained
    elif has_masters(model, device):
        parts["master weights in float32"] = trained
    parts |= {"optimizer (AdamW)": 2 * trained, "gradients": trained}
    size = device.dtype.itemsize
    if device.processes > 1 and not device.sharded:
        parts["DDP's gradient buckets"] = model.trained * size if has_masters(model, device) else trained
    if device.sharded:
        block = sum(size for name, size in model.sizes.items() if name.startswith("transformer.h.0."))
        outside = sum(size for name, size in model.sizes.items() if ".h." not in name)
        gathered = 2 * block + outside  # one block runs, the next one comes
        parts["gathered shards"] = gathered * size
        if has_masters(model, device):  # as they come, and in the float32 in which they are summed over processes
            parts["gradients on their way"] = gathered * (size + _FLOAT)
    return parts


def has_masters(model: Architecture, device: Device) -> bool:
    """Return whether trained weights are kept in float32 besides those that compute."""
    return model.lora.r == 0 and device.dtype.itemsize < _FLOAT


def whole_copy(model: Architecture, device: Device) -> dict[str, int]:
    """The second model that a process of a sharded run samples from (`training/whole.py`).

    Args:
        model: The model with its adapters.
        device: Where it is.
    """
    if not device.sharded:
        return {}
    return {"all weights, gathered to sample": model.weights * device.dtype.itemsize + model.adapters * _FLOAT}


def kept_per_token(model: Architecture, device: Device) -> int:
    """Bytes that one block keeps of a token for its backward pass (`training/model.py`, `fused.py`, `attention.py`)."""
    config, lora, size = model.config, model.lora, device.dtype.itemsize
    width, inner = config.n_embd, config.intermediate_size
    query, key = config.n_head * config.head_size, config.n_query_groups * config.head_size
    everything = lora.r == 0
    qkv = everything or lora.query or lora.key or lora.value
    projection, mlp = everything or lora.projection, everything or lora.mlp
    kept = 2 * (width * size + _FLOAT)  # each norm's input and its inverse root mean square
    kept += 2 * inner * size  # gate and up
    # inputs of layers that learn: query, key and value together; the output projection; gate and up together; down
    inputs = [width * qkv, query * projection, width * mlp, inner * mlp]
    if by_segments(model, device):  # queries and keys rotated, the output, a log-sum a head; see `activations`
        kept += (2 * query + key) * size + _FLOAT * config.n_head
        inputs[1] = 0
    elif device.on_gpu:  # LitGPT's attention: key and value repeated for every query head, likewise
        repeated = query if config.n_query_groups != config.n_head else key
        kept += (2 * query + 2 * repeated) * size + _FLOAT * config.n_head
        inputs[1] = 0
    else:
        kept += (query + 2 * key) * size
    if not everything:
        kept += lora.r * ((lora.query + lora.key + lora.value) + lora.projection + 3 * lora.mlp) * size
    if lora.dropout > 0 and not everything:  # each adapter drops for itself and keeps what it dropped, and the mask
        return kept + (sum(inputs) + inputs[2]) * (size + (1 if device.on_gpu else size))
    return kept + sum(inputs) * size


def by_segments(model: Architecture, device: Device) -> bool:
    """Whether a row's attention is `training/segments.py`'s."""
    plain = device.on_gpu and model.module.has_plain_attention
    return plain and SegmentAttention.computes(device.dtype, model.config.head_size)


def activations(model: Architecture, device: Device, row: RowShape) -> dict[str, int]:
    """What a row's forward and backward pass takes beside weights and trained state."""
    config, size = model.config, device.dtype.itemsize
    parts = {"activations": config.n_layer * row.tokens * kept_per_token(model, device)}
    # the adapters in the arithmetic's type, the head's gradient by state, the last norm's input, the row's mask
    parts["activations"] += model.adapters * size * (device.dtype != torch.float32)
    parts["activations"] += (row.learned + 2 * row.tokens) * config.n_embd * size
    if by_segments(model, device):  # the values; with copies for several completions those, of keys, too
        parts["keys and values"] = config.n_layer * (2 * row.copied_keys or row.tokens) * size
        parts["keys and values"] *= config.n_query_groups * config.head_size
    else:
        parts["activations"] += 2 * row.tokens**2
        if not device.on_gpu:
            parts["attention's weights"] = config.n_layer * config.n_head * row.kept_pairs * size
        elif row.tokens:
            parts["attention's mask"] = row.tokens**2 * (1 + size)
    parts["logits of a chunk"] = _head_chunk(model, device, row.learned)
    block = row.tokens * (5 * config.intermediate_size + 4 * config.n_embd) * size  # a block's gradients
    parts["working memory"] = max(0, block - parts["logits of a chunk"])
    if device.quantize:
        parts["working memory"] += model.largest_linear * size  # one matrix at a time is unpacked
    return parts


def _head_chunk(model: Architecture, device: Device, learned: int) -> int:
    """The logits that exist at once in training."""
    vocabulary, size = model.config.padded_vocab_size, device.dtype.itemsize
    rows = min(HEAD_CHUNK, learned)
    if model.lora.r > 0 and not model.lora.head:  # `fused.head_logprobs`
        return rows * vocabulary * size + (rows if device.on_gpu else CACHED_ROWS) * vocabulary * 2 * _FLOAT
    # a chunk computed again in the backward pass: logits in both types, their softmax and gradient; and the matrix's
    return rows * vocabulary * (2 * size + 3 * _FLOAT) + model.embedding * size


def kernels(device: Device, lengths: int, forward: bool = False) -> dict[str, int]:
    """oneDNN's compiled kernels: for each row length its own, up to the limit that `environment.py` sets.

    Args:
        device: Where the step computes.
        lengths: Different lengths of rows.
        forward: No backward pass.
    """
    if device.on_gpu or device.dtype == torch.float32:
        return {}
    each = FORWARD_KERNELS if forward else LENGTH_KERNELS
    return {"compiled kernels": min(int(KERNELS), each * lengths) * KERNEL_BYTES}


def forward_only(model: Architecture, device: Device, tokens: int, learned: int) -> dict[str, int]:
    """A row without gradients: one block's tensors, and the scores' logits (`GPT.score`)."""
    config, size = model.config, device.dtype.itemsize
    block = tokens * (2 * config.n_embd + 3 * config.intermediate_size) * size
    logits = min(HEAD_CHUNK, learned) * config.padded_vocab_size * max(size + _FLOAT, 2 * _FLOAT)
    return {"activations": block + (0 if by_segments(model, device) else 2 * tokens**2), "logits of a chunk": logits}


def sampling(
    model: Architecture, device: Device, batch: int, prompt: int, new_tokens: int, prompts: int
) -> dict[str, int]:
    """Answers side by side (`training/rollouts.py`, `decoding.py`, `sampling.py`).

    Args:
        model: The model that answers.
        device: Where.
        batch: Answers at a time.
        prompt: Tokens of the longest prompt.
        new_tokens: The most tokens of an answer.
        prompts: Different prompts among them.
    """
    config, size = model.config, device.dtype.itemsize
    key = config.n_query_groups * config.head_size
    parts = {"KV cache": 2 * config.n_layer * batch * (prompt + new_tokens) * key * size}
    if not device.on_gpu and not device.quantize:
        # every matrix laid out a second time for few rows, with its adapter; the head's, too
        parts["weights laid out for decoding"] = (model.linears + model.embedding + model.adapters) * size
    logits = batch * config.padded_vocab_size
    parts["logits and probabilities"] = logits * (_FLOAT + _FLOAT + 2 * _LONG)  # float32 twice, float64 twice
    parts["activations"] = prompts * prompt * (2 * config.n_embd + 3 * config.intermediate_size) * size
    return parts
