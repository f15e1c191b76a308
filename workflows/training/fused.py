"""Operations with a backward pass written by hand: fewer passes over memory, and less kept, than autograd needs.

Each equals the plain formula named in its docstring; the tests check values and gradients against it.
"""

from typing import Any

import torch
import torch.nn.functional as F

from workflows.training.batch import ROW_MULTIPLE

HEAD_CHUNK = 512
"""Predicted tokens per chunk of the head, whose weights are read once for each: 512 rows of 49,152 logits are 50 MB."""
CACHED_ROWS = 16
"""Rows of a chunk whose softmax is taken at once: 16 rows of 49,152 logits, 3 MB in float32, stay in the cache."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps), computed in float32 (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    Args:
        x: Shape (..., C).
        weight: Shape (C,).
        eps: Added to the mean square.
    """
    if x.is_cuda:  # torch has one kernel for it there
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (..., 1)
        inverse = (norm.square_().div_(x.size(-1)).add_(eps)).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)  # float32 until the end: inverse is

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        scaled = x * inverse  # (..., C), float32
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grads[0] * scaled).flatten(0, -2).sum(dim=0).to(weight.dtype)
        d_scaled = grads[0].float() * weight  # (..., C), float32
        along = torch.linalg.vecdot(d_scaled, scaled)[..., None] / x.size(-1)  # (..., 1)
        d_x = d_scaled.addcmul_(scaled, along, value=-1).mul_(inverse)
        return d_x.to(x.dtype), d_weight, None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """x W^T + bias + scaling * (x A^T) B^T with frozen W and bias (Hu et al. 2021, arXiv 2106.09685, eq. 3).

    Args:
        x: Shape (..., in_features).
        weight: W, shape (out_features, in_features).
        bias: Shape (out_features,).
        lora_A: Shape (r, in_features); of higher precision than x it is cast for the products.
        lora_B: Shape (out_features, r), likewise.
        scaling: alpha / r.

    Returns:
        Shape (..., out_features).
    """
    return _LoRALinear.apply(x, weight, bias, lora_A, lora_B, scaling)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        rows = x.flatten(0, -2)  # (N, in)
        down = F.linear(rows, a).mul_(scaling)  # (N, r)
        y = F.linear(rows, weight, bias).addmm_(down, b.T)  # (N, out)
        ctx.save_for_backward(rows, weight, a, b, down)
        ctx.scaling, ctx.dtypes, ctx.shape = scaling, (lora_A.dtype, lora_B.dtype), x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        rows, weight, a, b, down = ctx.saved_tensors
        d_y = grads[0].flatten(0, -2)  # (N, out)
        d_down = (d_y @ b).mul_(ctx.scaling)  # (N, r)
        d_a, d_b = d_down.T @ rows, d_y.T @ down  # (r, in), (out, r)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (d_y @ weight).addmm_(d_down, a).view(ctx.shape)
        return d_x, None, None, d_a.to(ctx.dtypes[0]), d_b.to(ctx.dtypes[1]), None


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202, eq. 6); silu(gate) is computed again rather than kept.

    Args:
        gate: Any shape.
        up: The same shape.
    """
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return d_gate, F.silu(gate).mul_(grads[0])


def head_logprobs(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(states W^T)[targets], chunk by chunk, for a frozen head.

    A token's log-probability depends on its own state alone, so the gradient is known but for a factor as soon as the
    softmax is: W[target] - sum over v of p(v) W[v]. It is taken in the forward pass, where the logits are at hand, and
    N states of gradient are kept instead of N rows of logits (or of doing all of it again in the backward pass).

    Args:
        states: Shape (N, n_embd).
        weight: W, shape (vocabulary, n_embd).
        targets: Token ids, shape (N,).

    Returns:
        float32, shape (N,).
    """
    return _HeadLogprobs.apply(states, weight, targets)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        n = len(states)
        fill = -n % ROW_MULTIPLE  # so that few shapes of these large products exist
        states, targets = F.pad(states, (0, 0, 0, fill)), F.pad(targets, (0, fill))
        logprobs = torch.empty(len(states), dtype=torch.float32, device=states.device)
        slopes = torch.empty_like(states)  # of each token's log-probability by its state
        buffer = states.new_empty(min(HEAD_CHUNK, len(states)), len(weight))  # every chunk's logits in turn
        rows = CACHED_ROWS if states.device.type == "cpu" else HEAD_CHUNK
        for begin in range(0, len(states), HEAD_CHUNK):
            part = slice(begin, begin + HEAD_CHUNK)
            logits = torch.mm(states[part], weight.T, out=buffer[: len(targets[part])])  # (chunk, vocabulary)
            parts = (x.split(rows) for x in (logits, targets[part], logprobs[part]))
            for some, target, logprob in zip(*parts, strict=True):
                p = some.softmax(dim=-1, dtype=torch.float32)  # (some, vocabulary)
                # log of the sum, from the likeliest token: its probability is never too small for a logarithm
                log_sum = some.amax(dim=-1, keepdim=True).float() - p.amax(dim=-1, keepdim=True).log()  # (some, 1)
                logprob.copy_((some.gather(1, target[:, None]).float() - log_sum)[:, 0])
                if ctx.needs_input_grad[0]:
                    some.copy_(p.neg_().scatter_add_(1, target[:, None], torch.ones_like(log_sum)))
            if ctx.needs_input_grad[0]:
                torch.mm(logits, weight, out=slopes[part])
        ctx.save_for_backward(slopes[:n])
        return logprobs[:n]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return (slopes * grads[0][:, None]).to(slopes.dtype), None, None
