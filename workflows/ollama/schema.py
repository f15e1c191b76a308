"""Answers in a form that a JSON schema describes: Ollama makes a grammar of it, and what comes is checked against it.

The grammar keeps a model to the form, but not to all of it (a pattern or a range may be beyond it), and an answer that
the limit on tokens cuts is no JSON at all. So an answer is taken for valid when it has been validated.
"""

from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from workflows.errors import UserError, first_line
from workflows.files import read_json
from workflows.untrusted import parse_json


class InvalidAnswer(UserError):
    """An answer does not follow its schema."""


def read_schema(file: Path) -> dict[str, Any]:
    """Read a JSON schema (draft 2020-12).

    Raises:
        UserError: If the file is missing, no JSON object, no schema, or refers to schemas elsewhere or to none.
    """
    schema = read_json(file)
    try:
        Draft202012Validator.check_schema(schema, Draft202012Validator.FORMAT_CHECKER)  # a pattern is to be one
    except SchemaError as e:
        at = "/".join(map(str, e.absolute_path)) or "its top level"
        raise UserError(f"{file} is not a JSON schema: at {at}, {e.message}") from None
    resource = DRAFT202012.create_resource(schema)
    if problem := _reference_problem(resource, Registry().resolver_with_root(resource)):
        raise UserError(f"{file} {problem}")
    return schema


def _reference_problem(schema: Resource[Any], resolver: Any) -> str | None:
    """What is wrong with the references in a schema and in its parts, or None; `resolver` is the library's."""
    own = schema.contents if isinstance(schema.contents, dict) else {}
    for reference in (own[name] for name in ("$ref", "$dynamicRef") if name in own):
        if not reference.startswith("#"):
            return f"refers to {reference}, which is not fetched. Put it under $defs of the same file."
        try:
            target = resolver.lookup(reference)
            passed = [own]
            Draft202012Validator.check_schema(target.contents)
            while isinstance(target.contents, dict) and "$ref" in target.contents:
                if any(target.contents is one for one in passed):
                    return f"refers to {reference}, which leads back to itself and never says what an answer is."
                passed.append(target.contents)
                target = target.resolver.lookup(target.contents["$ref"])
                Draft202012Validator.check_schema(target.contents)
        except (Unresolvable, ValueError, SchemaError):  # ValueError: a word where a list wants a number
            return f"refers to {reference}, where it has no schema. Put one there, under $defs."
    parts = (_reference_problem(part, resolver.in_subresource(part)) for part in schema.subresources())
    return next(filter(None, parts), None)


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
    try:
        problem = best_match(Draft202012Validator(schema).iter_errors(value))
    except RecursionError:
        raise InvalidAnswer(
            "The answer cannot be checked: it is nested too deeply, or the schema leads back to itself."
        ) from None
    if problem is not None:
        at = "/".join(map(str, problem.absolute_path)) or "its top level"
        raise InvalidAnswer(f"The answer does not follow the schema: at {at}, {problem.message[:300]}")
    return value
