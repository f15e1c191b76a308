"""A chat template is code of a stranger: it may loop, grow, dig for Python's internals, or be no template at all."""

import functools
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.children import Child
from tests.conftest import CHATML, write_tokenizer
from tests.fuzz.fuzzing import amounts, fuzz, json_values, words
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.ollama.modelfile import make_modelfile

pytestmark = pytest.mark.rough

Messages = list[dict[str, Any]]
CHAT: Messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is anemia?"},
    {"role": "assistant", "content": "Too little hemoglobin."},
]
SECONDS, MEMORY = 10, 1 << 29


@functools.cache
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def use(folder: Path, source: str, messages: Messages) -> str:
    """Render a conversation, and all that is derived from a template. One of several errors is enough."""
    template = ChatTemplate(source, tokenizer(folder), "", "<|im_end|>", (2,))
    text = template.render(messages, add_generation_prompt=True)
    for derived in (
        lambda: template.encode_chat(messages),
        lambda: template.single_turn(),
        lambda: template.default_system,
        lambda: make_modelfile(template, {}, num_ctx=64, num_thread=1),
    ):
        try:
            derived()
        except UserError:
            continue
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


DOUBLED = "".join("{% set a = a @ a %}" for _ in range(60))
ENDLESS = {
    "a range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested filtered ranges": "{% for i in range(999) %}{% for j in range(99999) if 0 %}{% endfor %}{% endfor %}",
    "nested loops over a text": "{% set t = 'x' * 9999 %}{% for a in t %}{% for b in t %}{% for c in t %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "filtered loops": "{% set t = range(9999)|list %}"
    "{% for a in t %}{% for b in t if b > 9999999 %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "a block that contains itself": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "repeated text": "{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}",
}
GROWING = {
    "a repeated text": "{{ 'a' * 10**9 }}",
    "a repeated list": "{{ [1] * 10**9 }}",
    "a repeated text, in steps": "{{ 'a' * 10**4 * 10**4 * 10**4 }}",
    "a power": "{{ 10**(10**10) }}",
    "powers": "{% set x = 3 ** 9999 %}{% set x = x ** 9999 %}{% set x = x ** 9999 %}{{ x }}",
    "squares": "{% set x = 3 %}" + "{% set x = x * x %}" * 60 + "{{ x }}",
    "sums": "{% set a = 'aa' %}" + DOUBLED.replace("@", "+"),
    "concatenations": "{% set a = 'aa' %}" + DOUBLED.replace("@", "~"),
    "joins": "{% set a = 'aa' %}" + "{% set a = [a, a]|join %}" * 60,
    "joins with a long separator": "{{ ('a' * 9999).join('b' * 9999) }}",
    "blocks": "{% set a %}aa{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "macros": "{% macro m(a) %}{{ a }}{{ a }}{% endmacro %}{% set a = 'aa' %}" + "{% set a = m(a) %}" * 60,
    "lists of lists": "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
    "lists of lists as JSON": "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a|tojson }}",
    "lists of lists in a namespace": "{% set n = namespace(a=[1]) %}" + "{% set n.a = [n.a, n.a] %}" * 60 + "{{ n }}",
    "lists of lists in with": "{% set a = [1] %}" + "{% with a=[a, a] %}" * 40 + "{{ a }}" + "{% endwith %}" * 40,
    "compared lists": "{% set a = [1] %}{% set b = [1] %}"
    + "{% set a = [a, a] %}{% set b = [b, b] %}" * 60
    + "{{ a == b }}",
    "keys of tuples": "{% set a = (1, 2) %}" + "{% set a = (a, a) %}" * 60 + "{{ {a: 1} }}",
    "replaced letters": "{% set a = 'a' * 999 %}{{ a.replace('a', a).replace('a', a).replace('a', a) }}",
    "replaced letters by a filter": "{% set a = 'a' * 999 %}{{ a|replace('a', a)|replace('a', a)|replace('a', a) }}",
    "centred": "{{ 'a'|center(10**9) }}",
    "justified": "{{ 'a'.ljust(10**9) }}",
    "justified by a number from text": "{{ 'a'.ljust('1000000000'|int) }}",
    "filled with zeros": "{{ 'a'.zfill(10**9) }}",
    "tabs": "{{ '\t'.expandtabs(10**9) }}",
    "indented": "{{ ('a\n' * 9999)|indent(10**6) }}",
    "indented by a text": "{{ ('a\n' * 99999)|indent('b' * 99999) }}",
    "indented JSON": "{{ messages|tojson(indent=10**9) }}",
    "a width": "{{ '%1000000000d'|format(1) }}",
    "a width of the operator": "{{ '%1000000000d' % 1 }}",
    "a width as an argument": "{{ '%*d' % (10**9, 1) }}",
    "a width of a method": "{{ '{:1000000000d}'.format(1) }}",
    "a width as an argument of a method": "{{ '{:{}}'.format(1, 10**9) }}",
    "a width from a mapping": "{{ '{a:1000000000d}'.format_map({'a': 1}) }}",
    "a repeated argument": "{{ ('{0}' * 9999).format('a' * 99999) }}",
    "a precision": "{{ '%.1000000000f' % 1.5 }}",
    "a date": "{{ strftime_now('%1000000000Y') }}",
    "translated": "{{ ('a' * 9999).translate({97: 'b' * 99999}) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "slices": "{{ [1]|slice(10**9)|list|length }}",
    "batches": "{{ [1]|batch(10**9, 0)|list|length }}",
    "mapped": "{{ ['a']|map('center', 10**9)|list }}",
    "copies in a namespace": "{% set n = namespace(a=[]) %}{% for i in range(99999) %}"
    "{% set n.a = n.a + ['x' * 99999] %}{% endfor %}",
    "split texts": "{% set n = namespace(a=[]) %}{% for i in range(99999) %}"
    "{% set n.a = n.a + [('ab ' * 9999).split()] %}{% endfor %}",
    "filler": "{{ lipsum(10**7) }}",
    "wrapped": "{{ ('a ' * 9999)|wordwrap(1, wrapstring='b' * 9999) }}",
    "an error of any length": "{{ raise_exception('a' * 10**7) }}",
    "numbers of any length": "{{ " + "9" * 5000 + " }}",
}
DIGGING = {
    "a class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ messages.__init__.__globals__ }}",
    "subclasses": "{{ ''.__class__.__base__.__subclasses__() }}",
    "by the filter": "{{ ''|attr('__class__') }}",
    "by item": "{{ ''['__class__'] }}",
    "by format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "by format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "of a function": "{{ raise_exception.__globals__ }}",
    "of a date": "{{ strftime_now.__self__ }}",
    "of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "of itself": "{{ self._TemplateReference__context.environment }}",
    "of a loop": "{% for m in messages %}{{ loop._recurse.__globals__ }}{% endfor %}",
    "of a cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "by map": "{{ [messages]|map(attribute='__class__')|list }}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "a file": "{% include '/etc/passwd' %}",
    "a change of the messages": "{{ messages.clear() }}{{ messages.append(1) }}",
}
MALFORMED = {
    "an open tag": "{% for m in messages %}",
    "an open expression": "{{ messages[",
    "an unknown tag": "{% no_such_tag %}",
    "an unknown filter": "{{ messages|no_such_filter }}",
    "an unknown variable": "{{ no_such_variable.field }}",
    "an unknown method": "{{ messages.no_such_method() }}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep loops": "{% for a in [1] %}" * 200 + "{% endfor %}" * 200,
    "deep conditions": "{% if a %}" * 2000 + "{% endif %}" * 2000,
    "long sums": "{{ " + "1 + " * 20_000 + "1 }}",
    "many outputs": "{{ a }}" * 50_000,
    "a megabyte": "x" * 1_000_000,
    "null": "\0{{ '\0' }}",
    "division by zero": "{{ 1 / 0 }}{{ 1 % 0 }}",
    "a text minus a number": "{{ 'a' - 1 }}",
    "a break outside": "{% break %}",
}


