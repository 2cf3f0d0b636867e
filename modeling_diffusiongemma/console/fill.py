"""`diffusiongemma fill`: the blanks of a text, filled in from both sides."""

import argparse

from .arguments import json_line
from .constrained import template_of
from .session import Session, generation_settings, prompt_of, refuse_copies


def run(args: argparse.Namespace) -> int:
    settings = generation_settings(args)
    refuse_copies(settings, "a template is filled in once")
    template, session = template_of(args, settings), Session(args, settings)
    (answer,) = session.answer([prompt_of(args)], session.watch() if args.watch else None, template)
    if answer["finish_reason"] == "time":
        raise ValueError(f"`max_time` is {settings.get('max_time')}, which was over before the text was whole; expected more")
    values = template.values(answer["text"])
    print(json_line({"prompt": args.prompt, **answer, "values": values}) if args.json else answer["text"], flush=True)
    return 0


__all__ = ["run"]
