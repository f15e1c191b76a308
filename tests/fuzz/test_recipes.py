"""Recipes and settings in YAML: bombs of anchors, tags that name Python objects, values of other types and sizes."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from tests.children import Child
from tests.fuzz.fuzzing import amounts, fuzz, huge, json_values, mutations, words
from workflows import export, lora
from workflows.__main__ import parse_all
from workflows.checkpoint import load_config
from workflows.merge import read_hyperparameters
from workflows.plan import require_room
from workflows.training.model import LoRAArgs, empty_model

pytestmark = pytest.mark.rough

RECIPE = Path("workflows/recipes/default/lora.yaml")


def parse(step: str, text: bytes) -> None:
    """What `python -m workflows STEP --config FILE` makes of a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(text)
        setup = {"lora": lora.setup, "export": export.setup}[step]
        parse_all(setup, ["--config", str(file), "--checkpoint_dir", "c"], step)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
BOMBS = {
    "lists": BOMB,
    "lists under a known key": BOMB.replace("a39:", "kinds:"),
    "mappings": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 40)),
    "mappings under a known key": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 40))
    + "train: *a39\n",
    "merged mappings": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)),
    "anchors given anew": "a: &a [x, x]\n" + "".join(f"a{i}: &a [*a, *a]\n" for i in range(40)),
    "itself": "kinds: &a [*a]\n",
    "itself as a mapping": "train: &a {x: *a}\n",
    "as a key": "? &a [x]\n: *a\n",
    "deep lists": "kinds: " + "[" * 10_000 + "]" * 10_000,
    "deep mappings": "train: " + "{a: " * 5000 + "1" + "}" * 5000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(2000)),
    "a long number": "lora_r: " + "9" * 5000,
    "a long base 60 number": "lora_r: " + ":".join(["59"] * 5000),
    "a number beyond floats": "train: {learning_rate: 1" + "0" * 400 + "}",
    "a Python object": "lora_r: !!python/object/apply:os.system ['touch payload-ran']",
    "a Python name": "lora_r: !!python/name:os.system",
    "a class path": "train: {class_path: os.system, init_args: {command: touch payload-ran}}",
    "a class path of another class": "train: {class_path: subprocess.Popen, init_args: {args: [touch, payload-ran]}}",
    "a set": "kinds: !!set {a, b}",
    "binary": "kinds: !!binary aGVsbG8=",
    "a date": "kinds: 2024-01-01",
    "several documents": "lora_r: 1\n---\nlora_r: 2\n",
    "a list": "- 1\n- 2\n",
    "a text": "text",
    "nothing": "",
    "a tab": "a:\n\t- 1",
    "no UTF-8": "\udcff\udcfe",
    "UTF-16": "\ufeffl\0o\0",
    "control characters": "a: \x00\x01",
    "an empty group": "train: null",
    "a list for a group": "train: []",
    "a file that names itself": "config: recipe.yaml",
    "a file under a key": "train: /etc/passwd",
    "an address": "config: http://127.0.0.1:1/",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, child: Child) -> None:
    """A file of a few bytes must not fill the memory, run code or hang."""
    outcome = child.run(parse, "lora", BOMBS[name].encode("utf-8", "surrogateescape"), seconds=10, memory=1 << 29)
    assert outcome.is_graceful, outcome
    assert len(outcome.text) < 3000
    assert not Path("payload-ran").exists()


known = yaml.safe_load(RECIPE.read_text())
KEYS = ["train", "kinds", "lora_r", "seed", "loggers", "precision", "devices", "resume", "data", "quantize"]
keys = words | st.sampled_from(KEYS)
train_keys = st.sampled_from([*known["train"], "global_batch_size", "lr_schedule"]) | st.text(max_size=5)
values = json_values | st.dictionaries(train_keys, json_values, max_size=3)
recipes = st.dictionaries(keys, values, max_size=4).map(lambda edits: yaml.dump({**known, **edits}).encode())
recipes |= json_values.map(lambda value: yaml.dump(value).encode())
recipes |= mutations(RECIPE.read_bytes())
SYNTAX = [*"[]{}:,&*!|>?-#%@'\"\n \t", "a", "1", "&a ", "*a", "<<", "!!int", "~", "\\x", "é"]
syntax = st.lists(st.sampled_from(SYNTAX), max_size=30)
recipes |= syntax.map(lambda parts: "".join(parts).encode())