@pytest.mark.parametrize("name", [*ENDLESS, *GROWING])
def test_rendering_is_bounded(name: str, child: Child, folder: Path) -> None:
    """Each of these would run for hours or fill the memory; it must be refused, not cut off in silence."""
    outcome = child.run(use, folder, {**ENDLESS, **GROWING}[name], CHAT, seconds=SECONDS, memory=MEMORY)
    assert outcome.how == "refused", outcome
    assert len(outcome.text) < 1000


@pytest.mark.parametrize("name", DIGGING)
def test_internals_are_out_of_reach(name: str, child: Child, folder: Path) -> None:
    outcome = child.run(use, folder, DIGGING[name], CHAT, seconds=SECONDS, memory=MEMORY)
    assert outcome.is_graceful, outcome
    assert not any(word in str(outcome.value) for word in ("class", "function", "module", "environment", "root:"))


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_templates(name: str, child: Child, folder: Path) -> None:
    outcome = child.run(use, folder, MALFORMED[name], CHAT, seconds=SECONDS, memory=MEMORY)
    assert outcome.is_graceful, outcome


def rendered(folder: Path, source: str, messages: Messages) -> str:
    return ChatTemplate(source, tokenizer(folder), "", "<|im_end|>", (2,)).render(messages, add_generation_prompt=True)


def test_long_conversations_are_still_rendered(child: Child, folder: Path) -> None:
    """The bound leaves room for what fills the longest contexts."""
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHATML)
    turns = [{"role": ("user", "assistant")[i % 2], "content": "word " * 100} for i in range(2000)]
    short = [{**turn, "content": "?"} for turn in turns]
    for messages in (turns, short, [{"role": "user", "content": "word " * 400_000}]):
        outcome = child.run(rendered, folder, CHATML, messages, seconds=60)
        assert outcome.value == plain.render(messages=messages, add_generation_prompt=True), outcome.text


