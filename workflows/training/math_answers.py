r"""Mathematical answers: where a text gives its own, and whether two of them are equal.

Numbers are compared here, as exact fractions, in the usual writings: `0.5`, `1/2`, `\frac{1}{2}`, `½`, `50%`, `5e-1`,
`1 1/2`, `1,234.5`, `5 \text{ cm}`. What is no plain number (roots, sets, intervals, equations) needs the package
math-verify (Kydlíček 2025), an optional dependency; a process of its own asks it (`math_worker.py`).
"""

import functools
import importlib.util
import json
import queue
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data_prep.answers import last_box
from workflows.lifetime import end_with_parent

MAX_EXPRESSION = 300
"""Characters of an expression that is compared; an answer of more is no answer."""
MAX_EXPONENT = 400
"""Largest exponent of a number in scientific notation."""
START_SECONDS, CALL_SECONDS = 120.0, 10.0
"""How long the process may take to import math-verify, and to answer, before it is ended."""

_MULTIPLIERS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CHANGING = re.compile(
    r"or|plus|minus|mod|modulo|squared|cubed|pi|sqrt|root|sin|cos|tan|log|ln|exp|half|halves|thirds|quarters|fourths"
    r"|fifths|sixths|sevenths|eighths|ninths|tenths|hundredths|thousandths|point|divided|multiplied|factorial|choose"
    r"|infinity|inf|mille|[eixyz]"
)
"""Words behind a number that change its value."""
_CONNECTING = re.compile(r"and|to|over|out|of|through|if|not|but|percentage")
"""Words behind a number that are no unit."""
_TOUCHING_UNITS = re.compile(
    r"km|cm|mm|nm|mg|kg|ml|dl|cl|lbs?|oz|ft|in|mi|mph|kph|hrs?|mins?|secs?|ms|am|pm|st|nd|rd|th|kb|mb|gb|hz"
)
"""Units that are written without a space; with other letters `5x` is a product."""

