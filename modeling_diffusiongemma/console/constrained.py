"""What the console takes to constrain an answer: arguments, and the languages of `generation.constraints` that they mean.

The arguments are read without torch; files and languages are read when the command runs, before a model is loaded.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

from .arguments import UsageError, fitting, words

WORDS_TAKEN = "; `--choices` takes all words behind it: write the prompt before it, or `--` between the two"


def named(given: str) -> tuple[str, str]:
    """`NAME=VALUE`, of a field."""
    name, separator, value = words(given).partition("=")
    fitting(given, separator and name.isidentifier() and value, "FIELD=VALUE, such as 'date=\\d{4}-\\d\\d'")
    return name, value


def add_constraint(parser: argparse.ArgumentParser, tools: bool = False) -> None:
    """Of an answer: one of three, or the `tools` that it may call."""
    parser.set_defaults(tools=None, tool_choice=None)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--regex", type=words, metavar="PATTERN", help="the whole answer matches this regular expression")
    group.add_argument("--choices", type=words, nargs="+", metavar="TEXT", help="the answer is one of these; write prompts before them")
    group.add_argument("--schema", metavar="FILE", help="the answer is JSON that fits this JSON schema")
    if not tools:
        return
    group.add_argument("--tools", metavar="FILE", help="the answer may call these functions, a JSON list as chat templates take them")
    choice = "'auto' (default): calls or none; 'required': at least one; or the name of the one to call"
    parser.add_argument("--tool-choice", type=words, metavar="NAME", help=f"with --tools: {choice}")


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Of the fields of a template."""
    add = parser.add_argument
    add("--regex", type=named, action="append", default=[], metavar="FIELD=PATTERN", help="what a field holds; repeatable")
    add("--choices", type=named, action="append", default=[], metavar="FIELD=A|B", help="a field holds one of these; repeatable")
    add("--schema", type=named, action="append", default=[], metavar="FIELD=FILE", help="a field holds JSON of this schema; repeatable")


def hint_at_choices(args: argparse.Namespace) -> str:
    """What a message that there is no prompt goes on with."""
    return "" if args.choices is None else WORDS_TAKEN


def read_json_file(name: str, what: str = "a JSON schema") -> Any:
    try:
        with open(name, encoding="utf-8-sig") as file:
            return json.load(file)
    except (OSError, RecursionError, ValueError) as error:
        raise UsageError(f"{name!r} cannot be read ({error}); expected a file with {what}") from error


def make(argument: str, language: Callable, *given: Any, **fields: Any):
    """A language; UsageError with the name of the argument that asks for it."""
    try:
        return language(*given, **fields)
    except ValueError as error:
        raise UsageError(f"{argument}: {error}") from error


def refuse_reference(settings: dict[str, Any]) -> None:
    """UsageError where an answer under a constraint is to be made by the reference."""
    if settings.get("backend") == "reference":
        raise UsageError("`--set backend=reference` and a constraint are both given; expected one: the reference knows no constraint")


def constraint_of(args: argparse.Namespace, settings: dict[str, Any]):
    """The language that `add_constraint`'s arguments ask for; None where they ask for none. UsageError as `refuse_reference`."""
    from generation.constraints.languages import Choice, JsonSchema, Regex, ToolCalls

    if args.tool_choice is not None and args.tools is None:
        raise UsageError(f"`--tool-choice` is {args.tool_choice!r} without `--tools`; expected the tools that may be called")
    for kind, language in (
        ("tools", lambda name: ToolCalls(read_json_file(name, "a JSON list of functions"), args.tool_choice or "auto")),
        ("regex", Regex), ("choices", Choice), ("schema", lambda name: JsonSchema(read_json_file(name))),
    ):  # fmt: skip
        if (given := getattr(args, kind)) is not None:
            refuse_reference(settings)
            return make(f"`--{kind}`", language, given)
    return None


def template_of(args: argparse.Namespace, settings: dict[str, Any]):
    """The template of `fill`, with the languages of its fields. UsageError as `refuse_reference`."""
    from generation.constraints.languages import Choice, JsonSchema, Regex, Template

    refuse_reference(settings)
    fields = {}
    for kind, given, language in (
        ("regex", args.regex, Regex), ("choices", args.choices, lambda value: Choice(value.split("|"))),
        ("schema", args.schema, lambda name: JsonSchema(read_json_file(name))),
    ):  # fmt: skip
        for name, value in given:
            if name in fields:
                raise UsageError(f"`--{kind}` gives the field {name!r} a second language; expected one")
            fields[name] = make(f"`--{kind} {name}=...`", language, value)
    return make("TEMPLATE", Template, args.template, **fields)


__all__ = ["add_constraint", "add_fields", "constraint_of", "hint_at_choices", "template_of"]
