"""`diffusiongemma generate`: one answer for every prompt."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator

from .console_arguments import Command, UsageError, add_generation, add_json, add_model, add_placement, integer
from .console_model import Session, generation_settings
from .console_watch import Watch

EXAMPLES = """\
  diffusiongemma generate "Write 3 March 1998 as an ISO date." "What is 0.1 g in kg?"
  diffusiongemma generate "Write 3 March 1998 as an ISO date." --watch
  diffusiongemma generate --file prompts.txt --batch-size 16 --json > answers.jsonl
  cat prompts.txt | diffusiongemma generate --seed 0        # a line, a prompt; empty lines are passed over
  cat letter.txt | diffusiongemma generate --whole          # all of it, one prompt
  diffusiongemma generate "..." --preset fast --set max_time=2.5
  diffusiongemma generate --model sudoku 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to answer (default: the lines of --file or standard input)")
    parser.add_argument("--file", metavar="FILE", help="a prompt a line; - is standard input")
    parser.add_argument("--whole", action="store_true", help="the file or standard input is one prompt")
    parser.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    parser.add_argument("--batch-size", type=integer(1), default=1, metavar="N", help="prompts at a time (default: 1)")
    parser.add_argument("--watch", action="store_true", help="show the canvas being denoised, on standard error")
    add_model(parser)
    add_placement(parser)
    add_generation(parser)
    add_json(parser)


def read_prompts(args: argparse.Namespace) -> tuple[Iterator[str], int | None]:
    """The prompts and, where known, how many they are. Lines of standard input are read when their turn comes."""
    if args.prompts:
        if args.file is not None or args.whole:
            raise UsageError("prompts are given, and `--file` or `--whole`; expected one or the other")
        return iter(args.prompts), len(args.prompts)
    if args.file is None and sys.stdin.isatty():
        raise UsageError("no prompt; expected one as an argument, in `--file`, or on standard input")
    if args.file not in (None, "-"):
        try:
            with open(args.file, encoding="utf-8") as file:
                lines = file.readlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"`--file` is {args.file!r}: {error}; expected a text file in UTF-8") from error
        total = None if args.whole else sum(bool(line.strip()) for line in lines)
    else:
        lines, total = sys.stdin, None
    prompts = iter(["".join(lines).strip("\n")]) if args.whole else (line.rstrip("\r\n") for line in lines)
    prompts = (prompt for prompt in prompts if prompt.strip())
    first = next(prompts, None)
    if first is None:
        raise UsageError(f"{'standard input' if args.file in (None, '-') else args.file} holds no prompt; expected one a line")
    return itertools.chain([first], prompts), 1 if args.whole else total


def batches(prompts: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(itertools.islice(prompts, size)):
        yield batch


def progress(total: int | None):
    """A bar where somebody sees it and there is more than one prompt; or None."""
    if total == 1 or not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, unit="prompt", file=sys.stderr, dynamic_ncols=True)


def run(args: argparse.Namespace) -> int:
    if args.watch and args.batch_size > 1:
        raise UsageError(f"`--watch` is given, and `--batch-size` is {args.batch_size}; expected 1: one canvas is drawn at a time")
    if args.raw and args.system is not None:
        raise UsageError("`--raw` and `--system` are both given; expected one: a system message needs the chat template")
    prompts, total = read_prompts(args)

    if args.watch and (generation_settings(args).get("num_return_sequences") or 1) > 1:
        raise UsageError("`--watch` is given, and `num_return_sequences` is above 1; expected 1: one canvas is drawn at a time")
    session = Session(args)
    bar = None if args.watch else progress(total)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    for batch in batches(prompts, args.batch_size):
        asked = batch if args.raw else [[*system, {"role": "user", "content": prompt}] for prompt in batch]
        streamer = Watch(session.tokenizer, session.hidden_ids) if args.watch else None
        answers = session.answer(asked, streamer)
        copies = len(answers) // len(batch)
        for place, answer in enumerate(answers):
            line = json.dumps({"prompt": batch[place // copies], **answer}, ensure_ascii=False) if args.json else answer["text"]
            if bar is not None:
                bar.clear()
            print(line, flush=True)
        if bar is not None:
            bar.update(len(batch))
    if bar is not None:
        bar.close()
    return 0


GENERATE = Command("generate", "answer prompts from arguments, a file or a pipe", EXAMPLES, add_arguments, run)

__all__ = ["GENERATE", "read_prompts"]