_DIGITS = r"(?:\d{1,3}(?:[ '’]\d{3})+(?:[.,]\d+)?(?![\d.,]*\d)|\d(?:[\d.,]*\d)?|\.\d+)"
_EXPONENT = r"\^\s*\{?\s*(?P<%s>[-+]?\d+)\s*\}?"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?P<gap>\s*)(?:(?P<whole>\d+)\s+(?P<part>\d+)\s*/\s*(?P<of>\d+)"
    rf"|(?P<over>{_DIGITS})\s*/\s*(?P<under>[-+]?\s*{_DIGITS})"
    rf"|10\s*{_EXPONENT % 'power'}"
    rf"|(?P<digits>{_DIGITS})(?:\s*\*\s*10\s*{_EXPONENT % 'times'}|[eE](?P<e>[-+]?\d+))?)"
    r"(?![\d^_])(?:\s*(?P<percent>%|percent\b|per cent\b|pct\b))?"
)
_NAME = re.compile(r"\s*([A-Za-z]|\\[A-Za-z]+)\s*\Z")
_UNIT = re.compile(r"[^\W\d_][^\W\d_./'-]*(?:[ ./'-]+[^\W\d_][^\W\d_./'-]*)*\.?")
_UNIT_POWER = re.compile(r"(?<=[^\W\d_]{2})\s*\^\s*\{?\s*-?[1-3]\s*\}?(?!\d)")
_FRACTION = re.compile(r"\\frac\s*(?:\{\s*([-+]?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*([-+]?[\d.,]+)\s*\}|(\d))")
_TEXT = re.compile(r"\\(?:text(?:rm|bf|it|sf)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad|bigl?|bigr?)(?![A-Za-z])|\\[,;:!> ]|~|\\\(|\\\)|\\\[|\\\]"
)
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°")
_RAISED = re.compile(r"[⁰¹²³⁴-⁹⁺⁻]+")
_LOWERED = re.compile(r"[₀-₉]+")
_VULGAR = re.compile(r"[¼-¾⅐-⅞↉]")
_ENVIRONMENT = re.compile(
    r"(?<!\\)\${1,2}(?![\s$])([^$\n]*[^$\s\\])\${1,2}(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_CURRENCY = re.compile(r"[$€£¥₹]")
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)", re.MULTILINE)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAG = re.compile(r"<<[^<>]*>>|</?(?:b|i|u|em|strong|p|br|span|div|code)\s*/?>")
_STATED = re.compile(
    r"\banswer\b(?:\s+(?:to|of|for)\b[^.:=\n]{0,100}?)?\s*(?::|=|\bis\b:?)\s*(\S[^\n]*)", re.IGNORECASE
)
_EMPHASIS = re.compile(r"(?<![\w)])(?:\*\*|__|\*)(?=\S)|(?<=\S)(?:\*\*|__|\*)(?![\w(*])|`")
_CLAUSE_END = re.compile(r"[.;!?](?=\s|\Z)|,\s+(?=[^\W\d_])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_PROSE = re.compile(r"[^\W\d_]{2,}")
_EXPRESSION_BEFORE = re.compile(
    r"[\w.^_/\\+*{<>≤≥≠≈±√|~—-]\Z|[/\\^+*÷<>≤≥≠≈±√|~—-]\s*\Z|[\d)\]}]\s*[,;]\s*\Z|[([]\s*\Z|\d:\Z"
    r"|\d\W*\b(?:or|and|to|over|plus|minus|times|by|through|point|in|of|out\s+of|from|mod|modulo|choose)\s+"
    r"(?:[a-z]\s*=\s*)?\Z"
    r"|\b(?:than|least|most|minus|negative|under|over|below|above|between|unequal\s+to|raised\s+to|(?:divided|multiplied)"
    r"\s+by)\s+\Z|(?:\b(?:not|never|cannot)|n['’]t)\s+(?:[a-z]+\s+){0,2}\Z"
    r"|\b(?:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|percent|twice"
    r"|double|triple|square|cube|root|sqrt|sine?|cos|cosine|tan|tangent|log|ln|logarithm|exp|power|reciprocal"
    r"|factorial|factors?|multiples?|divisors?)\s+(?:of\s+)?\Z|%\s+of\s+\Z",
    re.IGNORECASE,
)
"""What stands before a number that is a part of an expression, a list or a range, or is denied."""
_EXPRESSION_AFTER = re.compile(r"\s*(?:/(?![^\W\d_]{2})|[\^_*÷+=<>≤≥≠±√({\\]|-\s*[\d(\\])|:\d|\s*,\s*\d|\s+-\s")
_READ_OTHERWISE = re.compile(r"\d\s*_|\d\s+\d")
"""What math-verify reads otherwise: it passes over the base of a number, and multiplies numbers in a row."""

_LONGER = re.compile(r"\s+(?:and\s+(?:a|one)|times\s+(?!a\b)(?:\w|pi|the|as))\b")
"""What makes another number of the one before it: "5 and a half", "5 times x"."""

_TEXT_MARK = "\ue000"
"""Put before what `\\text{}` holds: `5 \\text{m}` has a unit, `5 m` is a product."""


@dataclass(frozen=True)
class Number:
    """A plain number.

    Attributes:
        value: What it is.
        places: How many decimal places it is written with; None if it is a fraction.
        unit: The first word behind it, or "".
        name: The variable that it is said to be the value of, or "".
    """

    value: Fraction
    places: int | None
    unit: str = ""
    name: str = ""

    def equals(self, other: "Number") -> bool:
        """Return whether both are the same number.

        Values are compared exactly, but that a fraction equals its rounding to six or more places, and that a float's
        noise in the sixteenth place is nothing. Units and names differ where both have one.
        """
        if any(mine and its and mine != its for mine, its in ((self.unit, other.unit), (self.name, other.name))):
            return False
        if self.value == other.value:
            return True
        (few, rounded), (many, precise) = sorted(
            ((number.places, number.value) for number in (self, other)),
            key=lambda pair: (pair[0] is None, pair[0] or 0),
        )
        if few is None:
            return False
        if many is None:
            return few >= 6 and abs(rounded - precise) <= Fraction(1, 2 * 10**few)
        return many >= 15 and abs(rounded - precise) <= Fraction(1, 10**15)


def answer_part(text: str) -> str | None:
    r"""Return the part of a text that is its answer, or None.

    It is what the last <answer> holds; in it, or without one, what the last \boxed{} holds; else the last line that
    begins with ####; else what is said to be "the answer"; else the whole text, if it is an expression; else its last
    number or formula, unless that is a part of an expression, a list or a range.
    """
    if tagged := _TAGGED.findall(text):
        text = tagged[-1]
    box = last_box(text)
    if box is not None:
        return box or None
    text = _EMPHASIS.sub("", _TAG.sub("", text)).strip()
    if found := _HASHES.findall(text):
        return _clause(found[-1])
    if (found := _STATED.findall(text)) and _is_expression(clause := _clause(found[-1])):
        return clause
    return (text or None) if _is_expression(text) else _last_in_prose(text)


def number_in(part: str) -> Number | None:
    """Return the plain number that a whole expression is, with its unit and name, or None."""
    text = _clean(_formula(part)).strip().rstrip(".,;").strip()
    text, currency = _CURRENCY.sub("", text), _CURRENCY.findall(text)
    name = ""
    if "=" in text:
        left, _, text = text.rpartition("=")
        if found := _NAME.match(left):
            name = found[1]
        elif re.search(r"[,<>≤≥≠]|[^\W\d_][^\n]*[\d=]|[\d=][^\n]*[^\W\d_]", left):
            return None
    text = text.strip()
    while text[:1] + text[-1:] in ("()", "{}") and not re.search(r"[(){},]", text[1:-1]):
        text = text[1:-1].strip()
    found = _NUMBER.match(text)
    value = _value(found) if found else None
    unit = _unit(text[found.end() :]) if found else None
    if value is None or unit is None:
        return None
    fraction, places = value
    word, factor = unit
    return Number(fraction * factor, places, word or "".join(currency).replace("$", ""), name)


def is_plain(answer: str) -> bool:
    """Return whether a right answer is a plain number, which is compared without math-verify."""
    return number_in(_wanted(answer)) is not None


def has_math_verify() -> bool:
    """Return whether the package math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Return whether the answer that a text gives equals one of the right ones."""
    part = answer_part(text)
    if part is None:
        return len(text) <= MAX_EXPRESSION and any(_same_text(text, answer) for answer in answers)
    return len(part) <= MAX_EXPRESSION and any(_equal(part, _wanted(answer)) for answer in answers)


@functools.lru_cache(maxsize=10_000)
def _wanted(answer: str) -> str:
    """The part of a right answer that is compared: the whole, unless it is prose or marks it."""
    if number_in(answer) is not None:
        return answer
    return answer_part(answer) or answer


@functools.lru_cache(maxsize=10_000)
def _equal(said: str, wanted: str) -> bool:
    if _same_text(said, wanted):
        return True
    numbers = number_in(said), number_in(wanted)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0].equals(numbers[1])
    if any(number is not None and number.unit for number in numbers):
        return False
    texts = [_clean(_formula(part)).replace(_TEXT_MARK, "") for part in (wanted, said)]
    if max(map(len, texts)) > MAX_EXPRESSION or not all(texts) or not has_math_verify():
        return False
    if ("%" in texts[0]) != ("%" in texts[1]) or any(_READ_OTHERWISE.search(text) for text in texts):
        return False
    if re.search(r"\bor\b", texts[1]) and not re.search(r"\bor\b|,|\\pm|\{", texts[0]):
        return False
    return _VERIFIER(*(_formula(part).replace("$", "") for part in (wanted, said)))


