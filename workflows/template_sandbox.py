"""Jinja for templates that come with a stranger's checkpoint: sandboxed, and bounded in time and memory.

Jinja's sandbox keeps a template away from Python's internals, but lets it loop for hours and build texts of any size.
Here everything a template does costs as much as the size of what it handles: each pass of a loop, each call, filter and
operator, before it runs; each piece of output. A rendering that costs too much is refused. The count depends on the
template and the conversation alone, so that the same rendering is always refused or never.
"""

import datetime
import functools
import json
import math
import re
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

LONGEST = 200_000
"""Characters of a template; the longest ones in use have some 30,000."""
_BUDGET, _BUDGET_FACTOR = 5_000_000, 30
"""What a rendering may cost: so much, and so much for each character of the conversation. Real ones cost a tenth."""
_STEP = 200
"""What a step costs besides what it handles: some 25,000 steps are possible, and more in long conversations."""
_LARGEST_INT = 10_000  # bits
_SHALLOW = frozenset(
    ("count", "d", "default", "first", "last", "length", "list", "map", "reject", "rejectattr", "reverse", "select")
    + ("selectattr",)
)
"""Filters that look at the items of a list but not into them."""
_UNUSED_FILTERS = ("filesizeformat", "pprint", "random", "urlize", "wordwrap", "xmlattr")
_UNUSED_GLOBALS = ("cycler", "joiner", "lipsum")
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)
_UNSAFE_METHODS = ("translate", "maketrans")

# Templates that print today's date (Llama 3.1 and later) would change every prompt every day, and Ollama's template
# could not follow. The day of Llama 3.2's own template default is used always.
_TEMPLATE_DATE = datetime.datetime(2024, 7, 26)


def render(source: str, variables: dict[str, Any]) -> str:
    """Render a template.

    Args:
        source: The Jinja text.
        variables: What it may use.

    Raises:
        jinja2.TemplateError: If it is malformed, refuses its variables, or wants more than a template may.
        Exception: Whatever else its own operations raise: TypeError, RecursionError, ...
    """
    if len(source) > LONGEST:
        raise SecurityError(f"it has {len(source):,} characters; at most {LONGEST:,} are accepted")
    template = _compile(source)
    environment: Any = template.environment
    environment.left = math.inf
    environment.left = _BUDGET + _BUDGET_FACTOR * environment.size(variables)
    return template.render(**variables)


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return _Environment().from_string(source)


