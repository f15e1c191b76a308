"""A configuration takes from a file what its fields can be, and says by the file's names what they cannot."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from custom_models.configuration import configured
from workflows.errors import UserError


@dataclass
class Part:
    n: int = 1


@dataclass
class Shape:
    width: int
    n_layer: int = 2
    eps: float = 1e-5
    tied: bool = True
    kind: Literal["a", "b"] = "a"
    inner: int | None = None
    part: Part | None = None


def test_what_fits_is_taken():
    part = Part(3)
    values = {"width": 8, "eps": 1, "tied": False, "kind": "b", "inner": 4, "part": part}
    assert configured(Shape, values, "config.json") == Shape(8, 2, 1, False, "b", 4, part)
    assert configured(Shape, {"width": 8, "inner": None}, "config.json") == Shape(8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", "8"), ("width", 8.0), ("width", True), ("width", None), ("width", 1 << 40), ("n_layer", 10**9),
        ("eps", "x"), ("eps", float("nan")), ("eps", True), ("tied", "no"), ("tied", 1), ("kind", "c"),
        ("inner", [4]), ("part", {"n": 1}),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_by_the_files_name(name: str, value: Any):
    instead = "; known are a, b" if name == "kind" else ", which it cannot be. Download or make it again"
    with pytest.raises(UserError, match=re.escape(f"config.json has {value!r:.40} for their_{name}{instead}.")):
        configured(Shape, {"width": 8, name: value}, "config.json", {name: f"their_{name}"})


def test_all_problems_and_what_is_missing_are_told():
    with pytest.raises(UserError, match=r"2 problems[\s\S]*for width[\s\S]*for eps"):
        configured(Shape, {"width": "8", "eps": "x"}, "config.json")
    with pytest.raises(UserError, match=r"config\.json is damaged .*width"):
        configured(Shape, {}, "config.json")
