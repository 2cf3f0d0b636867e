"""What a caller may demand of a text: a regular expression, a JSON schema, one of some choices, a template with blanks, or pinned ids.

Frozen values, checked when they are made. They speak of characters (blanks and pins also of tokens) and know no tokenizer.
"""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from .blanks import Blank
from .calls import AUTO, MARKS, calls_expression, read_tools
from .characters import byte_automaton
from .expression import Either, Expression
from .expression import text as just

PIECES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
FIELD = re.compile(r"([^\W\d]\w*)(?::([0-9]+)(?:-([0-9]+))?)?")


class Described:
    """A language that is what its `description` says: mappings that are equal to Python may be others to JSON, in which an order counts and
    1 is not true."""

    def identity(self) -> str:
        """Of two that are equal the same."""
        return described(self)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.identity() == self.identity()

    def __hash__(self) -> int:
        return hash(described(self))


@dataclass(frozen=True)
class Regex:
    """The strings that `re.fullmatch(pattern, string)` accepts.

    Raises:
        ValueError: `re` does not parse `pattern`, or it holds what no finite automaton can check: look-around, back-references.
    """

    pattern: str

    def __post_init__(self) -> None:
        self.expression()

    def expression(self) -> Expression:
        """As a language over characters."""
        from .regex import parse_regex

        return parse_regex(self.pattern, "pattern")

    def description(self) -> list:
        """All that makes it what it is, as JSON."""
        return ["regex", self.pattern]


@dataclass(frozen=True, eq=False)
class JsonSchema(Described):
    """The JSON texts of the values that a schema allows, with properties in the schema's order.

    Args:
        schema: a mapping, which is copied, JSON, or a pydantic model.
        whitespace: None: one space or none behind each comma and colon; "compact", "spaced": which of the two; "any": JSON's whitespace
            wherever JSON allows it inside the value.
        depth: how often a reference may stand inside of itself.

    Raises:
        ValueError: it is no schema, holds a keyword that is not supported, or is too large.
    """

    schema: Any
    whitespace: str | None = None
    depth: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.schema, dict):
            object.__setattr__(self, "schema", copy.deepcopy(self.schema))
        self.expression()

    def expression(self) -> Expression:
        """As a language over characters."""
        from .schema import schema_expression

        return schema_expression(self.schema, whitespace=self.whitespace, depth=self.depth)

    def description(self) -> list:
        """All that makes it what it is, as JSON."""
        from .schema_reading import read_schema

        return ["schema", read_schema(self.schema), self.whitespace, self.depth]


@dataclass(frozen=True)
class Choice:
    """One of some texts.

    Raises:
        ValueError: there is none; one is no string, empty or among them twice.
    """

    options: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.options, str) or not isinstance(self.options, Sequence):
            raise ValueError(f"`options` is {self.options!r}; expected a list of strings")
        object.__setattr__(self, "options", tuple(self.options))
        if not self.options:
            raise ValueError("`options` is empty; expected at least one string")
        for place, option in enumerate(self.options):
            if not isinstance(option, str) or not option:
                raise ValueError(f"`options` holds {option!r} at {place}; expected strings that are not empty")
            just(option)  # refuses a surrogate
        if len(set(self.options)) < len(self.options):
            twice = next(option for place, option in enumerate(self.options) if option in self.options[:place])
            raise ValueError(f"`options` holds {twice!r} twice; expected each once")

    def expression(self) -> Expression:
        """As a language over characters."""
        return Either(tuple(map(just, self.options)))

    def description(self) -> list:
        """All that makes it what it is, as JSON: in any order they are the same."""
        return ["choice", sorted(self.options)]


