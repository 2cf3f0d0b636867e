"""A JSON schema as a language: `json`, `datetime` and, where it is installed, jsonschema with its formats are the judges."""

import datetime
import ipaddress
import itertools
import json
import math
import random
import uuid

import pytest
from languages import NoString, holds, sample, size

from generation.constraints.regex import expanded
from generation.constraints.schema import schema_expression
from generation.constraints.strings import FORMATS

COMPACT, SPACED = (",", ":"), (", ", ": ")
WORDS = ["", "a", "ab", 'q"', "\\", "é", "日本", "😀", "\n\t", "\x00\x1f", "x" * 5, "/", "\x7f", "\u2028"]
PATTERNS = {"^[a-c]{2,4}$": ["ab", "abc", "cccc"], "b+": ["b", "abc", 'b"'], '^"': ['"', '"a'], "^é?$": ["", "é"], r"\d$": ["x1", "22"]}
DATES = ["2024-02-29", "1999-12-31", "2000-02-29", "0001-01-01"]


@pytest.fixture(scope="module")
def valid():
    """Whether a value is valid for a schema, as jsonschema says, formats included."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: nobody to judge values by their schema")
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return lambda schema, value: jsonschema.Draft202012Validator(schema, format_checker=checker).is_valid(value)


def written(value, separators=SPACED):
    return json.dumps(value, ensure_ascii=False, separators=separators)


def allows(schema, value, **settings):
    return holds(schema_expression(schema, **settings), written(value))


# Schemas and values of them by chance


def case(kind, **properties):
    return {"type": "object", "properties": {"kind": {"const": kind}, **properties}, "required": ["kind"]}


def random_schema(draw, depth):
    kinds = ["string", "string", "integer", "number", "boolean", "null", "enum", "const"]
    kind = draw.choice(kinds + ["object", "object", "array", "anyOf", "oneOf", "allOf", "prefix", "types", "open"] * (depth > 0))
    if kind == "string":
        extra = draw.choice(
            [{}, {"minLength": 1}, {"minLength": 1, "maxLength": 3}, {"pattern": draw.choice(list(PATTERNS))}, {"format": "date"}]
        )
        return {"type": "string", "title": "A string", **extra}
    if kind in ("integer", "number"):
        least, most = sorted((draw.randint(-120, 120), draw.randint(-120, 120)))
        shift = draw.choice([0, 0.25, 0.5]) if kind == "number" else 0
        keywords = {
            draw.choice(["minimum", "exclusiveMinimum"]): least + shift,
            draw.choice(["maximum", "exclusiveMaximum"]): most + 2 + shift,
        }
        return {"type": kind, **draw.choice([{}, keywords, dict([draw.choice(list(keywords.items()))])])}
    if kind == "types":
        return {"type": draw.sample(["string", "integer", "null", "boolean"], 2)}
    if kind == "enum":
        return {"enum": draw.sample(["a", 'q"', 1, -2.5, None, True, [1, "x"], {"k": [{}]}], draw.randint(1, 4))}
    if kind == "const":
        return {"const": draw.choice(["a", "日", 1, False, None, {"a": 1, "b": [None]}])}
    if kind in ("object", "open"):
        names = draw.sample(["a", "b", "long name", "é", 'q"'], draw.randint(0, 3))
        found = {"type": "object", "properties": {name: random_schema(draw, depth - 1) for name in names}}
        found["required"] = [name for name in names if draw.random() < 0.5]
        more = {"additionalProperties": random_schema(draw, depth - 1)} if kind == "open" else {"additionalProperties": False}
        return found | draw.choice([{}, more] if kind == "object" else [more])
    if kind == "array":
        least = draw.randint(0, 2)
        return {"type": "array", "items": random_schema(draw, depth - 1), "minItems": least} | draw.choice([{}, {"maxItems": least + 1}])
    if kind == "prefix":
        found = {"type": "array", "prefixItems": [random_schema(draw, depth - 1) for _ in range(2)], "minItems": draw.randint(0, 2)}
        return found | draw.choice([{"items": False}, {"items": random_schema(draw, depth - 1)}, {"maxItems": 2}])
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth - 1) for _ in range(2)]}
    if kind == "oneOf":
        objects = [case(name, v=random_schema(draw, depth - 1)) for name in "ab"]
        others = [[{"type": "null"}, {"type": "string", "minLength": 1}], [{"type": "string"}, {"enum": ["a", 1]}]]
        return {"oneOf": draw.choice([objects, *others])}
    return {
        "allOf": [
            {"type": "object", "properties": {"a": random_schema(draw, depth - 1)}},
            {"type": "object", "properties": {"b": random_schema(draw, depth - 1)}, "required": ["b"]},
        ]
    }


def random_value(schema, draw):
    """A value of a schema as `random_schema` makes them: mostly valid."""
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return random_value(draw.choice(schema[keyword]), draw)
    if "allOf" in schema:
        return {name: each for member in schema["allOf"] for name, each in random_value(member, draw).items()}
    kind = draw.choice(schema["type"]) if isinstance(schema["type"], list) else schema["type"]
    if kind == "string":
        if "pattern" in schema:
            return draw.choice(PATTERNS[schema["pattern"]])
        if "format" in schema:
            return draw.choice(DATES)
        return draw.choice([word for word in WORDS if schema.get("minLength", 0) <= len(word) <= schema.get("maxLength", 99)])
    if kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum", -999))
        most = schema.get("maximum", schema.get("exclusiveMaximum", max(999, least)))
        least = min(least, most)
        if kind == "integer":
            return draw.randint(least, most)
        return draw.choice([least, most, round(draw.uniform(least, most), 2), (least + most) / 2])
    if kind == "object":
        kept = [name for name in schema["properties"] if name in schema["required"] or draw.random() < 0.5] if "required" in schema else []
        found = {name: random_value(schema["properties"][name], draw) for name in kept or schema["properties"]}
        if isinstance(schema.get("additionalProperties"), dict) and draw.random() < 0.7:
            found["other\\"] = random_value(schema["additionalProperties"], draw)
        return found
    if kind == "array":
        count = draw.randint(schema["minItems"], schema.get("maxItems", schema["minItems"] + 2))
        first = schema.get("prefixItems", [])
        later = schema.get("items")
        return [random_value(first[i] if i < len(first) else later, draw) for i in range(count) if i < len(first) or later]
    return draw.choice([True, False]) if kind == "boolean" else None


@pytest.mark.parametrize("seed", range(10))
def test_random_texts_validate(seed, valid):
    """Of random schemas, in every whitespace."""
    draw, judged = random.Random(seed), 0
    for _ in range(40):
        schema = random_schema(draw, 3)
        language = schema_expression(schema, whitespace=draw.choice([None, "compact", "spaced", "any"]))
        for _ in range(5):
            try:
                string = sample(language, draw)
            except NoString:
                continue
            value = json.loads(string)
            assert valid(schema, value), (schema, string)
            judged += 1
    assert judged > 100


@pytest.mark.parametrize("seed", range(6))
def test_changed_texts_are_of_the_language_only_where_they_validate(seed, valid):
    """A character left out, doubled or changed, or a piece of another text of the schema put in."""
    draw, judged = random.Random(300 + seed), 0
    for _ in range(40):
        schema = random_schema(draw, 2)
        language = schema_expression(schema)
        try:
            strings = [sample(language, draw) for _ in range(6)]
        except NoString:
            continue
        for string, other in zip(strings, strings[1:], strict=False):
            first, last = sorted(draw.choices(range(len(string) + 1), k=2))
            begin, end = sorted(draw.choices(range(len(other) + 1), k=2))
            letter = draw.choice('",:\\ 0-.e[]{}tn')
            for piece in ("", other[begin:end], letter, letter + string[first:last]):
                changed = string[:first] + piece + string[last:]
                if holds(language, changed):
                    assert valid(schema, json.loads(changed)), (schema, changed)
                    judged += 1
    assert judged > 30


@pytest.mark.parametrize("seed", range(10))
def test_values_are_written_where_they_are_valid(seed, valid):
    """A value made for a schema and valid is of its language as `json.dumps` writes it; a value that is not valid is not."""
    draw, counts = random.Random(100 + seed), {True: 0, False: 0}
    for _ in range(60):
        schema = random_schema(draw, 3)
        language = schema_expression(schema)
        for made_for in [schema] * 3 + [random_schema(draw, draw.randint(0, 3)) for _ in range(3)]:
            value = random_value(made_for, draw)
            is_valid = valid(schema, value)
            counts[is_valid] += 1
            for separators in (COMPACT, SPACED):
                found = holds(language, written(value, separators))
                assert found == is_valid or is_valid and made_for is not schema, (schema, value)
    assert min(counts.values()) > 60


# Strings


def test_string_is_written_in_one_way():
    r"""As `json.dumps(..., ensure_ascii=False)` does it: no escape that need not be, and small hexadecimal digits."""
    language = schema_expression({"type": "string"})
    for point in [*range(0x180), 0x2028, 0xE000, 0xFFFF, 0x1F600, 0x10FFFF]:
        assert holds(language, written(chr(point))), point
    for other in [
        r'"\u00e9"',
        r'"\u0041"',
        r'"\/"',
        r'"\u000a"',
        r'"\u001F"',
        r'"\ud83d\ude00"',
        '"\n"',
        '"\x1f"',
        '"a',
        'a"',
        '"""',
        r'"\x"',
    ]:
        assert not holds(language, other), other


