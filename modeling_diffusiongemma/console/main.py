"""The console: `diffusiongemma COMMAND`, also `python -m modeling_diffusiongemma COMMAND`.

A command's arguments and the exit codes stand in `usage.py`, what it does in a file of its own with a `run`. Errors are one line
on standard error; a traceback means a bug.
"""

import argparse
import sys
from collections.abc import Sequence

from .arguments import PROGRAM, UsageError, drop, say, with_reader
from .bench import run as bench
from .chat import run as chat
from .decide import run as decide
from .export import run as export
from .fill import run as fill
from .generate import run as generate
from .info import run as info
from .revise import run as revise
from .trace import run as trace
from .usage import parse


def train(args: argparse.Namespace) -> int:
    """As the others; what it imports takes seconds more."""
    from .train import run

    return run(args)


def serve(args: argparse.Namespace) -> int:
    """As `train`; and it needs what the extra `serve` brings."""
    from .serve import run

    return run(args)


RUNS = {
    "generate": generate, "fill": fill, "revise": revise, "trace": trace, "decide": decide, "chat": chat, "bench": bench, "train": train,
    "serve": serve, "export": export, "info": info,
}  # fmt: skip
INTERRUPTED = 130  # 128 + SIGINT, as shells count it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name, by default the process's. Returns the exit code."""
    try:
        args = parse(argv)
        with with_reader():
            return RUNS[args.command](args)
    except SystemExit as stop:  # the command line has been answered, or nobody reads the answers
        return stop.code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except UnicodeEncodeError as error:
        code, letters = 1, error.object[error.start : error.end]
        problem = f"standard output is in {error.encoding}, which has no {letters!r}; expected UTF-8 (PYTHONIOENCODING=utf-8), or `--json`"
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        code, problem = 2 if isinstance(error, UsageError) else 1, str(error)
    try:
        print(end="", flush=True)
    except OSError:  # standard output is what failed
        drop(sys.stdout)
    say(f"{PROGRAM} {args.command}: error: {problem}")
    return code


__all__ = ["RUNS", "main"]
