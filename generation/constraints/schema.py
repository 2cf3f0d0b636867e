"""A JSON schema as the language of the texts that a compact writer makes of its values: JSON Schema 2020-12, and what draft 7 spells
otherwise.

Every text is JSON that validates. A constraint writes less than a schema allows: properties in the order of the schema, and none that it
does not name unless `additionalProperties` is given; no items behind `prefixItems` unless `items` is given; strings, integers and numbers
as `strings.py` says. What a schema says is read in `schema_reading.py`, which passes over keywords that say nothing of the value, and
refuses by its path every other that is not obeyed.

Knows nothing of tokens.
"""

import json
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .expression import ANY, EMPTY, NOTHING, Both, Except, Expression, Repeat, chars, text
from .regex import either, expanded, joined, parse_search
from .schema_reading import Placed, Reading, Simple, read_schema
from .strings import DIGITS, FRACTION_DIGITS, NUMBER, decimals, format_language, integers, json_string

LARGEST = 200_000  # characters that a schema may stand for, repetitions written out
LONGEST_CHAIN = 32  # optional properties in a row whose languages are nested

SPACE, SPACES = Repeat(text(" "), 0, 1), Repeat(chars(*((ord(space), ord(space)) for space in " \t\n\r")), 0, None)
# What stands between items, between a name and its value, and inside the brackets.
GAPS = {
    None: (joined(text(","), SPACE), joined(text(":"), SPACE), EMPTY),
    "compact": (text(","), text(":"), EMPTY),
    "spaced": (text(", "), text(": "), EMPTY),
    "any": (joined(SPACES, text(","), SPACES), joined(SPACES, text(":"), SPACES), SPACES),
}
ANY_TEXT = Repeat(ANY, 0, None)


def schema_expression(schema: Any, *, whitespace: str | None = None, depth: int = 3) -> Expression:
    """The JSON texts of a schema's values.

    Args:
        schema: a mapping, true or false, JSON, or a pydantic model.
        whitespace: None: one space or none behind each comma and colon, so that both of the usual compact forms may be written.
            "compact": no space; "spaced": one; "any": any number of spaces, tabs and line ends wherever JSON allows them inside the value.
        depth: how many definitions on the way to a value may stand within themselves, and how deep lists and objects may be nested where
            any value is allowed; what is deeper is not written. 3: a text of a few hundred tokens holds hardly more, and the automaton
            grows with each level.

    Returns:
        The language: where `additionalProperties` allows names, they stand behind the others and may be repeated. Readers of JSON take the
        last of a name.

    Raises:
        ValueError: a keyword that is not supported, by its path; a schema that contradicts itself, that demands itself without an end, or
            that is larger than `LARGEST` or `MOST_VALUES`; other values of `whitespace` and `depth`.
    """
    if whitespace not in GAPS:
        raise ValueError(f"`whitespace` is {whitespace!r}; expected None, 'compact', 'spaced' or 'any'")
    return written(schema, Writer, whitespace, depth)


def written(schema: Any, writer: type["Writer"], whitespace: str | None, depth: int) -> Expression:
    """The texts in which a kind of writer writes a schema's values; as `schema_expression`, which is one for JSON."""
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
        raise ValueError(f"`depth` is {depth!r}; expected an integer of at least 0")
    root = read_schema(schema)
    reading = Reading(root, depth)
    try:
        found = writer(reading, *GAPS[whitespace]).value((Placed(root, "$"),), ("#",))
    except RecursionError as error:
        raise ValueError(f"`schema` is nested deeper than Python calls functions, with `depth` {depth}; expected less") from error
    if found == NOTHING:
        if reading.cut:
            raise ValueError(f"`schema` demands itself without an end at {reading.cut[0]}; expected a way out within `depth` {depth}")
        raise ValueError("`schema` allows no value; expected one that allows some")
    if (size := expanded(found)) > LARGEST:
        raise ValueError(
            f"`schema` stands for {size:,} characters, repetitions written out; expected at most {LARGEST:,}: lower `maxLength`, "
            f"`maxItems`, or `depth` ({depth})"
        )
    return found


