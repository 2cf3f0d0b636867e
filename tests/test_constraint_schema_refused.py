"""What is no JSON schema, or says what no automaton can: refused by its path. And what a caller may have instead of a dict."""

import datetime
import json
import math
import random

import pydantic
import pytest
from languages import holds, sample

from generation.constraints.schema import LARGEST, schema_expression
from generation.constraints.schema_reading import read_schema


def inside(schema):
    return {"type": "object", "properties": {"age": schema}, "required": ["age"]}


@pytest.mark.parametrize(
    "keyword",
    [
        "multipleOf", "uniqueItems", "contains", "minContains", "maxContains", "minProperties", "maxProperties", "patternProperties",
        "propertyNames", "dependentRequired", "dependentSchemas", "dependencies", "if", "then", "else", "not", "unevaluatedProperties",
        "unevaluatedItems", "contentEncoding", "contentMediaType", "$anchor", "$dynamicRef", "nullable", "$id", "extends", "x-anything",
    ],
)  # fmt: skip
def test_unsupported_keyword_is_refused_by_its_path(keyword):
    schema = {"type": "array", keyword: True}
    with pytest.raises(ValueError, match=rf"\$\.properties\.age\.{keyword.replace('$', chr(92) + '$')}\b"):
        schema_expression(inside(schema))


def test_keywords_that_say_nothing_of_the_value_are_passed_over():
    notes = {"title": "T", "description": "D", "default": 3, "examples": [4], "$comment": "C", "readOnly": True, "deprecated": False}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x", **notes, "type": "integer", "minimum": 1}
    assert schema_expression(schema) == schema_expression({"type": "integer", "minimum": 1})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "minimum": 3}, r"\$\.properties\.age\.minimum, which means nothing for the type 'string'"),
        ({"type": ["null", "integer"], "maxLength": 3}, r"\$\.properties\.age\.maxLength, which means nothing"),
        ({"minimum": 3, "pattern": "a"}, r"of several types; expected a `type`"),
        ({"type": "string", "format": "uri"}, r"holds 'uri' at \$\.properties\.age\.format; expected one of the formats date, time"),
        ({"type": "string", "pattern": "(?=a)"}, r"`\$\.properties\.age\.pattern` is '\(\?=a\)', which holds a look-around"),
        ({"type": "string", "minLength": 4, "maxLength": 3}, r"minLength 4 and maxLength 3 at \$\.properties\.age"),
        ({"type": "string", "minLength": -1}, r"-1 at \$\.properties\.age\.minLength; expected an integer of at least 0"),
        ({"type": "string", "maxLength": True}, "expected an integer of at least 0"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, r"minItems 2 and maxItems 1 at \$\.properties\.age"),
        ({"type": "array", "items": [{}], "prefixItems": [{}]}, r"\$\.properties\.age\.items beside `prefixItems`"),
        ({"type": "array", "items": {}, "additionalItems": {}}, r"\$\.properties\.age\.additionalItems, which means nothing without"),
        ({"enum": []}, r"\[\] at \$\.properties\.age\.enum; expected a list of values, not empty"),
        ({"enum": ["a"], "type": "integer"}, r"allows no value at \$\.properties\.age\.enum"),
        ({"enum": ["a", "b"], "const": "c"}, r"allows no value at \$\.properties\.age\.enum"),
        ({"enum": ["a"], "minLength": 1}, r"\$\.properties\.age\.minLength beside `enum`"),
        ({"const": math.nan}, r"nan at \$\.properties\.age\.const, which JSON cannot write"),
        ({"const": "\ud800"}, r"\$\.properties\.age\.const, which JSON cannot write"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, r"no integer of up to 19 digits at \$\.properties\.age"),
        ({"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 3}, r"no integer of up to 19 digits at \$\.properties\.age"),
        ({"type": "integer", "minimum": 10**19}, r"no integer of up to 19 digits"),
        ({"type": "number", "minimum": 3, "maximum": 2.5}, r"no number at \$\.properties\.age: from 3 to 2.5"),
        ({"type": "number", "exclusiveMinimum": 3, "maximum": 3}, r"no number at \$\.properties\.age"),
        ({"type": "number", "minimum": 1e300}, r"the bound 1E\+300 at \$\.properties\.age"),
        ({"type": "number", "exclusiveMinimum": 0.1234567890123456}, r"expected one of at most 15 digits"),
        ({"type": "integer", "enum": [math.inf, math.nan]}, r"allows no value at \$\.properties\.age\.enum"),
        ({"type": "integer", "minimum": 10**400}, r"no integer of up to 19 digits"),
        ({"type": "number", "maximum": math.inf}, r"inf at \$\.properties\.age\.maximum; expected a number"),
        ({"type": "number", "minimum": "3"}, r"'3' at \$\.properties\.age\.minimum; expected a number"),
        ({"type": "number", "minimum": 3, "exclusiveMinimum": True}, r"True at \$\.properties\.age\.exclusiveMinimum; expected a number"),
        ({"type": "strin"}, r"'strin' at \$\.properties\.age\.type; expected one of string"),
        ({"type": []}, r"\[\] at \$\.properties\.age\.type"),
        ({"type": "object"}, r"names no properties at \$\.properties\.age; expected them, or `additionalProperties`: true"),
        ({"type": "object", "properties": {}, "required": ["b"]}, r"demands 'b' at \$\.properties\.age\.required"),
        ({"anyOf": []}, r"\[\] at \$\.properties\.age\.anyOf; expected a list of schemas, not empty"),
        ({"anyOf": [{"type": "object", "properties": {}}, {"not": {}}]}, r"\$\.properties\.age\.anyOf\[1\]\.not, which is not supported"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, r"\$\.properties\.age\.oneOf\[0\] and \$\.properties\.age\.oneOf\[1\]"),
        ({"oneOf": [{"type": "object", "properties": {}}] * 2}, r"\$\.properties\.age\.oneOf\[0\]"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, r"contradicts itself at \$\.properties\.age"),
        ({"allOf": [{"enum": [1]}, {"enum": [2]}]}, r"contradicts itself at \$\.properties\.age"),
        ({"allOf": [{"enum": ["a"]}, {"minLength": 1}]}, r"demands \$\.properties\.age\.allOf\[1\]\.minLength of the values of an `enum`"),
        ({"allOf": [{"prefixItems": [{}]}, {"items": {}}]}, r"\$\.properties\.age\.allOf\[0\] and \$\.properties\.age\.allOf\[1\] at once"),
        ({"$ref": "other.json"}, r"refers to 'other.json' at \$\.properties\.age\.\$ref"),
        ({"$ref": "#/$defs/none"}, r"refers to '#/\$defs/none' at \$\.properties\.age\.\$ref, where it holds nothing"),
        (3, r"3 at \$\.properties\.age; expected a schema"),
        (False, "allows no value"),
        ({"type": "string", "maxLength": LARGEST}, r"stands for [\d,]+ characters, repetitions written out; expected at most 200,000"),
    ],
)
def test_bad_schema_is_refused_by_its_path(schema, message):
    with pytest.raises(ValueError, match=message):
        schema_expression(inside(schema))


