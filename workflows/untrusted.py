"""JSON and YAML from files that may be anyone's: what Python's parsers let pass, or trip over, is refused in words.

A file of a few bytes can nest so deeply that whoever walks through it fails, or, by aliases, stand for more values than
the memory holds; and text may be escaped that no file can hold.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import yaml

_DEEPEST = 100
_TOO_DEEP = f"nested more than {_DEEPEST} levels deep"
_MOST_VALUES = 20_000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_json(text: str, unique_names: bool = False) -> Any:
    """Parse JSON from a file that may be anyone's: no text that is not Unicode, no nesting beyond reason, no NaN.

    Args:
        text: The JSON text.
        unique_names: Refuse an object that has a name twice, of which Python's parser keeps the last value only.

    Raises:
        ValueError: If it is not such JSON (`json.JSONDecodeError` where it is none at all).
    """
    try:
        pairs = _unique if unique_names else None
        value = json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [part for whole in level for part in _parts(whole)]
    if level:
        raise ValueError(_TOO_DEEP)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair, which is no character") from None
    return value


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"it has no {number}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def parse_yaml(text: str, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Parse YAML from a file that may be anyone's: `load`, once it is clear that the result has a reasonable size.

    An alias (`*a`) costs a file a few bytes and whoever walks through the value all that it stands for.

    Raises:
        yaml.YAMLError: If it is not such YAML.
    """
    stands_for: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor, and values so far
    for event in yaml.parse(text, Loader=_YAML_LOADER):
        anchor, values = getattr(event, "anchor", None), 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, 1))
            stands_for.pop(anchor or "", None)
            if len(open_nodes) > _DEEPEST:
                raise yaml.YAMLError(_TOO_DEEP)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, values = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            anchor, values = None, stands_for.get(anchor or "", _MOST_VALUES)  # unknown within itself
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        elif "\0" in event.value:
            raise yaml.YAMLError("a null character, which no name or path can have")
        if anchor is not None:
            stands_for[anchor] = values
        open_nodes[-1] = (open_nodes[-1][0], open_nodes[-1][1] + values)
        if open_nodes[-1][1] >= _MOST_VALUES:
            raise yaml.YAMLError(f"it stands for more than {_MOST_VALUES:,} values")
    try:
        return load(text)
    except (ValueError, LookupError, AttributeError, TypeError) as e:  # `!!int ""`, `!!timestamp x`, 5,000 digits, …
        raise yaml.YAMLError(f"a value is not what its tag says: {e}") from None
