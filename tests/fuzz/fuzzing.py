"""How the fuzz tests run: a few examples that are always the same, or (marked slow) many with a seed that is printed.

The property is always the same: hostile input gives a result or one message, within limits of time and memory; never a
traceback, a hang, a crash or a memory blow-up.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

LONGER = 40
"""How many times as many examples the slow runs have."""

amounts = pytest.mark.parametrize("amount", ["few", pytest.param("many", marks=pytest.mark.slow)])


def fuzz(amount: str, examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Check a property on generated inputs."""
    few = amount == "few"
    number = random.SystemRandom().randrange(2**32)
    if not few:
        print(f"seed {number}")
    run = settings(
        max_examples=examples if few else examples * LONGER,
        derandomize=few,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(check))
    (run if few else seed(number)(run))()


def mutations(whole: bytes, interesting: list[int] | None = None) -> st.SearchStrategy[bytes]:
    """Damaged versions of a file: bits flipped, numbers replaced by extreme ones, parts cut out, doubled or swapped.

    Args:
        whole: The file.
        interesting: Offsets where damage is likelier to matter, e.g. of lengths.
    """
    offset = st.integers(0, max(0, len(whole) - 1))
    if interesting:
        offset = st.sampled_from(interesting) | offset
    powers = [(1 << n).to_bytes(8, "little") for n in range(64)]
    extreme = st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\xff" * 4, b"\xff" * 7 + b"\x7f", *powers])
    replace = st.tuples(st.just("replace"), offset, extreme | st.binary(min_size=1, max_size=9))
    flip = st.tuples(st.just("flip"), offset, st.integers(0, 7))
    cut = st.tuples(st.just("cut"), offset, st.integers(1, 64))
    double = st.tuples(st.just("double"), offset, st.integers(1, 64))
    end = st.tuples(st.just("end"), offset, st.none())

    def apply(steps: list[tuple[str, int, Any]]) -> bytes:
        data = bytearray(whole)
        for kind, at, what in steps:
            if kind == "replace":
                data[at : at + len(what)] = what
            elif kind == "flip" and at < len(data):
                data[at] ^= 1 << what
            elif kind == "cut":
                del data[at : at + what]
            elif kind == "double":
                data[at:at] = data[at : at + what]
            elif kind == "end":
                del data[at:]
        return bytes(data)

    return st.lists(st.one_of(replace, flip, cut, double, end), min_size=1, max_size=4).map(apply)


huge = st.sampled_from([-(2**63), -1, 0, 2**31, 2**32 - 1, 2**63, 10**12, 10**30, 1e308, float("nan"), float("inf")])
words = st.sampled_from(["", " ", "\0", "a" * 5000, "\ue000content\ue001", "<|im_end|>", "\u202e", "é漢🙂", "../../x"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | huge | words | st.text(max_size=20)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
"""Any JSON value: other types than expected, extreme numbers, odd texts, some nesting."""
