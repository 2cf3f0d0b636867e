"""The console: `diffusiongemma COMMAND`, also `python -m modeling_diffusiongemma COMMAND`.

A command is one file with a `Command`; a new one joins by its line in `COMMANDS`. Exit codes: 0 fine, 1 the job failed,
2 wrong usage. Errors are one line on standard error; a traceback means a bug.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from .console_arguments import Command, UsageError, say
from .console_bench import BENCH
from .console_chat import CHAT
from .console_export import EXPORT
from .console_generate import GENERATE
from .console_info import INFO

COMMANDS: tuple[Command, ...] = (GENERATE, CHAT, BENCH, EXPORT, INFO)
PROGRAM = "diffusiongemma"
DESCRIPTION = "Text by block diffusion: a canvas of noise is denoised, all tokens in parallel, until it stands still."
EXAMPLES = """\
examples:
  diffusiongemma generate "Write 3 March 1998 as an ISO date." --watch
  diffusiongemma chat
  diffusiongemma info --model google/diffusiongemma-26B-A4B-it
  diffusiongemma COMMAND --help

exit codes: 0 fine, 1 the job failed, 2 wrong usage
"""
INTERRUPTED = 130  # 128 + SIGINT, as shells count it


def build_parser() -> argparse.ArgumentParser:
    shape = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog=PROGRAM, description=DESCRIPTION, epilog=EXAMPLES, **shape)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        text = command.summary[0].upper() + command.summary[1:] + "."
        one = commands.add_parser(command.name, help=command.summary, description=text, epilog=f"examples:\n{command.examples}", **shape)
        command.add_arguments(one)
        one.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name, by default the process's. Returns the exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said it all
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return args.run(args)
    except UsageError as error:
        say(f"{PROGRAM} {args.command}: error: {error}")
        return 2
    except BrokenPipeError:  # whoever read the answers has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails aloud
        return 1
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        say(f"{PROGRAM} {args.command}: error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


__all__ = ["COMMANDS", "build_parser", "main"]
