"""What the console takes to constrain an answer: arguments, and the languages of `generation.constraints` that they mean.

The arguments are read without torch; files and languages are read when the command runs, before a model is loaded.
"""

import argparse
import json
from typing import Any

from .arguments import UsageError, fitting


def named(given: str) -> tuple[str, str]:
    """`NAME=VALUE`, of a field."""
    name, separator, value = given.partition("=")
    fitting(given, separator and name.isidentifier() and value, "FIELD=VALUE, such as 'date=\\d{4}-\\d\\d'")
    return name, value


def add_constraint(parser: argparse.ArgumentParser) -> None:
    """Of an answer: one of three."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--regex", metavar="PATTERN", help="the whole answer matches this regular expression")
    group.add_argument("--choices", nargs="+", metavar="TEXT", help="the answer is one of these")
    group.add_argument("--schema", metavar="FILE", help="the answer is JSON that fits this JSON schema")


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Of the fields of a template."""
    add = parser.add_argument
    add("--regex", type=named, action="append", default=[], metavar="FIELD=PATTERN", help="what a field holds; repeatable")
    add("--choices", type=named, action="append", default=[], metavar="FIELD=A|B", help="a field holds one of these; repeatable")
    add("--schema", type=named, action="append", default=[], metavar="FIELD=FILE", help="a field holds JSON of this schema; repeatable")


def read_schema_file(name: str) -> Any:
    try:
        with open(name, encoding="utf-8-sig") as file:
            return json.load(file)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"`--schema` is {name!r}: {error}; expected a JSON schema") from error


def constraint_of(args: argparse.Namespace):
    """The language that `add_constraint`'s arguments ask for; None where they ask for none."""
    from generation.constraints.languages import Choice, JsonSchema, Regex

    try:
        if args.regex is not None:
            return Regex(args.regex)
        if args.choices is not None:
            return Choice(args.choices)
        return None if args.schema is None else JsonSchema(read_schema_file(args.schema))
    except ValueError as error:
        raise UsageError(str(error)) from error


def template_of(args: argparse.Namespace):
    """The template of `fill`, with the languages of its fields."""
    from generation.constraints.languages import Choice, JsonSchema, Regex, Template

    fields = {}
    try:
        for kind, given, make in (
            ("regex", args.regex, Regex), ("choices", args.choices, lambda value: Choice(value.split("|"))),
            ("schema", args.schema, lambda value: JsonSchema(read_schema_file(value))),
        ):  # fmt: skip
            for name, value in given:
                if name in fields:
                    raise UsageError(f"`--{kind}` gives the field {name!r} a second language; expected one")
                fields[name] = make(value)
        return Template(args.template, **fields)
    except ValueError as error:
        raise UsageError(str(error)) from error


__all__ = ["add_constraint", "add_fields", "constraint_of", "template_of"]