@amounts
def test_any_recipe(amount: str, child: Child) -> None:
    def check(given: tuple[str, bytes]) -> None:
        outcome = child.run(parse, *given)
        assert outcome.is_graceful, outcome

    fuzz(amount, 60, st.tuples(st.sampled_from(["lora", "export"]), recipes), check)


IMPOSSIBLE = [
    "train: {global_batch_size: 1000000000000}",
    "train: {max_steps: -1}",
    "train: {row_tokens: 0}",
    "train: {max_seq_length: 1000000000000}",
    "train: {learning_rate: .nan}",
    "train: {learning_rate: .inf}",
    "train: {min_lr: -1}",
    "train: {weight_decay: -1}",
    "train: {beta1: 2}",
    "train: {beta2: .nan}",
    "train: {max_norm: .nan}",
    "train: {lr_warmup_steps: 1000000}",
    "train: {save_interval: 0}",
    "seed: 1" + "0" * 30,
    "seed: -1",
    "lora_r: 1000000000000",
    "lora_alpha: -1",
    "lora_dropout: 1.5",
    "lora_dropout: .nan",
    "max_val_rows: -1",
    "max_val_rows: 0",
    "devices: 1000000",
    "num_nodes: 1000000",
    "kinds: []",
    "data: /dev/zero",
    'out_dir: "a\\0b"',
]


def train(checkpoint: Path, data: Path, text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_text(text)
        args = ["--checkpoint_dir", str(checkpoint), "--data", str(data), "--out_dir", folder]
        arguments = parse_all(lora.setup, [*args, "--config", str(Path(folder) / "recipe.yaml")], "lora")
        arguments.pop("ignore_plan")
        require_room("lora", vars(arguments))
        lora.setup(**arguments)


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_settings_that_cannot_be(text: str, child: Child, tiny_llama: Path, tmp_path: Path) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(row + "\n")
    outcome = child.run(train, tiny_llama, tmp_path, text, memory=1 << 29)
    assert outcome.how == "refused", outcome


def configure(checkpoint: Path, text: bytes) -> None:
    """What every step does with `model_config.yaml`, up to the model without its weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model_config.yaml").write_bytes(text)
        load_config(Path(folder))
        empty_model(Path(folder), LoRAArgs())


@amounts
def test_any_model_config(amount: str, child: Child, tiny_llama: Path) -> None:
    whole = (tiny_llama / "model_config.yaml").read_bytes()
    config = yaml.safe_load(whole)
    sizes = st.sampled_from([0, 1, 2, 3, 7, -1, 10**9, 1.5, 2**63]) | huge | json_values
    edits = st.dictionaries(st.sampled_from(list(config)) | st.text(max_size=5), sizes, max_size=3)
    texts = edits.map(lambda edits: yaml.dump({**config, **edits}).encode()) | mutations(whole) | recipes
    texts |= st.sampled_from([text.encode("utf-8", "surrogateescape") for text in BOMBS.values()])

    def check(text: bytes) -> None:
        outcome = child.run(configure, tiny_llama, text)
        assert outcome.is_graceful, outcome

    fuzz(amount, 80, texts, check)


def hyperparameters(text: bytes) -> Any:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "hyperparameters.yaml").write_bytes(text)
        return str(LoRAArgs.from_settings(read_hyperparameters(folder)))[:1000]
    finally:
        shutil.rmtree(folder)


@amounts
def test_any_hyperparameters(amount: str, child: Child) -> None:
    whole = {"checkpoint_dir": "c", "lora_r": 4, "lora_alpha": 8, "lora_query": True, "lora_dropout": 0.0}
    edits = st.dictionaries(st.sampled_from(list(whole)), json_values, max_size=3)
    texts = edits.map(lambda edits: yaml.dump({**whole, **edits}).encode()) | recipes
    texts |= st.sampled_from([text.encode("utf-8", "surrogateescape") for text in BOMBS.values()])

    def check(text: bytes) -> None:
        outcome = child.run(hyperparameters, text)
        assert outcome.is_graceful, outcome

    fuzz(amount, 60, texts, check)
