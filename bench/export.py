"""`make bench-export`: memory and time of an export, at two model sizes.

Written are the Hugging Face directory and the q8_0 GGUF, as `make export` does before it turns to Ollama. The larger
model has a 1B Llama's shape and random weights: what is measured does not depend on their values.
"""

import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.harness import REPORTS, alternate, report, spread, tell, write_report
from workflows.errors import UserError, run_file

LIMIT_BYTES = 1_500_000_000
SHAPE_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
}
"""Llama-3.2-1B's (its embedding alone has 263 M weights)."""


def setup(
    checkpoint_dir: Path = Path("checkpoints/embedded/smollm2-135m-instruct"),
    rounds: int = 3,
    contender: Path | None = None,
) -> None:
    """Measure, and write out/bench/export.json.

    Args:
        checkpoint_dir: The small model.
        rounds: How often each size is exported, in turn.
        contender: Export only this checkpoint, once, in this process (used by the bench itself).

    Raises:
        UserError: If an export takes more memory than the limit.
    """
    if contender is not None:
        with contextlib.redirect_stdout(sys.stderr):
            measured = export_once(contender)
        tell(**measured)
        return
    large = random_checkpoint(checkpoint_dir, REPORTS / "llama-1b-shape", SHAPE_1B)
    sizes = {"135m": checkpoint_dir, "1b": large}
    runs = alternate("bench.export", [str(path) for path in sizes.values()], [], rounds)
    named = {"ours": runs[str(checkpoint_dir)]}
    settings = {"written": ["Hugging Face safetensors", "q8_0 GGUF"], "limit_bytes": LIMIT_BYTES, "rounds": rounds}
    reported = report("export", "MB of weights/s", settings, named)
    reported["sizes"] = {
        size: {
            "parameters": runs[str(path)][0]["parameters"],
            "seconds": spread([run["seconds"] for run in runs[str(path)]]),
            "peak_bytes": max(run["peak_bytes"] for run in runs[str(path)]),
        }
        for size, path in sizes.items()
    }
    write_report(reported)
    for size, row in reported["sizes"].items():
        print(f"  {size:<6}{row['parameters'] / 1e6:>8,.0f} M parameters {row['seconds']['median']:>7.1f} s "
              f"{row['peak_bytes'] / 1e9:>6.2f} GB")  # fmt: skip
    if over := [size for size, row in reported["sizes"].items() if row["peak_bytes"] > LIMIT_BYTES]:
        raise UserError(f"The export of {', '.join(over)} took more than {LIMIT_BYTES / 1e9} GB.")


def export_once(checkpoint_dir: Path) -> dict[str, Any]:
    """Export a checkpoint into a folder that is deleted again; the rate is in megabytes of the weights as stored."""
    from workflows.export import setup as export

    with TemporaryDirectory(dir=REPORTS) as folder:
        began = time.perf_counter()
        export(checkpoint_dir, name="bench", quantize="q8_0", out_dir=Path(folder), create=False)
        seconds = time.perf_counter() - began
    metrics = json.loads((checkpoint_dir / "metrics.json").read_text())["metrics"]
    facts = {row["name"]: row["value"] for row in metrics}
    return {"rate": facts["bytes"] / 1e6 / seconds, "seconds": seconds, "parameters": facts["parameters"]}


def random_checkpoint(like: Path, target: Path, shape: dict[str, int]) -> Path:
    """A checkpoint of a shape with random weights in bfloat16, made once; tokenizer and files as `like`."""
    from workflows.checkpoint import PROVENANCE, metric, write_metrics, write_provenance
    from workflows.conversion import LazyTensor, Source, write_checkpoint
    from workflows.files import atomic_dir, read_json

    if (target / PROVENANCE).is_file():
        return target
    config = {**read_json(like / "config.json"), **shape}
    width, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    groups = config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    layer = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (groups, width), "self_attn.v_proj": (groups, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    draw = partial(torch.Tensor.normal_, std=0.02, generator=torch.Generator().manual_seed(0))
    source = Source(
        place="random weights",
        config={**config, "tie_word_embeddings": True},
        tensors={name: LazyTensor(shape, torch.bfloat16, draw) for name, shape in shapes.items()},
        tokenizer_json=(like / "tokenizer.json").read_text(encoding="utf-8"),
        tokenizer_config=read_json(like / "tokenizer_config.json"),
        generation_config=read_json(like / "generation_config.json"),
        chat_template=(like / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    with atomic_dir(target) as folder:
        write_checkpoint(source, folder, target.name)
        rows = [
            metric("parameters", sum(torch.Size(shape).numel() for shape in shapes.values())),
            metric("bytes", (folder / "lit_model.pth").stat().st_size),
        ]
        write_metrics(folder / "metrics.json", rows, seconds=0.0)
        write_provenance(folder, "download", {"model": {"kind": "random"}}, {})
    return target


if __name__ == "__main__":
    run_file(setup)
