"""`diffusiongemma generate`: one answer for every prompt."""

import argparse
import itertools
import sys
from collections.abc import Iterator

from .arguments import UsageError, json_line, read_line
from .constrained import constraint_of, hint_at_choices
from .session import Session, generation_settings


def read_prompts(args: argparse.Namespace) -> tuple[Iterator[str], int | None]:
    """The prompts and, where known, how many they are. Lines of standard input are read when their turn comes."""
    if args.prompts:
        return iter(args.prompts), len(args.prompts)
    if args.file not in (None, "-"):
        try:
            with open(args.file, encoding="utf-8-sig") as file:
                lines = file.readlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"`--file` is {args.file!r}: {error}; expected a text file in UTF-8") from error
        total = None if args.whole else sum(bool(line.strip()) for line in lines)
    else:
        lines, total = iter(read_line, ""), None
    prompts = iter(["".join(lines).strip("\n")]) if args.whole else (line.rstrip("\r\n") for line in lines)
    prompts = (prompt for prompt in prompts if prompt.strip())
    first = next(prompts, None)
    if first is None:
        source = "standard input" if args.file in (None, "-") else args.file
        raise UsageError(f"{source} holds no prompt; expected one a line{hint_at_choices(args)}")
    return itertools.chain([first], prompts), 1 if args.whole else total


def shown(answer: dict) -> str:
    """An answer's text, and a line of JSON for each of its calls."""
    lines = [answer["text"]] if answer["text"] or not answer.get("tool_calls") else []
    return "\n".join([*lines, *map(json_line, answer.get("tool_calls", ()))])


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm  # which transformers requires

    prompts, total = read_prompts(args)
    settings = generation_settings(args)
    if args.watch and (settings.get("num_return_sequences") or 1) > 1:
        raise UsageError("`--watch` is given, and `num_return_sequences` is above 1; expected 1: one canvas is drawn at a time")
    constraint, session = constraint_of(args, settings), Session(args, settings)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    unseen = args.watch or total == 1 or not sys.stderr.isatty()
    with tqdm(total=total, unit="prompt", file=sys.stderr, dynamic_ncols=True, disable=unseen) as bar:
        while batch := list(itertools.islice(prompts, args.batch_size)):
            asked = batch if args.raw else [[*system, {"role": "user", "content": prompt}] for prompt in batch]
            answers = session.answer(asked, session.watch() if args.watch else None, constraint)
            copies = len(answers) // len(batch)
            for place, answer in enumerate(answers):
                bar.clear()
                print(json_line({"prompt": batch[place // copies], **answer}) if args.json else shown(answer), flush=True)
            bar.update(len(batch))
    return 0


__all__ = ["read_prompts", "run"]
