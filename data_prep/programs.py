"""Python functions and the same ones in JavaScript, made by a small grammar.

Every rule of the grammar writes both languages at once: `//` beside `Math.floor`, a comprehension beside `filter` and
`map`. What a rule can write is kept to where both mean the same: divisors are positive numbers, letters are ASCII, and
products are small, since JavaScript's numbers are exact up to 2^53 only. Rows are {"source", "target", "inputs"}; the
inputs are arguments on which both programs are to give equal results.
"""

import random
import re
from collections import Counter
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

from data_prep.dataset import DataSet, Source
from data_prep.splits import Item, random_splits
from workflows.errors import UserError

PROGRAMS, HELD_OUT, INPUTS = 6000, 300, 5
"""How many programs are made; how many of them are held out for validation, and for the test; inputs for each."""
ARGUMENTS = {
    "number": ("a", "b", "n", "m", "k", "limit", "size"),
    "list": ("values", "items", "numbers", "scores"),
    "text": ("text", "word", "name", "line"),
}
FUNCTIONS = ("solve", "compute", "build", "check", "convert", "measure", "combine", "scan")
_LETTERS = "abcde"
_KEPT = {
    *("def", "return", "for", "in", "if", "elif", "else", "while", "and", "or", "not", "f"),
    *("range", "list", "len", "sum", "abs", "min", "max", "sorted", "str"),
    *("append", "upper", "lower", "count", "replace", "startswith", "endswith"),
}
"""Words of the language; all others are names that somebody chose."""
_WORD = re.compile(r"[A-Za-z_]\w*|\d+|\"[^\"]*\"|\S")
_ATOM = re.compile(r"\w+(\([^()]*\))?")


class Pair(NamedTuple):
    """The same thing in both languages, or a rule that writes it: {0}, {1} stand for parts."""

    python: str
    javascript: str

    def of(self, *parts: "Pair") -> "Pair":
        """The rule with its parts filled in."""
        return Pair(
            self.python.format(*(part.python for part in parts)),
            self.javascript.format(*(part.javascript for part in parts)),
        )


def same(text: str) -> Pair:
    """What is written alike in both languages."""
    return Pair(text, text)