def test_lengths_count_characters_and_not_what_is_written():
    schema = {"type": "string", "minLength": 2, "maxLength": 3}
    for string, length in [("é", 1), ("\x00", 1), ('""', 2), ("😀😀", 2), ("\\\\\\", 3), ("\x01\x02\x03", 3), ("a\u0301bc", 4)]:
        assert len(string) == length and allows(schema, string) == (2 <= length <= 3), string


def test_string_keywords_hold_together(valid):
    """Escapes stand between them: a quote is one character of a pattern and of a length, and two of the text."""
    schema = {
        "type": "string",
        "pattern": '^["a\\n]*$',
        "minLength": 1,
        "maxLength": 3,
        "allOf": [{"pattern": '"'}, {"pattern": "^[^\\\\]"}],
    }
    language = schema_expression(schema)
    strings = ["".join(letters) for count in range(5) for letters in itertools.product('"a\\\n', repeat=count)]
    accepted = [string for string in strings if holds(language, written(string))]
    assert accepted == [string for string in strings if valid(schema, string)] and len(accepted) > 10


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read_by_those_who_use_them(name, valid):
    readers = {
        "date": datetime.date.fromisoformat,
        "time": datetime.time.fromisoformat,
        "date-time": datetime.datetime.fromisoformat,
        "uuid": uuid.UUID,
        "ipv4": ipaddress.IPv4Address,
        "email": lambda found: found.index("@"),
    }
    draw, schema = random.Random(name), {"type": "string", "format": name}
    language = schema_expression(schema)
    for _ in range(400):
        found = json.loads(sample(language, draw, longest=5))
        readers[name](found)
        assert valid(schema, found), found


