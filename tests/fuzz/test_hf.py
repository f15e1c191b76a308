"""A Hugging Face folder from a stranger: weights, configuration, tokenizer and template may hold anything."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.children import Child
from tests.conftest import make_llama, make_qwen2
from tests.fuzz.fuzzing import amounts, fuzz, json_values, mutations
from workflows.conversion import write_checkpoint
from workflows.hf_reader import read_hf_dir

pytestmark = pytest.mark.rough

Files = dict[str, bytes]
WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
READ = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json")
OPTIONAL = ("special_tokens_map.json", "chat_template.json", "model.safetensors.index.json")


def convert(files: Files) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, contents in files.items():
            (Path(folder) / name).write_bytes(contents)
        (Path(folder) / "lit").mkdir()
        write_checkpoint(read_hf_dir(Path(folder)), Path(folder) / "lit", "a")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A small whole folder."""
    sizes: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    hf_dir = make_llama(tmp_path_factory.mktemp("hf") / "tiny", **sizes)
    return {path.name: path.read_bytes() for path in hf_dir.iterdir()}


def graceful(child: Child, files: Files) -> None:
    outcome = child.run(convert, files)
    assert outcome.is_graceful, outcome


def test_the_whole_folder_is_converted(child: Child, files: Files) -> None:
    assert child.run(convert, files).how == "returned"


def with_header(weights: bytes, header: Any, length: int | None = None) -> bytes:
    """A safetensors file with another header, whatever it says."""
    size = int.from_bytes(weights[:8], "little")
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + weights[8 + size :]


def headers(weights: bytes) -> st.SearchStrategy[bytes]:
    """Safetensors files whose header lies."""
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    names = st.sampled_from(list(header)) | st.text(max_size=8)
    number = st.sampled_from([0, 1, 2, 32, 384, 4096, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, -1])
    types = st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "F64", "BOOL", "U64", "F4", "C64", ""])
    entry = st.fixed_dictionaries(
        {
            "dtype": types,
            "shape": st.lists(number, max_size=5),
            "data_offsets": st.lists(number, min_size=2, max_size=2),
        }
    )
    shapeless = st.fixed_dictionaries({"dtype": types, "shape": st.just([0, 2**62]), "data_offsets": st.just([0, 0])})
    edited = st.dictionaries(names, entry | shapeless | json_values, min_size=1, max_size=3).map(
        lambda new: with_header(weights, {**header, **new})
    )
    length = st.tuples(st.just(header), number.filter(lambda n: 0 <= n < 2**64))
    return (
        edited
        | length.map(lambda pair: with_header(weights, *pair))
        | json_values.map(lambda value: with_header(weights, value))
    )


@amounts
def test_safetensors(amount: str, child: Child, files: Files) -> None:
    weights = files[WEIGHTS]
    size = 8 + int.from_bytes(weights[:8], "little")
    damaged = headers(weights) | mutations(weights, [*range(8), *range(8, size)])
    fuzz(amount, 80, damaged, lambda data: graceful(child, {**files, WEIGHTS: data}))


@amounts
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_weights(amount: str, legacy: bool, child: Child, files: Files, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(files[WEIGHTS])
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / PICKLED, _use_new_zipfile_serialization=not legacy)
    data = (tmp_path / PICKLED).read_bytes()
    rest = {name: contents for name, contents in files.items() if name != WEIGHTS}
    likely = [*range(3000), *range(len(data) - 3000, len(data))]
    fuzz(amount, 40, mutations(data, likely), lambda data: graceful(child, {**rest, PICKLED: data}))


def edited_json(contents: bytes) -> st.SearchStrategy[bytes]:
    """A JSON object with some of its values replaced, at the top or one level down."""
    whole = json.loads(contents)
    keys = (
        st.sampled_from([*whole, "rope_parameters", "rope_scaling", "rope_theta", "head_dim", "num_labels"]) | st.text()
    )

    def apply(edits: dict[str, Any]) -> bytes:
        value = {**whole, **edits}
        inner = {key: old for key, old in whole.items() if isinstance(old, dict)}
        for key, old in inner.items():
            if isinstance(edits.get(key), dict):
                value[key] = {**old, **edits[key]}
        return json.dumps(value).encode()

    rope = st.fixed_dictionaries(
        {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn"]) | json_values},
        optional={
            key: json_values | st.just(8.0)
            for key in (
                "rope_theta",
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            )
        },
    )
    return st.dictionaries(keys, json_values | rope, min_size=1, max_size=3).map(apply)


@amounts
def test_small_files(amount: str, child: Child, files: Files) -> None:
    """Other values, other types, cut or odd bytes, in every file that is read beside the weights."""
    edits = st.sampled_from(READ).flatmap(
        lambda name: st.tuples(st.just(name), edited_json(files[name]) | mutations(files[name]))
    )
    raw = st.binary(max_size=50) | st.sampled_from([b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000, b'"\\ud800"', b"NaN"])
    raw |= st.text().map(lambda text: json.dumps({"chat_template": text}).encode())
    anything = st.tuples(
        st.sampled_from([*READ, *OPTIONAL, "chat_template.jinja"]),
        raw | json_values.map(lambda value: json.dumps(value).encode()),
    )
    indexed = st.fixed_dictionaries({"weight_map": json_values | st.dictionaries(st.text(), json_values)})
    index = st.tuples(st.just(OPTIONAL[2]), indexed.map(lambda value: json.dumps(value).encode()))
    templates = st.recursive(json_values, lambda inner: st.lists(st.dictionaries(st.just("name"), inner)), max_leaves=3)
    template = st.tuples(
        st.just("tokenizer_config.json"), templates.map(lambda t: json.dumps({"chat_template": t}).encode())
    )

    def check(changes: list[tuple[str, bytes]]) -> None:
        kept = {name: contents for name, contents in files.items() if name != "chat_template.jinja"}
        graceful(child, {**(files if amount == "few" else kept), **dict(changes)})

    fuzz(amount, 80, st.lists(edits | anything | index | template, min_size=1, max_size=2), check)


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"num_hidden_layers": 10**9}, "refused"),
        ({"vocab_size": 10**12}, "refused"),
        ({"max_position_embeddings": 10**12}, "refused"),
        ({"hidden_size": None}, "refused"),
        ({"num_key_value_heads": 0}, "refused"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "refused"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "refused"),
        ({"architectures": {"0": "LlamaForCausalLM"}}, "refused"),
        ({"num_labels": 10**9}, "returned"),  # transformers would make so many names
    ],
)
def test_a_configuration_asks_for_too_much(changes: Any, how: str, child: Child, files: Files) -> None:
    config = {**json.loads(files["config.json"]), **changes}
    outcome = child.run(convert, {**files, "config.json": json.dumps(config).encode()})
    assert outcome.how == how, outcome


@amounts
def test_sizes_that_do_not_fit_the_weights(amount: str, child: Child, tmp_path: Path) -> None:
    """Configurations of which each value is plausible by itself."""
    hf_dir = make_qwen2(tmp_path / "tiny", num_hidden_layers=1)
    files = {path.name: path.read_bytes() for path in hf_dir.iterdir()}
    config = json.loads(files["config.json"])
    names = [name for name, value in config.items() if type(value) in (int, float)]
    sizes = st.dictionaries(
        st.sampled_from([*names, "head_dim"]), st.sampled_from([0, 1, 2, 3, 4, 12, 48, 512, 10**9]), min_size=1
    )

    def check(edits: dict[str, int]) -> None:
        graceful(child, {**files, "config.json": json.dumps({**config, **edits}).encode()})

    fuzz(amount, 40, sizes, check)
