"""`diffusiongemma chat`: a conversation, line by line, with the canvas in sight."""

import argparse
import contextlib
import sys

from .arguments import json_line, read_line, say
from .session import Session, generation_settings, refuse_copies

HELP = "/reset forgets the conversation, /exit or the end of input ends it, /help says this; Ctrl-C drops the answer being written"
PROMPT = "> "


def next_line(interactive: bool) -> str | None:
    """The next line, or None at the end of input."""
    if not interactive:
        line = read_line()
        return line.rstrip("\r\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` editing and history)
    try:
        return input(PROMPT)
    except EOFError:
        say("")
        return None


def converse(session, args: argparse.Namespace, interactive: bool) -> int:
    """Reads lines until the end; returns 1 if an answer failed. A turn that fails or is interrupted is forgotten."""
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages, failed = list(start), False
    while (line := next_line(interactive)) is not None:
        line = line.strip()
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(start)
            say("the conversation is forgotten")
        elif line.startswith("/"):
            say(HELP if line == "/help" else f"{line.split()[0]!r} is no command: {HELP}")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            on_text = None if args.json else lambda text: print(text, end="", flush=True)
            try:
                answer = session.answer([asked], session.watch(not args.no_watch, on_text))[0]
            except KeyboardInterrupt:
                say("\ninterrupted; the turn is forgotten")
            except BrokenPipeError:
                raise
            except (OSError, RuntimeError, ValueError) as error:
                say(f"error: {error}; the turn is forgotten")
                failed = True
            else:
                print(json_line({"prompt": line, **answer}) if args.json else "", flush=True)
                messages = [*asked, {"role": "assistant", "content": answer["text"]}]
    return int(failed)


def run(args: argparse.Namespace) -> int:
    interactive = sys.stdin is not None and sys.stdin.isatty() and not args.json
    settings = generation_settings(args)
    refuse_copies(settings, "a conversation goes on from one answer")
    session = Session(args, settings)
    if interactive:
        say(f"{args.model.given}: {HELP}")
    try:
        return converse(session, args, interactive)
    except KeyboardInterrupt:  # at the prompt
        say("")
        return 0


__all__ = ["converse", "run"]
