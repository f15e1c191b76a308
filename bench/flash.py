"""`make bench-flash`: time and memory of our FlashAttention in plain PyTorch against attention as the textbook has it.

Both compute the same, forward alone and with the backward pass, over texts of several lengths; PyTorch's own kernel
runs along for reference. Extra memory is the peak less what was there before the call and less what the result and the
gradients take. Besides out/bench/flash.json this draws the curves, out/bench/flash.png.
"""

import ctypes
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.harness import REPORTS, alternate, report, spread
from custom_models.attention import causal_mask, scaled_dot_product_attention
from custom_models.flash_attention import BLOCK_K, BLOCK_Q, flash_attention
from workflows.errors import run_file
from workflows.files import atomic_file, write_json
from workflows.measure import PeakMemory

CONTENDERS = ["ours", "naive", "sdpa"]
PASSES = {"forward": "forward", "forward_backward": "forward and backward"}
WARM_UP_LENGTH = 64
HEAD_SIZE = 64
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # their numbers in glibc's malloc.h
MEMORY_SHARE, TIME_FACTOR = 1 / 20, 2.0
"""Promised at 8,192 tokens: at most this share of the naive way's extra memory, and at most this times its time."""


def setup(
    lengths: list[int] | None = None,
    n_head: int = 2,
    causal: bool = False,
    rounds: int = 3,
    seconds: float = 1.5,
    contender: str | None = None,
    length: int = 0,
) -> None:
    """Measure, write out/bench/flash.json and draw out/bench/flash.png.

    Args:
        lengths: Tokens of the texts; 1,024, 2,048, 4,096 and 8,192 if not given.
        n_head: Heads of 64. The naive way needs about five times n_head * length^2 * 4 bytes.
        causal: With a causal mask. Ours then leaves out half of the work, so that without is the harder comparison.
        rounds: How often each contender runs at each length, in turn.
        seconds: For how long a contender repeats a pass within one round, at least.
        contender: Run only this one, once, in this process (used by the bench itself).
        length: The text's length then.
    """
    if contender is not None:
        print(json.dumps(measure(contender, length, n_head, causal, seconds)))
        return
    lengths = sorted(lengths or [1024, 2048, 4096, 8192])
    options = ["--n_head", str(n_head), "--causal", str(causal).lower(), "--seconds", str(seconds)]
    runs = {n: alternate("bench.flash", CONTENDERS, ["--length", str(n), *options], rounds) for n in lengths}
    settings = {
        "lengths": lengths, "batch": 1, "n_head": n_head, "head_size": HEAD_SIZE, "causal": causal, "rounds": rounds,
        "precision": "32-true", "block_q": BLOCK_Q, "block_k": BLOCK_K,
    }  # fmt: skip
    reported = report("flash", "tokens/s, forward and backward, of the longest text", settings, runs[lengths[-1]])
    curves = {str(n): {name: summary(runs[n][name]) for name in CONTENDERS} for n in lengths}
    reported |= {"curves": curves, "growth": growth(curves), "promises": promises(curves[str(lengths[-1])])}
    write_json(REPORTS / "flash.json", reported)
    draw(reported, REPORTS / "flash.png")
    show(reported)


def measure(contender: str, length: int, n_head: int, causal: bool, seconds: float) -> dict[str, Any]:
    """Seconds and extra bytes of both passes, in this process.

    Returns:
        For each pass the fastest repetition's seconds and the extra bytes at the peak; `rate` is tokens per second of
        forward and backward.
    """
    attend(contender, *inputs(WARM_UP_LENGTH, n_head), causal=causal).sum().backward()  # libraries load, threads start
    torch.manual_seed(0)
    q, k, v = inputs(length, n_head)  # (1, n_head, T, HEAD_SIZE) each
    dout = torch.randn_like(q)  # (1, n_head, T, HEAD_SIZE)

    def forward() -> None:
        with torch.no_grad():
            attend(contender, q, k, v, causal)

    def forward_backward() -> None:
        torch.autograd.grad(attend(contender, q, k, v, causal), (q, k, v), dout)

    passes = {"forward": (forward, 1), "forward_backward": (forward_backward, 4)}  # and how many results they have
    measured: dict[str, Any] = {}
    keep_freed_memory(up_to=64 * 1024)  # none: what malloc holds in reserve is not a need
    with PeakMemory() as before:
        time.sleep(PeakMemory.INTERVAL)
    for name, (run, results) in passes.items():
        with PeakMemory() as during:
            # Often enough for the sampling to meet the highest point of a pass that is shorter than its interval.
            repeat(run, seconds)
        measured[name] = {"extra_bytes": max(0, during.bytes - before.bytes - results * q.nbytes)}
    keep_freed_memory(up_to=32 * 1024**2)  # where glibc's own rule arrives; without it every block costs page faults
    for name, (run, _) in passes.items():
        measured[name]["seconds"] = min(repeat(run, seconds))
    return {"rate": length / measured["forward_backward"]["seconds"], **measured}


def repeat(run: Callable[[], None], seconds: float) -> list[float]:
    """Seconds of each run, of which there are two at least and as many as fit into `seconds`."""
    taken: list[float] = []
    while sum(taken) < seconds or len(taken) < 2:
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return taken


def keep_freed_memory(up_to: int) -> None:
    """Have malloc keep freed blocks of up to so many bytes in reserve, and give larger ones back (glibc only)."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, up_to)
        library.mallopt(M_TRIM_THRESHOLD, 2 * up_to)
        library.malloc_trim(0)


def inputs(length: int, n_head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, (1, n_head, length, HEAD_SIZE) each."""
    q, k, v = (torch.randn(1, n_head, length, HEAD_SIZE, requires_grad=True) for _ in range(3))
    return q, k, v


