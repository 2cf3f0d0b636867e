"""`diffusiongemma fill`: the blanks of a text, filled in from both sides."""

import argparse

from .arguments import UsageError, json_line
from .constrained import refuse_reference, template_of
from .session import Session, generation_settings
from .watch import Watch


def run(args: argparse.Namespace) -> int:
    settings = generation_settings(args)
    refuse_reference(settings)
    if (settings.get("num_return_sequences") or 1) > 1:
        raise UsageError("`num_return_sequences` is above 1; expected 1: a template is filled in once")
    template = template_of(args)
    session = Session(args)
    prompt = args.prompt if args.raw else [{"role": "user", "content": args.prompt}]
    (answer,) = session.answer([prompt], Watch(session.tokenizer, session.hidden_ids) if args.watch else None, template)
    if answer["finish_reason"] == "time":
        raise ValueError(f"`max_time` is {settings.get('max_time')}, which was over before the text was whole; expected more")
    values = template.values(answer["text"])
    print(json_line({"prompt": args.prompt, **answer, "values": values}) if args.json else answer["text"], flush=True)
    return 0


__all__ = ["run"]