def _same_text(said: str, wanted: str) -> bool:
    texts = []
    for part in (said, wanted):
        text = _clean(_formula(part)).replace(_TEXT_MARK, "").replace("$", "").strip().rstrip(".")
        texts.append(re.sub(r"(?<![^\W_])\s+|\s+(?![^\W_])", "", text))
    if all(len(text) > 1 and text.replace(" ", "").isalpha() for text in texts):
        texts = [text.casefold() for text in texts]
    return texts[0] == texts[1] != ""


def _formula(part: str) -> str:
    """Return what is between the dollars or brackets of a formula, where a part is one."""
    found = _ENVIRONMENT.fullmatch(part.strip().rstrip("."))
    return next(filter(None, found.groups())) if found else part


def _clause(text: str) -> str:
    """The beginning of a text, up to the end of a sentence, or to a comma with a word behind it."""
    end = _CLAUSE_END.search(text)
    return (text[: end.start()] if end else text).strip()


def _is_expression(part: str) -> bool:
    bare = _COMMAND.sub(" ", _TEXT.sub(" ", part))
    return bool(part) and (not re.search(r"\s", part) or not _PROSE.search(bare) or number_in(part) is not None)


def _last_in_prose(text: str) -> str | None:
    """The last number or formula of a text, if it is alone."""
    formulas = list(_ENVIRONMENT.finditer(text))
    rest = _UNIT_POWER.sub("", _clean(text[formulas[-1].end() :] if formulas else text))
    numbers = list(_NUMBER.finditer(rest))
    if not numbers:
        listed = len(formulas) > 1 and re.fullmatch(
            r"\W*(?:,|or|and|to)\W*", text[formulas[-2].end() : formulas[-1].start()]
        )
        return None if not formulas or listed else _formula(formulas[-1][0])
    last = numbers[-1]
    before, after = rest[: last.start()], rest[last.end() :]
    if before.endswith("(") and after.startswith(")"):
        before, after = before[:-1], after[1:]
    if last["sign"] and (last["gap"] or re.search(r"\w\Z|[\d)]\s*\Z", before)):
        return None
    before = before.rstrip("$€£¥₹") + ("" if last["sign"] else last["gap"])
    if _EXPRESSION_BEFORE.search(before) or _EXPRESSION_AFTER.match(after):
        return None
    word = re.match(r"(\s*)([^\W\d_]+)", after)
    following = (word[2].casefold() if len(word[2]) > 1 else word[2]) if word else ""
    if following in _MULTIPLIERS:
        return f"{last[0]} {following}"
    product = word and not word[1] and not _TOUCHING_UNITS.fullmatch(following)
    changed = product or _CHANGING.fullmatch(following) or _LONGER.match(after)
    return None if changed else last[0].strip()


