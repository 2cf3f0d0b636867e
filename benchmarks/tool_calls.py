"""Calls of tools in numbers: how many fit their schemas and how many are right, with and without a constraint.

    python benchmarks/tool_calls.py                                   # 300 held-out requests of the shipped checkpoint; minutes on a core
    python benchmarks/tool_calls.py --count 100 --settings released

"fits": what transformers reads in the answer are calls of declared functions, with arguments that `jsonschema` finds valid, or a text
alone. "right": it is what was asked for, as the job's checker says (`examples/jobs/calls.py`). The last table is of the released settings,
by kind of request. `--quick` is a smoke run whose numbers mean nothing.
"""

import argparse
import collections
import json
import random
import statistics
import sys
import time

import jsonschema
import torch
from transformers import AutoModelForCausalLM

from measure import heading, machine, markdown, say
from modeling_diffusiongemma import default_checkpoint

from jobs.calls import CALLS, kinds_of  # isort: skip (its folder is put on the path by `measure`)
from recipes import ToolsRecipe  # isort: skip

SETTINGS = {
    "released": {}, "greedy": {"do_sample": False}, "4 steps": {"max_denoising_steps": 4}, "2 steps": {"max_denoising_steps": 2},
    "temperature 2": {"temperature": 2.0},
}  # fmt: skip
WAYS = ("free", "constraint")
AT_ONCE = 25


def fits(prompt: str, answer: str) -> bool:
    """Whether an answer, as `ToolsRecipe.decode` gives it, is a text or calls that fit."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in json.loads(prompt)["tools"]}
    try:
        said = json.loads(answer)
        for call in said if isinstance(said, list) else ():
            jsonschema.validate(call["arguments"], schemas[call["name"]] | {"additionalProperties": False})
    except (KeyError, ValueError, jsonschema.ValidationError):
        return False
    return True


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--count", type=int, default=300, help="how many requests (default: %(default)s)")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="(default: all)")
    parser.add_argument("--checkpoint", help="a folder (default: the shipped checkpoint of tools)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.quick:
        args.count, args.settings = 3, ["2 steps"]
    torch.set_num_threads(args.threads)
    print(f"{heading(__file__, arguments, machine('cpu'))}\n")
    model, recipe = AutoModelForCausalLM.from_pretrained(args.checkpoint or default_checkpoint("tools")), ToolsRecipe()
    numbers, rows, by_kind = random.Random(1), [], {}
    prompts = [CALLS.sample(numbers, "test")[0] for _ in range(args.count)]
    for name in args.settings:
        for way in WAYS:
            say(f"{name}, {way}")
            start = time.perf_counter()
            constraints = None if way == "free" else recipe.constraints(prompts)
            settings = {"batch_size": AT_ONCE, "max_new_tokens": recipe.canvas, **SETTINGS[name]}
            answers, passes, _ = recipe.answer(model, prompts, constraints, **settings)
            right = list(map(CALLS.check, prompts, answers))
            rows.append([name, way, sum(right), sum(map(fits, prompts, answers)), f"{statistics.mean(passes):.2f}",
                         f"{time.perf_counter() - start:.0f}"])  # fmt: skip
            if name == args.settings[0]:
                for prompt, verdict in zip(prompts, right, strict=True):
                    by_kind.setdefault(kinds_of(prompt), collections.Counter())[way, verdict] += 1
    print(f"{args.count} held-out requests, canvas {recipe.canvas}, batches of {AT_ONCE}, float32\n")
    print(markdown(["setting", "way", "right", "fit", "passes", "seconds"], rows))
    print(f"\nRight, by what is asked ({args.settings[0]}):\n")
    kinds = [[kind, *(f"{found[way, True]} of {found[way, True] + found[way, False]}" for way in WAYS)] for kind, found in by_kind.items()]
    print(markdown(["request", *WAYS], sorted(kinds)))


if __name__ == "__main__":
    main(sys.argv[1:])
