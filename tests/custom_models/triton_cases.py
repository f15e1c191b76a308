"""The Triton kernels against SDPA, in a process that was started with TRITON_INTERPRET=1: python -m ... -> JSON.

Also `python -m tests.custom_models.triton_cases compile`, without that variable: compiles them for a GPU that is not
there, and says how much shared memory they take.
"""

import contextlib
import io
import json
import sys

import torch
import torch.nn.functional as F

from custom_models.attention import MultiHeadAttention, causal_mask, padding_mask
from custom_models.flash_attention import flash_attention_varlen
from workflows.errors import UserError

# batch, n_head, n_kv_head, Tq, Tk, head_size, causal, key_lengths
DENSE = {
    "one token": (1, 1, 1, 1, 1, 16, False, None),
    "no multiple of the block": (1, 2, 2, 70, 45, 16, False, None),
    "causal": (1, 2, 2, 70, 70, 16, True, None),
    "causal, more keys": (1, 1, 1, 20, 70, 16, True, None),
    "causal, queries that see nothing": (1, 1, 1, 50, 20, 16, True, None),
    "grouped": (2, 4, 2, 40, 40, 16, True, None),
    "odd head size": (1, 1, 1, 40, 40, 12, True, None),
    "head size 128": (1, 1, 1, 20, 40, 128, False, None),
    "padded": (3, 2, 1, 40, 40, 16, False, [40, 17, 0]),
    "padded and causal": (2, 2, 1, 40, 40, 16, True, [33, 1]),
    "float16": (1, 2, 1, 70, 70, 16, True, None),
}
# float16 is there for 16 bits; the interpreter reads the bits of a bfloat16 as an integer.
PACKED = {"packed": ([3, 1, 40, 0, 17], [5, 1, 33, 2, 9]), "packed, none": ([], [])}


def dense(batch, n_head, n_kv_head, tq, tk, size, causal, lengths, dtype):
    """Largest differences of output and gradients from SDPA's in float64."""
    from custom_models.flash_attention_triton import flash_attention_triton

    torch.manual_seed(0)
    shapes = (batch, n_head, tq, size), (batch, n_kv_head, tk, size), (batch, n_kv_head, tk, size)
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    dout = torch.randn(batch, n_head, tq, size, dtype=dtype)
    lengths = None if lengths is None else torch.tensor(lengths)
    mask = causal_mask(tq, tk) if causal else torch.ones(tq, tk, dtype=torch.bool)
    mask = mask if lengths is None else mask & padding_mask(lengths, tk)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    theirs = F.scaled_dot_product_attention(*exact, mask, enable_gqa=True)
    ours = flash_attention_triton(*inputs, causal=causal, key_lengths=lengths)
    return differences([ours, *torch.autograd.grad(ours, inputs, dout)],
                       [theirs, *torch.autograd.grad(theirs, exact, dout.double())])  # fmt: skip


def packed(lengths_q, lengths_k):
    """Largest differences from `flash_attention_varlen`, or from nothing at all where there are no texts."""
    from custom_models.flash_attention_triton import flash_attention_triton_varlen

    torch.manual_seed(0)
    ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k)]
    shapes = (sum(lengths_q), 4, 16), (sum(lengths_k), 2, 16), (sum(lengths_k), 2, 16)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    ours = flash_attention_triton_varlen(*inputs, *ends, causal=True)
    ours_grads = torch.autograd.grad(ours.square().sum(), inputs)
    if not lengths_q:
        return [float(x.numel()) for x in (ours, *ours_grads)]
    theirs = flash_attention_varlen(*inputs, *ends, causal=True)
    return differences([ours, *ours_grads], [theirs, *torch.autograd.grad(theirs.square().sum(), inputs)])


def layer():
    """The layer's "triton" backend against its "naive" one."""
    torch.manual_seed(0)
    ours, x = MultiHeadAttention(32, 4, 2, backend="triton"), torch.randn(2, 20, 32)
    out, _ = ours(x, causal=True)
    ours.backend = "naive"
    return differences([out], [ours(x, causal=True)[0]])


def refusals():
    """What it says to what it cannot do."""
    from custom_models.flash_attention_triton import flash_attention_triton

    told, x = {}, torch.randn(1, 1, 4, 16)
    for name, v in (("value size", torch.randn(1, 1, 4, 8)), ("shape", torch.randn(1, 1, 5, 16))):
        try:
            flash_attention_triton(x, x, v)
        except UserError as e:
            told[name] = str(e)
    try:
        flash_attention_triton(x.double(), x.double(), x.double())
    except UserError as e:
        told["dtype"] = str(e)
    return told


def program():
    """What it prints to a learner."""
    from custom_models.flash_attention_triton import main

    with contextlib.redirect_stdout(io.StringIO()) as told:
        main()
    return told.getvalue()


def differences(ours, theirs):
    return [float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True)]


def compiled(dtype, head_size, capability=80):
    """Shared memory of the three kernels, in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget

    from custom_models import flash_attention_triton as kernels

    sizes = kernels.constants(8, 2, head_size, True, dtype)
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    others = {"total": "i32", "scale": "fp32", "sequences": "*i32", "lse": "*fp32", "d": "*fp32"}
    taken = {}
    for kernel in (kernels._forward, kernels._backward_q, kernels._backward_kv):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in sizes else others.get(name, pointer) for name in names}
        values = {(names.index(name),): value for name, value in sizes.items()}
        source = triton.compiler.ASTSource(kernel, signature, constexprs=values)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert binary.asm["cubin"]
        taken[kernel.__name__] = binary.metadata.shared
    return taken


def run():
    if "compile" in sys.argv:
        found = {f"{dtype}, {size}": compiled(dtype, size)
                 for size, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16),
                                     (64, torch.float32), (256, torch.float32))}  # fmt: skip
    else:
        found = {name: dense(*case, torch.float16 if name == "float16" else torch.float32)
                 for name, case in DENSE.items()}  # fmt: skip
        found |= {name: packed(*case) for name, case in PACKED.items()}
        found |= {"layer": layer(), "refusals": refusals(), "program": program()}
    print(json.dumps(found))


if __name__ == "__main__":
    run()