def prepare(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Make programs; no two splits have one of the same shape.

    Args:
        raw_dir: Must be None: nothing is read.
        validation_size: Number of programs held out for validation; default 300.
        test_size: Number of programs held out for the test; default 300.
        seed: Of the programs, their inputs and the split.

    Raises:
        UserError: If a folder is given.
    """
    if raw_dir is not None:
        raise UserError("python_javascript is made by a grammar and reads no files: leave --raw_dir out.")
    chance = random.Random(seed)
    dropped: Counter[str] = Counter()
    items: dict[str, Item] = {}
    while len(items) < PROGRAMS:
        program, kinds = Grammar(chance).function()
        inputs = [[_argument(kind, chance) for kind in kinds] for _ in range(INPUTS)]
        if program.python in items:
            dropped["repeated"] += 1
        elif len(set(map(repr, results(program.python, inputs)))) < 2:
            dropped["one result for all inputs"] += 1
        else:
            row = {"source": program.python, "target": program.javascript, "inputs": inputs, "kind": "program"}
            items[program.python] = Item(frozenset({shape_of(program.python)}), (row,))
    return DataSet(
        name="python_javascript",
        splits=random_splits(
            list(items.values()),
            HELD_OUT if validation_size is None else validation_size,
            HELD_OUT if test_size is None else test_size,
            seed,
        ),
        source=Source(
            title="Python functions and the same in JavaScript",
            origin="a grammar (data_prep/programs.py)",
            revision=f"seed {seed}",
            licence="Apache-2.0",
            attribution="",
        ),
        split_rule="at random by seed; programs that differ in names, numbers and texts only stay together",
        dropped=dict(dropped),
        notes={"programs of different shape": len({key for item in items.values() for key in item.keys})},
        shape="translated",
    )


def results(program: str, inputs: list[list[Any]]) -> list[Any]:
    """What a function of the grammar's gives for each of its inputs. Only for programs that were made here."""
    scope: dict[str, Any] = {}
    exec(program, scope)
    function = scope[name_of(program)]
    return [function(*arguments) for arguments in inputs]


def name_of(program: str) -> str:
    """The name of a Python function, from its first line.

    Raises:
        ValueError: If it begins with no function.
    """
    if (found := re.match(r"def (\w+)\(", program)) is None:
        raise ValueError("the program does not begin with a function")
    return found[1]


def shape_of(program: str) -> str:
    """A Python program without its choice of names, numbers and texts."""
    names: dict[str, str] = {}

    def plain(word: str) -> str:
        if word[0].isdigit() or word[0] == '"':
            return word[0] if word[0] == '"' else "0"
        return word if word in _KEPT or not word.isidentifier() else names.setdefault(word, f"v{len(names)}")

    return " ".join(map(plain, _WORD.findall(program)))


def _argument(kind: str, chance: random.Random) -> Any:
    if kind == "list":
        return [chance.randint(-9, 20) for _ in range(chance.randint(1, 6))]
    if kind == "text":
        return "".join(chance.choices(_LETTERS, k=chance.randint(1, 8)))
    return chance.randint(-3, 12)


class Grammar:
    """Writes one function, of what it has declared.

    Args:
        chance: Decides everything.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.names: dict[str, list[str]] = {"number": [], "list": [], "text": []}
        self.small: list[str] = []  # numbers that may be multiplied: arguments, and what counts a loop
        self.filled: list[str] = []  # lists with at least one number

    def function(self) -> tuple[Pair, list[str]]:
        """The function, and what its arguments are."""
        kinds = self.chance.choices(("number", "list", "text"), (5, 3, 3), k=self.chance.randint(1, 3))
        arguments = []
        for kind in kinds:
            arguments.append(self.chance.choice([name for name in ARGUMENTS[kind] if name not in arguments]))
            self.names[kind].append(arguments[-1])
        self.small, self.filled = list(self.names["number"]), list(self.names["list"])
        name, listed = same(self.chance.choice(FUNCTIONS)), same(", ".join(arguments))
        rule = Pair("def {0}({1}):\n{2}", "function {0}({1}) {{\n{2}\n}}")
        return rule.of(name, listed, self._indented(self._body())), kinds

    def _likely(self, probability: float) -> bool:
        return self.chance.random() < probability

    def _one(self, *rules: Pair) -> Pair:
        return self.chance.choice(rules)

    # ---- statements ----

    def _indented(self, statement: Pair) -> Pair:
        return Pair(indent(statement.python, "    "), indent(statement.javascript, "  "))

    def _body(self) -> Pair:
        """All of a function: an expression, or something that is gathered step by step."""
        kind = self.chance.choice(("number", "number", "number", "list", "text", "truth"))
        give = Pair("return {0}", "return {0};")
        if kind == "truth" or self._likely(0.25):
            found = give.of(self._expression(kind, 2))
            return self._lines(self._if(give.of(self._expression(kind, 1))), found) if self._likely(0.4) else found
        name, begin = {
            "number": (same("total"), same(str(self.chance.randint(0, 9)))),
            "list": (same("result"), same("[]")),
            "text": (same("output"), same('""')),
        }[kind]
        steps = [Pair("{0} = {1}", "const {0} = {1};" if kind == "list" else "let {0} = {1};").of(name, begin)]
        for _ in range(self.chance.choice((1, 1, 2))):
            steps.append(self._loop(kind, name) if self._likely(0.7) else self._branch(kind, name))
        if self._likely(0.3):
            self.names[kind].append(name.python)
            return self._lines(*steps, give.of(self._expression(kind, 1)))
        return self._lines(*steps, give.of(name))

    def _lines(self, *statements: Pair) -> Pair:
        return Pair(*("\n".join(lines) for lines in zip(*statements, strict=True)))

    def _if(self, inner: Pair) -> Pair:
        rule = Pair("if {0}:\n{1}", "if ({0}) {{\n{1}\n}}")
        return rule.of(self._truth(1), self._indented(inner))

    def _branch(self, kind: str, name: Pair) -> Pair:
        """Add to what is gathered one thing or another."""
        found = self._if(self._add(kind, name))
        if self._likely(0.3):
            more = Pair("{0}\nelif {1}:\n{2}", "{0} else if ({1}) {{\n{2}\n}}")
            found = more.of(found, self._truth(0), self._indented(self._add(kind, name)))
        if self._likely(0.5):
            otherwise = Pair("{0}\nelse:\n{1}", "{0} else {{\n{1}\n}}")
            found = otherwise.of(found, self._indented(self._add(kind, name)))
        return found

    def _add(self, kind: str, name: Pair) -> Pair:
        value = self._expression("number" if kind == "list" else kind, 1)
        if kind == "list":
            return Pair("{0}.append({1})", "{0}.push({1});").of(name, value)
        sign = "-=" if kind == "number" and self._likely(0.3) else "+="
        return Pair(f"{{0}} {sign} {{1}}", f"{{0}} {sign} {{1}};").of(name, value)

    def _loop(self, kind: str, name: Pair) -> Pair:
        """Gather something for each of several things."""
        over = self.chance.choice([found for found, names in self.names.items() if names])
        subject = self._name(over)
        inner_kind, variable = {"number": ("number", "i"), "list": ("number", "x"), "text": ("text", "char")}[over]
        counted = over != "number" or subject.python not in self.small or self._likely(0.7)
        if counted:
            self.names[inner_kind].append(variable)
            self.small += [variable] if inner_kind == "number" else []
        inner = self._branch(kind, name) if self._likely(0.5) else self._add(kind, name)
        if not counted:  # count the argument itself down
            less = Pair("{0} -= {1}", "{0} -= {1};").of(subject, same(str(self.chance.randint(1, 3))))
            rule = Pair("while {0} > 0:\n{1}", "while ({0} > 0) {{\n{1}\n}}")
            return rule.of(subject, self._indented(self._lines(inner, less)))
        self.names[inner_kind].remove(variable)
        self.small = [small for small in self.small if small != variable]
        if over == "number":
            first = self.chance.choice("0012")
            head = Pair("for i in range({0}):" if first == "0" else f"for i in range({first}, {{0}}):",
                        f"for (let i = {first}; i < {{0}}; i++)")  # fmt: skip
        else:
            head = Pair(f"for {variable} in {{0}}:", f"for (const {variable} of {{0}})")
        return Pair("{0}\n{1}", "{0} {{\n{1}\n}}").of(head.of(subject), self._indented(inner))

    # ---- expressions ----

    def _expression(self, kind: str, depth: int) -> Pair:
        if kind == "list":
            return self._list()
        return {"number": self._number, "text": self._text, "truth": self._truth}[kind](depth)

    def _name(self, kind: str) -> Pair:
        return same(self.chance.choice(self.names[kind]))

    def _letter(self) -> Pair:
        return same(f'"{self.chance.choice(_LETTERS)}"')

    def _number(self, depth: int) -> Pair:
        if depth == 0 or self._likely(0.2):
            named = self.names["number"] and self._likely(0.7)
            return self._name("number") if named else same(str(self.chance.randint(0, 9)))
        rules = [Pair("{0} + {1}", "{0} + {1}"), Pair("{0} - {2}", "{0} - {2}"), Pair("abs({0})", "Math.abs({0})"),
                 Pair("{1} // {3}", "Math.floor({1} / {3})"), Pair("{1} % {3}", "(({1} % {3}) + {3}) % {3}"),
                 Pair("min({0}, {4})", "Math.min({0}, {4})"), Pair("max({0}, {4})", "Math.max({0}, {4})")]  # fmt: skip
        if self.small:
            small = self.chance.choice(self.small)
            rules += [same(f"{small} * {{3}}"), same(f"{small} ** 2")]
        if self.names["list"]:
            name = self._name("list").python
            rules += [
                Pair(f"len({name})", f"{name}.length"),
                Pair(f"sum({name})", f"{name}.reduce((p, q) => p + q, 0)"),
            ]
        if self.filled:
            name = self.chance.choice(self.filled)
            rules += [Pair(f"max({name})", f"Math.max(...{name})"), Pair(f"{name}[-1]", f"{name}.at(-1)")]
        if self.names["text"]:
            name, letter = self._name("text").python, self._letter().python
            rules += [Pair(f"len({name})", f"{name}.length"),
                      Pair(f"{name}.count({letter})", f"({name}.split({letter}).length - 1)")]  # fmt: skip
        if depth > 1:
            rules.append(Pair("({0} if {5} else {4})", "({5} ? {0} : {4})"))
        left, right, third = self._number(depth - 1), self._number(depth - 1), self._number(depth - 1)
        divisor = same(str(self.chance.randint(2, 9)))
        return self._one(*rules).of(left, self._atom(left), self._atom(right), divisor, third, self._truth(0))

    def _atom(self, expression: Pair) -> Pair:
        """In parentheses, unless it is one word or call."""
        return expression if _ATOM.fullmatch(expression.python) else Pair(*(f"({part})" for part in expression))

    def _list(self) -> Pair:
        if not self.names["list"]:
            return Pair("list(range({0}))", "Array.from({{ length: {0} }}, (_, i) => i)").of(self._number(0))
        self.names["number"].append("x")
        mapped, kept = self._number(1), self._truth(0)
        self.names["number"].remove("x")
        rule = self._one(
            Pair("sorted({0})", "[...{0}].sort((p, q) => p - q)"),
            Pair("{0}[::-1]", "[...{0}].reverse()"),
            Pair("[{1} for x in {0}]", "{0}.map((x) => {1})"),
            Pair("[x for x in {0} if {2}]", "{0}.filter((x) => {2})"),
            Pair("[{1} for x in {0} if {2}]", "{0}.filter((x) => {2}).map((x) => {1})"),
        )
        return rule.of(self._name("list"), mapped, kept)

    def _text(self, depth: int) -> Pair:
        if not self.names["text"]:
            rule = self._one(Pair("str({0})", "String({0})"), Pair('f"{{{0}}}-{{{1}}}"', "`${{{0}}}-${{{1}}}`"))
            return rule.of(self._number(0), self._number(0))
        if depth == 0 or self._likely(0.2):
            return self._name("text")
        rule = self._one(
            Pair("{0}.upper()", "{0}.toUpperCase()"),
            Pair("{0}[::-1]", '[...{0}].reverse().join("")'),
            Pair("{0}.replace({2}, {3})", "{0}.replaceAll({2}, {3})"),
            Pair("{0} + {2}", "{0} + {2}"),
            Pair("{2} + {1}", "{2} + {1}"),
            Pair("{0} * 2", "{0}.repeat(2)"),
            Pair('f"{{{0}}}-{{{4}}}"', "`${{{0}}}-${{{4}}}`"),
            Pair("str({4})", "String({4})"),
        )
        return rule.of(self._name("text"), self._text(depth - 1), self._letter(), self._letter(), self._number(0))

    def _truth(self, depth: int) -> Pair:
        if depth > 0 and self._likely(0.4):
            rule = self._one(Pair("{0} and {1}", "{0} && {1}"), Pair("{0} or {1}", "{0} || {1}"))
            return rule.of(self._truth(0), self._truth(0))
        rules = [same(f"{{0}} {sign} {{1}}") for sign in ("<", ">", "<=", ">=")]
        rules += [Pair("{0} == {1}", "{0} === {1}"), Pair("{0} != {1}", "{0} !== {1}"),
                  Pair("{0} % {2} == 0", "{0} % {2} === 0")]  # fmt: skip
        if self.names["list"]:
            rules.append(Pair(f"{{0}} in {(name := self._name('list').python)}", f"{name}.includes({{0}})"))
        if self.names["text"]:
            name, letter = self._name("text").python, self._letter().python
            rules += [Pair(f"{letter} in {name}", f"{name}.includes({letter})"),
                      Pair(f"not {name}.startswith({letter})", f"!{name}.startsWith({letter})"),
                      Pair(f"{name}.endswith({letter})", f"{name}.endsWith({letter})")]  # fmt: skip
        divisor = same(str(self.chance.randint(2, 5)))
        number = self._name("number") if self.names["number"] else same(str(self.chance.randint(0, 9)))
        return self._one(*rules).of(number, same(str(self.chance.randint(0, 9))), divisor)
