"""Calls of tools as Gemma 4 and DiffusionGemma write them: as a language, and what reads them.

    <|channel>thought\\nIt rains.<channel|>I close it.<|tool_call>call:close{by:0.5,window:<|"|>north<|"|>}<tool_call|>

Names of arguments are bare and in the order of Jinja's `dictsort`; strings stand between two marks, with nothing escaped; everything else
is written as in JSON, without spaces. Behind the last call the model stops at `<|tool_response>`. Source: the released chat template.

Knows nothing of tokens, but which marks there are.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils import get_json_schema

from .expression import EMPTY, NOTHING, Both, Either, Except, Expression, Join, Mark, Repeat, chars, outside, text
from .regex import either, joined
from .schema import ANY_TEXT, Writer, written

MARKS = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")
CALL, END_OF_CALL, QUOTE, CHANNEL, END_OF_CHANNEL = map(Mark, range(len(MARKS)))
AUTO, REQUIRED = "auto", "required"
NAME, KEY = re.compile(r"[\w.-]+"), re.compile(r"\w+")  # of tools; of arguments, as transformers' parser reads them
WORDS = Repeat(chars(*((ord(one), ord(other)) for one, other in ("09", "AZ", "__", "az"))), 1, None)

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>[\w.-]+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']], "allow_non_json": True},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        # Only what ends the whole answer, with the padding that a batch adds, which would otherwise be taken for its text.
        "content": {"close_pattern": r"(?:<turn\|>|<\|tool_response>|<eos>)(?:<pad>)*\Z", "content": "text"},
    },
}
"""For `tokenizer.response_template`, by which `tokenizer.parse_response`, the pipeline "text-generation" and `transformers serve` take an
answer apart into `content`, `reasoning_content` and `tool_calls`. Arguments that cannot be read, which no constraint writes, stay text."""


def without(*marks: str) -> Expression:
    """Any text in which none of these is spelled out: who reads an answer as text would take it for a mark."""
    return Except(ANY_TEXT, Join((ANY_TEXT, Either(tuple(map(text, marks))), ANY_TEXT)))


CONTENT, THOUGHT = without("<|tool_call>", "<|channel>"), without("<channel|>")
# What may stand in a string: no end of it or of its call, and none of the two characters that transformers' parser keeps for itself.
KEPT, ENDS = (1, 2), ("<tool_call|>", '<|"|>')
STRING = Both(Repeat(outside(chars(KEPT)), 0, None), without(*ENDS))
UNREADABLE = re.compile("|".join(map(re.escape, (*map(chr, KEPT), *ENDS))))


class CallWriter(Writer):
    """How calls write values."""

    def quoted(self, decoded: Expression) -> Expression:
        return joined(QUOTE, STRING if decoded == ANY_TEXT else Both(decoded, STRING), QUOTE)

    def name(self, name: str) -> Expression:
        if not KEY.fullmatch(name):
            raise ValueError(f"`tools` has the argument {name!r}, which stands bare in a call; expected letters, digits and '_'")
        return text(name)

    def other_name(self, known: Expression) -> Expression:
        return WORDS if known == NOTHING else Except(WORDS, known)

    def literal(self, value: Any, path: str) -> Expression:
        if isinstance(value, str) and UNREADABLE.search(value):
            raise ValueError(f"`schema` holds {value!r} at {path}, which nobody could read in a call; expected no mark in it")
        return super().literal(value, path)

    def ordered(self, properties: dict[str, Any]) -> dict[str, Any]:
        return dict(sorted(properties.items(), key=lambda item: item[0].lower()))


def read_tools(given: Any) -> list[dict[str, Any]]:
    """Functions in whatever way a caller has them, as chat templates take them: `{"type": "function", "function": {"name", "parameters"}}`
    with what else is said of them.

    Raises:
        ValueError: no list with at least one function; one without a name or with another's; parameters that are no schema of an object.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"`tools` is {given!r}; expected a list of at least one function, as a chat template takes them")
    found: list[dict[str, Any]] = []
    for place, tool in enumerate(given):
        where = f"`tools[{place}]`"
        if isinstance(tool, Callable):
            try:
                tool = get_json_schema(tool)
            except Exception as error:  # of transformers: a docstring or type hints that say too little
                raise ValueError(f"{where} is {tool!r}, of which no schema can be made: {error}") from error
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None  # in a response's request it stands for itself
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{where} is {tool!r}; expected a function with a `name` of letters, digits, '_', '-' and '.'")
        if any(name == other["function"]["name"] for other in found):
            raise ValueError(f"{where} has the name {name!r}, which another tool has; expected each once")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise ValueError(f"{where} has the parameters {parameters!r}; expected a JSON schema of an object")
        parameters = {"type": "object", **parameters}
        if not parameters.keys() & {"additionalProperties", "$ref", "allOf", "anyOf", "oneOf"}:
            parameters.setdefault("properties", {})
        said = {key: value for key, value in function.items() if key != "type"}
        found.append({"type": "function", "function": said | {"parameters": parameters}})
    return found


def calls_expression(tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool, thought: bool, depth: int) -> Expression:
    """The answers that may, or must, call `tools`, as `read_tools` gives them; see `ToolCalls`."""
    functions = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if choice not in (AUTO, REQUIRED, *functions):
        raise ValueError(f"`choice` is {choice!r}; expected 'auto', 'required' or one of {[*functions]}")
    calls = []
    for name in functions if choice in (AUTO, REQUIRED) else (choice,):
        try:
            arguments = written(functions[name], CallWriter, "compact", depth)
        except ValueError as error:
            raise ValueError(f"`tools` has {name!r}, whose parameters make no language: {error}") from error
        calls.append(joined(CALL, text(f"call:{name}"), arguments, END_OF_CALL))
    called = Repeat(Either(tuple(calls)), int(choice != AUTO), None if parallel else 1)
    thinking = either([EMPTY, joined(CHANNEL, text("thought\n"), THOUGHT, END_OF_CHANNEL)]) if thought else EMPTY
    return joined(thinking, CONTENT if choice == AUTO else EMPTY, called)


__all__ = ["AUTO", "MARKS", "REQUIRED", "RESPONSE_TEMPLATE", "calls_expression", "read_tools"]
