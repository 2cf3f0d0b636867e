"""Held-out accuracy of a checkpoint: exact answers by a real checker, steps per canvas, tokens per forward.

    python examples/evaluate.py text --cases 500
    python examples/evaluate.py sudoku --cases 1000
    python examples/evaluate.py sudoku --cases 200 --set max_denoising_steps=16 --set entropy_bound=0.3

The model cards' numbers come from the first two.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM

from modeling_diffusiongemma import default_checkpoint
from recipes import RECIPES


def positive(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"got {given!r}; expected an integer >= 1")
    return int(given)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--checkpoint", help="folder to load (default: the shipped one)")
    parser.add_argument("--cases", type=positive, default=200, help="unseen inputs, of every job")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and of generation")
    parser.add_argument("--batch-size", type=positive, default=50)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a generation setting; repeatable")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(arguments)
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"`--json` is {str(args.json)!r}; expected a file in a folder that exists")
    return args


def settings(pairs: list[str]) -> dict:
    """`["max_denoising_steps=16"]` as keyword arguments for `generate`; values are JSON where they parse as JSON."""
    parsed = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"`--set` got {pair!r}; expected NAME=VALUE")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


def print_table(results: dict[str, dict]) -> None:
    print(f"{'':18s}{'exact':>8s}{'cases':>7s}{'steps':>7s}{'tokens per forward':>20s}")
    for name, row in results.items():
        print(f"{name:18s}{row['exact']:8.1%}{row['cases']:7d}{row['steps']:7.1f}{row['tokens_per_forward']:20.1f}")


def main() -> None:
    args = parse()
    recipe = RECIPES[args.recipe]()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint or default_checkpoint(args.recipe)).eval()
    model.set_experts_implementation("dense_mm")
    started = time.perf_counter()
    results = recipe.evaluate(model, args.cases, seed=args.seed, batch_size=args.batch_size, **settings(args.set))
    print_table(results)
    print(f"{time.perf_counter() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
