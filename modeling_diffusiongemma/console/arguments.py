"""What the console's commands share: arguments and their checks, and how they speak. It imports neither torch nor transformers."""

import argparse
import ast
import codecs
import contextlib
import importlib.util
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints import shipped

PROGRAM = "diffusiongemma"
PIPE_CLOSED = 141  # the exit code 128 + SIGPIPE, as shells count it
MODEL_TYPE = "diffusion_gemma"
ADAPTER = "adapter_config.json"  # PEFT's
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
# Run by itself: `from generation.call.presets` would first import the package, and torch with it.
PRESETS = runpy.run_path(str(Path(importlib.util.find_spec("generation").origin).parent / "call/presets.py"))["PRESETS"]


class UsageError(ValueError):
    """The command line asks for something that cannot be; the console then exits with 2 instead of 1."""


class CheckpointName(NamedTuple):
    """`given` on the command line, and the folder or Hub repository `path` that it means."""

    given: str
    path: str


def checkpoint_name(given: str) -> CheckpointName:
    """What `--model` means: a shipped checkpoint's name, a folder, or a repository `owner/name` on the Hub."""
    if given in shipped():
        return CheckpointName(given, shipped()[given])
    if os.path.isdir(given):
        config = Path(given, "config.json")
        if Path(given, ADAPTER).is_file() and not config.is_file():
            expected = "expected a checkpoint's: the adapter's base, beside `--adapter`, or what `train --lora --merge` wrote"
            raise argparse.ArgumentTypeError(f"the folder {given!r} holds an adapter; {expected}")
        if not config.is_file():
            raise argparse.ArgumentTypeError(f"the folder {given!r} has no config.json; expected a checkpoint's folder")
        try:
            found = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        except (AttributeError, ValueError):
            raise argparse.ArgumentTypeError(f"{config} is not a JSON object; expected a checkpoint's config") from None
        if found != MODEL_TYPE:
            raise argparse.ArgumentTypeError(f"{config} says `model_type` {found!r}; expected {MODEL_TYPE!r}")
    elif os.path.exists(given) or not HUB_NAME.fullmatch(given):
        expected = f"expected one of {[*shipped()]}, a folder, or a Hub repository owner/name"
        raise argparse.ArgumentTypeError(f"{given!r} is no checkpoint; {expected}")
    return CheckpointName(given, given)


def fitting(given: str, fits: object, expected: str) -> str:
    if not fits:
        raise argparse.ArgumentTypeError(f"got {given!r}; expected {expected}")
    return given


def setting(given: str) -> tuple[str, Any]:
    """`NAME=VALUE`; the value is read as JSON, then as Python, and is a string where it is neither."""
    name, separator, value = given.partition("=")
    fitting(given, separator and name.isidentifier(), "NAME=VALUE, such as entropy_bound=0.3")
    for read in (json.loads, ast.literal_eval):
        try:
            return name, read(value)
        except (MemoryError, RecursionError, SyntaxError, ValueError):  # the first two: brackets without end
            continue
    return name, value


def integer(smallest: int) -> Callable[[str], int]:
    return lambda given: int(fitting(given, re.fullmatch(r"-?\d+", given) and int(given) >= smallest, f"an integer >= {smallest}"))


def positive(given: str) -> float:
    fits = re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", given, re.IGNORECASE) and 0 < float(given) < float("inf")
    return float(fitting(given, fits, "a number above 0, such as 1e-3"))


def share(given: str) -> float:
    try:
        return float(fitting(given, positive(given) <= 1, "a share above 0, at most 1"))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"got {given!r}; expected a share above 0, at most 1") from None


def adapter_folder(given: str) -> str:
    return fitting(given, Path(given, ADAPTER).is_file(), f"a folder with an {ADAPTER}")


def size(given: str) -> str:
    fits = re.fullmatch(r"\d+(\.\d+)? ?[KMGT]B", given, re.IGNORECASE)
    return fitting(given, fits, "a number and KB, MB, GB or TB, such as 5GB")


def words(given: str) -> str:
    """Text that a tokenizer can read: bytes that are no text of the locale come as lone surrogates."""
    return fitting(given, not re.search("[\ud800-\udfff]", given), "text in UTF-8")


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every command takes."""
    parser.add_argument(
        "--model", type=checkpoint_name, default="text", metavar="NAME",
        help="'text', 'sudoku', 'decisions' or 'tools' (shipped), a folder, or a Hub repository owner/name (default: text)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object per answer on standard output, all else on standard error")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """What a command that runs a model takes."""
    parser.add_argument("--adapter", type=adapter_folder, metavar="FOLDER", help="of PEFT, on top of the model's weights; needs peft")
    parser.add_argument("--seed", type=integer(0), metavar="N", help="same seed, same prompt: same answer (default: a new one)")


def add_generation(parser: argparse.ArgumentParser) -> None:
    """What a command that writes text takes."""
    add_weights(parser)
    parser.add_argument("--max-new-tokens", type=integer(1), metavar="N", help="longest answer (default: the checkpoint's)")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="whole settings, from fast to thorough (default: the checkpoint's)")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="NAME=VALUE", dest="settings",
        help="any generation setting, e.g. max_denoising_steps=16; repeatable",
    )  # fmt: skip


def read_line() -> str:
    """The next line of standard input, without a byte order mark, as PowerShell and files put one there; empty at its end. UsageError where
    it is no text, as `words`."""
    try:
        line = "" if sys.stdin is None else sys.stdin.readline()
        line.encode()
    except UnicodeError as error:
        raise UsageError(f"standard input cannot be read: {error}; expected text in UTF-8 (PYTHONIOENCODING=utf-8)") from error
    return line.removeprefix("\ufeff") or ("\n" if line else "")


def say(text: str) -> None:
    """To the person at the terminal, never to the pipe."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def with_reader() -> Iterator[None]:
    """A context in which something is printed, all of it at its end; SystemExit where whoever read it has gone, as `head` does.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    try:
        try:
            yield
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        drop(sys.stdout, sys.stderr)
        raise SystemExit(PIPE_CLOSED) from None


def drop(*streams) -> None:
    """What is still buffered goes nowhere, or the interpreter's last flush would fail aloud."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, streams):
        os.dup2(nowhere, stream.fileno())


def json_line(about: dict[str, Any]) -> str:
    """As JSON in one line: letters as they are where standard output takes UTF-8, else escaped, which means the same."""
    utf8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name == "utf-8"
    return json.dumps(about, ensure_ascii=not utf8)


__all__ = [
    "CheckpointName", "MODEL_TYPE", "PRESETS", "PROGRAM", "UsageError", "add_common", "add_generation", "add_weights",
    "checkpoint_name", "drop", "fitting", "integer", "json_line", "positive", "read_line", "say", "setting", "share", "size", "with_reader",
    "words",
]  # fmt: skip
