"""What a JSON schema says, as alternatives of one type each: references followed, types apart, and `allOf`, `anyOf` and `oneOf` resolved.

Nothing is passed over but `NOTES`, keywords that say nothing of the value. A keyword that is not read, or that means nothing where it
stands, is refused by its path, as `$.properties.age.multipleOf`. A schema without `type` whose keywords are of one type means that type.

Knows nothing of how a value is written.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import reduce
from itertools import combinations, product
from typing import Any, NamedTuple
from urllib.parse import unquote

from .strings import FORMATS

NOTES = frozenset({
    "$comment", "$defs", "definitions", "default", "deprecated", "description", "discriminator", "example", "examples", "readOnly", "title",
    "writeOnly",
})  # fmt: skip
ROOT_NOTES = frozenset({"$id", "$schema"})
COMBINED = frozenset({"$ref", "allOf", "anyOf", "oneOf"})
COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
BY_TYPE = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset(BOUNDS),
    "integer": frozenset(BOUNDS),
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"}),
    "boolean": frozenset(),
    "null": frozenset(),
}  # fmt: skip
OF_TYPES = frozenset().union(*BY_TYPE.values())
MOST_VALUES = 10_000  # definitions that stand within each other multiply with the depth: a second to read, and no automaton small enough
KNOWN = NOTES | COMBINED | OF_TYPES | {"type", "enum", "const"}


class Placed(NamedTuple):
    """A schema, or what a keyword says, and the path at which it stands."""

    value: Any
    path: str


@dataclass(frozen=True, eq=False)
class Simple:
    """Values of one type (`kind`; None: of any), or those of the keyword `enum`, and of them those that all keywords allow and that none of
    `excluded` holds. `entered`: the references on the way here.

    What keywords say: `properties` a tuple of placed schemas by name, all of which hold; `items`, `additionalProperties` such a tuple;
    `prefixItems` a tuple of them; `pattern` and `format` a tuple of placed strings; bounds Decimal; `enum` a list."""

    kind: str | None
    keywords: dict[str, Placed]
    path: str
    entered: tuple[str, ...]
    excluded: tuple["Simple", ...] = ()

    def get(self, keyword: str, default: Any = None) -> Any:
        return self.keywords[keyword].value if keyword in self.keywords else default


def read_schema(given: Any) -> dict | bool:
    """A schema from what a caller has: a mapping, true or false, JSON, or a pydantic model."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"`schema` is the string {given[:60]!r}, which is no JSON: {error}") from error
    elif hasattr(given, "model_json_schema"):
        given = given.model_json_schema()
    if not isinstance(given, dict | bool):
        raise ValueError(f"`schema` is {given!r}; expected a JSON schema as a mapping, as JSON, or as a pydantic model")
    return given


def is_of(value: Any, kind: str) -> bool:
    """Whether a value is of a type of JSON schema, to which 1.0 is an integer."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return kind == "number" or kind == "integer" and value % 1 == 0
    return kind == {str: "string", list: "array", dict: "object"}.get(type(value))


def same_value(left: Any, right: Any) -> bool:
    """Whether two values are equal to JSON schema: 1 and 1.0 are, 1 and true are not."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_value, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_value(left[key], right[key]) for key in left)
    return isinstance(left, bool) == isinstance(right, bool) and left == right