def _clean(text: str) -> str:
    """An expression without LaTeX's layout, in ASCII where that is the same."""
    text = _RAISED.sub(lambda found: f"^{{{_plain(found[0])}}}", text)
    text = _LOWERED.sub(lambda found: f"_{{{_plain(found[0])}}}", text)
    text = _VULGAR.sub(lambda found: f" {_plain(found[0])} ", text)
    text = _plain(text).replace("{,}", ",").replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", _LAYOUT.sub(" ", text))
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])|[×·]", " * ", text)
    text = _DEGREES.sub(f" {_TEXT_MARK}degrees ", text)
    text = _TEXT.sub(_text_content, text)
    return _FRACTION.sub(lambda found: f" {found[1] or found[2]}/{found[3] or found[4]} ", text).strip()


def _text_content(found: re.Match[str]) -> str:
    content = found[1].strip()
    return f" {_TEXT_MARK}{content} " if content[:1].isalpha() else f" {content} "


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    return re.sub(r"[\u2010-\u2013\u2212]", "-", text)


def _value(found: re.Match[str]) -> tuple[Fraction, int | None] | None:
    """The value of a number, and its decimal places."""
    places: int | None = None
    exponent = 0
    if found["whole"]:
        if not 0 < int(found["part"]) < int(found["of"]):
            return None
        value = int(found["whole"]) + Fraction(int(found["part"]), int(found["of"]))
    elif found["over"]:
        over, under = _decimal(found["over"]), _decimal(found["under"])
        if over is None or under is None or not under[0]:
            return None
        value = over[0] / under[0]
    else:
        decimal = _decimal(found["digits"] or "1")
        exponent = int(found["power"] or found["times"] or found["e"] or 0) if decimal else 0
        if decimal is None or abs(exponent) > MAX_EXPONENT:
            return None
        value, places = decimal[0] * Fraction(10) ** exponent, max(0, decimal[1] - exponent)
    if found["percent"]:
        value, places = value / 100, None if places is None else places + 2
    return (-value if found["sign"] == "-" else value), places


