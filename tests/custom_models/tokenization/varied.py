"""Ten thousand strings that differ in every way that a tokenizer may trip over; the same ones in every run."""

import random
import unicodedata

SNIPPETS = (
    *("I'm", "DON'T", "we'll", "they'Ve", "it'ſ", "'s", "''", "'re'd", "o'clock", "’s", "can't've"),
    *(
        "def f(x):\n    return x**2  # π",
        "for(;;){i++;}",
        "<|endoftext|>",
        "<|endoftext",
        "http://a.b/c?d=%20&e",
        "a_b-c.d",
    ),
    *(
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "🇩🇪🇫🇷",
        "👍🏽",
        "e\u0301",
        "a\u0323\u0302",
        "ก็",
        "नमस्ते",
        "한국어",
        "ㅎㅏㄴ",
        "日本語です。",
        "שָׁלוֹם",
        "مرحبا",
    ),
    *("1234567890", "3.14", "½²Ⅷ", "٣٤٥", "１２３", "1e-10", "$1,000.00", "०१२", "𝟘𝟙"),
    *("\x00", "\x1b[0m", "\x7f", "\x85", "\u200b", "\ufeff", "\ufffd", "\u202e", "\x1c\x1d", "\U0010ffff"),
    *("İSTANBUL", "ß", "ﬁ", "Ǆ", "naïve", "Ångström", "Straße", "ΑΒΓδ", "Привет", "ﷺ", "𝒳", "𐍈"),
)
SPACES = (" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u2028", "\x0b", "\x0c", "")


def varied_strings(number: int = 10_000, seed: int = 0) -> list[str]:
    """Different strings: words of all scripts, emoji, marks, signs, code and white space, alone and mixed.

    Characters that Python's tables do not know (after Unicode 14) are left out: whether they are letters is what the
    libraries' tables disagree about.
    """
    rng = random.Random(seed)
    known = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")]

    def piece() -> str:
        kind = rng.randrange(6)
        length = rng.randint(1, 12)
        if kind == 0:  # characters that are neighbours: one script
            start = rng.randrange(len(known) - 40)
            return "".join(rng.choice(known[start : start + 40]) for _ in range(length))
        if kind == 1:
            return "".join(rng.choice(known) for _ in range(length))
        if kind == 2:
            return "".join(chr(rng.randint(32, 126)) for _ in range(length))
        if kind == 3:
            return "".join(rng.choice(SPACES) for _ in range(rng.randint(1, 5)))
        if kind == 4:
            return rng.choice("etaoinE=-.9 \n") * rng.randint(1, 30)
        return rng.choice(SNIPPETS)

    strings = dict.fromkeys([*SNIPPETS, *SPACES])  # a set that keeps its order
    while len(strings) < number:
        strings[rng.choice(SPACES).join(piece() for _ in range(rng.randint(1, 8)))] = None
    return list(strings)[:number]
