"""The one exception that a user is meant to read."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A condition the user can fix: a missing file, a bad row, a port in use.

    `python -m workflows` prints it as one message without a traceback and exits with code 1. The text names the cause
    (the file, the line, the value) and the cure (the command or setting to change).
    """


def report_all(problems: list[str]) -> None:
    """Raise one `UserError` that lists every problem found, so that a user fixes them in one go.

    Args:
        problems: Messages, one per problem; an empty list means all is well.

    Raises:
        UserError: If there is at least one problem.
    """
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)]))


def listed(problems: list[str], what: str, most: int = 10, number: int | None = None) -> str:
    """Problems one below the other, after their number.

    Args:
        problems: Messages, one per problem.
        what: What follows their number.
        most: Maximum number of problems that are shown.
        number: Number of things that have these problems, if it is not one each.
    """
    more = [f"  - … and {len(problems) - most:,} more"] if len(problems) > most else []
    return "\n".join(
        [f"{number or len(problems):,} {what}:", *(f"  - {problem}" for problem in problems[:most]), *more]
    )


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The names nearest to one that is unknown, as a question after a blank; nothing if none is near.

    Args:
        name: What was asked for.
        known: What there is.
        cutoff: How alike they must be, from 0 to 1.
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f" Did you mean {', '.join(near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """An exception's message up to its first line break, or its class's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def run_file(main: Callable[..., None]) -> None:
    """The command line of a file that is run by itself: its function's arguments; what goes wrong is one message."""
    from jsonargparse import auto_cli

    try:
        auto_cli(main, as_positional=False)
    except UserError as e:
        sys.exit(f"error: {e}")