@dataclass(frozen=True, init=False)
class Template:
    """Fixed text with fields: `Template("Dear {who:1-8}, on {date}: {kind}", date=Regex(...), kind=Choice([...]))`.

    `{who:1-8}` is a blank of 1 to 8 tokens, `{who:3}` one of 3 tokens; a token counts for a blank where it writes any of it, so the text
    beside a blank may share a token with it. `{date}` is the language of that keyword, any of this module but `Pins`; without a keyword it
    is a blank of any length from one character on. `{{` and `}}` are braces.

    Raises:
        ValueError: a brace that opens or closes nothing, a field that is written in no such way or named twice, an empty or reversed
            count, a count for a field with a language, a keyword that is no field's or no language.
    """

    text: str
    fields: tuple[tuple[str, Any], ...]
    pieces: tuple[tuple[str | None, Any], ...] = field(repr=False, compare=False)

    def __init__(self, text: str, /, **fields: "Language") -> None:
        if not isinstance(text, str):
            raise ValueError(f"`text` is {text!r}; expected a string with fields like {{name:1-8}}")
        for name, language in fields.items():
            if not isinstance(language, Regex | JsonSchema | Choice | Template):
                raise ValueError(f"`{name}` is {language!r}; expected a Regex, JsonSchema, Choice or Template")
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "fields", tuple(sorted(fields.items())))
        object.__setattr__(self, "pieces", tuple(_pieces(text, fields)))

    def segments(self) -> list[Expression | Blank]:
        """The template as languages and blanks behind each other."""
        return [just(segment) if isinstance(segment, str) else segment for _, segment in self._named_segments()]

    def _named_segments(self) -> list[tuple[str | None, str | Blank | Expression]]:
        found: list[tuple[str | None, str | Blank | Expression]] = []
        for name, piece in self.pieces:
            if isinstance(piece, Template):
                found += [(name, segment) for _, segment in piece._named_segments()]
            else:
                found.append((name, piece if isinstance(piece, str | Blank) else piece.expression()))
        return found

    def values(self, text: str) -> dict[str, str]:
        """What a finished text has in its fields. Where it can be cut in several ways, blanks are as short as they can be and other fields
        as long as they can be, from left to right. Tokens are not counted.

        Raises:
            ValueError: `text` does not fit the template.
        """
        segments = self._named_segments()
        fits = [_Fit(text, segment) for _, segment in segments]
        possible = [{len(text)}]  # from which places of the text the segments from here on fit, the last segment first
        for fit in reversed(fits):
            possible.append({start for start in range(len(text) + 1) if any(stop in possible[-1] for stop in fit.stops(start))})
        possible.reverse()
        if 0 not in possible[0]:
            raise ValueError(f"`text` is {text!r}, which does not fit the template {self.text!r}")
        start, found = 0, {}
        for (name, segment), fit, after in zip(segments, fits, possible[1:], strict=True):
            stops = [stop for stop in fit.stops(start) if stop in after]
            stop = stops[0] if isinstance(segment, Blank) else stops[-1]
            if name is not None:
                found[name] = found.get(name, "") + text[start:stop]
            start = stop
        return found

    def description(self) -> list:
        """All that makes it what it is, as JSON."""
        return ["template", self.text, [[name, language.description()] for name, language in self.fields]]


class _Fit:
    """Where a segment of a template can end in a text, by where it begins."""

    def __init__(self, text: str, segment: str | Blank | Expression) -> None:
        self.text, self.segment = text, segment
        self.automaton = None if isinstance(segment, str | Blank) else byte_automaton(segment)
        self.known: dict[int, Sequence[int]] = {}

    def stops(self, start: int) -> Sequence[int]:
        """In rising order."""
        if start not in self.known:
            self.known[start] = self._found(start)
        return self.known[start]

    def _found(self, start: int) -> Sequence[int]:
        if isinstance(self.segment, Blank):
            return range(start + 1, len(self.text) + 1)
        if isinstance(self.segment, str):
            return [start + len(self.segment)] if self.text.startswith(self.segment, start) else []
        table, classes, accepting = self.automaton.table, self.automaton.byte_class, self.automaton.accepting
        state, found = 1, [start] if accepting[1] else []
        for stop in range(start + 1, len(self.text) + 1):
            for byte in self.text[stop - 1].encode(errors="surrogatepass"):
                state = int(table[state, classes[byte]])
            if not state:
                break
            if accepting[state]:
                found.append(stop)
        return found


def _pieces(text: str, fields: dict[str, Any]) -> list[tuple[str | None, Any]]:
    """Fixed texts under None, and each field's blank or language under its name."""
    found: list[tuple[str | None, Any]] = []
    literal, place = "", 0
    for match in PIECES.finditer(text):
        literal, place, written = literal + text[place : match.start()], match.end(), match[0]
        if written in ("{{", "}}"):
            literal += written[0]
            continue
        if match[1] is None:
            raise ValueError(
                f"`text` holds a single {written!r} at {match.start()}; expected {{name}}, or {written * 2!r} for the character"
            )
        name, piece = _field(match[1], fields)
        if any(name == other for other, _ in found):
            raise ValueError(f"`text` names the field {name!r} twice; expected each once")
        found += [(None, literal), (name, piece)]
        literal = ""
    found.append((None, literal + text[place:]))
    if unused := sorted(set(fields) - {name for name, _ in found}):
        raise ValueError(f"`text` has no fields {unused}; expected a field for each keyword, like {{{unused[0]}}}")
    found = [(name, piece) for name, piece in found if piece != ""]
    for name, piece in found:
        if name is None:
            just(piece)  # refuses a surrogate
    return found