def attend(contender: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """The contender's attention, (1, n_head, T, HEAD_SIZE)."""
    if contender == "ours":
        return flash_attention(q, k, v, causal=causal)
    if contender == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return scaled_dot_product_attention(q, k, v, causal_mask(q.shape[2], k.shape[2]) if causal else None)[0]


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The spread of a contender's seconds, and the largest of its extra memories, for both passes."""
    return {
        name: {
            "seconds": spread([run[name]["seconds"] for run in rounds]),
            "extra_bytes": max(run[name]["extra_bytes"] for run in rounds),
        }
        for name in PASSES
    }


def growth(curves: dict[str, Any]) -> dict[str, Any]:
    """How the extra memory of forward and backward grows with the length T.

    Returns:
        For each contender the exponent p of bytes ~ T^p between the shortest and the longest text (1 is linear, 2
        quadratic), and a straight line through all lengths by least squares: bytes per token, and bytes at T = 0.
    """
    grown = {}
    lengths = torch.tensor([float(n) for n in curves], dtype=torch.float64)
    for name in CONTENDERS:
        extra = [max(1, row[name]["forward_backward"]["extra_bytes"]) for row in curves.values()]
        values = torch.tensor(extra, dtype=torch.float64)
        slope, offset = 0.0, float(values.mean())
        if len(lengths) > 1:
            centred = lengths - lengths.mean()
            slope = float((centred * values).sum() / centred.square().sum())
            offset -= slope * float(lengths.mean())
        exponent = math.log(extra[-1] / extra[0]) / math.log(float(lengths[-1] / lengths[0])) if slope else 0.0
        grown[name] = {"exponent": exponent, "bytes_per_token": slope, "bytes_at_zero": offset}
    return grown


def promises(longest: dict[str, Any]) -> dict[str, Any]:
    """Ours against naive for the longest text: share of its extra memory, and of its time (medians)."""
    kept: dict[str, Any] = {}
    for name in PASSES:
        ours, naive = longest["ours"][name], longest["naive"][name]
        memory = ours["extra_bytes"] / max(1, naive["extra_bytes"])
        seconds = ours["seconds"]["median"] / naive["seconds"]["median"]
        kept[name] = {"memory_share": memory, "time_factor": seconds,
                      "kept": memory <= MEMORY_SHARE and seconds <= TIME_FACTOR}  # fmt: skip
    return kept


def draw(reported: dict[str, Any], path: Path) -> None:
    """Time and extra memory over the length, both axes logarithmic, one line per contender and pass."""
    import matplotlib

    matplotlib.use("Agg")  # no window: a picture in a file
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    lengths = [int(n) for n in reported["curves"]]
    names = {"ours": "ours (flash_attention.py)", "naive": "naive (T × T scores)", "sdpa": "PyTorch's SDPA"}
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for name, colour in zip(CONTENDERS, ("tab:blue", "tab:red", "tab:gray"), strict=True):
        for part, line in (("forward_backward", "o-"), ("forward", "s--")):
            rows = [row[name][part] for row in reported["curves"].values()]
            label = f"{names[name]}, {PASSES[part]}"
            panels[0].plot(lengths, [row["seconds"]["median"] for row in rows], line, color=colour, label=label)
            panels[1].plot(lengths, [row["extra_bytes"] / 1e6 or math.nan for row in rows], line, color=colour)
    for panel, title, unit in zip(panels, ("Time", "Peak extra memory"), ("seconds", "megabytes"), strict=True):
        panel.set(xscale="log", yscale="log", title=title, xlabel="tokens", ylabel=unit)
        panel.set_xticks(lengths, [f"{n:,}" for n in lengths])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        panel.grid(True, which="both", alpha=0.3)
    hardware, settings = reported["hardware"], reported["settings"]
    figure.suptitle(
        f"Attention, {settings['n_head']} heads of {settings['head_size']}, float32, "
        f"{'causal' if settings['causal'] else 'not causal'}; {hardware['cpu']}, {hardware['threads']} threads"
    )
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def show(reported: dict[str, Any]) -> None:
    """Print the curves as a table, how they grow, and whether the promises are kept."""
    for part, told in PASSES.items():
        print(f"\nflash, {told}" + "".join(f"{name:>22}" for name in CONTENDERS))
        for n, row in reported["curves"].items():
            cells = (f"{row[name][part]['seconds']['median']:.3f} s {row[name][part]['extra_bytes'] / 1e6:,.0f} MB"
                     for name in CONTENDERS)  # fmt: skip
            print(f"{int(n):>{len(told) + 7},}" + "".join(f"{cell:>22}" for cell in cells))
    print("\nextra memory, forward and backward:")
    for name, row in reported["growth"].items():
        print(
            f"  {name:<6} grows as T^{row['exponent']:.2f}; straight line: {row['bytes_per_token']:,.0f} bytes a token"
        )
    for part, row in reported["promises"].items():
        verdict = "kept" if row["kept"] else "NOT kept"
        print(f"{PASSES[part]}, longest text: memory {row['memory_share']:.4f} of naive's (promised: "
              f"{MEMORY_SHARE}), time {row['time_factor']:.2f} times (promised: {TIME_FACTOR}): {verdict}")  # fmt: skip
    print(f"\n{REPORTS / 'flash.json'}, {REPORTS / 'flash.png'}")


if __name__ == "__main__":
    run_file(setup)
