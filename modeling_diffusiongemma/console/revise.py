"""`diffusiongemma revise`: a text mended in place, from partial noise."""

import argparse

from .arguments import json_line
from .constrained import constraint_of
from .session import Session, generation_settings, prompt_of


def run(args: argparse.Namespace) -> int:
    settings = generation_settings(args)
    constraint, session = constraint_of(args, settings), Session(args, settings)
    settings = settings | {"constraint": constraint, "streamer": session.watch() if args.watch else None}
    keep = "others" if args.keep_others else args.keep or None
    where = args.where if args.at is None else args.at
    # `--set noise=mask` is a setting of steps; here `noise` is the share that becomes noise.
    if (noise := settings.pop("noise", None)) is not None:
        settings["generation_config"] = {"noise": noise}
    revised = session.model.revise(args.text, session.tokenizer, prompt_of(args), args.noise, keep, where, seed=session.seed, **settings)
    if not args.json:
        print(revised.text, flush=True)
        return 0
    renoised, changed = (flags.nonzero().flatten().tolist() for flags in (revised.renoised, revised.changed))
    about = {"tokens": len(revised.tokens), "renoised": renoised, "changed": changed, "steps": list(revised.steps), "seed": session.seed}
    print(json_line({"given": args.text, "prompt": args.prompt, "text": revised.text, **about}), flush=True)
    return 0


__all__ = ["run"]
