"""The header of a GGUF file: its fields, and where its tensors lie.

Lengths, counts and offsets in a file are checked against its size before they are used, because the file may be cut
short, damaged or hostile: nothing is allocated, and no loop runs, for more than the file holds. (The `gguf` library's
own reader trusts them.) The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from workflows.errors import UserError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""`struct`'s letters for GGUF's types of numbers."""
_STRING, _ARRAY = 8, 9
_MOST_ITEMS, _MOST_BYTES, _MOST_SIZES = 1 << 22, 1 << 24, 4
"""Limits on arrays (the largest vocabularies have a quarter of a million tokens), texts and dimensions."""


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a mapped file.

    Attributes:
        shape: Its sizes, rows first.
        kind: How its elements are stored.
        data: Its bytes.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: np.ndarray


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Read fields and tensors by name; arrays are lists.

    Raises:
        UserError: If the file cannot be read, is not GGUF, or its header describes more than it holds.
    """
    try:
        with open(file, "rb") as f:
            magic = f.read(4)
            if magic == b"GGUF":
                # Read-only, and kept alive by the arrays of tensors that are views of it.
                return _Header(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)).read()
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}.") from None
    except ValueError as e:  # UnicodeDecodeError among them
        raise UserError(
            f"{file} is cut short or damaged: its header does not fit its {file.stat().st_size:,} bytes ({e}). "
            "Download it again."
        ) from None
    raise UserError(f"{file} is not a GGUF file (it does not begin with 'GGUF').")


class _Header:
    """A walk through the header. Every method raises a ValueError for what the file cannot mean."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        version = self._number(4)
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format; 2 and 3 are known")  # big-endian files look so, too
        tensor_count, field_count = self._number(10), self._number(10)
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            self._add(fields, self._text(), self._value(self._number(4)))
        infos: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(tensor_count):
            self._add(infos, self._text(), self._tensor_info())
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise ValueError(f"an alignment of {alignment!r}")
        start = -(-self.at // alignment) * alignment
        return fields, {name: self._tensor(start, *info) for name, info in infos.items()}

    def _add(self, known: dict[str, Any], name: str, value: Any) -> None:
        if name in known:
            raise ValueError(f"{name!r} twice")
        known[name] = value

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size:,} bytes wanted at {self.at:,}")
        self.at += size
        return self.data[self.at - size : self.at]

    def _number(self, kind: int) -> Any:
        letter = "<" + _NUMBERS[kind]
        return struct.unpack(letter, self._take(struct.calcsize(letter)))[0]

    def _text(self) -> str:
        if (size := self._number(10)) > _MOST_BYTES:
            raise ValueError(f"a text of {size:,} bytes at {self.at:,}")
        return self._take(size).decode()

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(kind)
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"a value of the unknown type {kind} at {self.at:,}")
        items, count = self._number(4), self._number(10)
        if count > _MOST_ITEMS:
            raise ValueError(f"an array of {count:,} values at {self.at:,}")
        if items == _STRING:
            return [self._text() for _ in range(count)]
        if items not in _NUMBERS:
            raise ValueError(f"an array of the unsupported type {items} at {self.at:,}")
        letters = f"<{count}{_NUMBERS[items]}"
        return list(struct.unpack(letters, self._take(struct.calcsize(letters))))

    def _tensor_info(self) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
        if not 0 < (count := self._number(4)) <= _MOST_SIZES:
            raise ValueError(f"a tensor with {count:,} sizes at {self.at:,}")
        sizes = [self._number(10) for _ in range(count)]
        return tuple(reversed(sizes)), GGMLQuantizationType(self._number(4)), self._number(10)

    def _tensor(self, start: int, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int) -> GGUFTensor:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"a row of {shape[-1]:,} elements in blocks of {block}")
        try:
            dequantize(np.zeros(block_bytes, np.uint8), kind)
        except NotImplementedError as e:
            raise ValueError(str(e)) from None
        size = shape[-1] // block * block_bytes
        for rows in shape[:-1]:
            size *= rows
        if size == 0:
            raise ValueError("a tensor without elements")
        if start + offset + size > len(self.data):
            raise ValueError(f"a tensor of {size:,} bytes at {start + offset:,}")
        return GGUFTensor(shape, kind, np.frombuffer(self.data, np.uint8, size, start + offset))
