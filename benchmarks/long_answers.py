"""Answers that fill a canvas, by denoising and one token at a time, with the same weights: exactness, passes, tokens a second.

    python benchmarks/long_answers.py                       # the shipped text checkpoint, 200 unseen lists of days
    python benchmarks/long_answers.py --cases 40 --batches 1 8 --threads 2

The job `days` (examples/jobs/days.py): 14 to 22 days from a day on, 154 to 242 tokens, of years that no training list shows. All ways
answer the same requests; tokens are those of the answers without padding; they take turns batch by batch, in one process. At batch 1
the first `--single` cases are timed, larger batches take all of them.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from measure import heading, machine, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from modeling_diffusiongemma import default_checkpoint
from race import JOB, WAYS, Measured


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder to load (default: the shipped text checkpoint)")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--single", type=int, default=40, help="cases of the batch of 1")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 40])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    path = args.checkpoint or default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path, padding_side="left")
    rng = random.Random(7)
    prompts = [JOB.sample(rng, "test")[0] for _ in range(args.cases)]
    Measured().add(model, tokenizer, prompts[:1], [0], {})  # the first call of a process is slower
    print(heading("long_answers.py", arguments, machine("cpu", args.threads)) + "\n")
    rows, ways = [], {**WAYS, "diffusion, released settings": {}}
    for batch in args.batches:
        found = {way: Measured() for way in ways}
        cases = prompts[: args.single] if batch == 1 else prompts
        for first in range(0, len(cases), batch):
            for way, settings in ways.items():
                some = cases[first : first + batch]
                found[way].add(model, tokenizer, some, list(range(first, first + len(some))), settings)
        for way, each in found.items():
            rows.append([
                batch, way, f"{each.right} of {each.cases}", f"{each.passes / each.cases:.1f}", f"{each.tokens / each.cases:.0f}",
                f"{each.speed:,.0f}", f"{each.speed / found['autoregressive'].speed:.1f}",
            ])  # fmt: skip
            print("|", " | ".join(map(str, rows[-1])), "|", file=sys.stderr, flush=True)
    print(markdown(["batch", "decoding", "exact", "passes", "tokens", "tokens/s", "ratio"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