def test_every_date_is_written_and_no_other():
    language = schema_expression({"type": "string", "format": "date"})
    for year in (1, 4, 99, 100, 400, 1900, 1996, 2000, 2023, 2024, 2100, 9999, 0):
        for month, day in itertools.product(range(14), (0, 1, 9, 10, 28, 29, 30, 31, 32)):
            string = f"{year:04}-{month:02}-{day:02}"
            try:
                exists = bool(datetime.date.fromisoformat(string))
            except ValueError:
                exists = False
            assert holds(language, f'"{string}"') == exists, string


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("time", ["00:00:00Z", "23:59:59.123456+23:59", "12:30:00-00:30"], ["24:00:00Z", "12:00Z", "12:00:00", "12:00:60Z", "12:00:00.Z"]),
        ("date-time", ["2024-02-29T12:00:00Z"], ["2023-02-29T12:00:00Z", "2024-02-29 12:00:00Z", "2024-02-29T12:00:00"]),
        ("email", ["a@b.de", "first.last+tag@sub-1.example.org"], ["a@b", "@b.de", "a@-b.de", "a..b@c.de", "a b@c.de", "a@b.d"]),
        ("uuid", ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000", "g23e4567-e89b-12d3-a456-426614174000"]),
        ("ipv4", ["0.0.0.0", "255.249.100.9"], ["256.0.0.0", "1.2.3", "01.2.3.4", "1.2.3.4.5"]),
    ],
)
def test_formats_hold_what_they_should(name, good, bad):
    for string in good + bad:
        assert allows({"type": "string", "format": name}, string) == (string in good), string


