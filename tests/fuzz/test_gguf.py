"""A GGUF file from a stranger: lengths, types, names and offsets that lie."""

import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import strategies as st

from tests.children import Child
from tests.conftest import make_llama
from tests.fuzz.fuzzing import amounts, fuzz, mutations
from tests.workflows.gguf_files import write_gguf
from workflows.conversion import write_checkpoint
from workflows.gguf_reader import read_gguf

pytestmark = pytest.mark.rough

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's numbers for the types of values, and `struct`'s letters for them; 8 is a string, 9 an array."""

Field = tuple[str, int, Any]
"""A name, the number of a type, and a value; of an array (type of items, items)."""
Tensor = tuple[str, list[int], int, int]
"""A name, sizes, the number of a type, and an offset."""


def convert(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.gguf").write_bytes(data)
        (Path(folder) / "lit").mkdir()
        write_checkpoint(read_gguf(Path(folder) / "a.gguf"), Path(folder) / "lit", "a")


def packed(fields: list[Field], tensors: list[Tensor], weights: bytes) -> bytes:
    """A GGUF file of these parts, whatever they say."""

    def text(value: str) -> bytes:
        raw = value.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(raw)) + raw

    def packed_value(kind: int, value: Any) -> bytes:
        if kind == 8:
            return text(value)
        if kind == 9:
            items, values = value
            return struct.pack("<IQ", items, len(values)) + b"".join(packed_value(items, item) for item in values)
        return struct.pack("<" + SCALARS[kind], value)

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for name, kind, value in fields:
        out += text(name) + struct.pack("<I", kind) + packed_value(kind, value)
    for name, sizes, kind, offset in tensors:
        out += text(name) + struct.pack("<I", len(sizes)) + b"".join(struct.pack("<Q", size) for size in sizes)
        out += struct.pack("<IQ", kind, offset)
    return out + b"\0" * (-len(out) % 32) + weights


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Field], list[Tensor], bytes]:
    """A small whole file, taken apart."""
    folder = tmp_path_factory.mktemp("gguf")
    hf_dir = make_llama(folder / "hf", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    file = write_gguf(hf_dir, folder / "whole.gguf")
    reader = gguf.GGUFReader(file)
    fields: list[Field] = []
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        kind, value = int(field.types[0]), field.contents()
        fields.append((name, kind, (int(field.types[-1]), value) if kind == 9 else value))
    tensors = [
        (t.name, t.shape.tolist(), int(t.tensor_type), t.data_offset - reader.data_offset) for t in reader.tensors
    ]
    whole = file.read_bytes()
    weights = whole[reader.data_offset :]
    shutil.rmtree(folder)
    assert packed(fields, tensors, weights) == whole
    return fields, tensors, weights


def values(kind: int) -> st.SearchStrategy[Any]:
    """Values that fit a type, extreme ones among them."""
    if kind == 8:
        return st.sampled_from(["", "gpt2", "llama", "none", "linear", "\0", "{% for"]) | st.text(max_size=30)
    if kind == 9:
        item = st.sampled_from([*SCALARS, 8])
        return item.flatmap(lambda i: st.tuples(st.just(i), st.lists(values(i), max_size=5)))
    if kind == 7:
        return st.booleans()
    if kind in (6, 12):
        return st.floats(width=32) | st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 1e30])
    bits = 8 * struct.calcsize("<" + SCALARS[kind])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if SCALARS[kind].islower() else (0, 2**bits - 1)
    return st.sampled_from([low, high, 0, 1, min(high, 10**9)]) | st.integers(low, high)


LIES: dict[str, Callable[[list[Field], list[Tensor]], None]] = {
    "an array of 2^62 bytes": lambda fields, _: fields.append(("x", 9, (0, Endless(1 << 62)))),
    "an array of 2^62 texts": lambda fields, _: fields.append(("x", 9, (8, Endless(1 << 62)))),
    "an array of arrays": lambda fields, _: fields.append(("x", 9, (9, [(0, [])]))),
    "a tensor of 2^64 elements": lambda _, tensors: tensors.append(("x", [1 << 32, 1 << 32], 0, 0)),
    "a tensor without elements": lambda _, tensors: tensors.append(("x", [0, 1 << 63], 0, 0)),
    "a tensor with 2^20 sizes": lambda _, tensors: tensors.append(("x", [1] * (1 << 20), 0, 0)),
    "a tensor beyond the end": lambda _, tensors: tensors.append(("x", [1], 0, 1 << 62)),
    "a type that cannot be read": lambda _, tensors: tensors.append(("x", [1], 24, 0)),
    "4 billion layers": lambda fields, _: change(fields, "llama.block_count", (1 << 32) - 1),
    "no heads": lambda fields, _: change(fields, "llama.attention.head_count", 0),
    "heads of 4 billion": lambda fields, tensors: (
        fields.append(("llama.attention.key_length", 4, (1 << 32) - 2)),
        tensors.append(("rope_freqs.weight", [1], 0, 0)),
    ),
    "an end of text that is no token": lambda fields, _: change(fields, "tokenizer.ggml.eos_token_id", 1 << 31),
    "a theta that is no number": lambda fields, _: change(fields, "llama.rope.freq_base", float("nan")),
}


class Endless(list[Any]):
    """A list that claims another length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def change(fields: list[Field], name: str, value: Any) -> None:
    (index,) = (i for i, field in enumerate(fields) if field[0] == name)
    fields[index] = (name, fields[index][1], value)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie(lie: str, child: Child, parts: tuple[list[Field], list[Tensor], bytes]) -> None:
    """Found by the tests below, or aimed at: each made a reader hang, fill the memory or trip over its own feet."""
    fields, tensors, weights = parts
    fields, tensors = list(fields), list(tensors)
    LIES[lie](fields, tensors)
    outcome = child.run(convert, packed(fields, tensors, weights))
    assert outcome.how == "refused", outcome