@dataclass
class Reading:
    """Reads one schema. `depth`: how many references on the way to a value may stand within themselves; `cut`: the paths of those that were
    not followed; `count`: the values that were asked for."""

    root: dict | bool
    depth: int
    cut: list[str] = field(default_factory=list)
    count: int = 0

    def options(self, given: Sequence[Placed], entered: tuple[str, ...]) -> list[Simple]:
        """The alternatives of schemas that all hold; none where there is no such value, or none within the depth."""
        self.count += 1
        if self.count > MOST_VALUES:
            raise ValueError(f"`schema` holds more than {MOST_VALUES:,} values, references followed; expected fewer: lower `depth`")
        return self.together([self.options_of(placed, entered) for placed in given], given[-1].path)

    def options_of(self, placed: Placed, entered: tuple[str, ...]) -> list[Simple]:
        schema, path = placed
        if isinstance(schema, bool):
            return [Simple(None, {}, path, entered)] if schema else []
        if not isinstance(schema, dict):
            raise ValueError(f"`schema` holds {schema!r} at {path}; expected a schema: a mapping, true or false")
        for keyword in schema:
            if keyword not in KNOWN and not (path == "$" and keyword in ROOT_NOTES):
                raise ValueError(f"`schema` holds {path}.{keyword}, which is not supported; expected a schema without")
        found = [self.plain(schema, path, entered)]
        if "$ref" in schema:
            found.append(self.referred(schema["$ref"], path, entered))
        for keyword in ("allOf", "anyOf", "oneOf"):
            if keyword not in schema:
                continue
            if not isinstance(schema[keyword], list) or not schema[keyword]:
                raise ValueError(f"`schema` holds {schema[keyword]!r} at {path}.{keyword}; expected a list of schemas, not empty")
            options = [self.options_of(Placed(each, f"{path}.{keyword}[{i}]"), entered) for i, each in enumerate(schema[keyword])]
            if keyword == "allOf":
                found += options
            else:
                options = self.apart(options, f"{path}.{keyword}") if keyword == "oneOf" else options
                found.append([option for alternatives in options for option in alternatives])
        return self.together(found, path)

    def referred(self, reference: Any, path: str, entered: tuple[str, ...]) -> list[Simple]:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise ValueError(f"`schema` refers to {reference!r} at {path}.$ref; expected a place in the schema, as '#/$defs/name'")
        found, place = self.root, "$"
        for step in reference.split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdigit() and int(step) < len(found):
                found, place = found[int(step)], f"{place}[{step}]"
            elif isinstance(found, dict) and step in found:
                found, place = found[step], f"{place}.{step}"
            else:
                raise ValueError(f"`schema` refers to {reference!r} at {path}.$ref, where it holds nothing; expected a place in the schema")
        if reference in entered and len(entered) - len(set(entered)) >= self.depth:
            self.cut.append(f"{path}.$ref")
            return []
        return self.options_of(Placed(found, place), (*entered, reference))

    def plain(self, schema: dict, path: str, entered: tuple[str, ...]) -> list[Simple]:
        """The alternatives by the keywords that combine no schemas: one for each type."""
        keywords = [keyword for keyword in schema if keyword in OF_TYPES]
        kinds = self.kinds(schema, keywords, path)
        if "enum" in schema or "const" in schema:
            if keywords:
                raise ValueError(f"`schema` holds {path}.{keywords[0]} beside `enum` or `const`; expected the values alone")
            if "enum" in schema and (not isinstance(schema["enum"], list) or not schema["enum"]):
                raise ValueError(f"`schema` holds {schema['enum']!r} at {path}.enum; expected a list of values, not empty")
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            if "const" in schema and "enum" in schema:
                values = [value for value in values if same_value(value, schema["const"])]
            values = [value for value in values if kinds is None or any(is_of(value, kind) for kind in kinds)]
            where = f"{path}.{'enum' if 'enum' in schema else 'const'}"
            if not values:
                raise ValueError(f"`schema` allows no value at {where}: none is of its type, or none its constant; expected one")
            return [Simple(None, {"enum": Placed(values, where)}, path, entered)]
        if kinds is None:
            return [Simple(None, {}, path, entered)]
        read = {keyword: self.said(keyword, schema[keyword], f"{path}.{keyword}") for keyword in keywords}
        if isinstance(read.get("items", Placed(None, path)).value, list):  # draft 7
            if "prefixItems" in read:
                raise ValueError(f"`schema` holds a list at {path}.items beside `prefixItems`; expected one of them")
            read["prefixItems"] = self.said("prefixItems", schema["items"], f"{path}.items")
            del read["items"]
            if "additionalItems" in read:
                read["items"] = read["additionalItems"]
        elif "additionalItems" in read:
            raise ValueError(f"`schema` holds {path}.additionalItems, which means nothing without a list at `items`; expected it there")
        read.pop("additionalItems", None), read.pop("uniqueItems", None)
        return [Simple(kind, {key: read[key] for key in read if key in BY_TYPE[kind]}, path, entered) for kind in kinds]

    def kinds(self, schema: dict, keywords: list[str], path: str) -> list[str] | None:
        """The types of a schema; None: any."""
        if "type" not in schema:
            kinds = [kind for kind in BY_TYPE if kind != "integer" and BY_TYPE[kind] & set(keywords)]
            if len(kinds) > 1:
                raise ValueError(f"`schema` holds the keywords {sorted(keywords)} at {path}, of several types; expected a `type`")
            return kinds or None
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not kinds or any(not isinstance(kind, str) or kind not in BY_TYPE for kind in kinds):
            raise ValueError(f"`schema` holds {schema['type']!r} at {path}.type; expected one of {', '.join(BY_TYPE)}, or a list of them")
        kinds = [kind for kind in dict.fromkeys(kinds) if kind != "integer" or "number" not in kinds]
        for keyword in keywords:
            if not any(keyword in BY_TYPE[kind] for kind in kinds):
                raise ValueError(f"`schema` holds {path}.{keyword}, which means nothing for the type {schema['type']!r}")
        return kinds

    def said(self, keyword: str, value: Any, path: str) -> Placed:
        """What a keyword says, checked."""

        def expect(holds: bool, what: str) -> None:
            if not holds:
                raise ValueError(f"`schema` holds {value!r} at {path}; expected {what}")

        if keyword in COUNTS:
            expect(isinstance(value, int) and not isinstance(value, bool) and value >= 0, "an integer of at least 0")
        elif keyword in BOUNDS:
            whole = isinstance(value, int) and not isinstance(value, bool)
            expect(whole or isinstance(value, float) and math.isfinite(value), "a number")
            value = Decimal(repr(value))
        elif keyword in ("pattern", "format"):
            expect(isinstance(value, str), "a string")
            expect(keyword == "pattern" or value in FORMATS, f"one of the formats {', '.join(FORMATS)}")
            value = (Placed(value, path),)
        elif keyword == "properties":
            expect(isinstance(value, dict) and all(isinstance(name, str) for name in value), "schemas by name")
            value = {name: (Placed(each, f"{path}.{name}"),) for name, each in value.items()}
        elif keyword == "required":
            expect(isinstance(value, list) and all(isinstance(name, str) for name in value), "a list of names")
        elif keyword == "prefixItems":
            expect(isinstance(value, list) and len(value) > 0, "a list of schemas, not empty")
            value = tuple((Placed(each, f"{path}[{place}]"),) for place, each in enumerate(value))
        elif keyword == "uniqueItems":
            expect(value is False, "false: items that differ from each other are no regular language")
        elif keyword != "items" or not isinstance(value, list):  # additionalProperties, additionalItems, items
            value = (Placed(value, path),)
        return Placed(value, path)

    def together(self, found: Sequence[list[Simple]], path: str) -> list[Simple]:
        """The alternatives of several lists that all hold.

        Raises:
            ValueError: each has alternatives, and none agree.
        """
        merged = reduce(lambda left, right: [both for pair in product(left, right) if (both := self.merged(*pair))], found)
        if not merged and all(found):
            raise ValueError(f"`schema` contradicts itself at {path}: no type or value is allowed by all it demands there")
        return merged

    def merged(self, left: Simple, right: Simple) -> Simple | None:
        """The values of both; None where there are none."""
        for one, other in ((left, right), (right, left)):
            if one.kind is None and not one.keywords:  # any value
                return replace(other, entered=_entered(one, other))
        for one, other in ((left, right), (right, left)):
            if "enum" in one.keywords:
                allowed = [value for value in one.get("enum") if self.allows(other, value)]
                enum = Placed(allowed, one.keywords["enum"].path)
                excluded = left.excluded + right.excluded
                return Simple(None, {"enum": enum}, one.path, _entered(one, other), excluded) if allowed else None
        kinds = {left.kind, right.kind} - {None}
        if len(kinds) > 1 and kinds != {"integer", "number"}:
            return None
        kind = "integer" if "integer" in kinds else next(iter(kinds), None)
        keywords = {**left.keywords, **right.keywords}
        if (
            kind == "array"
            and ("prefixItems" in keywords)
            and all({"items", "prefixItems"} & each.keywords.keys() for each in (left, right))
        ):
            raise ValueError(f"`schema` demands the items {left.path} and {right.path} at once; expected one of them")
        for keyword in left.keywords.keys() & right.keywords.keys():
            keywords[keyword] = _agreed(keyword, left.keywords[keyword], right.keywords[keyword])
        if kind == "object" and "properties" in keywords:
            # What one of them demands of properties it does not name, it demands of those that only the other names.
            properties = dict(keywords["properties"].value)
            for one, other in ((left, right), (right, left)):
                for name in other.get("properties", {}).keys() - one.get("properties", {}).keys():
                    properties[name] += one.get("additionalProperties", ())
            keywords["properties"] = Placed(properties, keywords["properties"].path)
        return Simple(kind, keywords, left.path, _entered(left, right), left.excluded + right.excluded)

    def allows(self, simple: Simple, value: Any) -> bool:
        """Whether a value of an `enum` is one of these, too."""
        if "enum" in simple.keywords:
            return any(same_value(value, each) for each in simple.get("enum"))
        if simple.kind is not None and not is_of(value, simple.kind):
            return False
        if simple.keywords:
            place = next(iter(simple.keywords.values())).path
            raise ValueError(f"`schema` demands {place} of the values of an `enum` or `const`; expected the values alone")
        return True

    def apart(self, options: list[list[Simple]], path: str) -> list[list[Simple]]:
        """The options of `oneOf`, each without the values of the others.

        Raises:
            ValueError: two may share values and are not such that every value has one writing, whose languages could be taken apart.
        """
        excluded: dict[int, list[Simple]] = {}
        for left, right in combinations(range(len(options)), 2):
            for one, other in product(options[left], options[right]):
                if self.disjoint(one, other):
                    continue
                if not (_has_one_writing(one) and _has_one_writing(other)):
                    raise ValueError(
                        f"`schema` holds options at {path}[{left}] and {path}[{right}] that a value may match both; expected `anyOf`, or "
                        "objects that a required property with a `const` tells apart"
                    )
                excluded.setdefault(id(one), []).append(other)
                excluded.setdefault(id(other), []).append(one)
        return [[replace(each, excluded=each.excluded + tuple(excluded.get(id(each), ()))) for each in group] for group in options]

    def disjoint(self, left: Simple, right: Simple) -> bool:
        """Whether they are seen to share no value: by type, by `enum`, or as objects by a required property."""
        if _apart(left, right):
            return True
        if left.kind != "object" or right.kind != "object":
            return False
        for name in set(left.get("required", [])) & set(right.get("required", [])):
            properties = [(each.get("properties", {}).get(name), each.entered) for each in (left, right)]
            if all(given for given, _ in properties):
                ones, others = (self.options(given, entered) for given, entered in properties)
                if all(_apart(one, other) for one, other in product(ones, others)):
                    return True
        return False