# Numbers


@pytest.mark.parametrize("seed", range(6))
def test_integer_bounds_are_exact(seed):
    """Every integer from -130 to 1300, for bounds around each power of ten."""
    draw = random.Random(seed)
    for _ in range(12):
        least, most = sorted(draw.choices([-121, -100, -99, -12, -10, -9, -1, 0, 1, 8, 9, 10, 11, 99, 100, 101, 345, 999, 1000, 1234], k=2))
        schema = {"type": "integer", "minimum": least, "maximum": most}
        if draw.random() < 0.4:
            schema = {"type": "integer", "exclusiveMinimum": least - 0.5, "exclusiveMaximum": most + 1}
        schema = {key: schema[key] for key in draw.sample(list(schema), 2)} | {"type": "integer"} if draw.random() < 0.3 else schema
        low, high = ("minimum" in schema or "exclusiveMinimum" in schema), ("maximum" in schema or "exclusiveMaximum" in schema)
        language = schema_expression(schema)
        for value in range(-130, 1300):
            assert holds(language, str(value)) == ((not low or value >= least) and (not high or value <= most)), (schema, value)


def test_integers_have_one_writing_of_up_to_19_digits():
    language = schema_expression({"type": "integer"})
    for string in ("0", "-1", str(2**63 - 1), str(-(2**63)), "9" * 19):
        assert holds(language, string), string
    for string in ("-0", "00", "01", "+1", "1.0", "1e3", "9" * 20, "", "-"):
        assert not holds(language, string), string
    edges = schema_expression({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1})
    for value in (-(2**63), 2**63 - 1, 0, -(2**63) - 1, 2**63, 10**19):
        assert holds(edges, str(value)) == (-(2**63) <= value < 2**63), value


@pytest.mark.parametrize("seed", range(8))
def test_number_bounds_are_exact(seed):
    """Decimals on both sides of a bound, as they are read: the next doubles, other writings of the bound, and random ones."""
    draw = random.Random(seed)
    for _ in range(12):
        least, most = sorted(draw.choice([draw.randint(-12, 12), round(draw.uniform(-20, 20), draw.randint(1, 4)), 0, 0.1]) for _ in "ab")
        above, below = (draw.choice([True, False]) for _ in "ab")
        if least == most:
            continue
        language = schema_expression(
            {
                "type": "number",
                "exclusiveMinimum" if above else "minimum": least,
                "exclusiveMaximum" if below else "maximum": most,
            }
        )
        strings = [str(value) for value in range(-21, 22)] + [f"{draw.uniform(-21, 21):.{draw.randint(1, 6)}f}" for _ in range(40)]
        for bound in (float(least), float(most)):
            for near in (bound, math.nextafter(bound, 99), math.nextafter(bound, -99)):
                strings += [f"{near:.12f}", f"{near:.1f}", f"{near:.14f}", f"{near:.17f}"]
        for string in strings:
            value = float(string)
            inside = (value > least or value == least and not above) and (value < most or value == most and not below)
            digits = len(string.partition(".")[2])
            found = holds(language, string)
            assert not found or inside, (least, most, above, below, string)
            assert found or not inside or digits > 12 or string.startswith("-0") and not float(string), (least, most, above, below, string)