typed = st.sampled_from([*SCALARS, 8, 9]).flatmap(lambda kind: st.tuples(st.just(kind), values(kind)))
sizes = st.lists(st.sampled_from([0, 1, 2, 32, 48, 384, 2**31, 2**32, 2**63, 2**64 - 1]), max_size=5)


def edits(fields: list[Field], tensors: list[Tensor]) -> st.SearchStrategy[tuple[list[Field], list[Tensor]]]:
    """Fields and tensors with a few of them replaced, doubled, dropped or added."""
    names = st.sampled_from([name for name, _, _ in fields] + ["llama.expert_count", "llama.rope.scaling.type"])
    names |= st.sampled_from(["tokenizer.ggml.eot_token_id", "llama.attention.key_length", "general.alignment"])
    tensor_names = st.sampled_from([name for name, *_ in tensors] + ["rope_freqs.weight", "", ".", "blk", "blk.x.y.z"])
    of_field = st.tuples(names, typed).map(lambda new: ("field", new))
    same_type = st.sampled_from(fields).flatmap(
        lambda f: values(f[1]).map(lambda value: ("field", (f[0], (f[1], value))))
    )
    items = st.sampled_from([f for f in fields if f[1] == 9]).flatmap(
        lambda f: st.tuples(st.integers(0, len(f[2][1]) - 1), values(f[2][0])).map(lambda new: ("item", (f[0], *new)))
    )
    of_tensor = st.tuples(
        tensor_names, sizes, st.integers(0, 45), st.sampled_from([0, 1, 32, 10**6, 2**63, 2**64 - 32])
    ).map(lambda new: ("tensor", new))
    drop = st.tuples(st.sampled_from(["drop field", "double field"]), names)
    drop_tensor = st.tuples(st.sampled_from(["drop tensor", "double tensor"]), tensor_names)

    def apply(steps: list[tuple[str, Any]]) -> tuple[list[Field], list[Tensor]]:
        new_fields, new_tensors = {f[0]: [f] for f in fields}, {t[0]: [t] for t in tensors}
        for kind, what in steps:
            if kind == "field":
                new_fields[what[0]] = [(what[0], *what[1])]
            elif kind == "item":
                name, index, value = what
                for _, kind_there, old in new_fields.get(name, [])[:1]:
                    if kind_there == 9 and old[0] == 8 and index < len(old[1]):
                        new_fields[name] = [(name, 9, (8, [*old[1][:index], str(value), *old[1][index + 1 :]]))]
            elif kind == "tensor":
                new_tensors[what[0]] = [what]
            elif "field" in kind:
                new_fields[what] = [] if "drop" in kind else new_fields.get(what, []) * 2
            else:
                new_tensors[what] = [] if "drop" in kind else new_tensors.get(what, []) * 2
        return [*chain(*new_fields.values())], [*chain(*new_tensors.values())]

    step = st.one_of(of_field, same_type, items, of_tensor, drop, drop_tensor)
    return st.lists(step, min_size=1, max_size=4).map(apply)


@amounts
def test_damaged_bytes(amount: str, child: Child, parts: tuple[list[Field], list[Tensor], bytes]) -> None:
    fields, tensors, weights = parts
    whole = packed(fields, tensors, weights)
    header = len(whole) - len(weights)
    likely = [*range(24, 700), *range(header - 700, header), *range(4, 24)]

    def check(data: bytes) -> None:
        outcome = child.run(convert, data)
        assert outcome.is_graceful, outcome

    fuzz(amount, 80, mutations(whole, likely), check)


@amounts
def test_lying_fields_and_tensors(amount: str, child: Child, parts: tuple[list[Field], list[Tensor], bytes]) -> None:
    fields, tensors, weights = parts

    def check(edited: tuple[list[Field], list[Tensor]]) -> None:
        outcome = child.run(convert, packed(*edited, weights))
        assert outcome.is_graceful, outcome

    fuzz(amount, 100, edits(fields, tensors), check)