def _field(written: str, fields: dict[str, Any]) -> tuple[str, Any]:
    if not (match := FIELD.fullmatch(written)):
        raise ValueError(f"`text` holds the field {{{written}}}; expected {{name}}, {{name:3}} or {{name:1-8}}")
    name, least, most = match.groups()
    if least is None:
        return name, fields.get(name, Blank())
    if name in fields:
        raise ValueError(f"`text` counts the tokens of {{{written}}}, whose language is given; expected {{{name}}}")
    blank = Blank(int(least), int(least if most is None else most))
    if not 1 <= blank.least <= blank.most:
        raise ValueError(f"`text` holds the field {{{written}}}; expected a count of tokens from 1 on, the smaller one first")
    return name, blank


@dataclass(frozen=True, eq=False)
class Pins:
    """Just as many tokens as there are pins: where `mask` is True the given id, special ones too; elsewhere any id that writes text.

    Args:
        ids: int64 (n,); what they are where `mask` is False means nothing.
        mask: bool (n,).

    Raises:
        ValueError: the tensors have other shapes or dtypes, no position, or a pinned id below 0.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    def __post_init__(self) -> None:
        for name, value, dtype in (("ids", self.ids, torch.int64), ("mask", self.mask, torch.bool)):
            if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.dim() != 1 or not len(value):
                got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                raise ValueError(f"`{name}` is {got}; expected a tensor {dtype} (n,) with n of at least 1")
        if self.ids.shape != self.mask.shape:
            raise ValueError(f"`mask` has {len(self.mask)} positions and `ids` {len(self.ids)}; expected as many")
        if bool((self.ids[self.mask] < 0).any()):
            raise ValueError(f"`ids` holds {int(self.ids[self.mask].min())} where `mask` is True; expected ids from 0 on")
        for name in ("ids", "mask"):
            object.__setattr__(self, name, getattr(self, name).clone())

    def description(self) -> list:
        """All that makes it what it is, as JSON."""
        return ["pins", torch.where(self.mask, self.ids, -1).tolist()]


@dataclass(frozen=True, eq=False)
class ToolCalls(Described):
    """The answers that call tools as the released model does, with arguments that fit their schemas: text, and then calls.

    Args:
        tools: as chat templates take them: mappings like `{"type": "function", "function": {"name", "parameters"}}`, or functions with
            type hints and a docstring.
        choice: "auto": an answer may call some, or none; "required": it is at least one call, without text; or the name of one that is
            called so.
        parallel: whether there may be several calls in an answer.
        thought: whether a thought may come first, if the tokenizer has the marks around one.
        depth: as that of `JsonSchema`.

    Raises:
        ValueError: something else; parameters that are no schema, or hold what a `JsonSchema` refuses; the name of an argument that cannot
            stand bare.
    """

    tools: Any
    choice: str = AUTO
    parallel: bool = True
    thought: bool = True
    depth: int = 3

    marks = MARKS
    demanded_marks = MARKS[:3]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", copy.deepcopy(read_tools(self.tools)))
        for name in ("parallel", "thought"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; expected True or False")
        self.expression()

    def expression(self) -> Expression:
        """As a language over characters and marks."""
        return calls_expression(self.tools, self.choice, self.parallel, self.thought, self.depth)

    def description(self) -> list:
        """All that makes it what it is, as JSON."""
        functions = [[tool["function"]["name"], tool["function"]["parameters"]] for tool in self.tools]
        return ["calls", functions, self.choice, self.parallel, self.thought, self.depth]

    def identity(self) -> str:
        """With what is said of the tools to the model, which changes no call of them."""
        return described(self) + json.dumps(self.tools, default=repr)


Language: TypeAlias = Regex | JsonSchema | Choice | Template | ToolCalls | Pins


def described(language: Language) -> str:
    """The same string for the same language, for names in a cache."""
    return json.dumps(language.description(), ensure_ascii=True, separators=(",", ":"), default=repr)  # of notes, which may hold anything


__all__ = ["Choice", "JsonSchema", "Language", "Pins", "Regex", "Template", "ToolCalls", "described"]