def _decimal(digits: str) -> tuple[Fraction, int] | None:
    """The value of digits with separators, and its decimal places.

    A comma before three digits separates thousands, before any other number of digits decimals, as in much of Europe.
    """
    digits = re.sub(r"[\s'’]", "", digits).rstrip(".,")
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lstrip("+-")
    if not re.search(r"\d", digits) or len(digits) > MAX_EXPRESSION:
        return None
    if re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+(\.\d+)?|[1-9]\d?(,\d{2})+,\d{3}(\.\d+)?", digits):
        digits = digits.replace(",", "")
    elif re.fullmatch(r"[1-9]\d{0,2}(\.\d{3})+,\d+|[1-9]\d{0,2}(\.\d{3}){2,}|\d+,\d+", digits):
        digits = digits.replace(".", "").replace(",", ".")
    if not re.fullmatch(r"\d*\.?\d+", digits):
        return None
    return sign * Fraction(digits), len(digits.partition(".")[2])


def _unit(rest: str) -> tuple[str, int] | None:
    """The first word of the unit behind a number, and the factor before it ("million"); None if it is no unit."""
    touching = rest[:1].isalpha()
    text = re.sub(r"(?<=[^\W\d_])\s*\^\s*\{?\s*-?[1-3]\s*\}?(?!\d)", "", rest).strip(" .")
    marked, text = text.startswith(_TEXT_MARK), text.replace(_TEXT_MARK, "")
    if not text:
        return "", 1
    if not _UNIT.fullmatch(text):
        return None
    words = re.split(r"[ ./'-]+", text.casefold())
    if touching and not _TOUCHING_UNITS.fullmatch(words[0]):
        return None
    factor = _MULTIPLIERS.get(words[0], 1)
    words = words[1:] if words[0] in _MULTIPLIERS else words
    single = any(len(word) == 1 and word != "a" for word in words) and not marked
    odd = [w for w in words if _CONNECTING.fullmatch(w) or (_CHANGING.fullmatch(w) and not (marked and len(w) == 1))]
    if single or odd or len(words) > 8:
        return None
    return (words[0].rstrip("s") or words[0] if words else ""), factor


class _Verifier:
    """math-verify in a process of its own, begun when first asked, and again after it had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[str] = queue.Queue()

    def __call__(self, wanted: str, said: str) -> bool:
        """Return whether two expressions are shown to be equal, in time and within the process's memory."""
        if self._process is None:
            self._process = self._begun()
        line = json.dumps([wanted, said]) + "\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line)
            self._process.stdin.flush()
            return self._replies.get(timeout=CALL_SECONDS) == "true"
        except (queue.Empty, OSError):
            self.end()
            return False

    def _begun(self) -> subprocess.Popen[str]:
        posix = sys.platform != "win32"
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            preexec_fn=end_with_parent(signal.SIGKILL) if posix else None,
            process_group=0 if posix else None,  # Ctrl-C is for the process that trains
        )
        replies: queue.Queue[str] = queue.Queue()
        self._replies = replies

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                replies.put(line.strip())
            replies.put("ended")

        threading.Thread(target=listen, daemon=True).start()
        try:
            begun = replies.get(timeout=START_SECONDS)
        except queue.Empty:
            begun = ""
        if begun != "ready":
            process.kill()
            raise RuntimeError("math-verify cannot be imported; install it again: pip install math-verify")
        return process

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


_VERIFIER = _Verifier()
