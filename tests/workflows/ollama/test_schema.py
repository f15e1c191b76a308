"""JSON schemas that answers follow: what is none, what a reference may refer to, what an answer breaks."""

import json
from pathlib import Path

import pytest

from workflows.errors import UserError
from workflows.ollama.schema import InvalidAnswer, read_schema, validated


def written(folder: Path, schema: object) -> Path:
    file = folder / "schema.json"
    file.write_text(schema if isinstance(schema, str) else json.dumps(schema))
    return file


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ('{"type": "objekt"}', "is not a JSON schema: at type"),
        ('{"$ref": "https://example.org/x"}', "is not fetched"),
        ('{"$dynamicRef": "https://example.org/x"}', "is not fetched"),
        ('{"$ref": "#/$defs/none"}', "refers to #/\\$defs/none, where it has no schema"),
        ('{"properties": {"a": {"$ref": "#foo"}}}', "refers to #foo, where"),
        ('{"items": {"$ref": "#/required"}, "required": ["a"]}', "refers to #/required, where"),
        ('{"$ref": "#/allOf/first", "allOf": [true]}', "refers to #/allOf/first, where"),
        ('{"$ref": "#"}', "leads back to itself"),
        ('{"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"$ref": "#/properties/a"}}}', "leads back"),
        ('{"pattern": "("}', "is not a JSON schema: at pattern"),
        ("[1]", "does not hold a JSON object"),
        ('{"type"', "line 1: not valid JSON"),
    ],
)
def test_a_schema_that_is_none_is_refused(schema: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        read_schema(written(tmp_path, schema))


def test_references_within_a_schema_are_followed(tmp_path: Path) -> None:
    tree = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}},
            "example": {"const": {"$ref": "is no reference here"}},
        },
    }
    schema = read_schema(written(tmp_path, tree))
    assert validated('{"children": [{"children": []}]}', schema) == {"children": [{"children": []}]}
    with pytest.raises(InvalidAnswer, match="at children/0/children, 3 is not of type 'array'"):
        validated('{"children": [{"children": 3}]}', schema)
    with pytest.raises(InvalidAnswer, match="cannot be checked"):
        validated("1", read_schema(written(tmp_path, {"allOf": [{"$ref": "#"}]})))
