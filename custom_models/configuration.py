"""A model's configuration as somebody else's file has it: each value must be one that its field can take.

Configurations are dataclasses, and their type hints say what a field takes. Who wrote a checkpoint's `config.json` is
not known; a text where a number belongs, or a billion layers, are said before anything is made of them.
"""

import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from workflows.errors import UserError, report_all

_LARGEST, _MOST_LAYERS = 1 << 24, 1 << 10
"""Far above what any model has."""

T = TypeVar("T")


def configured(kind: type[T], values: Mapping[str, Any], place: str, names: Mapping[str, str] | None = None) -> T:
    """Make a configuration of values that a file has.

    Args:
        kind: A dataclass.
        values: For each of its fields a value; fields that are left out keep their defaults.
        place: The file, for messages.
        names: What the file calls a field, where it has another name for it.

    Raises:
        UserError: If a value cannot be its field's, or the values do not go together.
    """
    hints, names = get_type_hints(kind), names or {}
    report_all([
        f"{place} has {value!r:.40} for {names.get(name, name)}{_instead(hints[name])}."
        for name, value in values.items()
        if not _is_one(value, hints[name], _MOST_LAYERS if name in ("n_layer", "n_decoder_layer") else _LARGEST)
    ])  # fmt: skip
    try:
        return kind(**values)
    except UserError as e:
        raise UserError(f"{place}: {e}") from None
    except TypeError as e:  # a field without a default is missing
        raise UserError(f"{place} is damaged ({e}). Download or make it again.") from None


def _instead(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"; known are {', '.join(map(str, get_args(hint)))}"
    return ", which it cannot be. Download or make it again"


def _is_one(value: Any, hint: Any, largest: int) -> bool:
    """Whether a value is of a type, numbers finite and of a size that a model can have."""
    if hint is Any:
        return True
    if get_origin(hint) in (Union, UnionType):
        return any(_is_one(value, part, largest) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is int:
        return type(value) is int and abs(value) <= largest
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, hint)