def _entered(left: Simple, right: Simple) -> tuple[str, ...]:
    """The references on the way to both, each as often as on the way to one of them."""
    return left.entered + tuple((Counter(right.entered) - Counter(left.entered)).elements())


def _agreed(keyword: str, left: Placed, right: Placed) -> Placed:
    """What a keyword says where two schemas say it."""
    if keyword in ("minimum", "exclusiveMinimum", "minLength", "minItems"):
        return max(left, right)
    if keyword in ("maximum", "exclusiveMaximum", "maxLength", "maxItems"):
        return min(left, right)
    if keyword == "required":
        return Placed(list(dict.fromkeys(left.value + right.value)), left.path)
    if keyword == "properties":
        names = dict.fromkeys([*left.value, *right.value])
        return Placed({name: left.value.get(name, ()) + right.value.get(name, ()) for name in names}, left.path)
    return Placed(left.value + right.value, left.path)  # items, additionalProperties, pattern, format: all of them hold


def _apart(left: Simple, right: Simple) -> bool:
    """Whether types or values alone keep them from sharing a value."""
    for one, other in ((left, right), (right, left)):
        if "enum" in one.keywords:
            if "enum" in other.keywords:
                return not any(same_value(value, each) for value in one.get("enum") for each in other.get("enum"))
            return other.kind is not None and not any(is_of(value, other.kind) for value in one.get("enum"))
    kinds = {left.kind, right.kind}
    return None not in kinds and len(kinds) == 2 and kinds != {"integer", "number"}


def _has_one_writing(simple: Simple) -> bool:
    if "enum" in simple.keywords:
        return all(isinstance(value, str | int | None) for value in simple.get("enum"))
    return simple.kind in ("string", "integer", "boolean", "null")


__all__ = ["NOTES", "Placed", "Reading", "Simple", "is_of", "read_schema", "same_value"]
