"""`diffusiongemma trace`: an answer, how it came about in numbers, and that as a page, pictures and a file."""

import argparse
import importlib.util
from pathlib import Path

from generation.watch.animation import draw_animation
from generation.watch.pictures import draw_trace, trace_page
from generation.watch.trace import Trace

from .arguments import UsageError, json_line
from .constrained import constraint_of
from .session import Session, generation_settings, prompt_of, refuse_copies

ALTERNATIVES = 3  # of a position and step, beside the best
TITLES = {
    "tokens": "tokens of the answer",
    "steps": "denoising steps of each canvas",
    "seconds": "seconds, prompt pass and commits in them",
    "revisions": "changes of tokens that had been accepted",
    "revised": "tokens that these changed",
    "order": "order in which tokens stood: 1 from the left, -1 from the right",
    "wasted": "steps after all tokens of a canvas stood",
}


def shown(value: int | float | list | None) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return "at once" if value is None else f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


def run(args: argparse.Namespace) -> int:
    settings = generation_settings(args)
    refuse_copies(settings, "one answer is traced at a time")
    if settings.get("decoding") == "autoregressive":
        raise UsageError("`decoding` is 'autoregressive', which has no denoising steps; expected another")
    constraint = constraint_of(args, settings)
    if args.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("matplotlib is not installed, which `--png` needs; expected it: pip install 'modeling-diffusiongemma[bench]'")
    alternatives = ALTERNATIVES if args.html is not None else 0  # which the page alone shows
    session, trace = Session(args, settings), Trace(alternatives)
    (answer,) = session.answer([prompt_of(args)], constraint=constraint, watcher=trace)
    summary = trace.summary()
    if args.html is not None:
        Path(args.html).write_text(trace_page(trace, session.tokenizer, args.prompt), encoding="utf-8")
    if args.svg is not None:
        Path(args.svg).write_text(draw_animation(trace, session.tokenizer, args.prompt), encoding="utf-8")
    if args.png is not None:
        draw_trace(trace, session.tokenizer, args.png)
    if args.save is not None:
        trace.save(args.save)
    if args.json:
        print(json_line({"prompt": args.prompt, **answer, **summary}), flush=True)
        return 0
    print(answer["text"], "", "| measure | value |", "|---|---|", sep="\n")
    for name, title in TITLES.items():
        print(f"| {title} | {shown(summary[name])} |", flush=True)
    return 0


__all__ = ["run"]
