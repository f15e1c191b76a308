"""A LoRA adapter from a stranger: its configuration and its weights may hold anything."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from tests.children import Child
from tests.conftest import make_llama
from tests.fuzz.fuzzing import amounts, fuzz, json_values, mutations
from tests.fuzz.test_hf import headers
from workflows.conversion import write_checkpoint
from workflows.hf_reader import read_hf_dir
from workflows.peft_reader import is_adapter, merge_adapter

pytestmark = pytest.mark.rough

Files = dict[str, bytes]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def merge(files: Files) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, lit = (Path(folder) / name for name in ("base", "adapter", "lit"))
        for directory in (base, adapter, lit):
            directory.mkdir()
        for name, contents in files.items():
            (Path(folder) / name).write_bytes(contents)
        assert is_adapter(adapter)
        write_checkpoint(merge_adapter(adapter, read_hf_dir(base)), lit, "a")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A small base and an adapter for it."""
    sizes: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    hf_dir = make_llama(tmp_path_factory.mktemp("hf") / "tiny", **sizes)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": "x",
        "target_modules": ["q_proj"],
    }
    weights = {f"{LAYER}.lora_A.weight": torch.ones(2, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 2)}
    base = {f"base/{path.name}": path.read_bytes() for path in hf_dir.iterdir()}
    return base | {f"adapter/{CONFIG}": json.dumps(config).encode(), f"adapter/{WEIGHTS}": save(weights)}


def test_the_whole_adapter_is_merged(child: Child, files: Files) -> None:
    assert child.run(merge, files).how == "returned"


@amounts
def test_adapter_config(amount: str, child: Child, files: Files) -> None:
    whole = json.loads(files[f"adapter/{CONFIG}"])
    keys = st.sampled_from(
        [
            *whole,
            "alpha_pattern",
            "rank_pattern",
            "modules_to_save",
            "trainable_token_indices",
            "use_dora",
            "use_rslora",
        ]
    )
    patterns = st.dictionaries(
        st.text() | st.sampled_from(["q_proj", ".*proj", "(a+)+$", "["]), json_values, max_size=2
    )
    edited = st.dictionaries(keys | st.text(), json_values | patterns, min_size=1, max_size=3).map(
        lambda edits: json.dumps({**whole, **edits}).encode()
    )

    def check(contents: bytes) -> None:
        outcome = child.run(merge, {**files, f"adapter/{CONFIG}": contents})
        assert outcome.is_graceful, outcome

    fuzz(amount, 60, edited | mutations(files[f"adapter/{CONFIG}"]), check)


@amounts
def test_adapter_weights(amount: str, child: Child, files: Files) -> None:
    weights = files[f"adapter/{WEIGHTS}"]
    size = 8 + int.from_bytes(weights[:8], "little")

    def check(contents: bytes) -> None:
        outcome = child.run(merge, {**files, f"adapter/{WEIGHTS}": contents})
        assert outcome.is_graceful, outcome

    fuzz(amount, 60, headers(weights) | mutations(weights, [*range(size)]), check)
