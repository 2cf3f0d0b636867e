"""`diffusiongemma fill`: the blanks of a text, filled in from both sides."""

import argparse

from .arguments import json_line
from .constrained import template_of
from .session import Session
from .watch import Watch


def run(args: argparse.Namespace) -> int:
    template = template_of(args)
    session = Session(args)
    prompt = args.prompt if args.raw else [{"role": "user", "content": args.prompt}]
    (answer,) = session.answer([prompt], Watch(session.tokenizer, session.hidden_ids) if args.watch else None, template)
    values = template.values(answer["text"])
    print(json_line({"prompt": args.prompt, **answer, "values": values}) if args.json else answer["text"], flush=True)
    return 0


__all__ = ["run"]