def test_numbers_are_finite_and_read_as_json():
    language, draw = schema_expression({"type": "number"}), random.Random(0)
    for string in ("0", "-0.0", "1.5", "1e+16", "1.5e-07", "2E5", "-12.25", "0." + "0" * 50 + "1", "9" * 19 + ".9e99"):
        assert holds(language, string) and math.isfinite(json.loads(string)), string
    for string in ("01", ".5", "1.", "+1", "1e", "1e400", "NaN", "Infinity", "9" * 20):
        assert not holds(language, string), string
    for _ in range(200):
        assert math.isfinite(json.loads(sample(language, draw, longest=25)))


# Objects and arrays


@pytest.mark.parametrize("required", [[], ["a"], ["c"], ["b", "d"], ["a", "b", "c", "d"]])
@pytest.mark.parametrize("others", [None, {"type": "boolean"}])
def test_every_subset_of_optional_properties_is_written(required, others):
    schema = {"type": "object", "properties": {name: {"type": "null"} for name in "abcd"}, "required": required}
    schema |= {} if others is None else {"additionalProperties": others}
    for whitespace in (None, "any"):
        language = schema_expression(schema, whitespace=whitespace)
        for count in range(5):
            for names in itertools.permutations("abcd", count):
                value = dict.fromkeys(names)
                expected = list(names) == sorted(names) and set(required) <= set(names)
                assert holds(language, written(value)) == expected, value
                assert holds(language, written(value | {"e": True, "": False})) == (expected and others is not None), value
        for string in ('{"a":null,}', '{,"a":null}', '{"a":null "b":null}', '{"a":null,,"b":null}', "{", ""):
            assert not holds(language, string), string


def test_names_of_other_properties_are_none_of_the_known():
    schema = {"type": "object", "properties": {'a"é': {"type": "null"}}, "additionalProperties": {"type": "integer"}}
    assert allows(schema, {'a"é': None, "a": 1, 'a"éx': 2})
    assert not allows(schema, {'a"é': 1}) and not allows(schema, {"x": 1, 'a"é': 2})