@dataclass(frozen=True)
class Writer:
    """How JSON writes values; another form says otherwise what a string is, what a name, and in which order these come."""

    reading: Reading
    comma: Expression
    colon: Expression
    inside: Expression

    def quoted(self, decoded: Expression) -> Expression:
        """How the strings of a language are written."""
        return json_string(decoded)

    def name(self, name: str) -> Expression:
        return self.quoted(text(name))

    def other_name(self, known: Expression) -> Expression:
        """Any name but these."""
        return self.quoted(ANY_TEXT if known == NOTHING else Except(ANY_TEXT, known))

    def ordered(self, properties: dict[str, Any]) -> dict[str, Any]:
        return properties

    def value(self, given: tuple[Placed, ...], entered: tuple[str, ...]) -> Expression:
        """The texts of the values that all these schemas allow; nothing where there are none within the depth."""
        return either(self.simple(option) for option in self.reading.options(given, entered))

    def simple(self, simple: Simple) -> Expression:
        if "enum" in simple.keywords:
            values = simple.keywords["enum"]
            found = either(self.literal(value, values.path) for value in values.value)
        else:
            found = WRITERS[simple.kind](self, simple)
        excluded = either(map(self.simple, simple.excluded))
        return found if excluded == NOTHING else Except(found, excluded)

    def literal(self, value: Any, path: str) -> Expression:
        """A value as `json.dumps` writes it, with the gaps of this writer."""
        if isinstance(value, list):
            return self.listed("[", "]", [self.literal(each, path) for each in value])
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return self.listed("{", "}", [self.pair(key, self.literal(each, path)) for key, each in self.ordered(value).items()])
        try:
            return self.quoted(text(value)) if isinstance(value, str) else text(json.dumps(value, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`schema` holds {value!r} at {path}, which JSON cannot write: {error}") from error

    def pair(self, key: str, value: Expression) -> Expression:
        return joined(self.name(key), self.colon, value)

    def listed(self, begin: str, end: str, items: list[Expression]) -> Expression:
        row = [piece for item in items for piece in (self.comma, item)][1:]
        return self.enclosed(begin, joined(*row), end) if row else joined(text(begin), self.inside, text(end))

    def enclosed(self, begin: str, row: Expression, end: str) -> Expression:
        return joined(text(begin), self.inside, row, self.inside, text(end))

    def any_value(self, simple: Simple) -> Expression:
        scalar = either([self.quoted(ANY_TEXT), NUMBER, text("true"), text("false"), text("null")])
        found = scalar
        for _ in range(self.reading.depth):
            row, pairs = (self.repeated(each) for each in (found, joined(self.other_name(NOTHING), self.colon, found)))
            lists = [self.enclosed("[", row, "]"), self.listed("[", "]", [])]
            found = either([scalar, *lists, self.enclosed("{", pairs, "}"), self.listed("{", "}", [])])
        return found

    def repeated(self, item: Expression, least: int = 1, most: int | None = None) -> Expression:
        """Items with commas between, at least one."""
        return joined(item, Repeat(joined(self.comma, item), least - 1, None if most is None else most - 1))

    def string(self, simple: Simple) -> Expression:
        least, most = _range(simple, "minLength", "maxLength")
        found = [parse_search(*placed) for placed in simple.get("pattern", ())]
        found += [format_language(placed.value) for placed in simple.get("format", ())]
        if not found or least or most is not None:
            found.append(Repeat(ANY, least, most))
        decoded = found[0]
        for language in found[1:]:
            decoded = Both(decoded, language)
        return self.quoted(decoded)

    def integer(self, simple: Simple) -> Expression:
        (least, above), (most, below) = _bounds(simple)
        first = None if least is None else math.floor(least) + 1 if above else math.ceil(least)
        last = None if most is None else math.ceil(most) - 1 if below else math.floor(most)
        found = integers(first, last) if first is None or last is None or first <= last else NOTHING
        if found == NOTHING:
            raise ValueError(f"`schema` allows no integer of up to {DIGITS} digits at {simple.path}; expected bounds with one between them")
        return found

    def number(self, simple: Simple) -> Expression:
        (least, above), (most, below) = _bounds(simple)
        if least is None and most is None:
            return NUMBER
        least, above = (None, False) if least is not None and least <= -(10**DIGITS) else (least, above)
        most, below = (None, False) if most is not None and most >= 10**DIGITS else (most, below)
        for bound, strict in ((least, above), (most, below)):
            if bound is None:
                continue
            whole, _, fraction = format(abs(bound), "f").partition(".")
            most_digits = FRACTION_DIGITS - len(whole.lstrip("0")) if strict else 2 * FRACTION_DIGITS
            if len(whole) > FRACTION_DIGITS or len(fraction.rstrip("0")) > most_digits:
                raise ValueError(f"`schema` holds the bound {bound} at {simple.path}; expected one of at most {FRACTION_DIGITS} digits")
        found = decimals(least, most, above, below)
        if found == NOTHING or least is not None and most is not None and (least > most or least == most and (above or below)):
            raise ValueError(f"`schema` allows no number at {simple.path}: from {least} to {most}; expected bounds with one between them")
        return found

    def array(self, simple: Simple) -> Expression:
        least, most = _range(simple, "minItems", "maxItems")
        first = simple.get("prefixItems", ())[:most]
        later = simple.get("items", () if first else (Placed(True, f"{simple.path}.items"),))
        if least > len(first) and not later:
            raise ValueError(f"`schema` demands {least} items at {simple.path}, of which it describes {len(first)}; expected `items`")
        further = None if most is None else most - len(first)
        item = self.value(later, simple.entered) if later and further != 0 else NOTHING
        if not first:
            found = NOTHING if item == NOTHING else self.repeated(item, max(least, 1), most)
        else:
            rest = EMPTY if item == NOTHING else Repeat(joined(self.comma, item), max(0, least - len(first)), further)
            found = NOTHING if item == NOTHING and least > len(first) else rest
            for place, given in reversed(list(enumerate(first))):
                one = self.value(given, simple.entered)
                found = joined(one if place == 0 else joined(self.comma, one), found)
                if place and place >= least:
                    found = either([EMPTY, found])
        empty = NOTHING if least else self.listed("[", "]", [])
        return either([empty, self.enclosed("[", found, "]")])

    def object(self, simple: Simple) -> Expression:
        properties, required = self.ordered(simple.get("properties", {})), simple.get("required", [])
        if "properties" not in simple.keywords and "additionalProperties" not in simple.keywords:
            raise ValueError(f"`schema` names no properties at {simple.path}; expected them, or `additionalProperties`: true for any")
        for name in required:
            if name not in properties:
                raise ValueError(f"`schema` demands {name!r} at {simple.path}.required, which is none of its `properties`")
        items = [(self.pair(name, self.value(given, simple.entered)), name in required) for name, given in properties.items()]
        if (others := simple.get("additionalProperties")) is not None:
            other = joined(self.other_name(either(map(text, properties))), self.colon, self.value(others, simple.entered))
            items.append((NOTHING if other == NOTHING else self.repeated(other), False))
        items = [(item, demanded) for item, demanded in items if demanded or item != NOTHING]
        if (first := next((place for place, (_, demanded) in enumerate(items) if demanded), None)) is None:
            row = self.some([item for item, _ in items])
            return either([self.listed("{", "}", []), self.enclosed("{", row, "}")])
        before = [either([EMPTY, joined(item, self.comma)]) for item, _ in items[:first]]
        behind = [
            joined(self.comma, item) if demanded else either([EMPTY, joined(self.comma, item)]) for item, demanded in items[first + 1 :]
        ]
        return self.enclosed("{", joined(*before, items[first][0], *behind), "}")

    def some(self, items: list[Expression]) -> Expression:
        """At least one of these, in this order and with commas between. Each stands there twice: as the first that is written, and behind
        others."""
        if len(items) > LONGEST_CHAIN:
            left, right = self.some(items[: len(items) // 2]), self.some(items[len(items) // 2 :])
            return either([joined(left, either([EMPTY, joined(self.comma, right)])), right])
        found = NOTHING
        for item in items:
            found = either([joined(found, either([EMPTY, joined(self.comma, item)])), item])
        return found


WRITERS = {
    None: Writer.any_value,
    "string": Writer.string,
    "integer": Writer.integer,
    "number": Writer.number,
    "array": Writer.array,
    "object": Writer.object,
    "boolean": lambda writer, simple: either([text("true"), text("false")]),
    "null": lambda writer, simple: text("null"),
}


def _range(simple: Simple, at_least: str, at_most: str) -> tuple[int, int | None]:
    least, most = simple.get(at_least, 0), simple.get(at_most)
    if most is not None and least > most:
        raise ValueError(f"`schema` holds {at_least} {least} and {at_most} {most} at {simple.path}; expected a range that is not empty")
    return least, most


def _bounds(simple: Simple) -> tuple[tuple[Decimal | None, bool], tuple[Decimal | None, bool]]:
    """Below and above: the stronger bound, and whether it is left out itself."""
    low = [(simple.get(keyword), strict) for keyword, strict in (("minimum", False), ("exclusiveMinimum", True))]
    high = [(simple.get(keyword), strict) for keyword, strict in (("maximum", False), ("exclusiveMaximum", True))]
    least = max((bound for bound in low if bound[0] is not None), default=(None, False))
    most = min((bound for bound in high if bound[0] is not None), key=lambda bound: (bound[0], not bound[1]), default=(None, False))
    return least, most


__all__ = ["ANY_TEXT", "GAPS", "LARGEST", "Writer", "schema_expression", "written"]