class _GenerationTag(Extension):
    """Accept Hugging Face's `{% generation %}…{% endgeneration %}` marks, which render as their contents."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox that counts; `left` is what the rendering under way may still cost."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=_finalize,
            optimized=False,  # constants too are computed when the template is rendered, and count
        )
        self.left: float = 0
        self.filters["tojson"] = _to_json
        for name in _UNUSED_FILTERS:
            del self.filters[name]
        for name in _UNUSED_GLOBALS:
            del self.globals[name]
        self.filters = {name: self._metered(name, filter_) for name, filter_ in self.filters.items()}
        self.filters["handled"] = self._handled
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _TEMPLATE_DATE.strftime

    def spend(self, size: float) -> None:
        """Count a step that handles `size` characters or items."""
        self.left -= _STEP + size
        if self.left < 0:
            raise SecurityError("it loops too often or makes too much text for a chat template")

    def size(self, *values: Any, deep: bool = True) -> int:
        """Characters and items of values; with `deep`, of the values in them too, each time they occur."""
        total = 0
        level: Iterable[Any] = values
        while level:
            parts: list[Any] = []
            for value in level:
                if isinstance(value, str):
                    total += 1 + len(value)
                elif isinstance(value, int):
                    total += 1
                    if value.bit_length() > _LARGEST_INT:
                        raise SecurityError("it computes with too large numbers for a chat template")
                else:
                    whole = value._Namespace__attrs if isinstance(value, Namespace) else value
                    contained = isinstance(whole, _CONTAINERS)
                    total += 1 + (len(whole) if contained or isinstance(whole, bytes | range) else 0)
                    if total > self.left:
                        self.spend(total)
                    if deep and contained:
                        parts += whole
                        parts += whole.values() if isinstance(whole, dict) else ()
            if total > self.left:
                self.spend(total)
            level = parts
        return total

    # ---- what Jinja calls ----

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, and let loops, macros, comparisons, slices and assignments count, for which Jinja has no hook."""
        template = super()._parse(source, name, filename)
        node: Any
        for node in list(template.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            count = nodes.Call(nodes.EnvironmentAttribute("spend"), [nodes.Const(text)], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        for node in list(template.find_all(nodes.Node)):
            if isinstance(node, nodes.For):
                node.iter = _counted(node.iter, deep=False)
            elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
                node.node = _counted(node.node, deep=False)
            elif isinstance(node, nodes.Compare | nodes.Operand):
                node.expr = _counted(node.expr)
            elif isinstance(node, nodes.Assign):
                node.node = _counted(node.node)
            elif isinstance(node, nodes.Test):
                node.node, node.args = _counted(node.node), [_counted(arg) for arg in node.args]
            elif isinstance(node, nodes.Concat):
                node.nodes = [_counted(part) for part in node.nodes]
            elif isinstance(node, nodes.With):
                node.values = [_counted(value) for value in node.values]
        template.set_environment(self)
        return template

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _UNSAFE_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if __obj != __self.spend:
            method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
            owner = getattr(method, "__self__", None)
            __self.spend(__self._cost(getattr(method, "__name__", ""), owner, args, kwargs))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        cost: float = self.size(left, right)
        if operator == "+":
            pass
        elif isinstance(left, int | float) and isinstance(right, int | float):
            if operator == "**" and isinstance(right, int) and abs(right) > _LARGEST_INT:
                raise SecurityError("it computes with too large numbers for a chat template")
        elif operator == "*":
            cost *= max([1, *(abs(value) for value in (left, right) if isinstance(value, int))])
        elif operator == "%":
            cost = self._cost("format", left, (right,), {})
        self.spend(cost)
        return super().call_binop(context, operator, left, right)

    def _metered(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        passed = 1 if hasattr(filter_, "jinja_pass_arg") else 0

        @functools.wraps(filter_)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            value, *rest = args[passed:]
            self.spend(self._cost(name, value, rest, kwargs))
            return filter_(*args, **kwargs)

        return wrapper

    def _handled(self, value: Any, deep: bool) -> Any:
        self.spend(len(value) if type(value) is str else self.size(value, deep=deep))
        return value

    def _cost(self, name: str, value: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> float:
        """An upper bound of what a method of `value`, a function or a filter handles and makes."""
        rest = [*args, *kwargs.values()]
        cost: float = self.size(value, *rest, deep=name not in _SHALLOW)
        # Widths, counts and lengths: of `center`, `indent`, `zfill`, `range`, `batch`, `to_bytes`, `format`, …
        cost *= max([1, *(abs(arg) for arg in _flat(rest) if isinstance(arg, int))])
        texts = [text for text in (value, *rest) if isinstance(text, str)]
        if name == "replace" and len(rest) > 1:
            cost += str(value).count(str(rest[0])) * len(str(rest[1]))
        elif name in ("join", "indent"):
            cost *= max([1, *(len(text) for text in (texts if name == "join" else texts[1:]))])
        elif name.startswith(("format", "strftime")) and texts:
            cost *= 1 + texts[0].count("{") + texts[0].count("%")
            cost *= max([1, *(int(digits[:20]) for digits in re.findall(r"\d+", texts[0]))])
        return cost


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        yield from value if isinstance(value, tuple | list) else value.values() if isinstance(value, dict) else (value,)


def _counted(node: Any, deep: bool = True) -> nodes.Expr:
    return nodes.Filter(node, "handled", [nodes.Const(deep)], [], None, None, lineno=node.lineno)


@jinja2.pass_context  # so that Jinja computes no output when it compiles
def _finalize(context: Context, value: Any) -> Any:
    environment: Any = context.environment
    return environment._handled(value, True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja's own filter, no HTML escapes; the arguments are those of transformers' filter.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
