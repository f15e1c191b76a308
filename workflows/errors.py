"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A condition the user can mend: a missing file, a bad row, a port in use.

    `python -m workflows` prints it as one message without a traceback and exits with code 1. The text names the cause
    (the file, the line, the value) and the cure (the command or setting to change).
    """


def report_all(problems: list[str]) -> None:
    """Raise one `UserError` that lists every problem found, so that a user mends them in one go.

    Args:
        problems: Messages, one per problem; an empty list means all is well.

    Raises:
        UserError: If there is at least one problem.
    """
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)]))


def first_line(error: BaseException) -> str:
    """An exception's message up to its first line break, or its class's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
