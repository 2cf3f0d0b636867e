"""`diffusiongemma decide`: how probable each option of some questions is as the answer to a prompt."""

import argparse

from .arguments import UsageError, json_line
from .constrained import make
from .session import Session, prompt_of


def run(args: argparse.Namespace) -> int:
    from generation.constraints.languages import Choice

    questions = {}
    for name, options in args.question:
        if name in questions:
            raise UsageError(f"`--question` names {name!r} twice; expected each once")
        questions[name] = make(f"`--question {name}=...`", Choice, options)
    session = Session(args, {})
    how = {"reads": args.reads, "steps": args.steps, "seed": session.seed, "canvas_length": args.canvas_length}
    found = session.model.decide(prompt_of(args), questions, session.tokenizer, **how)
    if not args.json:
        print(found, flush=True)
        return 0
    answers = {
        name: {"best": answer.best, "probabilities": answer.probabilities, "errors": answer.errors, "mass": answer.mass}
        for name, answer in found.items()
    }
    about = {"prompt": args.prompt, "answers": answers, "reads": found.reads, "canvases": found.canvases, "passes": found.passes}
    print(json_line({**about, "seed": session.seed}), flush=True)
    return 0


__all__ = ["run"]
