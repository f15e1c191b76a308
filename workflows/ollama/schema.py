"""Answers in a form that a JSON schema describes: Ollama makes a grammar of it, and what comes is checked against it.

The grammar keeps a model to the form, but not to all of it (a pattern or a range may be beyond it), and an answer that
the limit on tokens cuts is no JSON at all. So an answer is taken for valid when it has been validated.
"""

from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match

from workflows.errors import UserError, first_line
from workflows.files import read_json
from workflows.untrusted import parse_json


class InvalidAnswer(UserError):
    """An answer does not follow its schema."""


def read_schema(file: Path) -> dict[str, Any]:
    """Read a JSON schema (draft 2020-12).

    Raises:
        UserError: If the file is missing, no JSON object, no schema, or refers to schemas elsewhere.
    """
    schema = read_json(file)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as e:
        at = "/".join(map(str, e.absolute_path)) or "its top level"
        raise UserError(f"{file} is not a JSON schema: at {at}, {e.message}") from None
    if foreign := [ref for ref in _references(schema) if not ref.startswith("#")]:
        raise UserError(f"{file} refers to {foreign[0]}, which is not fetched. Put it under $defs of the same file.")
    return schema


def _references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [ref for item in schema for ref in _references(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
    return own + [ref for item in schema.values() for ref in _references(item)]


def validated(text: str, schema: dict[str, Any]) -> Any:
    """The value that an answer is.

    Args:
        text: The answer.
        schema: What it must follow.

    Raises:
        InvalidAnswer: If it is not JSON, or not such JSON.
    """
    try:
        value = parse_json(text)
    except ValueError as e:
        raise InvalidAnswer(
            f"The answer is not whole JSON ({first_line(e)}): {text[-80:]!r}. If it was cut, raise --num_predict."
        ) from None
    if (problem := best_match(Draft202012Validator(schema).iter_errors(value))) is not None:
        at = "/".join(map(str, problem.absolute_path)) or "its top level"
        raise InvalidAnswer(f"The answer does not follow the schema: at {at}, {problem.message[:300]}")
    return value