@pytest.mark.parametrize("settings", [{"whitespace": "tabs"}, {"depth": -1}, {"depth": True}, {"depth": 1.5}])
def test_bad_setting_is_refused(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` is "):
        schema_expression({"type": "null"}, **settings)


# What a caller has


class Address(pydantic.BaseModel):
    street: str = pydantic.Field(min_length=1)
    number: int = pydantic.Field(ge=1, lt=1000)


class Person(pydantic.BaseModel):
    name: str
    born: datetime.date | None = None
    addresses: list[Address] = pydantic.Field(max_length=2)
    weights: dict[str, float]
    friend: "Person | None" = None


def test_pydantic_models_are_read_and_read_what_is_written():
    assert read_schema(Person) == Person.model_json_schema() == read_schema(json.dumps(Person.model_json_schema()))
    language, draw = schema_expression(Person, depth=1), random.Random(0)
    for _ in range(60):
        Person.model_validate_json(sample(language, draw))
    person = Person(name='A "B"', addresses=[Address(street="é", number=7)], weights={"x": 1.5}, born=datetime.date(2000, 2, 29))
    assert holds(language, person.model_dump_json()) and holds(language, person.model_dump_json(exclude_none=True))
    assert not holds(language, '{"name":"a","addresses":[{"street":"","number":7}],"weights":{}}')


@pytest.mark.parametrize("given", ["{", 3, None, "[1]", ["a"]])
def test_what_is_no_schema_is_refused(given):
    with pytest.raises(ValueError, match="`schema` is "):
        schema_expression(given)