def test_optional_properties_keep_a_schema_small():
    """20 fields: a few thousand nodes, whether they are demanded or not; and 200 that are not, within Python's stack."""
    kinds = [{"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"enum": ["red", "green", "blue"]}]
    properties = {f"field_{i}": kinds[i % 5] for i in range(20)}
    for required in ([], list(properties)[:1], list(properties)):
        language = schema_expression({"type": "object", "properties": properties, "required": required})
        assert size(language) < 2000 and expanded(language) < 2000
    many = {f"field_{i}": {"type": "null"} for i in range(200)}
    language = schema_expression({"type": "object", "properties": many})
    assert size(language) < 40_000
    for names in ([], ["field_0"], ["field_199"], ["field_3", "field_77", "field_150"], list(many)):
        assert holds(language, written(dict.fromkeys(names)))
    assert not holds(language, written(dict.fromkeys(["field_77", "field_3"])))


@pytest.mark.parametrize("least", range(4))
@pytest.mark.parametrize("most", [None, *range(5)])
@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("later", [None, False, True])
def test_arrays_have_as_many_items_as_they_may(least, most, first, later, valid):
    schema = {"type": "array", "minItems": least, **({} if most is None else {"maxItems": most})}
    schema |= {"prefixItems": [{"const": place} for place in range(first)]} if first else {}
    schema |= {} if later is None else {"items": later and {"type": "null"}}
    if most is not None and least > most or first < least and later is None and first:
        with pytest.raises(ValueError, match=r"minItems 3 and maxItems|minItems [12] and|demands [123] items at \$, of which it describes"):
            schema_expression(schema)
        return
    if later is False and first < least:
        with pytest.raises(ValueError, match="allows no value"):
            schema_expression(schema)
        return
    language = schema_expression(schema)
    for count in range(7):
        value = [place if place < first else None for place in range(count)]
        written_so = valid(schema, value) and (later is not None or not first or count <= first)
        for separators in (COMPACT, SPACED):
            assert holds(language, written(value, separators)) == written_so, value
    assert not holds(language, "[,]") and not holds(language, "[0,]")


def test_whitespace_stands_where_it_may():
    schema = {
        "type": "object",
        "properties": {"a": {"const": [1, {}]}, "b": {"type": "array", "items": {"type": "null"}}},
        "required": ["a", "b"],
    }
    compact, spaced = '{"a":[1,{}],"b":[null,null]}', '{"a": [1, {}], "b": [null, null]}'
    mixed, indented = '{"a":[1, {}],"b": [null, null]}', json.dumps({"a": [1, {}], "b": [None, None]}, indent="\t")
    texts = [compact, spaced, mixed, indented, '{"a":[1,{ }],"b":[ ]}', '{"a":  [1,{}],"b":[]}', f" {compact}"]
    for whitespace, allowed in [(None, texts[:3]), ("compact", texts[:1]), ("spaced", texts[1:2]), ("any", texts[:6])]:
        language = schema_expression(schema, whitespace=whitespace)
        assert [string for string in texts if holds(language, string)] == allowed, whitespace


def test_any_value_nests_to_the_depth():
    for depth in range(4):
        language = schema_expression({}, depth=depth)
        for value in ("é", 1.5, None, True):
            assert holds(language, written(value))
        for nested in range(5):
            value = {"k": ["x"]} if nested == 2 else json.loads("[" * nested + "1" + "]" * nested)
            assert holds(language, written(value)) == (nested <= depth), (depth, nested)


# Schemas made of schemas


def test_options_of_any_of_hold_with_what_stands_beside(valid):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}, {"properties": {"b": {"minimum": 5}}, "required": ["b"]}],
    }
    for value in ({}, {"a": 1}, {"b": 1}, {"b": 5}, {"a": 1, "b": 1}):
        assert allows(schema, value) == valid(schema, value), value


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ([{"type": "string", "minLength": 2}, {"type": "string", "maxLength": 3}], ["a", "ab", "abc", "abcd", ""]),
        ([{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 7}, {"const": 5}], [1, 3, 5, 7, 8]),
        ([{"enum": ["a", 1, None]}, {"enum": ["b", 1]}], ["a", "b", 1, None]),
        ([{"type": ["null", "boolean"]}, {"const": True}], [True, False, None]),
        ([{"enum": [0, False]}, {"type": "boolean"}], [0, False, True]),
    ],
)
def test_one_of_leaves_out_what_two_options_share(options, values, valid):
    schema = {"oneOf": options}
    assert [allows(schema, value) for value in values] == [valid(schema, value) for value in values]


def test_one_of_takes_objects_that_a_property_tells_apart(valid):
    schema = {
        "$defs": {"Cat": case("cat", lives={"type": "integer"}), "Dog": case("dog", name={"type": "string"})},
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        "discriminator": {"propertyName": "kind"},
    }
    for value in ({"kind": "cat", "lives": 9}, {"kind": "dog"}, {"kind": "dog", "lives": "x"}, {"kind": "cow"}, {}):
        assert allows(schema, value) == (valid(schema, value) and "lives" not in value or value.get("lives") == 9), value


