"""What the console's commands share: arguments, their checks, and how a command is described."""

import argparse
import ast
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from generation.configuration import PRESETS

from .checkpoints import FOLDER, default_checkpoint

MODEL_TYPE = "diffusion_gemma"
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class UsageError(ValueError):
    """The command line asks for something that cannot be; the console then exits with 2 instead of 1."""


class CheckpointName(NamedTuple):
    """`given` on the command line, and the folder or Hub repository `path` that it means."""

    given: str
    path: str


@dataclass(frozen=True)
class Command:
    """A command of the console: `run` gets the parsed arguments and returns the exit code."""

    name: str
    summary: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def checkpoint_name(given: str) -> CheckpointName:
    """What `--model` means: a shipped checkpoint's name, a folder, or a repository `owner/name` on the Hub."""
    shipped = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
    if given in shipped:
        return CheckpointName(given, default_checkpoint(given))
    if os.path.isdir(given):
        config = Path(given, "config.json")
        if not config.is_file():
            raise argparse.ArgumentTypeError(f"the folder {given!r} has no config.json; expected a checkpoint's folder")
        try:
            found = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        except (AttributeError, ValueError):
            raise argparse.ArgumentTypeError(f"{config} is not a JSON object; expected a checkpoint's config") from None
        if found != MODEL_TYPE:
            raise argparse.ArgumentTypeError(f"{config} says `model_type` {found!r}; expected {MODEL_TYPE!r}")
        return CheckpointName(given, given)
    if HUB_NAME.fullmatch(given) and not os.path.exists(given):
        return CheckpointName(given, given)
    raise argparse.ArgumentTypeError(f"{given!r} is no checkpoint; expected one of {shipped}, a folder, or a Hub repository owner/name")


def setting(given: str) -> tuple[str, Any]:
    """`NAME=VALUE`; the value is read as JSON, then as Python, and is a string where it is neither."""
    name, separator, value = given.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"got {given!r}; expected NAME=VALUE, such as entropy_bound=0.3")
    for read in (json.loads, ast.literal_eval):
        try:
            return name, read(value)
        except (ValueError, SyntaxError):
            continue
    return name, value


def integer(smallest: int) -> Callable[[str], int]:
    def parse(given: str) -> int:
        if not re.fullmatch(r"-?\d+", given) or int(given) < smallest:
            raise argparse.ArgumentTypeError(f"got {given!r}; expected an integer >= {smallest}")
        return int(given)

    return parse


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=checkpoint_name, default="text", metavar="NAME",
        help="'text' or 'sudoku' (shipped), a folder, or a Hub repository owner/name (default: text)",
    )  # fmt: skip


def add_placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto to spread over all (default: cuda if there is one)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, the checkpoint's)")


def add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=integer(0), metavar="N", help="same seed, same prompt: same answer (default: a new one)")
    parser.add_argument("--max-new-tokens", type=integer(1), metavar="N", help="longest answer (default: the checkpoint's)")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="whole settings, from fast to thorough (default: the checkpoint's)")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="NAME=VALUE", dest="settings",
        help="any generation setting, e.g. max_denoising_steps=16; repeatable",
    )  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object per answer on standard output, all else on standard error")


def say(text: str) -> None:
    """To the person at the terminal, never to the pipe."""
    print(text, file=sys.stderr, flush=True)


__all__ = [
    "CheckpointName",
    "Command",
    "UsageError",
    "add_generation",
    "add_json",
    "add_model",
    "add_placement",
    "checkpoint_name",
    "integer",
    "say",
    "setting",
]
