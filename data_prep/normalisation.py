"""Texts brought into a form in which they can be compared: without case, punctuation and layout, in any script.

`normalise` keeps what distinguishes one answer from another: letters with their marks, digits, signs, operators,
symbols of units and emoji. `words_of` keeps words alone, to look for a phrase inside a text.
"""

import unicodedata

import regex

_INVISIBLE = regex.compile(r"[[\p{Cf}--[\U000E0020-\U000E007F]]\uFE00-\uFE0F™®©℠]+", regex.V1)
# 5² is not 52; the three that are left out have no other form
_RAISED = regex.compile(r"[[ª²³¹ºʰ-ʸˠ-ˤᴬ-ᵡᵸᶛ-ᶿ⁰ⁱ⁴-ⁿ]--[ᴯᴻᵎ]]+", regex.V1)
_LOWERED = regex.compile(r"(?<=[\p{N}])[₀-₉]+")  # 10₂ is not 102; CO₂ is CO2
_SEPARATE = regex.compile(r"[¼-¾⅐-⅞↉①-⒛⓪-⓿❶-➓]")  # 1½ is not 11/2
_DOTTED = regex.compile("i\u0307+")  # the Turkish İ in lower case
_DASH = regex.compile(r"[\p{Pd}−]")
_LATEX = regex.compile(r"(\${1,2})(?![\s$])([^$\n]*[^$\s])\1(?!\d)")
_WORDS = regex.compile(r"[\p{L}\p{M}\p{N}_]+")
_TOKEN = regex.compile(
    r"""(?<word>(?:(?<![\p{L}\p{M}\p{N}_.])\.(?=\p{N}))?   # .5
            [\p{L}\p{M}\p{N}_]+(?:(?<=\p{N})[.,:·](?=\p{N})[\p{L}\p{M}\p{N}_]+)*
            (?:(?<=[\p{L}\p{M}]\p{N}*)(?:\++|\#|-)(?![\p{L}\p{M}\p{N}_+\#-]))?)   # C++, C#, HER2-
      | (?<minus>(?<!-)-(?!-)) | (?<times>(?<!\*)\*{1,2}(?!\*)) | (?<slash>/) | (?<percent>[%‰]) | (?<money>\p{Sc})
      | (?<symbol>[\p{Sm}\p{So}^\U0001F3FB-\U0001F3FF\U000E0020-\U000E007F])""",
    regex.VERBOSE,
)
_NUMBER = regex.compile(r"-?\.?\p{N}[\p{N}.,:·]*")
_LETTER = regex.compile(r"-?\p{L}\p{M}*")
_BEFORE_NUMBER = regex.compile(r"\s*[-+]?\s*\p{Sc}?\s*[-+]?\s*\.?\p{N}")
_BEFORE_LETTER = regex.compile(r"\s*[-+]?\s*\p{L}\p{M}*(?![\p{L}\p{M}\p{N}_])")
_TOUCHING = regex.compile(r"(?:\p{Sc}\s*[-+]?\s*)?\.?\p{N}|\p{L}")
_WORD_END = regex.compile(r"[\p{L}\p{M}\p{N}_]")


def normalise(text: str) -> str:
    """Return the tokens of a text joined by single spaces, so that texts compare without case, punctuation and layout.

    Kept are words with the marks of their script, numbers with their points, a minus before a number and between
    operands, other operators, signs behind a word ("C++", "HER2-"), percent and currencies beside numbers, and emoji.
    A hyphen between words is layout, and so are marks of emphasis and a dash. NFC and NFD, wide and narrow forms and
    cases are the same. Normalising twice changes nothing. A text with nothing of this gives "".
    """
    folded = _folded(text)
    tokens: list[str] = []
    sign = ""
    for found in _TOKEN.finditer(folded):
        kind, token, place = str(found.lastgroup), found[0], found.start()
        if kind == "minus":
            role = _role_of_minus(tokens[-1] if tokens else "", folded, place)
            sign = "-" if role == "sign" else ""
            tokens += ["-"] if role == "operator" else []
        elif kind in ("word", "symbol") or _counts(kind, tokens[-1] if tokens else "", folded, place, found.end()):
            tokens.append(sign + token)
            sign = ""
    return " ".join(tokens)


def words_of(text: str) -> list[str]:
    """Return a text's words and numbers, without case and signs."""
    return _WORDS.findall(_folded(text))


def _folded(text: str) -> str:
    """A text with one code point for what is one character, in lower case."""
    if not text.isascii():
        text = _INVISIBLE.sub("", text)
        text = _SEPARATE.sub(lambda found: f" {found[0]} ", text)
        text = _RAISED.sub(lambda found: f"^{found[0]}", text)
        text = _LOWERED.sub(lambda found: f"_{found[0]}", text)
        for _ in range(2):  # a folded character may decompose, and a decomposed one fold
            text = _DOTTED.sub("i", unicodedata.normalize("NFKD", text).casefold())
            text = unicodedata.normalize("NFKC", text)
        text = _DASH.sub("-", text.replace("\u2044", "/"))
    text = text.lower().replace("!=", "≠")
    return _LATEX.sub(r" \2 ", text) if "$" in text else text


def _is_operand(token: str) -> bool:
    return token in ("%", "‰") or bool(_NUMBER.fullmatch(token) or _LETTER.fullmatch(token))


def _role_of_minus(before: str, text: str, place: int) -> str | None:
    """Return what a minus is: the "sign" of the number behind it, an "operator", or, if it is a hyphen or a dash, None.

    Args:
        before: The token before it, or "".
        text: The text.
        place: Where in it the minus is.
    """
    after = place + 1
    number, letter = _BEFORE_NUMBER.match(text, after), _BEFORE_LETTER.match(text, after)
    touching = _TOUCHING.match(text, after)
    if place and _WORD_END.match(text, place - 1):  # 5-3, but not T-cell, COVID-19 and 5-year
        between = number and (not touching or _NUMBER.fullmatch(before))
        return "operator" if between and _is_operand(before) else None
    if not number and not letter:
        return None
    if _is_operand(before):
        return "operator"
    if before and _WORDS.search(before):  # is -5, but not Type - 2
        return "sign" if number and touching else None
    return "sign" if number or touching else None


def _counts(kind: str, before: str, text: str, start: int, end: int) -> bool:
    """Return whether a character that is an operator or a unit in one place, and layout in others, is the former."""
    number = _BEFORE_NUMBER.match(text, end)
    if kind == "percent":
        return bool(_NUMBER.fullmatch(before))
    if kind == "money":
        return bool(number or _NUMBER.fullmatch(before))
    if kind == "slash":
        return bool(number and _NUMBER.fullmatch(before))
    spaced = text[start - 1 : start].isspace(), text[end : end + 1].isspace()  # *emphasis* is spaced on one side
    operands = _is_operand(before) and (number or _BEFORE_LETTER.match(text, end))
    return bool(operands and spaced[0] == spaced[1])