def test_all_of_holds_together(valid):
    schema = {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": ["integer", "null"], "maximum": 5}}},
            {"properties": {"a": {}}, "additionalProperties": {"enum": ["x", "yy"]}},
        ]
    }
    for value in ({}, {"a": 3}, {"a": 6}, {"a": -1}, {"a": None}, {"a": 1, "b": "x"}, {"a": 1, "b": "z"}, {"a": 5, "b": "yy"}):
        assert allows(schema, value) == valid(schema, value), value


def test_what_stands_beside_a_reference_holds(valid):
    schema = {"definitions": {"n/~ %": {"type": "integer", "minimum": 2}}, "$ref": "#/definitions/n~1~0%20%25", "maximum": 4}
    for value in range(7):
        assert allows(schema, value) == valid(schema, value), value


def node(reference):
    return {"type": "object", "properties": {"v": {"type": "null"}, "next": {"$ref": reference}}, "required": ["v"]}


@pytest.mark.parametrize("depth", range(5))
@pytest.mark.parametrize("schema", [node("#"), {"$defs": {"Node": node("#/$defs/Node")}, "$ref": "#/$defs/Node"}])
def test_recursion_goes_to_the_depth(depth, schema):
    language, value = schema_expression(schema, depth=depth), {"v": None}
    for nested in range(7):
        assert holds(language, written(value)) == (nested <= depth), nested
        value = {"v": None, "next": value}


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, r"\$\.properties\.a\.\$ref"),
        ({"$ref": "#"}, r"\$\.\$ref"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, r"\$\.items\.\$ref"),
        ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, r"\$\.\$defs\.a\.allOf\[0\]\.\$ref"),
    ],
)
def test_recursion_without_an_end_is_refused(schema, path):
    with pytest.raises(ValueError, match=f"demands itself without an end at {path}"):
        schema_expression(schema)


def together(count):
    """Definitions that all stand in all."""
    properties = {str(place): {"$ref": f"#/$defs/{place}"} for place in range(count)}
    return {"$defs": {str(place): {"type": "object", "properties": properties} for place in range(count)}, "$ref": "#/$defs/0"}


def test_definitions_within_each_other_go_to_the_depth_together():
    language = schema_expression(together(2), depth=2)
    for way in ("", "0", "1", "01", "10", "110", "100", "000", "1010", "0110"):
        value = {}
        for name in reversed(way):
            value = {name: value}
        again = len(way) + 1 - len({"0", *way})
        assert holds(language, written(value)) == (again <= 2), way


def test_schema_that_grows_without_measure_is_refused_soon():
    with pytest.raises(ValueError, match="holds more than 10,000 values, references followed; expected fewer: lower `depth`"):
        schema_expression(together(5))
    with pytest.raises(ValueError, match="is nested deeper than Python calls functions, with `depth` 100000"):
        schema_expression(node("#"), depth=100_000)


def test_a_reference_that_holds_with_others_counts():
    """The way to a value that two schemas describe is the longer one: else this one would have no end."""
    beside = {"allOf": [{"type": "object", "properties": {}}, {"$ref": "#"}]}
    language, value = schema_expression({"type": "object", "properties": {"a": beside}}, depth=2), {}
    for nested in range(5):
        assert holds(language, written(value)) == (nested <= 2)
        value = {"a": value}


def test_a_list_of_itself_ends_with_none():
    schema = {"type": "array", "items": {"$ref": "#"}}
    assert [allows(schema, value, depth=1) for value in ([], [[], []], [[[]]])] == [True, True, False]


def test_draft_7_spells_tuples_otherwise():
    schema = {"type": "array", "items": [{"const": 1}, {"const": 2}], "additionalItems": {"type": "null"}}
    assert [allows(schema, value) for value in ([], [1], [1, 2], [1, 2, None], [1, None], [2])] == [True, True, True, True, False, False]