NAMES = "messages m a loop m.content m['role'] messages[0].content bos_token self"
CONSTANTS = "1 -1 0 1.5 10**9 99999 'a' '' '%9d' true none [] {}"
FILTERS = (
    "trim tojson length list string upper int float join replace('a','bb') default('x') first last items sort unique "
    "reverse center(99) indent(4) batch(2) slice(3) sum map('upper') map(attribute='role') select selectattr('role') "
    "groupby('role') dictsort abs round(2) escape striptags truncate(5) wordcount capitalize attr('x') format(1) min "
    "max random pprint urlize xmlattr forceescape safe"
)
METHODS = (
    "strip split splitlines startswith('a') replace('a','b') upper join(messages) format(1) ljust(99) items "
    "get('role') keys values count('a') index(1) encode __class__ title zfill(9) partition('a') "
    "to_bytes(2,'big') append(1)"
)
OPERATORS = [*"+-*/%~", "//", "**", "==", "<", " in ", " and ", " or ", " is defined or ", " if a else "]
atoms = st.sampled_from(NAMES.split() + CONSTANTS.split())


def combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(lambda p: f"({p[0]}{p[1]}{p[2]})"),
        st.tuples(inner, st.sampled_from(FILTERS.split())).map(lambda p: f"({p[0]})|{p[1]}"),
        st.tuples(inner, st.sampled_from(METHODS.split())).map(
            lambda p: f"({p[0]}).{p[1]}" + ("" if p[1].endswith((")", "_")) else "()")
        ),
        st.tuples(inner, inner).map(lambda p: f"({p[0]})[{p[1]}]"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]})[{p[1]}:]"),
        st.tuples(inner, inner).map(lambda p: f"[{p[0]}, {p[1]}]"),
        inner.map(lambda e: f"range({e})"),
        inner.map(lambda e: f"namespace(a={e})"),
    )


expressions = st.recursive(atoms, combined, max_leaves=6)


def statements(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(expressions, inner)
    return st.one_of(
        pair.map(lambda p: f"{{% for m in {p[0]} %}}{p[1]}{{% endfor %}}"),
        pair.map(lambda p: f"{{% for m in messages if {p[0]} %}}{p[1]}{{% endfor %}}"),
        pair.map(lambda p: f"{{% if {p[0]} %}}{p[1]}{{% else %}}y{{% endif %}}"),
        pair.map(lambda p: f"{{% set a = {p[0]} %}}{p[1]}"),
        pair.map(lambda p: f"{{% macro f(a) %}}{p[1]}{{% endmacro %}}{{{{ f({p[0]}) }}}}"),
        pair.map(lambda p: f"{{% with a = {p[0]} %}}{p[1]}{{% endwith %}}"),
        inner.map(lambda text: f"{{% set a %}}{text}{{% endset %}}{{{{ a }}}}"),
        inner.map(lambda text: f"{{% filter upper %}}{text}{{% endfilter %}}"),
        inner.map(lambda text: f"{{% generation %}}{text}{{% endgeneration %}}"),
        st.tuples(inner, inner).map("".join),
        inner.map(lambda text: text * 2),
        inner.map(lambda text: text[: len(text) // 2]),
    )


templates = st.recursive(
    expressions.map(lambda e: f"{{{{ {e} }}}}") | st.sampled_from(["<|im_end|>", "\n", CHATML]) | words,
    statements,
    max_leaves=6,
)
contents = words.filter(str.strip) | st.text(min_size=1)
roles = st.sampled_from(["system", "user", "assistant"])
conversations = st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), min_size=1, max_size=4)


@amounts
def test_any_template(amount: str, child: Child, folder: Path) -> None:
    def check(given: tuple[str, Messages]) -> None:
        outcome = child.run(use, folder, *given, seconds=SECONDS, memory=MEMORY)
        assert outcome.is_graceful, outcome

    fuzz(amount, 150, st.tuples(templates, conversations), check)


def read(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    template = ChatTemplate.from_checkpoint(folder)
    template.prompt_ids([{"role": "user", "content": "?"}])
    make_modelfile(template, {}, num_ctx=64, num_thread=1)


@amounts
def test_any_small_file_beside_a_template(amount: str, child: Child, folder: Path, tmp_path: Path) -> None:
    """Tokens and their ids as LitGPT checkpoints name them."""
    write_tokenizer(tmp_path)
    tokens = st.sampled_from(["<|im_end|>", "<|im_start|>", "é"]) | json_values
    ids = st.lists(st.integers(-2, 400) | json_values, max_size=3) | json_values | st.just(2)
    files = st.fixed_dictionaries(
        {
            "tokenizer_config.json": st.fixed_dictionaries({"bos_token": tokens, "eos_token": tokens}).map(json.dumps),
            "generation_config.json": st.fixed_dictionaries({"eos_token_id": ids}).map(json.dumps),
        }
    )

    def check(files: dict[str, str]) -> None:
        outcome = child.run(read, tmp_path, files, seconds=SECONDS, memory=MEMORY)
        assert outcome.is_graceful, outcome

    fuzz(amount, 60, files, check)
